"""The stand-in's side of executing a launch: what its parameters say, and what of memory it may touch.

The library has the Python of its process import this (tests/standin/executing.c): in the process that has the devices
(tests/executing.py), and in children of it, which learn from the environment where the rest is. Light to import.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import hashlib
import json
import os
import re
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Sequence
from ctypes import POINTER, c_char, c_double, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from cuda_standin import Launched, StandIn

if TYPE_CHECKING:
    from tilewright.codegen.backends.triton.entry import EntrySpec

DEVICES_VARIABLE = "TILEWRIGHT_STANDIN"
"""Environment variable: path of a file with :class:`Devices`, of a process that executes launches."""
FaultKind = Literal["hang", "illegal_access", "out_of_memory", "wrong_element", "crash"]

_OUT_OF_MEMORY, _ILLEGAL_ADDRESS, _LAUNCH_FAILED, _UNKNOWN, _HANGS = 2, 700, 719, 999, -1
"""``CUresult``; the last is the library's own."""
_DESCRIPTOR = re.compile(r"tensordesc<\w+\[([\d, ]*)\]>")
_MAP_BYTES = 128


@dataclass(frozen=True)
class Devices:
    """What processes that execute launches have in common."""

    library: str
    capabilities: tuple[int, ...]
    version: int
    sm_count: int
    memory_bytes: int
    l2_bytes: int
    name: str
    address: str
    """Of the socket at which launches are carried out."""

    def write(self, path: Path) -> None:
        """For :meth:`read`."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls) -> Devices:
        """Those that the environment names."""
        fields = json.loads(Path(os.environ[DEVICES_VARIABLE]).read_text())
        return cls(**{**fields, "capabilities": tuple(fields["capabilities"])})


@dataclass(frozen=True)
class Pointer:
    """An argument that points into one of a launch's buffers, or a tensor map over what lies there."""

    buffer: int
    offset: int
    shape: tuple[int, ...] | None = None
    """Of the tensor map, the slowest dimension first."""


@dataclass(frozen=True)
class Launch:
    """A launch as its parameters say it."""

    checksum: str
    """sha256 of the cubin."""
    entry: str
    grid: tuple[int, int, int]
    """Programs along x, y, z."""
    arguments: tuple[Pointer | int, ...]
    buffers: tuple[bytes, ...]
    """All memory that it may touch, as it is before."""
    sm_count: int

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(map(len, self.buffers))

    @property
    def key(self) -> str:
        """Names what it computes: the same source on the same memory."""
        named = hashlib.sha256(repr((self.checksum, self.entry, self.grid, self.arguments)).encode())
        for each in self.buffers:
            named.update(hashlib.blake2b(each).digest())
        return named.hexdigest()


@dataclass(frozen=True)
class Carried:
    """What became of a launch."""

    cost_ns: float = 0.0
    buffers: tuple[bytes, ...] = ()
    """As they are afterwards."""
    fault: FaultKind | None = None
    complaint: str = ""
    """Why it could not be carried out: the kernel, or the launch, is wrong."""


class StrayPointerError(Exception):
    """An argument points to memory that belongs to nothing."""


class UnknownLaunchError(Exception):
    """A launch cannot be decoded: a mistake of whoever launches, or of the test."""


class _Execution(ctypes.Structure):
    """The library's structure ``execution``."""

    _fields_ = (
        ("launch", POINTER(Launched)),
        ("image", c_void_p),
        ("image_bytes", c_size_t),
        ("offsets", POINTER(c_uint)),
        ("sizes", POINTER(c_uint)),
        ("parameter_count", c_int),
        ("cost_ns", c_double),
        ("said", c_char * 512),
    )


def attach() -> None:
    """Have launches of this process carried out; the environment says on which devices, and where."""
    devices = Devices.read()
    library = StandIn(Path(devices.library))
    library.begin(
        devices.capabilities,
        devices.version,
        sm_count=devices.sm_count,
        memory_bytes=devices.memory_bytes,
        l2_bytes=devices.l2_bytes,
        name=devices.name,
    )
    side = _Side(library, devices)
    _kept[:] = [_EXECUTE(side.execute), _FIND(side.find)]
    library.execute_with(*_kept)


_EXECUTE = ctypes.CFUNCTYPE(c_int, POINTER(_Execution))
_FIND = ctypes.CFUNCTYPE(c_int, c_uint64, POINTER(c_uint64), POINTER(c_size_t))
_kept: list[Any] = []
"""What the library calls."""


