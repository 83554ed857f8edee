"""A problem of gating: a signature with tokens, and how popular experts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from tilewright.codegen.ops.fields import Truth, Whole
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.problem import MAX_SIZE, Problem
from tilewright.codegen.routing.spec import RoutingSpec


@dataclass(frozen=True)
class GatingProblem(Problem):
    """A signature with ``tokens`` tokens whose logits make experts as popular as ``routing`` says."""

    signature: GatingSignature
    tokens: Annotated[int, Whole("Tokens of a call.", 1, MAX_SIZE)]
    routing: RoutingSpec
    tied: Annotated[bool, Truth("Whether many logits are equal.")] = False

    @property
    def output_sizes(self) -> Mapping[str, int]:
        """Lengths of the padded order, at their largest."""
        if self.signature.order != "blocks":
            return {}
        padded = self.signature.padded_rows(self.tokens)
        return {"padded": padded, "blocks": padded // self.signature.block_size}
