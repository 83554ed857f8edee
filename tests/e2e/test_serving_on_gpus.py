"""Kernels for GPUs as the runtime serves them: plan, load, pack, bind, launch, and what the emulator computes.

Tensors pose as a GPU's, and the driver carries launches out with the emulator (tests/executing.py). So what is shown is
that the launches which recipes ask for compute what the ops declare, by the kernels' source; no binary ran.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from awkward import examples, weights
from covering import FULL
from executing import ExecutingDriver, executing
from posing import pose, posing, values
from stored_kernels import Stored, store_gpu_plan, stored_variant

from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.hardware.devices import device_key
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, Gate, PagedDecode, PreparedCall, ServeOptions, TilewrightWarning, VarlenPrefill
from tilewright.runtime.calls.binding import TORCH_DTYPES
from tilewright.runtime.launchers.cuda.driver import find_driver
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.serve.devices import serving_device
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.weights.row_packing import round_rows
from tilewright.tuner.evaluation.checking import compare_all

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

ARCH, CUDA = "sm_90", torch.device("cuda", 0)
EXPERTS, HIDDEN, INTER, TOP_K = 4, 64, 64, 2
UP = MoeGemmSignature(stage="up", experts=EXPERTS, n=INTER, k=HIDDEN, top_k=TOP_K, activation="swiglu", x_dtype="bf16")
DOWN = MoeGemmSignature(stage="down", experts=EXPERTS, n=HIDDEN, k=INTER, top_k=TOP_K, x_dtype="bf16")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExecutingDriver]:
    forget_warnings()
    with executing((ARCH,)) as made, posing(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("error", TilewrightWarning)
        yield made


@pytest.fixture
def posed_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors pose, and nothing can be launched."""
    monkeypatch.setenv("TILEWRIGHT_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    forget_warnings()
    with posing(monkeypatch):
        yield


@pytest.fixture
def database(tmp_path: Path, driver: ExecutingDriver) -> Path:
    """Predicted plans of both stages; torch serves more than 100 tokens of the first."""
    path = tmp_path / "tuning.db"
    store_gpu_plan(path, [(100, up_kernel()), (None, None)], here())
    store_gpu_plan(path, [(None, down_kernel())], here())
    driver.know_database(path)
    return path


SMALL = {"block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
"""Knobs of a kernel that the emulator runs fast."""


@cache
def up_kernel() -> Stored:
    return stored_variant(UP, "triton_grouped", SMALL, ARCH, "bf16")


@cache
def down_kernel() -> Stored:
    return stored_variant(DOWN, "triton_persistent", {**SMALL, "x_loads": "tensor_map"}, ARCH, "bf16")


def here() -> str:
    """Key of the device."""
    device = find_driver().device(0)
    return device_key(device.name, device.capability, device.sm_count, device.memory_bytes)


def make_weights(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    up = torch.randn(EXPERTS, 2 * INTER, HIDDEN, generator=draw) / 8
    return up.to(dtype), (torch.randn(EXPERTS, HIDDEN, INTER, generator=draw) / 8).to(dtype)


def make_call(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, HIDDEN, generator=draw).bfloat16(), torch.randn(tokens, EXPERTS, generator=draw)


def dense(x: torch.Tensor, logits: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    """Every expert for every token in fp32, then only the chosen ones kept."""
    scale, ids = logits.softmax(-1).topk(TOP_K)
    scale = scale / scale.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,erh->ter", x.float(), w_up.float()).chunk(2, -1)
    every = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, w_down.float())
    return torch.einsum("tk,tkh->th", scale, every.gather(1, ids[..., None].expand(-1, -1, HIDDEN)))


def assert_close(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.02) -> None:
    found = values(out).float()
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_an_expert_layer(database: Path, driver: ExecutingDriver) -> None:
    held = make_weights()
    experts = Experts(*map(pose, held), top_k=TOP_K, options=ServeOptions(database=database))
    assert experts.is_tuned
    launched = [entry for entry, _ in driver.executed]
    assert launched == ["moe_gemm", "moe_gemm", "combine"]  # for one token, so that requests find everything loaded
    for tokens in (3, 9):
        x, logits = make_call(tokens)
        out = experts(pose(x), pose(logits))
        assert (out.device, out.dtype) == (CUDA, torch.bfloat16)
        assert_close(out, dense(x, logits, *held))
    explained = "\n".join(map(str, experts.explain()))
    assert "timing: predicted, checked: compiled" in explained
    assert "values of offsets, indices, lengths, pages and logits are not checked" in explained
    assert f"on {here()} (cuda:0: " in explained
    assert "moe_gemm/triton_grouped" in explained
    assert "moe_gemm/triton_persistent" in explained
    # The weights are read where they lie: nothing of them is held twice.
    assert experts.memory_bytes == 0
    assert experts.workspace_bytes(9) > experts.workspace_bytes(3) > 0


def test_a_call_in_inference_mode_with_chosen_experts_of_which_some_are_elsewhere(database: Path) -> None:
    held = make_weights()
    experts = Experts(*map(pose, held), top_k=TOP_K, all_experts=8, options=ServeOptions(database=database))
    x, _ = make_call(5)
    ids, scale = torch.tensor([[0, -1], [3, 1], [-1, -1], [2, 2], [-1, 0]]), torch.rand(5, TOP_K)
    with torch.inference_mode():
        out = experts.run(pose(x), pose(ids), pose(scale))
    every = [dense_expert(x, *(each[e] for each in held)) for e in range(EXPERTS)]
    expected = torch.stack(
        [
            sum((scale[t, j] * every[e][t] for j, e in enumerate(row.tolist()) if e >= 0), torch.zeros(HIDDEN))
            for t, row in enumerate(ids)
        ]
    )
    assert_close(out, expected)
    assert not values(out)[2].any()


def dense_expert(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, other = (x.float() @ up.float().T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * other) @ down.float().T


PRECISIONS = ("int8", "int4g32", "mxfp4", "nvfp4_a16", "fp8_e4m3_tensor") if FULL else ("int4g32",)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_in_few_bits_are_packed_on_the_device_and_can_be_given_back(
    tmp_path: Path, driver: ExecutingDriver, precision: str
) -> None:
    path = tmp_path / "tuning.db"
    kernel = stored_variant(DOWN, "triton_grouped", SMALL, ARCH, precision)
    store_gpu_plan(path, [(None, kernel)], here(), error=0.2)
    driver.know_database(path)
    _, weight = make_weights()
    options = ServeOptions(database=path, max_error=0.3, keep_weights=False)
    prepared = PreparedCall.prepare(DOWN, {"weight": pose(weight)}, options=options)
    assert prepared.precision == precision
    assert not prepared.is_exact
    rounded = torch.from_numpy(round_rows(weight.float().numpy(), find_precision(precision), "bf16"))
    torch.testing.assert_close(values(prepared.weights()["weight"]).float(), rounded, rtol=2**-8, atol=0)
    tokens, rows = 3, 6
    x, scale = torch.randn(rows, INTER).bfloat16(), torch.rand(tokens, TOP_K)
    offsets = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    slots = torch.tensor([[0, 3], [1, 5], [4, 2]], dtype=torch.int32)
    out = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16)
    prepared.call(*map(pose, (x, offsets, slots, scale)), pose(out))
    expert = torch.repeat_interleave(torch.arange(EXPERTS), offsets.diff())
    products = torch.einsum("rk,rnk->rn", x.float(), rounded[expert])
    assert_close(out, torch.einsum("tj,tjn->tn", scale, products[slots.long()]), tolerance=0.05)


def posed(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return pose(tensor.bfloat16() if dtype == "bf16" else tensor)


GATES = (
    GatingSignature(experts=9, top_k=3, order="rows"),
    GatingSignature(
        experts=16, top_k=4, score="sigmoid", bias=True, groups=4, top_groups=2, order="blocks", block_size=16
    ),
)
ATTENTION = (
    AttentionSignature(stage="decode", heads=4, kv_heads=2, head_dim=32, window=37, sinks=True, q_dtype="bf16"),
    AttentionSignature(stage="prefill", heads=4, kv_heads=2, head_dim=32, q_dtype="bf16"),
    AttentionSignature(
        stage="decode", heads=4, kv_heads=1, head_dim=48, value_dim=32, latent=True, scale=0.2, q_dtype="bf16"
    ),
)


def made_of(signature: Signature, options: ServeOptions) -> Any:
    """What users make, where there is one for ``signature``."""
    held = {name: posed(array, "fp32") for name, array in weights(signature.op, signature).items()}
    if isinstance(signature, GatingSignature):
        fields = {name: value for name, value in signature.to_dict().items() if name not in ("op", "bias")}
        return Gate.of(fields.pop("experts"), fields.pop("top_k"), bias=held.get("bias"), options=options, **fields)
    if not isinstance(signature, AttentionSignature) or signature.latent:
        return PreparedCall.prepare(signature, held, options=options)
    more = {"sinks": held.get("sinks"), "window": signature.window, "dtype": torch.bfloat16, "options": options}
    kind = PagedDecode if signature.stage == "decode" else VarlenPrefill
    return kind.of(signature.heads, signature.kv_heads, signature.head_dim, **more)


SERVED = [*GATES, *ATTENTION] if FULL else [GATES[0], ATTENTION[0]]


@pytest.mark.parametrize("signature", SERVED, ids=lambda each: each.describe())
def test_gates_and_attention(tmp_path: Path, driver: ExecutingDriver, signature: Signature) -> None:
    op, path = find_op(signature.op), tmp_path / "tuning.db"
    template = next(t for t in op.templates_for(signature, GPU_ARCHS[ARCH])).name.partition("/")[2]
    knobs = {"block_tokens": 16, "block_kv": 32, "num_warps": 4, "num_stages": 1}
    store_gpu_plan(path, [(None, stored_variant(signature, template, knobs, ARCH))], here())
    driver.know_database(path)
    made = made_of(signature, ServeOptions(database=path, device="cuda"))
    assert made.signature == signature
    assert made.is_tuned
    specs = {spec.name: spec for spec in signature.tensors()}
    example = min(examples(signature.op, signature), key=lambda each: sum(a.size for a in each.inputs.values()))
    inputs = [posed(array, specs[name].dtype) for name, array in example.inputs.items()]
    names = [name for name in specs if specs[name].role == "output"]
    outputs = [torch.zeros(example.expected[n].shape, dtype=TORCH_DTYPES[specs[n].dtype], device=CUDA) for n in names]
    made.call(*inputs, *outputs)
    numbers = [values(out).float() if out.is_floating_point() else values(out) for out in outputs]
    found = {name: each.numpy() for name, each in zip(names, numbers, strict=True)}
    assert compare_all(found, example.expected, op.tolerance(signature)).complaint is None
    assert driver.executed


@pytest.mark.filterwarnings("ignore::tilewright.runtime.TilewrightWarning")
@pytest.mark.usefixtures("posed_alone")
def test_new_outputs_lie_where_the_call_does() -> None:
    options = ServeOptions(database="/nowhere.db", device="cuda:0")
    gate = Gate.of(8, 2, order="rows", options=options)
    decode = PagedDecode.of(2, 1, 16, page_size=4, dtype=torch.bfloat16, options=options)
    gated = gate(pose(torch.randn(3, 8)))
    assert {each.device for each in gated if each is not None} == {CUDA}
    caches = [pose(torch.randn(6, 1, 4, 16).bfloat16()) for _ in range(2)]
    table, lengths = pose(torch.zeros(2, 3, dtype=torch.int32)), pose(torch.tensor([5, 9], dtype=torch.int32))
    out = decode(pose(torch.randn(2, 2, 16).bfloat16()), *caches, table, lengths)
    assert (out.device, out.dtype) == (CUDA, torch.bfloat16)


def serve_by_torch(database: Path, said: str, **options: Any) -> Experts:
    """An expert layer that torch serves, with one warning for each stage, and right."""
    held = make_weights()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TilewrightWarning)
        experts = Experts(*map(pose, held), top_k=TOP_K, options=ServeOptions(database=database, **options))
        x, logits = make_call(6)
        out = experts(pose(x), pose(logits))
    assert_close(out, dense(x, logits, *held))
    messages = [str(each.message) for each in caught]
    assert len(messages) == 2
    assert all(said in message for message in messages), messages
    assert not experts.is_tuned
    return experts


def test_without_a_plan_torch_serves(tmp_path: Path, driver: ExecutingDriver) -> None:
    experts = serve_by_torch(tmp_path / "none.db", "none.db")
    assert experts.workspace_bytes(8) > 0
    assert not driver.executed


def test_without_a_driver_torch_serves(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    serve_by_torch(database, "no CUDA driver that can be opened")


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({"archs": ("sm_80",)}, "was built for sm_90a"),
        ({"archs": (ARCH,), "version": 12000}, "the CUDA driver"),
    ],
    ids=["another arch", "an old driver"],
)
def test_on_a_device_that_cannot_run_the_kernels_torch_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: Mapping[str, Any], said: str
) -> None:
    forget_warnings()
    with executing(**devices) as driver, posing(monkeypatch):
        path = tmp_path / "tuning.db"
        key = "anything" if "version" in devices else here()
        for kernel in (up_kernel(), down_kernel()):
            store_gpu_plan(path, [(None, kernel)], key)
        serve_by_torch(path, said)
        assert not driver.executed


def test_tensors_that_are_not_aligned_are_served_by_torch(database: Path, driver: ExecutingDriver) -> None:
    held = make_weights()
    prepared = PreparedCall.prepare(UP, {"weight": pose(held[0])}, options=ServeOptions(database=database))
    x = torch.randn(3 * HIDDEN + 1).bfloat16()
    rows, offsets = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32)
    out = torch.empty(3, INTER, dtype=torch.bfloat16)
    with pytest.warns(TilewrightWarning, match=r"the kernel needs x to be a multiple of 16; plain torch serves"):
        prepared.call(pose(x)[1:].view(3, HIDDEN), *map(pose, (rows, offsets, out)))
    assert not driver.executed
    gate, up = (x[1:].view(3, HIDDEN).float() @ held[0][[0, 2, 2]].float().transpose(1, 2)).chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    assert_close(out, torch.stack([expected[0, 0], expected[1, 1], expected[2, 2]]))


