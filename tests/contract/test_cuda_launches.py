"""What a launch by recipe gives the CUDA driver, against what Triton's own launcher gives it: every byte is the same.

The driver is a stand-in (tests/standin) that keeps to the real one's rules and runs nothing: this shows that the launch
is the one that the binary was compiled for, and no more. All cases of a covering set with ``TILEWRIGHT_FULL=1``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from awkward import Case
from cuda_standin import Launched, StandIn, standin
from gpu_signatures import LAUNCHED_ARCHS, launched_cases
from stored_kernels import stored
from triton_launcher import active, launch_as_triton_does

from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.recipe.resolve import Place, ResolvedArgument, ResolvedLaunch, resolve
from tilewright.codegen.rendering import render
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.runtime.launchers.cuda.driver import Driver
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs

pytest.importorskip("triton", reason="Triton is not installed")

CAPABILITIES = tuple(int(name.removeprefix("sm_")) for name in LAUNCHED_ARCHS)
STREAM = 0x5EED0
SMALL_MAP_BIT = 1 << 21
"""Of a tensor map's second word: Triton 3.7 clears it for small tensors on drivers up to 13.1, on all archs; the fault
that it works around is one of Blackwell's, so that launches by recipe clear it there alone, up to 13.3."""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    made = standin()
    made.begin(CAPABILITIES)
    with active(made, tmp_path_factory.mktemp("triton")):
        yield made


def calls(recipe: Recipe, sm_count: int) -> Iterator[tuple[ResolvedLaunch, ...]]:
    """A small and a large call, tensors at addresses as the device's allocator gives them."""
    addresses = {tensor.name: (position + 1) << 32 for position, tensor in enumerate(recipe.tensors)}
    for scale in (1, 61):
        sizes = {name: scale * (position + 64) for position, name in enumerate(recipe.sizes)}
        call = resolve(recipe, sizes, {**addresses, "workspace": 1 << 40}, Place(sm_count=sm_count))
        assert not call.refusals
        yield call.launches


def compared(mine: Launched, theirs: Launched, maps: list[int]) -> None:
    for field in ("name", "device", "bank_bytes", "dynamic_smem", "stream", "cooperative", "programmatic", "spread"):
        assert getattr(mine, field) == getattr(theirs, field), field
    for field in ("grid", "block", "cluster", "written"):
        assert list(getattr(mine, field)) == list(getattr(theirs, field)), field
    banks = [bytearray(each.parameters) for each in (mine, theirs)]
    for offset in maps:  # the only difference that there may be
        for bank in banks:
            bank[offset + 8 + 2] |= SMALL_MAP_BIT >> 16
    assert banks[0] == banks[1]


def mutants(launch: ResolvedLaunch) -> Iterator[ResolvedLaunch]:
    """Launches that the driver takes as well, and that are not the one that was asked for."""
    assert launch.grid is not None
    x, *rest = launch.grid
    yield replace(launch, grid=(x + (launch.cluster[0] if launch.cluster else 1), *rest))
    yield replace(launch, programmatic=not launch.programmatic)
    for at, argument in enumerate(launch.arguments):
        if argument.buffer or argument.value:
            yield changed(launch, at, replace(argument, value=argument.value + 16))
        if argument.map is not None:
            whole, encoding = argument.map, argument.map.encoding
            promoted = replace(encoding, l2_promotion=0)
            yield changed(launch, at, replace(argument, map=replace(whole, encoding=promoted)))
            narrow = replace(encoding, box=(*encoding.box[:-1], encoding.box[-1] // 2))
            yield changed(launch, at, replace(argument, map=replace(whole, encoding=narrow)))
            yield changed(launch, at, replace(argument, map=replace(whole, shape=(whole.shape[0] + 1, whole.shape[1]))))
    plain = [at for at, argument in enumerate(launch.arguments) if argument.buffer and argument.map is None]
    for one, other in itertools.pairwise(plain):
        first, second = launch.arguments[one], launch.arguments[other]
        yield changed(changed(launch, one, second), other, first)


def changed(launch: ResolvedLaunch, at: int, argument: ResolvedArgument) -> ResolvedLaunch:
    return replace(launch, arguments=(*launch.arguments[:at], argument, *launch.arguments[at + 1 :]))


@pytest.mark.slow
@pytest.mark.parametrize("case", launched_cases(), ids=str)
def test_a_launch_by_recipe_is_the_one_that_triton_makes(case: Case, cuda: StandIn, tmp_path: Path) -> None:
    cuda.begin(CAPABILITIES)
    driver = Driver(str(cuda.path))
    device = driver.device(LAUNCHED_ARCHS.index(case.arch.name))
    kernel = stored(case)
    source = tmp_path / "kernel.py"
    source.write_text(render(case.template, case.signature, case.config, case.arch))
    for launches in calls(kernel.recipe, device.sm_count):
        for spec, launch, stored_launch in zip(kernel.entries, launches, kernel.recipe.launches, strict=True):
            blocks = launch.cluster[0] if launch.cluster else 1
            needs = Needs(launch.shared_memory_bytes, blocks)
            loaded = CudaKernel(driver, device, kernel.artifacts[launch.artifact], launch.entry, needs)
            loaded.require(stored_launch)
            before = len(cuda.launches)
            loaded.launch(launch, STREAM)
            with driver.current(device):
                launch_as_triton_does(source, spec, case.arch, launch, STREAM)
            mine, theirs = cuda.launches[before:]
            positions = [at for at, size in enumerate(loaded.parameter_bytes) if size == 128]
            maps = [loaded.parameter_offsets[at] for at in positions]
            compared(mine, theirs, maps)
            assert sum(mine.written) == sum(loaded.parameter_bytes)
            for mutant in mutants(launch):
                loaded.launch(mutant, STREAM)
                with pytest.raises(AssertionError):
                    compared(cuda.launches[-1], theirs, maps)
            with pytest.raises(KernelRefused, match="parameters, and its recipe passes"):
                loaded.require(replace(stored_launch, hidden_arguments=stored_launch.hidden_arguments - 1))
