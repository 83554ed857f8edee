"""``tune --arch sm_90`` on a machine without a GPU: compiled, predicted, emulated, ranked, stored, shown, compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tilewright.codegen.backends.binaries.elf import sections
from tilewright.codegen.recipe.model import Recipe
from tilewright.tuner.cli import main
from tilewright.tuning_db.store import Store

pytest.importorskip("triton", reason="Triton is not installed")

PROBLEM = "stage=down,experts=4,n=128,k=192,top_k=2"
TOKENS = (1, 40)
Run = Callable[..., str]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A database, the document of the run that filled it, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("tuned")
    folder.chmod(0o700)
    database = folder / "tuning.db"
    words = ["--arch", "sm_90", "--device", "H100 SXM", "--op", "moe_gemm", "--problem", PROBLEM]
    more = ["--tokens", ",".join(map(str, TOKENS)), "--trials", "6", "--probes", "1", "--db", str(database), "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWRIGHT_CACHE", str(folder / "cache"))
        said = {name: (folder / name).open("w+") for name in ("stdout", "stderr")}
        for name, file in said.items():
            patch.setattr(f"sys.{name}", file)
        code = main([*words, *more])
    for file in said.values():
        file.close()
    stdout, stderr = ((folder / name).read_text() for name in said)
    assert code == 0, stderr
    return database, json.loads(stdout), stderr


@pytest.fixture
def run(tuned: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a reading command on the database; its stdout."""

    def command(*words: str) -> str:
        assert main([*words, "--db", str(tuned[0])]) == 0
        return capsys.readouterr().out

    return command


def test_it_says_what_it_did_not_do(tuned: tuple[Path, dict[str, Any], str]) -> None:
    _, document, stderr = tuned
    assert "nothing is timed on a GPU" in stderr
    assert document["device"] == "h100-sxm"
    (signature,) = document["signatures"]
    assert (signature["timing"], signature["checked"]) == ("predicted", "emulated")
    assert signature["signature"]["x_dtype"] == "bf16"


def test_every_size_has_a_tuned_kernel_beside_the_default(tuned: tuple[Path, dict[str, Any], str]) -> None:
    (signature,) = tuned[1]["signatures"]
    assert [each["size"] for each in signature["problems"]] == list(TOKENS)
    for each in signature["problems"]:
        assert (each["timing"], each["checked"]) == ("predicted", "emulated")
        assert each["low_us"] < each["tuned_us"] < each["high_us"]
        assert each["speedup"] == pytest.approx(each["default_us"] / each["tuned_us"])
        assert each["speedup"] >= 1
        assert 0 < each["error"] < 0.01
        assert [facts["entry"] for facts in each["facts"]] == ["moe_gemm", "combine"]
        assert all(blocks >= 1 for blocks in each["blocks_per_sm"])
        assert sum(each["terms_us"].values()) > each["tuned_us"]


def test_binaries_are_stored_with_recipes_that_fit_them(tuned: tuple[Path, dict[str, Any], str]) -> None:
    with Store.open_read_only(tuned[0]) as store:
        kernels = store.kernels()
        assert kernels
        for kernel in kernels:
            recipe = Recipe.from_dict(kernel.recipe)
            for launch, facts in zip(recipe.launches, kernel.facts["entries"], strict=True):
                artifact = store.artifact(launch.artifact)
                assert artifact is not None
                assert artifact.kind == "cubin"
                assert f".text.{launch.entry}" in sections(artifact.data)
                assert launch.block == (str(32 * facts["num_warps"]),)
                assert int(launch.shared_memory_bytes) == facts["smem_bytes"] - facts["static_smem_bytes"]
                # A tensor map is followed by its shape and its strides.
                passed = [1 + 2 * len(each.map.shape) if each.map else 1 for each in launch.arguments]
                assert sum(passed) + launch.hidden_arguments == len(facts["parameter_bytes"])
            assert kernel.facts["entries"][0]["instructions"]["mma"]