def test_values_are_checked_where_that_is_asked_for(database: Path, driver: ExecutingDriver) -> None:
    options = ServeOptions(database=database, check_values=True)
    experts = Experts(*map(pose, make_weights()), top_k=TOP_K, options=options)
    assert "are not checked" not in str(experts.explain()[0])
    x, logits = make_call(2)
    driver.executed.clear()
    logits[1] = torch.nan
    with pytest.raises(TilewrightError, match="token 1 has a largest router logit of nan"):
        experts(pose(x), pose(logits))
    with pytest.raises(TilewrightError, match="token 0 picks expert 9 in slot 1"):
        experts.run(pose(x), pose(torch.tensor([[0, 9], [0, 1]])), pose(torch.ones(2, TOP_K)))
    scale = torch.tensor([[0.5, 0.5], [torch.inf, 0.5]])
    with pytest.raises(TilewrightError, match=r"topk_weights\[1, 0\] is inf; expected a finite number"):
        experts.run(pose(x), pose(torch.zeros(2, TOP_K, dtype=torch.int32)), pose(scale))
    assert [entry for entry, _ in driver.executed].count("combine") == 0


def test_an_engine_gives_the_workspace(database: Path) -> None:
    given: list[torch.Tensor] = []

    def give(nbytes: int) -> torch.Tensor:
        given.append(torch.empty(nbytes, dtype=torch.uint8, device=CUDA))
        return given[-1]

    held = make_weights()
    options = ServeOptions(database=database, workspace=give)
    experts = Experts(*map(pose, held), top_k=TOP_K, options=options)
    x, logits = make_call(7)
    assert_close(experts(pose(x), pose(logits)), dense(x, logits, *held))
    assert max(each.numel() for each in given) >= experts.down.workspace_bytes(tokens=7, rows=14)


