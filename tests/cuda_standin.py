"""The stand-in of the CUDA driver (tests/standin): built once, opened as the real one is."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "standin"
PARTS = ("cuda_driver", "memory", "streams", "executing")
RULES = {each["rule"]: each for each in json.loads((FOLDER / "rules.json").read_text())}
SM_COUNTS = {80: 108, 90: 132, 100: 148, 120: 188}
"""Of a product of each compute capability."""
MOST_LAUNCHES = 256
"""That the library remembers."""


class Launched(ctypes.Structure):
    """What was launched: the driver's structure of the same name."""

    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("device", ctypes.c_int),
        ("bank_bytes", ctypes.c_int),
        ("cooperative", ctypes.c_int),
        ("programmatic", ctypes.c_int),
        ("spread", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("dynamic_smem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("bank", ctypes.c_ubyte * 4096),
        ("written", ctypes.c_ubyte * 4096),
    )

    @property
    def parameters(self) -> bytes:
        """The bank of parameters, as the kernel would read it."""
        return bytes(self.bank)[: self.bank_bytes]


class StandIn:
    """The library, and what it saw."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.standin_launch.restype = ctypes.POINTER(Launched)
        self._library.standin_broken.restype = ctypes.c_char_p
        self._library.standin_image_bytes.restype = ctypes.c_size_t
        self._library.standin_furnish.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)

    def begin(
        self,
        capabilities: Sequence[int],
        version: int = 13000,
        *,
        sm_count: int | None = None,
        memory_bytes: int = 1 << 30,
        l2_bytes: int = 1 << 20,
        name: str = "",
    ) -> None:
        """Have these devices from now on, and forget all launches, allocations and streams.

        Args:
            capabilities: compute capability of each, 90 of 9.0.
            version: of the driver, 13000 of 13.0.
            sm_count: multiprocessors of each; None: as a product has them.
            memory_bytes: of each.
            l2_bytes: of each one's cache.
            name: of each; empty: one that no product has.

        """
        numbers = (ctypes.c_int * len(capabilities))(*capabilities)
        counts = (ctypes.c_int * len(capabilities))(*(sm_count or SM_COUNTS[each] for each in capabilities))
        self._library.standin_furnish(memory_bytes, l2_bytes, name.encode())
        self._library.standin_begin(numbers, counts, len(capabilities), version)

    def image_bytes(self, image: bytes) -> int:
        """Length of a cubin as the library reads it, which is not told; 0 for what is none."""
        length: int = self._library.standin_image_bytes(image)
        return length

    def execute_with(self, execute: Any, find: Any) -> None:
        """Have launches carried out by ``execute``, on memory that ``find`` knows, too; None: not at all."""
        self._library.standin_execute_with(execute, find)

    def extent(self, pointer: int) -> tuple[int, int] | None:
        """Address and bytes of the memory that ``pointer`` lies in; None where there is none."""
        base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
        found = self._library.standin_extent(ctypes.c_uint64(pointer), ctypes.byref(base), ctypes.byref(nbytes))
        return (base.value, nbytes.value) if found else None

    @property
    def launches(self) -> list[Launched]:
        """All since the last beginning, in order; of many, the last ones."""
        count = self._library.standin_launches()
        first = max(0, count - MOST_LAUNCHES)
        found = (self._library.standin_launch(index) for index in range(first, count))
        return [Launched.from_buffer_copy(each.contents) for each in found]

    @property
    def broken(self) -> str:
        """Name of the rule that was broken last."""
        name: bytes = self._library.standin_broken()
        return name.decode()

    def capture(self, on: bool) -> None:
        """Let streams be recorded by a graph, or no more."""
        self._library.standin_capture(int(on))


@functools.cache
def standin() -> StandIn:
    """The stand-in of this process; skips where it cannot be built."""
    import pytest  # children that launch do without it

    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler to build the stand-in of the CUDA driver with")
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("Triton, whose cuda.h the stand-in is built with, is not installed")
    include = Path(triton.origin).parent / "backends/nvidia/include"
    folder = Path(tempfile.mkdtemp(prefix="tilewright-standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = [f'#define RULE_{name} standin_break({rule["result"]}, "{name}")' for name, rule in RULES.items()]
    head = "CUresult standin_break(CUresult result, const char *rule);\n#define RULE(name) RULE_##name\n"
    (folder / "rules.h").write_text(head + "\n".join(made) + "\n")
    # The name under which Triton looks for the driver, too.
    library = folder / "libcuda.so.1"
    command = [compiler, "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC"]
    command += ["-Wall", "-Werror", "-Wno-unused-parameter"]
    command += [f"-I{folder}", f"-I{include}", f'-DTESTS="{FOLDER.parent}"', "-Wl,-soname,libcuda.so.1"]
    command += ["-o", str(library), *(str(FOLDER / f"{part}.c") for part in PARTS), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return StandIn(library)


def forget_devices() -> None:
    """Have no device any more, if there is a stand-in in this process."""
    if standin.cache_info().currsize:
        standin().begin([])
