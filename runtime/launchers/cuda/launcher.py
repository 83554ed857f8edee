"""Cubins: which recipes launch them, and their entries on a device, such that what is loaded is what was checked.

Nothing is loaded until a device is known; then once for each device, and never unloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.recipe.expressions import parsed
from tilewright.codegen.recipe.model import THREADS, Launch, Recipe
from tilewright.codegen.recipe.resolve import Place
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused, Launcher
from tilewright.runtime.launchers.cuda.driver import CudaDevice, Driver
from tilewright.runtime.launchers.cuda.image import Target, read_target
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs
from tilewright.runtime.locks import fork_safe_lock
from tilewright.tuning_db.integrity import verified

_PTXAS: Final = re.compile(r"\bptxas (\d+)\.(\d+)")
_FOR_ONE: Final = re.compile(r"\bfor sm_\d+a\b")
_CLUSTERS_FROM: Final = 90


@dataclass(frozen=True)
class Cubin:
    """A cubin whose bytes are those that its checksum names."""

    checksum: str
    image: bytes = field(repr=False)
    target: Target

    def entry_address(self, name: str) -> int:
        """There is none: an entry is loaded on a device (:func:`load_kernels`).

        Raises:
            KernelRefused: always.

        """
        raise KernelRefused(f"{name} of the artifact {self.checksum[:16]} runs on a GPU, and this call is the CPU's")


class CudaLauncher(Launcher):
    """Cubins, whose entries are launched over grids."""

    kind: ClassVar[str] = "cubin"

    def require(self, recipe: Recipe) -> None:
        """See :func:`require_grids`."""
        require_grids(recipe)

    def weight_layout(self, recipe: Recipe) -> RowLayout | None:
        """The rows in which a kernel takes its weight; None: as the op declares it.

        Raises:
            KernelRefused: when it is one of the CPU's.

        """
        if isinstance(recipe.weight_layout, WeightLayout):
            raise KernelRefused(
                f"the kernel takes its weight in the layout {recipe.weight_layout.key}, which is one for CPUs; "
                "tune again"
            )
        return recipe.weight_layout

    def load(self, checksum: str, read_bytes: Callable[[], bytes]) -> Cubin:
        """The cubin whose sha256 is ``checksum``, its bytes verified; once read, the same one every time.

        Raises:
            KernelRefused: for what is no cubin.
            DamagedArtifact: when the bytes do not have the checksum.
            TilewrightError: whatever ``read_bytes`` raises.

        """
        if (known := _cubins.get(checksum)) is None:
            image = verified(checksum, read_bytes())
            try:
                target = read_target(image)
            except KernelRefused as error:
                raise KernelRefused(f"the artifact {checksum[:16]} cannot be loaded: {error}") from error
            known = _cubins.setdefault(checksum, Cubin(checksum, image, target))
        return known


def require_grids(recipe: Recipe) -> None:
    """Refuse a kernel that is not launched as the entry of a cubin is.

    Raises:
        KernelRefused: names what it asks for.

    """
    for launch in recipe.launches:
        if not launch.grid:
            raise KernelRefused(f"the kernel's entry {launch.entry} has no grid: it is one for CPUs; tune again")
        for text in (*launch.cluster, launch.shared_memory_bytes):
            if {*recipe.sizes} & parsed(text).symbols:
                raise KernelRefused(
                    f"the kernel's entry {launch.entry} is loaded for {text!r}, which differs from call to call; "
                    "tune again"
                )
    if any(THREADS in parsed(text).symbols for text in recipe.expressions):
        raise KernelRefused(f"the kernel asks for {THREADS}, a number of CPU threads: it is one for CPUs; tune again")


def load_kernels(
    recipe: Recipe, cubins: Mapping[str, Cubin], driver: Driver, device: CudaDevice, *, toolchain: str = ""
) -> tuple[CudaKernel, ...]:
    """The entry of each launch of ``recipe``, on ``device``; each is loaded once, whoever asks. Thread-safe.

    Args:
        recipe: that the kernel is launched by.
        cubins: by checksum.
        driver: that loads them.
        device: that they are loaded on.
        toolchain: what made them, as it is stored with the kernel; empty: not known.

    Raises:
        KernelRefused: when the device or the driver does not run them, or they take other parameters than the recipe
            passes.

    """
    require_grids(recipe)
    for checksum in dict.fromkeys(launch.artifact for launch in recipe.launches):
        _require_device(cubins[checksum].target, driver, device, toolchain)
    wanted = [(launch, _needs(launch, device)) for launch in recipe.launches]
    return tuple(_load(cubins[launch.artifact], launch, needs, driver, device) for launch, needs in wanted)


def _require_device(target: Target, driver: Driver, device: CudaDevice, toolchain: str) -> None:
    if _FOR_ONE.search(toolchain):
        target = replace(target, is_exact=True)
    if not target.runs_on(device.sm):
        raise KernelRefused(
            f"the kernel was built for {target}, and {device.name} is sm_{device.sm}; tune with --arch sm_{device.sm}"
        )
    assembler = _PTXAS.search(toolchain)
    if assembler and int(assembler[1]) > driver.version // 1000:
        raise KernelRefused(
            f"the kernel was assembled by ptxas {assembler[1]}.{assembler[2]}, and the driver here is CUDA "
            f"{driver.version_text}; update the driver, or tune with an older ptxas"
        )


def _needs(launch: Launch, device: CudaDevice) -> Needs:
    """What an entry is loaded for, where the device has it."""
    names = Place(sm_count=device.sm_count).names
    smem_bytes = parsed(launch.shared_memory_bytes).evaluate(names)
    blocks = 1
    for text in launch.cluster:
        blocks *= parsed(text).evaluate(names)
    if smem_bytes > device.smem_bytes_per_block:
        raise KernelRefused(
            f"a block of {launch.entry} needs {smem_bytes} bytes of shared memory, and {device.name} has "
            f"{device.smem_bytes_per_block} for one; tune for this device"
        )
    if blocks > 1 and device.sm < _CLUSTERS_FROM:
        raise KernelRefused(f"{launch.entry} is launched in clusters, which {device.name} lacks; tune for this device")
    return Needs(smem_bytes, blocks)


def _load(cubin: Cubin, launch: Launch, needs: Needs, driver: Driver, device: CudaDevice) -> CudaKernel:
    key = (driver, device.index, cubin.checksum, launch.entry, needs)
    if (known := _kernels.get(key)) is None:
        with _loading:
            if key not in _kernels:
                try:
                    _kernels[key] = CudaKernel(driver, device, cubin.image, launch.entry, needs)
                except KernelRefused:
                    raise
                except TilewrightError as error:
                    raise KernelRefused(f"{launch.entry} cannot be loaded on {device.name}: {error}") from error
            known = _kernels[key]
    known.require(launch)
    return known


_cubins: dict[str, Cubin] = {}
_kernels: dict[tuple[Driver, int, str, str, Needs], CudaKernel] = {}
_loading = fork_safe_lock()
