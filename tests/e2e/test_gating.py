"""Gating as a user meets it: tuned by the command, then read, then served."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.errors import TilewrightError
from tilewright.runtime import Experts, Gate, ServeOptions, TilewrightWarning, softmax_topk
from tilewright.runtime.notices import forget_warnings
from tilewright.tuner.cli import main

MODEL = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 24,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "num_attention_heads": 2,
    "vocab_size": 100,
}

ROUTER = {
    "score": "sigmoid",
    "bias": torch.linspace(-0.1, 0.1, 24),
    "groups": 4,
    "top_groups": 2,
    "scale": 2.5,
    "order": "rows",
}
"""The model's, as the runtime is told of it."""


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    forget_warnings()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """Plans for the router of a small DeepSeek-V3, and for a small softmax router."""
    try:
        find_compiler()
    except TilewrightError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("gating")
    folder.chmod(0o700)
    (folder / "config.json").write_text(json.dumps(MODEL))
    words = ["--arch", "native", "--op", "gating", "--tokens", "1,40", "--trials", "3", "--time", "5s"]
    store = ["--db", str(folder / "tuning.db")]
    assert main([*words, "--model", str(folder / "config.json"), *store]) == 0
    assert main([*words, "--problem", "experts=9,top_k=2,order=rows", "--batch-invariant", *store]) == 0
    return folder / "tuning.db"


def test_what_is_known_can_be_read(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "compare"):
        assert main([command, "--db", str(database), "--json"]) == 0
        json.loads(capsys.readouterr().out)
        assert main([command, "--db", str(database)]) == 0
        assert "gating" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_a_tuned_gate_chooses_what_torch_chooses(database: Path, tokens: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = Gate.of(24, 3, options=ServeOptions(database=str(database)), **ROUTER)
        assert "gating/cpu" in str(tuned.explain())
        logits = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(tokens))
        mine = tuned(logits)
    with pytest.warns(TilewrightWarning, match="gating .* is served by plain torch"):
        plain = Gate.of(24, 3, options=ServeOptions(database="/nowhere/at/all.db"), **ROUTER)
    theirs = plain(logits)
    for name, value in theirs._asdict().items():
        if value is not None and name != "topk_weights":
            assert torch.equal(getattr(mine, name), value), name
    torch.testing.assert_close(mine.topk_weights, theirs.topk_weights)


def test_a_tuned_gate_refuses_what_has_no_softmax(database: Path) -> None:
    gate = Gate.of(9, 2, order="rows", options=ServeOptions(database=str(database)))
    logits = torch.zeros(3, 9)
    logits[1, 4] = torch.nan
    with pytest.raises(TilewrightError, match=r"gating: logits\[1, 4\] is nan; expected a number"):
        gate(logits)
    logits[1] = -torch.inf
    logits[1, 8] = 0
    assert gate(logits).topk_ids.tolist() == [[0, 1], [8, 0], [0, 1]]


def test_a_token_gets_the_same_bits_in_every_batch(database: Path) -> None:
    gates = [
        Gate.of(9, 2, order="rows", options=ServeOptions(threads=threads, database=str(database), batch_invariant=True))
        for threads in (1, 2)
    ]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 9, generator=generator)
    whole = gates[1](logits)
    for count in (1, 2, 3, 33, 199):
        chosen = torch.randperm(200, generator=generator)[:count]
        for gate in gates:
            alone = gate(logits[chosen])
            assert torch.equal(alone.topk_ids, whole.topk_ids[chosen])
            assert alone.topk_weights.numpy().tobytes() == whole.topk_weights[chosen].numpy().tobytes()
    with pytest.raises(TilewrightError, match="tune with --batch-invariant"):
        Gate.of(24, 3, **ROUTER, options=ServeOptions(database=str(database), batch_invariant=True))


def test_a_buffer_too_short_for_the_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.warns(TilewrightWarning):
        gate = Gate.of(4, 1, order="blocks", block_size=8, options=ServeOptions(database=str(tmp_path / "none.db")))
    logits = torch.eye(4)
    outputs = [*gate(logits)[:3], torch.empty(4, 1, dtype=torch.int32), gate(logits).slot_row]
    short = [torch.empty(16, dtype=torch.int32), torch.empty(2, dtype=torch.int32), torch.empty(1, dtype=torch.int32)]
    with pytest.raises(TilewrightError, match="32 padded rows exceed the 16"):
        gate(logits, *outputs, *short)


def test_experts_route_by_the_tuned_gate(database: Path) -> None:
    up, down = torch.randn(9, 12, 8), torch.randn(9, 8, 6)
    with pytest.warns(TilewrightWarning, match="moe_gemm .* is served by plain torch"):
        gated = Experts(up, down, top_k=2, options=ServeOptions(database=str(database)))
    with pytest.warns(TilewrightWarning, match="moe_gemm .* is served by plain torch"):
        plain = Experts(up, down, top_k=2, options=ServeOptions(database="/nowhere/at/all.db"))
    assert gated.gate is not None
    assert plain.gate is None
    for tokens in (1, 33):
        x, logits = torch.randn(tokens, 8), torch.randn(tokens, 9)
        torch.testing.assert_close(gated(x, logits), plain(x, logits), rtol=1e-4, atol=1e-4)
        ids, scale = softmax_topk(logits, 2, renormalize=True)
        torch.testing.assert_close(gated(x, logits), gated.run(x, ids, scale))
