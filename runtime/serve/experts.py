"""The expert FFN of a mixture-of-experts layer as one thing: route, sort, up with activation, down with combine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.moe_gemm.signature import Activation
from tilewright.errors import TilewrightError
from tilewright.runtime.serve.buffers import AllocatedBuffers, BufferShapes, CallBuffers, KeptBuffers
from tilewright.runtime.serve.crossing import Crossing
from tilewright.runtime.serve.explanation import Explanation
from tilewright.runtime.serve.gate import Gate
from tilewright.runtime.serve.gemm import prepare
from tilewright.runtime.serve.handles import held, hold
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.serve.routing import device_routing, host_routing
from tilewright.runtime.torch.operators import define_operator
from tilewright.runtime.torch.plain import spare_torch_threads
from tilewright.runtime.torch.readable import require_plain
from tilewright.runtime.weights.experts import checked_weight


class Experts:
    """The experts of one layer: ``experts(x, router_logits)`` gives what the layer adds to the residual.

    It is served where the weights lie. Weights in memory serve tensors of a GPU, too: those go there and back.

    Args:
        w_up: fp32, on a GPU also bf16 or fp16 [experts, 2 * inter, hidden], gate rows before up rows; [experts, inter,
            hidden] without activation.
        w_down: of the same dtype [experts, hidden, inter].
        top_k: experts per token.
        activation: ``swiglu``, ``geglu``, ``swiglu_clamped`` (gpt-oss) or ``none``.
        bias_up: fp32, or of the weights' dtype [experts, rows of w_up], or None.
        bias_down: fp32, or of the weights' dtype [experts, hidden], or None.
        renormalize: whether a token's routing weights are made to sum to 1 after its experts were chosen.
        all_experts: experts of the whole model, when this rank holds only a part of them (expert parallelism); tokens
            are routed by the caller then, see :meth:`run`.
        options: which plans may serve each of the two stages, and how; routing is token by token in any case.

    Calls may come from any number of threads. On a CPU each has its own buffers, which are kept and grow to the largest
    call; on a GPU torch's allocator gives them, stream by stream, and a CUDA graph may record calls.

    Raises:
        TilewrightError: when the weights do not fit together, or ``top_k`` exceeds the experts.

    """

    def __init__(
        self,
        w_up: Any,
        w_down: Any,
        *,
        top_k: int,
        activation: Activation = "swiglu",
        bias_up: Any = None,
        bias_down: Any = None,
        renormalize: bool = True,
        all_experts: int | None = None,
        options: ServeOptions = ServeOptions(),
    ) -> None:
        w_up = checked_weight(w_up, what="Experts: w_up", dims="experts, rows, hidden")
        w_down = checked_weight(w_down, what="Experts: w_down", dims="experts, hidden, inter")
        self.experts, self.hidden, self.inter = w_down.shape
        expected = (self.experts, self.inter * (1 if activation == "none" else 2), self.hidden)
        if tuple(w_up.shape) != expected:
            raise TilewrightError(
                f"Experts: w_up has shape {list(w_up.shape)}, which does not fit w_down {list(w_down.shape)} with "
                f"activation {activation!r}; expected {list(expected)}"
            )
        if (w_up.device, w_up.dtype) != (w_down.device, w_down.dtype):
            raise TilewrightError(
                f"Experts: w_up is {w_up.dtype} on {w_up.device}, and w_down {w_down.dtype} on {w_down.device}; "
                "give both one dtype and one device"
            )
        self.all_experts = self.experts if all_experts is None else all_experts
        if not self.experts <= self.all_experts:
            raise TilewrightError(f"Experts: all_experts={all_experts} is less than the {self.experts} of this rank")
        if not 1 <= top_k <= self.all_experts:
            raise TilewrightError(f"Experts: top_k={top_k} is impossible with {self.all_experts} experts")
        self.top_k = top_k
        self.renormalize = renormalize
        self.up = prepare(w_up, stage="up", top_k=top_k, activation=activation, bias=bias_up, options=options)
        self.down = prepare(w_down, stage="down", top_k=top_k, bias=bias_down, options=options)
        self._call_up, self._call_down = self.up.call, self.down.call
        self._device = self.up.device.torch_device
        self._on_host = on_host = self.up.device.is_host
        shapes = BufferShapes(top_k, self.experts, self.inter, w_down.dtype, self._device)
        self._buffers = KeptBuffers(shapes) if on_host else AllocatedBuffers(shapes)
        self._routing = host_routing() if on_host else device_routing(check_values=options.check_values)
        self._crossing = Crossing()
        self._clears_inner = not on_host and self.down.reads_all_rows
        # A gate's plan may compute the same weights in several orders.
        self.gate = None if options.batch_invariant else self._tuned_gate(options)
        self.handle = hold(self)
        self._warm_up()

    def __call__(self, x: Tensor, router_logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Route by ``router_logits`` and compute.

        Args:
            x: [..., hidden], of the weights' dtype; on a GPU whose experts lie in memory any floating point one.
            router_logits: fp32, on a GPU any floating point dtype [..., experts], with the same leading dimensions.
            out: tensor like ``x`` to write, which may be ``x`` itself; made when None.

        Raises:
            TilewrightError: for tensors that do not fit, and logits that are not numbers (on a GPU only with
                ``check_values``).

        """
        if self.all_experts != self.experts:
            raise TilewrightError(
                f"this rank holds {self.experts} of {self.all_experts} experts and cannot route by itself; "
                "choose experts over all ranks and call run(x, topk_ids, topk_weights) with -1 for those of others"
            )
        if torch.compiler.is_compiling():
            return _into(out, torch.ops.tilewright.expert_ffn(x, router_logits, self.handle))
        if self._on_host and getattr(x, "is_cuda", False):
            return self._crossing.run(self, x, router_logits, out=out)
        logits = _rows(router_logits, self.experts, "router_logits", "experts")
        if not self._on_host:
            logits = logits.float()
        buffers = self._buffers.take(logits.shape[0])
        if self.gate is None:
            self._routing.choose(logits, self.renormalize, buffers.topk_ids, buffers.topk_weights)
            return self._compute(x, buffers.topk_ids, buffers.topk_weights, out, buffers)
        self.gate.call(
            logits,
            buffers.topk_ids,
            buffers.topk_weights,
            buffers.expert_offsets,
            buffers.row_token.view(-1, self.top_k),
            buffers.slot_row,
        )
        return self._compute(x, buffers.topk_ids, buffers.topk_weights, out, buffers, is_sorted=True)

    def run(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute with experts that were chosen before.

        Args:
            x: [..., hidden], of the weights' dtype; on a GPU whose experts lie in memory any floating point one.
            topk_ids: int32 or int64 [..., top_k]; -1 for an expert of another rank.
            topk_weights: fp32, on a GPU any floating point dtype [..., top_k].
            out: tensor like ``x`` to write, which may be ``x`` itself; made when None.

        Raises:
            TilewrightError: for tensors that do not fit, an expert id out of range, and weights that are not finite.
                On a GPU values are looked at only with ``check_values``; a pick out of range is one of another rank.

        """
        if torch.compiler.is_compiling():
            return _into(out, torch.ops.tilewright.routed_experts(x, topk_ids, topk_weights, self.handle))
        if self._on_host and getattr(x, "is_cuda", False):
            return self._crossing.run(self.run, x, topk_ids, topk_weights, out=out)
        ids = _rows(topk_ids, self.top_k, "topk_ids", "top_k")
        weights = _rows(topk_weights, self.top_k, "topk_weights", "top_k")
        if not self._on_host:
            weights = weights.float()
        return self._compute(x, ids, weights, out, self._buffers.take(ids.shape[0]))

    @property
    def memory_bytes(self) -> int:
        """What this holds beside the weights that it was made from: packed copies and this thread's buffers."""
        return self.up.memory_bytes + self.down.memory_bytes + self._buffers.held_bytes

    def workspace_bytes(self, tokens: int) -> int:
        """What a call of so many tokens needs beside its tensors: buffers, and the larger workspace of its kernels."""
        rows = tokens * self.top_k
        stages = [stage.workspace_bytes(tokens=tokens, rows=rows) for stage in (self.up, self.down)]
        gate = 0 if self.gate is None else self.gate.workspace_bytes(tokens=tokens)
        return self._buffers.shapes.bytes(tokens) + max(*stages, gate)

    def weights(self) -> dict[str, Tensor]:
        """``w_up`` and ``w_down``; see :meth:`tilewright.runtime.PreparedCall.weights`."""
        return {"w_up": self.up.weights()["weight"], "w_down": self.down.weights()["weight"]}

    def explain(self) -> tuple[Explanation, Explanation]:
        """What serves ``up`` and ``down``; see :meth:`tilewright.runtime.PreparedGemm.explain`."""
        return self.up.explain(), self.down.explain()

    @property
    def is_tuned(self) -> bool:
        """Whether a tuned kernel serves some size of either stage."""
        return self.up.is_tuned or self.down.is_tuned

    def _warm_up(self) -> None:
        """Call the kernels once for one token, so that no request pays for pages and threads that are touched first."""
        if not all(stage.is_always_tuned_for(1) for stage in (self.up, self.down)):
            return
        x = torch.zeros((1, self.hidden), dtype=self._buffers.shapes.dtype, device=self._device)
        if self.all_experts == self.experts:
            self(x, torch.zeros((1, self.experts), dtype=torch.float32, device=self._device))
        else:
            topk_ids = torch.zeros((1, self.top_k), dtype=torch.int32, device=self._device)
            self.run(x, topk_ids, torch.zeros((1, self.top_k), dtype=torch.float32, device=self._device))

    def _tuned_gate(self, options: ServeOptions) -> Gate | None:
        """What routes and sorts at once, where it was tuned for; else the runtime's own softmax and sort do."""
        if self.all_experts != self.experts:
            return None
        signature = GatingSignature(experts=self.experts, top_k=self.top_k, renormalize=self.renormalize, order="rows")
        options = replace(options, device=self._device)
        return Gate.prepare(signature, {}, options=options) if is_planned(signature, options) else None

    def _compute(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor | None,
        buffers: CallBuffers,
        *,
        is_sorted: bool = False,
    ) -> Tensor:
        """``is_sorted`` says that the order of rows is in the buffers already."""
        flat = _rows(x, self.hidden, "x", "hidden")
        tokens = flat.shape[0]
        if topk_ids.shape[0] != tokens:
            raise TilewrightError(f"Experts: x has {tokens} tokens, but {topk_ids.shape[0]} were routed")
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat_out = out if flat is x else self._flat_output(out, x)  # of a matrix, the call below checks the shape
        row_token, inner = buffers.row_token, buffers.inner
        if not is_sorted:
            rows = self._routing.sort(topk_ids, self.experts, row_token, buffers.expert_offsets, buffers.slot_row)
            if rows < buffers.rows:  # some choices are on other ranks
                row_token, inner = row_token[:rows], inner[:rows]
            if self._clears_inner:
                inner.zero_()
        self._call_up(flat, row_token, buffers.expert_offsets, inner)
        self._call_down(inner, buffers.expert_offsets, buffers.slot_row, topk_weights, flat_out)
        return out

    def _flat_output(self, out: Tensor, x: Tensor) -> Tensor:
        """``out`` as a matrix that shares its memory."""
        require_plain(out, "Experts: out")
        if out.shape != x.shape or not out.is_contiguous():
            raise TilewrightError(
                f"Experts: out has shape {list(out.shape)} and strides {list(out.stride())}; "
                f"expected a contiguous tensor {list(x.shape)}"
            )
        return out.view(-1, self.hidden)


def _rows(tensor: Tensor, columns: int, name: str, last: str) -> Tensor:
    """``tensor`` [..., columns] as a contiguous matrix.

    Raises:
        TilewrightError: when it is no tensor, or its last dimension is another.

    """
    if not isinstance(tensor, Tensor):
        raise TilewrightError(f"Experts: {name} is a {type(tensor).__name__}; expected a torch tensor [..., {columns}]")
    require_plain(tensor, f"Experts: {name}")
    shape = tensor.shape
    if len(shape) == 0 or shape[-1] != columns:
        raise TilewrightError(f"Experts: {name} has shape {list(shape)}; expected [..., {last}={columns}]")
    if len(shape) == 2 and tensor.is_contiguous():
        return tensor
    spare_torch_threads()
    return tensor.reshape(-1, columns).contiguous()


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """``result``, copied to ``out`` where one was passed: operators write no argument."""
    return result if out is None else out.copy_(result)


define_operator(
    "expert_ffn(Tensor x, Tensor router_logits, int handle) -> Tensor",
    compute=lambda x, router_logits, handle: held(handle, Experts)(x, router_logits),
    fake=lambda x, _router_logits, _handle: torch.empty_like(x, memory_format=torch.contiguous_format),
)
define_operator(
    "routed_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, int handle) -> Tensor",
    compute=lambda x, topk_ids, topk_weights, handle: held(handle, Experts).run(x, topk_ids, topk_weights),
    fake=lambda x, _topk_ids, _topk_weights, _handle: torch.empty_like(x, memory_format=torch.contiguous_format),
)
