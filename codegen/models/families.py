"""Families of models whose shape is known from their config alone, for presets and where there is no Transformers.

Every family here is held against its class in Transformers by tests/contract/test_model_families.py. No other one is
taken for its like: what a family does not write into its config differs from one to the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilewright.codegen.models.config import TOP_K_KEYS, Fields, language_model
from tilewright.codegen.models.model_shape import MAX_LAYERS, ModelShape
from tilewright.codegen.models.parts import (
    Activation,
    AttentionLayers,
    ExpertLayers,
    LeftOut,
    LinearLayers,
    Role,
    RouterLayers,
)
from tilewright.codegen.numbers.activations import CLAMPED_LIMIT

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_new": "geglu",
    "gelu_pytorch_tanh": "geglu",
}
"""By the names that Transformers gives to the activation of gates."""

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_ELSEWHERE = "read from a config.json alone, where Transformers is installed"
_HEAD_IS_TIED = "its weight is the embeddings', so that it stays as it is"


@dataclass(frozen=True)
class _Family:
    """What the models of one ``model_type`` have in common and do not write into their config."""

    width: str = "moe_intermediate_size"
    """Where the width of one expert stands. Families with dense layers keep those layers' width in another field."""
    scoring: str = "softmax"
    """``softmax``; ``sigmoid``; ``noaux_tc``: sigmoid, picked with a bias, the best groups first; ``topk_method``: what
    the config says by that name."""
    renormalize: bool | None = None
    """Whether weights are divided by their sum; None: as ``norm_topk_prob`` says, which is else False."""
    scaled: bool = False
    """Whether ``routed_scaling_factor`` is looked at."""
    has_groups: bool = False
    shared_experts: int = 0
    expert_bias: bool = False
    activation: Activation | None = None
    attention_bias: bool = False
    attention_sinks: bool = False
    sparse_attention: bool = False
    """Whether an indexer picks the tokens that attention sees."""
    latent_attention: bool = False
    alternates: bool = False
    """Whether layers with a sliding window alternate with layers without, where ``layer_types`` does not say it."""
    has_window: bool = False
    """Whether ``sliding_window`` alone, without ``layer_types``, is a window of all layers."""


