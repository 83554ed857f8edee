"""One stage of an expert layer, ready to be called: its plan found, its weight packed, everything bound."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from tilewright.codegen.ops.moe_gemm_signature import Activation, MoeGemmSignature, Stage
from tilewright.errors import TilewrightError
from tilewright.runtime.calls import BoundCall, CallVariant, bind_call, pack_weight
from tilewright.runtime.explanation import Explanation, MemoryUse
from tilewright.runtime.fallback import fallback_for, spare_torch_threads
from tilewright.runtime.locks import fork_safe_lock
from tilewright.runtime.plans import Database, Resolution, SizeRange, resolve
from tilewright.runtime.weights import DeclaredWeights, ExpertWeights, PackedWeights, checked_bias, checked_weight

_live: weakref.WeakSet[PreparedGemm] = weakref.WeakSet()
_listing = fork_safe_lock()


class PreparedGemm:
    """A grouped GEMM bound to its weight: call it with the other tensors, in order, the output last.

    * ``up``: ``(x [tokens, k], row_token [rows], expert_offsets [experts + 1], out [rows, n])``
    * ``down``: ``(x [rows, k], expert_offsets, slot_row [tokens, top_k], topk_weights [tokens, top_k],
      out [tokens, n])``
    * ``plain``: ``(x [rows, k], expert_offsets, out [rows, n])``

    Floating point tensors are fp32, indices int32, all on the CPU. The call writes ``out`` and returns it, may be made
    from any thread, and raises TilewrightError for tensors that do not fit. ``call`` is the same without one level of
    Python, for loops in which a microsecond counts. Values are those that the weight had when it was prepared.
    """

    __slots__ = ("__weakref__", "_memory", "_resolution", "call", "signature", "threads")

    def __init__(
        self, signature: MoeGemmSignature, threads: int, call: BoundCall, resolution: Resolution, memory: MemoryUse
    ) -> None:
        self.signature = signature
        self.threads = threads
        self.call = call
        self._resolution = resolution
        self._memory = memory
        with _listing:
            _live.add(self)

    def __call__(self, *tensors: Any) -> Tensor:
        """Compute into the last tensor and return it."""
        out: Tensor = self.call(*tensors)
        return out

    @property
    def memory_bytes(self) -> int:
        """What this holds beside the weight that it was made from."""
        return self._memory.bytes

    @property
    def memory(self) -> MemoryUse:
        """Line of :func:`tilewright.runtime.memory_report`."""
        return self._memory

    def explain(self) -> Explanation:
        """Which kernel serves which sizes, on what evidence, and where torch does and why."""
        return Explanation(self._resolution, self.threads, self._memory)

    def __repr__(self) -> str:
        return f"<PreparedGemm {self.signature.describe()}, {len(self._resolution.kernels)} kernels>"


def live_prepared() -> list[PreparedGemm]:
    """Everything that is prepared in this process, in no particular order."""
    with _listing:
        return list(_live)


def prepare(
    weight: Any,
    *,
    stage: Stage,
    top_k: int = 1,
    activation: Activation = "none",
    bias: Any = None,
    threads: int | None = None,
    database: Database | None = None,
    max_error: float = 0.0,
    keep_weight: bool = True,
) -> PreparedGemm:
    """Find the tuned kernels for ``weight`` on this machine and pack it for them.

    Args:
        weight: fp32 [experts, n, k]; with an activation [experts, 2n, k], gate rows before up rows. It may be strided.
        stage: ``up``, ``down`` or ``plain``; see :class:`PreparedGemm`.
        top_k: experts per token; 1 for ``plain``.
        activation: ``swiglu`` or ``geglu`` join gate and up rows; for ``up`` only.
        bias: fp32 [experts, rows of the weight], or None.
        threads: threads of a call; None: ``torch.get_num_threads()``.
        database: path or SQLite URL; None: ``$TILEWRIGHT_DB``, else the user's own.
        max_error: largest relative error of the output that storing the weight in fewer bits may bring,
            ``||out - exact|| / ||exact||`` as it was measured when a plan was made; of the plans within it, the fastest
            serves. 0: only plans that leave the weight as it is.
        keep_weight: whether to refer to ``weight`` for sizes that torch serves. False reads them back from the packed
            copy, which is slower, and lets the owner free the original.

    Where there is no tuned kernel (no plan, another CPU, a damaged or untrusted database), plain torch serves, with
    one warning.

    Raises:
        TilewrightError: when the arguments do not fit together.

    """
    spare_torch_threads()
    what = f"moe_gemm {stage}: weight"
    weight = checked_weight(weight, what=what, dims="experts, n, k")
    experts, rows, k = weight.shape
    halves = 1 if activation == "none" else 2
    if rows % halves:
        raise TilewrightError(f"{what} has {rows} rows per expert; {activation} needs as many gate as up rows")
    signature = MoeGemmSignature(
        stage=stage, experts=experts, n=rows // halves, k=k, top_k=top_k, activation=activation, bias=bias is not None
    )
    if bias is not None:
        bias = checked_bias(bias, what=f"moe_gemm {stage}: bias", experts=experts, rows=rows)
    threads = _checked_threads(threads)
    resolution = resolve(signature, threads, database, checked_max_error(max_error))
    served, weights = _lay_out(weight, resolution, keep_weight)
    call = bind_call(
        signature.tensors(),
        # Without a kernel nobody reads the address of the weight, which may be strided then.
        {"weight": 0 if served is None else served.view(torch.float32), **({} if bias is None else {"bias": bias})},
        # Sizes beyond the end of a plan have no variant, so that meeting one is warned of.
        tuple(_variant(part) for part in resolution.ranges if part.entry is not None or resolution.plan is None),
        dynamic_size=signature.dynamic_size,
        threads=threads,
        fallback=fallback_for(signature, weights, bias),
        name=f"moe_gemm {stage}",
    )
    copied_bytes = 0 if served is None or served.data_ptr() == weight.data_ptr() else served.nbytes
    memory = MemoryUse(signature.describe(), copied_bytes, weight.nbytes)
    return PreparedGemm(signature, threads, call, resolution, memory)


def _lay_out(weight: Tensor, resolution: Resolution, keep_weight: bool) -> tuple[Tensor | None, ExpertWeights]:
    """The weight as the plan's kernels take it (None: there is no kernel), and as the fallback reads it."""
    if not resolution.kernels:
        return None, DeclaredWeights(weight)
    if resolution.layout is None:
        contiguous = weight.contiguous()
        return contiguous, DeclaredWeights(contiguous)
    packed = pack_weight(weight, resolution.layout)
    if keep_weight:
        return packed, DeclaredWeights(weight)
    return packed, PackedWeights(packed, resolution.layout, weight.shape[1], weight.shape[2])


def _variant(part: SizeRange) -> CallVariant:
    """One range of the plan as the call layer takes it; without launches, torch serves it."""
    if part.kernel is None:
        return CallVariant(part.max_size)
    recipe = part.kernel.recipe
    return CallVariant(
        part.max_size,
        part.kernel.launches,
        workspace_bytes=recipe.workspace_bytes,
        workspace_zeroed=recipe.workspace_zeroed,
        guards=recipe.guards,
        owner=part.kernel.artifacts,
    )


def checked_max_error(max_error: float) -> float:
    """``max_error`` as a finite number of at least 0.

    Raises:
        TilewrightError: when it is none.

    """
    if not isinstance(max_error, int | float) or not 0 <= max_error < math.inf:
        raise TilewrightError(f"max_error={max_error!r} is impossible; give a number of at least 0, such as 0.01")
    return float(max_error)


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise TilewrightError(f"threads={threads!r} is impossible; give a whole number of at least 1")
    return threads
