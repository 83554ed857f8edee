"""Plans for GPUs in a database, with kernels that Triton compiled for them; nothing is searched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_compiling import nearest

from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuning_db.records import ArtifactRecord, DeviceRecord, KernelRecord, PlanEntry, PlanRecord, Timing
from tilewright.tuning_db.store import Store

SMALL = {"block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
"""Knobs of a moe_gemm kernel that the emulator runs fast."""


@dataclass(frozen=True)
class Compiled:
    """A kernel, as the database keeps it."""

    record: KernelRecord
    artifacts: list[ArtifactRecord]

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_dict(self.record.recipe)

    @property
    def layout_key(self) -> str:
        layout = self.recipe.weight_layout
        return layout.key if layout else ""

    @property
    def precision(self) -> str:
        return self.recipe.precision


@dataclass
class Compiler:
    """Compiles each kernel once."""

    builder: TritonBuilder
    known: dict[tuple[str, Config], Compiled] = field(default_factory=dict)

    def kernel(self, signature: Signature, template: str, wanted: Mapping[str, Any], precision: str = "") -> Compiled:
        """Of the template by its short name, with the config that has most of the ``wanted`` knobs."""
        op, arch = find_op(signature.op), self.builder.arch
        named = next(t for t in op.templates if t.name == f"{signature.op}/{template}")
        space = named.space(signature, arch, (precision,)) if precision else named.space(signature, arch)
        config = Config.of(named.name, nearest(space, wanted))
        key = (signature.key, config)
        if key not in self.known:
            variants = VariantBuilder(op, signature, arch, {"triton": self.builder})
            (built,) = variants.build([config])
            assert built.path is not None, built.message
            self.known[key] = Compiled(*variants.record(built, "emulated"))
        return self.known[key]


@contextmanager
def compiling(arch: str, folder: Path) -> Iterator[Compiler]:
    """A compiler for ``arch``."""
    with TritonBuilder(GPU_ARCHS[arch], folder) as builder:
        yield Compiler(builder)


def store_plan(
    path: Path,
    signature: Signature,
    entries: Sequence[tuple[int | None, Compiled | None]],
    device_key: str,
    *,
    timing: Timing = "predicted",
    error: float = 0.0,
    time_us: float = 12.5,
) -> Path:
    """Write a plan with its kernels into the database ``path`` and return ``path``."""
    kernels = [compiled for _, compiled in entries if compiled is not None]
    with Store.open(path) as store:
        store.put_device(DeviceRecord(device_key, "test", kernels[0].record.arch if kernels else "sm_90"))
        for compiled in kernels:
            store.add_kernel(compiled.record, compiled.artifacts)
        store.put_plan(
            PlanRecord(
                op=signature.op,
                signature_key=signature.key,
                signature=signature.to_dict(),
                device_key=device_key,
                threads=0,
                layout="+".join(dict.fromkeys(compiled.layout_key for compiled in kernels)),
                timing=timing,
                checked="emulated",
                precision="+".join(dict.fromkeys(compiled.precision for compiled in kernels)) or "fp32",
                error=error,
                entries=tuple(
                    PlanEntry(bound, compiled and compiled.record.key, time_us, 2 * time_us, 8)
                    for bound, compiled in entries
                ),
            )
        )
    return path
