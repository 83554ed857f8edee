"""The static part of a moe_gemm problem, and the tensors of its calls. Light to import: the runtime needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

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

    stage: Stage
    experts: int
    """Experts on this rank."""
    n: int
    """Output columns, after the activation."""
    k: int
    """Length of the reduction."""
    top_k: int = 1
    activation: Activation = "none"
    bias: bool = False
    x_dtype: str = "fp32"
    """``fp32`` for CPUs, ``bf16`` or ``fp16`` for GPUs; weights are of the same, outputs of the same or fp32."""
    w_dtype: str = ""
    """Empty: as ``x_dtype``."""
    out_dtype: str = ""
    """Empty: as ``x_dtype``."""

    def __post_init__(self) -> None:
        for name in ("w_dtype", "out_dtype"):
            if getattr(self, name) == "":
                object.__setattr__(self, name, self.x_dtype)
        for name in ("experts", "n", "k", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
                raise TilewrightError(
                    f"moe_gemm: {name}={value!r} is impossible; give a whole number from 1 to {_MAX_SIZE}"
                )
        if self.stage not in get_args(Stage):
            raise TilewrightError(f"moe_gemm: unknown stage {self.stage!r}; choose one of {', '.join(get_args(Stage))}")
        if self.activation not in get_args(Activation):
            choices = ", ".join(get_args(Activation))
            raise TilewrightError(f"moe_gemm: unknown activation {self.activation!r}; choose one of {choices}")
        if self.stage != "up" and self.activation != "none":
            raise TilewrightError(
                f"moe_gemm: stage {self.stage!r} has no activation; leave activation={self.activation} out"
            )
        if self.stage == "plain" and self.top_k != 1:
            raise TilewrightError(f"moe_gemm: stage 'plain' knows no routing; leave top_k={self.top_k} out")
        if not isinstance(self.bias, bool):
            raise TilewrightError(f"moe_gemm: bias={self.bias!r} is neither true nor false")
        for name, supported in (
            ("x_dtype", _DTYPES),
            ("w_dtype", (self.x_dtype,)),
            ("out_dtype", tuple(dict.fromkeys((self.x_dtype, "fp32")))),
        ):
            if getattr(self, name) not in supported:
                choices = " or ".join(filter(None, (", ".join(supported[:-1]), supported[-1])))
                raise TilewrightError(f"moe_gemm: {name}={getattr(self, name)!r} is not supported; use {choices}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoeGemmSignature:
        """Signature from its JSON form.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        own = {name: value for name, value in values.items() if name != "op"}
        known = fields(cls)
        if unknown := sorted(own.keys() - {f.name for f in known}):
            raise TilewrightError(f"a moe_gemm signature has no field {unknown[0]!r}; this tilewright may be too old")
        if missing := [f.name for f in known if f.default is MISSING and f.name not in own]:
            raise TilewrightError(f"a moe_gemm signature lacks the field {missing[0]!r}; it was not written by to_dict")
        return cls(**own)

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> MoeGemmSignature:
        """Signature from ``key=value`` texts.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise TilewrightError(f"moe_gemm has no field {unknown[0]!r}; --problem takes tokens, {', '.join(known)}")
        if missing := [name for name in ("experts", "n", "k") if name not in values]:
            raise TilewrightError(
                f"--problem lacks {', '.join(missing)}; give for example experts=8,n=2048,k=1024,top_k=2"
            )
        typed: dict[str, Any] = {"stage": "up", **values}
        for name in ("experts", "n", "k", "top_k"):
            if name in values:
                try:
                    typed[name] = int(values[name])
                except ValueError as error:
                    raise TilewrightError(f"{name}={values[name]!r} in --problem is not a whole number") from error
        if "bias" in values:
            truth = {"true": True, "1": True, "false": False, "0": False}
            if values["bias"].lower() not in truth:
                raise TilewrightError(f"bias={values['bias']!r} in --problem is neither true nor false")
            typed["bias"] = truth[values["bias"].lower()]
        return cls(**typed)

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
