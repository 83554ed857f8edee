"""The static part of a moe_gemm problem, and the tensors of its calls. Light to import: the runtime needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tilewright.codegen.ops.fields import Choice, Truth, Whole, impossible
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import TensorSpec
from tilewright.errors import TilewrightError

Stage = Literal["up", "down", "plain"]
Activation = Literal["none", "swiglu", "geglu", "swiglu_clamped"]
"""How gate and up columns are joined. ``swiglu``: silu(gate) * up. ``geglu``: gelu(gate) * up, in its tanh form.
``swiglu_clamped`` (gpt-oss): see codegen/numbers/activations.py; weights and bias that a model stores interleaved are
sorted into halves when they are loaded."""


_DTYPES = ("fp32", "bf16", "fp16")
_MAX_SIZE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class MoeGemmSignature(Signature):
    """Grouped GEMM over experts. Weights are [experts, n (x2 with an activation: gate rows, then up rows), k].

    Raises:
        TilewrightError: when a field is impossible; the sentence names it.

    """

    op: ClassVar[str] = "moe_gemm"
    example: ClassVar[str] = "experts=8,n=2048,k=1024,top_k=2"
    assumed: ClassVar[Mapping[str, str]] = {"stage": "up"}

    stage: Annotated[
        Stage,
        Choice(
            "up: rows are gathered from tokens, and an activation may follow. down: rows are combined to tokens by "
            "their routing weights. plain: rows to rows."
        ),
    ]
    experts: Annotated[int, Whole("Experts on this rank.", 1, _MAX_SIZE)]
    n: Annotated[int, Whole("Output columns, after the activation.", 1, _MAX_SIZE)]
    k: Annotated[int, Whole("Length of the reduction.", 1, _MAX_SIZE)]
    top_k: Annotated[int, Whole("Experts that a token picks; 1 for plain.", 1, _MAX_SIZE)] = 1
    activation: Annotated[
        Activation, Choice("How gate and up columns are joined, for stage up; none: there are no gate columns.")
    ] = "none"
    bias: Annotated[bool, Truth("Whether a bias [experts, rows of the weight] is added.")] = False
    x_dtype: Annotated[str, Choice("Of inputs: fp32 for CPUs, bf16 or fp16 for GPUs.", _DTYPES)] = "fp32"
    w_dtype: Annotated[str, Choice("Of weights: that of the inputs.", _DTYPES, like="x_dtype")] = ""
    out_dtype: Annotated[str, Choice("Of outputs: that of the inputs, or fp32.", _DTYPES, like="x_dtype")] = ""

    def require_possible(self) -> None:
        """Activations and routing belong to stages; dtypes go together."""
        if self.stage != "up" and self.activation != "none":
            raise TilewrightError(
                f"moe_gemm: stage {self.stage!r} has no activation; leave activation={self.activation} out"
            )
        if self.stage == "plain" and self.top_k != 1:
            raise TilewrightError(f"moe_gemm: stage 'plain' knows no routing; leave top_k={self.top_k} out")
        given = f"moe_gemm with x_dtype={self.x_dtype}"
        if self.w_dtype != self.x_dtype:
            raise impossible(self, given, "w_dtype", self.x_dtype)
        if self.out_dtype not in (self.x_dtype, "fp32"):
            raise impossible(self, given, "out_dtype", f"{self.x_dtype} or fp32")

    @property
    def title(self) -> str:
        """The op and its stage."""
        return f"{self.op} {self.stage}"

    @property
    def halves(self) -> int:
        """2 when every output column needs a gate and an up column."""
        return 1 if self.activation == "none" else 2

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Tensors of a call, in order."""
        rows, k, n = "rows", self.k, self.n
        columns = self.halves * n
        offsets = TensorSpec("expert_offsets", "int32", (self.experts + 1,), values="offsets", bound=rows)
        return (
            TensorSpec("x", self.x_dtype, ("tokens" if self.stage == "up" else rows, k)),
            TensorSpec("weight", self.w_dtype, (self.experts, columns, k), role="weight"),
            *((TensorSpec("bias", "fp32", (self.experts, columns), role="weight"),) if self.bias else ()),
            *(
                (TensorSpec("row_token", "int32", (rows,), values="index", bound="tokens"),)
                if self.stage == "up"
                else ()
            ),
            offsets,
            *(self._routing_tensors() if self.stage == "down" else ()),
            TensorSpec("out", self.out_dtype, ("tokens" if self.stage == "down" else rows, n), role="output"),
        )

    def _routing_tensors(self) -> tuple[TensorSpec, ...]:
        shape = ("tokens", self.top_k)
        return (
            TensorSpec("slot_row", "int32", shape, values="slot", bound="rows"),
            TensorSpec("topk_weights", "fp32", shape, values="finite"),
        )

    @property
    def size_name(self) -> str:
        """The size by which plans pick a kernel."""
        return "rows" if self.stage == "plain" else "tokens"
