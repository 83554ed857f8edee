"""Every template of every op, against the op's reference; a new template is covered without a change here.

Variants cover every value of every knob and every signature, with ``TILEWRIGHT_FULL=1`` every pair of them. Each is
built and called on awkward problems, alone and on threads, with buffers that start at odd addresses, hold NaN where
nothing was written, and are guarded on both sides.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from awkward import Case, cases, examples, few_cases, only_adds_products, precision_cases, weights
from guarded_calls import Call, forking, run_kernel, tensors_for
from standalone_kernels import Toolchain

from tilewright.codegen.backends.base import Source
from tilewright.codegen.backends.cpp.builder import CppBuilder
from tilewright.codegen.hardware.archs import ARCHS, CPU_ARCHS, Arch, native_arch, runs_on
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.precisions import find_precision
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.rendering import render
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.openmp import fork_address
from tilewright.tuner.evaluation.checking import compare_all

DEFINITION = """
  for (int l = 0; l < kLanes; l++) {
    for (int t = 0; t < 4; t++) sum[l] += (uint8_t)(w[l] >> 8 * t) * (int8_t)(splat[l] >> 8 * t);
  }
"""
"""Of ``vpdpbusd`` (Intel 64 and IA-32 Architectures Software Developer's Manual), for CPUs without it."""

FOREIGN = [arch for arch in CPU_ARCHS.values() if arch.machine == native_arch().machine and arch != native_arch()]


@cache
def calls() -> tuple[Call, ...]:
    """Threads that come, do not come, or were never to be had."""
    openmp = fork_address()
    on_pool = (Call("two threads of OpenMP", 2, openmp),) if openmp else ()
    return (
        Call("one thread", 1),
        Call("two threads, no fork", 2),
        *on_pool,
        Call("five threads asked, two started", 5, forking(2)),
        Call("three threads asked, one started", 3, forking(1)),
    )


def builder_for(arch: Arch) -> CppBuilder:
    try:
        return CppBuilder(arch)
    except TilewrightError as error:
        pytest.skip(str(error))


def samples(arch: Arch) -> list[Case]:
    """Few cases; of an arch that has no more than products of integers beside another one, those that use them."""
    chosen = [*few_cases(arch, 4), *precision_cases(arch)]
    return [case for case in chosen if find_precision(case.precision).x_dtype or not only_adds_products(arch)]


def source_of(case: Case) -> str:
    return render(case.template, case.signature, case.config, case.arch)


@pytest.mark.parametrize("case", cases(native_arch()), ids=str)
def test_variant_matches_the_reference(case: Case) -> None:
    build = builder_for(native_arch()).build(source_of(case))
    assert build.path is not None, build.message
    op = find_op(case.op)
    recipe = case.template.recipe(case.signature, case.config, case.arch)
    for example in examples(case.op, case.signature, case.precision):
        tensors = tensors_for(recipe, weights(case.op, case.signature), example.inputs)
        results = set()
        for call in calls():
            out = run_kernel(build.path, recipe, tensors, example.expected, call)
            complaint = compare_all(out, example.expected, op.tolerance(case.signature)).complaint
            assert complaint is None, f"{call.name}: {example.problem.to_dict()}: {complaint}"
            results.add(tuple(array.tobytes() for array in out.values()))
        assert len(results) == 1, f"the result depends on the number of threads: {example.problem.to_dict()}"


@pytest.mark.parametrize("arch", FOREIGN, ids=lambda arch: arch.name)
def test_other_levels_of_this_machine_compile(arch: Arch) -> None:
    """Compiled is all that is known of them, unless this CPU runs them, too."""
    builder = builder_for(arch)
    chosen = samples(arch)
    for case, build in zip(chosen, builder.build_all([Source(source_of(case)) for case in chosen]), strict=True):
        assert build.path is not None, f"{case}: {build.message}"
        if not runs_on(arch, read_cpu_info()):
            continue
        recipe = case.template.recipe(case.signature, case.config, arch)
        for example in examples(case.op, case.signature, case.precision):
            tensors = tensors_for(recipe, weights(case.op, case.signature), example.inputs)
            out = run_kernel(build.path, recipe, tensors, example.expected, calls()[0])
            assert compare_all(out, example.expected, find_op(case.op).tolerance(case.signature)).complaint is None, (
                case
            )


def check_standalone(case: Case, toolchain: Toolchain, folder: Path, source: str = "") -> None:
    op = find_op(case.op)
    recipe = case.template.recipe(case.signature, case.config, case.arch)
    program = toolchain.build(source or source_of(case), recipe.launches[0].entry, folder / "program")
    for example in examples(case.op, case.signature, case.precision):
        tensors = tensors_for(recipe, weights(case.op, case.signature), example.inputs)
        out = toolchain.run(program, recipe, tensors, example.expected, threads=2)
        complaint = compare_all(out, example.expected, op.tolerance(case.signature)).complaint
        assert complaint is None, f"{example.problem.to_dict()}: {complaint}"


@pytest.mark.skipif(native_arch().machine != "x86_64", reason="an instruction of x86-64 in vectors of AVX2")
@pytest.mark.parametrize("case", samples(ARCHS["x86_64_avx2_vnni"]), ids=str)
def test_variant_with_vnni_matches_the_reference_by_the_instructions_definition(case: Case, tmp_path) -> None:
    """All of the kernel but that instruction: the offset of the weights, and what frees sums of it."""
    text = source_of(case)
    instruction = re.search(r"  asm\(.*vpdpbusd.*\);\n", text)
    assert instruction
    baseline = replace(ARCHS["x86_64_avx2"], name=case.arch.name)
    compiler = builder_for(baseline).compiler.command
    check_standalone(
        case, Toolchain(compiler, baseline, ()), tmp_path, text.replace(instruction[0], DEFINITION.lstrip("\n"))
    )


@pytest.mark.parametrize("case", [*samples(ARCHS["aarch64_neon"]), *samples(ARCHS["aarch64_neon_dotprod"])], ids=str)
def test_variant_for_arm_matches_the_reference_in_an_emulator(case: Case, tmp_path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        missing = "aarch64-linux-gnu-g++" if compiler is None else "qemu-aarch64"
        pytest.skip(f"{missing} is not installed (Debian: apt install g++-aarch64-linux-gnu qemu-user)")
    check_standalone(case, Toolchain(compiler, case.arch, ("-static",), (emulator,)), tmp_path)


@pytest.mark.parametrize("case", few_cases(native_arch(), 2), ids=str)
@pytest.mark.parametrize("sanitizers", ["address", "thread"])
def test_sanitizers_find_nothing(case: Case, sanitizers: str, tmp_path) -> None:
    """Reads beyond a tensor and races between threads seldom change a result."""
    compiler = builder_for(case.arch).compiler.command
    flags = (f"-fsanitize={sanitizers}", "-O1")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    linked = subprocess.run([compiler, *flags, probe, "-o", tmp_path / "probe"], capture_output=True, check=False)
    if linked.returncode or subprocess.run([tmp_path / "probe"], check=False).returncode:
        pytest.skip(f"{compiler} has no working {sanitizers} sanitizer here")
    check_standalone(case, Toolchain(compiler, case.arch, flags), tmp_path)
