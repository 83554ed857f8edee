"""Shapes of models, as one rank computes them: what there is of experts, routers, attention and linear layers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from tilewright.codegen.models.parts import (
    Activation,
    AttentionLayers,
    ExpertLayers,
    LeftOut,
    LinearLayers,
    RouterLayers,
    Score,
)
from tilewright.errors import TilewrightError

MAX_SIZE = 2**31 - 1
"""Largest size of one dimension: kernels and databases index with 32 bits."""
MAX_LAYERS = 10_000

_MAY_BE_ZERO = frozenset({"window", "latent_dim", "rope_dim", "decode", "prefill"})


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a language model is made of, as one rank of it computes it.

    Under tensor parallelism (``tp``) every rank holds every expert, but only ``inter`` of its columns. Under expert
    parallelism (``ep``) a rank holds ``experts`` whole experts out of ``ep`` times as many. Routing knows nothing of
    that: ``top_k`` stays the number of experts that a token picks among all, and a rank computes those picks that fall
    on its own experts, ``expected_rows`` of them.

    Raises:
        TilewrightError: for sizes that no model has.

    """

    name: str
    hidden: int
    """Elements of a token's hidden state."""
    layers: int
    moe_layers: int
    """Layers with experts, whether those can be tuned or not, out of ``layers``."""
    attention_layers: int
    """Layers with attention over all tokens or a window of them, whether it can be tuned or not."""
    shared_experts: int = 0
    """Experts of a layer that see every token, beside the routed ones; 0 for none."""
    experts: tuple[ExpertLayers, ...] = ()
    routers: tuple[RouterLayers, ...] = ()
    attention: tuple[AttentionLayers, ...] = ()
    linears: tuple[LinearLayers, ...] = ()
    """Outside of the experts, as far as they are known; ``left_out`` names the others."""
    left_out: tuple[LeftOut, ...] = ()
    """What the model computes beside all that."""
    tp: int = 1
    """Ranks that share every expert."""
    ep: int = 1
    """Ranks that share the set of experts."""

    def __post_init__(self) -> None:
        self._require_whole("layers", self.layers, least=1, most=MAX_LAYERS)
        for name in ("hidden", "tp", "ep"):
            self._require_whole(name, getattr(self, name), least=1)
        for name in ("moe_layers", "attention_layers", "shared_experts"):
            self._require_whole(name, getattr(self, name), least=0)
        for name in ("moe_layers", "attention_layers"):
            if getattr(self, name) > self.layers:
                raise self._error(f"{name}={getattr(self, name)} is more than layers={self.layers}")
        parts: tuple[Any, ...] = (*self.experts, *self.routers, *self.attention, *self.linears)
        for part in parts:
            for field in fields(part):
                if field.type == "int":
                    self._require_whole(
                        field.name, getattr(part, field.name), least=int(field.name not in _MAY_BE_ZERO)
                    )
        for experts in self.experts:
            if experts.activation not in get_args(Activation):
                raise self._error(f"the activation {experts.activation!r} is none of {', '.join(get_args(Activation))}")
            self._require_choice(experts.top_k, experts.experts * self.ep)
        for router in self.routers:
            if router.score not in get_args(Score):
                raise self._error(f"the score {router.score!r} is none of {', '.join(get_args(Score))}")
            self._require_choice(router.top_k, router.experts)
            if router.experts % router.groups or router.top_groups > router.groups:
                raise self._error(
                    f"groups={router.groups} must divide the {router.experts} experts, and be at least "
                    f"top_groups={router.top_groups}"
                )
        for attention in self.attention:
            if attention.heads % attention.kv_heads:
                raise self._error(f"heads={attention.heads} is not a multiple of kv_heads={attention.kv_heads}")

    def sharded(self, tp: int = 1, ep: int = 1) -> ModelShape:
        """Shape of one of ``tp * ep`` ranks that share this shape.

        Raises:
            TilewrightError: when ``tp`` does not divide ``inter`` or ``ep`` does not divide ``experts``.

        """
        for option, ranks in (("tp", tp), ("ep", ep)):
            if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
                raise self._error(f"{option} is {ranks!r}, but must be a whole number of ranks, 1 or more")
        return replace(
            self,
            experts=tuple(
                replace(
                    each,
                    inter=self._share("tp", tp, "expert intermediate size", each.inter),
                    experts=self._share("ep", ep, "number of experts", each.experts),
                )
                for each in self.experts
            ),
            tp=self.tp * tp,
            ep=self.ep * ep,
        )

    def heads_per_rank(self, attention: AttentionLayers) -> tuple[int, int]:
        """Query heads and key/value heads of one tensor-parallel rank; ranks beyond the latter share one.

        Raises:
            TilewrightError: when ``tp`` does not divide the query heads, or neither divides nor is a multiple of the
                key/value heads.

        """
        heads = self._share("tp", self.tp, "number of attention heads", attention.heads)
        if attention.kv_heads % self.tp and self.tp % attention.kv_heads:
            raise self._error(
                f"tp={self.tp} neither divides the {attention.kv_heads} key/value heads nor is a multiple of them; "
                "use one that does"
            )
        return heads, max(1, attention.kv_heads // self.tp)

    def why_without(self, op: str) -> str | None:
        """Why nothing of ``op`` is known of this model, in words; None where nothing says so."""
        reasons = [f"{each.what}: {each.why}" for each in self.left_out if each.op == op]
        return "; ".join(reasons) or None

    def _share(self, option: str, ranks: int, what: str, size: int) -> int:
        if size % ranks:
            fitting = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
            raise self._error(f"{option}={ranks} does not divide the {what} {size}; use one of {fitting}")
        return size // ranks

    def _require_choice(self, top_k: int, experts: int) -> None:
        if top_k > experts:
            raise self._error(f"each token picks top_k={top_k} experts, but there are only {experts}")

    def _require_whole(self, name: str, value: Any, least: int, most: int = MAX_SIZE) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._error(f"{name} is {value!r}, but must be a whole number from {least} to {most}")

    def _error(self, message: str) -> TilewrightError:
        return TilewrightError(f"model {self.name}: {message}")
