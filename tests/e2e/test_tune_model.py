"""``tune --op all --model FOLDER``: every op of a model in one go, one table, and what it comes to."""

import json

import pytest
from naive_kernels import needs_compiler

from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.ops.registry import OPS
from tilewright.runtime import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.tuner.cli import main

pytestmark = needs_compiler

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}
QUICK = ["--tokens", "2", "--trials", "3", "--probes", "0", "--time", "5s", "--threads", "1"]


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_all_ops_of_a_model_folder(folder, capsys):
    words = ["--arch", "native", "--op", "all", "--model", str(folder / "model"), "--db", str(folder / "tuning.db")]
    assert main([*words, *QUICK]) == 0
    out, err = capsys.readouterr()
    shape = load_model(folder / "model")
    for op in OPS.values():
        for signature in op.signatures(shape):
            assert is_planned(signature, ServeOptions(database=folder / "tuning.db", max_error=1.0))
            assert signature.title in out
    assert err.count("measuring this machine's roofline") == 1
    assert out.count("\nop ") == 1  # the head of the one table
    passes = [line.split() for line in out.splitlines() if line.startswith(("decode 2 ", "prefill 2 "))]
    assert [words[0] for words in passes] == ["decode", "prefill"]
    assert out.count("\n  less attention ") == 1  # of the pass that decodes
    assert "not counted: norms, embeddings, Python" in out
    assert "moe_gemm plain n=64" in out  # the head, beside the projections, which are of one shape here


def test_what_a_model_cannot_have_is_left_out_of_all(folder, capsys):
    """Attention, whose heads are odd here, and a precision for the ops that store no weights."""
    (folder / "model" / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 12}))
    words = ["--arch", "native", "--model", str(folder / "model"), *QUICK, "--db", str(folder / "tuning.db")]
    words += ["--precision", "int8", "--max-error", "0.05", "--json"]
    for asked in ("attention", "gating,attention"):
        assert main([*words, "--op", asked]) == 1
        assert "head_dim=12" in capsys.readouterr().err
    assert not (folder / "tuning.db").exists()

    assert main([*words, "--op", "all"]) == 0
    out, err = capsys.readouterr()
    assert "attention is left out: attention: head_dim=12" in err
    document = json.loads(out)
    assert [each["op"] for each in document["ops"]] == ["moe_gemm", "gating"]
    assert document["ops"][1]["signatures"][0]["precision"] == "fp32"
    gain = document["end_to_end"][0]["gain"]
    assert 0 < gain["low"] <= gain["median"] <= gain["high"]
    assert "attention" in document["not_counted"]
