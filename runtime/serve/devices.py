"""What calls are served on: this machine's CPU, or a GPU that torch calls ``cuda``. Where tensors lie decides.

Each says which plans count there, loads kernels, and binds them. A GPU on which nothing can be launched (no driver, one
that is too old, one by AMD) is a device, too: torch serves there.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from tilewright.codegen.hardware.archs import ARCHS, runs_on
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.hardware.devices import device_key
from tilewright.codegen.recipe.model import Recipe, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.bind import BoundCall, CallVariant, DeviceVariant, bind_call, bind_device_call
from tilewright.runtime.launchers.base import KernelRefused, LoadedArtifact
from tilewright.runtime.launchers.cuda.driver import CudaDevice, Driver, find_driver
from tilewright.runtime.launchers.cuda.launcher import Cubin, load_kernels
from tilewright.runtime.serve.kernels import LoadedKernel
from tilewright.runtime.serve.options import ServeOptions
from tilewright.tuning_db.records import KernelRecord, Timing

EVIDENCE_VARIABLE: Final = "TILEWRIGHT_EVIDENCE"
"""Environment variable: ``measured`` refuses plans for GPUs that were only predicted; ``predicted``, like nothing,
takes them where there is no measured one."""


@dataclass(frozen=True, eq=False)
class ServedSizes:
    """Dynamic sizes above those of the part before, up to ``max_size`` (None: without end), as a call serves them."""

    max_size: int | None
    kernel: LoadedKernel | None
    """None: the fallback."""
    aliases: Mapping[str, str]
    """Tensors of the kernel that have another name in the call."""


class ServingDevice(ABC):
    """A device that calls are served on."""

    is_host: ClassVar[bool]
    """Whether the values of its tensors can be read at once; else reading one waits for all that was asked before."""
    torch_device: torch.device
    key: str
    """By which plans name it."""
    name: str
    """By which people do."""
    why_not_predicted: ClassVar[str]
    """Why plans that were only predicted do not serve, where they do not."""
    called: str
    """In a sentence, after "on"."""
    tune_arguments: str
    """Of ``tune``, for this device."""

    @property
    @abstractmethod
    def timings(self) -> tuple[Timing, ...]:
        """Evidence of plans that may serve here, the best first.

        Raises:
            TilewrightError: when the environment asks for evidence that there is none of.

        """

    @abstractmethod
    def describe(self, threads: int) -> str:
        """The device for ``explain``, with what a call takes of it."""

    @abstractmethod
    def threads(self, options: ServeOptions) -> int:
        """Threads that plans are compared by; 0 where a kernel always takes the whole device."""

    @abstractmethod
    def require_kernels(self) -> None:
        """Refuse all plans where nothing can be launched.

        Raises:
            TilewrightError: says why.

        """

    @abstractmethod
    def require_runs(self, record: KernelRecord) -> None:
        """Refuse a kernel of another instruction set.

        Raises:
            KernelRefused: names both.

        """

    @abstractmethod
    def entries(
        self, record: KernelRecord, recipe: Recipe, artifacts: Mapping[str, LoadedArtifact]
    ) -> tuple[tuple[Any, ...], object]:
        """What is called for each launch of ``recipe``, of artifacts by checksum, and what keeps it alive.

        Raises:
            KernelRefused: when it cannot be loaded here.

        """

    @abstractmethod
    def bind(
        self,
        tensors: Sequence[TensorSpec],
        bound: Mapping[str, Tensor | int | None],
        parts: Sequence[ServedSizes],
        *,
        size_name: str,
        options: ServeOptions,
        fallback: Callable[..., None],
        name: str,
    ) -> BoundCall:
        """See :func:`tilewright.runtime.calls.bind.bind_call` and ``bind_device_call``."""


class Host(ServingDevice):
    """The CPU of this machine."""

    is_host: ClassVar[bool] = True
    why_not_predicted: ClassVar[str] = "none was measured here; tune here"
    called = "this machine"
    tune_arguments = "--arch native"

    def __init__(self) -> None:
        cpu = read_cpu_info()
        self.torch_device, self.key, self.name = torch.device("cpu"), cpu.key, cpu.name

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Measured ones alone: they are had in minutes."""
        return ("measured",)

    def describe(self, threads: int) -> str:
        """Key and threads."""
        return f"{self.key} with {threads} threads"

    def threads(self, options: ServeOptions) -> int:
        """As the options say."""
        return options.thread_count

    def require_kernels(self) -> None:
        """Kernels can always be called."""

    def require_runs(self, record: KernelRecord) -> None:
        """By its features."""
        arch = ARCHS.get(record.arch)
        if arch is None or not runs_on(arch, read_cpu_info()):
            raise KernelRefused(
                f"kernel {record.key[:16]} was built for {record.arch}, which this CPU does not run; tune here"
            )

    def entries(
        self, record: KernelRecord, recipe: Recipe, artifacts: Mapping[str, LoadedArtifact]
    ) -> tuple[tuple[Any, ...], object]:
        """Addresses."""
        del record
        addresses = tuple(artifacts[launch.artifact].entry_address(launch.entry) for launch in recipe.launches)
        return addresses, tuple(artifacts.values())

    def bind(
        self,
        tensors: Sequence[TensorSpec],
        bound: Mapping[str, Tensor | int | None],
        parts: Sequence[ServedSizes],
        *,
        size_name: str,
        options: ServeOptions,
        fallback: Callable[..., None],
        name: str,
    ) -> BoundCall:
        """Called by address, on torch's threads."""
        variants = [
            CallVariant(part.max_size)
            if part.kernel is None
            else CallVariant(
                part.max_size, part.kernel.recipe, part.kernel.entries, part.aliases, owner=part.kernel.owner
            )
            for part in parts
        ]
        return bind_call(
            tensors,
            bound,
            variants,
            size_name=size_name,
            threads=options.thread_count,
            fallback=fallback,
            name=name,
        )


