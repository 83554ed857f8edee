"""A kernel launched by its recipe on tensors that pose as a device's: what comes out is what the op's reference says.

The driver is the stand-in, which has the emulator run the source of the kernel as the parameter bytes of the launch say
(tests/executing.py). So this shows that a stored kernel is given what it takes; nothing of its binary, nor of a GPU.
One kernel of every op, on one problem; all of a covering set on all problems with ``TILEWRIGHT_FULL=1``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from awkward import Case
from covering import FULL
from executing import executing
from gpu_signatures import covering_cases, launched_cases
from numpy.typing import NDArray
from posing import Posed, pose, values
from stored_kernels import Stored, stored

from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.numbers.dtypes import ITEMSIZE, from_bytes, to_bytes
from tilewright.codegen.numbers.layouts import RowLayout
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.recipe.model import WORKSPACE, Recipe, packable
from tilewright.codegen.recipe.resolve import Place, resolve, workspace_bytes
from tilewright.runtime.launchers.cuda.driver import CudaDevice, Driver
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs
from tilewright.runtime.weights.row_packing import pack_rows
from tilewright.tuner.evaluation.checking import compare_all
from tilewright.tuner.evaluation.emulated.checking import rounded_reference
from tilewright.tuner.evaluation.emulated.launches import sizes_of
from tilewright.tuner.evaluation.tensors import shape_of

pytest.importorskip("triton", reason="Triton is not installed")

POISON = 0xFF


USUAL = ("moe_gemm/triton_persistent", "gating/triton_fused", "attention/triton_decode")
"""What is launched by default: tensor maps, several launches with a workspace between them, and one of every op."""


def cases() -> list[Case]:
    """All that are launched with ``TILEWRIGHT_FULL=1``; else one of every op, for one arch."""
    templates = [(op.name, template) for op in OPS.values() for template in op.templates if template.name in USUAL]
    usual = [case for op, template in templates for case in covering_cases(op, template, GPU_ARCHS["sm_90"], share=1)]
    return launched_cases() if FULL else usual


def on_device(data: bytes) -> Posed:
    return pose(torch.from_numpy(np.frombuffer(bytearray(data or b"\xff"), np.uint8)))


def inputs_of(case: Case, problem: Problem, recipe: Recipe, seed: int) -> dict[str, NDArray[Any]]:
    op = find_op(case.op)
    tensors = {**op.inputs(problem, seed), **op.weights(problem.signature, seed)}
    weight = packable(recipe.tensors)
    if weight is not None and isinstance(recipe.weight_layout, RowLayout):
        tensors[weight.name] = pack_rows(tensors[weight.name], recipe.weight_layout)
    return tensors


def launched(
    kernel: Stored, tensors: Arrays, problem: Problem, driver: Driver, device: CudaDevice
) -> tuple[Arrays, dict[str, Posed]]:
    """Outputs of the kernel, and all memory that it was given."""
    recipe = kernel.recipe
    sizes = {**sizes_of(recipe, tensors), **problem.output_sizes}
    place = Place(sm_count=device.sm_count)
    memory = {WORKSPACE: on_device(bytes([POISON]) * workspace_bytes(recipe, sizes, place))}
    for spec in recipe.tensors:
        if spec.role == "output":
            nbytes = int(np.prod(shape_of(spec, sizes))) * ITEMSIZE[spec.dtype]
            memory[spec.name] = on_device(bytes([POISON]) * nbytes)
        elif spec.name in tensors:
            memory[spec.name] = on_device(to_bytes(tensors[spec.name], spec.dtype))
    call = resolve(recipe, sizes, {name: each.data_ptr() for name, each in memory.items()}, place)
    assert not call.refusals
    for launch in call.launches:
        blocks = launch.cluster[0] if launch.cluster else 1
        needs = Needs(launch.shared_memory_bytes, blocks)
        CudaKernel(driver, device, kernel.artifacts[launch.artifact], launch.entry, needs).launch(launch, 0)
    outputs = {
        spec.name: from_bytes(values(memory[spec.name]).numpy().tobytes(), spec.dtype).reshape(shape_of(spec, sizes))
        for spec in recipe.tensors
        if spec.role == "output"
    }
    return outputs, memory


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_kernel_launched_by_its_recipe_computes_the_op_in_the_emulator(case: Case) -> None:
    arch, template, op = GPU_ARCHS[case.arch.name], case.template, find_op(case.op)
    if template.emulated_problems is None:
        pytest.skip("a template that is not emulated")
    with executing((arch.name,)) as cuda:
        driver = Driver(str(cuda.path))
        problems = template.emulated_problems(case.signature, case.config, arch)
        for seed, problem in enumerate(problems if FULL else problems[:1]):
            kernel = stored(replace(case, signature=problem.signature))
            for image in kernel.artifacts.values():
                cuda.know(image, kernel.source, kernel.entries)
            tensors = inputs_of(case, problem, kernel.recipe, seed)
            outputs, memory = launched(kernel, tensors, problem, driver, driver.device(0))
            expected = rounded_reference(op, problem, case.config.get("precision"), seed)
            assert compare_all(outputs, expected, op.tolerance(problem.signature)).complaint is None
            for name, given in tensors.items():
                dtype = next(spec.dtype for spec in kernel.recipe.tensors if spec.name == name)
                assert values(memory[name]).numpy().tobytes() == (to_bytes(given, dtype) or b"\xff"), name
        assert len(cuda.executed) >= len(kernel.entries)
