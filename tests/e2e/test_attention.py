"""Attention as a user meets it: tuned by the command, then read, then served; and what is wrong with a call."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive_kernels import needs_compiler

from tilewright.codegen.ops.attention.declaration import AttentionProblem
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.runtime import PagedDecode, ServeOptions, TilewrightWarning, VarlenPrefill
from tilewright.runtime.notices import forget_warnings
from tilewright.tuner.cli import main
from tilewright.tuner.evaluation.checking import compare_all

pytestmark = needs_compiler

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 100,
}
HEADS = (4, 2, 24)
"""Query heads, key/value heads and head dim of the model."""
ONE_ORDER = {"heads": 3, "kv_heads": 1, "head_dim": 16, "window": 300}
"""Tuned for one order of sums, and with learned sinks."""


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    forget_warnings()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans for both stages of a small model, and for decoding with one order of sums."""
    folder = tmp_path_factory.mktemp("attention")
    folder.chmod(0o700)
    (folder / "config.json").write_text(json.dumps(MODEL))
    words = ["--arch", "native", "--op", "attention", "--trials", "3", "--probes", "0"]
    words += ["--db", str(folder / "tuning.db"), "--tokens", "3"]
    assert main([*words, "--time", "6s", "--model", str(folder / "config.json")]) == 0
    problem = ",".join(f"{name}={value}" for name, value in ONE_ORDER.items())
    words += ["--time", "4s", "--batch-invariant", "--problem", f"stage=decode,sinks=true,context=400,{problem}"]
    assert main(words) == 0
    return folder / "tuning.db"


def tensors_of(call: Any, tokens: int, context: int, seed: int = 0) -> list[torch.Tensor]:
    """Inputs of a call, of sequences of very different lengths."""
    problem = AttentionProblem(call.signature, tokens, context, RoutingSpec.parse("power-law:1"))
    return [torch.from_numpy(array) for array in find_op("attention").inputs(problem, seed).values()]


@pytest.fixture(params=[PagedDecode, VarlenPrefill])
def tuned(request: pytest.FixtureRequest, database: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return request.param.of(*HEADS, options=ServeOptions(database=str(database)))


@pytest.fixture
def decode(database: Path) -> PagedDecode:
    return PagedDecode.of(*HEADS, options=ServeOptions(database=str(database)))


def test_what_is_known_can_be_read(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "compare"):
        assert main([command, "--db", str(database), "--json"]) == 0
        json.loads(capsys.readouterr().out)
        assert main([command, "--db", str(database)]) == 0
        assert "attention" in capsys.readouterr().out


@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (2, 700), (13, 33), (95, 19)])
def test_tuned_kernels_serve_what_the_op_declares(tuned: Any, tokens: int, context: int) -> None:
    assert "attention/cpu" in str(tuned.explain())
    op, tensors = find_op("attention"), tensors_of(tuned, tokens, context)
    specs = [spec.name for spec in tuned.signature.tensors()]
    inputs = {name: tensor.numpy() for name, tensor in zip(specs, tensors, strict=False)}
    expected = op.reference(tuned.signature, {}, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = tuned(*tensors)
    assert compare_all({"out": out.numpy()}, expected, op.tolerance(tuned.signature)).complaint is None


def test_torch_serves_what_nobody_tuned(database: Path) -> None:
    for kind in (PagedDecode, VarlenPrefill):
        with pytest.warns(TilewrightWarning, match="attention .* is served by plain torch"):
            plain = kind.of(4, 1, 24, options=ServeOptions(database=str(database)))
        assert not plain.is_tuned
        assert torch.isfinite(plain(*tensors_of(plain, 5, 9))).all()


def test_torch_serves_strided_tensors(tuned: Any) -> None:
    tensors = tensors_of(tuned, 7, 50)
    expected = tuned(*tensors)
    strided = [torch.stack((tensor, tensor), dim=-1)[..., 0] for tensor in tensors]
    with pytest.warns(TilewrightWarning, match="is not contiguous"):
        torch.testing.assert_close(tuned(*strided), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "change", "said"),
    [
        (4, lambda lengths: lengths.index_fill(0, torch.tensor(1), 0), "lengths[1] is 0; expected a length from 1"),
        (4, lambda lengths: lengths + 10000, "block_table[0, 2] is -1; expected a page from 0 to 11"),
        (4, lambda lengths: lengths.long(), "lengths has dtype torch.int64"),
        (3, lambda table: table + 100000, "block_table[0, 0] is "),
        (3, lambda table: table[:, 0], "block_table has shape [3]; expected [tokens, table_pages]"),
        (0, lambda q: q.double(), "q has dtype torch.float64"),
        (0, lambda q: q[:, :2], "q has shape [3, 2, 24]; expected [tokens, 4, 24]"),
        (1, lambda cache: cache[..., :16].contiguous(), "k_cache has shape"),
        (2, lambda cache: cache[1:].contiguous(), "v_cache has shape"),
    ],
)
def test_what_would_lead_a_tuned_decode_astray_is_refused(decode: PagedDecode, position: int, change, said) -> None:
    tensors = tensors_of(decode, 3, 40)
    tensors[position] = change(tensors[position])
    out = torch.full((3, 4, 24), 7.0)
    with pytest.raises(TilewrightError) as caught:
        decode(*tensors, out)
    assert str(caught.value).startswith("attention decode: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("offsets", "said"),
    [([0, 5, 5, 9], "cu_seqlens[2] is 5"), ([0, 5], "cu_seqlens[1] is 5"), ([0, 12, 9], "cu_seqlens[2] is 9")],
)
def test_sequences_of_no_tokens_or_of_too_many_are_refused(database: Path, offsets: list[int], said: str) -> None:
    prefill = VarlenPrefill.of(*HEADS, options=ServeOptions(database=str(database)))
    tensors = tensors_of(prefill, 9, 9)
    tensors[3] = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(TilewrightError) as caught:
        prefill(*tensors)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(tuned: Any, name: str) -> None:
    """It is an answer, as it is for torch: whoever computed it wants to see it. The other sequences are not touched."""
    tensors = tensors_of(tuned, 12, 5)
    expected = tuned(*tensors)
    if tuned.signature.stage == "decode":
        rows, place = [0], 0 if name == "q" else (int(tensors[3][0, 0]), 0, 0)
    else:
        rows, place = range(int(tensors[3][1])), 0
    tensors["qkv".index(name)][place] = torch.nan
    found = tuned(*tensors)
    others = [row for row in range(12) if row not in rows]
    assert found[rows].isnan().any()
    assert torch.equal(found[others], expected[others])


