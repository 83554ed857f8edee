"""The worker process: maps memory, loads kernels, calls them and takes times. It judges nothing.

It knows no tensors and no recipes, only regions (memory that the parent shares), kernels (shared objects) and
programs (prepared calls), each under a number that the parent chose. Whatever a kernel does to this process costs the
parent a restart of some 50 ms. Standard library only.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from tilewright.codegen.recipe.host import Host
from tilewright.codegen.workers.channel import Message
from tilewright.codegen.workers.child import connect, serve
from tilewright.tuner.evaluation.begun import Begun
from tilewright.tuner.evaluation.cpu.mapping import ALIGNMENT, GuardedMapping, round_up

LOG_BYTES = 1 << 20
"""Limit on what kernels may print, or write to any file."""
_POISON = 0xFF
"""Fills outputs before a call: a NaN in every floating-point type, and one that no arithmetic makes."""


@dataclass
class _Program:
    """One call, ready to run: its launches, and the memory to fill before it."""

    number: int
    launches: list[tuple[Any, Any, Any]]
    """(entry, host, arguments)"""
    poison: list[tuple[int, int]]
    """(address, bytes) to fill before the clock starts."""
    zero: list[tuple[int, int]]
    """(address, bytes) to zero as part of the call, as the runtime does."""

    def run(self) -> tuple[int, int]:
        """Nanoseconds and the first error code, or 0."""
        for address, nbytes in self.poison:
            ctypes.memset(address, _POISON, nbytes)
        begin = perf_counter_ns()
        for address, nbytes in self.zero:
            ctypes.memset(address, 0, nbytes)
        for entry, host, arguments in self.launches:
            code = entry(host, arguments)
            if code:
                break
        return perf_counter_ns() - begin, code


class Worker:
    """State of the worker process, changed by the parent's messages."""

    def __init__(self, begun_fd: int, openmp: str, memory_limit_bytes: int) -> None:
        self._begun = Begun(begun_fd)
        # The library that the runtime takes it from; global, as torch loads it.
        self._fork = ctypes.cast(ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL).GOMP_parallel, ctypes.c_void_p).value
        self._memory_limit_bytes = memory_limit_bytes
        self._regions: dict[int, GuardedMapping] = {}
        self._kernels: dict[int, ctypes.CDLL] = {}
        self._programs: dict[int, _Program] = {}

    def handle(self, message: Message, descriptors: list[int]) -> Message:
        """Answer one message; ``{"error": ...}`` where it could not be done."""
        try:
            match message["do"]:
                case "map":
                    return self._map(message, descriptors[0])
                case "unmap":
                    self._regions.pop(message["region"]).close()
                    return {}
                case "load":
                    return self._load(message["kernel"], message["path"])
                case "define":
                    return self._define(message)
                case "forget":
                    self._programs.clear()
                    return {}
                case "run":
                    return self._run(message["programs"], message["warm_up"])
                case unknown:
                    return {"error": f"unknown request {unknown!r}"}
        except (OSError, AttributeError) as error:
            return {"error": str(error)}

    def _map(self, message: Message, fd: int) -> Message:
        try:
            self._regions[message["region"]] = GuardedMapping(
                fd, message["bytes"], writable=message["writable"], huge_pages=message["huge_pages"]
            )
        finally:
            os.close(fd)
        return {}

    def _load(self, kernel: int, path: str) -> Message:
        with self._limited_memory():
            library = ctypes.CDLL(path)
            version = library.tilewright_abi_version()
        self._kernels[kernel] = library
        return {"abi_version": version}

    def _define(self, message: Message) -> Message:
        library = self._kernels[message["kernel"]]
        host = Host(message["abi_version"], message["threads"], self._fork if message["fork"] else None)
        launches = []
        for entry, arguments in message["launches"]:
            function = library[entry]
            function.restype = ctypes.c_int32
            values = (ctypes.c_int64 * len(arguments))(*map(self._value, arguments))
            # The casts hold on to what they point to.
            launches.append((function, ctypes.cast(ctypes.pointer(host), ctypes.c_void_p), _address_of(values)))
        number = message["program"]
        spans = {name: [(self._value([*block, 0]), block[1]) for block in message[name]] for name in ("poison", "zero")}
        self._programs[number] = _Program(number, launches, spans["poison"], spans["zero"])
        return {}

    def _value(self, argument: int | list[int]) -> int:
        """Integer as it is; ``[region, bytes, offset]`` is an address in that many bytes at the region's end."""
        if isinstance(argument, int):
            return argument
        region, nbytes, offset = argument
        return self._regions[region].end - round_up(nbytes, ALIGNMENT) + offset

    def _run(self, numbers: list[int], warm_up: int | None) -> Message:
        programs = [self._programs[number] for number in numbers]
        times_ns = []
        with self._limited_memory():
            if warm_up is not None:
                self._begun.begin(warm_up)
                self._programs[warm_up].run()
            for program in programs:
                self._begun.begin(program.number)
                elapsed_ns, code = program.run()
                if code:
                    return {"failed": program.number, "code": code}
                times_ns.append(elapsed_ns)
        return {"times_ns": times_ns}

    def _limited_memory(self) -> _MemoryLimit:
        return _MemoryLimit(self._memory_limit_bytes)


class _MemoryLimit:
    """Context in which the process may get ``limit_bytes`` more memory than it has, and no more."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    def __enter__(self) -> None:
        data_pages = int(Path("/proc/self/statm").read_text().split()[5])
        resource.setrlimit(
            resource.RLIMIT_DATA, (data_pages * mmap.PAGESIZE + self._limit_bytes, resource.RLIM_INFINITY)
        )

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _address_of(values: ctypes.Array[Any]) -> ctypes.c_void_p:
    return ctypes.cast(values, ctypes.c_void_p)


def main() -> None:
    """Serve the parent until it closes the connection. Arguments: a descriptor, a library, a limit."""
    channel, (begun_fd, openmp, memory_limit_bytes) = connect(file_bytes=LOG_BYTES)
    gc.disable()
    serve(channel, Worker(int(begun_fd), openmp, int(memory_limit_bytes)).handle)


if __name__ == "__main__":
    main()
