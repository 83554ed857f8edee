"""The kinds of parts that a language model is made of, each with how often a forward pass calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["swiglu", "geglu", "swiglu_clamped"]
"""``swiglu``: silu(gate) * up. ``geglu``: gelu(gate) * up. ``swiglu_clamped`` (gpt-oss): gate and up are clamped,
stored interleaved, and combined as gate * sigmoid(alpha * gate) * (up + 1)."""
Score = Literal["softmax", "sigmoid"]
Role = Literal["query", "key", "value", "output", "head", "other"]


@dataclass(frozen=True, kw_only=True)
class ExpertLayers:
    """Layers of gated experts of one shape."""

    hidden: int
    """Elements of a token's hidden state: the input and the output of an expert."""
    inter: int
    """Elements between the two matrices of one expert: up and gate have ``inter`` columns each."""
    experts: int
    """Routed experts, those that compute nothing left out."""
    top_k: int
    """Experts that each token picks."""
    activation: Activation
    bias: bool
    """Whether both matrices of an expert have a bias."""
    calls: int
    """Of a forward pass."""


@dataclass(frozen=True, kw_only=True)
class RouterLayers:
    """Layers that choose experts in one way; see ``GatingSignature`` for what the fields mean."""

    experts: int
    top_k: int
    score: Score
    renormalize: bool
    bias: bool
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    calls: int


@dataclass(frozen=True, kw_only=True)
class AttentionLayers:
    """Layers of causal attention of one kind; see ``AttentionSignature``."""

    heads: int
    """Query heads of the whole model, as are ``kv_heads``: parallelism does not divide them here."""
    kv_heads: int
    head_dim: int
    """Elements of one query head and one key head."""
    value_dim: int
    """Elements of one value head."""
    scale: float
    """Factor of q . k before the softmax."""
    window: int = 0
    """Tokens that a query sees; 0: all."""
    sinks: bool = False
    """Whether each query head has a learned logit in the softmax's denominator."""
    latent_dim: int = 0
    """Elements of the vector that a token's keys and values are expanded from (``kv_lora_rank``); 0: there is none."""
    rope_dim: int = 0
    """Elements of a key that hold its position and are the same for all heads, beside the latent vector."""
    calls: int


@dataclass(frozen=True, kw_only=True)
class LinearLayers:
    """Linear layers outside of the experts that have one shape: ``[rows, k]`` to ``[rows, n]``."""

    n: int
    k: int
    bias: bool = False
    role: Role = "other"
    """What ranks of tensor parallelism have of it: of attention's own layers their heads, of the head all."""
    decode: int
    """Calls of a pass that decodes."""
    prefill: int
    """Calls of a pass over a prompt, each with a row for every token."""


@dataclass(frozen=True)
class LeftOut:
    """Something that a model computes and that is tuned and counted nowhere."""

    what: str
    why: str
    op: str = ""
    """The op that it would belong to; empty: none."""
