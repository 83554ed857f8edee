"""What carries out launches of the stand-in: one process of the emulator for all processes that launch.

It knows which source each cubin was compiled from, what a launch costs in the stand-in's clock, and which faults tests
have asked for. Processes that launch talk to it over a socket; what they send is a :class:`Launch`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import numpy as np
from executing_launches import Carried, FaultKind, Launch, Pointer

from tilewright.codegen.backends.triton.entry import EntrySpec
from tilewright.tuner.evaluation.emulated.emulator import EmulationError, Emulator

LIMIT_S = 250.0
"""For one launch, of what takes a second: on a busy machine it takes longer, and is as right."""
_LAUNCH_NS, _WAVE_NS, _NS_PER_BYTE = 1500.0, 500.0, 0.001
_LARGEST_MEMO_BYTES = 256 << 20
_TOP_EXPONENT_BITS = 0x40
"""Of a float's last byte, little-endian: flipped, the value is far off."""


@dataclass(frozen=True)
class Costed:
    """What functions of a test, of costs and faults, are told of a launch."""

    entry: EntrySpec
    source: str
    grid: tuple[int, int, int]
    nbytes: int


Cost = float | Callable[[Costed], float]
"""Microseconds of a launch."""


@dataclass
class _Fault:
    entry: str
    kind: FaultKind
    after: int
    times: int | None
    when: Callable[[Costed], bool] | None


@dataclass(frozen=True)
class _Known:
    source: str
    entries: dict[str, EntrySpec]


@dataclass
class State:
    """What tests say of a driver, and what they are told."""

    known: dict[str, _Known] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    faults: list[_Fault] = field(default_factory=list)
    executed: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def know(self, checksum: str, source: str, entries: Sequence[EntrySpec]) -> None:
        """Say which source a cubin was compiled from; a cubin may hold several entries."""
        before = self.known.get(checksum)
        named = {**(before.entries if before else {}), **{each.entry: each for each in entries}}
        self.known[checksum] = _Known(source, named)

    def fail(
        self,
        entry: str,
        kind: FaultKind,
        after: int,
        times: int | None,
        when: Callable[[Costed], bool] | None,
    ) -> None:
        """Have launches of ``entry`` fail, but the first ``after``."""
        self.faults.append(_Fault(entry, kind, after, times, when))

    def fault_of(self, told: Costed) -> FaultKind | None:
        """The fault of this launch."""
        for each in self.faults:
            if each.entry != told.entry.entry or (each.when is not None and not each.when(told)):
                continue
            if each.after:
                each.after -= 1
            elif each.times is None or each.times > 0:
                each.times = None if each.times is None else each.times - 1
                return each.kind
        return None