def test_predictions_are_shown_as_such(run: Run) -> None:
    text = run("show")
    assert "on h100-sxm" in text
    assert "timing: predicted, checked: emulated" in text
    document = json.loads(run("show", "--json"))
    tuned = [p for p in document["problems"] if p["problem"]["tokens"] in TOKENS]
    assert {(p["best"]["timing"], p["best"]["checked"]) for p in tuned} == {("predicted", "emulated")}
    key = document["plans"][0]["entries"][0]["kernel_key"]
    assert "registers=" in run("show", key)


def test_two_kernels_are_compared_down_to_the_machine_code(
    run: Run, tuned: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tuned[0].parent / "cache"))
    with Store.open_read_only(tuned[0]) as store:
        first, other = [kernel.key for kernel in store.kernels()][:2]
    document = json.loads(run("compare", first, other, "--ir", "--disassembly", "--json"))
    assert document["knobs"]
    assert document["facts"]
    assert set(document["forms"]) == {"moe_gemm ttgir", "moe_gemm ptx", "combine ttgir", "combine ptx"}
    assert document["forms"]["moe_gemm ptx"]
    assert any("MMA" in line for line in document["disassembly"])
    assert document["predicted_terms_us"]
    for terms in document["predicted_terms_us"].values():
        assert {"launch", "matrix", "dram", "all"} <= set(terms)
    variants = json.loads(run("compare", "--json"))
    assert {variant["timing"] for problem in variants for variant in problem["variants"]} == {"predicted"}
    assert "time/default" in run("compare", "--top", "3")


def test_resuming_takes_over_what_was_predicted(
    tuned: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tuned[0].parent / "cache"))
    words = ["--arch", "sm_90", "--op", "moe_gemm", "--problem", PROBLEM, "--tokens", "1", "--trials", "6"]
    assert main([*words, "--probes", "0", "--resume", "--db", str(tuned[0]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trials"] == 6
    (again,) = document["signatures"][0]["problems"]
    assert again["tuned_us"] == pytest.approx(tuned[1]["signatures"][0]["problems"][0]["tuned_us"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "l40s"], "device L40S is sm_89, not sm_90; use --arch sm_89"),
        (["--threads", "2"], "--threads is of CPU kernels"),
        (["--template", "cpu_blocked"], "template 'cpu_blocked' of moe_gemm is not for sm_90"),
        (["--precision", "int3"], "unknown precision 'int3'"),
        (["--precision", "int4g128", "--problem", "experts=4,n=64,k=72"], "k=72 is no multiple of the 128 steps"),
        (["--arch", "sm_90,gfx942", "--device", "h200"], "--device names a product of one arch"),
        (
            ["--arch", "sm_80", "--template", "triton_persistent"],
            "moe_gemm/triton_persistent cannot be generated for sm_80: sm_80 has no instruction that copies tiles",
        ),
        (["--precision", "nvfp4"], "Triton has no matrix instruction for sm_90 that takes block scales"),
        (["--max-error", "0.1"], "--max-error bounds what rounded weights cost"),
        (
            ["--problem", "experts=4,n=64,k=64,x_dtype=fp32"],
            "its templates for that compute in bf16 or fp16, not in fp32",
        ),
        (
            ["--op", "gating", "--problem", "experts=8,top_k=2", "--precision", "int8"],
            "--precision int8 is of weights, and this op has none to store",
        ),
    ],
)
def test_a_mistake_gets_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--arch", "sm_90", "--op", "moe_gemm", *(["--problem", PROBLEM] if "--problem" not in words else [])]
    assert main([*usual, "--db", str(tmp_path / "tuning.db"), *words]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert sentence in errors[-1]


def test_a_wrong_assembler_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/bin/true")
    words = ["--arch", "sm_90", "--op", "moe_gemm", "--problem", PROBLEM]
    assert main([*words, "--db", str(tmp_path / "tuning.db")]) == 1
    assert "/bin/true is no ptxas" in capsys.readouterr().err
