"""What tuned kernels bring to a forward pass of a model, from what each op was measured to bring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.parts import LeftOut
from tilewright.codegen.ops.base import Phase
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.tuner.plan.deployed import Deployed

PHASES: tuple[Phase, ...] = ("decode", "prefill")
_NEVER = (
    LeftOut("norms", "no op computes them, and the runtime has a kernel of its own for some"),
    LeftOut("embeddings", "they are looked up"),
    LeftOut("Python", "what the model itself takes between the calls of kernels"),
)


@dataclass(frozen=True)
class Part:
    """One signature's share of a pass."""

    op: str
    title: str
    calls: float
    torch_us: float
    """Of all its calls in plain torch."""
    tuned_us: float
    """Of all its calls as the runtime serves them."""
    low_us: float | None
    """The least and the most that ``tuned_us`` may be, by the interval of the paired speed-up, where it has one."""
    high_us: float | None


@dataclass(frozen=True)
class Pass:
    """One forward pass, as far as its ops were tuned."""

    phase: Phase
    tokens: int
    """Sequences that decode one token each, or tokens of a prompt."""
    parts: tuple[Part, ...]

    @property
    def torch_us(self) -> float:
        """Of all parts in plain torch."""
        return sum(part.torch_us for part in self.parts)

    @property
    def tuned_us(self) -> float:
        """Of all parts as the runtime serves them."""
        return sum(part.tuned_us for part in self.parts)

    @property
    def gain(self) -> tuple[float, float | None, float | None]:
        """``torch_us / tuned_us`` with its 95 % interval; parts were measured apart, so that their noise is too.

        There is no interval where that of some part is not known.
        """
        torch, tuned = self.torch_us, self.tuned_us
        above = [part.high_us - part.tuned_us for part in self.parts if part.high_us is not None]
        below = [part.tuned_us - part.low_us for part in self.parts if part.low_us is not None]
        if len(above) < len(self.parts) or len(below) < len(self.parts):
            return torch / tuned, None, None
        return torch / tuned, torch / (tuned + math.hypot(*above)), torch / max(tuned - math.hypot(*below), 1e-9)

    def without(self, op: str) -> Pass:
        """The pass less its calls of ``op``."""
        return replace(self, parts=tuple(part for part in self.parts if part.op != op))

    def document(self) -> dict[str, Any]:
        """As JSON."""
        median, low, high = self.gain
        return {
            "phase": self.phase,
            "tokens": self.tokens,
            "torch_us": self.torch_us,
            "tuned_us": self.tuned_us,
            "gain": {"median": median, "low": low, "high": high},
            "parts": [
                {"part": part.title, "calls": part.calls, "torch_us": part.torch_us, "tuned_us": part.tuned_us}
                for part in self.parts
            ],
        }


def passes(model: ModelShape, measured: Sequence[tuple[Signature, Sequence[Deployed]]]) -> list[Pass]:
    """Passes of ``model`` at every size at which all signatures that such a pass calls were measured."""
    names = telling_names([signature for signature, _ in measured])
    found = []
    for phase in PHASES:
        called = [
            (signature, calls, {row.size: row for row in rows})
            for signature, rows in measured
            if (calls := find_op(signature.op).calls_per_pass(signature, model, phase))
        ]
        common = set.intersection(*(set(rows) for _, _, rows in called)) if called else set()
        found += [
            Pass(phase, tokens, tuple(_part(s.op, names[s.key], calls, rows[tokens]) for s, calls, rows in called))
            for tokens in sorted(common)
        ]
    return found


def telling_names(signatures: Sequence[Signature]) -> dict[str, str]:
    """Titles by key; of those that share one also the fields in which they differ."""
    fields = {signature.key: signature.to_dict() for signature in signatures}
    names = {}
    for signature in signatures:
        alike = [fields[other.key] for other in signatures if other.title == signature.title]
        differ = [name for name in alike[0] if len({str(each.get(name)) for each in alike}) > 1]
        own = [f"{name}={fields[signature.key][name]}" for name in differ]
        names[signature.key] = " ".join([signature.title, *own])
    return names


def _part(op: str, title: str, calls: float, row: Deployed) -> Part:
    """Times are tied to torch's by the paired speed-up, in which drift cancels."""
    torch, ratio = calls * row.torch.median, row.over_torch
    low, high = (bound and torch / bound for bound in (ratio.high, ratio.low))
    return Part(op, title, calls, torch, torch / ratio.median, low, high)


def not_counted(model: ModelShape, tuned: Sequence[Signature]) -> list[LeftOut]:
    """What a pass computes beside ``tuned``: what each op could compute of it, then what no op does."""
    left = [
        part
        for name, op in OPS.items()
        for part in op.left_out([signature for signature in tuned if signature.op == name], model)
    ]
    return [*left, *model.left_out, *_NEVER]
