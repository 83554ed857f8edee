"""A bound call on a CUDA device in Python: slower than the extension, with the same launches. It states what a call is.

It is enqueued on the stream on which the library of its tensors works in this thread, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from tilewright.codegen.recipe.model import Recipe, TensorSpec
from tilewright.codegen.recipe.resolve import Place, ResolvedCall
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.binding import Binding
from tilewright.runtime.calls.checked import CheckedCall, Passed, RefusedCall
from tilewright.runtime.calls.exchange import CUDA, CUDA_MANAGED, ROCM, read_array
from tilewright.runtime.calls.extension import know_type
from tilewright.runtime.calls.libraries import library_of
from tilewright.runtime.calls.workspaces import Workspaces
from tilewright.runtime.launchers.cuda.driver import CudaDevice, Driver
from tilewright.runtime.launchers.cuda.kernel import CudaKernel
from tilewright.runtime.launchers.cuda.launcher import require_grids

_UNREADABLE: Final = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class DeviceVariant:
    """What serves dynamic sizes up to ``max_size`` (None: all larger ones); without a recipe it is the fallback."""

    max_size: int | None
    recipe: Recipe | None = None
    kernels: tuple[CudaKernel, ...] = ()
    """The entry of each launch of the recipe, loaded on the device of the binding."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the recipe that have another name in the binding, where kernels take one in several layouts."""


@dataclass(frozen=True, kw_only=True)
class DeviceBinding(Binding[DeviceVariant]):
    """Kernels on one device.

    Where nothing can be launched, ``driver`` and ``device`` are None, and no variant has a kernel.
    """

    index: int
    """Of the device, as torch counts."""
    device: CudaDevice | None
    driver: Driver | None
    checks_values: bool
    """Whether values are looked at, for which a call waits."""
    workspaces: Workspaces
    allocate: Callable[[int], object] | None
    """Gives memory for workspaces; None: the library of a call's tensors does."""

    @cached_property
    def place(self) -> Place:
        """A device, which has multiprocessors."""
        return Place(sm_count=self.device.sm_count if self.device else None)

    @property
    def launches(self) -> bool:
        """Whether anything can be launched."""
        return bool(self.driver and self.device)

    @property
    def launching(self) -> tuple[Driver, CudaDevice]:
        """The driver and the device, where anything can be launched."""
        assert self.driver
        assert self.device
        return self.driver, self.device

    @property
    def where(self) -> str:
        """See :class:`Binding`."""
        return f"on cuda:{self.index}"

    def lies_here(self, tensor: Tensor) -> bool:
        """See :class:`Binding`."""
        return tensor.device.type == "cuda" and tensor.device.index == self.index

    def require_launches(self, variant: DeviceVariant, recipe: Recipe) -> None:
        """See :class:`Binding`."""
        require_grids(recipe)
        if len(variant.kernels) != len(recipe.launches) or (recipe.launches and not self.launches):
            raise TilewrightError(
                f"a kernel has {len(recipe.launches)} launches, and {len(variant.kernels)} entries are loaded"
            )
        for launch, kernel in zip(recipe.launches, variant.kernels, strict=True):
            kernel.require(launch)


