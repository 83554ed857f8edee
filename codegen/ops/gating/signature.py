"""The static part of a gating problem, and the tensors of its calls. Light to import: the runtime needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tilewright.codegen.ops.fields import Choice, Positive, Truth, Whole, impossible
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.errors import TilewrightError

Score = Literal["softmax", "sigmoid"]
Order = Literal["none", "rows", "blocks"]

_MAX_EXPERTS = 4096
_MAX_BLOCK = 1 << 16


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
    example: ClassVar[str] = "experts=64,top_k=6,score=softmax,order=rows"

    experts: Annotated[int, Whole("Experts of all ranks.", 1, _MAX_EXPERTS)]
    top_k: Annotated[int, Whole("Experts that a token picks.", 1, "experts")]
    score: Annotated[
        Score,
        Choice(
            "What a weight is made of: share in the softmax over all experts, or sigmoid of the expert's own logit."
        ),
    ] = "softmax"
    renormalize: Annotated[
        bool,
        Truth("Whether a token's weights are divided by their sum. With softmax: the softmax over the chosen alone."),
    ] = True
    bias: Annotated[
        bool, Truth("Whether a bias [experts] takes part in the choice, and not in the weights; for sigmoid.")
    ] = False
    groups: Annotated[int, Whole("Runs of equal length that experts are split into.", 1, "experts")] = 1
    top_groups: Annotated[int, Whole("Groups from which a token picks its experts: the best.", 1, "groups")] = 1
    scale: Annotated[float, Positive("Factor of all weights, applied last.")] = 1.0
    order: Annotated[
        Order,
        Choice(
            "rows: choices are sorted by expert as well, as moe_gemm takes them. blocks: also padded to whole blocks, "
            "as GPU kernels take them."
        ),
    ] = "none"
    block_size: Annotated[int, Whole("Rows of a block; 0 without blocks.", 0, _MAX_BLOCK)] = 0

    def require_possible(self) -> None:
        """Blocks have a size; a bias and groups fit the score and the experts."""
        blocks = self.order == "blocks"
        if blocks != bool(self.block_size):
            expected = f"a whole number from 1 to {_MAX_BLOCK}" if blocks else "0"
            raise impossible(self, f"{self.op} with order={self.order}", "block_size", expected)
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
