"""The examples run as their first lines say, also where nothing was tuned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from naive_kernels import needs_compiler

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_serving_experts_without_a_plan(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "serve_experts.py")],
        env={**os.environ, "TILEWRIGHT_DB": str(tmp_path / "none.db")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if "x" in line and "ms" in line] == [
        "1",
        "4",
        "16",
        "64",
        "256",
    ]
    assert "torch: there is no database" in done.stdout


@needs_compiler
def test_serving_a_model_that_is_tuned_first(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    config = json.loads((EXAMPLES / "small_qwen3_moe" / "config.json").read_text())
    tiny = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps({**config, **tiny, "vocab_size": 64, "num_hidden_layers": 2}))
    words = ["--model", str(tmp_path), "--prompt", "1", "--new", "3", "--time", "5s", "--db", str(tmp_path / "t.db")]
    tmp_path.chmod(0o700)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "serve_moe.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tilewright serves 2 expert layers in fp32" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if "tokens/s before" in line] == ["prefill", "decode"]
