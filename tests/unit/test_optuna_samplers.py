"""Configs as Optuna's parameters, and Optuna's own samplers over an enumerated space."""

from __future__ import annotations

from collections import Counter
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from tilewright.codegen.space import Config, Constraint, Parameter, Space
from tilewright.errors import TilewrightError
from tilewright.tuner.search import (
    NearestConfigSampler,
    RandomConfigSampler,
    config_of,
    distributions_of,
    make_sampler,
    params_of,
    suggest,
)
from tilewright.tuner.search.encoding import distribution_of
from tilewright.tuner.search.optuna_samplers import sampler_names

SPACE = Space.enumerate(
    [
        Parameter("tile", (8, 16, 32, 64), ""),
        Parameter("rate", (0.25, 0.5, 1.0), ""),
        Parameter("order", ("ij", "ji", "blocked"), ""),
        Parameter("streams", (None, 1, 2, 4), ""),
        Parameter("one", (3,), ""),
    ],
    [Constraint("small", lambda c: c["tile"] * (c["streams"] or 1) <= 64, "", ("tile", "streams"))],
)


class Proposes(BaseSampler):
    """Proposes the same every time."""

    def __init__(self, **params: Any) -> None:
        self.params = params

    def infer_relative_search_space(self, *_: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, *_: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, _study: Any, _trial: FrozenTrial, name: str, _distribution: BaseDistribution) -> Any:
        return self.params[name]


def first_tried(count: int, **params: Any) -> list[Config]:
    study = optuna.create_study(sampler=NearestConfigSampler(SPACE, Proposes(**params), seed=0))
    tried = []
    for _ in range(count):
        trial = study.ask(distributions_of(SPACE.parameters))
        tried.append(config_of(SPACE, trial.params))
        study.tell(trial, 1.0)
    return tried


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((8, 16, 32, 64), IntDistribution(8, 64, log=True)),
        ((8, 16, 24), IntDistribution(8, 24, step=8)),
        ((0, 4, 6), IntDistribution(0, 6, step=2)),
        ((3,), IntDistribution(3, 3)),
        ((0.5, 1, 1.5), CategoricalDistribution((0.5, 1, 1.5))),
        ((False, True), CategoricalDistribution((False, True))),
        ((None, 1, 2), CategoricalDistribution((None, 1, 2))),
        (("ij", "ji"), CategoricalDistribution(("ij", "ji"))),
    ],
)
def test_numbers_are_ranges_and_everything_else_is_a_choice(
    values: tuple[Any, ...], expected: BaseDistribution
) -> None:
    assert distribution_of(values) == expected


def test_every_config_comes_back_from_its_parameters() -> None:
    assert all(config_of(SPACE, params_of(SPACE.parameters, config)) == config for config in SPACE)


def test_distributions_can_hold_a_config_from_outside_of_the_space() -> None:
    outside = {**SPACE[0], "tile": 128, "order": "spiral"}
    found = distributions_of(SPACE.parameters, [outside])
    assert found["tile"] == IntDistribution(8, 128, log=True)
    assert found["order"] == CategoricalDistribution(("ij", "ji", "blocked", "spiral"))


@pytest.mark.parametrize("change", [{"tile": 64, "streams": 4}, {"tile": 10}, {"order": None}])
def test_parameters_that_are_no_config_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TilewrightError, match="are no config of the space; suggest every parameter"):
        config_of(SPACE, {**params_of(SPACE.parameters, SPACE[0]), **change})
    with pytest.raises(TilewrightError, match="are no config of the space"):
        config_of(SPACE, {"tile": 8})


def test_a_valid_proposal_is_taken_as_it_is() -> None:
    wanted = {"tile": 32, "rate": 0.5, "order": "ji", "streams": 2, "one": 3}
    assert first_tried(1, **wanted) == [Config(wanted)]


def test_a_proposal_between_two_values_becomes_the_nearer_one() -> None:
    (below,) = first_tried(1, tile=45, rate=0.5, order="ij", streams=None)
    (above,) = first_tried(1, tile=46, rate=0.5, order="ij", streams=None)
    assert (below["tile"], above["tile"]) == (32, 64)  # in octaves, of which 45.25 is the middle


def test_an_invalid_or_repeated_proposal_becomes_the_config_that_differs_least() -> None:
    wanted = {"tile": 64, "rate": 1.0, "order": "blocked", "streams": 2, "one": 3}
    assert Config(wanted) not in SPACE
    tried = first_tried(4, **wanted)
    assert tried[0] == Config({**wanted, "tile": 32})
    # Then a step of the rate and one of the tile, or one step of the streams: half of their range each.
    ranks = {"tile": (8, 16, 32, 64), "rate": (0.25, 0.5, 1.0), "streams": (1, 2, 4)}

    def distance(config: Config) -> float:
        steps = 0.0
        for name, values in ranks.items():
            known = config.get(name) in values
            steps += abs(values.index(config[name]) - values.index(wanted[name])) / (len(values) - 1) if known else 1
        return steps + (config["order"] != wanted["order"])

    assert [distance(config) for config in tried] == sorted(distance(config) for config in SPACE)[:4]


def test_every_config_is_as_likely_to_be_drawn_at_random() -> None:
    small = Space.enumerate(SPACE.parameters[1:3])
    first: Counter[Config] = Counter()
    for seed in range(450):
        study = optuna.create_study(sampler=RandomConfigSampler(small, seed=seed))
        first[suggest(study.ask(), small)] += 1
    assert len(first) == 9
    assert max(abs(count - 50) for count in first.values()) < 27  # four standard deviations


@pytest.mark.parametrize("name", [name for name in sampler_names() if name != "CmaEsSampler"])
def test_every_sampler_of_optunas_searches_valid_configs_without_a_word(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=make_sampler(f"optuna:{name}", SPACE, seed=0, budget=11))
    study.optimize(lambda trial: float(suggest(trial, SPACE)["tile"]), n_trials=11)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 11
    assert capfd.readouterr() == ("", "")
