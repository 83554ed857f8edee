"""``tune --dry-run``: what would be tuned, and what of a model would not; nothing is built, timed or written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.ops.signature import Signature
from tilewright.tuner.campaign.campaign import Request
from tilewright.tuner.campaign.precision import storable
from tilewright.tuner.report.end_to_end import PHASES, not_counted
from tilewright.tuner.report.text import table, terminal_width, wrapped

_TOLD = (
    *("stage", "experts", "n", "k", "top_k", "activation", "bias", "score", "renormalize", "groups", "top_groups"),
    *("heads", "kv_heads", "head_dim", "value_dim", "latent", "scale", "window", "sinks"),
)
"""Fields that tell signatures apart, for people."""
_HEAD = ("op", "what", "calls decode/prefill", "sizes", "configs")


@dataclass(frozen=True)
class _Row:
    """One signature of a request."""

    request: Request
    signature: Signature
    model: ModelShape | None

    @property
    def sizes(self) -> list[int]:
        """That it would be tuned at."""
        return [problem.size for problem in self.request.problems if problem.signature == self.signature]

    @property
    def calls(self) -> dict[str, float | None]:
        """Of a pass of the model by its phase; None without a model."""
        op, model = self.request.op, self.model
        return {
            phase: None if model is None else _whole(op.calls_per_pass(self.signature, model, phase))
            for phase in PHASES
        }

    @property
    def configs(self) -> int:
        """Of the space that would be searched for every size."""
        request, arch = self.request, self.request.arch
        precisions = storable(request.precisions, request.op.precisions(self.signature, arch), lambda _: None)
        return len(request.op.space(self.signature, arch, request.templates, precisions))

    def document(self) -> dict[str, Any]:
        """As JSON."""
        fields = {name: value for name, value in self.signature.to_dict().items() if name != "op"}
        return {
            "op": self.signature.op,
            "fields": fields,
            "calls": self.calls,
            "sizes": self.sizes,
            "configs": self.configs,
            "trials": self.request.trials * len(self.sizes),
        }

    def cells(self) -> tuple[str, ...]:
        """For people."""
        fields = self.signature.to_dict()
        shown = [
            f"{name}={_short(fields[name])}" for name in _TOLD if fields.get(name) not in (None, "", False, "none")
        ]
        calls = "/".join("-" if count is None else f"{count:g}" for count in self.calls.values())
        return self.signature.op, " ".join(shown), calls, ",".join(map(str, self.sizes)), str(self.configs)


@dataclass(frozen=True)
class DryRun:
    """What a run of ``requests``, all of one target, would do."""

    requests: tuple[Request, ...]
    model: ModelShape | None

    @property
    def estimated_s(self) -> float:
        """About how long it would take: a usual trial's time for each, within the time that it may take."""
        return sum(
            min(each.time_s, each.target.budget.trial_s * each.trials * len(each.problems)) for each in self.requests
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        model = self.model
        return {
            "model": None if model is None else model.name,
            "layers": None if model is None else model.layers,
            "moe_layers": None if model is None else model.moe_layers,
            "attention_layers": None if model is None else model.attention_layers,
            "shared_experts": None if model is None else model.shared_experts,
            "arch": self.requests[0].arch.name,
            "device": self.requests[0].target.device.key,
            "signatures": [row.document() for row in self._rows],
            "not_counted": [{"what": what, "why": why} for what, why in self._not_counted],
            "estimated_s": round(self.estimated_s),
        }

    def lines(self) -> list[str]:
        """For people."""
        width, model = terminal_width(), self.model
        lines = [f"{self.requests[0].arch.name}: nothing is built or written; this is what a run would tune", ""]
        if model is not None:
            lines += wrapped(
                f"{model.name}: {model.layers} layers, {model.moe_layers} with experts, {model.attention_layers} with "
                f"attention; shared experts of a layer: {model.shared_experts}",
                width,
            )
        lines += ["", *table(_HEAD, [row.cells() for row in self._rows], width=width), ""]
        for what, why in self._not_counted:
            lines += wrapped(f"not counted: {what}: {why}", width)
        return [*lines, "", f"about {self.estimated_s:.0f} s, most of it for trials (--time, --trials)"]

    @property
    def _rows(self) -> list[_Row]:
        return [
            _Row(request, signature, self.model)
            for request in self.requests
            for signature in dict.fromkeys(problem.signature for problem in request.problems)
        ]

    @property
    def _not_counted(self) -> list[tuple[str, str]]:
        if self.model is None:
            return []
        return [(each.what, each.why) for each in not_counted(self.model, [row.signature for row in self._rows])]


def dry_runs(requests: Sequence[Request], model: ModelShape | None) -> list[DryRun]:
    """One for each target of ``requests``."""
    return [DryRun(tuple(group), model) for _, group in itertools.groupby(requests, key=lambda request: request.target)]


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _whole(count: float) -> float:
    return int(count) if count == int(count) else count