def test_one_order_gives_a_sequence_the_same_bits_in_every_batch(database: Path) -> None:
    sinks = torch.linspace(-1, 1, 3)
    made = [
        PagedDecode.of(
            **ONE_ORDER,
            sinks=sinks,
            options=ServeOptions(threads=threads, database=str(database), batch_invariant=True),
        )
        for threads in (1, 2)
    ]
    op = find_op("attention")
    problem = AttentionProblem(made[0].signature, 60, 250, RoutingSpec.parse("power-law:1"))
    inputs = op.inputs(problem, 3)
    whole = made[1](*map(torch.from_numpy, inputs.values())).numpy()
    expected = op.reference(made[0].signature, {"sinks": sinks.numpy()}, inputs)
    assert compare_all({"out": whole}, expected, op.tolerance(made[0].signature)).complaint is None
    random = np.random.default_rng(0)
    for count in (1, 1, 2, 3, 7, 40, 59):
        chosen = sorted(random.choice(60, count, replace=False).tolist())
        part = examples_of("attention").part_of(made[0].signature, inputs, np.asarray(chosen))
        for call in made:
            alone = call(*(torch.from_numpy(np.ascontiguousarray(array)) for array in part.inputs.values()))
            assert alone.numpy().tobytes() == whole[chosen].tobytes(), count


def test_only_plans_of_one_order_serve_who_asks_for_it(database: Path) -> None:
    with pytest.raises(TilewrightError, match="tune with --batch-invariant"):
        PagedDecode.of(*HEADS, options=ServeOptions(database=str(database), batch_invariant=True))


def test_problems_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arch", "native", "--op", "attention", "--db", str(tmp_path / "tuning.db"), "--problem"]
    for problem, said in (
        ("heads=6,kv_heads=4,head_dim=64", "heads=6 is not a multiple of kv_heads=4"),
        ("heads=6,kv_heads=2,head_dim=30", "head_dim=30 is impossible; give a multiple of 8"),
        ("heads=6,kv_heads=2,head_dim=64,context=0", "context=0 is impossible"),
        ("stage=prefill,heads=6,kv_heads=2,head_dim=64,page_size=16", "page_size=16 is impossible"),
        ("heads=6,kv_heads=2", "--problem lacks head_dim"),
    ):
        assert main([*words, problem]) != 0
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in message
