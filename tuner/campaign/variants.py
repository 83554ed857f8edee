"""From configs to built kernels and to the records that the database keeps of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tilewright.codegen.backends.base import Build, Builder, BuiltFile, Entry, Source
from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.registry import find_backend
from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.signature import Signature, stable_key
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.recipe.validity import validate
from tilewright.codegen.rendering import header, render_code
from tilewright.codegen.space import Config
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuner.report.inspection import Inspector, performance_warnings, spills
from tilewright.tuning_db.records import ArtifactRecord, Checked, KernelRecord


@dataclass(frozen=True, order=True)
class PlanConstraint:
    """What the kernels of a plan share."""

    layout: str
    """Weight layout, by its key, and with it the precision; empty for an op without packed weights."""
    order: str = ""
    """Order in which they add up; empty where results may depend on the batch."""


@dataclass(frozen=True)
class Variant:
    """One config of one signature, rendered; built or not."""

    config: Config
    language: str
    source: str
    entries: tuple[Entry, ...]
    """What the builder has to know of its entry points; empty for C++."""
    recipe: Recipe
    key: str
    """Identity of the kernel: hashes everything that would make another one of it. That is the code and how it is
    compiled and launched, and not the config: a knob that leaves these as they are leaves the key as it is."""
    constraint: PlanConstraint | None
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
    """The shared object, or the folder of a GPU kernel's binaries; None when there is nothing to launch."""
    message: str
    build_s: float
    """CPU seconds of the compiler."""
    files: tuple[BuiltFile, ...] = ()
    """The artifacts, in the order of the recipe's launches."""
    rejected: bool = False
    """Whether it compiled, but could never be launched."""

    @property
    def facts(self) -> tuple[EntryFacts, ...]:
        """Of the binaries of a GPU kernel, by launch."""
        return tuple(file.facts for file in self.files if file.facts is not None)

    @property
    def kernel(self) -> BuiltKernel:
        """The built kernel; only valid with a path."""
        assert self.path is not None
        return BuiltKernel(self.variant.key, self.path, self.variant.recipe, self.variant.config, self.files)


def constraint_of(
    op: OpDeclaration[Any, Any], signature: Signature, config: Config, arch: Arch, *, batch_invariant: bool
) -> PlanConstraint | None:
    """What a config's kernel would share with the others of a plan; see :attr:`Variant.constraint`."""
    layout = op.layout_key(signature, config, arch)
    if not batch_invariant:
        return PlanConstraint(layout)
    order = op.order_key(signature, config, arch)
    return None if order is None else PlanConstraint(layout, order)


class Variants(Protocol):
    """Where built kernels of one signature come from."""

    op: OpDeclaration[Any, Any]
    signature: Signature
    arch: Arch

    def constraint(self, config: Config) -> PlanConstraint | None:
        """What the config's kernel would share with the others of a plan; see :attr:`Variant.constraint`."""

    def build(self, configs: Sequence[Config], progress: Callable[[int], None] | None = None) -> list[BuildResult]:
        """One result for each of ``configs``, in order; ``progress`` gets the number done."""

    def record(self, built: BuildResult, checked: Checked) -> tuple[KernelRecord, list[ArtifactRecord]]:
        """What the database keeps of a built kernel."""

    def performance_warnings(self, kernel: BuiltKernel) -> tuple[str, ...]:
        """What speaks against a GPU kernel that was not timed."""


