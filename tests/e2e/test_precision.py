"""Weights in fewer bits, from the command line to served results: who asks for them gets them, and nobody else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from awkward import rounded

from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import ARCHS, native_arch
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.precisions import LOSSLESS, find_precision
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, ServeOptions, TilewrightWarning, prepare
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuner.cli import main
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuning_db.records import DeviceRecord, Outcome, PlanEntry, PlanRecord
from tilewright.tuning_db.store import Store

OP = find_op("moe_gemm")
SIGNATURE = MoeGemmSignature(stage="up", experts=3, n=24, k=64, top_k=2, activation="swiglu")
ERRORS = {LOSSLESS: 0.0, "int8": 0.01, "int8_a8": 0.02, "int4g32": 0.1}
TOKENS = 5


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans of several precisions, the fewer bits the faster, with kernels of all their templates."""
    arch = native_arch()
    try:
        variant_builder = VariantBuilder(OP, SIGNATURE, arch, {"cpp": CppBuilder(arch)})
    except TilewrightError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("precision") / "tuning.db"
    with Store.open(path) as store:
        store.put_device(DeviceRecord(read_cpu_info().key, "test", arch.name))
        for rank, (precision, error) in enumerate(ERRORS.items()):
            if OP.precisions(SIGNATURE, arch)[precision]:
                continue
            space = OP.space(SIGNATURE, arch, precisions=(precision,))
            built = []
            for template in (t for t in OP.templates_for(SIGNATURE, arch) if precision in t.precisions):
                fitting = [c for c in space if c["template"] == template.name]
                first = next((b.variant.layout_key for b in built), None)
                config = next(c for c in fitting if first in (None, OP.layout_key(SIGNATURE, c, arch)))
                built += variant_builder.build([config])
            entries = []
            for bound, each in zip((2, None)[-len(built) :], built, strict=True):
                record, artifacts = variant_builder.record(each, "device")
                store.add_kernel(record, artifacts)
                entries.append(PlanEntry(bound, record.key, 100.0 - rank, 200.0, bound or 8))
            store.put_plan(
                PlanRecord(
                    op=OP.name,
                    signature_key=SIGNATURE.key,
                    signature=SIGNATURE.to_dict(),
                    device_key=read_cpu_info().key,
                    threads=2,
                    layout=built[0].variant.layout_key,
                    timing="measured",
                    checked="device",
                    entries=tuple(entries),
                    precision=precision,
                    error=error,
                )
            )
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return OP.weights(SIGNATURE, seed=0)


def serve(weights: dict[str, np.ndarray], database: Path, tokens: int, **options: Any) -> tuple[np.ndarray, object]:
    inputs = OP.inputs(OP.problem(SIGNATURE, tokens, RoutingSpec.parse("balanced")), seed=1)
    prepared = prepare(
        torch.from_numpy(weights["weight"]),
        stage="up",
        top_k=2,
        activation="swiglu",
        options=ServeOptions(threads=2, database=database, **options),
    )
    out = torch.empty(len(inputs["row_token"]), SIGNATURE.n)
    prepared(*(torch.from_numpy(inputs[name]) for name in ("x", "row_token", "expert_offsets")), out)
    return out.numpy(), prepared


def skip_without(precision: str) -> None:
    if refusal := OP.precisions(SIGNATURE, native_arch())[precision]:
        pytest.skip(refusal)


def exact(weights: dict[str, np.ndarray], tokens: int, precision: str) -> np.ndarray:
    inputs = OP.inputs(OP.problem(SIGNATURE, tokens, RoutingSpec.parse("balanced")), seed=1)
    stored = weights["weight"]
    if precision != LOSSLESS:
        stored = rounded(stored, find_precision(precision))
    inputs = OP.rounded_inputs(SIGNATURE, inputs, precision)
    return OP.reference(SIGNATURE, {**weights, "weight": stored}, inputs)["out"]


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize(
    ("max_error", "precision"),
    [(0.0, LOSSLESS), (0.009, LOSSLESS), (0.01, "int8"), (0.05, "int8_a8"), (1.0, "int4g32")],
)
def test_the_fastest_plan_within_the_error_serves(weights, database, max_error, precision, tokens) -> None:
    skip_without(precision)
    out, prepared = serve(weights, database, tokens, max_error=max_error)
    expected = exact(weights, tokens, precision)
    assert np.abs(out - expected).max() <= OP.tolerance(SIGNATURE) * np.abs(expected).max()
    explanation = prepared.explain()
    assert explanation.resolution.plan.precision == precision
    assert (f"precision {precision}: results are off by {ERRORS[precision]:.2g}" in str(explanation)) == (
        precision != LOSSLESS
    )
    (layout,) = explanation.resolution.layouts
    words = layout.packed_words(*weights["weight"].shape)
    assert prepared.memory.bytes == 4 * words
    assert prepared.memory.weight_bytes == weights["weight"].nbytes
    assert f"process before packing: {prepared.memory.before}" in str(explanation)


