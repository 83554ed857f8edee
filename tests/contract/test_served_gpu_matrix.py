"""Every GPU template in every precision, served: plan, load, pack, bind, launch, and what the emulator computes.

Tensors pose as a GPU's, and the executing driver has the emulator run the source of the kernel that a launch names
(tests/executing.py). So this shows that the runtime gives stored kernels what they take; no binary ran. One by
default; with ``TILEWRIGHT_FULL=1`` all cells of tests/data/gpu_matrix.json that sm_80 and sm_90 have.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import Case
from covering import FULL
from executing import executing
from gpu_compiling import nearest
from numpy.typing import NDArray
from posing import pose, posing, values
from stored_kernels import store_gpu_plan, stored

from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.hardware.devices import device_key
from tilewright.codegen.numbers.dtypes import from_bytes, to_bytes
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import packable
from tilewright.codegen.space import Config
from tilewright.runtime import PreparedCall, ServeOptions, TilewrightWarning
from tilewright.runtime.launchers.cuda.driver import find_driver
from tilewright.runtime.notices import forget_warnings
from tilewright.tuner.evaluation.checking import compare_all
from tilewright.tuner.evaluation.emulated.checking import rounded_reference
from tilewright.tuner.evaluation.emulated.launches import sizes_of
from tilewright.tuner.evaluation.tensors import shape_of

pytest.importorskip("triton", reason="Triton is not installed")

TABLE: dict[str, dict[str, dict[str, str]]] = json.loads(
    (Path(__file__).parents[1] / "data/gpu_matrix.json").read_text()
)
ARCHS = ("sm_80", "sm_90")
USUAL = (("moe_gemm/triton_split_k", "int4g32", "sm_80"),)
"""What tests/e2e/test_serving_on_gpus.py, which serves every op, leaves out."""
FAST = {
    "block_m": 16,
    "block_n": 32,
    "block_k": 32,
    "num_warps": 4,
    "num_stages": 2,
    "splits": 2,
    "x_loads": "tensor_map",
    "block_kv": 32,
    "block_rows": 16,
    "block_tokens": 16,
}
"""Knobs of kernels that the emulator runs fast."""
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int32": torch.int32,
}


def cells() -> list[tuple[str, str, str]]:
    """Template, precision (or dtype) and arch."""
    every = [
        (name, row, arch)
        for name, rows in TABLE.items()
        for row, archs in rows.items()
        for arch, what in archs.items()
        if arch in ARCHS and not what.startswith("excluded")
    ]
    assert set(USUAL) <= set(every)
    return every if FULL else list(USUAL)


def signature_of(name: str, row: str) -> Signature:
    """A small signature of what a row of the table is about."""
    match name.split("/"):
        case ["moe_gemm", file]:
            stage = "up" if file == "triton_grouped" else "down"
            more = {"activation": "swiglu"} if stage == "up" else {"bias": True}
            dtype = "fp16" if row == "fp16" else "bf16"
            return MoeGemmSignature(stage=stage, experts=3, n=64, k=128, top_k=2, x_dtype=dtype, **more)
        case ["attention", file]:
            dtype = "bf16" if row == "fp8_e4m3" else row
            kinds = {"q_dtype": dtype, "kv_dtype": row, "out_dtype": dtype}
            if file == "triton_mla_decode":
                sizes = {"heads": 4, "kv_heads": 1, "head_dim": 48, "value_dim": 32, "scale": 0.2, "latent": True}
                return AttentionSignature(stage="decode", **sizes, **kinds)
            return AttentionSignature(stage=file.removeprefix("triton_"), heads=4, kv_heads=2, head_dim=32, **kinds)
        case _:
            return GatingSignature(experts=9, top_k=3, order="rows")


def config_of(name: str, row: str, signature: Signature, arch_name: str) -> Config:
    template = next(t for op in OPS.values() for t in op.templates if t.name == name)
    precisions = (row,) if template.precisions else ()
    space = template.space(signature, GPU_ARCHS[arch_name], *([precisions] if precisions else []))
    knobs = {parameter.name for parameter in space.parameters}
    return Config.of(name, nearest(space, {knob: value for knob, value in FAST.items() if knob in knobs}))


def posed(array: NDArray[Any], dtype: str) -> torch.Tensor:
    data = bytearray(to_bytes(array, dtype))
    return pose(torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[dtype]).reshape(array.shape))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row", "arch"), cells())
def test_a_plan_of_one_kernel_is_served(
    name: str, row: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = signature_of(name, row)
    op, path = find_op(signature.op), tmp_path / "tuning.db"
    kernel = stored(Case(op.name, signature, config_of(name, row, signature, arch), GPU_ARCHS[arch]))
    problem = min(op.awkward_problems(signature), key=op.input_bytes)
    arrays = {**op.weights(signature, seed=0), **op.inputs(problem, seed=0)}
    specs = signature.tensors()
    sizes = {**sizes_of(kernel.recipe, arrays), **problem.output_sizes}
    forget_warnings()
    with executing((arch,)) as driver, posing(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("error", TilewrightWarning)
        device = find_driver().device(0)
        key = device_key(device.name, device.capability, device.sm_count, device.memory_bytes)
        store_gpu_plan(path, [(None, kernel)], key)
        driver.know_database(path)
        weights = {each.name: posed(arrays[each.name], each.dtype) for each in specs if each.role == "weight"}
        options = ServeOptions(database=path, device="cuda:0", max_error=1.0)
        prepared = PreparedCall.prepare(signature, weights, options=options)
        assert prepared.is_tuned
        given = [posed(arrays[each.name], each.dtype) for each in specs if each.role == "input"]
        shapes = {each.name: shape_of(each, sizes) for each in specs if each.role == "output"}
        outputs = [
            torch.empty(shapes[each.name], dtype=DTYPES[each.dtype], device="cuda:0")
            for each in specs
            if each.role == "output"
        ]
        prepared.call(*given, *outputs)
        found = {
            each.name: from_bytes(values(out).contiguous().view(torch.uint8).numpy().tobytes(), each.dtype)
            for each, out in zip((each for each in specs if each.role == "output"), outputs, strict=True)
        }
        launched = {entry for entry, _ in driver.executed}
        assert launched == {each.entry for each in kernel.entries}
    precision = row if packable(specs) else None
    expected = rounded_reference(op, problem, precision, seed=0)
    outs = {each: array.reshape(shapes[each]) for each, array in found.items()}
    assert compare_all(outs, expected, op.tolerance(signature)).complaint is None
