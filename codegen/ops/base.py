"""What an op declares. Everything else (CLI, tuner, tests, benchmarks) derives from this one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.archs import Arch
from tilewright.codegen.layouts import WeightLayout
from tilewright.codegen.models import ModelShape
from tilewright.codegen.ops.signature import Signature, stable_key
from tilewright.codegen.precisions import LOSSLESS, PRECISIONS
from tilewright.codegen.recipe import Recipe, TensorSpec
from tilewright.codegen.routing import RoutingSpec
from tilewright.codegen.space import Config, Space

Arrays = dict[str, NDArray[Any]]
"""Tensors of one call by name; optional ones that are absent are left out."""


S = TypeVar("S", bound=Signature)
P = TypeVar("P", bound="Problem")


@dataclass(frozen=True)
class Problem:
    """A signature with its dynamic sizes and data. Subclassed by every op."""

    signature: Signature
    size_field: ClassVar[str] = "tokens"
    """Name of the field that plans pick a kernel by."""

    @property
    def dynamic_size(self) -> int:
        """The size by which plans pick a kernel."""
        return int(getattr(self, self.size_field))

    def with_size(self, size: int) -> Self:
        """The same problem with another dynamic size.

        Raises:
            TilewrightError: for an impossible size.

        """
        changes: dict[str, Any] = {self.size_field: size}
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Identity of the problem, under which its trials are stored."""
        return stable_key(self.to_dict())


@dataclass(frozen=True)
class Template(Generic[S]):
    """One Jinja file and the space of configs that it can render."""

    name: str
    """``op/file`` without suffix, the file lying in templates/."""
    language: str
    """``cpp``, ``cuda`` or ``triton``: decides the builder."""
    families: tuple[str, ...]
    """Families of archs that it is for."""
    space: Callable[..., Space]
    """``space(signature, arch)``; with :attr:`precisions` also ``space(signature, arch, some of them)``."""
    layout: Callable[[S, Config, Arch], WeightLayout | None]
    """Weight layout that a config's kernel reads; None for an op without packed weights."""
    recipe: Callable[[S, Config, Arch], Recipe]
    context: Callable[[S, Config, Arch], dict[str, Any]]
    """What the Jinja file needs beside ``signature``, ``config`` and ``arch``."""
    precisions: tuple[str, ...] = ()
    """That it can read weights in (codegen/precisions.py); empty: only as the op declares them."""


@dataclass(frozen=True)
class Workload:
    """What a problem has to do at the least, for shares of the roofline."""

    flops: float
    min_bytes: float


def packable(tensors: Sequence[TensorSpec]) -> TensorSpec | None:
    """The weight that a :class:`WeightLayout` packs: [experts, n, k]. A bias has the role of a weight, too."""
    return next((tensor for tensor in tensors if tensor.role == "weight" and len(tensor.dims) == 3), None)


class OpDeclaration(ABC, Generic[S, P]):
    """One op, declared once."""

    name: ClassVar[str]
    templates: ClassVar[tuple[Template[Any], ...]]

    @abstractmethod
    def signatures(self, model: ModelShape) -> tuple[S, ...]:
        """Signatures that ``model`` calls this op with, in the order in which a layer calls them."""

    @abstractmethod
    def signature_from_dict(self, fields: Mapping[str, Any]) -> S:
        """Signature from its JSON form.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """

    @abstractmethod
    def problem(self, signature: S, tokens: int, routing: RoutingSpec, model: ModelShape | None = None) -> P:
        """Problem of ``tokens`` tokens; under expert parallelism ``model`` says over how many experts they are routed.

        Raises:
            TilewrightError: for an impossible size.

        """

    @abstractmethod
    def problem_from_dict(self, fields: Mapping[str, Any]) -> P:
        """Problem from its JSON form, as trials keep it.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """

    @abstractmethod
    def parse_problem(self, fields: Mapping[str, str], routing: RoutingSpec) -> P:
        """Problem from ``--problem key=value,...``.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """

    @abstractmethod
    def tensors(self, signature: S) -> tuple[TensorSpec, ...]:
        """Tensors of a call, in the order in which callers pass them."""

    @abstractmethod
    def weights(self, signature: S, seed: int) -> Arrays:
        """Realistic weight and bias tensors as the op declares them, not packed; the same for the same seed."""

    @abstractmethod
    def inputs(self, problem: P, seed: int) -> Arrays:
        """Realistic tensors of the other inputs; the same for the same seed."""

    @abstractmethod
    def reference(self, signature: S, weights: Arrays, inputs: Arrays) -> NDArray[np.float64]:
        """The result in float64, in the shape of the output tensor."""

    @abstractmethod
    def tolerance(self, signature: S) -> float:
        """Largest allowed relative error: max |out - reference| / max |reference|."""

    @abstractmethod
    def workload(self, problem: P, inputs: Arrays) -> Workload:
        """Useful flops and the least bytes that must move from and to memory."""

    @abstractmethod
    def awkward_problems(self, signature: S) -> tuple[P, ...]:
        """Small problems of this signature's kind that a kernel must get right before it is timed."""

    @abstractmethod
    def default_config(self, signature: S, arch: Arch) -> Config:
        """The config that a careful engineer would write down without tuning; always a candidate."""

    def precisions(self, signature: S) -> dict[str, str | None]:
        """Precisions that some template can read weights in; each with why this signature's cannot be stored so."""
        names = dict.fromkeys(name for template in self.templates for name in template.precisions)
        weight = packable(self.tensors(signature))
        return {name: PRECISIONS[name].refusal(int(weight.dims[2])) for name in names} if weight else {}

    def space(self, signature: S, arch: Arch, precisions: Sequence[str] = (LOSSLESS,)) -> Space:
        """Every valid config of every template for ``arch``, the template's name being a parameter.

        Args:
            signature: of the kernels.
            arch: of the kernels.
            precisions: that weights may be stored in; a knob of the templates that know several.

        Raises:
            TilewrightError: when no template stores the signature's weights in one of ``precisions``.

        """
        spaces = {}
        for template in self.templates:
            if arch.family not in template.families:
                continue
            if template.precisions:
                known = tuple(name for name in precisions if name in template.precisions)
                if known:
                    spaces[template.name] = template.space(signature, arch, known)
            elif LOSSLESS in precisions:
                spaces[template.name] = template.space(signature, arch)
        return Space.union(spaces)

    def layout_key(self, signature: S, config: Config, arch: Arch) -> str:
        """Name of the weight layout that the config's kernel reads; empty where weights are not packed."""
        layout = self.template(config).layout(signature, config, arch)
        return layout.key if layout else ""

    def template(self, config: Config) -> Template[Any]:
        """Template that ``config`` belongs to."""
        return next(t for t in self.templates if t.name == config["template"])
