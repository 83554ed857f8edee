"""Families that are known by their config alone, each held against its class in Transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tilewright.codegen.models.families import FAMILIES, shape_of_family
from tilewright.codegen.models.inspection.process import shape_of
from tilewright.codegen.models.inspection.worker import inspect
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.presets import PRESETS

pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
ROUTED = {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 2, "n_shared_experts": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0}
STRETCHED = {"rope_scaling": YARN, "max_position_embeddings": 163840}
WINDOWED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
QWEN = {"moe_intermediate_size": 32, "num_experts": 8}
LLAMA4 = {"num_local_experts": 8, "intermediate_size_mlp": 48, "head_dim": 16, "attention_chunk_size": 32}

CASES: dict[str, list[dict[str, Any]]] = {
    "mixtral": [{"num_local_experts": 8}, {"num_local_experts": 8, "sliding_window": 16, "head_dim": 32}],
    "qwen2_moe": [
        {**QWEN, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2},
        {**QWEN, "shared_expert_intermediate_size": 48, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ],
    "qwen3_moe": [
        {**QWEN, "head_dim": 32, "norm_topk_prob": True},
        {**QWEN, "head_dim": 16, "mlp_only_layers": [0, 3]},
    ],
    "deepseek_v2": [
        {**ROUTED, **LATENT, "topk_method": "greedy", "norm_topk_prob": True},
        {**ROUTED, **LATENT, **GROUPS, "topk_method": "group_limited_greedy", **STRETCHED},
    ],
    "deepseek_v3": [
        {**ROUTED, **LATENT, **GROUPS},
        {**ROUTED, **LATENT, **GROUPS, "n_group": 1, **STRETCHED, "topk_group": 1},
    ],
    "kimi_k2": [{**ROUTED, **LATENT, **GROUPS, "architectures": ["DeepseekV3ForCausalLM"]}],
    "deepseek_v32": [{**ROUTED, **LATENT, **GROUPS, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8}],
    "glm4_moe": [
        {**ROUTED, **GROUPS, "head_dim": 16},
        {**ROUTED, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ],
    "dots1": [{**ROUTED, **GROUPS}, {**ROUTED, "n_group": 1, "topk_group": 1, "scoring_func": "noaux_tc"}],
    "gpt_oss": [
        {"num_local_experts": 8, "head_dim": 32, "sliding_window": 16, "swiglu_limit": 7.0},
        {"num_local_experts": 8, "head_dim": 32, "sliding_window": 16, "layer_types": WINDOWED},
    ],
    "llama4": [{"text_config": {**COMMON, **LLAMA4, "model_type": "llama4_text"}}],
    "llama4_text": [LLAMA4, {**LLAMA4, "interleave_moe_layer_step": 2}],
}


def by_class(config: dict[str, Any]) -> ModelShape:
    answer = inspect(config)
    assert "shape" in answer, answer
    return shape_of("small", answer["shape"])


def test_every_family_has_cases() -> None:
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "config"),
    [(family, config) for family, configs in CASES.items() for config in configs],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_family_is_what_its_class_says(family: str, config: dict[str, Any]) -> None:
    whole = {**COMMON, "model_type": family, **config}
    ours, theirs = shape_of_family("small", whole, "small", ""), by_class(whole)
    agree(ours, theirs)
    assert {each.op for each in ours.left_out} - {""} == {each.op for each in theirs.left_out} - {""}


def agree(ours: ModelShape, theirs: ModelShape) -> None:
    for part in ("hidden", "layers", "moe_layers", "attention_layers", "shared_experts", "experts", "routers"):
        assert getattr(ours, part) == getattr(theirs, part), part
    for mine, its in zip(ours.attention, theirs.attention, strict=True):
        assert mine == replace(its, scale=pytest.approx(its.scale, rel=1e-12))
    # A class knows more linear layers; those that the family has in common with it are called as often.
    counts = {(each.n, each.k, each.bias, each.role): each for each in theirs.linears}
    for each in ours.linears:
        assert counts[each.n, each.k, each.bias, each.role] == each


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-20b", "deepseek-v3"])
def test_a_preset_is_what_its_class_says(name: str) -> None:
    agree(shape_of_family(name, PRESETS[name], name, ""), by_class(dict(PRESETS[name])))
