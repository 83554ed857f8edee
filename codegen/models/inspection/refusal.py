"""Why a part is left out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why no op computes a part of a model, in words that follow on the part's name."""

    reason: str
