"""Samplers of Optuna's for enumerated spaces, ours and its own, and where studies are stored."""

from collections.abc import Iterable
from typing import Final, Protocol

from tilewright.codegen.space import Space
from tilewright.errors import TilewrightError
from tilewright.tuner.search.encoding import config_of, distributions_of, params_of, suggest
from tilewright.tuner.search.gaussian_process import GaussianProcessSampler
from tilewright.tuner.search.optuna_samplers import (
    NearestConfigSampler,
    RandomConfigSampler,
    optuna_sampler,
    pinned_tpe,
    sampler_names,
)
from tilewright.tuner.search.sampler import EnumeratedSampler, Prior, SearchExhausted

DEFAULT_SEARCH: Final = "gp"

OPTUNA: Final = "optuna:"
"""Before the name of a sampler of Optuna's."""

__all__ = [
    "DEFAULT_SEARCH",
    "OPTUNA",
    "SEARCHES",
    "EnumeratedSampler",
    "GaussianProcessSampler",
    "NearestConfigSampler",
    "Prior",
    "RandomConfigSampler",
    "SearchExhausted",
    "check_search",
    "config_of",
    "distributions_of",
    "make_sampler",
    "params_of",
    "suggest",
]


class _Maker(Protocol):
    def __call__(self, space: Space, *, seed: int, budget: int, priors: Iterable[Prior]) -> EnumeratedSampler: ...


def _tpe(space: Space, *, seed: int, budget: int, priors: Iterable[Prior]) -> EnumeratedSampler:
    return NearestConfigSampler(space, pinned_tpe(seed), seed=seed, budget=budget, priors=priors)


SEARCHES: Final[dict[str, _Maker]] = {"gp": GaussianProcessSampler, "random": RandomConfigSampler, "tpe": _tpe}
"""Every search by the name that users give it; beside these, ``optuna:`` and the name of a sampler of Optuna's."""


def check_search(name: str) -> None:
    """Raise TilewrightError, with a sentence that lists the choices, when there is no search called ``name``."""
    if name.startswith(OPTUNA):
        optuna_sampler(name.removeprefix(OPTUNA), 0)
    elif name not in SEARCHES:
        raise TilewrightError(
            f"there is no search {name!r}; choose one of {', '.join(SEARCHES)}, or {OPTUNA}NAME for a sampler of "
            f"Optuna's: {', '.join(sampler_names())}"
        )


def make_sampler(name: str, space: Space, *, seed: int, budget: int, priors: Iterable[Prior] = ()) -> EnumeratedSampler:
    """Make the sampler of the search called ``name``.

    Raises:
        TilewrightError: when there is none of that name, or it needs a package that is not installed.

    """
    check_search(name)
    if name.startswith(OPTUNA):
        inner = optuna_sampler(name.removeprefix(OPTUNA), seed)
        return NearestConfigSampler(space, inner, seed=seed, budget=budget, priors=priors)
    return SEARCHES[name](space, seed=seed, budget=budget, priors=priors)
