"""The static part of a gating problem, and the tensors of its calls. Light to import: the runtime needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.errors import TilewrightError

Score = Literal["softmax", "sigmoid"]
Order = Literal["none", "rows", "blocks"]

_MAX_EXPERTS = 4096
_MAX_BLOCK = 1 << 16
_WHOLE = ("experts", "top_k", "groups", "top_groups", "block_size")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class GatingSignature(Signature):
    """Choice of ``top_k`` of ``experts`` for every token, and the order of rows that it makes.

    Experts are ranked by their logit; with ``bias`` or with groups under ``sigmoid``, by sigmoid(logit) + bias. Equal
    experts are taken by rising id, as ``torch.sort(descending=True, stable=True)`` does; ``torch.topk`` promises no
    order and takes others depending on sizes. With ``groups``, experts are split into that many runs of equal length,
    and only those in the best ``top_groups`` runs are chosen: a run counts as its best expert (``softmax``,
    DeepSeek-V2), or as the sum of its two best (``sigmoid``, DeepSeek-V3).

    Raises:
        TilewrightError: when a field is impossible; the sentence names it.

    """

    op: ClassVar[str] = "gating"

    experts: int
    """Experts of all ranks."""
    top_k: int
    score: Score = "softmax"
    """What a weight is made of: share in the softmax over all experts, or sigmoid of the expert's own logit."""
    renormalize: bool = True
    """Whether a token's weights are divided by their sum. With softmax that is the softmax over the chosen alone."""
    bias: bool = False
    """Whether a bias [experts] takes part in the choice, and not in the weights; for ``sigmoid``."""
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    """Factor of all weights, applied last."""
    order: Order = "none"
    """``rows``: choices sorted by expert, as ``moe_gemm`` takes them. ``blocks``: also padded to whole blocks, as GPU
    kernels take them."""
    block_size: int = 0
    """Rows of a block; 0 without blocks."""

    def __post_init__(self) -> None:
        if isinstance(self.scale, int) and not isinstance(self.scale, bool):
            object.__setattr__(self, "scale", float(self.scale))
        bounds = {
            "experts": (1, _MAX_EXPERTS),
            "top_k": (1, self.experts),
            "groups": (1, self.experts),
            "top_groups": (1, self.groups),
            "block_size": (1, _MAX_BLOCK) if self.order == "blocks" else (0, 0),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                expected = str(least) if least == most else f"a whole number from {least} to {most}"
                raise TilewrightError(f"gating: {name}={value!r} is impossible; give {expected}")
        for name, choices in (("score", get_args(Score)), ("order", get_args(Order))):
            if getattr(self, name) not in choices:
                raise TilewrightError(
                    f"gating: unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        for name in ("renormalize", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise TilewrightError(f"gating: {name}={getattr(self, name)!r} is neither true nor false")
        if not isinstance(self.scale, float) or not math.isfinite(self.scale) or self.scale <= 0:
            raise TilewrightError(f"gating: scale={self.scale!r} is impossible; give a number above 0")
        self._require_possible_groups()

    def _require_possible_groups(self) -> None:
        if self.bias and self.score != "sigmoid":
            raise TilewrightError("gating: a bias takes part in the choice only with score=sigmoid; leave bias out")
        if self.experts % self.groups:
            raise TilewrightError(f"gating: groups={self.groups} does not divide the {self.experts} experts")
        if self.top_k > self.top_groups * self.group_size:
            raise TilewrightError(
                f"gating: top_k={self.top_k} is impossible with top_groups={self.top_groups} groups of "
                f"{self.group_size} experts"
            )
        if self.groups > 1 and self.score == "sigmoid" and self.group_size < 2:
            raise TilewrightError(f"gating: groups={self.groups} leaves one expert in a group; sigmoid scores two")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GatingSignature:
        """Signature from its JSON form.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        own = {name: value for name, value in values.items() if name != "op"}
        known = fields(cls)
        if unknown := sorted(own.keys() - {f.name for f in known}):
            raise TilewrightError(f"a gating signature has no field {unknown[0]!r}; this tilewright may be too old")
        if missing := [f.name for f in known if f.default is MISSING and f.name not in own]:
            raise TilewrightError(f"a gating signature lacks the field {missing[0]!r}; it was not written by to_dict")
        return cls(**own)

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> GatingSignature:
        """Signature from ``key=value`` texts.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise TilewrightError(f"gating has no field {unknown[0]!r}; --problem takes tokens, {', '.join(known)}")
        if missing := [name for name in ("experts", "top_k") if name not in values]:
            raise TilewrightError(f"--problem lacks {', '.join(missing)}; give for example experts=64,top_k=6")
        typed: dict[str, Any] = dict(values)
        for name, text in values.items():
            try:
                typed[name] = int(text) if name in _WHOLE else float(text) if name == "scale" else text
            except ValueError as error:
                raise TilewrightError(f"{name}={text!r} in --problem is not a number") from error
            if name in ("renormalize", "bias"):
                if text.lower() not in _TRUTH:
                    raise TilewrightError(f"{name}={text!r} in --problem is neither true nor false")
                typed[name] = _TRUTH[text.lower()]
        return cls(**typed)

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.experts // self.groups

    @property
    def ranks_by_score(self) -> bool:
        """Whether experts are ranked by sigmoid(logit) + bias; else by their logit, which orders them exactly."""
        return self.bias or (self.groups > 1 and self.score == "sigmoid")

    def padded_rows(self, tokens: int) -> int:
        """Most rows that whole blocks can take: every expert that has a choice may leave a block nearly empty."""
        choices = tokens * self.top_k
        partial = min(self.experts, choices) * (self.block_size - 1)
        return -(-(choices + partial) // self.block_size) * self.block_size

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Tensors of a call, in order.

        * ``logits`` [tokens, experts]; ``bias`` [experts]
        * ``topk_ids``, ``topk_weights`` [tokens, top_k]: best first
        * order ``rows`` or ``blocks``: ``expert_offsets`` [experts + 1], ``row_token`` [tokens, top_k] (one flat list
          of rows) and ``slot_row`` [tokens, top_k], as :class:`tilewright.codegen.routing.spec.TokenOrder` defines them
        * order ``blocks``: ``sorted_slots`` [padded], the slots token * top_k + j by expert, each expert's padded to
          whole blocks with tokens * top_k; ``block_experts`` [blocks], the expert of each block (0 beyond the last);
          ``padded_rows`` [1], how many of ``padded`` are in use. ``padded`` is :meth:`padded_rows` or more.
        """
        choices = ("tokens", self.top_k)
        specs = [TensorSpec("logits", "fp32", ("tokens", self.experts), values="logits")]
        if self.bias:
            specs.append(TensorSpec("bias", "fp32", (self.experts,), role="weight"))
        specs.append(TensorSpec("topk_ids", "int32", choices, role="output"))
        specs.append(TensorSpec("topk_weights", "fp32", choices, role="output"))
        if self.order != "none":
            specs.append(TensorSpec("expert_offsets", "int32", (self.experts + 1,), role="output"))
            specs.append(TensorSpec("row_token", "int32", choices, role="output"))
            specs.append(TensorSpec("slot_row", "int32", choices, role="output"))
        if self.order == "blocks":
            specs.append(TensorSpec("sorted_slots", "int32", ("padded",), role="output"))
            specs.append(TensorSpec("block_experts", "int32", ("blocks",), role="output"))
            specs.append(TensorSpec("padded_rows", "int32", (1,), role="output"))
        return tuple(specs)

    @property
    def size_name(self) -> str:
        """The size by which plans pick a kernel."""
        return "tokens"
