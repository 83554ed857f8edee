"""The stand-in of the CUDA driver (tests/standin/cuda_driver.c): built once, opened as the real one is."""

from __future__ import annotations

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

import pytest

FOLDER = Path(__file__).parent / "standin"
RULES = {each["rule"]: each for each in json.loads((FOLDER / "rules.json").read_text())}
SM_COUNTS = {80: 108, 90: 132, 100: 148, 120: 188}


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

    def begin(self, capabilities: Sequence[int], version: int = 13000) -> None:
        """Have these devices from now on, and forget all launches."""
        numbers = (ctypes.c_int * len(capabilities))(*capabilities)
        counts = (ctypes.c_int * len(capabilities))(*(SM_COUNTS[each] for each in capabilities))
        self._library.standin_begin(numbers, counts, len(capabilities), version)

    @property
    def launches(self) -> list[Launched]:
        """All since the last beginning, in order."""
        found = (self._library.standin_launch(index) for index in range(self._library.standin_launches()))
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
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler to build the stand-in of the CUDA driver with")
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("Triton, whose cuda.h the stand-in is built with, is not installed")
    include = Path(triton.origin).parent / "backends/nvidia/include"
    folder = Path(tempfile.mkdtemp(prefix="tilewright-standin-"))
    made = [f'#define RULE_{name} standin_break({rule["result"]}, "{name}")' for name, rule in RULES.items()]
    head = "CUresult standin_break(CUresult result, const char *rule);\n#define RULE(name) RULE_##name\n"
    (folder / "rules.h").write_text(head + "\n".join(made) + "\n")
    # The name under which Triton looks for the driver, too.
    library = folder / "libcuda.so.1"
    command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unused-parameter"]
    command += [f"-I{folder}", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(FOLDER / "cuda_driver.c"), "-ldl"], check=True)
    return StandIn(library)
