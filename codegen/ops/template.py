"""A template of an op: one Jinja file, the configs that it can render, and how what it renders is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tilewright.codegen.backends.base import Entry
from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import Recipe
from tilewright.codegen.space import Config, Space, Value
from tilewright.codegen.work import LaunchWork
from tilewright.errors import TilewrightError

S = TypeVar("S", bound=Signature)


def _no_fixed_order(signature: Any, config: Config, arch: Arch) -> None:
    """Nothing is known of the order of sums."""
    del signature, config, arch


@dataclass(frozen=True)
class Template(Generic[S]):
    """One Jinja file and the space of configs that it can render.

    The arch that its functions get is of one of its families: a ``CpuArch`` or a ``GpuArch``.
    """

    name: str
    """``op/file`` without suffix, the file lying in templates/."""
    language: str
    """``cpp``, ``cuda`` or ``triton``: decides the builder."""
    families: tuple[str, ...]
    """Families of archs that it is for."""
    space: Callable[..., Space]
    """``space(signature, arch)``; with :attr:`precisions` also ``space(signature, arch, some of them)``."""
    layout: Callable[[S, Config, Any], WeightLayout | RowLayout | None]
    """Weight layout that a config's kernel reads; None for an op without packed weights."""
    recipe: Callable[[S, Config, Any], Recipe]
    context: Callable[[S, Config, Any], dict[str, Any]]
    """What the Jinja file needs beside ``signature``, ``config`` and ``arch``."""
    applies: Callable[[S, Any], bool] = lambda _signature, _arch: True
    """Whether the algorithm can compute a signature at all; where not, there is no space."""
    label: tuple[str, ...] = ()
    """Knobs whose values tell its kernels apart in a table, beside the template's name."""
    precisions: tuple[str, ...] = ()
    """That it can read weights in (codegen/numbers/precisions.py); empty: only as the op declares them."""
    dtypes: tuple[str, ...] = (LOSSLESS,)
    """Of activations that it computes with."""
    exclusion: Callable[[str, Any], str | None] = lambda _precision, _arch: None
    """``exclusion(precision, arch)``: why it cannot read weights in a precision there, in words; None: it can."""
    order: Callable[[S, Config, Any], str | None] = _no_fixed_order
    """Name of the order in which a config's kernel adds up. Kernels of one order, whatever their templates, give a
    token the same bits, on any number of threads and whatever else is in the batch. None: not so, or not known."""
    entries: Callable[[S, Config, Any], tuple[Entry, ...]] | None = None
    """What the builder has to know of every entry point, in the order of the recipe's launches; None for ``cpp``."""
    emulated_problems: Callable[[S, Config, Any], tuple[Problem, ...]] | None = None
    """``emulated_problems(signature, config, arch)``: small problems of signatures of the same kind, with sizes that
    divide tiles or not as this one's do, on which an interpreter runs a config; None where none can."""
    work: Callable[[S, Config, Any, Any], tuple[LaunchWork, ...]] | None = None
    """``work(signature, config, arch, problem)``: what every launch has to do; None where kernels are only measured."""

    def config(self, signature: S, arch: Any, knobs: Mapping[str, Value]) -> Config:
        """The config of this template that has ``knobs``, and the default of every knob that they leave out.

        Raises:
            TilewrightError: when it is no valid config of ``signature`` on ``arch``, with what the nearest one has.

        """
        own = self.own_space(signature, arch, str(knobs.get("precision", LOSSLESS)))
        try:
            return Config.of(self.name, own[own.index_of(knobs)])
        except TilewrightError as error:
            raise TilewrightError(f"{self.name}, {signature.describe()}, {arch.name}: {error}") from error

    def own_space(self, signature: S, arch: Any, precision: str) -> Space:
        """The space of this template alone, its weights in one precision where it knows several."""
        return self.space(signature, arch, (precision,)) if self.precisions else self.space(signature, arch)
