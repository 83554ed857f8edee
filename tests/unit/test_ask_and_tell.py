"""What the loop asks of Optuna and tells it: first configs, states, attributes, earlier trials, interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from patience import wait_until

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.hardware.archs import ARCHS
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.loop import Budget, Origin, ProblemTuner
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.variants import BuildResult, VariantBuilder
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.search.storage import open_storage
from tilewright.tuning_db.records import DeviceRecord, Outcome
from tilewright.tuning_db.store import Store

OP = find_op("moe_gemm")
ARCH = ARCHS["x86_64_avx2"]
SIGNATURE = MoeGemmSignature(stage="plain", experts=4, n=64, k=64)
PROBLEM = OP.problem(SIGNATURE, 8, RoutingSpec.parse("balanced"))
SPACE = OP.space(SIGNATURE, ARCH)
DEFAULT = OP.default_for(PROBLEM, ARCH)
STARTS = [config for config in OP.starting_configs(SIGNATURE, ARCH, ["fp32"]) if config in SPACE]
ENDINGS = (Outcome.OK, Outcome.WRONG, Outcome.CRASHED, Outcome.OK, Outcome.TIMED_OUT, Outcome.OK, Outcome.OK)


class Unbuilt(VariantBuilder):
    """Renders, but compiles nothing; of the configs from the tenth on, one fails to build and one is rejected."""

    def __init__(self, folder: Path) -> None:
        super().__init__(OP, SIGNATURE, ARCH, {"cpp": CppBuilder(ARCH, Compiler("no-compiler", "none"), folder)})
        self.built: list[Config] = []

    def build(self, configs: Sequence[Config], progress: object = None) -> list[BuildResult]:
        del progress
        results = []
        for config in configs:
            place = self.built.index(config) if config in self.built else len(self.built)
            self.built += [config] * (place == len(self.built))
            path = None if place in {10, 11} else Path("never-loaded")
            results.append(
                BuildResult(self.variant(config), path, "no such thing" * (path is None), 0.1, (), place == 11)
            )
        return results


class Endings:
    """An evaluator of kernels that end in every way."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.in_second_batch: Callable[[], None] = lambda: None

    def evaluate(self, kernels: Sequence[BuiltKernel], *_: Any, **__: Any) -> list[Evaluation]:
        if self.seen:
            self.in_second_batch()
        return [self._ending(kernel.key) for kernel in kernels]

    def _ending(self, key: str) -> Evaluation:
        place = self.seen.setdefault(key, len(self.seen))
        outcome = ENDINGS[place % len(ENDINGS)]
        if outcome is not Outcome.OK:
            return Evaluation(key, outcome, f"it was {outcome}", 0.5 if outcome is Outcome.WRONG else None)
        time_us = 100.0 - place
        return Evaluation(key, outcome, "", 1e-7, (time_us,) * 8, median_us=time_us, low_us=90.0, high_us=101.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "t.db") as opened:
        yield opened


class Tuned:
    """A problem's tuner with all that it works with."""

    def __init__(
        self, store: Store, folder: Path, study: str = "", search: str = "random", *, beside: bool = False
    ) -> None:
        device = DeviceRecord("a-cpu", "a CPU", ARCH.name, {})
        store.put_device(device)
        self.store = store
        self.run = store.start_run("tune", versions={}, host="here").id
        self.builder = Unbuilt(folder)
        self.evaluator = Endings()
        self.tuner = ProblemTuner(
            PROBLEM,
            variant_builder=self.builder,
            evaluator=cast("Evaluator", self.evaluator),
            store=store,
            origin=Origin(self.run, device.key, 2, 5, search, study),
            progress=Progress(None),
            beside=beside,
        )

    def search(self, trials: int, templates: Sequence[str] = ()) -> optuna.Study:
        space = SPACE.of_templates(templates) if templates else SPACE
        self.tuner.search(space, Budget(trials, time.monotonic() + 600), [])
        study = self.tuner._study
        assert study is not None
        return study


@pytest.mark.parametrize("search", ["gp", "random", "optuna:TPESampler"])
def test_the_default_and_the_starting_configs_come_first_and_nothing_twice(store, tmp_path, search):
    tuned = Tuned(store, tmp_path, search=search)
    study = tuned.search(20)
    first = list(dict.fromkeys([DEFAULT, *STARTS]))
    assert len(first) > 2
    assert tuned.builder.built[: len(first)] == first
    assert len(tuned.builder.built) == len(set(tuned.builder.built)) == len(study.trials) == 20
    assert [trial.config for trial in store.trials()] == [dict(config) for config in tuned.builder.built]


def test_trials_end_in_optuna_as_they_do_in_the_database(store, tmp_path):
    tuned = Tuned(store, tmp_path)
    study = tuned.search(16)
    ours = store.trials()
    of_optuna = {Outcome.OK: TrialState.COMPLETE, Outcome.REJECTED: TrialState.PRUNED}
    assert {*ENDINGS, Outcome.BUILD_FAILED, Outcome.REJECTED} == {trial.outcome for trial in ours}
    for mine, his, told in zip(ours, study.trials, tuned.tuner.result.told, strict=True):
        assert his.state is of_optuna.get(mine.outcome, TrialState.FAIL)
        assert his.value == told.time_us
        assert {name: value for name, value in his.params.items() if value is not None} == {
            name: value for name, value in mine.config.items() if value is not None
        }
        attributes = his.user_attrs
        assert (attributes["outcome"], attributes["kernel"]) == (mine.outcome.value, mine.kernel_key)
        assert (attributes["run"], attributes["error"]) == (tuned.run, mine.error)
        assert attributes["message"] == mine.message
        assert his.constraints == {}  # nothing was read from a binary
    assert study.best_value == min(c.time_us for c in tuned.tuner.result.candidates.values())
    assert study.user_attrs["problem"] == PROBLEM.to_dict()


