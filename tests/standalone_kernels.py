"""Kernels linked into a program of their own (data/kernel_driver.cpp): run by an emulator, or under a sanitizer."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from guarded_calls import DTYPES, POISON, sizes_of
from patience import PATIENCE_S

from tilewright.codegen.backends.cpp.builder import FLAGS
from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.ops.base import Arrays
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.recipe.resolve import Place, resolve, workspace_bytes

DRIVER = Path(__file__).parent / "data" / "kernel_driver.cpp"
_OF_SHARED_OBJECTS = ("-shared", "-nodefaultlibs", "-lc")


@dataclass(frozen=True)
class Toolchain:
    """A compiler, what it is asked for beside a kernel's own flags, and what runs its programs."""

    compiler: str
    arch: Arch
    flags: tuple[str, ...]
    runner: tuple[str, ...] = ()

    def build(self, source: str, entry: str, folder: Path) -> Path:
        """Program that calls ``source``."""
        folder.mkdir()
        (folder / "kernel.cpp").write_text(source)
        flags = [*(flag for flag in FLAGS if flag not in _OF_SHARED_OBJECTS), *self.arch.compile_flags, *self.flags]
        command = [self.compiler, *flags, f"-DENTRY={entry}", "-pthread", DRIVER, folder / "kernel.cpp", "-o"]
        done = subprocess.run([*command, folder / "program"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return folder / "program"

    def run(self, program: Path, recipe: Recipe, tensors: Arrays, expected: Arrays, threads: int) -> Arrays:
        """Outputs of one call, shaped like ``expected``; fails when the program says anything or ends badly."""
        sizes, place = sizes_of(recipe, tensors, expected), Place(threads=threads)
        specs = [spec for spec in recipe.tensors if spec.role == "output" or spec.name in tensors]
        buffers = {"workspace": b"\xff" * workspace_bytes(recipe, sizes, place)}
        for spec in specs:
            if spec.role == "output":
                buffers[spec.name] = bytes([POISON]) * (expected[spec.name].size * DTYPES[spec.dtype].itemsize)
            else:
                buffers[spec.name] = tensors[spec.name].astype(DTYPES[spec.dtype]).tobytes()
        number = {name: index for index, name in enumerate(buffers)}
        # The program knows the addresses, which are multiples of 64 as these are.
        resolved = resolve(recipe, sizes, dict.fromkeys(buffers, 1 << 20), place)
        (launch,) = resolved.launches
        arguments = [
            (1, number[each.buffer], each.offset) if each.buffer else (0, each.value, 0) for each in launch.arguments
        ]
        given, taken = program.with_name("input"), program.with_name("output")
        head = _numbers(threads, len(buffers), *map(len, buffers.values()), len(arguments), *sum(arguments, ()))
        given.write_bytes(head + b"".join(buffers.values()))
        command: Sequence[str] = [*self.runner, str(program), str(given), str(taken)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
        after = dict(zip(buffers, _split(taken.read_bytes(), [len(b) for b in buffers.values()]), strict=True))
        for spec in specs:
            assert spec.role == "output" or after[spec.name] == buffers[spec.name], f"changed its input {spec.name}"
        return {
            spec.name: np.frombuffer(after[spec.name], DTYPES[spec.dtype]).reshape(expected[spec.name].shape)
            for spec in specs
            if spec.role == "output"
        }


def _numbers(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def _split(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    ends = np.cumsum(sizes).tolist()
    return [data[end - size : end] for size, end in zip(sizes, ends, strict=True)]
