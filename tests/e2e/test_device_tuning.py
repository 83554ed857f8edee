"""``tune`` and ``tune measure`` where a device is there: the executing driver, whose clock says the times.

What this shows is how prepared kernels become measured plans; no binary runs, and no time is one of a device. So the
device has a name that no product has, and nothing here can be taken for a product's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from executing import ExecutingDriver, executing
from executing_emulator import Costed
from patience import PATIENCE_S

from tilewright.codegen.backends.base import Build, Source
from tilewright.codegen.backends.triton.builder import TritonBuilder
from tilewright.codegen.backends.triton.entry import triton_entries
from tilewright.codegen.hardware.devices import device_key
from tilewright.tuner.cli import main
from tilewright.tuner.evaluation.device.evaluator import DeviceEvaluator
from tilewright.tuning_db.records import Outcome, PlanRecord
from tilewright.tuning_db.store import Store

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow  # a dozen kernels are compiled, and the emulator is started

PROBLEM = "experts=8,top_k=2"
TOKENS = (33,)
WORDS = ["--arch", "sm_90", "--op", "gating", "--problem", PROBLEM, "--tokens", ",".join(map(str, TOKENS))]
MEMORY_BYTES, SM_COUNT = 64 << 20, 3
CALL_US = 300.0
"""So long that a block of calls is one call on each set of inputs."""
PRODUCT, STAND_IN = "h100-sxm", device_key("stand-in of sm_90", (9, 0), SM_COUNT, MEMORY_BYTES)
Tune = Callable[..., tuple[int, str, str]]


@contextmanager
def known_when_built(driver: ExecutingDriver) -> Iterator[None]:
    """Tell the driver the source of every cubin that is built meanwhile."""
    build_all = TritonBuilder.build_all

    def build_and_tell(self: TritonBuilder, sources: Sequence[Source], **told: Any) -> list[Build]:
        builds = build_all(self, sources, **told)
        for source, build in zip(sources, builds, strict=True):
            entries = triton_entries(source.entries)
            for file, entry in zip(build.files, entries, strict=True):
                driver.know(file.path.read_bytes(), source.text, entries)
                driver.costs[entry.entry] = _cost_us
        return builds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBuilder, "build_all", build_and_tell)
        yield


def _cost_us(launch: Costed) -> float:
    """Of a launch: the more warps, the longer."""
    return CALL_US * (1 + 0.1 * launch.entry.num_warps)


@pytest.fixture(scope="module")
def driver() -> Iterator[ExecutingDriver]:
    with (
        executing(("sm_90",), sm_count=SM_COUNT, memory_bytes=MEMORY_BYTES, l2_bytes=512) as made,
        known_when_built(made),
        pytest.MonkeyPatch.context() as patch,
    ):
        limits = DeviceEvaluator.__init__.__kwdefaults__
        assert limits is not None
        patch.setitem(limits, "time_limit_s", PATIENCE_S)  # the emulator takes what a busy machine leaves it
        yield made


def run(database: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command on ``database``."""
    said = {name: database.with_suffix(f".{name}").open("w+") for name in ("stdout", "stderr")}
    with pytest.MonkeyPatch.context() as patch:
        for name, file in said.items():
            patch.setattr(sys, name, file)
        code = main([*words, "--db", str(database)])
    for file in said.values():
        file.close()
    stdout, stderr = (database.with_suffix(f".{name}").read_text() for name in ("stdout", "stderr"))
    return code, stdout, stderr


@pytest.fixture(scope="module")
def prepared(driver: ExecutingDriver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with predicted plans, as any machine makes it."""
    folder = tmp_path_factory.mktemp("prepared")
    folder.chmod(0o700)
    database = folder / "tuning.db"
    launched = len(driver.executed)
    code, _, stderr = run(database, *WORDS, "--predict", "--trials", "3", "--probes", "0", "--json")
    assert code == 0, stderr
    assert len(driver.executed) == launched, "--predict launches nothing"
    return database


@pytest.fixture(scope="module")
def measured(prepared: Path) -> tuple[Path, dict[str, Any], str]:
    """The database after ``tune measure``, which had neither Triton nor a compiler; its document, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)  # importing it fails
        patch.setenv("CXX", "/bin/false")
        code, stdout, stderr = run(prepared, "measure", "--top", "2", "--json")
    assert code == 0, stderr
    return prepared, json.loads(stdout), stderr


