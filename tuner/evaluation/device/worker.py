"""The worker process: has a context of the device, keeps its memory, launches and takes times. It judges nothing.

It knows no tensors and no recipes, only buffers (memory of the device between two guards), kernels (entries of
binaries) and programs (resolved launches), each under a number that the parent chose. Bytes travel through a file that
both sides map. Whatever a kernel does to this process or to its context costs the parent a restart.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tilewright.codegen.recipe.model import Launch
from tilewright.codegen.recipe.resolve import ResolvedLaunch
from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.child import connect, serve
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.cuda.driver import CudaDevice, Driver, DriverError
from tilewright.runtime.launchers.cuda.kernel import CudaKernel, Needs, ReadyLaunch
from tilewright.runtime.launchers.cuda.memory import DeviceMemory
from tilewright.runtime.launchers.cuda.timing import Graph, Stopwatch
from tilewright.structuring import structure
from tilewright.tuner.evaluation.begun import Begun
from tilewright.tuner.evaluation.device.calls import GUARD, GUARD_BYTES, POISON, placed

GRAPH_REPLAY, EVENTS = "graph replay", "events"
"""How a block of calls was timed: replayed by the device alone, or launched one by one."""
_SCRATCH_SHARE: Final = 8
"""Of the free memory, one part in so many may be filled to empty the cache."""


@dataclass(frozen=True)
class _Buffer:
    """``nbytes`` between two guards."""

    allocation: int
    nbytes: int

    @property
    def address(self) -> int:
        """Of the data."""
        return self.allocation + GUARD_BYTES


@dataclass(frozen=True)
class _Program:
    """One call, ready to run."""

    number: int
    launches: tuple[tuple[CudaKernel, ReadyLaunch | None], ...]
    """None for a grid of nothing."""
    poison: tuple[_Buffer, ...]
    """To be filled before a call that is checked."""
    zero: tuple[_Buffer, ...]
    """To be zeroed as part of the call, as the runtime does."""


class Worker:
    """State of the worker process, changed by the parent's messages; made without touching the device."""

    def __init__(self, begun: Begun, staging: mmap.mmap, device_index: int) -> None:
        self._begun = begun
        self._staging = (ctypes.c_char * len(staging)).from_buffer(staging)
        self._device_index = device_index
        self._opened: _Opened | None = None

    def handle(self, message: Message, descriptors: list[int]) -> Message:
        """Answer one message.

        ``{"error": ..., "code": ...}`` where it could not be done; ``{"failed": ...}`` names the program besides.
        """
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            if message["do"] == "open":
                self._opened = _Opened(self._device_index, self._begun, ctypes.addressof(self._staging))
                return self._opened.description
            assert self._opened is not None
            return self._opened.handle(message)
        except TilewrightError as error:
            return {"error": str(error), "code": code_of(error)}
        except OSError as error:
            return {"error": str(error), "code": 0}


