"""Latent attention (MLA): the absorbed form against what it stands for, what is declared, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tilewright.codegen.hardware.archs import CPU_ARCHS, GPU_ARCHS
from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.ops.attention.problem import AttentionProblem
from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.runtime.ops.attention import fallback_for
from tilewright.tuner.cli import main

OP = find_op("attention")
LATENT, ROPE, NOPE, VALUE, HEADS = 32, 16, 24, 40, 3
SIGNATURE = AttentionSignature(
    stage="decode",
    heads=HEADS,
    kv_heads=1,
    head_dim=LATENT + ROPE,
    value_dim=LATENT,
    latent=True,
    scale=(NOPE + ROPE) ** -0.5,
    page_size=4,
)
FIELDS: dict[str, Any] = {name: value for name, value in SIGNATURE.to_dict().items() if name != "op"}
PROBLEM = AttentionProblem(SIGNATURE, 2, 9, RoutingSpec.parse("power-law"))


def test_absorbed_attention_is_that_of_the_expanded_heads() -> None:
    """q_nope . (W c) = (W^T q_nope) . c, and a head's value is another product with c (arXiv 2405.04434, 2.1)."""
    random = np.random.default_rng(0)
    to_key = random.standard_normal((HEADS, NOPE, LATENT))
    to_value = random.standard_normal((HEADS, VALUE, LATENT))
    inputs = OP.inputs(PROBLEM, 0)
    q_nope = random.standard_normal((2, HEADS, NOPE))
    q_rope = random.standard_normal((2, HEADS, ROPE))
    absorbed = np.einsum("thd,hdc->thc", q_nope, to_key)
    out = OP.reference(SIGNATURE, {}, {**inputs, "q": np.concatenate((absorbed, q_rope), axis=2)})["out"]

    cache = inputs["kv_cache"].astype(np.float64)
    latent, rope = cache[..., :LATENT], cache[..., LATENT:]
    keys = np.einsum("psc,hdc->phsd", latent, to_key)
    shared = np.broadcast_to(rope[:, None], (len(cache), HEADS, 4, ROPE))
    expanded = {
        "q": np.concatenate((q_nope, q_rope), axis=2),
        "k_cache": np.concatenate((keys, shared), axis=3),
        "v_cache": np.einsum("psc,hdc->phsd", latent, to_value),
        "block_table": inputs["block_table"],
        "lengths": inputs["lengths"],
    }
    heads = AttentionSignature(
        stage="decode", heads=HEADS, kv_heads=HEADS, head_dim=NOPE + ROPE, value_dim=VALUE, page_size=4
    )
    expected = OP.reference(heads, {}, expanded)["out"]
    np.testing.assert_allclose(np.einsum("thc,hvc->thv", out, to_value), expected, rtol=1e-9)


def test_plain_torch_computes_it() -> None:
    inputs = OP.inputs(PROBLEM, 0)
    out = torch.empty(2, HEADS, LATENT)
    fallback_for(SIGNATURE, None)(*(torch.from_numpy(array) for array in inputs.values()), out)
    np.testing.assert_allclose(out.numpy(), OP.reference(SIGNATURE, {}, inputs)["out"], rtol=1e-4, atol=1e-5)


def test_the_cache_has_one_row_per_token() -> None:
    inputs = OP.inputs(PROBLEM, 0)
    assert list(inputs) == ["q", "kv_cache", "block_table", "lengths"]
    assert inputs["kv_cache"].shape[1:] == (4, LATENT + ROPE)
    work = OP.workload(PROBLEM, inputs)
    rows, elements = 18 * (LATENT + ROPE), 2 * HEADS * (2 * LATENT + ROPE)
    assert work.min_bytes == 4 * (rows + elements)


@pytest.mark.parametrize("arch", GPU_ARCHS.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("tp", [1, 16])
def test_gpus_decode_deepseek_in_its_absorbed_form(arch, tp: int) -> None:
    model = load_model("deepseek-v3", tp=tp)
    decode, prefill = OP.signatures_on(model, arch)
    assert decode.latent
    assert (decode.heads, decode.kv_heads, decode.head_dim, decode.value_dim) == (128 // tp, 1, 576, 512)
    assert decode.scale == prefill.scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    assert (prefill.kv_heads, prefill.head_dim, prefill.value_dim) == (128 // tp, 192, 128)
    for kv_dtype in ("bf16", "fp8_e4m3"):
        signature = replace(decode, kv_dtype=kv_dtype)
        if not OP.templates_for(signature, arch):
            assert kv_dtype == "fp8_e4m3"
            assert "fp8_mma" not in arch.capabilities
            continue
        default = OP.default_config(signature, arch)
        assert default in OP.space(signature, arch)
        assert (default["block_rows"], default["splits"], default["num_warps"]) == (16, 4, 4)
        assert default["block_kv"] == (32 if arch.family == "cuda" else 16)


def test_cpus_decode_what_it_expands_to() -> None:
    for arch in CPU_ARCHS.values():
        assert OP.signatures_on(load_model("deepseek-v3"), arch) == OP.signatures(load_model("deepseek-v3"))
        with pytest.raises(TilewrightError, match=r"latent attention \(MLA\) has templates for GPUs alone"):
            OP.space(SIGNATURE, arch)


def test_the_command_refuses_it_on_a_cpu_before_anything_runs(tmp_path, capsys) -> None:
    text = "heads=128,kv_heads=1,head_dim=576,value_dim=512,latent=true,scale=0.0722"
    words = ["--arch", "native", "--op", "attention", "--problem", text, "--db", str(tmp_path / "tuning.db")]
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "kv_heads=128 with their head_dim and value_dim" in line
    assert not (tmp_path / "tuning.db").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"kv_layout": "hnd"}, "kv_layout='hnd'"),
        ({"value_dim": LATENT + ROPE}, "value_dim=48"),
        ({"value_dim": 24}, "value_dim=24"),
        ({"scale": 0}, "scale is missing"),
        ({"latent": 1}, "latent=1 is impossible; give true or false"),
        ({"stage": "prefill", "page_size": 0}, "stage=prefill"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TilewrightError, match=said):
        AttentionSignature(**{**FIELDS, **changes})


def test_signatures_without_it_keep_their_keys() -> None:
    """Plans of signatures that were stored before latent attention was known are still found."""
    plain = AttentionSignature(stage="decode", heads=32, kv_heads=8, head_dim=128)
    assert "latent" not in plain.to_dict()
    assert plain.key == "ff46d485b74b87fcdeb09cc3"
    assert AttentionSignature.from_dict(SIGNATURE.to_dict()) == SIGNATURE
