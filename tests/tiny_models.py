"""Every mixture-of-experts class of the installed Transformers as a tiny model with random weights.

Nothing is listed by name: classes come from Transformers' own mappings, and a config is made small by what its fields
mean. A class of a newer Transformers is found by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

HIDDEN, INTER, EXPERTS, TOP_K, VOCABULARY, LAYERS = 64, 48, 8, 3, 256, 4

_MAPPINGS = {"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": True, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": False}
"""Of Transformers, and whether they name causal models."""

_ROUTED: dict[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), TOP_K),
    **dict.fromkeys(("top_k_experts",), TOP_K),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), INTER),
}
"""Fields that make the experts, and are set even where a config leaves them open."""
_SMALL: dict[str, int] = {
    **_ROUTED,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "out_hidden_size", "text_hidden_size"), HIDDEN),
    **dict.fromkeys(("projector_hidden_size", "projection_hidden_size", "llm_hidden_size"), HIDDEN),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "depth", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size"), INTER
    ),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size", "encoder_ffn_dim"), INTER),
    **dict.fromkeys(("shared_expert_intermediate_size",), INTER),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "head_dim", "swa_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "full_attention_interval"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "first_k_dense_replace", "num_dense_layers"), 1),
    "qk_rope_head_dim": 8,
    "max_position_embeddings": 512,
    "sliding_window": 32,
}
"""Values of the fields that say how large a model is, where a config has them."""
_OPTIONAL = (
    "q_lora_rank",
    "kv_lora_rank",
    "o_lora_rank",
    "sliding_window",
    "first_k_dense_replace",
    "num_dense_layers",
)
"""Of these fields, those that mean something else when they are left open."""
_OPEN: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mimo_v2_flash": {"num_key_value_heads": 2, "swa_num_key_value_heads": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INTER, "moe_num_experts": EXPERTS},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}
"""By model type, what a default config leaves open though a model needs it."""


@dataclass(frozen=True)
class TinyClass:
    """A class of models that has experts."""

    name: str
    causal: bool = True
    """Whether it makes text from text; else from other things, too."""

    @property
    def model(self) -> Any:
        """The class itself."""
        return getattr(transformers, self.name)

    def __str__(self) -> str:
        return self.name


def moe_classes() -> Iterator[TinyClass]:
    """Classes of causal and conditional generation whose default config speaks of experts, each once."""
    names: dict[str, bool] = {}
    for mapping, causal in _MAPPINGS.items():
        for found in getattr(modeling_auto, mapping).values():
            for name in [found] if isinstance(found, str) else found:
                names.setdefault(name, causal)
    for name, causal in names.items():
        tiny = TinyClass(name, causal)
        try:
            default = tiny.model.config_class()
        except Exception:
            continue  # a class without a default config, which says so in many ways
        if "expert" in str(default).lower():
            yield tiny


def make_config(tiny: TinyClass) -> Any:
    """The class's own default config, made small."""
    return _shrunk(tiny.model.config_class())


def make_tiny(tiny: TinyClass) -> Any:
    """A model with random weights, norms near 1 and correction biases of std 1e-3."""
    torch.manual_seed(3)
    return tiny.model(make_config(tiny)).float().eval()


def _shrunk(default: Any) -> Any:
    """A config of the class of ``default``, of which it makes again what follows from other fields."""
    fields = vars(default)
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, transformers.PreTrainedConfig):
            made[name] = _shrunk(value)
        elif name in _SMALL and value is None and name not in _OPTIONAL:
            made[name] = _SMALL[name]
        elif name in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            made[name] = min(value, _SMALL[name])
        elif name.endswith(("_token_id", "_token_ids", "_token_index")) and _is_beyond(value):
            made[name] = VOCABULARY - 1 - len(made)
    if "qk_rope_head_dim" in made:
        made.pop("head_dim", None)  # follows from it
    made.update(_layers(default))
    made.update(_OPEN.get(default.model_type, {}))
    return type(default)(**made)


def _is_beyond(token_id: Any) -> bool:
    return isinstance(token_id, list) or (isinstance(token_id, int) and token_id >= VOCABULARY)


def _layers(default: Any) -> dict[str, Any]:
    """Lists with an entry for each layer, cut so that every kind of layer stays."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {n: v for n, v in vars(default).items() if isinstance(v, list | tuple) and len(v) == count}
    if not lists or count <= LAYERS:
        return {}
    kinds = list(zip(*map(list, lists.values()), strict=True))
    first = sorted({next(at for at, other in enumerate(kinds) if repr(other) == repr(kind)) for kind in kinds})
    rest = [at for at in range(count) if at not in first]
    kept = sorted([*first, *rest][:LAYERS])
    return {name: [value[at] for at in kept] for name, value in lists.items()}
