"""Kernels that the conformance record loads and launches: small, and of every kind that the driver has rules for.

``python tests/standin_kernels.py FOLDER`` prepares them for a machine with a GPU (tests/standin/conformance/run.py).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_builders import gpu_builder

from tilewright.codegen.backends.base import Source
from tilewright.codegen.backends.triton.entry import EntrySpec

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def copy(x, out, count, last):
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(out + at, tl.load(x + at, mask=at < count) + last, mask=at < count)


@triton.jit
def multiply(x, out, steps):
    rows, columns = tl.arange(0, 128)[:, None], tl.arange(0, 64)[None, :]
    total = tl.zeros((128, 128), tl.float32)
    for step in range(steps):
        left = tl.load(x + step * 8192 + rows * 64 + columns)
        right = tl.load(out + step * 8192 + tl.arange(0, 64)[:, None] * 128 + tl.arange(0, 128)[None, :])
        total += tl.dot(left, right)
    tl.store(out + rows * 128 + tl.arange(0, 128)[None, :], total.to(tl.bfloat16))
"""
_COPIED = (("x", "*fp32"), ("out", "*fp32"), ("count", "i32"), ("last", "i64"))
ENTRIES = {
    "copy": EntrySpec("copy", _COPIED),
    "clustered": EntrySpec("copy", _COPIED, options={"num_ctas": 2}),
    "wide": EntrySpec("multiply", (("x", "*bf16"), ("out", "*bf16"), ("steps", "i32")), num_stages=4),
}
"""By name: as it is, in a cluster of two blocks, and one that has to ask for its shared memory."""
KERNELS = {"sm_90": tuple(ENTRIES), "sm_80": ("copy",)}
"""By arch: of the device that is asked, and of one whose cubins it does not run."""


@dataclass(frozen=True)
class Prepared:
    """A kernel's cubin, and what a launch of it has to say."""

    image: bytes
    entry: str
    threads: int
    cluster: int
    shared_memory_bytes: int
    parameters: tuple[str, ...]


def prepared(name: str, arch_name: str) -> Prepared:
    """The kernel ``name`` for an arch; built in the cache, where it is found from then on."""
    spec = ENTRIES[name]
    build = gpu_builder(arch_name).build(Source(SOURCE, (spec,)))
    assert build.path is not None, build.message
    file, facts = build.files[0], build.files[0].facts
    assert facts is not None
    kinds = tuple("pointer" if kind.startswith("*") else kind for _, kind in spec.arguments)
    return Prepared(
        file.path.read_bytes(), spec.entry, 32 * facts.num_warps, facts.cluster, facts.dynamic_smem_bytes, kinds
    )


def write(folder: Path) -> None:
    """All kernels as run.py reads them: ``copy.sm_90.cubin``, and ``kernels.json`` with what launches say."""
    described: dict[str, dict[str, object]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for arch_name, names in KERNELS.items():
        for name in names:
            made = prepared(name, arch_name)
            (folder / f"{name}.{arch_name}.cubin").write_bytes(made.image)
            told = {field: value for field, value in asdict(made).items() if field != "image"}
            described[f"{name}.{arch_name}"] = told
    (folder / "kernels.json").write_text(json.dumps(described, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
