"""``tune --dry-run``: what would be tuned for a model, and what of it would not, with nothing built or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tilewright.codegen.models import shapes
from tilewright.codegen.models.inspection import process
from tilewright.codegen.models.inspection.worker import inspect
from tilewright.tuner.cli import main

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
HYBRID = {
    **SMALL,
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "num_hidden_layers": 8,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mamba_dt_rank": 8,
}
WITHOUT_GATE = {
    **SMALL,
    "model_type": "nemotron_h",
    "num_hidden_layers": 6,
    "hybrid_override_pattern": "ME*EME",
    "mlp_hidden_act": "relu2",
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
DENSE = {**SMALL, "model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": True}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Dry runs of a config with some words; they must leave the folder as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "no.db"))

    def dry(config: dict[str, Any] | None, *words: str, code: int = 0) -> tuple[str, str]:
        model = []
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
            model = ["--model", str(tmp_path)]
        before = set(tmp_path.iterdir())
        assert main(["--arch", "native", "--dry-run", *model, *words]) == code
        assert set(tmp_path.iterdir()) == before
        return capsys.readouterr()

    return dry


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask Transformers here: starting a process takes seconds, and one test does it."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(process, "_ask", lambda config, _: json.dumps(inspect(json.loads(config))))


def by_op(document: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Signatures by op and stage."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in document["signatures"]:
        found.setdefault((each["op"], each["fields"].get("stage", "")), []).append(each)
    return found


def test_a_preset_needs_no_transformers(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "inspect_config", None)
    document = json.loads(run(None, "--model", "gpt-oss-20b", "--op", "all", "--json", "--study", "studies.log")[0])
    assert (document["model"], document["layers"], document["moe_layers"]) == ("gpt-oss-20b", 24, 24)
    windows = {each["fields"]["window"]: each["calls"] for each in by_op(document)["attention", "decode"]}
    assert windows == {0: {"decode": 12, "prefill": 0}, 128: {"decode": 12, "prefill": 0}}
    assert all(each["configs"] > 0 and each["sizes"] and each["trials"] for each in document["signatures"])
    assert 0 < document["estimated_s"] <= 300
    assert {"projections", "norms"} <= {each["what"] for each in document["not_counted"]}
    assert all(each["why"] for each in document["not_counted"])


def test_a_problem_needs_no_model(run: Any) -> None:
    document = json.loads(run(None, "--op", "gating", "--problem", "experts=8,top_k=2", "--json")[0])
    assert (document["model"], document["layers"], document["not_counted"]) == (None, None, [])
    assert document["signatures"][0]["calls"] == {"decode": None, "prefill": None}
    assert "experts=8 top_k=2" in run(None, "--op", "gating", "--problem", "experts=8,top_k=2")[0]


@pytest.mark.slow
def test_a_hybrid_is_what_its_class_is_made_of(run: Any) -> None:
    pytest.importorskip("transformers")
    out, _ = run(HYBRID, "--op", "all", "--json")
    document = json.loads(out)
    assert [document[key] for key in ("layers", "moe_layers", "attention_layers")] == [8, 4, 2]
    found = by_op(document)
    (up,), (gating,) = found["moe_gemm", "up"], found["gating", ""]
    assert (up["fields"]["experts"], up["fields"]["n"], up["calls"]) == (8, 96, {"decode": 4, "prefill": 4})
    assert (gating["fields"]["renormalize"], gating["fields"]["score"]) == (False, "softmax")
    assert found["attention", "prefill"][0]["calls"] == {"decode": 0, "prefill": 2}
    plain = {(each["fields"]["n"], each["fields"]["k"]): each["calls"] for each in found["moe_gemm", "plain"]}
    # Query and output of 2 layers; mamba's of 6; dense layers' of 4.
    assert plain[64, 64] == {"decode": 4, "prefill": 4}
    assert plain[256, 64] == {"decode": 6, "prefill": 6}
    assert plain[96, 64] == {"decode": 8, "prefill": 8}
    assert any("JambaMambaMixer of 6 layers" in each["what"] for each in document["not_counted"])


@pytest.mark.usefixtures("in_process")
def test_what_cannot_be_tuned_is_refused_by_its_name_alone(run: Any) -> None:
    document = json.loads(run(WITHOUT_GATE, "--op", "gating", "--json")[0])
    assert [document[key] for key in ("layers", "moe_layers", "attention_layers")] == [6, 3, 1]
    (gating,) = document["signatures"]
    assert {**gating["fields"], **gating["calls"]}.items() >= {
        "score": "sigmoid",
        "bias": True,
        "scale": 2.5,
        "renormalize": True,
        "decode": 3,
    }.items()
    (why,) = [each["why"] for each in document["not_counted"] if each["what"] == "experts of 3 layers"]
    assert "no gate (relu2 alone)" in why
    out, err = run(WITHOUT_GATE, "--op", "moe_gemm", code=1)
    assert out == ""
    assert "moe_gemm has nothing to tune for" in err
    assert "no gate (relu2 alone)" in err


@pytest.mark.usefixtures("in_process")
def test_a_dense_model_needs_no_experts(run: Any) -> None:
    out, err = run(DENSE, "--op", "all", "--json")
    assert {each["op"] for each in json.loads(out)["signatures"]} == {"moe_gemm", "attention"}
    assert "gating is left out" in err
    assert "has no routers" in err
    assert "the head" in {each["what"] for each in json.loads(out)["not_counted"]}
    assert "has no experts" in run(DENSE, "--op", "moe_gemm", code=1)[1]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_family"}, "has no class that continues a text for the model_type 'no_such_family'"),
        ({"vocab_size": ...}, "the field 'vocab_size' is missing; use a complete config.json"),
        ({"model_type": "mixtral"}, "the field 'num_local_experts' is missing; use a complete config.json"),
        ({"num_attention_heads": "four"}, "refuses this config"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_in_one_sentence(
    run: Any, changes: dict[str, Any], message: str
) -> None:
    config = {key: value for key, value in {**DENSE, **changes}.items() if value is not ...}
    out, err = run(config, "--op", "all", code=1)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
