"""What a worker has to know before it can run something, sent to it when needed, and again after a restart."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright.codegen.workers.channel import Message
from tilewright.errors import TilewrightError
from tilewright.tuner.evaluation.cpu.openmp import openmp_library
from tilewright.tuner.evaluation.cpu.shared_memory import Block, Pointer, SharedRegion
from tilewright.tuner.evaluation.faults import KernelFaultError
from tilewright.tuner.evaluation.measuring_process import MeasuringProcess
from tilewright.tuner.evaluation.worker_session import TRUSTED_LIMIT_S, WorkerSession
from tilewright.tuning_db.records import Outcome

_THREAD_BYTES = 16 << 20
"""Of address space that a thread's stack takes out of the memory limit."""


@dataclass(frozen=True, eq=False)
class Program:
    """One call of a kernel with everything bound; see :class:`tilewright.codegen.recipe.model.Recipe`."""

    path: Path
    abi_version: int
    launches: tuple[tuple[str, tuple[int | Pointer, ...]], ...]
    """(entry, arguments); the worker knows what addresses its pointers are."""
    threads: int
    fork: bool
    """Whether the kernel gets threads; without, it runs on the calling one."""
    poison: tuple[Block, ...]
    """Filled with NaN before the clock starts."""
    zero: tuple[Block, ...]
    """Zeroed as part of the call."""
    writable: frozenset[int]
    """Regions that the kernel may write; all others are read-only in the worker."""

    def blocks(self) -> set[Block]:
        """All memory that the call touches."""
        arguments = {argument for _, arguments in self.launches for argument in arguments}
        pointed = {argument.block for argument in arguments if isinstance(argument, Pointer)}
        return pointed | {*self.poison, *self.zero}


class Session(WorkerSession):
    """Runs programs in a worker process; one that died is replaced at the next request.

    Args:
        threads: most threads that a program asks for.
        time_limit_s: for one call of a kernel, and for loading it.
        memory_limit_bytes: that a kernel may allocate for itself.

    Raises:
        TilewrightError: when no worker can be started.

    """

    def __init__(self, *, threads: int, time_limit_s: float, memory_limit_bytes: int) -> None:
        super().__init__()
        self._openmp = openmp_library()
        self._time_limit_s = time_limit_s
        self._memory_limit_bytes = memory_limit_bytes + threads * _THREAD_BYTES
        self._numbers = itertools.count(1)
        self._mapped: set[int] = set()
        self._kernels: dict[Path, int] = {}
        self._programs: dict[Program, int] = {}
        self._worker = self._start_worker()

    def run(self, programs: Sequence[Program], *, warm_up: Program | None = None) -> list[int]:
        """Call each program in turn; nanoseconds of each call. ``warm_up`` is called once before all, untimed.

        Raises:
            KernelFaultError: when a kernel cannot be loaded, failed, took too long or ruined the worker.
            TilewrightError: when no worker can be started, or memory is short.

        """
        numbers = [self._prepare(program) for program in programs]
        request: Message = {"do": "run", "programs": numbers}
        request["warm_up"] = None if warm_up is None else self._prepare(warm_up)
        answer = self._request(request, self._time_limit_s)
        if "failed" in answer:
            program = self._program(answer["failed"])
            raise KernelFaultError(Outcome.WRONG, f"returned the error code {answer['code']}", program)
        times_ns = answer.get("times_ns")
        if not isinstance(times_ns, list) or [type(t) for t in times_ns] != [int] * len(programs):
            self._drop_worker()
            raise KernelFaultError(Outcome.CRASHED, "left the measuring process in disorder", programs[-1])
        return times_ns

    def forget_programs(self) -> None:
        """Free what was prepared for past calls."""
        self._programs.clear()
        self._tell({"do": "forget"})

    def release(self, regions: Iterable[SharedRegion]) -> None:
        """Unmap ``regions`` from the worker and close them; no program that uses them may be run again."""
        for region in regions:
            if region.id in self._mapped:
                self._mapped.discard(region.id)
                self._tell({"do": "unmap", "region": region.id})
            region.close()

    def _prepare(self, program: Program) -> int:
        """Number of ``program`` in the worker, which has been told all about it."""
        if program in self._programs:
            return self._programs[program]
        if program.path not in self._kernels:
            self._load(program)
        for block in program.blocks():
            self._map(block.region, writable=block.region.id in program.writable)
        number = next(self._numbers)
        definition: Message = {
            "do": "define",
            "program": number,
            "kernel": self._kernels[program.path],
            "abi_version": program.abi_version,
            "threads": program.threads,
            "fork": program.fork,
            "launches": [
                (entry, [_encode(argument) for argument in arguments]) for entry, arguments in program.launches
            ],
            "poison": [_span(block) for block in program.poison],
            "zero": [_span(block) for block in program.zero],
        }
        answer = self._request(definition, TRUSTED_LIMIT_S)
        if "error" in answer:
            raise KernelFaultError(Outcome.REJECTED, f"has no such entry: {answer['error']}", program)
        self._programs[program] = number
        return number

    def _load(self, program: Program) -> None:
        number = next(self._numbers)
        try:
            answer = self._request({"do": "load", "kernel": number, "path": str(program.path)}, self._time_limit_s)
        except KernelFaultError as fault:
            raise KernelFaultError(fault.outcome, f"{fault} while it was loaded", program) from fault
        if "error" in answer:
            raise KernelFaultError(Outcome.REJECTED, f"cannot be loaded: {answer['error']}", program)
        if answer["abi_version"] != program.abi_version:
            found, expected = answer["abi_version"], program.abi_version
            raise KernelFaultError(Outcome.REJECTED, f"has ABI version {found}, its recipe says {expected}", program)
        self._kernels[program.path] = number

    def _map(self, region: SharedRegion, *, writable: bool) -> None:
        if region.id in self._mapped:
            return
        request: Message = {
            "do": "map",
            "region": region.id,
            "bytes": region.file_bytes,
            "writable": writable,
            "huge_pages": region.huge_pages,
        }
        self._trusted_request(request, (region.fd,))
        self._mapped.add(region.id)

    def _trusted_request(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        answer = self._request(message, TRUSTED_LIMIT_S, descriptors)
        if "error" in answer:
            raise TilewrightError(
                f"the measuring process cannot {message['do']} memory ({answer['error']}); "
                "free memory or tune a smaller problem"
            )

    def _tell(self, message: Message) -> None:
        """Have the worker free something. One that is dead, or dies now, has nothing left to free."""
        if self._worker is not None:
            with contextlib.suppress(KernelFaultError):
                self._trusted_request(message)

    def _new_worker(self) -> MeasuringProcess:
        return MeasuringProcess("tilewright.tuner.evaluation.cpu.worker", [self._openmp, self._memory_limit_bytes])

    def _program(self, number: int) -> Program | None:
        return next((program for program, known in self._programs.items() if known == number), None)

    def _forget(self) -> None:
        self._mapped.clear()
        self._kernels.clear()
        self._programs.clear()


def _encode(argument: int | Pointer) -> int | tuple[int, int, int]:
    return argument if isinstance(argument, int) else (*_span(argument.block), argument.offset_bytes)


def _span(block: Block) -> tuple[int, int]:
    return block.region.id, block.nbytes
