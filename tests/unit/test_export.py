"""Optuna studies in a file: complete, or not there at all."""

import contextlib
import resource

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from tilewright.errors import TilewrightError
from tilewright.tuner.search.export import export_studies

DISTRIBUTIONS = {"tile": CategoricalDistribution((None, 8, 16)), "order": CategoricalDistribution(("ij", "ji"))}


def new_study(name="run"):
    study = optuna.create_study(study_name=name)
    study.set_user_attr("problem", {"tokens": 4})
    states = {TrialState.COMPLETE: 12.5, TrialState.FAIL: None}
    for (state, value), tile in zip(states.items(), (None, 16), strict=True):
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params={"tile": tile, "order": "ji"},
                distributions=DISTRIBUTIONS,
                user_attrs={"outcome": "ok" if value else "wrong", "error": None},
            )
        )
    return study


def test_an_export_opens_in_optuna_with_everything_in_it(tmp_path):
    path = tmp_path / "runs.log"
    studies = [new_study("first"), new_study("second")]
    export_studies(studies, path)
    storage = JournalStorage(JournalFileBackend(str(path)))
    assert sorted(optuna.get_all_study_names(storage)) == ["first", "second"]
    loaded = optuna.load_study(study_name="second", storage=storage)
    original = studies[1]
    assert loaded.user_attrs == original.user_attrs
    assert [(t.state, t.value, t.params, t.user_attrs) for t in loaded.trials] == [
        (t.state, t.value, t.params, t.user_attrs) for t in original.trials
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_never_touches_an_existing_file(tmp_path):
    path = tmp_path / "tuning.db"
    path.write_bytes(b"precious")
    with pytest.raises(TilewrightError, match=r"tuning\.db: it exists already"):
        export_studies([new_study()], path)
    assert path.read_bytes() == b"precious"


@contextlib.contextmanager
def file_limit(size):
    """Let this process write no file beyond a number of bytes, as a full disk would.

    No longer than needed: pytest reports each test to a file that may be larger.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.1, 0.99])
def test_an_export_that_runs_out_of_room_leaves_nothing_behind(tmp_path, share):
    complete = tmp_path / "complete.log"
    export_studies([new_study()], complete)
    refused = pytest.raises(TilewrightError, match=r"Cannot export to .*runs\.log: a file may not grow so large")
    with file_limit(int(share * complete.stat().st_size)), refused:
        export_studies([new_study()], tmp_path / "runs.log")
    assert list(tmp_path.iterdir()) == [complete]


@pytest.mark.parametrize(
    ("names", "file", "message"),
    [
        ([], "runs.log", "give at least one"),
        (["a", "a"], "runs.log", "each with its own name"),
        (["a"], "missing/runs.log", "No such file or directory"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_sentence(tmp_path, names, file, message):
    with pytest.raises(TilewrightError, match=message):
        export_studies([new_study(name) for name in names], tmp_path / file)
    assert list(tmp_path.iterdir()) == []
