"""A problem of moe_gemm: a signature with tokens and where they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Problem
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.routing.spec import RoutingSpec, TokenOrder, generate_topk_ids, sort_tokens
from tilewright.errors import TilewrightError

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class MoeGemmProblem(Problem):
    """A signature with ``tokens`` tokens, routed as ``routing`` says over ``all_experts`` experts.

    For ``plain``, which knows no tokens, they are rows. ``all_experts`` exceeds the signature's experts under expert
    parallelism; choices that fall on other ranks make no row here.
    """

    signature: MoeGemmSignature
    tokens: int
    routing: RoutingSpec
    all_experts: int

    def __post_init__(self) -> None:
        tokens, choices = self.tokens, self.all_experts
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MAX_TOKENS:
            raise TilewrightError(f"tokens={tokens!r} is impossible; give a whole number from 1 to {MAX_TOKENS}")
        if not isinstance(choices, int) or isinstance(choices, bool) or choices < self.signature.experts:
            raise TilewrightError(
                f"all_experts={choices!r} is impossible; give at least the {self.signature.experts} of this rank"
            )
        if self.signature.top_k > choices:
            raise TilewrightError(
                f"top_k={self.signature.top_k} is impossible; a token cannot pick more than "
                f"the {choices} experts there are"
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON."""
        return {
            "signature": self.signature.to_dict(),
            "tokens": self.tokens,
            "routing": str(self.routing),
            "all_experts": self.all_experts,
        }

    def order(self, seed: int) -> tuple[NDArray[np.int32], TokenOrder]:
        """Chosen experts [tokens, top_k] and the order of rows that they make; the same for the same seed."""
        topk_ids = generate_topk_ids(self.routing, self.tokens, self.all_experts, self.signature.top_k, seed)
        local = np.where(topk_ids < self.signature.experts, topk_ids, -1).astype(np.int32)
        return local, sort_tokens(local, self.signature.experts)
