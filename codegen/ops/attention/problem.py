"""A problem of attention: a signature with tokens, and the lengths of their sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.fields import Truth, Whole
from tilewright.codegen.ops.problem import MAX_SIZE, Problem
from tilewright.codegen.routing.spec import RoutingSpec

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """A signature with ``tokens`` tokens of sequences that have ``context`` tokens on average.

    ``decode``: ``tokens`` sequences, one query each. ``prefill``: as many sequences as ``tokens`` make up. ``routing``
    says how uneven lengths are: ``balanced`` even, ``power-law`` skewed.
    """

    given: ClassVar[Mapping[str, int]] = {"tokens": 1, "context": DEFAULT_CONTEXT}

    signature: AttentionSignature
    tokens: Annotated[int, Whole("decode: sequences, one query each. prefill: tokens of all prompts.", 1, MAX_SIZE)]
    context: Annotated[int, Whole("Tokens that a sequence has on average.", 1, MAX_SIZE)]
    routing: RoutingSpec
    steep: Annotated[bool, Truth("Whether scores are far apart.")] = False

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
