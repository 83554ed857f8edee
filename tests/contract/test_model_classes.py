"""What is read of classes without weights is what tiny models with weights call, and compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilewright.codegen.models.inspection.process import shape_of
from tilewright.codegen.models.inspection.worker import inspect
from tilewright.codegen.models.model_shape import ModelShape

pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "tie_word_embeddings": True,
    },
    "lfm2_moe": {
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_dense_layers": 1,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
    },
    "qwen3_next": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_experts": 8,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "norm_topk_prob": True,
    },
    "granitemoe": {"num_local_experts": 8, "attention_multiplier": 0.0625, "tie_word_embeddings": True},
    "mimo_v2_flash": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "head_dim": 24,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "swa_num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "sliding_window": 16,
        "moe_layer_freq": [0, 1, 1, 1],
        "hybrid_layer_pattern": [0, 1, 1, 1],
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
    },
    "llama4_text": {"num_local_experts": 8, "intermediate_size_mlp": 48, "head_dim": 16, "num_experts_per_tok": 1},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "longcat_flash": {
        **MLA,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 3,
        "num_layers": 2,
        "head_dim": 8,
    },
}
SEEING: dict[str, dict[str, Any]] = {
    "llama4": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": {**SMALL, **CONFIGS["llama4_text"], "model_type": "llama4_text"},
        "vision_config": {"num_hidden_layers": 1},
    },
    "llama4_text": {
        "text_config": {**SMALL, **CONFIGS["llama4_text"], "model_type": "llama4_text"},
        "vision_config": {"num_hidden_layers": 1},
    },
    "qwen3_omni_moe": {
        "thinker_config": {
            "model_type": "qwen3_omni_moe_thinker",
            "text_config": {**SMALL, "num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16},
            "vision_config": {"depth": 1},
            "audio_config": {"encoder_layers": 1},
            "vision_start_token_id": 1,
            "audio_token_id": 2,
            "image_token_id": 3,
            "video_token_id": 4,
            "audio_start_token_id": 5,
            "position_id_per_seconds": 13,
        }
    },
    "no_such_chat": {
        "vision_config": {"hidden_size": 32},
        "llm_config": {
            **SMALL,
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "head_dim": 16,
        },
    },
}
"""Models that also see or hear, by model type: a class that fails after its head, one of the language model
alone, one without a forward, none."""
STRETCHED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 4}},
    "phimoe": {
        "num_local_experts": 8,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 8,
            "short_factor": [1.0] * 8,
            "long_mscale": 1.2,
            "short_mscale": 1.2,
            "original_max_position_embeddings": 16,
        },
    },
}
"""Families whose rotary embeddings look at how long the prompt is."""
EXPECTED: dict[str, tuple[int, ...]] = {  # layers, moe_layers, attention_layers, shared experts, calls of attention
    "jamba": (4, 2, 1, 0, 1),
    "ernie4_5_moe": (4, 3, 4, 2, 4),
    "lfm2_moe": (4, 3, 1, 0, 1),
    "qwen3_next": (4, 4, 1, 1, 1),
    "granitemoe": (4, 4, 4, 0, 4),
    "mimo_v2_flash": (4, 3, 4, 0, 4),
    "llama4_text": (4, 4, 4, 1, 4),
    "dbrx": (4, 4, 4, 0, 4),
    "longcat_flash": (2, 2, 2, 0, 4),
}
TOKENS = 5


OTHER_NAMES = {"longcat_flash": ("num_hidden_layers", "num_experts_per_tok", "intermediate_size")}
"""Fields that a family calls otherwise."""


def config_of(family: str) -> dict[str, Any]:
    without = set(SMALL) - {"vocab_size"} if family == "dbrx" else OTHER_NAMES.get(family, ())
    common = {key: value for key, value in SMALL.items() if key not in without}
    return {**common, "model_type": family, **CONFIGS[family]}


def read(family: str) -> ModelShape:
    answer = inspect(config_of(family))
    assert "shape" in answer, answer
    return shape_of(family, answer["shape"])


def with_weights(family: str) -> Any:
    """The tiny model itself, with random weights, as Transformers makes it from the same fields."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    fields = {key: value for key, value in config_of(family).items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_linear_layers_are_those_that_a_model_with_weights_calls(family: str) -> None:
    shape, model = read(family), with_weights(family)
    attention_calls = sum(each.calls for each in shape.attention)
    assert (
        *(shape.layers, shape.moe_layers, shape.attention_layers, shape.shared_experts),
        attention_calls,
    ) == EXPECTED[family]
    assert sum(each.calls for each in shape.experts) == shape.moe_layers
    calls: Counter[tuple[int, int, bool]] = Counter()
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if type(module) is nn.Linear and owners[id(module.weight)] == 1 and module.out_features >= 8:
            key = module.out_features, module.in_features, module.bias is not None
            module.register_forward_pre_hook(lambda _m, _a, key=key: calls.update([key]))
    with torch.no_grad():
        model(torch.zeros((1, TOKENS), dtype=torch.long), use_cache=False)
    ours: Counter[tuple[int, int, bool]] = Counter()
    for each in shape.linears:
        ours[each.n, each.k, each.bias] += each.decode
    assert ours == calls


