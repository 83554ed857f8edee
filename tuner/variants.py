"""From configs to built kernels and to the records that the database keeps of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilewright.codegen.archs import Arch
from tilewright.codegen.building.cpp import CppBuilder
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.signature import Signature, stable_key
from tilewright.codegen.recipe import Recipe
from tilewright.codegen.rendering import render
from tilewright.codegen.space import Config
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuning_db.records import ArtifactRecord, Checked, KernelRecord


@dataclass(frozen=True, order=True)
class Bond:
    """What the kernels of a plan share."""

    layout: str
    """Weight layout, by its key, and with it the precision; empty for an op without packed weights."""
    order: str = ""
    """Order in which they add up; empty where results may depend on the batch."""


@dataclass(frozen=True)
class Variant:
    """One config of one signature, rendered; built or not."""

    config: Config
    source: str
    recipe: Recipe
    key: str
    """Identity of the kernel: lists everything that would make another one of it."""
    bond: Bond | None
    """What it would share with the others of a plan; None: no plan that is asked for may use it."""

    @property
    def layout_key(self) -> str:
        """Name of the weight layout that the kernel reads; empty for an op without weights."""
        return self.recipe.weight_layout.key if self.recipe.weight_layout else ""


@dataclass(frozen=True)
class BuildResult:
    """What became of building a variant."""

    variant: Variant
    path: Path | None
    message: str
    build_s: float
    """CPU seconds of the compiler."""

    @property
    def kernel(self) -> BuiltKernel:
        """The built kernel; only valid with a path."""
        assert self.path is not None
        return BuiltKernel(self.variant.key, self.path, self.variant.recipe)


class Workshop:
    """Renders and builds the variants of one signature for one arch; plans may have to be ``batch_invariant``."""

    def __init__(
        self,
        op: OpDeclaration[Any, Any],
        signature: Signature,
        arch: Arch,
        builder: CppBuilder,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.op = op
        self._batch_invariant = batch_invariant
        self.signature = signature
        self.arch = arch
        self._builder = builder

    @property
    def toolchain(self) -> str:
        """What builds: compiler and flags."""
        return self._builder.toolchain

    def bond(self, config: Config) -> Bond | None:
        """What the config's kernel would share with the others of a plan; see :attr:`Variant.bond`."""
        layout = self.op.layout_key(self.signature, config, self.arch)
        if not self._batch_invariant:
            return Bond(layout)
        order = self.op.order_key(self.signature, config, self.arch)
        return None if order is None else Bond(layout, order)

    def variant(self, config: Config) -> Variant:
        """Render ``config``."""
        template = self.op.template(config)
        source = render(template, self.signature, config, self.arch)
        recipe = template.recipe(self.signature, config, self.arch)
        identity = {
            "signature": self.signature.to_dict(),
            "config": dict(config),
            "arch": self.arch.name,
            "toolchain": self.toolchain,
            "source": hashlib.sha256(source.encode()).hexdigest(),
            "recipe": recipe.to_dict(),
        }
        return Variant(config, source, recipe, stable_key(identity), self.bond(config))

    def build(self, configs: Sequence[Config], progress: Callable[[int], None] | None = None) -> list[BuildResult]:
        """Render and build ``configs`` side by side, one result each, in order."""
        variants = [self.variant(config) for config in configs]
        builds = self._builder.build_all([variant.source for variant in variants], progress=progress)
        return [
            BuildResult(variant, build.path, build.message, build.cpu_s)
            for variant, build in zip(variants, builds, strict=True)
        ]

    def record(self, built: BuildResult, checked: Checked) -> tuple[KernelRecord, ArtifactRecord]:
        """What the database keeps of a built kernel."""
        kernel = built.kernel
        artifact = ArtifactRecord.from_bytes(
            kernel.path.read_bytes(), kind="host_so", abi_version=kernel.recipe.abi_version
        )
        launches = tuple(replace(launch, artifact=artifact.checksum) for launch in kernel.recipe.launches)
        record = KernelRecord(
            key=kernel.key,
            op=self.op.name,
            signature_key=self.signature.key,
            signature=self.signature.to_dict(),
            template=built.variant.config["template"],
            config=dict(built.variant.config),
            arch=self.arch.name,
            source=built.variant.source,
            recipe=replace(kernel.recipe, launches=launches).to_dict(),
            toolchain=self.toolchain,
            facts={"artifact_bytes": len(artifact.data), "layout": built.variant.layout_key},
            artifacts=(artifact.checksum,),
            checked=checked,
        )
        return record, artifact