class LaunchServer:
    """Carries out launches, one after the other; lives as long as the process of the tests."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tilewright-launches-"))
        self.address = str(self._folder / "socket")
        self.state = State()
        self._lock = threading.Lock()
        self._memo: dict[str, tuple[bytes, ...]] = {}
        self._memo_bytes = 0
        self._changed: dict[tuple[str, str], tuple[int, int]] = {}
        self._sources: dict[str, Path] = {}
        self._emulator = Emulator(LIMIT_S)
        # A worker ends with the thread that started it, so it is always the same thread that asks.
        self._asking = ThreadPoolExecutor(1, "emulator")
        self._listener = Listener(self.address, "AF_UNIX")
        threading.Thread(target=self._accept, name="launches", daemon=True).start()

    def close(self) -> None:
        """End the emulator."""
        self._listener.close()
        self._emulator.__exit__()
        shutil.rmtree(self._folder, ignore_errors=True)

    def entry(self, checksum: str, entry: str) -> EntrySpec | None:
        """What is known of an entry of a cubin."""
        known = self.state.known.get(checksum)
        return known.entries.get(entry) if known else None

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection, contextlib.suppress(EOFError, OSError):  # the process that launched is gone
            while True:
                asked = connection.recv()
                match asked:
                    case Launch():
                        connection.send(self._carry_out(asked))
                    case str():
                        self.state.complaints.append(asked)
                        connection.send(None)
                    case (checksum, entry):
                        connection.send(self.entry(checksum, entry))

    def _carry_out(self, launch: Launch) -> Carried:
        with self._lock:
            state = self.state
            known = state.known[launch.checksum]
            spec = known.entries[launch.entry]
            state.executed.append((launch.entry, launch.grid))
            told = Costed(spec, known.source, launch.grid, launch.nbytes)
            fault, cost_ns = state.fault_of(told), self._cost_ns(launch, told)
            if fault not in (None, "wrong_element"):
                return Carried(cost_ns, launch.buffers, fault)
            try:
                after = self._computed(launch, known.source, spec)
            except EmulationError as error:
                state.complaints.append(f"{launch.entry}: {error}")
                return Carried(cost_ns, launch.buffers, None, str(error))
            place = self._written_place(launch, spec, after)
            if fault == "wrong_element" and place is not None:
                buffer, byte = place
                damaged = bytearray(after[buffer])
                damaged[byte] ^= _TOP_EXPONENT_BITS
                after = (*after[:buffer], bytes(damaged), *after[buffer + 1 :])
            return Carried(cost_ns, after, fault)

    def _cost_ns(self, launch: Launch, told: Costed) -> float:
        cost = self.state.costs.get(launch.entry)
        if cost is not None:
            return 1000.0 * (cost(told) if callable(cost) else cost)
        waves = -(-int(np.prod(launch.grid)) // launch.sm_count)
        return _LAUNCH_NS + _WAVE_NS * waves + _NS_PER_BYTE * launch.nbytes

    def _computed(self, launch: Launch, source: str, spec: EntrySpec) -> tuple[bytes, ...]:
        """The buffers afterwards; what was computed once is known."""
        key = hashlib.sha256(repr((launch.key, source, spec)).encode()).hexdigest()
        if key not in self._memo:
            if self._memo_bytes > _LARGEST_MEMO_BYTES:
                self._memo.clear()
                self._memo_bytes = 0
            self._memo[key] = self._asking.submit(self._emulate, launch, source, spec).result()
            self._memo_bytes += launch.nbytes
        return self._memo[key]

    def _emulate(self, launch: Launch, source: str, spec: EntrySpec) -> tuple[bytes, ...]:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            buffers = {}
            for position, data in enumerate(launch.buffers):
                path = folder / str(position)
                path.write_bytes(data)
                buffers[str(position)] = {"path": str(path), "nbytes": len(data), "written": True}
            request = {
                "source": str(self._source(source)),
                "buffers": buffers,
                "launches": [
                    {
                        "entry": launch.entry,
                        "grid": list(launch.grid),
                        "arguments": [
                            _described(value, kind)
                            for value, (_, kind) in zip(launch.arguments, spec.arguments, strict=True)
                        ],
                        "constants": dict(spec.constants),
                        "extents": [
                            {"name": f"memory {at}", "buffer": str(at), "offset": 0, "nbytes": nbytes, "writable": True}
                            for at, nbytes in enumerate(map(len, launch.buffers))
                        ],
                    }
                ],
            }
            answer = self._emulator.ask(request)
            if "error" in answer:
                raise EmulationError(str(answer["error"]))
            return tuple((folder / str(position)).read_bytes() for position in range(len(launch.buffers)))

    def _source(self, text: str) -> Path:
        """A file of its own for every source: Python keeps what it read by path."""
        name = hashlib.sha256(text.encode()).hexdigest()
        if name not in self._sources:
            self._sources[name] = self._folder / f"kernel_{name[:16]}.py"
            self._sources[name].write_text(text)
        return self._sources[name]

    def _written_place(self, launch: Launch, spec: EntrySpec, after: Sequence[bytes]) -> tuple[int, int] | None:
        """Buffer and last byte of an element that the kernel writes, now or in a launch before."""
        kernel = (launch.checksum, launch.entry)
        for number, (old, new) in enumerate(zip(launch.buffers, after, strict=True)):
            changed = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
            if changed.size > 1:
                byte = int(changed[changed.size // 2])
                offset, itemsize = _element_at(launch, spec, number, byte)
                self._changed[kernel] = number, byte - (byte - offset) % itemsize + itemsize - 1
        place = self._changed.get(kernel)
        return place if place is not None and place[0] < len(after) and place[1] < len(after[place[0]]) else None


def _element_at(launch: Launch, spec: EntrySpec, buffer: int, byte: int) -> tuple[int, int]:
    """Where the tensor begins that a byte of a buffer belongs to, and bytes of its elements."""
    before = [
        (argument.offset, kind)
        for argument, (_, kind) in zip(launch.arguments, spec.arguments, strict=True)
        if isinstance(argument, Pointer) and argument.buffer == buffer and argument.offset <= byte
    ]
    offset, kind = max(before)
    bits = re.search(r"\d+", kind)  # bf16, fp8e4nv, i32
    assert bits is not None
    return offset, max(1, int(bits[0]) // 8)


def _described(value: Pointer | int, kind: str) -> dict[str, object]:
    if isinstance(value, int):
        return {"value": value}
    address = {"buffer": str(value.buffer), "offset": value.offset, "type": kind}
    return address if value.shape is None else {**address, "shape": list(value.shape)}