class DeviceCall(CheckedCall[DeviceVariant]):
    """Launches the kernels of a binding through ctypes."""

    binding: DeviceBinding

    def __call__(self, *tensors: Any) -> Any:
        """See :class:`CheckedCall`. Values are not looked at, unless the binding says so."""
        if self.binding.launches:
            self.binding.launching[0].require_own_process()
        return super().__call__(*tensors)

    @property
    def checks_values(self) -> bool:
        """See :class:`CheckedCall`."""
        return self.binding.checks_values

    def read(self, spec: TensorSpec, value: Any, expected: str) -> Passed:
        """See :class:`CheckedCall`."""
        read = self.as_plain if isinstance(value, Tensor) else self._foreign
        passed = read(spec, value, expected)
        if passed.memory.elements and not passed.memory.address:
            raise TilewrightError(f"{self.binding.name}: {spec.name} has no memory: its storage was freed")
        return passed

    def array(self, passed: Passed) -> NDArray[Any]:
        """See :class:`CheckedCall`."""
        if self._is_captured(self.stream([passed])):
            raise RefusedCall(
                f"{self.binding.name}: values cannot be checked while a CUDA graph is recorded; do not ask for it there"
            )
        values: NDArray[Any] = _as_tensor(passed.value).detach().cpu().numpy()
        return values

    def workspace(self, nbytes: int, passed: Sequence[Passed | None]) -> int:
        """See :class:`CheckedCall`."""
        binding, stream = self.binding, self.stream(passed)
        if (known := binding.workspaces.find(binding.index, stream, nbytes)) is not None:
            return known
        if self._is_captured(stream):
            raise RefusedCall(
                f"{binding.name}: its workspace of {nbytes} bytes would have to be made while a CUDA graph is "
                "recorded; make a call of this size on this stream before"
            )
        library = library_of(next(each.value for each in passed if each is not None))
        allocate = binding.allocate or (lambda wanted: library.allocate(wanted, binding.index))
        try:
            return binding.workspaces.make(binding.index, stream, nbytes, allocate)
        except (MemoryError, RuntimeError) as error:  # torch's out of memory is one
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TilewrightError(f"it needs {nbytes} bytes of workspace, which it was not given: {said}") from error

    def launch(
        self, variant: DeviceVariant, call: ResolvedCall, workspace: int, passed: Sequence[Passed | None]
    ) -> None:
        """See :class:`CheckedCall`."""
        (driver, device), recipe = self.binding.launching, variant.recipe
        assert recipe is not None
        stream = self.stream(passed)
        try:
            # All or nothing: whatever is wrong with one of them is found before the first.
            ready = [kernel.make_ready(launch) for kernel, launch in zip(variant.kernels, call.launches, strict=True)]
            if recipe.workspace_zeroed and call.workspace_bytes:
                with driver.current(device):
                    driver.call("cuMemsetD8Async", workspace, 0, call.workspace_bytes, stream)
            for kernel, each in zip(variant.kernels, ready, strict=True):
                kernel.enqueue(each, stream)
        except TilewrightError as error:
            raise TilewrightError(f"{self.binding.name}: {error}") from error

    def launch_failed(self, size: int, position: int, code: int) -> None:
        """Report that the driver refused a launch of the variant for ``size`` with ``code``; -1: what comes before.

        Raises:
            TilewrightError: always.

        """
        (driver, device), variant = self.binding.launching, self.binding.variant_for(size)
        assert variant is not None
        entry = variant.kernels[max(0, position)].entry
        call = "cuLaunchKernelEx" if position >= 0 else "cuMemsetD8Async"
        raise TilewrightError(
            f"{self.binding.name}: {entry} was not launched on {device.name} by the CUDA driver "
            f"{driver.version_text}: {call}: {driver.describe(code)}"
        )

    def fall_back(self, passed: Sequence[Passed | None]) -> None:
        """See :class:`CheckedCall`."""
        present = [each for each in passed if each is not None]
        if all(isinstance(each.value, Tensor) for each in present):
            super().fall_back(passed)
            return
        # On the stream of the library whose arrays these are, so that what it enqueues next comes after.
        device = torch.device("cuda", self.binding.index)
        stream = self.stream(passed)
        on_stream = torch.cuda.stream(_external_stream(stream, device)) if stream else nullcontext()
        with on_stream:
            self.binding.fallback(*(None if each is None else _as_tensor(each.value) for each in passed))

    def stream(self, passed: Sequence[Passed | None]) -> int:
        """Handle of the stream on which the libraries of the tensors work.

        Raises:
            TilewrightError: when they work on several, or do not tell.

        """
        streams: dict[int, str] = {}
        try:
            for kind, value in {type(each.value): each.value for each in passed if each is not None}.items():
                library = library_of(value)
                streams.setdefault(library.stream(kind, self.binding.index), library.name)
        except (RuntimeError, TilewrightError) as error:
            raise RefusedCall(f"{self.binding.name}: {error}") from error
        if len(streams) > 1:
            raise RefusedCall(
                f"{self.binding.name}: its tensors are worked on by {' and '.join(streams.values())} on different "
                "streams; make one's current stream that of the other (torch.cuda.ExternalStream)"
            )
        return next(iter(streams), 0)

    def _foreign(self, spec: TensorSpec, value: Any, expected: str) -> Passed:
        """An array of another library than torch."""
        subject = f"{self.binding.name}: {spec.name}"
        try:
            kind, index = value.__dlpack_device__()
            types = (CUDA, CUDA_MANAGED) if self.binding.launches else (CUDA, CUDA_MANAGED, ROCM)
            on_device = int(kind) in types and int(index) == self.binding.index
            found = read_array(value) if on_device else None
        except _UNREADABLE as error:
            raise TilewrightError(f"{subject} is a {type(value).__name__}; {expected}") from error
        if found is None:
            raise TilewrightError(
                f"{subject} is on the device ({int(kind)}, {int(index)}) of DLPack; {expected} {self.binding.where}"
            )
        if found.dtype != spec.dtype:
            raise TilewrightError(f"{subject} has dtype {found.dtype}; {expected}")
        know_type(type(value))
        return Passed(value, found.memory)

    def _is_captured(self, stream: int) -> bool:
        if not self.binding.launches:
            return False
        driver, device = self.binding.launching
        with driver.current(device):
            return driver.is_capturing(stream)


def _external_stream(handle: int, device: torch.device) -> torch.cuda.Stream:
    make: Any = torch.cuda.ExternalStream  # without types in torch
    stream: torch.cuda.Stream = make(handle, device)
    return stream


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.utils.dlpack.from_dlpack(value)
