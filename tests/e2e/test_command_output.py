"""What the commands print: the content of their tables and documents, on a database that was really tuned."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from evaluation_kernels import needs_compiler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.ops.registry import find_op
from tilewright.tuner.campaign.loop import FINAL_RACE
from tilewright.tuner.cli import main
from tilewright.tuning_db.records import Outcome
from tilewright.tuning_db.store import Store

pytestmark = needs_compiler

PROBLEM = "stage=down,experts=4,n=40,k=48,top_k=2"
TEMPLATE = "cpu_stream"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A database, and what the command that filled it said on stdout and stderr."""
    folder = tmp_path_factory.mktemp("tuned")
    folder.chmod(0o700)
    database = folder / "tuning.db"
    words = ["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--tokens", "1,9", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        said = {name: (folder / name).open("w+") for name in ("stdout", "stderr")}
        for name, file in said.items():
            patch.setattr(f"sys.{name}", file)
        code = main([*words, "--trials", "8", "--time", "10s", "--template", TEMPLATE, "--db", str(database), "--json"])
    for file in said.values():
        file.close()
    stdout, stderr = ((folder / name).read_text() for name in said)
    assert code == 0, stderr
    return database, stdout, stderr


@pytest.fixture
def run(tuned: tuple[Path, str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a reading command on the database; its stdout, there being nothing else."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def command(*words: str, code: int = 0) -> str:
        assert main([*words, "--db", str(tuned[0])]) == code
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return command


def assert_measured(entry: dict[str, Any]) -> None:
    assert entry["samples"] >= 1
    assert 0 < entry["low_us"] <= entry["median_us"] <= entry["high_us"]
    assert 0 <= entry["error"] < 1e-4


def test_tune_prints_one_document(tuned: tuple[Path, str, str]) -> None:
    database, stdout, stderr = tuned
    document = json.loads(stdout)
    assert document["op"] == "moe_gemm"
    assert document["arch"] == native_arch().name
    assert document["device"] == read_cpu_info().key
    assert document["database"] == str(database)
    assert document["templates"] == [f"moe_gemm/{TEMPLATE}"]
    assert document["roofline"]["peak_gflops"] > 0
    assert document["roofline"]["bandwidth_gbps"] > 0
    (signature,) = document["signatures"]
    assert signature["unsolved"] == 0
    assert [problem["size"] for problem in signature["problems"]] == [1, 9]
    for problem in signature["problems"]:
        assert (problem["timing"], problem["checked"]) == ("measured", "device")
        assert_measured(problem["tuned"])
        assert_measured(problem["default"])
        for ratio in (problem["speedup"], problem["deployed"]["speedup"]):
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        for side in ("torch", "served"):
            times = problem["deployed"][side]
            assert times["samples"] >= 1
            assert 0 < times["low_us"] <= times["median_us"] <= times["high_us"]
        assert problem["deployed"]["served"]["error_against_torch"] < 1e-4
        assert problem["roofline_share"] > 0
        assert problem["noise"] >= 0
    assert "Traceback" not in stderr
    assert "valid configs of" in stderr
    assert "removed by" in stderr


def test_only_the_chosen_template_and_the_default_are_tried(tuned: tuple[Path, str, str]) -> None:
    with Store.open_read_only(tuned[0]) as store:
        trials = store.trials()
    for key in {trial.problem_key for trial in trials}:
        searched = [t for t in trials if t.problem_key == key and t.search != FINAL_RACE]
        if searched:  # sizes between the tuned ones have last races alone
            assert sum(t.template != f"moe_gemm/{TEMPLATE}" for t in searched) == 1
            assert searched[0].template == "moe_gemm/cpu_blocked"  # the default comes first
            assert searched[0].outcome is Outcome.OK


def test_tune_prints_a_table_that_fits_the_terminal(
    tuned: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    database = tmp_path / "tuning.db"
    shutil.copy(tuned[0], database)
    monkeypatch.setenv("COLUMNS", "100")
    words = ["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--tokens", "1,9", "--threads", "1"]
    assert main([*words, "--resume", "--trials", "2", "--time", "5s", "--db", str(database)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines if str(database) not in line), out
    head = next(line for line in lines if line.lstrip().startswith("tokens"))
    assert re.split(r"\s{2,}", head)[:6] == ["tokens", "torch", "default", "tuned", "vs default", "vs torch"]
    rows = [line for line in lines if re.match(r" *[19]  +[\d.]+ [um]?s", line)]
    assert len(rows) == 2
    assert f"stored in {database}" in lines
    assert "moe_gemm stage=down experts=4 n=40 k=48 top_k=2 fp32" in lines
    assert any(line.startswith("next:  tune show") for line in lines)


@pytest.mark.parametrize(("template_changed", "new"), [(False, 0), (True, 4)])
def test_resume_counts_trials_of_the_same_kernels_alone(
    tuned: tuple[Path, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    template_changed: bool,
    new: int,
) -> None:
    tmp_path.chmod(0o700)
    database = tmp_path / "tuning.db"
    shutil.copy(tuned[0], database)
    before = _searched(database)
    if template_changed:
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE trials SET kernel_key = 'of a text that is no more'")
    words = ["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--tokens", "1,9", "--threads", "1"]
    more = ["--resume", "--trials", "2", "--time", "2s", "--probes", "0", "--db", str(database), "--json"]
    assert main([*words, *more]) == 0
    capsys.readouterr()
    assert _searched(database) == before + new


def _searched(database: Path) -> int:
    """How many trials its searches made, last races apart."""
    with Store.open_read_only(database) as store:
        return sum(trial.search != FINAL_RACE for trial in store.trials())


def test_show_as_a_document(run: Run, tuned: tuple[Path, str, str]) -> None:
    document = json.loads(run("show", "--json"))
    assert document["database"] == str(tuned[0])
    assert [device["key"] for device in document["devices"]] == [read_cpu_info().key]
    sizes = [problem["problem"]["tokens"] for problem in document["problems"]]
    assert sizes == sorted(sizes)
    assert {1, 9} <= set(sizes)
    for problem in document["problems"]:
        assert sum(problem["outcomes"].values()) == problem["trials"]
        assert_measured(problem["best"])
        assert (problem["best"]["timing"], problem["best"]["checked"]) == ("measured", "device")
    (plan,) = document["plans"]
    assert (plan["timing"], plan["checked"]) == ("measured", "device")
    assert plan["entries"][-1]["max_size"] is None
    for entry in plan["entries"]:
        assert_measured(entry["tuned"])
        assert_measured(entry["default"])
        assert entry["tuned"]["median_us"] == entry["median_us"]
        assert entry["default"]["median_us"] == entry["default_us"]


def test_show_as_text(run: Run, tuned: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run("show")
    lines = out.splitlines()
    assert lines[0] == f"database {tuned[0]}"
    assert read_cpu_info().key in lines[1]
    assert "moe_gemm stage=down experts=4 n=40 k=48 top_k=2 fp32" in lines
    head = next(line for line in lines if line.startswith("problem"))
    assert " ".join(head.split()) == "problem tokens trials best interval n error timing checked"
    document = json.loads(run("show", "--json"))
    for problem in document["problems"]:
        row = next(line for line in lines if line.startswith(problem["problem_key"][:8]))
        assert len(row) <= 80
        assert row.split()[1:3] == [str(problem["problem"]["tokens"]), str(problem["trials"])]
        assert row.split()[-2:] == ["measured", "device"]
    served = [line for line in lines if "tokens: " in line]
    assert len(served) == len(document["plans"][0]["entries"])
    assert served[-1].split()[:3] == ["any", "more", "tokens:"]


def test_show_a_kernel(run: Run) -> None:
    key = json.loads(run("show", "--json"))["plans"][0]["entries"][0]["kernel_key"]
    text = run("show", key[:10])
    assert f"kernel     {key}" in text
    assert "checked    device" in text
    assert "final race" in text
    assert run("show", key[:10], "--source").startswith("// Made by tilewright")
    document = json.loads(run("show", key, "--json"))
    assert document["key"] == key
    assert document["trials"]
    assert {trial["outcome"] for trial in document["trials"]} == {"ok"}


def assert_own_knobs(signature: dict[str, Any], config: dict[str, Any]) -> None:
    op = find_op("moe_gemm")
    template = next(t for t in op.templates if t.name == config["template"])
    own = template.own_space(op.signature_from_dict(signature), native_arch(), config["precision"])
    assert config.keys() == {"template", *(parameter.name for parameter in own.parameters)}


def test_compare_as_a_document(run: Run) -> None:
    problems = json.loads(run("compare", "--json"))
    assert {1, 9} <= {problem["size"] for problem in problems}
    for problem in problems:
        assert problem["signature"]["stage"] == "down"
        assert problem["threads"] == 1
        assert problem["device"] == read_cpu_info().key
        best = problem["variants"][0]
        assert best["against_best"] == 1
        assert len({variant["kernel"] for variant in problem["variants"]}) == len(problem["variants"])
        for variant in problem["variants"]:
            assert_measured(variant)
            assert variant["against_best"] == pytest.approx(variant["median_us"] / best["median_us"])
            assert variant["roofline_share"] == pytest.approx(problem["roofline_us"] / variant["median_us"])
            assert_own_knobs(problem["signature"], variant["config"])
            assert (variant["timing"], variant["checked"]) == ("measured", "device")
        if problem["size"] in (1, 9):
            (default,) = [variant for variant in problem["variants"] if variant["is_default"]]
            assert default["against_default"] == 1
            assert best["against_default"] == pytest.approx(best["median_us"] / default["median_us"])


@pytest.mark.parametrize("columns", [80, 100])
def test_compare_as_text(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    key = next(p["problem_key"] for p in json.loads(run("show", "--json"))["problems"] if p["problem"]["tokens"] == 9)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("compare", key[:8], "--top", "3").splitlines()
    assert not any("\ufffd" in line for line in lines)  # what stands for a control character
    tables = lines[: next(i for i, line in enumerate(lines) if line.startswith("roofline"))]
    assert all(len(line) <= columns for line in tables)
    assert "tokens=9" in lines[0]
    assert lines[1].startswith("1 thread on ")
    shown = " ".join(line for line in lines if line.startswith("kernel"))
    variants = json.loads(run("compare", key[:8], "--top", "3", "--json"))[0]["variants"]
    configs = [variant["config"] for variant in variants]
    knobs = {knob for config in configs for knob in config}
    telling = [knob for knob in knobs if len({str(config.get(knob)) for config in configs}) > 1]
    measured = ("median", "interval", "n", "time/best", "time/default", "roofline", "error", "race")
    for column in (*measured, *telling):
        assert f" {column}" in shown
    assert len(variants) in (3, 4)  # and the default, where it is not among the three
    for variant in variants:
        (row,) = [line for line in tables if line.startswith(variant["kernel"][:8]) and " us " in line]
        assert ("default" in row) == variant["is_default"]


def two_kernels(database: Path) -> tuple[str, str]:
    """Keys of the default and of another kernel whose bytes are kept."""
    with Store.open_read_only(database) as store:
        by_template = {kernel.template: kernel.key for kernel in store.kernels()}
    return by_template["moe_gemm/cpu_blocked"], by_template["moe_gemm/cpu_stream"]


def test_compare_two_kernels(run: Run, tuned: tuple[Path, str, str]) -> None:
    one, other = two_kernels(tuned[0])
    keys = one[:12], other[:12]
    text = run("compare", *keys)
    assert text.splitlines()[0].split() == ["knob", keys[0][:8], keys[1][:8]]
    assert "moe_gemm/cpu_blocked" in text
    assert "moe_gemm/cpu_stream" in text
    assert f"--- {keys[0][:8]}" in text
    assert "-constexpr int64_t kBlockM" in text
    document = json.loads(run("compare", *keys, "--json"))
    assert [kernel[:12] for kernel in document["kernels"]] == list(keys)
    assert document["knobs"]["template"] == ["moe_gemm/cpu_blocked", "moe_gemm/cpu_stream"]
    assert document["source"]
    assert document["disassembly"] == []


@pytest.mark.skipif(not (shutil.which("objdump") or shutil.which("llvm-objdump")), reason="there is no objdump")
def test_compare_the_machine_code_of_two_kernels(run: Run, tuned: tuple[Path, str, str]) -> None:
    kernels = two_kernels(tuned[0])
    code = json.loads(run("compare", kernels[0], kernels[1], "--disassembly", "--json"))["disassembly"]
    changed = [line for line in code if line[:1] in "+-" and not line.startswith(("+++", "---"))]
    assert changed
    # Addresses would make every line differ.
    assert not [line for line in changed if re.match(r"[+-]\s*[0-9a-f]+:", line)]
    same = json.loads(run("compare", kernels[0], kernels[0], "--disassembly", "--json"))
    assert (same["knobs"], same["source"], same["disassembly"]) == ({}, [], [])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["compare", "a", "b", "c"], "3 keys are too many"),
        (["compare", "--top", "0"], "--top 0"),
        (["compare", "--disassembly"], "keys of both"),
        (["compare", "zzz"], "'zzz'"),
        (["compare", "zzz", "yyy"], "'zzz'"),
        (["show", "zzz"], "'zzz'"),
        (["show", ""], "keys of a kernel start with ''"),
    ],
)
def test_a_mistaken_question_gets_one_sentence(
    tuned: tuple[Path, str, str], capsys: pytest.CaptureFixture[str], words: list[str], names: str
) -> None:
    assert main([*words, "--db", str(tuned[0])]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tune: ")
    assert names in err
    assert err.count("\n") == 1


def test_times_of_another_device_have_no_roofline_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        key = "another cpu"

    monkeypatch.setattr("tilewright.tuner.commands.compare.read_cpu_info", Elsewhere)
    for problem in json.loads(run("compare", "--json")):
        assert problem["roofline_us"] is None
        assert {variant["roofline_share"] for variant in problem["variants"]} == {None}
    assert "the times are of another device" in run("compare")


def test_doctor(run: Run, tuned: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(run("doctor", "--json"))
    assert list(document) == ["cpu", "compiler", "cache", "temporary", "database", "extension", "openmp", "noise"]
    assert {finding["status"] for finding in document.values()} <= {"ok", "warn"}
    cpu = document["cpu"]["message"]
    assert native_arch().name in cpu
    assert all(feature in cpu for feature in native_arch().features)
    assert find_compiler().version in document["compiler"]["message"]
    assert "all checksums match" in document["database"]["message"]
    noise = document["noise"]["measured"]
    assert 0 < noise["low"] <= noise["ratio"] <= noise["high"]
    assert noise["samples"] == 100
    monkeypatch.setenv("COLUMNS", "90")
    lines = run("doctor").splitlines()
    names = [line.split()[1] for line in lines if line[0] != " "]
    assert names == list(document)
    assert all(len(line) <= 90 for line in lines if str(tuned[0]) not in line)


def test_doctor_finds_what_the_runtime_would_refuse(
    tuned: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "tuning.db"
    shutil.copy(tuned[0], database)
    tmp_path.chmod(0o777)
    monkeypatch.setenv("CXX", "garbage")
    assert main(["doctor", "--db", str(database), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["database"]["status"] == "fail"
    assert "can be written by others" in document["database"]["message"]
    assert document["compiler"]["status"] == "fail"
    assert "$CXX is 'garbage'" in document["compiler"]["message"]


def test_export(run: Run, tuned: tuple[Path, str, str], tmp_path: Path) -> None:
    file = tmp_path / "studies.log"
    document = json.loads(run("export", str(file), "--json"))
    storage = JournalStorage(JournalFileBackend(str(file)))
    with Store.open_read_only(tuned[0]) as store:
        summaries, trials = store.summary(), store.trials()
    assert document["trials"] == len(trials)
    assert set(document["studies"]) == set(optuna.get_all_study_names(storage))
    assert len(document["studies"]) == len(summaries)
    seen = []
    for name in document["studies"]:
        study = optuna.load_study(study_name=name, storage=storage)
        assert study.direction is optuna.study.StudyDirection.MINIMIZE
        assert study.user_attrs["op"] == "moe_gemm"
        assert study.user_attrs["device"] == read_cpu_info().key
        assert study.user_attrs["threads"] == 1
        own = [t for t in trials if t.problem == study.user_attrs["problem"]]
        assert f"tokens={own[0].problem['tokens']} threads=1" in name
        assert [t.value for t in study.trials] == [t.median_us for t in own]
        assert [t.params for t in study.trials] == [t.config for t in own]
        assert [t.state is TrialState.COMPLETE for t in study.trials] == [t.outcome is Outcome.OK for t in own]
        for exported, original in zip(study.trials, own, strict=True):
            attributes = exported.user_attrs
            assert attributes["outcome"] == original.outcome.value
            assert attributes["kernel"] == original.kernel_key
            assert attributes["samples"] == len(original.samples_us)
            assert (attributes["low_us"], attributes["high_us"]) == (original.low_us, original.high_us)
            assert attributes["error"] == original.error
            assert attributes["search"] == original.search
        seen += own
    assert len(seen) == len(trials)
    assert "optuna-dashboard" in run("export", str(tmp_path / "again.log"))


def test_export_refuses_what_it_cannot_do(
    tuned: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.db"
    Store.open(empty).close()
    for words, names in (
        (["--db", str(empty), str(tmp_path / "x.log")], "holds no trials"),
        (["--db", str(tuned[0]), str(tmp_path / "no" / "x.log")], "No such file or directory"),
        (["--db", str(tuned[0]), str(empty)], "it exists already"),
    ):
        assert main(["export", *words]) == 1
        assert names in capsys.readouterr().err
    assert {path.name.removesuffix("-wal").removesuffix("-shm") for path in tmp_path.iterdir()} == {"empty.db"}
