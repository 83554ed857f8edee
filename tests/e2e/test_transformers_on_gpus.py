"""Transformers models that pose as a GPU's, on kernels that the emulator computes: logits as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import FULL
from executing import ExecutingDriver, executing
from posing import posing, values
from stored_kernels import store_gpu_plan, stored_variant

from tilewright.codegen.hardware.devices import device_key
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.runtime import ServeOptions
from tilewright.runtime.launchers.cuda.driver import find_driver
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.transformers import disable, enable

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*CUDA is not available"),
]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, int]] = {
    "mixtral": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
UP = MoeGemmSignature(stage="up", experts=4, n=32, k=64, top_k=2, activation="swiglu", x_dtype="bf16")
DOWN = MoeGemmSignature(stage="down", experts=4, n=64, k=32, top_k=2, x_dtype="bf16")
Q_PROJECTION = MoeGemmSignature(stage="plain", experts=1, n=64, k=64, x_dtype="bf16")
SMALL = {"block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
"""Knobs of a kernel that the emulator runs fast."""
PROMPT = torch.tensor([[5, 9, 13, 21, 34]])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExecutingDriver]:
    forget_warnings()
    with executing(("sm_90",)) as made, posing(monkeypatch):
        yield made


@pytest.fixture
def options(tmp_path: Path, driver: ExecutingDriver) -> ServeOptions:
    device = find_driver().device(0)
    key = device_key(device.name, device.capability, device.sm_count, device.memory_bytes)
    path = tmp_path / "tuning.db"
    for signature in (UP, DOWN, Q_PROJECTION):
        store_gpu_plan(path, [(None, stored_variant(signature, "triton_grouped", SMALL, "sm_90", "bf16"))], key)
    driver.know_database(path)
    return ServeOptions(database=path)


def make_model(kind: str) -> Any:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **CONFIGS[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return values(model(PROMPT.to("cuda")).logits).float()


@pytest.mark.parametrize("kind", CONFIGS if FULL else ("qwen3_moe",))
def test_logits_are_those_of_eager(kind: str, options: ServeOptions, driver: ExecutingDriver) -> None:
    model = make_model(kind).to("cuda")
    expected = logits(model)
    assert not driver.executed
    report = enable(model, options=options)
    assert [layer.precisions for layer in report.layers] == [("bf16", "bf16")]
    assert not any(layer.rounded for layer in report.layers)
    driver.executed.clear()
    found = logits(model)
    assert [entry for entry, _ in driver.executed].count("combine") == 1
    assert (found - expected).norm() <= 0.03 * expected.norm()
    if kind == "qwen3_moe":
        served = {layer.name.removeprefix("model.layers.0.self_attn.") for layer in report.linears}
        assert served == {"q_proj", "o_proj", "lm_head"}  # those of 64 times 64
    disable(model)
    driver.executed.clear()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert not driver.executed
