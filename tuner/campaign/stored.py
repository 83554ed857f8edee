"""Kernels as a database keeps them, in place of a builder: nothing is rendered, and nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.codegen.backends.base import BuiltFile
from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.variants import BuildResult, PlanConstraint, Variant, constraint_of
from tilewright.tuner.evaluation.outcome import BuiltKernel
from tilewright.tuning_db.records import ArtifactRecord, Checked, KernelRecord
from tilewright.tuning_db.store import Store


class StoredVariants:
    """Kernels of one signature for one arch; see :class:`tilewright.tuner.campaign.variants.Variants`.

    Args:
        op: the op.
        signature: of all kernels.
        arch: that they were built for.
        store: that holds their bytes.
        kernels: the kernels.
        folder: where their binaries are put.
        batch_invariant: whether plans must add up in one order.

    """

    def __init__(
        self,
        op: OpDeclaration[Any, Any],
        signature: Signature,
        arch: Arch,
        store: Store,
        kernels: Sequence[KernelRecord],
        folder: Path,
        *,
        batch_invariant: bool,
    ) -> None:
        self.op, self.signature, self.arch = op, signature, arch
        self._store = store
        self._folder = folder
        self._batch_invariant = batch_invariant
        self._kernels = {Config(kernel.config): kernel for kernel in kernels}
        self._built: dict[Config, BuildResult] = {}

    @property
    def configs(self) -> list[Config]:
        """Of all kernels that there are."""
        return list(self._kernels)

    def constraint(self, config: Config) -> PlanConstraint | None:
        """What the config's kernel would share with the others of a plan."""
        return constraint_of(self.op, self.signature, config, self.arch, batch_invariant=self._batch_invariant)

    def build(self, configs: Sequence[Config], progress: Callable[[int], None] | None = None) -> list[BuildResult]:
        """Put the binaries of ``configs`` where a driver can load them; what is not stored, or damaged, has no path."""
        results = []
        for done, config in enumerate(configs, start=1):
            if config not in self._built:
                self._built[config] = self._unpack(config)
            results.append(self._built[config])
            if progress:
                progress(done)
        return results

    def record(self, built: BuildResult, checked: Checked) -> tuple[KernelRecord, list[ArtifactRecord]]:
        """The kernel as it is stored, checked as far as it is by now."""
        kernel = self._kernels[built.variant.config]
        artifacts = [artifact for each in kernel.artifacts if (artifact := self._store.artifact(each)) is not None]
        return replace(kernel, checked=checked), artifacts

    def performance_warnings(self, kernel: BuiltKernel) -> tuple[str, ...]:
        """Nothing speaks against a kernel that is going to be timed."""
        del kernel
        return ()

    def _unpack(self, config: Config) -> BuildResult:
        kernel = self._kernels.get(config)
        if kernel is None:
            return self._missing(config, "is not stored")
        try:
            recipe = Recipe.from_dict(kernel.recipe)
            artifacts = [self._artifact(launch.artifact) for launch in recipe.launches]
        except TilewrightError as error:
            return self._missing(config, str(error))
        folder = self._folder / kernel.key
        folder.mkdir(exist_ok=True)
        files = []
        for index, artifact in enumerate(artifacts):
            path = folder / f"{index}.{artifact.kind}"
            path.write_bytes(artifact.data)
            files.append(BuiltFile(path, artifact.kind))
        language, constraint = self.op.template(config).language, self.constraint(config)
        variant = Variant(config, language, kernel.source, (), recipe, kernel.key, constraint)
        return BuildResult(variant, folder, "", 0.0, tuple(files))

    def _artifact(self, checksum: str) -> ArtifactRecord:
        artifact = self._store.artifact(checksum)
        if artifact is None:
            raise TilewrightError(f"its binary {checksum[:16]} is missing in the database; tune again")
        return artifact

    def _missing(self, config: Config, why: str) -> BuildResult:
        template = self.op.template(config)
        recipe = template.recipe(self.signature, config, self.arch)
        variant = Variant(config, template.language, "", (), recipe, "", self.constraint(config))
        return BuildResult(variant, None, why, 0.0)
