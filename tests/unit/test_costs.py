"""From plans to money: what is added up, how often, and what is left out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tuning_db_samples as samples

from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.report.costs import device_costs
from tilewright.tuning_db.records import DeviceRecord, PlanEntry, PlanRecord, TrialRecord
from tilewright.tuning_db.store import Store

ARCH = GPU_ARCHS["sm_90"]
MODEL = load_model("mixtral-8x7b", tp=2)


def plan(stage: int, tuned_us: float, default_us: float, tokens: int = 8, error: float = 0.0) -> PlanRecord:
    op = find_op("moe_gemm")
    signature = op.on(op.signatures(MODEL)[stage], ARCH)
    return PlanRecord(
        op="moe_gemm",
        signature_key=signature.key,
        signature=signature.to_dict(),
        device_key="h100-sxm",
        threads=0,
        layout="rows_bf16",
        timing="predicted",
        checked="emulated",
        precision="bf16" if error == 0 else "int8",
        error=error,
        entries=(PlanEntry(None, None, tuned_us, default_us, tokens),),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.open(str(tmp_path / "tuning.db"))
    made.put_device(DeviceRecord("h100-sxm", "H100 SXM", "sm_90"))
    return made


def test_a_step_is_every_call_times_its_layers(store: Store) -> None:
    with store:
        store.put_plan(plan(0, 100.0, 150.0))
        store.put_plan(plan(1, 60.0, 90.0))
        (cost,) = device_costs(store, MODEL, ARCH, 3.6)
    assert cost.step_us == pytest.approx(32 * 160)
    assert cost.default_step_us == pytest.approx(32 * 240)
    assert cost.tokens_per_s == pytest.approx(8 / (32 * 160e-6))
    # Two ranks at 3.6 dollars an hour: 0.002 dollars a second.
    assert cost.dollars_per_million == pytest.approx(0.002 * 32 * 160e-6 / 8 * 1e6)
    assert cost.timing == "predicted"
    assert "moe_gemm up" not in cost.missing
    assert any("attention" in name for name in cost.missing)


def test_rounded_weights_are_not_used_unless_asked_for(store: Store) -> None:
    with store:
        store.put_plan(plan(0, 100.0, 150.0))
        store.put_plan(plan(0, 50.0, 150.0, error=0.008))
        (exact,) = device_costs(store, MODEL, ARCH, 1.0)
        (rounded,) = device_costs(store, MODEL, ARCH, 1.0, max_error=0.01)
    assert exact.step_us == pytest.approx(32 * 100)
    assert rounded.step_us == pytest.approx(32 * 50)


def test_without_a_plan_there_is_no_cost(store: Store) -> None:
    with store:
        store.put_plan(replace(plan(0, 100.0, 150.0), signature_key="another"))
        with pytest.raises(TilewrightError, match="no plan for mixtral-8x7b on sm_90"):
            device_costs(store, MODEL, ARCH, 1.0)


def test_sizes_are_those_that_all_parts_know(store: Store) -> None:
    """`up` was tuned at 8 tokens, `down` at 4; it was tried at 8, and at 16, where `up` was not."""
    binary = samples.artifact()
    kernel = samples.kernel(binary)
    down = replace(plan(1, 60.0, 90.0), entries=(PlanEntry(None, kernel.key, 60.0, 90.0, 4),))
    op = find_op("moe_gemm")

    def problem_of(tokens: int) -> Problem:
        return op.problem(op.on(op.signatures(MODEL)[1], ARCH), tokens, RoutingSpec.parse("balanced"))

    def tried(tokens: int, kernel_key: str, config: dict[str, Any], median_us: float) -> TrialRecord:
        return samples.trial(
            run.id,
            signature_key=down.signature_key,
            problem=problem_of(tokens).to_dict(),
            device_key=down.device_key,
            threads=down.threads,
            config=config,
            kernel_key=kernel_key,
            timing="predicted",
            median_us=median_us,
        )

    with store:
        run = store.start_run("tune", versions={}, host="here")
        store.add_kernel(kernel, [binary])
        for tokens in (8, 16):
            default = dict(op.default_for(problem_of(tokens), ARCH))
            store.add_trials([tried(tokens, kernel.key, {}, 64.0), tried(tokens, "default", default, 96.0)])
        store.put_plan(plan(0, 100.0, 150.0))
        store.put_plan(down)
        (cost,) = device_costs(store, MODEL, ARCH, 1.0)
    assert cost.tokens == 8
    assert cost.step_us == pytest.approx(32 * 164)
    assert cost.default_step_us == pytest.approx(32 * 246)
