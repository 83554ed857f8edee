"""A stored entry on one device: loaded, compared with its recipe, and launched on the caller's stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Final

from tilewright.codegen.recipe.model import Argument, Launch
from tilewright.codegen.recipe.resolve import Grid, ResolvedLaunch, ResolvedMap
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused
from tilewright.runtime.launchers.cuda.driver import (
    CLUSTER_DIMENSION,
    CLUSTER_SCHEDULING,
    CLUSTER_SPREAD,
    COOPERATIVE,
    MAX_DYNAMIC_SMEM,
    NON_PORTABLE_CLUSTER,
    PROGRAMMATIC,
    CudaDevice,
    Driver,
    DriverError,
    LaunchAttribute,
    LaunchConfig,
)
from tilewright.runtime.launchers.cuda.tensor_maps import MAP_BYTES, EncodedMap, encode

_SMEM_WITHOUT_ASKING: Final = 48 << 10
_PORTABLE_CLUSTER: Final = 8
_INVALID_VALUE: Final = 1
_POINTER_BYTES, _LENGTH_BYTES, _STRIDE_BYTES = 8, 4, 8

_MOST: Final = (1 << 31) - 1
"""Blocks along a dimension."""

_MapKey = tuple[ResolvedMap, int]


@dataclass(frozen=True)
class Needs:
    """What an entry is loaded for: the most that its launches ask for."""

    shared_memory_bytes: int = 0
    """Dynamic, of a block."""
    cluster_blocks: int = 1


@dataclass(frozen=True)
class ReadyLaunch:
    """A launch as the driver takes it."""

    config: LaunchConfig
    parameters: ctypes.Array[c_void_p]
    """Address of the value of each parameter."""
    kept: list[object]
    """What the values lie in."""


class CudaKernel:
    """An entry of a cubin on one device. Launches from several threads may overlap; it is never unloaded.

    Args:
        driver: that loads it.
        device: that it is loaded on.
        image: bytes of the cubin.
        entry: name of the function.
        needs: what launches will ask for.

    Raises:
        KernelRefused: when the driver cannot load it, or a block of the device cannot have what it needs.

    """

    def __init__(self, driver: Driver, device: CudaDevice, image: bytes, entry: str, needs: Needs) -> None:
        self._driver, self._device, self.entry = driver, device, entry
        module, function = c_void_p(), c_void_p()
        with driver.current(device):
            try:
                driver.call("cuModuleLoadData", ctypes.byref(module), image)
                driver.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
                if needs.shared_memory_bytes > _SMEM_WITHOUT_ASKING:
                    driver.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SMEM, needs.shared_memory_bytes)
                if needs.cluster_blocks > _PORTABLE_CLUSTER:
                    driver.call("cuFuncSetAttribute", function, NON_PORTABLE_CLUSTER, 1)
            except DriverError as error:
                raise KernelRefused(
                    f"{entry} cannot be loaded on {device.name} (compute capability "
                    f"{device.capability[0]}.{device.capability[1]}) by the CUDA driver {driver.version_text}: {error}"
                ) from error
            self._function = function
            self.parameter_offsets, self.parameter_bytes = self._read_parameters()
        self._maps: dict[int, tuple[_MapKey, EncodedMap]] = {}
        """The last map of each parameter: as long as addresses and shapes stay the same, it does."""

    @property
    def function(self) -> int:
        """Handle of the function, which belongs to the device's primary context."""
        return self._function.value or 0

    def require(self, launch: Launch) -> None:
        """Refuse a launch that does not pass what the binary takes.

        Raises:
            KernelRefused: names the first parameter that differs.

        """
        passed = [size for argument in launch.arguments for size in _sizes(argument)]
        passed += [_POINTER_BYTES] * launch.hidden_arguments
        if len(passed) != len(self.parameter_bytes):
            raise KernelRefused(
                f"the binary of {self.entry} takes {len(self.parameter_bytes)} parameters, and its recipe passes "
                f"{len(passed)}; tune again"
            )
        for position, (size, taken) in enumerate(zip(passed, self.parameter_bytes, strict=True)):
            if size not in (None, taken) or (size is None and taken > _POINTER_BYTES):
                raise KernelRefused(
                    f"parameter {position} of the binary of {self.entry} has {taken} bytes, and its recipe passes "
                    f"{size or 'a number'}; tune again"
                )

    def launch(self, launch: ResolvedLaunch, stream: int) -> None:
        """Launch on ``stream`` (0: the default one) of the device; nothing where the grid is empty.

        Raises:
            TilewrightError: for a number that the parameter cannot hold, and when the driver refuses the launch.

        """
        self.enqueue(self.make_ready(launch), stream)

    def make_ready(self, launch: ResolvedLaunch) -> ReadyLaunch | None:
        """What the driver gets for ``launch``; None where the grid is empty.

        Raises:
            TilewrightError: for a number that the parameter cannot hold, and a tensor map that the driver refuses.

        """
        if launch.is_empty:
            return None
        assert launch.grid is not None
        assert launch.block is not None
        if (most := max(*launch.grid, *launch.block, launch.shared_memory_bytes)) > _MOST:
            raise TilewrightError(f"{self.entry} was not launched: its grid or block comes to {most}; {_MOST} fit")
        with self._driver.current(self._device):
            try:
                kept, addresses = self._parameters(launch)
            except DriverError as error:
                raise self._not_launched(error) from error
        attributes = launch_attributes(launch.cluster, programmatic=launch.programmatic, cooperative=launch.cooperative)
        cells = [LaunchAttribute(id=which, value=values) for which, values in attributes]
        config = LaunchConfig(
            launch.grid,
            launch.block,
            launch.shared_memory_bytes,
            None,
            (LaunchAttribute * max(1, len(cells)))(*cells),
            len(cells),
        )
        return ReadyLaunch(config, (c_void_p * max(1, len(addresses)))(*addresses), kept)

    def enqueue(self, ready: ReadyLaunch | None, stream: int) -> None:
        """Launch what was made ready, if anything, on ``stream``.

        Raises:
            TilewrightError: when the driver refuses the launch.

        """
        if ready is None:
            return
        ready.config.stream = stream
        with self._driver.current(self._device):
            try:
                self._driver.call(
                    "cuLaunchKernelEx", ctypes.byref(ready.config), self._function, ready.parameters, None
                )
            except DriverError as error:
                raise self._not_launched(error) from error

    def _not_launched(self, error: DriverError) -> TilewrightError:
        return TilewrightError(
            f"{self.entry} was not launched on {self._device.name} by the CUDA driver {self._driver.version_text}: "
            f"{error}"
        )

    def _read_parameters(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where the entry's parameters lie and how large they are, in bytes, as the driver sees them."""
        offsets: list[int] = []
        sizes: list[int] = []
        offset, size = c_size_t(), c_size_t()
        while True:
            try:
                self._driver.call(
                    "cuFuncGetParamInfo", self._function, len(sizes), ctypes.byref(offset), ctypes.byref(size)
                )
            except DriverError as error:
                if error.code != _INVALID_VALUE:
                    raise
                return tuple(offsets), tuple(sizes)
            offsets.append(offset.value)
            sizes.append(size.value)

    def _parameters(self, launch: ResolvedLaunch) -> tuple[list[object], list[int]]:
        """Cells that hold what is passed, and the address of each parameter's value.

        A parameter of fewer bytes takes the low ones of its cell: this is a little-endian machine.
        """
        kept: list[object] = []
        addresses: list[int] = []

        def pass_number(value: int) -> None:
            size = self.parameter_bytes[len(addresses)]
            if not -(1 << 8 * size - 1) <= value < 1 << 8 * size - 1:
                raise TilewrightError(
                    f"{self.entry} was not launched: its parameter {len(addresses)} has {8 * size} bits, "
                    f"which do not hold {value}"
                )
            cell = c_int64(value)
            kept.append(cell)
            addresses.append(ctypes.addressof(cell))

        for argument in launch.arguments:
            if argument.map is None:
                pass_number(argument.value)
                continue
            made = self._map(len(addresses), argument.map, argument.value)
            kept.append(made)
            addresses.append(made.address)
            for number in (*argument.map.shape, *argument.map.strides):
                pass_number(number)
        for _ in range(launch.hidden_arguments):
            pass_number(0)
        return kept, addresses

    def _map(self, position: int, wanted: ResolvedMap, address: int) -> EncodedMap:
        key = (wanted, address)
        known = self._maps.get(position)
        if known is None or known[0] != key:
            known = self._maps[position] = (key, encode(self._driver, self._device, wanted, address))
        return known[1]


def _sizes(argument: Argument) -> Sequence[int | None]:
    """Bytes of the parameters that an argument becomes; None where the entry says how many."""
    if argument.map is not None:
        rank = len(argument.map.shape)
        return [MAP_BYTES, *[_LENGTH_BYTES] * rank, *[_STRIDE_BYTES] * rank]
    return [None if argument.kind == "size" else _POINTER_BYTES]


def launch_attributes(
    cluster: Grid | None, *, programmatic: bool, cooperative: bool
) -> list[tuple[int, tuple[int, ...]]]:
    """What a launch asks for beside its grid, as Triton's launcher says it: numbers and values of attributes."""
    asked: list[tuple[int, tuple[int, ...]]] = []
    if programmatic:
        asked.append((PROGRAMMATIC, (1,)))
    if cooperative:
        asked.append((COOPERATIVE, (1,)))
    if cluster is not None:
        asked += [(CLUSTER_DIMENSION, cluster), (CLUSTER_SCHEDULING, (CLUSTER_SPREAD,))]
    return asked