def plans(database: Path) -> dict[tuple[str, str], PlanRecord]:
    """By device and timing."""
    with Store.open_read_only(database) as store:
        return {(plan.device_key, plan.timing): plan for plan in store.plans()}


def test_measured_plans_stand_beside_the_predicted_ones(measured: tuple[Path, dict[str, Any], str]) -> None:
    database, document, stderr = measured
    assert "measuring on stand-in of sm_90 (sm_90)" in stderr
    assert (document["device"], document["device_name"]) == (STAND_IN, "stand-in of sm_90")
    found = plans(database)
    assert set(found) == {(PRODUCT, "predicted"), (STAND_IN, "measured")}
    plan = found[STAND_IN, "measured"]
    assert plan.checked == "device"
    assert plan.facts["timed"] == {"methods": ["graph replay"], "drivers": ["13.0"], "throttled": []}
    with Store.open_read_only(database) as store:
        served = [kernel for kernel in store.kernels() if kernel.key in {entry.kernel_key for entry in plan.entries}]
        assert served
        assert {kernel.checked for kernel in served} == {"device"}
        assert store.check() == []


def test_every_race_is_stored_with_its_conditions(measured: tuple[Path, dict[str, Any], str]) -> None:
    with Store.open_read_only(measured[0]) as store:
        trials = store.trials(device_key=STAND_IN)
    assert {trial.timing for trial in trials} == {"measured"}
    assert all(trial.outcome is Outcome.OK and trial.samples_us for trial in trials)
    expected = {"method": "graph replay", "driver": "13.0", "throttled": [], "repeats": 0}
    assert all(trial.conditions == expected for trial in trials)


def test_it_says_how_good_the_prediction_was(measured: tuple[Path, dict[str, Any], str]) -> None:
    database, document, _ = measured
    (signature,) = document["signatures"]
    told = {each["size"]: each for each in signature["prediction"]}
    assert set(TOKENS) <= set(told)
    with Store.open_read_only(database) as store:
        for size in TOKENS:
            trials = [trial for trial in store.trials() if trial.problem["tokens"] == size]
            times = {
                key: {t.kernel_key: t.median_us for t in trials if t.timing == key} for key in ("predicted", "measured")
            }
            both = set(times["predicted"]) & set(times["measured"])
            assert told[size]["kernels"] == len(both) > 1
            first = min(both, key=lambda key: times["predicted"][key] or math.inf)
            best = min(times["measured"][key] or math.inf for key in both)
            assert told[size]["regret"] == pytest.approx((times["measured"][first] or math.inf) / best - 1, abs=0.02)
    assert plans(database)[STAND_IN, "measured"].facts["prediction"] == [
        {"size": each["size"], "kernels": each["kernels"], "regret": each["regret"], "rank": each["rank_correlation"]}
        for each in signature["prediction"]
    ]


def test_a_row_says_the_default_the_winner_and_the_noise(measured: tuple[Path, dict[str, Any], str]) -> None:
    (signature,) = measured[1]["signatures"]
    assert [each["size"] for each in signature["problems"]] == list(TOKENS)
    for each in signature["problems"]:
        assert (each["timing"], each["checked"]) == ("measured", "device")
        assert each["tuned"]["samples"] >= 6
        assert each["tuned"]["error"] < 1e-5
        assert each["speedup"]["median"] >= 1
        assert each["noise"] == pytest.approx(0.0, abs=1e-6), "of a clock that is the same every time"


