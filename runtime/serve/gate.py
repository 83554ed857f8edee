"""The router of an expert layer: from logits to experts, weights and the order of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright.codegen.ops.gating.signature import GatingSignature, Order, Score
from tilewright.errors import TilewrightError
from tilewright.runtime.ops.gating import checked_bias
from tilewright.runtime.serve.handles import held
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.prepared import PreparedCall
from tilewright.runtime.torch.operators import define_operator
from tilewright.runtime.torch.readable import require_plain


class Gated(NamedTuple):
    """What a gate chose, for ``tokens`` tokens; the fields that its order does not make are None."""

    topk_ids: Tensor
    """int32 [tokens, top_k], best first."""
    topk_weights: Tensor
    """fp32 [tokens, top_k]."""
    expert_offsets: Tensor | None = None
    """int32 [experts + 1]: where each expert's rows begin and end."""
    row_token: Tensor | None = None
    """int32 [tokens * top_k]: the token of each row."""
    slot_row: Tensor | None = None
    """int32 [tokens, top_k]: the row of each choice."""
    sorted_slots: Tensor | None = None
    """int32 [padded]: token * top_k + j by expert, padded to whole blocks with tokens * top_k."""
    block_experts: Tensor | None = None
    """int32 [blocks]: the expert of each block; 0 beyond the last."""
    padded_rows: Tensor | None = None
    """int32 [1]: how many of ``sorted_slots`` are in use."""


class Gate(PreparedCall):
    """A router: ``gate(logits)`` chooses experts; see :class:`GatingSignature` for what its options mean.

    Args of :meth:`of` are the signature's fields, ``bias`` [experts] as a tensor, and :class:`ServeOptions`.
    ``gate.call(logits, topk_ids, topk_weights, ...)`` writes into tensors that the caller keeps, in the order of
    :class:`Gated`, without a level of Python.
    """

    __slots__ = ()

    signature: GatingSignature

    @classmethod
    def of(
        cls,
        experts: int,
        top_k: int,
        *,
        score: Score = "softmax",
        renormalize: bool = True,
        bias: Tensor | None = None,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        order: Order = "none",
        block_size: int = 0,
        options: ServeOptions = ServeOptions(),
    ) -> Gate:
        """Find the tuned kernels for a router; plain torch serves where there are none.

        It is served where its bias lies, and without one where the options say.

        Raises:
            TilewrightError: when the arguments do not fit together.

        """
        signature = GatingSignature(
            experts=experts,
            top_k=top_k,
            score=score,
            renormalize=renormalize,
            bias=bias is not None,
            groups=groups,
            top_groups=top_groups,
            scale=scale,
            order=order,
            block_size=block_size,
        )
        weights = {} if bias is None else {"bias": checked_bias(bias, experts)}
        return cls.prepare(signature, weights, options=options)

    def __call__(self, *tensors: Any) -> Gated:
        """Choose experts for ``logits`` [tokens, experts], fp32 on the gate's device; further tensors are outputs.

        Raises:
            TilewrightError: for tensors that do not fit, and logits without a softmax: NaN, +inf, or nothing but -inf
                (on a GPU only with ``check_values``).

        """
        if torch.compiler.is_compiling() and len(tensors) == 1:
            return Gated(*torch.ops.tilewright.gate(*tensors, self.handle))
        if tensors and isinstance(tensors[0], Tensor):
            require_plain(tensors[0], "gating: logits")
        passed = tensors if len(tensors) > 1 else (*tensors, *self.outputs(*tensors))
        gated = Gated(*self.call(*passed))
        return gated if gated.row_token is None else gated._replace(row_token=gated.row_token.view(-1))

    def outputs(self, logits: Tensor) -> list[Tensor]:
        """New outputs for ``logits``, as ``call`` takes them."""
        signature = self.signature
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
            raise TilewrightError(
                f"gating: logits must be a torch tensor [tokens, {signature.experts}]; it has {found}"
            )
        tokens = logits.shape[0]
        choices = (tokens, signature.top_k)
        ids, weights = (
            torch.empty(choices, dtype=torch.int32, device=logits.device),
            torch.empty(choices, dtype=torch.float32, device=logits.device),
        )
        if signature.order == "none":
            return [ids, weights]
        shapes: list[tuple[int, ...]] = [(signature.experts + 1,), choices, choices]
        if signature.order == "blocks":
            padded = signature.padded_rows(tokens)
            shapes += [(padded,), (padded // signature.block_size,), (1,)]
        return [ids, weights, *(torch.empty(shape, dtype=torch.int32, device=logits.device) for shape in shapes)]


def _gate(logits: Tensor, handle: int) -> list[Tensor]:
    """The fields of :class:`Gated` that the gate's order makes."""
    return [output for output in held(handle, Gate)(logits) if output is not None]


def _fake_gate(logits: Tensor, handle: int) -> list[Tensor]:
    outputs = held(handle, Gate).outputs(logits)
    return [output.view(-1) if place == _ROW_TOKEN else output for place, output in enumerate(outputs)]


_ROW_TOKEN = Gated._fields.index("row_token")

define_operator("gate(Tensor logits, int handle) -> Tensor[]", compute=_gate, fake=_fake_gate)
