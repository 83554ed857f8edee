"""Reads the shape of a mixture-of-experts model out of the fields of its Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tilewright.codegen.numbers.activations import CLAMPED_LIMIT
from tilewright.errors import TilewrightError

Activation = Literal["swiglu", "geglu", "swiglu_clamped"]
Scoring = Literal["softmax_topk", "softmax_group", "topk_softmax", "topk_sigmoid", "sigmoid_group"]

MAX_SIZE = 2**31 - 1
"""Largest size of one dimension: kernels and databases index with 32 bits."""
_MAX_LAYERS = 10_000

_NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
"""Where models that also see or hear keep the config of their language model."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "swiglu": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu",
    "gelu_fast": "geglu",
    "gelu_pytorch_tanh": "geglu",
    "geglu": "geglu",
    "swigluoai": "swiglu_clamped",
}


@dataclass(frozen=True)
class _Family:
    """What the models of one ``model_type`` have in common and do not write into their config."""

    width_keys: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    """Where the width of one expert stands. Families with dense layers keep those layers' width in the other key."""
    scoring: Scoring = "softmax_topk"
    renormalize: bool = True
    shared_experts: int = 0
    expert_bias: bool = False
    activation: Activation | None = None
    attention_sinks: bool = False
    attention_bias: bool = False
    alternates: bool = False
    """Whether layers with a sliding window alternate with layers without, where ``layer_types`` does not say it."""


_OWN_WIDTH = ("moe_intermediate_size",)
_ONLY_WIDTH = ("intermediate_size",)
_LLAMA4 = _Family(_ONLY_WIDTH, "topk_sigmoid", renormalize=False, shared_experts=1)
_DEEPSEEK_V3 = _Family(_OWN_WIDTH, "sigmoid_group")
_FAMILIES = {
    "mixtral": _Family(_ONLY_WIDTH),
    "qwen2_moe": _Family(_OWN_WIDTH, renormalize=False, attention_bias=True),
    "qwen3_moe": _Family(_OWN_WIDTH, renormalize=False),
    "deepseek_v2": _Family(_OWN_WIDTH, renormalize=False),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "glm4_moe_lite"), _DEEPSEEK_V3),
    "dots1": replace(_DEEPSEEK_V3, renormalize=False),
    "gpt_oss": _Family(
        _ONLY_WIDTH,
        "topk_softmax",
        expert_bias=True,
        activation="swiglu_clamped",
        attention_sinks=True,
        attention_bias=True,
        alternates=True,
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
}
_UNKNOWN_FAMILY = _Family()

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
"""Where configs say how many experts a token picks."""


