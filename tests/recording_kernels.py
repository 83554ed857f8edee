"""Kernels that write down the arguments they get, in whatever process they run."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tilewright.codegen.recipe.model import ABI_VERSION

COMPILER = shutil.which(os.environ.get("CC", "cc"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build a test kernel with")

MOST_ARGUMENTS = 8
_SOURCE = r"""
#include <stdint.h>
#include <stdio.h>

int32_t tilewright_abi_version(void) { return ABI; }

static int32_t record(int64_t count, const int64_t *arguments) {
    FILE *file = fopen(PATH, "ab");
    if (!file) return 1;
    fwrite(&count, 8, 1, file);
    fwrite(arguments, 8, count, file);
    return fclose(file);
}

#define TAKE(n) int32_t take_##n(const void *host, const int64_t *arguments) { return record(n, arguments); }
"""


@dataclass(frozen=True)
class Recorder:
    """A shared object of entries ``take_0`` to ``take_8``, named by the number of their arguments, and their record."""

    path: Path
    record: Path
    library: ctypes.CDLL

    @classmethod
    def build(cls, folder: Path) -> Recorder:
        assert COMPILER is not None
        path, record = folder / "recorder.so", folder / "record"
        entries = "".join(f"TAKE({n})\n" for n in range(MOST_ARGUMENTS + 1))
        flags = [f"-DABI={ABI_VERSION}", f'-DPATH="{record}"', "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
        subprocess.run([COMPILER, *flags], input=_SOURCE + entries, text=True, check=True)
        return cls(path, record, ctypes.CDLL(str(path)))

    def address(self, entry: str) -> int:
        """Of an entry in this process."""
        address = ctypes.cast(getattr(self.library, entry), ctypes.c_void_p).value
        assert address is not None
        return address

    def forget(self) -> None:
        """Begin a new record."""
        self.record.write_bytes(b"")

    def calls(self) -> list[list[int]]:
        """Arguments of each call since, in order."""
        numbers, calls = np.frombuffer(self.record.read_bytes(), np.int64).tolist(), []
        while numbers:
            count, *numbers = numbers
            calls.append(numbers[:count])
            numbers = numbers[count:]
        return calls