class _Side:
    """Carries out launches of this process."""

    def __init__(self, library: StandIn, devices: Devices) -> None:
        self._library, self._devices = library, devices
        self._entry = functools.cache(self._ask_entry)
        self._local = threading.local()

    def find(self, pointer: int, base: Any, nbytes: Any) -> int:
        """For memory that is not the driver's own: that of posed tensors (tests/posing.py)."""
        found = extent_of_posed(pointer)
        if found is None:
            return 0
        base[0], nbytes[0] = found
        return 1

    def execute(self, pointer: Any) -> int:
        """Carry out one launch; a ``CUresult``."""
        asked = pointer.contents
        try:
            return self._carry_out(asked)
        except StrayPointerError as error:
            return self._complain(asked, error, _ILLEGAL_ADDRESS)
        except UnknownLaunchError as error:
            return self._complain(asked, error, _UNKNOWN)
        except KeyboardInterrupt:  # which nothing here can raise through C
            _thread.interrupt_main()
            return _UNKNOWN
        except Exception as error:  # a library written in C waits for an answer
            traceback.print_exc()
            return self._complain(asked, error, _UNKNOWN)

    def _complain(self, asked: _Execution, error: Exception, result: int) -> int:
        text = f"{asked.launch.contents.name.decode()}: {error}"
        asked.said = text.encode()[:511]
        self._ask(text)
        return result

    def _carry_out(self, asked: _Execution) -> int:
        made = asked.launch.contents
        checksum = hashlib.sha256(ctypes.string_at(asked.image, asked.image_bytes)).hexdigest()
        spec = self._entry(checksum, made.name.decode())
        extents, arguments = self._decoded(asked, made, spec)
        before = tuple(ctypes.string_at(base, nbytes) for base, nbytes in extents)
        x, y, z = made.grid
        grid = (x // made.cluster[0], y // made.cluster[1], z // made.cluster[2])
        launch = Launch(checksum, spec.entry, grid, arguments, before, self._devices.sm_count)
        carried = cast("Carried", self._ask(launch))
        asked.cost_ns = carried.cost_ns
        asked.said = (carried.complaint or carried.fault or "").encode()[:511]
        for (base, nbytes), old, new in zip(extents, before, carried.buffers, strict=True):
            if new != old:
                _put_changes(base, nbytes, old, new)
        if carried.complaint:
            return _ILLEGAL_ADDRESS if "MemoryFaultError" in carried.complaint else _LAUNCH_FAILED
        match carried.fault:
            case "hang":
                return _HANGS
            case "illegal_access":
                return _ILLEGAL_ADDRESS
            case "out_of_memory":
                return _OUT_OF_MEMORY
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
        return 0

    def _decoded(
        self, asked: _Execution, made: Launched, spec: EntrySpec
    ) -> tuple[list[tuple[int, int]], tuple[Pointer | int, ...]]:
        """Memory that a launch may touch, as addresses and bytes, and its arguments."""
        bank = bytes(made.bank)
        values = [bank[asked.offsets[at] : asked.offsets[at] + asked.sizes[at]] for at in range(asked.parameter_count)]
        addresses: list[tuple[int, tuple[int, ...] | None] | None] = []
        numbers: list[int] = []
        for _, kind in spec.arguments:
            if kind.startswith("tensordesc"):
                address, shape = _mapped(values, kind)
                addresses.append((address, shape))
                numbers.append(0)
            elif kind.startswith("*"):
                address = _number(values.pop(0), signed=False)
                addresses.append((address, None) if address else None)
                numbers.append(0)
            else:
                addresses.append(None)
                numbers.append(_number(values.pop(0), signed=not kind.startswith("u")))
        if any(any(value) for value in values):
            raise UnknownLaunchError("arguments that the compiler hides are not null")
        extents = self._extents([each[0] for each in addresses if each is not None])
        arguments: list[Pointer | int] = []
        for each, number in zip(addresses, numbers, strict=True):
            if each is None:
                arguments.append(number)
                continue
            buffer = _holding(extents, each[0])
            arguments.append(Pointer(buffer, each[0] - extents[buffer][0], each[1]))
        return extents, tuple(arguments)

    def _extents(self, addresses: Sequence[int]) -> list[tuple[int, int]]:
        """Memory that addresses lie in, as address and bytes; what overlaps is one."""
        found = []
        for address in addresses:
            extent = self._library.extent(address)
            if extent is None:
                raise StrayPointerError(f"an argument points to {address:#x}, where nothing is allocated")
            found.append(extent)
        joined: list[tuple[int, int]] = []
        for base, nbytes in sorted(set(found)):
            if joined and base < sum(joined[-1]):
                joined[-1] = (joined[-1][0], max(sum(joined[-1]), base + nbytes) - joined[-1][0])
            else:
                joined.append((base, nbytes))
        return joined

    def _ask_entry(self, checksum: str, name: str) -> EntrySpec:
        found = self._ask((checksum, name))
        if found is None:
            raise UnknownLaunchError("nobody said which source its cubin was compiled from; driver.know() does")
        return cast("EntrySpec", found)

    def _ask(self, message: object) -> object:
        connection: Connection[Any, Any] | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = Client(self._devices.address, "AF_UNIX")
        connection.send(message)
        return connection.recv()


def extent_of_posed(pointer: int) -> tuple[int, int] | None:
    """Address and bytes of the posed tensor's storage that ``pointer`` lies in, or ends."""
    posing = sys.modules.get("posing")
    extents = cast("list[tuple[int, int]]", posing.extents()) if posing else []
    inside = [(base, nbytes) for base, nbytes in extents if base <= pointer <= base + nbytes]
    return max(inside, key=lambda each: pointer < sum(each), default=None)


def _holding(extents: Sequence[tuple[int, int]], address: int) -> int:
    """Which of ``extents`` an address lies in; what ends there is the second choice."""
    inside = [at for at, (base, nbytes) in enumerate(extents) if base <= address <= base + nbytes]
    return max(inside, key=lambda at: address < sum(extents[at]))


def _number(data: bytes, *, signed: bool) -> int:
    return int.from_bytes(data, "little", signed=signed)


def _mapped(values: list[bytes], kind: str) -> tuple[int, tuple[int, ...]]:
    """Take a tensor map, its shape and its strides from ``values``: the address, and the shape, slowest first."""
    matched = _DESCRIPTOR.fullmatch(kind)
    if matched is None:
        raise UnknownLaunchError(f"what a {kind} passes is not known here")
    encoded = values.pop(0)
    rank = len(matched[1].split(","))
    shape = tuple(_number(values.pop(0), signed=True) for _ in range(rank))
    strides = tuple(_number(values.pop(0), signed=True) for _ in range(rank))
    if len(encoded) != _MAP_BYTES or encoded[109] != rank:
        raise UnknownLaunchError(f"a tensor map of {rank} dimensions was expected")
    (address,) = struct.unpack_from("<Q", encoded)
    lengths = struct.unpack_from(f"<{rank}Q", encoded, 16)
    steps = struct.unpack_from(f"<{rank - 1}Q", encoded, 56)
    boxes = struct.unpack_from(f"<{rank}I", encoded, 88)
    itemsize = {0: 1, 1: 2, 6: 2, 9: 2, 2: 4, 3: 4, 7: 4}.get(encoded[108])
    block = tuple(int(each) for each in matched[1].split(","))
    if tuple(reversed(lengths)) != shape:
        raise UnknownLaunchError(f"a tensor map of {lengths[::-1]} elements is passed with the shape {shape}")
    if itemsize is None or [step // itemsize for step in reversed(steps)] != list(strides[:-1]) or strides[-1] != 1:
        raise UnknownLaunchError(f"a tensor map with strides of {steps[::-1]} bytes is passed with {strides} elements")
    if any(whole % part for whole, part in zip(block, reversed(boxes), strict=True)):
        raise UnknownLaunchError(f"a tensor map with boxes of {boxes[::-1]} cannot fetch blocks of {block}")
    dense = [1]
    for length in shape[:0:-1]:
        dense.append(dense[-1] * length)
    if list(strides) != dense[::-1]:
        raise UnknownLaunchError(f"a tensor map of {shape} with strides {strides} is not dense; only such are emulated")
    return address, shape


def _put_changes(base: int, nbytes: int, old: bytes, new: bytes) -> None:
    """Write the bytes that changed, and no others: other threads may be writing beside them."""
    import numpy as np

    changed = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    memory = np.frombuffer((ctypes.c_ubyte * nbytes).from_address(base), np.uint8)
    memory[changed] = np.frombuffer(new, np.uint8)[changed]