def test_tensors_elsewhere_are_refused_in_a_sentence(database: Path, driver: ExecutingDriver) -> None:
    experts = Experts(*map(pose, make_weights()), top_k=TOP_K, options=ServeOptions(database=database))
    driver.executed.clear()
    x, logits = make_call(2)
    for wrong, said in (
        ((x, pose(logits)), "x is on device cpu; expected"),
        ((pose(x), logits), "router_logits is on cpu, and the experts on cuda:0"),
        ((pose(x, 1), pose(logits)), "x is on device cuda:1"),
        ((pose(x.float()), pose(logits)), "x has dtype torch.float32; expected torch.bfloat16"),
    ):
        with pytest.raises(TilewrightError, match=said) as refusal:
            experts(*wrong)
        assert "\n" not in str(refusal.value)
    assert not driver.executed
    up, down = make_weights()
    with pytest.raises(TilewrightError, match=r"w_down torch.float32 on cpu; give both one dtype and one device"):
        Experts(pose(up), down.float(), top_k=TOP_K, options=ServeOptions(database=database))


def test_plans_are_found_by_the_device_of_the_weights(database: Path) -> None:
    options = ServeOptions(database=database)
    assert is_planned(UP, options, CUDA)
    assert is_planned(UP, replace(options, device="cuda"))
    assert not is_planned(UP, options)
    assert serving_device(CUDA).key != serving_device(torch.device("cpu")).key
