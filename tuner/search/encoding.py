"""Configs as parameters of Optuna trials, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from tilewright.codegen.space import Config, Parameter, Space
from tilewright.errors import TilewrightError

WIDE_RANGE = 4
"""Largest over smallest value from which on a number counts in octaves and not in steps."""

Params = dict[str, Any]


def distribution_of(values: Sequence[Any]) -> BaseDistribution:
    """Optuna's distribution over a knob's values: a range of whole numbers, whose order samplers know, or a choice.

    A range may hold numbers between the values; samplers of enumerated spaces never suggest those.
    """
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return CategoricalDistribution(values)
    low, high = min(values), max(values)
    log = low > 0 and high / low >= WIDE_RANGE
    step = 1 if log else reduce(math.gcd, (v - low for v in values)) or 1
    return IntDistribution(low, high, log=log, step=step)


def distributions_of(
    parameters: Iterable[Parameter], also: Iterable[Mapping[str, Any]] = ()
) -> dict[str, BaseDistribution]:
    """What to give ``study.ask``: a distribution per parameter of a space; it holds the values of configs ``also``."""
    others = list(also)
    values = {p.name: dict.fromkeys([*p.values, *(config.get(p.name) for config in others)]) for p in parameters}
    return {name: distribution_of(list(found)) for name, found in values.items()}


def suggest(trial: optuna.Trial, space: Space) -> Config:
    """Let ``trial``'s study, whose sampler is one of ``space``, suggest every parameter, and return the config.

    Raises:
        TilewrightError: when what the sampler suggests is no config of ``space``.

    """
    for name, distribution in distributions_of(space.parameters).items():
        match distribution:
            case IntDistribution(low=low, high=high, log=log, step=step):
                trial.suggest_int(name, low, high, log=log, step=step)
            case CategoricalDistribution(choices=choices):
                trial.suggest_categorical(name, choices)
    return config_of(space, trial.params)


def config_of(space: Space, params: Mapping[str, Any]) -> Config:
    """Return the config that a trial's ``params`` are.

    Raises:
        TilewrightError: when they are no config of ``space``.

    """
    row = row_index(space).find(params)
    if row is None:
        raise TilewrightError(
            f"the parameters {dict(params)} are no config of the space; "
            "suggest every parameter, in a study whose sampler is one of that space"
        )
    return space[row]


def params_of(parameters: Iterable[Parameter], config: Mapping[str, Any]) -> Params:
    """Return a config as the parameters of a trial; a knob that its template does not have is None."""
    return {p.name: config.get(p.name) for p in parameters}


class RowIndex:
    """Finds the row of an enumerated space that a trial's parameters are."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._rows = {row.tobytes(): index for index, row in enumerate(np.ascontiguousarray(space.indices))}
        self._buffer_type = space.indices.dtype
        self._found: dict[tuple[tuple[str, Any], ...], int | None] = {}

    def find(self, params: Mapping[str, Any]) -> int | None:
        """Which row it is; None when a parameter is missing or none of its values, or the row is not valid."""
        # Samplers ask for all trials of a study at each new one.
        key = tuple(params.items())
        if key not in self._found:
            self._found[key] = self._find(params)
        return self._found[key]

    def _find(self, params: Mapping[str, Any]) -> int | None:
        indices = []
        for parameter in self._space.parameters:
            index = parameter.position.get(params[parameter.name]) if parameter.name in params else None
            if index is None:
                return None
            indices.append(index)
        return self.find_indices(indices)

    def find_indices(self, indices: Sequence[int]) -> int | None:
        """Which row has these indices of values, in the order of the space's parameters; None when none has."""
        return self._rows.get(np.array(indices, dtype=self._buffer_type).tobytes())

    def params(self, row: int) -> Params:
        """Return a row as the parameters of a trial."""
        indices = self._space.indices[row].tolist()
        return {p.name: p.values[i] for p, i in zip(self._space.parameters, indices, strict=True)}


@lru_cache(maxsize=4)
def row_index(space: Space) -> RowIndex:
    """The index of a space, which is worth keeping: a large one takes a tenth of a second to make."""
    return RowIndex(space)
