"""Routers on tuned kernels, where they have a plan: logits as before, and what follows from them in one call.

A router is served where a planned gate is shown to do what it does: see :mod:`proof`.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.ops.gating import checked_bias
from tilewright.runtime.serve.gate import Gate
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.transformers.inference import SharedByCopies, wants_gradients
from tilewright.runtime.transformers.proof import ANOTHER_WAY, Readable, disproof, readable_tensors
from tilewright.runtime.transformers.recognition import Refusal
from tilewright.runtime.transformers.reports import LeftAlone
from tilewright.runtime.transformers.specialised import Specialised, has_own_forward, restore, specialise
from tilewright.runtime.transformers.trial import Call

_SERVED = "_tilewright_router"
_MATRIX = 2
"""Dimensions of one."""


class _Router(SharedByCopies):
    """What chooses for one module.

    Args:
        gate: a tuned one that puts rows in order, as plans for models do.
        readable: what of the module the gate reads.
        flattens: whether the module takes [..., hidden] as that many tokens, and not only [tokens, hidden].

    """

    def __init__(self, gate: Gate, readable: Readable, *, flattens: bool) -> None:
        self._gate = gate
        self._correction = operator.attrgetter(readable.correction) if readable.correction else None
        self._address = readable.tensors[readable.correction].data_ptr() if readable.correction else 0
        self.flattens = flattens
        self._local = threading.local()

    def reads(self, module: Any) -> bool:
        """Whether the parameters of ``module`` lie where they lay, in fp32; their values may be others."""
        weight: Tensor = module.weight
        try:
            in_place = self._correction is None or self._correction(module).data_ptr() == self._address
        except AttributeError:
            return False
        return in_place and weight.dtype is torch.float32 and weight.device.type == "cpu"

    def route(self, module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights and ids (int64) of all tokens.

        Raises:
            TilewrightError: for logits that are not numbers.

        """
        weight: Tensor = module.weight
        logits = nn.functional.linear(hidden_states.reshape(-1, weight.shape[1]), weight, getattr(module, "bias", None))
        choices = logits.shape[0], self._gate.signature.top_k
        ids, weights = (
            torch.empty(choices, dtype=torch.int32, device="cpu"),
            torch.empty(choices, dtype=torch.float32, device="cpu"),
        )
        self._gate.call(logits, ids, weights, *self._order(logits))
        return logits, weights, ids.long()

    def _order(self, logits: Tensor) -> list[Tensor]:
        """Where the calling thread's gate writes the order of rows, which Transformers does not ask for."""
        local = self._local
        if getattr(local, "tokens", None) != logits.shape[0]:
            with torch.inference_mode(mode=False):
                local.outputs = self._gate.outputs(logits)[2:]
            local.tokens = logits.shape[0]
        outputs: list[Tensor] = local.outputs
        return outputs


class TunedRouter(Specialised):
    """Serves fp32 on the CPU where no gradient is recorded."""

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Any:
        """Logits [tokens, experts], weights and ids (int64) [tokens, top_k] for ``hidden_states`` [tokens, hidden].

        A call with further arguments goes the way it went, and so does every call once a parameter lies elsewhere.
        """
        module: Any = self
        router: _Router = getattr(self, _SERVED)
        if (
            not others
            and not named
            and hidden_states.dtype is torch.float32
            and (router.flattens or hidden_states.dim() == _MATRIX)
            and not torch.compiler.is_compiling()
            and router.reads(module)
            and not wants_gradients(module, hidden_states)
        ):
            # Logits that are not numbers are refused: what comes of them is up to the module.
            with contextlib.suppress(TilewrightError):
                return router.route(module, hidden_states)
        return super().forward(hidden_states, *others, **named)  # type: ignore[misc]  # of the class mixed into


