"""A problem of gating: a signature with tokens, and how popular experts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.ops.base import Problem
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class GatingProblem(Problem):
    """A signature with ``tokens`` tokens whose logits make experts as popular as ``routing`` says.

    ``tied`` problems have many equal logits.
    """

    signature: GatingSignature
    tokens: int
    routing: RoutingSpec
    tied: bool = False

    def __post_init__(self) -> None:
        tokens = self.tokens
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MAX_TOKENS:
            raise TilewrightError(f"tokens={tokens!r} is impossible; give a whole number from 1 to {MAX_TOKENS}")

    @property
    def size(self) -> int:
        """Tokens."""
        return self.tokens

    @property
    def output_sizes(self) -> Mapping[str, int]:
        """Lengths of the padded order, at their largest."""
        if self.signature.order != "blocks":
            return {}
        padded = self.signature.padded_rows(self.tokens)
        return {"padded": padded, "blocks": padded // self.signature.block_size}

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON."""
        return {
            "signature": self.signature.to_dict(),
            "tokens": self.tokens,
            "routing": str(self.routing),
            "tied": self.tied,
        }