@pytest.mark.parametrize("family", SEEING)
def test_the_language_model_of_one_that_also_sees_is_read(family: str) -> None:
    answer = inspect({"model_type": family, **SEEING[family]})
    assert "shape" in answer, answer
    shape = shape_of(family, answer["shape"])
    assert (shape.layers, shape.moe_layers, shape.attention_layers) == (4, 4, 4)
    (experts,) = shape.experts
    assert (experts.experts, experts.calls) == (8, 4)
    named = [each.what for each in shape.left_out]
    assert any("vision" in what or "visual" in what for what in named), named
    assert not any(what.startswith(("layernorm_pre", "merger")) for what in named), named


@pytest.mark.parametrize("family", STRETCHED)
def test_positions_that_stretch_with_the_prompt_do_not_hide_a_model(family: str) -> None:
    answer = inspect({**SMALL, "model_type": family, **STRETCHED[family]})
    assert "shape" in answer, answer
    shape = shape_of(family, answer["shape"])
    assert (shape.moe_layers, shape.attention_layers, shape.experts[0].calls) == (4, 4, 4)


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "longcat_flash"])
def test_experts_with_a_forward_of_their_own_compute_what_is_read_of_them(family: str) -> None:
    (read_experts,) = read(family).experts
    model = with_weights(family)
    module: Any = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(TOKENS, read_experts.hidden)
    gates, ups, downs = _weights(family, module, read_experts.experts)
    assert read_experts.activation == "swiglu"
    assert gates.shape == (read_experts.experts, read_experts.inter, read_experts.hidden)
    outputs = torch.stack([_swiglu(x, g, u, d) for g, u, d in zip(gates, ups, downs, strict=True)])
    with torch.no_grad():
        if family == "llama4_text":
            theirs, ours = module(x.repeat(read_experts.experts, 1)), outputs.flatten(0, 1)
        else:
            ids = torch.tensor([[0, 1]]).expand(TOKENS, 2)
            theirs = module(x, ids, torch.tensor([[0.25, 2.0]]).expand(TOKENS, 2))
            ours = 0.25 * outputs[0] + 2.0 * outputs[1]
    torch.testing.assert_close(theirs.reshape(ours.shape), ours, rtol=1e-4, atol=1e-4)


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _weights(family: str, module: Any, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """[experts, inter, hidden] of gate and up, [experts, hidden, inter] of down."""
    if family == "dbrx":
        w1, v1, w2 = (p.detach().unflatten(0, (experts, -1)) for p in (module.mlp.w1, module.mlp.v1, module.mlp.w2))
        return w1, v1, w2.transpose(1, 2)
    up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if family == "llama4_text":
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    gate, up = up[:experts].chunk(2, dim=1)
    return gate, up, down