def test_what_is_measured_already_is_left_out_when_it_goes_on(
    driver: ExecutingDriver, measured: tuple[Path, dict[str, Any], str]
) -> None:
    launched = len(driver.executed)
    code, stdout, _ = run(measured[0], "measure", "--resume")
    assert (code, stdout.strip()) == (0, "every predicted plan has a measured one")
    assert len(driver.executed) == launched


def test_a_dry_run_lists_launches_bytes_and_seconds_and_launches_nothing(
    driver: ExecutingDriver, measured: tuple[Path, dict[str, Any], str]
) -> None:
    launched = len(driver.executed)
    code, stdout, _ = run(measured[0], "measure", "--dry-run", "--arch", "sm_90", "--json")
    document = json.loads(stdout)
    assert code == 0
    assert document["most_s"] <= document["time_s"] + 60
    (signature,) = document["signatures"]
    assert [each["size"] for each in signature["sizes"]] == list(TOKENS)
    for each in signature["sizes"]:
        assert each["kernels"] >= 2
        assert each["checked_launches"] >= each["kernels"]
        assert each["timed_launches"] > 0
        assert each["device_bytes"] > 0
        assert 0 < each["least_s"] < each["most_s"]
    text = run(measured[0], "measure", "--dry-run")[1]
    assert "nothing is measured; this is what a run would do" in text
    assert len(driver.executed) == launched


def test_sizes_for_which_the_time_is_over_are_left_out_and_named(prepared: Path) -> None:
    code, stdout, stderr = run(prepared, "measure", "--time", "0.001")
    assert code == 1
    assert "is not measured: the time is over" in stderr
    assert "nothing was timed" in stdout


def test_tune_measures_by_itself_and_loses_a_trial_to_a_kernel_that_ruins_its_context(
    driver: ExecutingDriver, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    database = tmp_path / "tuning.db"
    ruined: list[object] = []

    def is_meant(launch: Any) -> bool:
        """The second source that is launched: that of one variant."""
        if launch.source not in ruined:
            ruined.append(launch.source)
        return ruined.index(launch.source) == 1

    driver.fail("choose", "illegal_access", when=is_meant)
    code, stdout, stderr = run(database, *WORDS, "--trials", "3", "--probes", "0", "--json")
    driver.mend()
    assert code == 0, stderr
    document = json.loads(stdout)
    assert (document["device"], document["trials"]) == (STAND_IN, 3)
    assert (document["signatures"][0]["timing"], document["signatures"][0]["checked"]) == ("measured", "device")
    with Store.open_read_only(database) as store:
        searched = [trial for trial in store.trials() if trial.search == "gp"]
    assert sorted(trial.outcome for trial in searched) == [Outcome.CRASHED, Outcome.OK, Outcome.OK]
    (lost,) = (trial for trial in searched if trial.outcome is Outcome.CRASHED)
    assert "(700, " in lost.message
    code, stdout, stderr = run(database, *WORDS, "--trials", "3", "--probes", "0", "--resume", "--json")
    assert (code, json.loads(stdout)["trials"]) == (0, 3), "it goes on with what is stored, the lost trial among it"


@pytest.mark.usefixtures("driver")
def test_without_a_device_or_prepared_kernels_a_sentence_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(*words: str) -> str:
        assert main(["measure", "--db", str(database), *words]) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    tmp_path.chmod(0o700)
    database = tmp_path / "tuning.db"
    Store.open(database).close()
    assert "there is no CUDA device of sm_100 here" in complaint("--arch", "sm_100")
    assert "holds no predicted plans for sm_90 with stored kernels; `tune --arch sm_90 --predict" in complaint()
    assert "--arch x86_64_avx2 is no arch of GPUs; known are sm_80" in complaint("--arch", "x86_64_avx2")
    assert "--top 0 is impossible" in complaint("--top", "0")
    assert "is not a duration" in complaint("--time", "soon")
    monkeypatch.setenv("TILEWRIGHT_CUDA_DRIVER", "/nowhere.so")
    assert "/nowhere.so is no CUDA driver that can be opened" in complaint()
