"""Searches over an enumerated space, and the Optuna study around them."""

from collections.abc import Iterable
from typing import Final

from tilewright.codegen.space import Space
from tilewright.errors import TilewrightError
from tilewright.tuner.search.base import EnumeratedSearch, Prior, Search, SearchExhausted
from tilewright.tuner.search.export import export_studies
from tilewright.tuner.search.gaussian_process import GaussianProcessSearch
from tilewright.tuner.search.random_search import RandomSearch
from tilewright.tuner.search.study import ToldTrial, TuningStudy
from tilewright.tuner.search.tpe import TpeSearch

SEARCHES: Final[dict[str, type[EnumeratedSearch]]] = {
    "gp": GaussianProcessSearch,
    "random": RandomSearch,
    "tpe": TpeSearch,
}
"""Every search by the name that users give it; the first is the default."""

DEFAULT_SEARCH: Final = "gp"

__all__ = [
    "DEFAULT_SEARCH",
    "SEARCHES",
    "Prior",
    "Search",
    "SearchExhausted",
    "ToldTrial",
    "TuningStudy",
    "export_studies",
    "make_search",
]


def make_search(name: str, space: Space, *, seed: int, budget: int, priors: Iterable[Prior] = ()) -> Search:
    """Make the search called `name`; raises TilewrightError when there is none of that name."""
    if name not in SEARCHES:
        raise TilewrightError(f"There is no search called {name!r}; choose one of {', '.join(SEARCHES)}.")
    return SEARCHES[name](space, seed=seed, budget=budget, priors=priors)