class VariantBuilder:
    """Renders and builds the variants of one signature for one arch, each by the builder of its template's language.

    Args:
        op: the op.
        signature: of all variants.
        arch: that they are built for.
        builders: by language; asked for those alone whose templates are used.
        batch_invariant: whether plans must add up in one order.

    """

    def __init__(
        self,
        op: OpDeclaration[Any, Any],
        signature: Signature,
        arch: Arch,
        builders: Mapping[str, Builder],
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.op = op
        self._batch_invariant = batch_invariant
        self.signature = signature
        self.arch = arch
        self._builders = builders
        self._inspector = Inspector()
        self._performance_warnings: dict[Config, tuple[str, ...]] = {}

    def constraint(self, config: Config) -> PlanConstraint | None:
        """What the config's kernel would share with the others of a plan; see :attr:`Variant.constraint`."""
        return constraint_of(self.op, self.signature, config, self.arch, batch_invariant=self._batch_invariant)

    def variant(self, config: Config) -> Variant:
        """Render ``config``."""
        template = self.op.template(config)
        code = render_code(template, self.signature, config, self.arch)
        source = header(template, self.signature, config, self.arch) + code
        recipe = template.recipe(self.signature, config, self.arch)
        validate(recipe)
        entries = template.entries(self.signature, config, self.arch) if template.entries else ()
        identity = {
            "signature": self.signature.to_dict(),
            "template": template.name,
            "arch": self.arch.name,
            "toolchain": self._builders[template.language].toolchain,
            "code": hashlib.sha256(code.encode()).hexdigest(),
            "entries": [entry.to_dict() for entry in entries],
            "recipe": recipe.to_dict(),
        }
        key = stable_key(identity)
        return Variant(config, template.language, source, entries, recipe, key, self.constraint(config))

    def build(self, configs: Sequence[Config], progress: Callable[[int], None] | None = None) -> list[BuildResult]:
        """Render and build ``configs`` side by side, one result each, in order."""
        variants = [self.variant(config) for config in configs]
        builds: dict[int, Build] = {}
        for language in dict.fromkeys(variant.language for variant in variants):
            mine = [index for index, variant in enumerate(variants) if variant.language == language]
            done = len(builds)

            def count(number: int, before: int = done) -> None:
                if progress:
                    progress(before + number)

            sources = [Source(variants[index].source, variants[index].entries) for index in mine]
            builds |= zip(mine, self._builders[language].build_all(sources, progress=count), strict=True)
        return [
            BuildResult(variant, build.path, build.message, build.cpu_s, build.files, build.rejected)
            for variant, build in ((variant, builds[index]) for index, variant in enumerate(variants))
        ]

    def record(self, built: BuildResult, checked: Checked) -> tuple[KernelRecord, list[ArtifactRecord]]:
        """What the database keeps of a built kernel.

        Raises:
            TilewrightError: when a binary does not take what the recipe passes.

        """
        kernel = built.kernel
        artifacts = [
            ArtifactRecord.from_bytes(file.path.read_bytes(), kind=file.kind, abi_version=kernel.recipe.abi_version)
            for file in built.files
        ]
        backend = find_backend(built.variant.language)
        checksums = [artifact.checksum for artifact in artifacts]
        launches = backend.built_launches(kernel.recipe.launches, built.files, checksums, self.arch)
        facts: dict[str, Any] = {
            "artifact_bytes": sum(len(artifact.data) for artifact in artifacts),
            "layout": built.variant.layout_key,
        }
        if built.facts:
            mixes = self._inspector.instructions(backend, built.variant.source, built.files)
            facts["entries"] = [
                {**told.to_dict(), "instructions": mix.to_dict(), "wide_loads": mix.wide}
                for told, mix in zip(built.facts, mixes, strict=True)
            ]
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
            toolchain=self._builders[built.variant.language].toolchain,
            facts=facts,
            artifacts=tuple(dict.fromkeys(checksums)),
            checked=checked,
        )
        return record, artifacts

    def performance_warnings(self, kernel: BuiltKernel) -> tuple[str, ...]:
        """What speaks against a GPU kernel that was not timed; see tuner/report/inspection.py."""
        if not kernel.facts:
            return ()
        if kernel.config not in self._performance_warnings:
            found = ("spills registers",) if spills(kernel.facts) else self._of_instructions(kernel.config)
            self._performance_warnings[kernel.config] = found
        return self._performance_warnings[kernel.config]

    def _of_instructions(self, config: Config) -> tuple[str, ...]:
        (built,) = self.build([config])
        backend = find_backend(built.variant.language)
        mixes = self._inspector.instructions(backend, built.variant.source, built.files)
        return performance_warnings(built.facts, mixes)
