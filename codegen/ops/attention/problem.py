"""A problem of attention: a signature with tokens, and the lengths of their sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.base import Problem
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError

MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """A signature with ``tokens`` tokens of sequences that have ``context`` tokens on average.

    ``decode``: ``tokens`` sequences, one query each. ``prefill``: as many sequences as ``tokens`` make up. ``routing``
    says how uneven lengths are: ``balanced`` even, ``power-law`` skewed. ``steep`` problems have scores far apart.
    """

    signature: AttentionSignature
    tokens: int
    context: int
    routing: RoutingSpec
    steep: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_TOKENS:
                raise TilewrightError(f"{name}={value!r} is impossible; give a whole number from 1 to {MAX_TOKENS}")

    @property
    def lengths_total(self) -> tuple[int, int]:
        """Tokens of all sequences together, and how many sequences there are."""
        if self.signature.stage == "decode":
            return self.tokens * self.context, self.tokens
        return self.tokens, -(-self.tokens // self.context)

    @property
    def assumes(self) -> str:
        """How long sequences are that tokens are added to."""
        return f"attention to {self.context} tokens" if self.signature.stage == "decode" else ""

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON."""
        return {
            "signature": self.signature.to_dict(),
            "tokens": self.tokens,
            "context": self.context,
            "routing": str(self.routing),
            "steep": self.steep,
        }