def test_nothing_is_rounded_unless_it_is_asked_for(weights, database) -> None:
    _, prepared = serve(weights, database, TOKENS)
    assert prepared.explain().resolution.plan.precision == LOSSLESS


def test_fewer_bits_take_less_memory(weights, database) -> None:
    sizes = [serve(weights, database, 1, max_error=error)[1].memory_bytes for error in (0.0, 0.01, 1.0)]
    assert sizes[0] > 3 * sizes[1]
    assert sizes[1] > 1.5 * sizes[2]


def test_the_fallback_reads_back_what_was_packed(weights, database) -> None:
    """Without the original, torch computes from the words: a strided input is what kernels do not take."""
    _, prepared = serve(weights, database, 1, max_error=1.0, keep_weights=False)
    inputs = OP.inputs(OP.problem(SIGNATURE, TOKENS, RoutingSpec.parse("balanced")), seed=1)
    x = torch.from_numpy(np.repeat(inputs["x"], 2, axis=1))[:, ::2]
    out = torch.empty(len(inputs["row_token"]), SIGNATURE.n)
    with pytest.warns(TilewrightWarning, match="x is not contiguous"):
        prepared(x, torch.from_numpy(inputs["row_token"]), torch.from_numpy(inputs["expert_offsets"]), out)
    expected = exact(weights, TOKENS, "int4g32")
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_only_plans_with_a_larger_error_leave_torch(weights, tmp_path, database) -> None:
    with Store.open(database) as store:
        (lossy,) = (plan for plan in store.plans() if plan.precision == "int8")
        kernels = {entry.kernel_key: store.kernel(entry.kernel_key) for entry in lossy.entries}
        artifacts = {key: store.artifact(kernel.artifacts[0]) for key, kernel in kernels.items()}
    assert all(artifacts.values())
    tmp_path.chmod(0o700)
    with Store.open(tmp_path / "lossy.db") as store:
        store.put_device(DeviceRecord(read_cpu_info().key, "test", native_arch().name))
        store.put_plan(replace(lossy, entries=(PlanEntry(None, None),)))
    with pytest.warns(UserWarning, match=r"least error \(int8\) is off by 0.01, and max_error is 0"):
        out, _ = serve(weights, tmp_path / "lossy.db", TOKENS)
    np.testing.assert_allclose(out, exact(weights, TOKENS, LOSSLESS), atol=1e-5)


@pytest.fixture
def mixed_database(tmp_path: Path, database: Path) -> Path:
    """One plan of two weight layouts: few tokens by a kernel on exact weights, more by one on int8."""
    with Store.open(database) as store:
        plans = {plan.precision: plan for plan in store.plans()}
        kernels = [store.kernel(plans[name].entries[0].kernel_key) for name in (LOSSLESS, "int8")]
        artifacts = [[store.artifact(checksum) for checksum in kernel.artifacts] for kernel in kernels]
    tmp_path.chmod(0o700)
    with Store.open(tmp_path / "mixed.db") as store:
        store.put_device(DeviceRecord(read_cpu_info().key, "test", native_arch().name))
        for kernel, own in zip(kernels, artifacts, strict=True):
            store.add_kernel(kernel, own)
        few, many = (
            PlanEntry(bound, kernel.key, 100.0, 200.0, 2) for bound, kernel in zip((2, None), kernels, strict=True)
        )
        layouts = "+".join(plans[name].layout for name in (LOSSLESS, "int8"))
        plan = replace(plans["int8"], precision="fp32+int8", layout=layouts, entries=(few, many))
        store.put_plan(plan)
    return tmp_path / "mixed.db"


