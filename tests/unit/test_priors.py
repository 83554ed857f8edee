"""What a search is told of beforehand: measured results before predicted ones, each marked for what it is."""

from pathlib import Path
from typing import Any, cast

import pytest
from tuning_db_samples import DEVICE, trial

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Config, Parameter, Space
from tilewright.tuner.campaign.priors import PRIOR_CONFIGS, stored_priors
from tilewright.tuner.search import Prior
from tilewright.tuning_db.records import Timing
from tilewright.tuning_db.store import Store

OP = find_op("moe_gemm")
PROBLEM = OP.problem(MoeGemmSignature(stage="plain", experts=4, n=64, k=64), 16, RoutingSpec.parse("balanced"))
SPACE = Space.enumerate([Parameter("knob", tuple(range(20)), "")])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(f"sqlite:///{tmp_path}/tuning.db")
    store.put_device(DEVICE)
    run = store.start_run("tune", versions={}, host="here").id

    def tried(problem_key: str, timing: Timing, knob: int, time_us: float) -> Any:
        changes: dict[str, Any] = {"samples_us": ()} if timing == "predicted" else {}
        return trial(run, problem_key=problem_key, timing=timing, config={"knob": knob}, median_us=time_us, **changes)

    store.add_trials(
        [
            tried(PROBLEM.key, "measured", 1, 30.0),
            *(tried(PROBLEM.key, "predicted", knob, 20.0 + knob) for knob in range(20)),
            tried("other", "predicted", 5, 7.0),
            tried("other", "measured", 2, 9.0),
            tried("another", "measured", 3, 8.0),
        ]
    )
    return store


def told(store: Store, timing: Timing, seen: set[str] = set()) -> list[Prior]:  # noqa: B006  (never changed)
    return list(stored_priors(store, PROBLEM, SPACE, timing, device_key=DEVICE.key, seen=seen))


def test_a_search_that_measures_is_told_of_predictions_last_and_as_such(store: Store) -> None:
    priors = told(store, "measured")
    assert [prior.timing for prior in priors] == ["measured", "measured", "predicted", "predicted"]
    assert {prior.source for prior in priors[:2]} == {"another", "other"}
    assert [prior.source for prior in priors[2:]] == [f"{PROBLEM.key} (predicted)", "other (predicted)"]
    assert priors[-1].results == ((Config({"knob": 5}), 7.0),)


def test_the_best_predictions_of_the_same_problem_are_among_them(store: Store) -> None:
    (own,) = [prior for prior in told(store, "measured") if prior.source.startswith(PROBLEM.key)]
    assert own.results == tuple((Config({"knob": knob}), 20.0 + knob) for knob in range(PRIOR_CONFIGS))


def test_a_search_that_predicts_is_not_told_of_its_own_problem(store: Store) -> None:
    assert not [prior for prior in told(store, "predicted") if prior.source.startswith(PROBLEM.key)]


def test_what_this_run_knows_already_is_not_told_again(store: Store) -> None:
    assert {cast("Prior", prior).source for prior in told(store, "measured", {"other"})} == {
        "another",
        f"{PROBLEM.key} (predicted)",
    }
