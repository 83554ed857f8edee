"""One stage of an expert layer, ready to be called: moe_gemm prepared for a weight."""

from __future__ import annotations

from typing import Any

from tilewright.codegen.ops.moe_gemm.signature import Activation, MoeGemmSignature, Stage
from tilewright.errors import TilewrightError
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.prepared import PreparedCall
from tilewright.runtime.torch.dtypes import DTYPE_NAMES
from tilewright.runtime.weights.experts import checked_bias, checked_weight


class PreparedGemm(PreparedCall):
    """A grouped GEMM bound to its weight: call it with the other tensors, in order, the output last.

    * ``up``: ``(x [tokens, k], row_token [rows], expert_offsets [experts + 1], out [rows, n])``
    * ``down``: ``(x [rows, k], expert_offsets, slot_row [tokens, top_k], topk_weights [tokens, top_k],
      out [tokens, n])``
    * ``plain``: ``(x [rows, k], expert_offsets, out [rows, n])``

    ``x`` and ``out`` have the weight's dtype, routing weights are fp32, indices int32, all on the weight's device. The
    call writes ``out`` and returns it.
    """

    __slots__ = ()

    signature: MoeGemmSignature


def prepare(
    weight: Any,
    *,
    stage: Stage,
    top_k: int = 1,
    activation: Activation = "none",
    bias: Any = None,
    options: ServeOptions = ServeOptions(),
) -> PreparedGemm:
    """Find the tuned kernels for ``weight`` on its device and pack it for them.

    Args:
        weight: fp32, on a GPU also bf16 or fp16 [experts, n, k]; with an activation [experts, 2n, k], gate rows before
            up rows. It may be strided.
        stage: ``up``, ``down`` or ``plain``; see :class:`PreparedGemm`.
        top_k: experts per token; 1 for ``plain``.
        activation: ``swiglu``, ``geglu`` and ``swiglu_clamped`` (gpt-oss) join gate and up rows; for ``up`` only.
        bias: fp32, or of the weight's dtype [experts, rows of the weight], or None.
        options: which plans may serve, and how.

    Where there is no tuned kernel (no plan, another device, a damaged or untrusted database), plain torch serves, with
    one warning.

    Raises:
        TilewrightError: when the arguments do not fit together.

    """
    what = f"moe_gemm {stage}: weight"
    weight = checked_weight(weight, what=what, dims="experts, n, k")
    experts, rows, k = weight.shape
    halves = 1 if activation == "none" else 2
    if rows % halves:
        raise TilewrightError(f"{what} has {rows} rows per expert; {activation} needs as many gate as up rows")
    signature = MoeGemmSignature(
        stage=stage,
        experts=experts,
        n=rows // halves,
        k=k,
        top_k=top_k,
        activation=activation,
        bias=bias is not None,
        x_dtype=DTYPE_NAMES[weight.dtype],
    )
    weights = {"weight": weight}
    if bias is not None:
        weights["bias"] = checked_bias(bias, what=f"moe_gemm {stage}: bias", weight=weight)
    return PreparedGemm.prepare(signature, weights, options=options)
