"""A problem of moe_gemm: a signature with tokens and where they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.fields import Whole, impossible
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.problem import MAX_SIZE, Problem
from tilewright.codegen.routing.spec import RoutingSpec, TokenOrder, generate_topk_ids, sort_tokens
from tilewright.errors import TilewrightError

MAX_EXPERTS = 1 << 24


@dataclass(frozen=True)
class MoeGemmProblem(Problem):
    """A signature with ``tokens`` tokens, routed as ``routing`` says over ``all_experts`` experts.

    For ``plain``, which knows no tokens, they are rows. ``all_experts`` exceeds the signature's experts under expert
    parallelism; choices that fall on other ranks make no row here.
    """

    signature: MoeGemmSignature
    tokens: Annotated[int, Whole("Tokens of a call; of stage plain its rows.", 1, MAX_SIZE)]
    routing: RoutingSpec
    all_experts: Annotated[int, Whole("Experts of all ranks.", 1, MAX_EXPERTS)]

    def require_possible(self) -> None:
        """All ranks have the experts of this one, and as many as a token picks."""
        if self.all_experts < self.signature.experts:
            expected = f"at least the {self.signature.experts} of this rank"
            raise impossible(self, self.signature.op, "all_experts", expected)
        if self.signature.top_k > self.all_experts:
            raise TilewrightError(
                f"top_k={self.signature.top_k} is impossible; a token cannot pick more than "
                f"the {self.all_experts} experts there are"
            )

    def order(self, seed: int) -> tuple[NDArray[np.int32], TokenOrder]:
        """Chosen experts [tokens, top_k] and the order of rows that they make; the same for the same seed."""
        topk_ids = generate_topk_ids(self.routing, self.tokens, self.all_experts, self.signature.top_k, seed)
        local = np.where(topk_ids < self.signature.experts, topk_ids, -1).astype(np.int32)
        return local, sort_tokens(local, self.signature.experts)
