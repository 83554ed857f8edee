"""Shapes of mixture-of-experts models: presets, and any Hugging Face ``config.json``."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tilewright.codegen.models.config import MAX_SIZE, Activation, Scoring, shape_fields
from tilewright.codegen.models.presets import PRESETS
from tilewright.errors import TilewrightError

_SIZES = ("hidden", "inter", "experts", "top_k", "layers", "moe_layers", "heads", "kv_heads", "head_dim", "vocab")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a mixture-of-experts model, as one rank of it computes them.

    Under tensor parallelism (``tp``) every rank holds every expert, but only ``inter`` of its columns. Under expert
    parallelism (``ep``) a rank holds ``experts`` whole experts out of ``all_experts``. Routing knows nothing of that:
    ``top_k`` stays the number of experts that a token picks among all, and a rank computes those picks that fall on
    its own experts, ``expected_rows`` of them.

    Raises:
        TilewrightError: for sizes that no model has.

    """

    name: str
    hidden: int
    """Elements of a token's hidden state: the input and the output of an expert."""
    inter: int
    """Elements between the two matrices of one expert, on this rank: up and gate have ``inter`` columns each."""
    experts: int
    """Routed experts on this rank."""
    top_k: int
    """Experts that each token picks, among those of all ranks."""
    activation: Activation
    """``swiglu``: silu(gate) * up. ``geglu``: gelu(gate) * up. ``swiglu_clamped`` (gpt-oss): gate and up are clamped,
    stored interleaved, and combined as gate * sigmoid(alpha * gate) * (up + 1)."""
    expert_bias: bool
    """Whether both matrices of an expert have a bias."""
    scoring: Scoring
    """How the router weighs experts. ``softmax_topk``: softmax over all, then the best. ``softmax_group``: the same,
    the best groups of experts being picked first. ``topk_softmax``: the best logits, then softmax over those.
    ``topk_sigmoid``: the best logits, then sigmoid, which scales the expert's input and not its output (Llama 4).
    ``sigmoid_group``: sigmoid, picked with a bias that does not enter the weight, the best groups first."""
    renormalize: bool
    """Whether a token's ``top_k`` weights are divided by their sum."""
    shared_experts: int
    """Experts that see every token, beside the routed ones; 0 for none."""
    layers: int
    moe_layers: int
    """Layers with experts, out of ``layers``."""
    heads: int
    """Query heads of the whole model, as are the three that follow: parallelism does not divide them here."""
    kv_heads: int
    head_dim: int
    """Elements of one query head and one key head."""
    vocab: int
    """Tokens of the vocabulary."""
    expert_groups: int = 1
    """Groups of experts, of which a token's best ``top_groups`` are picked first; 1: there are none."""
    top_groups: int = 1
    routed_scale: float = 1.0
    """Factor of all routing weights."""
    value_dim: int = 0
    """Elements of one value head; 0, and afterwards ``head_dim``, where it is as long as a key head."""
    latent_dim: int = 0
    """Elements of the vector that a token's keys and values are expanded from (``kv_lora_rank``); 0: there is none."""
    rope_dim: int = 0
    """Elements of a key that hold its position and are the same for all heads, beside the latent vector."""
    windows: tuple[int, ...] = (0,)
    """Tokens that a query sees, of every kind of layer that there is; 0: all."""
    attention_sinks: bool = False
    """Whether each query head has a learned logit in the softmax's denominator."""
    attention_bias: bool = False
    """Whether some projections of attention have a bias."""
    attention_scale: float = 0.0
    """Factor of q . k before the softmax; 0: 1 / sqrt(head_dim)."""
    tp: int = 1
    """Ranks that share every expert."""
    ep: int = 1
    """Ranks that share the set of experts."""

    def __post_init__(self) -> None:
        if self.value_dim == 0:
            object.__setattr__(self, "value_dim", self.head_dim)
        for size in (*_SIZES, "value_dim", "expert_groups", "top_groups", "tp", "ep"):
            self._require_whole(size, least=1)
        self._require_whole("shared_experts", least=0)
        if self.activation not in get_args(Activation):
            raise self._error(f"the activation {self.activation!r} is none of {', '.join(get_args(Activation))}")
        if self.scoring not in get_args(Scoring):
            raise self._error(f"the scoring {self.scoring!r} is none of {', '.join(get_args(Scoring))}")
        if self.top_k > self.all_experts:
            raise self._error(f"each token picks top_k={self.top_k} experts, but there are only {self.all_experts}")
        if self.all_experts % self.expert_groups or self.top_groups > self.expert_groups:
            raise self._error(
                f"expert_groups={self.expert_groups} must divide the {self.all_experts} experts, and hold at least "
                f"top_groups={self.top_groups}"
            )
        if self.moe_layers > self.layers:
            raise self._error(f"moe_layers={self.moe_layers} is more than layers={self.layers}")
        if self.heads % self.kv_heads:
            raise self._error(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")

    @property
    def all_experts(self) -> int:
        """Routed experts of the whole model."""
        return self.experts * self.ep

    def expected_rows(self, tokens: int) -> float:
        """Rows that one rank computes for ``tokens`` tokens when routing spreads them evenly over ranks."""
        return tokens * self.top_k / self.ep

    def sharded(self, tp: int = 1, ep: int = 1) -> ModelShape:
        """Shape of one of ``tp * ep`` ranks that share this shape.

        Raises:
            TilewrightError: when ``tp`` does not divide ``inter`` or ``ep`` does not divide ``experts``.

        """
        return replace(
            self,
            inter=self._share("tp", tp, "expert intermediate size", self.inter),
            experts=self._share("ep", ep, "number of experts", self.experts),
            tp=self.tp * tp,
            ep=self.ep * ep,
        )

    def heads_per_rank(self) -> tuple[int, int]:
        """Query heads and key/value heads of one tensor-parallel rank; ranks beyond the latter share one.

        Raises:
            TilewrightError: when ``tp`` does not divide the query heads, or neither divides nor is a multiple of the
                key/value heads.

        """
        heads = self._share("tp", self.tp, "number of attention heads", self.heads)
        if self.kv_heads % self.tp and self.tp % self.kv_heads:
            raise self._error(
                f"tp={self.tp} neither divides the {self.kv_heads} key/value heads nor is a multiple of them; "
                "use one that does"
            )
        return heads, max(1, self.kv_heads // self.tp)

    def _share(self, option: str, ranks: int, what: str, size: int) -> int:
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise self._error(f"{option} is {ranks!r}, but must be a whole number of ranks, 1 or more")
        if size % ranks:
            fitting = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
            raise self._error(f"{option}={ranks} does not divide the {what} {size}; use one of {fitting}")
        return size // ranks

    def _require_whole(self, size: str, least: int) -> None:
        value = getattr(self, size)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_SIZE:
            raise self._error(f"{size} is {value!r}, but must be a whole number from {least} to {MAX_SIZE}")

    def _error(self, message: str) -> TilewrightError:
        return TilewrightError(f"model {self.name}: {message}")


def load_model(name_or_path: str | os.PathLike[str], tp: int = 1, ep: int = 1) -> ModelShape:
    """Shape of one rank of a model.

    Args:
        name_or_path: a preset's name in any case, a Hugging Face ``config.json``, a folder that holds one, or a
            safetensors file beside one. A preset wins over a file of the same name (``./name`` means the file).
        tp: ranks that share every expert.
        ep: ranks that share the set of experts.

    Raises:
        TilewrightError: for an unknown preset, a file that is missing, malformed or describes no mixture of experts,
            and for ``tp`` and ``ep`` that do not divide it.

    """
    text = os.fspath(name_or_path)
    if text.lower() in PRESETS:
        return _shape(text.lower(), PRESETS[text.lower()], f"preset {text.lower()}").sharded(tp, ep)
    path = _config_path(text)
    # A config is nearly always called config.json, so the folder is what tells models apart.
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return _shape(name, _read_json(path), str(path)).sharded(tp, ep)


def _shape(name: str, config: Mapping[str, Any], source: str) -> ModelShape:
    return ModelShape(name=name, **shape_fields(config, source))


def _config_path(text: str) -> Path:
    path = Path(text)
    if path.is_file() and path.name.endswith((".safetensors", ".safetensors.index.json")):
        path = path.parent
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = "no config.json"
            if any(path.glob("*.safetensors")):
                found = "weights, but no config.json to say how many experts a token picks"
            raise TilewrightError(f"the folder {str(path)!r} holds {found}; give the folder of a Hugging Face model")
        return path / "config.json"
    if path.suffix == ".json":
        raise TilewrightError(f"the model config {text!r} does not exist; check the path")
    # The last part alone, so that the repository's name (Qwen/Qwen3-30B-A3B) finds its preset too.
    close = difflib.get_close_matches(text.lower().rsplit("/", 1)[-1], PRESETS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise TilewrightError(
        f"unknown model {text!r}: {hint}give one of {', '.join(PRESETS)}, or the path of a Hugging Face config.json"
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TilewrightError(f"cannot read the model config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TilewrightError(f"the model config {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TilewrightError(f"the model config {path} must hold a JSON object, not a {type(config).__name__}")
    return config