class Gpu(ServingDevice):
    """A device that torch calls ``cuda``.

    Args:
        torch_device: where it is, with its index.
        device: as the driver describes it; None where nothing can be launched.
        driver: that launches; None likewise.
        why_not: why nothing can be launched.

    """

    is_host: ClassVar[bool] = False
    why_not_predicted: ClassVar[str] = f"${EVIDENCE_VARIABLE} asks for measured ones; measure them here"

    def __init__(
        self, torch_device: torch.device, device: CudaDevice | None, driver: Driver | None, why_not: str = ""
    ) -> None:
        self.torch_device = torch_device
        self._launching = (device, driver) if device and driver else None
        self._why_not = why_not
        if device:
            self.key = device_key(device.name, device.capability, device.sm_count, device.memory_bytes)
            self.name = device.name
        else:
            self.key = self.name = str(torch_device)
        self.called = f"{torch_device} ({self.key})"
        self.tune_arguments = f"--arch sm_{device.sm}" if device else "--arch ARCH"

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Predicted ones, too, unless the environment refuses them: measuring takes the device for a while."""
        asked = os.environ.get(EVIDENCE_VARIABLE, "")
        if asked not in ("", "measured", "predicted"):
            raise TilewrightError(f"${EVIDENCE_VARIABLE} is {asked!r}; give measured, predicted or nothing")
        return ("measured",) if asked == "measured" else ("measured", "predicted")

    def describe(self, threads: int) -> str:
        """Key, name and multiprocessors."""
        del threads
        if self._launching is None:
            return str(self.torch_device)
        return f"{self.key} ({self.torch_device}: {self.name}, {self._launching[0].sm_count} multiprocessors)"

    def threads(self, options: ServeOptions) -> int:
        """None: a kernel takes the whole device."""
        del options
        return 0

    def require_kernels(self) -> None:
        """Say why nothing can be launched."""
        if self._launching is None:
            raise TilewrightError(self._why_not)

    def require_runs(self, record: KernelRecord) -> None:
        """What the driver is asked when it loads a kernel is not asked here: it knows best."""
        arch = ARCHS.get(record.arch)
        if arch is None or not arch.among(("cuda",)):
            raise KernelRefused(
                f"kernel {record.key[:16]} was built for {record.arch}, which {self.name} does not run; tune for it"
            )

    def entries(
        self, record: KernelRecord, recipe: Recipe, artifacts: Mapping[str, LoadedArtifact]
    ) -> tuple[tuple[Any, ...], object]:
        """Functions that the driver loaded."""
        self.require_kernels()
        assert self._launching is not None
        device, driver = self._launching
        cubins = {checksum: artifact for checksum, artifact in artifacts.items() if isinstance(artifact, Cubin)}
        if len(cubins) < len(artifacts):
            raise KernelRefused(f"kernel {record.key[:16]} for {record.arch} has artifacts of CPUs; tune again")
        kernels = load_kernels(recipe, cubins, driver, device, toolchain=record.toolchain)
        return kernels, kernels

    def bind(
        self,
        tensors: Sequence[TensorSpec],
        bound: Mapping[str, Tensor | int | None],
        parts: Sequence[ServedSizes],
        *,
        size_name: str,
        options: ServeOptions,
        fallback: Callable[..., None],
        name: str,
    ) -> BoundCall:
        """Launched on the caller's stream."""
        device, driver = self._launching or (None, None)
        variants = [
            DeviceVariant(part.max_size)
            if part.kernel is None
            else DeviceVariant(part.max_size, part.kernel.recipe, part.kernel.entries, part.aliases)
            for part in parts
        ]
        return bind_device_call(
            tensors,
            bound,
            variants,
            size_name=size_name,
            device=device,
            driver=driver,
            fallback=fallback,
            name=name,
            checks_values=options.check_values,
            workspace=options.workspace,
            torch_device=self.torch_device,
        )


def serving_device(where: torch.device) -> ServingDevice:
    """What serves tensors on ``where``; ``cuda`` is the current one of that kind.

    Raises:
        TilewrightError: for a device of another kind.

    """
    if where.type == "cpu":
        return Host()
    if where.type != "cuda":
        raise TilewrightError(f"nothing here serves tensors on {where}; pass those of the CPU or of a CUDA device")
    if where.index is None:
        where = torch.empty(0, dtype=torch.uint8, device=where).device
    if torch.version.hip:
        return Gpu(where, None, None, "nothing here launches kernels on GPUs by AMD yet")
    try:
        driver = find_driver()
        return Gpu(where, driver.device(where.index), driver)
    except TilewrightError as error:
        return Gpu(where, None, None, str(error))


def device_of(tensors: Mapping[str, Tensor], options: ServeOptions, name: str) -> torch.device:
    """Where ``tensors`` lie, or what the options say where there are none.

    Raises:
        TilewrightError: when they lie on several devices; ``name`` begins the sentence.

    """
    places = {tensor.device: which for which, tensor in tensors.items()}
    if len(places) > 1:
        first, second = list(places.items())[:2]
        raise TilewrightError(
            f"{name}: {second[1]} is on {second[0]} and {first[1]} on {first[0]}; put all weights on one device"
        )
    return next(iter(places), options.torch_device)
