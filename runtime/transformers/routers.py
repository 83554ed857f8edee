"""Routers on tuned kernels, where they have a plan: logits as before, and what follows from them in one call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.errors import TilewrightError
from tilewright.runtime.serve.gate import Gate
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.transformers.inference import SharedByCopies, wants_gradients
from tilewright.runtime.transformers.specialised import Specialised, agree, random_rows, restore, specialise

_SERVED = "_tilewright_router"
_TRIAL_TOKENS = 24
_MATRIX = 2
"""Dimensions of one."""


class _Router(SharedByCopies):
    """What chooses for one module.

    Args:
        gate: a tuned one that puts rows in order, as plans for models do.
        flattens: whether the module takes [..., hidden] as that many tokens, and not only [tokens, hidden].

    """

    def __init__(self, gate: Gate, *, flattens: bool) -> None:
        self._gate = gate
        self.flattens = flattens
        self._local = threading.local()

    def route(self, module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights and ids (int64) of all tokens.

        Raises:
            TilewrightError: for logits that are not numbers.

        """
        weight: Tensor = module.weight
        logits = nn.functional.linear(hidden_states.reshape(-1, weight.shape[1]), weight, getattr(module, "bias", None))
        choices = logits.shape[0], self._gate.signature.top_k
        ids, weights = torch.empty(choices, dtype=torch.int32), torch.empty(choices)
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

    def forward(self, hidden_states: Tensor) -> Any:
        """Logits [tokens, experts], weights and ids (int64) [tokens, top_k] for ``hidden_states`` [tokens, hidden]."""
        module: Any = self
        router: _Router = getattr(self, _SERVED)
        if (
            hidden_states.dtype is torch.float32
            and (router.flattens or hidden_states.dim() == _MATRIX)
            and not torch.compiler.is_compiling()
            and not wants_gradients(module, hidden_states)
        ):
            # Logits that are not numbers are refused: what comes of them is up to the module.
            with contextlib.suppress(TilewrightError):
                return router.route(module, hidden_states)
        return super().forward(hidden_states)  # type: ignore[misc]  # of the class that this is mixed into


@torch.no_grad()
def serve_routers(model: nn.Module, options: ServeOptions) -> tuple[str, ...]:
    """Names of the modules of ``model`` that choose experts as a planned gate does, which serves them from now on."""
    served = []
    for name, module in model.named_modules():
        router = _router(module, options)
        if router is not None:
            setattr(module, _SERVED, router)
            specialise(module, TunedRouter)
            served.append(name)
    return tuple(served)


def release(module: nn.Module) -> None:
    """Undo what :func:`serve_routers` did to ``module``."""
    if isinstance(module, TunedRouter):
        restore(module)
        delattr(module, _SERVED)


def _router(module: Any, options: ServeOptions) -> _Router | None:
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not isinstance(weight, Tensor) or not isinstance(top_k, int) or weight.dim() != _MATRIX:
        return None
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return None
    for signature in _signatures(module, weight.shape[0], top_k):
        if not is_planned(signature, options):
            continue
        weights = {"bias": module.e_score_correction_bias} if signature.bias else {}
        gate = Gate.prepare(signature, weights, options=options)
        if not gate.is_tuned:
            continue
        x = random_rows(1, _TRIAL_TOKENS, weight.shape[1])
        for router, trial in ((_Router(gate, flattens=True), x), (_Router(gate, flattens=False), x[0])):
            if _serves(router, module, trial):
                return router
    return None


def _signatures(module: Any, experts: int, top_k: int) -> Iterator[GatingSignature]:
    """What ``module`` may compute, by the names that Transformers' routers give to their settings."""
    common: dict[str, Any] = {
        "experts": experts,
        "top_k": top_k,
        "groups": getattr(module, "num_group", 1),
        "top_groups": getattr(module, "topk_group", 1),
        "scale": float(getattr(module, "routed_scaling_factor", 1.0)),
        "order": "rows",
    }
    biased = hasattr(module, "e_score_correction_bias")
    for renormalize in (True, False):
        try:
            yield GatingSignature(
                score="sigmoid" if biased else "softmax", bias=biased, renormalize=renormalize, **common
            )
        except TilewrightError:
            return  # settings that no gate has


def _serves(router: _Router, module: nn.Module, x: Tensor) -> bool:
    """Whether ``router`` gives for ``x`` what the module gives, the choices of a token in any order."""
    try:
        theirs = module.forward(x)
    except (RuntimeError, ValueError):
        return False  # it wants tokens in a matrix
    ours = router.route(module, x)
    if not isinstance(theirs, tuple) or len(theirs) != len(ours) or not all(isinstance(t, Tensor) for t in theirs):
        return False
    return agree(_by_id(*ours), _by_id(*theirs))


def _by_id(logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    if ids.shape != weights.shape:
        return logits, weights, ids
    ordered, at = ids.sort(dim=-1)
    return logits, weights.gather(-1, at), ordered