class _Opened:
    """What there is once the device is open."""

    def __init__(self, device_index: int, begun: Begun, staging: int) -> None:
        self._begun, self._staging = begun, staging
        self._driver = Driver()
        self._device: CudaDevice = self._driver.device(device_index)
        self._driver.call("cuCtxSetCurrent", self._device.context)
        self._memory = DeviceMemory(self._driver)
        self._stopwatch = Stopwatch(self._driver)
        self._buffers: dict[int, _Buffer] = {}
        self._kernels: dict[tuple[str, str, Needs], CudaKernel] = {}
        self._programs: dict[int, _Program] = {}
        self._graphs: dict[tuple[int, ...], Graph] = {}
        self._replays = True
        self._scratch: _Buffer | None = None

    @property
    def description(self) -> Message:
        """Of the driver and the memory that is free."""
        return {"driver": self._driver.version_text, "free_bytes": self._memory.free_bytes}

    def handle(self, message: Message) -> Message:
        """Answer one message."""
        match message["do"]:
            case "allocate":
                return self._allocate(message["buffer"], message["bytes"])
            case "write":
                buffer = self._buffers[message["buffer"]]
                self._memory.write(buffer.address + message["offset"], self._staging, message["bytes"])
                return {}
            case "read":
                buffer = self._buffers[message["buffer"]]
                self._memory.read(self._staging, buffer.allocation + message["offset"], message["bytes"])
                return {}
            case "free":
                self._memory.free(self._buffers.pop(message["buffer"]).allocation)
                return {}
            case "scratch":
                return self._make_scratch(message["bytes"])
            case "define":
                return self._define(message)
            case "forget":
                return self._forget()
            case "run":
                return self._run(self._programs[message["program"]])
            case "time":
                return self._time(message["blocks"], message["repeats"])
            case unknown:
                return {"error": f"unknown request {unknown!r}", "code": 0}

    def _allocate(self, number: int, nbytes: int) -> Message:
        buffer = _Buffer(self._memory.allocate(nbytes + 2 * GUARD_BYTES), nbytes)
        self._buffers[number] = buffer
        for address in (buffer.allocation, buffer.address + nbytes):
            self._memory.fill(address, GUARD, GUARD_BYTES, self._stopwatch.stream)
        self._stopwatch.synchronize()
        return {}

    def _make_scratch(self, nbytes: int) -> Message:
        nbytes = min(nbytes, self._memory.free_bytes // _SCRATCH_SHARE)
        self._scratch = _Buffer(self._memory.allocate(nbytes + GUARD_BYTES), nbytes)
        return {}

    def _define(self, message: Message) -> Message:
        number = message["program"]
        self._begun.begin(number)  # loading a binary may end this process, too
        buffers = {name: self._buffers[buffer] for name, buffer in message["buffers"].items()}
        launches = []
        for path, told, resolved in zip(message["binaries"], message["recipe"], message["launches"], strict=True):
            launch = placed(structure(ResolvedLaunch, resolved), lambda name: buffers[name].address)
            kernel = self._kernel(path, launch)
            kernel.require(structure(Launch, told))
            launches.append((kernel, kernel.make_ready(launch)))
        poison, zero = (tuple(self._buffers[each] for each in message[name]) for name in ("poison", "zero"))
        self._programs[number] = _Program(number, tuple(launches), poison, zero)
        return {}

    def _kernel(self, path: str, launch: ResolvedLaunch) -> CudaKernel:
        x, y, z = launch.cluster or (1, 1, 1)
        needs = Needs(launch.shared_memory_bytes, x * y * z)
        key = (path, launch.entry, needs)
        if key not in self._kernels:
            image = Path(path).read_bytes()
            self._kernels[key] = CudaKernel(self._driver, self._device, image, launch.entry, needs)
        return self._kernels[key]

    def _forget(self) -> Message:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._programs.clear()
        return {}

    def _run(self, program: _Program) -> Message:
        """Once, with outputs poisoned before it."""
        self._begun.begin(program.number)
        try:
            for buffer in program.poison:
                self._memory.fill(buffer.address, POISON, buffer.nbytes, self._stopwatch.stream)
            self._call(program)
            self._stopwatch.synchronize()
        except TilewrightError as error:
            return _failed(program, error)
        return {}

    def _time(self, blocks: Sequence[Sequence[int]], repeats: int) -> Message:
        """Microseconds of a call, for every block of calls, in order."""
        times_us = []
        for numbers in blocks:
            programs = [self._programs[number] for number in numbers] * repeats
            self._begun.begin(programs[0].number)
            try:
                times_us.append(self._timed(programs) / len(programs))
            except TilewrightError as error:
                return _failed(programs[0], error)
        return {"times_us": times_us, "method": GRAPH_REPLAY if self._replays else EVENTS}

    def _timed(self, programs: Sequence[_Program]) -> float:
        """Microseconds of all calls together."""
        if self._replays and (graph := self._graph(programs)) is not None:
            return self._behind_a_fill(partial(graph.replay, self._stopwatch.stream))
        return sum(self._behind_a_fill(partial(self._call, program)) for program in programs)

    def _graph(self, programs: Sequence[_Program]) -> Graph | None:
        """A block of calls, recorded and replayed once untimed; None where this driver or device records nothing."""
        key = tuple(program.number for program in programs)
        if key not in self._graphs:
            try:
                graph = self._stopwatch.record(partial(self._call_all, programs))
            except TilewrightError:
                self._replays = False  # what is wrong with a launch shows when it is launched by itself
                return None
            graph.replay(self._stopwatch.stream)
            self._stopwatch.synchronize()
            self._graphs[key] = graph
        return self._graphs[key]

    def _behind_a_fill(self, work: Callable[[], None]) -> float:
        """Time ``work`` on a device that is still busy when it is given, and whose cache holds nothing of its data."""
        if self._scratch is not None:
            self._memory.fill(self._scratch.allocation, 0, self._scratch.nbytes, self._stopwatch.stream)
        return self._stopwatch.time_us(work)

    def _call_all(self, programs: Sequence[_Program]) -> None:
        for program in programs:
            self._call(program)

    def _call(self, program: _Program) -> None:
        for buffer in program.zero:
            self._memory.fill(buffer.address, 0, buffer.nbytes, self._stopwatch.stream)
        for kernel, launch in program.launches:
            kernel.enqueue(launch, self._stopwatch.stream)


def code_of(error: BaseException | None) -> int:
    """The driver's code behind an error; 0 where it did not come from the driver."""
    while error is not None:
        if isinstance(error, DriverError):
            return error.code
        error = error.__cause__
    return 0


def _failed(program: _Program, error: TilewrightError) -> Message:
    return {"failed": program.number, "error": str(error), "code": code_of(error)}


def main() -> None:
    """Serve the parent until it closes the connection. Arguments: two descriptors, the staging's size, a device."""
    channel, (begun_fd, staging_fd, staging_bytes, device_index) = connect()
    staging = mmap.mmap(int(staging_fd), int(staging_bytes))
    gc.disable()
    serve(channel, Worker(Begun(int(begun_fd)), staging, int(device_index)).handle)


if __name__ == "__main__":
    main()