def shape_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of a ``ModelShape``, all but its name, from a parsed ``config.json``.

    Args:
        config: the parsed file; a nested ``text_config`` is looked into.
        source: how error messages name the file.

    Raises:
        TilewrightError: when the model is dense, or a field is missing, malformed or unsupported.

    """
    fields = _Fields(_language_model(config), source)
    family = _FAMILIES.get(fields.text("model_type") or "", _UNKNOWN_FAMILY)
    layers = fields.size("num_hidden_layers", "num_layers", most=_MAX_LAYERS)
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    return {
        "experts": _experts(fields),
        "hidden": hidden,
        "inter": fields.size(*family.width_keys),
        "top_k": fields.size(*TOP_K_KEYS),
        "activation": _activation(fields, family),
        "expert_bias": family.expert_bias,
        "scoring": _scoring(fields, family),
        "renormalize": fields.flag("norm_topk_prob", default=family.renormalize),
        "expert_groups": fields.size("n_group", default=1),
        "top_groups": fields.size("topk_group", default=1),
        "routed_scale": fields.number("routed_scaling_factor", default=1.0),
        "shared_experts": _shared_experts(fields, family),
        "layers": layers,
        "moe_layers": _moe_layers(fields, layers),
        "heads": heads,
        "kv_heads": fields.size("num_key_value_heads", default=heads),
        "head_dim": _head_dim(fields, hidden, heads),
        "value_dim": fields.size("v_head_dim", default=0) if fields.first("kv_lora_rank")[0] else 0,
        "latent_dim": fields.size("kv_lora_rank", default=0),
        "rope_dim": fields.size("qk_rope_head_dim") if fields.first("kv_lora_rank")[0] else 0,
        "windows": _windows(fields, family),
        "attention_sinks": family.attention_sinks,
        "attention_bias": fields.flag("attention_bias", default=family.attention_bias),
        "attention_scale": _attention_scale(fields, _head_dim(fields, hidden, heads)),
        "vocab": fields.size("vocab_size"),
    }


class _Fields:
    """Typed access to a config; ``null`` counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def error(self, message: str) -> TilewrightError:
        return TilewrightError(f"{self._source}: {message}")

    def first(self, *keys: str) -> tuple[str, Any]:
        """First of ``keys`` that is present and its value, or an empty key."""
        for key in keys:
            if self._values.get(key) is not None:
                return key, self._values[key]
        return "", None

    def size(self, *keys: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        key, value = self.first(*keys)
        if not key:
            if default is None:
                raise self.error(f"the field {' or '.join(map(repr, keys))} is missing; use a complete config.json")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(f"{key!r} is {value!r}, but must be a whole number from {least} to {most}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key!r} is {value!r}, but must be true or false")
        return value

    def number(self, key: str, *, default: float) -> float:
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(f"{key!r} is {value!r}, but must be a number above 0")
        return float(value)

    def text(self, *keys: str) -> str | None:
        key, value = self.first(*keys)
        if key and not isinstance(value, str):
            raise self.error(f"{key!r} is {value!r}, but must be a string")
        return value if key else None

    def nested(self, key: str) -> _Fields:
        """What stands in the object ``key``; nothing where there is none."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(f"{key!r} is {value!r}, but must be an object")
        return _Fields(value or {}, f"{self._source}: {key}")

    def texts(self, key: str) -> list[str] | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key!r} must be a list of strings")
        return value

    def numbers(self, key: str) -> list[int] | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.error(f"{key!r} must be a list of whole numbers")
        return value


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Config of the language model alone; what it does not say itself holds from the level above."""
    for key in _NESTED:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            outer = {name: value for name, value in config.items() if name not in _NESTED}
            return _language_model({**outer, **inner})
    return config


def _experts(fields: _Fields) -> int:
    key, value = fields.first(*_EXPERT_KEYS)
    if not key or value == 0:
        kind = fields.text("model_type") or "unnamed"
        raise fields.error(
            f"this {kind} model has no experts (none of {', '.join(_EXPERT_KEYS)} is set and above 0); "
            "give a mixture-of-experts model"
        )
    return fields.size(key)


def _activation(fields: _Fields, family: _Family) -> Activation:
    # Every family named above was published with SiLU and may leave the field out.
    name = fields.text("hidden_act", "hidden_activation") or "silu"
    if name not in _ACTIVATIONS:
        raise fields.error(f"the activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    activation = family.activation or _ACTIVATIONS[name]
    if not fields.first("swiglu_limit")[0]:
        return activation
    if activation != "swiglu_clamped":
        raise fields.error("'swiglu_limit' with a plain SiLU is not supported; only the clamped form of gpt-oss is")
    if fields.number("swiglu_limit", default=CLAMPED_LIMIT) != CLAMPED_LIMIT:
        limit = fields.first("swiglu_limit")[1]
        raise fields.error(f"'swiglu_limit' is {limit}, but only the {CLAMPED_LIMIT} of gpt-oss is supported")
    return activation


_BY_METHOD: dict[str | None, Scoring] = {"group_limited_greedy": "softmax_group", "noaux_tc": "sigmoid_group"}
"""DeepSeek's names, where no ``scoring_func`` stands beside them."""


def _scoring(fields: _Fields, family: _Family) -> Scoring:
    function = fields.text("scoring_func")
    if function == "sigmoid":
        return "sigmoid_group"
    if function not in (None, "softmax"):
        raise fields.error(f"the router's scoring_func {function!r} is not supported; supported are softmax, sigmoid")
    method = fields.text("topk_method")
    if method in _BY_METHOD:
        return _BY_METHOD[method]
    return family.scoring if function is None else "softmax_topk"


def _shared_experts(fields: _Fields, family: _Family) -> int:
    # Qwen2-MoE has one shared expert and states only its width, 0 where there is none.
    key, _ = fields.first("shared_expert_intermediate_size")
    implied = min(1, fields.size(key, least=0)) if key else family.shared_experts
    return fields.size("n_shared_experts", "num_shared_experts", default=implied, least=0)


def _moe_layers(fields: _Fields, layers: int) -> int:
    """How many layers have experts; the others are dense."""
    listed = fields.numbers("moe_layers")
    if listed is not None:
        count = len(set(listed) & set(range(layers)))
    else:
        step = fields.size("interleave_moe_layer_step", "decoder_sparse_step", default=1)
        first = fields.size("first_k_dense_replace", default=0, least=0)
        every = fields.size("moe_layer_freq", default=1)
        dense = frozenset(fields.numbers("mlp_only_layers") or ())
        count = sum(
            layer >= first and layer % every == 0 and (layer + 1) % step == 0 and layer not in dense
            for layer in range(layers)
        )
    if not count:
        raise fields.error(f"none of the {layers} layers has experts; give a mixture-of-experts model")
    return count


def _head_dim(fields: _Fields, hidden: int, heads: int) -> int:
    # Latent attention (DeepSeek) first: there, a field named head_dim may hold only the rotary part.
    if fields.first("kv_lora_rank")[0]:
        return fields.size("qk_nope_head_dim") + fields.size("qk_rope_head_dim")
    if not fields.first("head_dim")[0] and hidden % heads:
        raise fields.error(f"'head_dim' is missing and hidden_size {hidden} is no multiple of {heads} heads; add it")
    return fields.size("head_dim", default=hidden // heads)


def _windows(fields: _Fields, family: _Family) -> tuple[int, ...]:
    """Windows of the kinds of layers, those that see everything (0) first."""
    # Qwen writes a window down and says beside it that it is not used.
    if not fields.first("sliding_window")[0] or not fields.flag("use_sliding_window", default=True):
        return (0,)
    window = fields.size("sliding_window")
    kinds = fields.texts("layer_types")
    if kinds is None:
        return (0, window) if family.alternates else (window,)
    return tuple(sorted({window if kind == "sliding_attention" else 0 for kind in kinds})) or (0,)


def _attention_scale(fields: _Fields, head_dim: int) -> float:
    """1 / sqrt(head_dim); DeepSeek's latent attention makes up for stretched positions (YaRN, arXiv 2309.00071)."""
    scale: float = head_dim**-0.5
    stretched = fields.nested("rope_scaling")
    if not fields.first("kv_lora_rank")[0] or not stretched.first("mscale_all_dim")[0]:
        return scale
    factor = stretched.number("factor", default=1.0)
    if factor > 1:
        scale *= (0.1 * stretched.number("mscale_all_dim", default=1.0) * math.log(factor) + 1.0) ** 2
    return scale