@torch.no_grad()
def serve_routers(
    model: nn.Module, calls: Mapping[str, Sequence[Call]], options: ServeOptions
) -> tuple[tuple[str, ...], tuple[LeftAlone, ...]]:
    """Names of the modules of ``model`` that a planned gate serves from now on, and those it could have, but for why.

    Args:
        model: whose modules are looked at.
        calls: what a forward calls them with, by name.
        options: which plans may serve.

    """
    served, left_alone = [], []
    known: dict[GatingSignature, bool] = {}
    for name, module in model.named_modules():
        found = _router(module, calls.get(name, ()), options, known)
        if isinstance(found, _Router):
            setattr(module, _SERVED, found)
            specialise(module, TunedRouter)
            served.append(name)
        elif found is not None:
            left_alone.append(LeftAlone(name, found.reason))
    return tuple(served), tuple(left_alone)


def release(module: nn.Module) -> None:
    """Undo what :func:`serve_routers` did to ``module``."""
    if isinstance(module, TunedRouter):
        restore(module)
        delattr(module, _SERVED)


def _router(
    module: Any, calls: Sequence[Call], options: ServeOptions, known: dict[GatingSignature, bool]
) -> _Router | Refusal | None:
    """What serves ``module``, or why nothing does; None for what is no router, or none that there is a plan for."""
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not isinstance(weight, Tensor) or not isinstance(top_k, int) or weight.dim() != _MATRIX:
        return None
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return None
    planned = [s for s in _signatures(module, weight.shape[0], top_k) if _is_planned(s, options, known)]
    if not planned:
        return None
    if has_own_forward(module):
        return Refusal("its router's forward was replaced in the module itself")
    if not calls:
        return Refusal("the forward that it was tried in does not call its router")
    if any(call.only_tensor is None for call in calls):
        return Refusal("its router is called with more than the hidden states")
    readable = readable_tensors(module)
    if isinstance(readable, Refusal):
        return readable
    why: Refusal | None = None
    for signature in planned:
        if signature.bias != bool(readable.correction):
            continue
        bias = readable.tensors[readable.correction] if signature.bias else None
        try:
            weights = {} if bias is None else {"bias": checked_bias(bias.view(-1), signature.experts)}
        except TilewrightError as error:
            return Refusal(f"its router's {readable.correction} cannot be read: {error}")
        gate = Gate.prepare(signature, weights, options=options)
        if not gate.is_tuned:
            continue
        in_matrices = all(call.args[0].dim() == _MATRIX for call in calls)
        for flattens in (True, False) if in_matrices else (True,):
            router = _Router(gate, readable, flattens=flattens)
            reason = disproof(module, router.route, signature, readable, calls, flattens=flattens)
            if reason is None:
                return router
            if why is None or reason != ANOTHER_WAY:  # which is said of every plan but its own
                why = Refusal(reason)
    return why or Refusal(f"no planned gate reads {readable.correction or 'what its router does'}")


def _is_planned(signature: GatingSignature, options: ServeOptions, known: dict[GatingSignature, bool]) -> bool:
    """Whether there is a plan for ``signature``; a model asks for the same in every layer."""
    if signature not in known:
        known[signature] = is_planned(signature, options)
    return known[signature]


def _signatures(module: Any, experts: int, top_k: int) -> Iterator[GatingSignature]:
    """What ``module`` may compute, by the names that Transformers' routers give to their settings."""
    common: dict[str, Any] = {
        "experts": experts,
        "top_k": top_k,
        "groups": getattr(module, "num_group", None) or 1,
        "top_groups": getattr(module, "topk_group", None) or 1,
        "scale": float(getattr(module, "routed_scaling_factor", None) or 1.0),
        "order": "rows",
    }
    for renormalize in (True, False):
        for choice in ({"score": "softmax"}, {"score": "sigmoid"}, {"score": "sigmoid", "bias": True}):
            with contextlib.suppress(TilewrightError):  # settings that no gate has
                yield GatingSignature(renormalize=renormalize, **choice, **common)
