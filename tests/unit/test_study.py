"""The Optuna study around a search: mirrored trials, rebuilding."""

from optuna.trial import TrialState

from tilewright.codegen.space import Config, Parameter, Space
from tilewright.tuner.search import ToldTrial, TuningStudy, make_search

SPACE = Space.enumerate([Parameter("tile", (8, 16, 32), ""), Parameter("order", ("ij", "ji", None), "")])


def new_study(name="run"):
    return TuningStudy(SPACE, make_search("random", SPACE, seed=0, budget=9), name=name, problem="tokens=4")


def tried_study(name="run"):
    """One success, one failure, one trial in flight and one that was told without having been asked for."""
    study = new_study(name)
    configs = [study.ask() for _ in range(3)]
    study.tell(configs[0], 12.5)
    study.tell(configs[1], None, outcome="wrong")
    default = next(c for c in SPACE if c not in configs)
    study.tell(default, 20.0)
    return study, [*configs, default]


def test_trials_are_mirrored_with_their_outcome_and_problem():
    study, configs = tried_study()
    trials = study.study.trials
    assert [t.params for t in trials] == [dict(c) for c in configs]
    assert [t.state for t in trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.RUNNING,
        TrialState.COMPLETE,
    ]
    assert [t.value for t in trials] == [12.5, None, None, 20.0]
    assert [t.user_attrs.get("outcome") for t in trials] == ["ok", "wrong", None, "ok"]
    assert trials[0].user_attrs["problem"] == study.study.user_attrs["problem"] == "tokens=4"


def test_a_config_outside_of_the_space_is_kept_as_text():
    study = new_study()
    stranger = Config({"tile": 1024, "order": "ij"})
    study.tell(stranger, 9.0)
    (trial,) = study.study.trials
    assert trial.params == {}
    assert trial.user_attrs["config"] == stranger.key()
    assert trial.value == 9.0


def test_a_rebuilt_study_goes_on_where_the_first_one_was():
    trials = [ToldTrial(SPACE[0], 5.0, "ok"), ToldTrial(SPACE[4], None, "crashed"), ToldTrial(SPACE[7], 4.0, "ok")]
    study = new_study()
    study.rebuild(trials)
    assert [t.user_attrs["outcome"] for t in study.study.trials] == ["ok", "crashed", "ok"]
    assert study.study.best_value == 4.0
    assert {study.ask() for _ in range(6)} == set(SPACE) - {t.config for t in trials}


def test_optuna_says_nothing(capfd):
    study, _ = tried_study()
    study.ask()
    assert capfd.readouterr() == ("", "")