def test_a_default_whose_template_is_not_searched_is_a_trial_too(store, tmp_path):
    (other,) = {config["template"] for config in SPACE} - {DEFAULT["template"]}
    tuned = Tuned(store, tmp_path)
    study = tuned.search(12, [other])
    assert tuned.builder.built[0] == DEFAULT
    assert {config["template"] for config in tuned.builder.built[1:]} == {other}
    assert [trial.params["template"] for trial in study.trials] == [c["template"] for c in tuned.builder.built]


def test_a_second_search_goes_on_in_the_same_study_within_its_own_space(store, tmp_path):
    tuned = Tuned(store, tmp_path)
    first = tuned.search(9)
    study = tuned.search(18, [DEFAULT["template"]])
    assert study is first
    assert len(study.trials) == 18
    assert {config["template"] for config in tuned.builder.built[9:]} == {DEFAULT["template"]}
    assert len(set(tuned.builder.built)) == 18


def test_earlier_trials_are_added_and_not_tried_again(store, tmp_path):
    Tuned(store, tmp_path).search(16)
    earlier = store.trials()
    again = Tuned(store, tmp_path)
    again.tuner.replay(earlier)
    study = again.search(24)
    assert len(study.trials) == 24
    assert [t.user_attrs["run"] == again.run for t in study.trials] == [False] * 16 + [True] * 8
    assert [t.user_attrs["kernel"] for t in study.trials[:16]] == [t.kernel_key for t in earlier]
    assert [t.value for t in study.trials[:16]] == [told.time_us for told in again.tuner.result.told[:16]]
    tried = [trial.config for trial in store.trials()]
    assert len({Config(config) for config in tried}) == len(tried) == 24


def test_a_watched_study_holds_every_trial_and_takes_wishes(store, tmp_path):
    journal = tmp_path / "studies.log"
    tuned = Tuned(store, tmp_path, study=f"journal://{journal}")
    tuned.search(9)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    assert tuned.run[:8] in name
    assert "rows=8 threads=2" in name
    watching = optuna.load_study(study_name=name, storage=storage)
    assert [t.user_attrs["kernel"] for t in watching.trials] == [t.kernel_key for t in store.trials()]
    wish = next(config for config in SPACE if config not in tuned.builder.built)
    watching.enqueue_trial({name: wish.get(name) for name in watching.trials[0].params})
    watching.enqueue_trial({"template": wish["template"], "vectors": 1})
    tuned.search(12)
    assert tuned.builder.built[9] == wish
    assert (tuned.builder.built[10]["template"], tuned.builder.built[10]["vectors"]) == (wish["template"], 1)
    assert len(store.trials()) == 12
    open_storage.cache_clear()


def test_an_interrupted_batch_does_not_stay_running(store, tmp_path):
    tuned = Tuned(store, tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    tuned.evaluator.in_second_batch = interrupt
    with pytest.raises(KeyboardInterrupt):
        tuned.search(24)
    study = tuned.tuner._study
    assert study is not None
    assert [t.state for t in study.trials[8:]] == [TrialState.FAIL] * 8
    assert len(store.trials()) == 8


def test_where_compilers_disturb_no_races_the_next_batch_is_built_while_one_is_raced(store, tmp_path):
    tuned = Tuned(store, tmp_path, beside=True)
    ahead: list[int] = []

    def notice() -> None:
        wait_until(lambda: len(tuned.builder.built) == 20, "nothing was built beside the race")
        ahead.append(len(tuned.builder.built) - len(store.trials()))

    tuned.evaluator.in_second_batch = notice
    study = tuned.search(20)
    assert ahead == [12, 4], "in its race the second batch has the last four built behind it"
    assert len(tuned.builder.built) == len(set(tuned.builder.built)) == len(study.trials) == len(store.trials()) == 20


def test_an_interruption_gives_up_what_was_built_ahead_as_well(store, tmp_path):
    tuned = Tuned(store, tmp_path, beside=True)

    def interrupt() -> None:
        raise KeyboardInterrupt

    tuned.evaluator.in_second_batch = interrupt
    with pytest.raises(KeyboardInterrupt):
        tuned.search(24)
    study = tuned.tuner._study
    assert study is not None
    assert [t.state for t in study.trials[8:]] == [TrialState.FAIL] * 16


def test_a_storage_that_fails_is_a_sentence_and_loses_nothing_of_ours(store, tmp_path):
    journal = tmp_path / "studies.log"
    tuned = Tuned(store, tmp_path, study=str(journal))

    def fail() -> None:
        journal.unlink()
        journal.mkdir()

    tuned.evaluator.in_second_batch = fail
    with pytest.raises(TilewrightError, match=r"--study .*studies\.log took no more trials .*--resume"):
        tuned.search(24)
    assert len(store.trials()) == 16
    open_storage.cache_clear()