_DEEPSEEK_V3 = _Family(scoring="noaux_tc", scaled=True, has_groups=True, latent_attention=True)
_GLM4 = replace(_DEEPSEEK_V3, latent_attention=False)
_LLAMA4 = _Family(width="intermediate_size", scoring="sigmoid", renormalize=False, shared_experts=1)
FAMILIES: Mapping[str, _Family] = {
    "mixtral": _Family(width="intermediate_size", renormalize=True, has_window=True),
    "qwen2_moe": _Family(attention_bias=True),
    "qwen3_moe": _Family(),
    "deepseek_v2": _Family(scoring="topk_method", renormalize=False, scaled=True, latent_attention=True),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "deepseek_v32": replace(_DEEPSEEK_V3, sparse_attention=True),
    "glm4_moe": _GLM4,
    "dots1": _GLM4,
    "gpt_oss": _Family(
        width="intermediate_size",
        renormalize=True,
        expert_bias=True,
        activation="swiglu_clamped",
        attention_sinks=True,
        attention_bias=True,
        alternates=True,
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
}


def shape_of_family(name: str, config: Mapping[str, Any], source: str, otherwise: str) -> ModelShape:
    """Shape of a model of a known family from its parsed ``config.json``.

    Args:
        name: of the model.
        config: the parsed file; a nested ``text_config`` is looked into.
        source: how error messages name the file.
        otherwise: what to do about a family that is not known here.

    Raises:
        TilewrightError: when the family is not known, or a field is missing, malformed or not understood.

    """
    fields = Fields(language_model(config), source)
    kind = fields.text("model_type") or ""
    if kind not in FAMILIES:
        raise fields.error(
            f"the model_type {kind!r} is not among those that are known without Transformers "
            f"({', '.join(FAMILIES)}); {otherwise}"
        )
    return _Reading(fields, FAMILIES[kind], kind).shape(name)


class _Reading:
    """A config of one family."""

    def __init__(self, fields: Fields, family: _Family, kind: str) -> None:
        self._fields, self._family, self._kind = fields, family, kind
        self._layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
        self._hidden = fields.size("hidden_size")

    def shape(self, name: str) -> ModelShape:
        """Everything that the family's configs say."""
        moe_layers, shared = self._moe_layers(), self._shared_experts()
        experts = self._experts(moe_layers)
        attention = self._attention()
        linears, missing = self._linears(attention)
        left_out = [
            *missing,
            *([LeftOut("shared experts", _ELSEWHERE)] if shared else []),
            *([LeftOut("dense layers", _ELSEWHERE)] if moe_layers < self._layers else []),
        ]
        if self._family.sparse_attention:
            why = "an indexer picks the tokens that it sees, which no template computes"
            left_out.insert(0, LeftOut("attention", why, "attention"))
        return ModelShape(
            name=name,
            hidden=self._hidden,
            layers=self._layers,
            moe_layers=moe_layers,
            attention_layers=self._layers,
            shared_experts=shared,
            experts=(experts,),
            routers=(self._router(experts, moe_layers),),
            attention=() if self._family.sparse_attention else attention,
            linears=linears,
            left_out=tuple(left_out),
        )

    def _experts(self, calls: int) -> ExpertLayers:
        key, value = self._fields.first(*_EXPERT_KEYS)
        if not key or value == 0:
            raise self._fields.error(
                f"this {self._kind} model has no experts (none of {', '.join(_EXPERT_KEYS)} is set and above 0); "
                "give a mixture-of-experts model"
            )
        return ExpertLayers(
            hidden=self._hidden,
            inter=self._fields.size(self._family.width),
            experts=self._fields.size(key),
            top_k=self._fields.size(*TOP_K_KEYS),
            activation=self._activation(),
            bias=self._family.expert_bias,
            calls=calls,
        )

    def _activation(self) -> Activation:
        # Every family here was published with SiLU and may leave the field out.
        fields = self._fields
        name = fields.text("hidden_act") or "silu"
        if name not in _ACTIVATIONS:
            raise fields.error(f"the activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
        activation = self._family.activation or _ACTIVATIONS[name]
        if not fields.first("swiglu_limit")[0]:
            return activation
        if activation != "swiglu_clamped":
            raise fields.error("'swiglu_limit' with a plain SiLU is not supported; only the clamped form of gpt-oss is")
        if fields.number("swiglu_limit", default=CLAMPED_LIMIT) != CLAMPED_LIMIT:
            limit = fields.first("swiglu_limit")[1]
            raise fields.error(f"'swiglu_limit' is {limit}, but only the {CLAMPED_LIMIT} of gpt-oss is supported")
        return activation

    def _router(self, experts: ExpertLayers, calls: int) -> RouterLayers:
        fields, family = self._fields, self._family
        scoring = family.scoring
        has_groups = family.has_groups
        if scoring == "topk_method":
            method = fields.text("topk_method") or "greedy"
            if method not in ("greedy", "group_limited_greedy"):
                raise fields.error(f"the topk_method {method!r} of {self._kind} is not supported")
            scoring, has_groups = "softmax", method == "group_limited_greedy"
        renormalize = family.renormalize
        if renormalize is None:
            # Classes of the families with a selection bias renormalise unless they are told not to.
            renormalize = fields.flag("norm_topk_prob", default=scoring == "noaux_tc" and self._kind != "dots1")
        groups = fields.size("n_group", default=1) if has_groups else 1
        top_groups = fields.size("topk_group", default=1) if has_groups else 1
        if top_groups >= groups:
            groups = top_groups = 1
        return RouterLayers(
            experts=experts.experts,
            top_k=experts.top_k,
            score="softmax" if scoring == "softmax" else "sigmoid",
            renormalize=renormalize,
            bias=scoring == "noaux_tc",
            groups=groups,
            top_groups=top_groups,
            scale=fields.number("routed_scaling_factor", default=1.0) if family.scaled else 1.0,
            calls=calls,
        )

    def _shared_experts(self) -> int:
        # Qwen2-MoE has one shared expert and states only its width, 0 where there is none.
        key, _ = self._fields.first("shared_expert_intermediate_size")
        implied = min(1, self._fields.size(key, least=0)) if key else self._family.shared_experts
        return self._fields.size("n_shared_experts", "num_shared_experts", default=implied, least=0)

    def _moe_layers(self) -> int:
        """How many layers have experts; the others are dense."""
        fields, layers = self._fields, self._layers
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

    def _attention(self) -> tuple[AttentionLayers, ...]:
        """One part for every kind of layer, that which sees everything first."""
        fields, family = self._fields, self._family
        heads = fields.size("num_attention_heads")
        if family.latent_attention:
            latent_dim, rope_dim = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim")
            head_dim = fields.size("qk_nope_head_dim") + rope_dim
            value_dim = fields.size("v_head_dim")
            kv_heads = heads
        else:
            latent_dim = rope_dim = 0
            if not fields.first("head_dim")[0] and self._hidden % heads:
                raise fields.error(
                    f"'head_dim' is missing and hidden_size {self._hidden} is no multiple of {heads} heads; add it"
                )
            head_dim = value_dim = fields.size("head_dim", default=self._hidden // heads)
            kv_heads = fields.size("num_key_value_heads", default=heads)
        return tuple(
            AttentionLayers(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                value_dim=value_dim,
                scale=self._attention_scale(head_dim),
                window=window,
                sinks=family.attention_sinks,
                latent_dim=latent_dim,
                rope_dim=rope_dim,
                calls=calls,
            )
            for window, calls in sorted(self._windows().items())
        )

    def _windows(self) -> dict[int, int]:
        """How many layers have each window; 0: they see everything."""
        fields, layers = self._fields, self._layers
        kinds = fields.texts("layer_types")
        # Qwen writes a window down and says beside it that it is not used.
        has_window = bool(fields.first("sliding_window")[0]) and fields.flag(
            "use_sliding_window", default=not self._kind.startswith("qwen")
        )
        if kinds is None:
            if not has_window:
                return {0: layers}
            window = fields.size("sliding_window")
            if self._family.alternates:
                return {0: layers // 2, window: layers - layers // 2} if layers > 1 else {window: layers}
            if self._family.has_window:
                return {window: layers}
            raise fields.error(
                f"'sliding_window' is {window}, and without 'layer_types' nothing says which layers of {self._kind} "
                "have it; pip install 'tilewright[transformers]', whose classes do"
            )
        if len(kinds) != layers:
            raise fields.error(f"'layer_types' names {len(kinds)} layers, but there are {layers}")
        known = {"full_attention": 0, "chunked_attention": 0}
        if "sliding_attention" in kinds:
            known["sliding_attention"] = fields.size("sliding_window")
        if unknown := sorted(set(kinds) - known.keys()):
            raise fields.error(
                f"'layer_types' names {unknown[0]!r}, which is not known of {self._kind} without Transformers; "
                "pip install 'tilewright[transformers]'"
            )
        return dict(Counter(known[kind] for kind in kinds))

    def _attention_scale(self, head_dim: int) -> float:
        """1 / sqrt(head_dim); DeepSeek's latent attention makes up for stretched positions (YaRN, arXiv 2309.00071)."""
        fields = self._fields
        scale: float = head_dim**-0.5
        stretched = fields.nested("rope_scaling" if fields.first("rope_scaling")[0] else "rope_parameters")
        if not self._family.latent_attention or not stretched.first("mscale_all_dim")[0]:
            return scale
        factor = stretched.number("factor", default=1.0)
        if factor > 1:
            scale *= (0.1 * stretched.number("mscale_all_dim", default=1.0) * math.log(factor) + 1.0) ** 2
        return scale

    def _linears(self, attention: tuple[AttentionLayers, ...]) -> tuple[tuple[LinearLayers, ...], list[LeftOut]]:
        """Attention's projections, where they have no bias and are not latent, and the head."""
        fields, first = self._fields, attention[0]
        linears: list[LinearLayers] = []
        missing: list[LeftOut] = []
        if fields.flag("attention_bias", default=self._family.attention_bias) or self._family.latent_attention:
            missing.append(LeftOut("projections", _ELSEWHERE))
        else:
            q, kv, hidden = first.heads * first.head_dim, first.kv_heads * first.head_dim, self._hidden
            shapes: dict[Role, tuple[int, int]] = {
                "query": (q, hidden),
                "key": (kv, hidden),
                "value": (kv, hidden),
                "output": (hidden, q),
            }
            linears += [
                LinearLayers(n=n, k=k, role=role, decode=self._layers, prefill=self._layers)
                for role, (n, k) in shapes.items()
            ]
        if fields.flag("tie_word_embeddings", default=False):
            missing.append(LeftOut("the head", _HEAD_IS_TIED))
        else:
            head = fields.size("vocab_size"), self._hidden
            linears.append(LinearLayers(n=head[0], k=head[1], role="head", decode=1, prefill=0))
        return tuple(linears), missing