@pytest.mark.parametrize(("tokens", "precision"), [(1, LOSSLESS), (2, LOSSLESS), (3, "int8"), (TOKENS, "int8")])
def test_a_plan_of_two_precisions_holds_both_and_serves_each_where_it_says(
    weights, mixed_database, tokens, precision
) -> None:
    out, prepared = serve(weights, mixed_database, tokens, max_error=0.01)
    expected = exact(weights, tokens, precision)
    tolerance = OP.tolerance(SIGNATURE) * np.abs(expected).max()
    assert np.abs(out - expected).max() <= tolerance
    other = exact(weights, tokens, "int8" if precision == LOSSLESS else LOSSLESS)
    assert np.abs(out - other).max() > tolerance
    explanation = prepared.explain()
    assert "precision fp32+int8: results are off by 0.01" in str(explanation)
    words = [layout.packed_words(*weights["weight"].shape) for layout in explanation.resolution.layouts]
    assert len(words) == 2
    assert prepared.memory.bytes == 4 * sum(words)


def test_a_plan_of_two_precisions_counts_as_its_least_exact_one(weights, mixed_database) -> None:
    with pytest.warns(UserWarning, match=r"least error \(fp32\+int8\) is off by 0.01, and max_error is 0"):
        out, _ = serve(weights, mixed_database, 1)
    np.testing.assert_allclose(out, exact(weights, 1, LOSSLESS), atol=1e-5)


def test_weights_with_nan_are_refused(weights, database) -> None:
    bad = {"weight": weights["weight"].copy()}
    bad["weight"][2, 5, 7] = np.nan
    with pytest.raises(TilewrightError, match="NaN, infinity or values beyond"):
        serve(bad, database, 1, max_error=1.0)
    serve(bad, database, 1)  # as they are


def test_a_row_that_cannot_be_rounded_gives_nan_and_spoils_no_other(weights, database) -> None:
    skip_without("int8_a8")
    inputs = OP.inputs(OP.problem(SIGNATURE, TOKENS, RoutingSpec.parse("balanced")), seed=1)
    expected = exact(weights, TOKENS, "int8_a8")
    x = inputs["x"].copy()
    x[0, 3], x[1, 63], x[2] = np.nan, -np.inf, 1e-35
    _, prepared = serve(weights, database, TOKENS, max_error=0.05)
    out = torch.empty(len(inputs["row_token"]), SIGNATURE.n)
    prepared(torch.from_numpy(x), *(torch.from_numpy(inputs[name]) for name in ("row_token", "expert_offsets")), out)
    tokens = inputs["row_token"]
    assert np.isnan(out.numpy()[tokens < 2]).all()
    assert (out.numpy()[tokens == 2] == 0).all()
    np.testing.assert_allclose(out.numpy()[tokens > 2], expected[tokens > 2], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("max_error", [-1, float("nan"), float("inf"), "much"])
def test_an_impossible_error_is_named(weights, database, max_error) -> None:
    with pytest.raises(TilewrightError, match="max_error="):
        serve(weights, database, 1, max_error=max_error)


def test_experts_take_an_error_for_both_stages(database) -> None:
    gate_up, down = torch.randn(3, 48, 64), torch.randn(3, 64, 24)
    with pytest.warns(UserWarning, match="stage=down .* no plan"):
        experts = Experts(gate_up, down, top_k=2, options=ServeOptions(threads=2, database=database, max_error=0.01))
    assert experts.explain()[0].resolution.plan.precision == "int8"


PROBLEM = ["--arch", "native", "--op", "moe_gemm", "--problem", "experts=2,n=24,k=64,top_k=1", "--tokens", "1,3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "int3"], "unknown precision 'int3'"),
        (["--precision", "int8", "--max-error", "-1"], "--max-error -1.0 is impossible"),
        (["--precision", "int8g128"], "k=64 is no multiple of the 128 steps"),
    ],
)
def test_mistakes_on_the_command_line(words, said, tmp_path, capsys) -> None:
    assert main([*PROBLEM, *words, "--db", str(tmp_path / "tuning.db")]) != 0
    assert said in capsys.readouterr().err


