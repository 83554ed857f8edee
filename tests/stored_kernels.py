"""What the tuner stores of GPU kernels and their plans, without a search: each built once for all tests of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from awkward import Case
from gpu_builders import gpu_builder
from gpu_compiling import nearest

from tilewright.codegen.backends.triton.entry import EntrySpec, triton_entries
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.space import Config
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuning_db.records import ArtifactRecord, DeviceRecord, KernelRecord, PlanEntry, PlanRecord, Timing
from tilewright.tuning_db.store import Store


@dataclass(frozen=True)
class Stored:
    """A kernel as a database holds it, and what its entries were specialised for."""

    record: KernelRecord
    artifact_records: tuple[ArtifactRecord, ...]
    entries: tuple[EntrySpec, ...]

    @property
    def source(self) -> str:
        return self.record.source

    @property
    def artifacts(self) -> dict[str, bytes]:
        """By checksum."""
        return {each.checksum: each.data for each in self.artifact_records}

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.from_dict(self.record.recipe)


def stored(case: Case) -> Stored:
    """The kernel of ``case``, built in the cache, where others find it. Skips where the compiler makes no binary."""
    arch = GPU_ARCHS[case.arch.name]
    variants = VariantBuilder(find_op(case.op), case.signature, arch, {"triton": gpu_builder(arch.name)})
    (built,) = variants.build([case.config])
    if built.path is None:
        pytest.skip(f"a config that the compiler has no binary for: {built.message}")
    record, artifacts = variants.record(built, "compiled")
    return Stored(record, tuple(artifacts), triton_entries(built.variant.entries))


def stored_variant(
    signature: Signature, template: str, wanted: Mapping[str, Any], arch: str, precision: str = ""
) -> Stored:
    """The kernel of ``template`` whose config has most of the ``wanted`` knobs that the template knows."""
    named = next(each for each in find_op(signature.op).templates if each.name == f"{signature.op}/{template}")
    space = named.space(signature, GPU_ARCHS[arch], *([(precision,)] if precision else []))
    known = {parameter.name for parameter in space.parameters}
    config = nearest(space, {name: value for name, value in wanted.items() if name in known})
    return stored(Case(signature.op, signature, Config.of(named.name, config), GPU_ARCHS[arch]))


def store_gpu_plan(
    path: Path,
    entries: Sequence[tuple[int | None, Stored | None]],
    device_key: str,
    timing: Timing = "predicted",
    error: float = 0.0,
) -> None:
    """Add a plan to the database ``path``: which kernel serves sizes up to which (None: any, or torch)."""
    kernels = [kernel for _, kernel in entries if kernel is not None]
    first = kernels[0]
    with Store.open(path) as store:
        store.put_device(DeviceRecord(device_key, device_key, first.record.arch))
        for kernel in kernels:
            store.add_kernel(kernel.record, kernel.artifact_records)
        layouts = dict.fromkeys(each.recipe.weight_layout.key for each in kernels if each.recipe.weight_layout)
        store.put_plan(
            PlanRecord(
                op=first.record.op,
                signature_key=first.record.signature_key,
                signature=first.record.signature,
                device_key=device_key,
                threads=0,
                layout="+".join(layouts),
                timing=timing,
                checked="compiled",
                precision=first.recipe.precision,
                error=error,
                entries=tuple(
                    PlanEntry(bound, kernel and kernel.record.key, 12.5, 25.0, 8) for bound, kernel in entries
                ),
            )
        )
