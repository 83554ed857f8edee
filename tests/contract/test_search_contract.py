"""What every search promises to whoever gives it to Optuna; one that is added to SEARCHES is held to it by itself.

Nothing of the tuning loop is in here: plain Optuna, and a toy space.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from tilewright.codegen.space import Config, Constraint, Parameter, Space
from tilewright.errors import TilewrightError
from tilewright.tuner.search import (
    OPTUNA,
    SEARCHES,
    EnumeratedSampler,
    Prior,
    SearchExhausted,
    check_search,
    config_of,
    distributions_of,
    make_sampler,
    params_of,
    suggest,
)

PARAMETERS = (
    Parameter("tile", (8, 16, 24, 32), "rows of a tile"),
    Parameter("unroll", (None, 1, 2, 4), "copies of the inner loop"),
    Parameter("schedule", ("static", "dynamic", "guided"), "how threads share the work"),
    Parameter("packed", (False, True), "weights are repacked"),
    Parameter("fixed", (64,), "a knob with nothing to choose"),
)
SPACE = Space.enumerate(
    PARAMETERS, [Constraint("fits", lambda c: c["tile"] * (c["unroll"] or 1) <= 32, "", ("tile", "unroll"))]
)
SMALL = Space.enumerate(PARAMETERS[2:])
Result = Callable[[Config], float | None]


def time_of(config: Config) -> float:
    """A smooth bowl with one best config: tile 24, unroll 1, guided, packed."""
    slower = abs(config["tile"] - 24) / 8 + abs((config.get("unroll") or 3) - 1) + 2 * (not config["packed"])
    return 50.0 + 10 * slower + 5 * ("guided", "static", "dynamic").index(config["schedule"])


def new_study(sampler: EnumeratedSampler) -> optuna.Study:
    return optuna.create_study(sampler=sampler)


def ask(study: optuna.Study, space: Space = SPACE) -> tuple[optuna.Trial, Config]:
    trial = study.ask(distributions_of(space.parameters))
    return trial, config_of(space, trial.params)


def tell(study: optuna.Study, trial: optuna.Trial, value: float | None) -> None:
    study.tell(trial, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)


def run(study: optuna.Study, count: int, result: Result = time_of, space: Space = SPACE) -> list[Config]:
    asked = []
    for _ in range(count):
        trial, config = ask(study, space)
        tell(study, trial, result(config))
        asked.append(config)
    return asked


def add(study: optuna.Study, config: Config, value: float | None, space: Space = SPACE) -> None:
    """As a resumed run does with its earlier trials."""
    study.add_trial(
        create_trial(
            state=TrialState.FAIL if value is None else TrialState.COMPLETE,
            value=value,
            params=params_of(space.parameters, config),
            distributions=distributions_of(space.parameters),
        )
    )


class SearchContract:
    """Inherited with a `make` that makes the sampler under test."""

    @staticmethod
    def make(space: Space, **options) -> EnumeratedSampler:
        raise NotImplementedError

    def test_every_config_is_suggested_exactly_once_and_then_it_says_so(self):
        sampler = self.make(SPACE, seed=0, budget=20)
        study = new_study(sampler)
        assert sorted(c.key() for c in run(study, len(SPACE))) == sorted(c.key() for c in SPACE)
        assert sampler.is_exhausted(study)
        with pytest.raises(SearchExhausted, match="all 66 configs of the space were tried"):
            ask(study)

    def test_optimize_suggests_every_config_and_stops_by_itself(self):
        study = new_study(self.make(SMALL, seed=0, budget=20))
        tried = []

        def objective(trial: optuna.Trial) -> float:
            tried.append(suggest(trial, SMALL))
            return 10.0

        study.optimize(objective, n_trials=50)
        assert sorted(c.key() for c in tried) == sorted(c.key() for c in SMALL)
        assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}

    def test_threads_of_optimize_are_given_different_configs(self):
        study = new_study(self.make(SPACE, seed=0, budget=40))
        study.optimize(lambda trial: time_of(suggest(trial, SPACE)), n_trials=40, n_jobs=4)
        done = [trial.params for trial in study.trials if trial.state == TrialState.COMPLETE]
        assert len({tuple(params.items()) for params in done}) == len(done) == 40

    def test_choices_serve_as_well_as_our_distributions(self):
        study = new_study(self.make(SPACE, seed=1, budget=40))
        choices = {p.name: CategoricalDistribution(p.values) for p in PARAMETERS}
        tried = []
        for _ in range(30):
            trial = study.ask(choices)
            tried.append(config_of(SPACE, trial.params))
            study.tell(trial, time_of(tried[-1]))
        assert len(set(tried)) == 30

    def test_equal_seeds_suggest_equally_and_others_do_not(self):
        runs = [run(new_study(self.make(SPACE, seed=seed, budget=25)), 25) for seed in (1, 1, 2)]
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]

    def test_equal_seeds_suggest_equally_with_trials_outstanding(self):
        runs = []
        for _ in range(2):
            study = new_study(self.make(SPACE, seed=3, budget=40))
            tried = run(study, 12)
            outstanding = [ask(study) for _ in range(6)]
            for trial, config in reversed(outstanding):
                tell(study, trial, time_of(config))
            runs.append([*tried, *(config for _, config in outstanding), *run(study, 6)])
        assert runs[0] == runs[1]
        assert len(set(runs[0])) == 24

    def test_everything_may_be_outstanding(self):
        sampler = self.make(SMALL, seed=3, budget=6)
        study = new_study(sampler)
        assert {ask(study, SMALL)[1] for _ in SMALL} == set(SMALL)
        assert sampler.is_exhausted(study)

    def test_failures_alone_do_not_stop_it(self):
        study = new_study(self.make(SPACE, seed=4, budget=30))
        assert len(set(run(study, len(SPACE), lambda _: None))) == len(SPACE)

    def test_failures_among_equal_times_do_not_stop_it(self):
        study = new_study(self.make(SPACE, seed=4, budget=30))
        assert len(set(run(study, 40, lambda c: None if c["packed"] else 7.0))) == 40

    def test_pruned_trials_and_infinite_values_do_not_stop_it(self):
        study = new_study(self.make(SPACE, seed=4, budget=30))
        tried = []
        for number in range(40):
            trial, config = ask(study)
            tried.append(config)
            if number % 3:
                study.tell(trial, float("inf") if number % 3 == 1 else time_of(config))
            else:
                study.tell(trial, state=TrialState.PRUNED)
        assert len(set(tried)) == 40

    @pytest.mark.parametrize("value_of", [lambda c: -time_of(c), lambda c: 60 - time_of(c)], ids=["negative", "both"])
    def test_a_study_may_maximise_any_number(self, value_of):
        study = optuna.create_study(sampler=self.make(SPACE, seed=2, budget=40), direction="maximize")
        assert len(set(run(study, 40, value_of))) == 40

    def test_a_config_that_was_added_is_not_suggested_again(self):
        sampler = self.make(SMALL, seed=5, budget=6)
        study = new_study(sampler)
        add(study, SMALL[2], 10.0, SMALL)
        assert set(run(study, len(SMALL) - 1, lambda _: 20.0, SMALL)) == set(SMALL) - {SMALL[2]}
        assert sampler.is_exhausted(study)

    def test_a_resumed_search_goes_on_where_the_first_was(self):
        tried = run(new_study(self.make(SPACE, seed=6, budget=40)), 25)
        study = new_study(self.make(SPACE, seed=6, budget=40))
        for config in tried:
            add(study, config, time_of(config))
        assert set(run(study, len(SPACE) - 25)) == set(SPACE) - set(tried)

    def test_a_queued_config_comes_first_and_nobody_else_gets_it(self):
        study = new_study(self.make(SPACE, seed=7, budget=40))
        run(study, 12)
        study.enqueue_trial(params_of(SPACE.parameters, SPACE[50]))
        study.enqueue_trial({"tile": 16, "packed": True})
        config = ask(study)[1]
        half = ask(study)[1]
        assert config == SPACE[50]
        assert (half["tile"], half["packed"]) == (16, True)
        assert not {config, half} & set(run(study, 20))

    def test_a_queued_trial_is_not_completed_to_a_config_that_waits_behind_it(self):
        study = new_study(self.make(SMALL, seed=7, budget=6))
        first, behind = (config for config in SMALL if config["schedule"] == "static")
        study.enqueue_trial({"schedule": "static"})
        study.enqueue_trial(params_of(SMALL.parameters, behind))
        assert [ask(study, SMALL)[1] for _ in range(2)] == [first, behind]

    def test_two_processes_on_one_storage_share_the_configs(self, tmp_path):
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal")))
        study = optuna.create_study(sampler=self.make(SMALL, seed=7, budget=6), storage=storage, study_name="s")
        other = optuna.load_study(sampler=self.make(SMALL, seed=7, budget=6), storage=storage, study_name="s")
        tried = [ask(each, SMALL)[1] for _ in range(len(SMALL) // 2) for each in (study, other)]
        assert len(set(tried)) == len(SMALL)

    def test_trials_of_another_space_have_no_influence(self):
        runs = []
        for strangers in (0, 3):
            study = new_study(self.make(SPACE, seed=8, budget=25))
            for number in range(strangers):
                study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"number": number}))
            runs.append(run(study, 20))
        assert runs[0] == runs[1]

    def test_a_second_study_begins_anew(self):
        sampler = self.make(SMALL, seed=9, budget=6)
        assert set(run(new_study(sampler), len(SMALL), lambda _: 3.0, SMALL)) == set(SMALL)
        assert set(run(new_study(sampler), len(SMALL), lambda _: 3.0, SMALL)) == set(SMALL)

    def test_a_pickled_sampler_goes_on_as_the_original_does(self):
        study = new_study(self.make(SPACE, seed=12, budget=40))
        run(study, 15)
        again = pickle.loads(pickle.dumps((study, study.sampler)))[0]
        assert run(study, 10) == run(again, 10)

    def test_several_objectives_are_refused(self):
        study = optuna.create_study(directions=["minimize"] * 2, sampler=self.make(SPACE, seed=0, budget=5))
        with pytest.raises(ValueError, match="minimises one value; the study has 2"):
            ask(study)

    def test_a_parameter_that_the_space_lacks_is_refused(self):
        trial = new_study(self.make(SPACE, seed=0, budget=5)).ask()
        with pytest.raises(ValueError, match=r"no parameter 'tiles'; it has tile, unroll, schedule"):
            trial.suggest_int("tiles", 1, 4)

    def test_the_best_of_each_prior_is_suggested_first(self):
        best_of_each = [SPACE[3], SPACE[9]]
        stranger = Config({"tile": 7})
        priors = [
            Prior("other size", ((SPACE[1], 9.0), (best_of_each[0], 2.0))),
            Prior("other device", ((stranger, 1.0), (best_of_each[1], 70.0), (SPACE[5], 80.0))),
        ]
        asked = run(new_study(self.make(SPACE, seed=10, budget=25, priors=priors)), 8)
        assert set(best_of_each) <= set(asked[:4])
        assert asked[0] == best_of_each[0]
        assert stranger not in asked

    def test_predicted_priors_are_suggested_after_measured_ones(self):
        priors = [
            Prior("model", ((SPACE[1], 1.0), (SPACE[2], 2.0)), timing="predicted"),
            Prior("other size", ((SPACE[3], 9.0), (SPACE[4], 8.0), (SPACE[5], 7.0))),
        ]
        asked = run(new_study(self.make(SPACE, seed=10, budget=25, priors=priors)), 4)
        assert asked[:3] == [SPACE[5], SPACE[4], SPACE[3]]
        assert asked[3] == SPACE[1]

    def test_a_prior_of_one_result_or_of_none_is_welcome(self):
        priors = [Prior("nothing", ()), Prior("one", ((SPACE[4], 3.0),))]
        asked = run(new_study(self.make(SPACE, seed=11, budget=20, priors=priors)), 20)
        assert asked[0] == SPACE[4]
        assert len(set(asked)) == 20

    def test_a_space_of_one_config_is_searched(self):
        one = Space.enumerate([Parameter("tile", (8,), "")])
        sampler = self.make(one, seed=0, budget=10)
        study = new_study(sampler)
        assert run(study, 1, lambda _: 1.0, one) == [Config({"tile": 8})]
        assert sampler.is_exhausted(study)

    def test_it_says_nothing(self, capfd):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        run(new_study(self.make(SPACE, seed=0, budget=20)), 14)
        assert capfd.readouterr() == ("", "")


def contract_of(name: str) -> type[SearchContract]:
    """The contract's tests for one search."""

    def make(space: Space, **options) -> EnumeratedSampler:
        return make_sampler(name, space, **options)

    return type(f"Test_{name.replace(':', '_')}", (SearchContract,), {"make": staticmethod(make)})


def contracts(names: Sequence[str]) -> dict[str, type[SearchContract]]:
    made = [contract_of(name) for name in names]
    return {each.__name__: each for each in made}


globals().update(contracts([*SEARCHES, "optuna:TPESampler", "optuna:NSGAIISampler"]))


@pytest.mark.parametrize("name", ["genetic", "", "TPESampler"])
def test_an_unknown_search_is_refused_with_the_choices(name):
    with pytest.raises(TilewrightError, match=rf"no search '{name}'; choose one of gp, random, tpe, or optuna:NAME"):
        check_search(name)


@pytest.mark.parametrize("name", ["TPE", "BaseSampler", "GridSampler", "PartialFixedSampler", "nsgaii", "logging"])
def test_an_unknown_sampler_of_optunas_is_refused_with_the_choices(name):
    with pytest.raises(TilewrightError, match=rf"no sampler '{name}' .*; choose one of .*TPESampler"):
        check_search(f"{OPTUNA}{name}")


def test_a_sampler_whose_package_is_missing_says_which(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "cmaes" else object())
    with pytest.raises(TilewrightError, match="CmaEsSampler needs cmaes; run: pip install cmaes"):
        check_search(f"{OPTUNA}CmaEsSampler")