def test_tuning_with_rounded_activations(tmp_path, capsys) -> None:
    skip_without("int8_a8")
    tmp_path.chmod(0o700)
    words = ["--tokens", "2", "--precision", "int8_a8", "--max-error", "0.03", "--trials", "8", "--threads", "1"]
    assert main([*PROBLEM, *words, "--json", "--db", str(tmp_path / "tuning.db")]) == 0
    (found,) = json.loads(capsys.readouterr().out)["signatures"]
    with Store.open_read_only(tmp_path / "tuning.db") as store:
        tried = [t for t in store.trials() if t.config["template"] == "moe_gemm/cpu_integer"]
        plans = {plan.precision for plan in store.plans()}
    assert {trial.config["precision"] for trial in tried} == {"int8_a8"}
    assert Outcome.OK in {trial.outcome for trial in tried} <= {Outcome.OK, Outcome.BUILD_FAILED}  # in time, or not
    assert found["precision"] in plans <= {LOSSLESS, "int8_a8"}


def test_the_error_of_a_precision_counts_rounded_activations() -> None:
    problem = OP.problem(SIGNATURE, TOKENS, RoutingSpec.parse("balanced"))
    weights, inputs = OP.weights(SIGNATURE, seed=0), OP.inputs(problem, seed=0)
    rounded_x = OP.rounded_inputs(SIGNATURE, inputs, "int8_a8")
    rounded_weights = {**weights, "weight": rounded(weights["weight"], find_precision("int8_a8"))}
    right, out = OP.reference(SIGNATURE, weights, inputs), OP.reference(SIGNATURE, rounded_weights, rounded_x)
    with CpuEvaluator(OP, SIGNATURE, threads=1) as evaluator:
        of_weights, of_both = (evaluator.precision_error(problem, name).relative for name in ("int8", "int8_a8"))
    assert of_both == pytest.approx(np.linalg.norm(out["out"] - right["out"]) / np.linalg.norm(right["out"]))
    assert 0.003 < of_weights < of_both < 0.03


def test_an_arch_without_integer_products_says_what_is_missing(tmp_path, capsys, monkeypatch) -> None:
    without = replace(native_arch(), dot="")
    monkeypatch.setitem(ARCHS, without.name, without)
    monkeypatch.setattr("tilewright.codegen.hardware.archs.native_arch", lambda: without)
    words = [*PROBLEM, "--precision", "int8_a8", "--db", str(tmp_path / "tuning.db")]
    assert main(words) != 0
    assert f"int8_a8 are impossible on {without.name}: it has no dot product of integers" in capsys.readouterr().err


def test_tuning_over_precisions_stores_the_front(tmp_path, capsys) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "tuning.db"
    words = ["--precision", "int8,int4g32,mxfp4", "--max-error", "0.09", "--trials", "16", "--seed", "1", "--json"]
    assert main([*PROBLEM, *words, "--threads", "1", "--db", str(path)]) == 0
    printed = capsys.readouterr()
    assert "precision mxfp4 is off by" in printed.err  # over the budget, so that nothing was spent on it
    (found,) = json.loads(printed.out)["signatures"]
    front = found["front"]
    assert front[0]["precision"] == LOSSLESS
    assert [point["error"] for point in front] == sorted(point["error"] for point in front)
    times = [point["geometric_mean_us"] for point in front]
    assert times == sorted(times, reverse=True)
    assert all(point["error"] <= 0.09 for point in front)
    with Store.open_read_only(path) as store:
        plans = {plan.precision: plan for plan in store.plans()}
        assert {point["precision"] for point in front} | {found["precision"]} == plans.keys()
        for point in front:
            assert plans[point["precision"]].error == pytest.approx(point["error"])
        tried = {trial.config["precision"] for trial in store.trials()}
    assert tried <= {LOSSLESS, "int8", "int4g32"}
    assert main(["show", "--db", str(path)]) == 0
    shown = capsys.readouterr().out
    for plan in plans.values():
        assert (f"precision {plan.precision}, off by" in shown) == (plan.error > 0)
