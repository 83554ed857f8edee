"""`tune --batch-invariant` and `batch_invariant=True`: what a token gets, to the bit, whatever else is in the batch."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_kernels import needs_compiler

from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.runtime import ServeOptions, TilewrightWarning, prepare
from tilewright.runtime.notices import forget_warnings
from tilewright.tuner.cli import main as tune

pytestmark = needs_compiler

SIGNATURE = MoeGemmSignature(stage="down", experts=4, n=72, k=96, top_k=2)
PROBLEM = "stage=down,experts=4,top_k=2,n=72,k=96"
INPUTS = ("x", "expert_offsets", "slot_row", "topk_weights")


def tuned(database: Path, *options: str) -> Path:
    words = ["--arch", "native", "--op", "moe_gemm", "--problem", PROBLEM, "--db", str(database)]
    assert tune([*words, *options]) == 0
    return database


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(
        tmp_path_factory.mktemp("invariant") / "tuning.db",
        *("--batch-invariant", "--tokens", "1,8,40", "--trials", "8", "--time", "8s", "--probes", "1"),
    )


def serve(database: Path, inputs: dict, tokens: int, threads: int) -> np.ndarray:
    weight = torch.from_numpy(find_op("moe_gemm").weights(SIGNATURE, 0)["weight"])
    call = prepare(
        weight, stage="down", top_k=2, options=ServeOptions(threads=threads, database=database, batch_invariant=True)
    )
    out = torch.empty(tokens, SIGNATURE.n)
    return call(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in INPUTS), out).numpy().copy()


def test_a_token_gets_the_same_bits_from_every_kernel_of_the_plan(database: Path) -> None:
    op = find_op("moe_gemm")
    inputs = op.inputs(op.problem(SIGNATURE, 130, RoutingSpec.parse("power-law")), 3)
    whole = serve(database, inputs, 130, threads=2)
    random = np.random.default_rng(0)
    for count in (1, 1, 2, 3, 5, 7, 8, 9, 20, 33, 40, 41, 64, 100, 129):
        tokens = sorted(random.choice(130, count, replace=False).tolist())
        part = examples_of("moe_gemm").part_of(SIGNATURE, inputs, np.asarray(tokens))
        for threads in (1, 2):
            alone = serve(database, part.inputs, count, threads)
            assert alone.tobytes() == whole[tokens].tobytes(), (count, threads)


@pytest.mark.filterwarnings("ignore:.*is not contiguous")
def test_what_no_kernel_takes_is_refused(database: Path) -> None:
    weight = torch.from_numpy(find_op("moe_gemm").weights(SIGNATURE, 0)["weight"])
    call = prepare(weight, stage="down", top_k=2, options=ServeOptions(database=database, batch_invariant=True))
    op = find_op("moe_gemm")
    inputs = op.inputs(op.problem(SIGNATURE, 4, RoutingSpec.parse("balanced")), 3)
    tensors = [torch.from_numpy(inputs[name]) for name in INPUTS]
    tensors[0] = tensors[0].t().contiguous().t()
    with pytest.raises(TilewrightError, match="pass contiguous ones"):
        call(*tensors, torch.empty(4, SIGNATURE.n))


def test_what_is_promised_is_shown_and_explained(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(["show", "--db", str(database)]) == 0
    assert re.search(
        r"batch-invariant: one order of sums for all sizes, which\s+costs -?[\d.]+%", capsys.readouterr().out
    )
    weight = torch.from_numpy(find_op("moe_gemm").weights(SIGNATURE, 0)["weight"])
    promised = prepare(weight, stage="down", top_k=2, options=ServeOptions(database=database, batch_invariant=True))
    assert "batch-invariant: a token gets the same bits" in str(promised.explain())
    not_asked = prepare(weight, stage="down", top_k=2, options=ServeOptions(database=database))
    assert "but not promised" in str(not_asked.explain())


def test_a_promise_warns_where_it_is_not_asked_for_and_cannot_be_kept(database: Path) -> None:
    """The same strided tensors that are refused with the promise go to torch without it, with one warning."""
    forget_warnings()
    weight = torch.from_numpy(find_op("moe_gemm").weights(SIGNATURE, 0)["weight"])
    call = prepare(weight, stage="down", top_k=2, options=ServeOptions(database=database))
    op = find_op("moe_gemm")
    inputs = op.inputs(op.problem(SIGNATURE, 4, RoutingSpec.parse("balanced")), 3)
    tensors = [torch.from_numpy(inputs[name]) for name in INPUTS]
    expected = call(*tensors, torch.empty(4, SIGNATURE.n)).clone()
    tensors[0] = tensors[0].t().contiguous().t()
    with pytest.warns(TilewrightWarning, match="not contiguous; plain torch serves such calls"):
        out = call(*tensors, torch.empty(4, SIGNATURE.n))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_other_plans_are_refused(tmp_path: Path) -> None:
    database = tuned(tmp_path / "tuning.db", *["--tokens", "8", "--trials", "2", "--time", "2s", "--probes", "0"])
    weight = torch.from_numpy(find_op("moe_gemm").weights(SIGNATURE, 0)["weight"])
    with pytest.raises(TilewrightError, match="tune with --batch-invariant"):
        prepare(weight, stage="down", top_k=2, options=ServeOptions(database=database, batch_invariant=True))
    with pytest.raises(TilewrightError, match="cannot be served batch-invariantly"):
        prepare(
            weight, stage="down", top_k=2, options=ServeOptions(database=tmp_path / "none.db", batch_invariant=True)
        )
