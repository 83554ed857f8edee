"""What was measured on a GPU, for people and as a document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tilewright.tuner.campaign.campaign import Report, Request, SignatureReport
from tilewright.tuner.campaign.standings import measured_document
from tilewright.tuner.commands.precision_front import front_table, point_document
from tilewright.tuner.commands.run_document import run_document
from tilewright.tuner.plan.constraint import Final
from tilewright.tuner.plan.facts import costs_text
from tilewright.tuner.prediction.quality import Quality
from tilewright.tuner.report.text import (
    format_interval,
    format_ratio,
    format_shape,
    format_us,
    table,
    terminal_width,
    wrapped,
)

_HEAD = ("tokens", "default", "tuned", "interval", "vs default", "noise", "kernel")
_NOTES = """\
a row is one race on the device: calls of all kernels in turn, each after a fill of memory larger than the L2 cache
default: the config that one would write down without tuning; vs: median of paired ratios with its 95 % interval
noise: a kernel raced with itself"""


@dataclass(frozen=True)
class MeasuredFindings:
    """A finished run on a GPU that is there."""

    report: Report
    request: Request
    database: str
    qualities: Mapping[str, Sequence[Quality]] = field(default_factory=dict)
    """How good predictions for the same kernels were, by the keys of signatures; empty where there were none."""

    @property
    def reports(self) -> list[Report]:
        """Of its one run."""
        return [self.report]

    def lines(self) -> list[str]:
        """A table per signature, on what evidence, and what to do next."""
        report, target = self.report, self.request.target
        lines = [""]
        for mine in report.signatures:
            lines += [
                format_shape(mine.signature.to_dict()),
                *self._table(mine),
                *_front(mine),
                *_plan(mine),
                *_predicted(self.qualities.get(mine.signature.key, ())),
                "",
            ]
        return [
            *lines,
            *_NOTES.splitlines(),
            "",
            f"measured on {target.device.name} ({self.request.arch.name}); every kernel checked there against fp64",
            *wrapped(self._conditions(), terminal_width()),
            f"{report.trials} trials in {report.wall_s:.0f} s: compiling {report.build_s:.0f} s, "
            f"checking {report.check_s:.0f} s, measuring {report.measure_s:.0f} s",
            f"stored in {self.database}",
            "",
            "next:  tune show                 what is known, and how",
            "       tune compare              variants side by side",
        ]

    def document(self) -> dict[str, Any]:
        """The same as JSON; every measured entry with its sample count, interval, error and conditions."""
        report, request = self.report, self.request
        return {
            **run_document(report, request, self.database),
            "device_name": request.target.device.name,
            "build_s": report.build_s,
            "check_s": report.check_s,
            "measure_s": report.measure_s,
            "signatures": [self._signature_document(mine) for mine in report.signatures],
        }

    def _table(self, mine: SignatureReport) -> list[str]:
        failed = len(mine.results) - len(mine.finals)
        return [
            *(table(_HEAD, [self._row(final) for final in mine.finals], width=terminal_width()) if mine.finals else []),
            *([f"{failed} of {len(mine.results)} sizes have no right kernel, or were not raced"] if failed else []),
        ]

    def _row(self, final: Final) -> Sequence[str]:
        tuned, speedup = final.winner_us, final.speedup
        noise = final.noise.noise if final.noise else None
        same = final.winner.variant.key == final.default.variant.key
        return (
            str(final.problem.size),
            format_us(final.default_us.median_us or math.inf),
            format_us(tuned.median_us or math.inf),
            format_interval(tuned.median_us or math.inf, tuned.low_us, tuned.high_us, len(tuned.samples_us)),
            format_ratio(speedup.median, speedup.low, speedup.high, speedup.pairs),
            "-" if noise is None else f"{noise:.1%}",
            "the default" if same else self.request.op.label(final.winner.variant.config),
        )

    def _conditions(self) -> str:
        """How calls were timed and how the device was meanwhile, over all last races."""
        told = [
            each.conditions
            for mine in self.report.signatures
            for final in mine.finals
            for each in (final.winner_us, final.default_us)
            if each.conditions
        ]
        if not told:
            return "nothing was timed"
        parts = [f"timed by {' and '.join(sorted({each['method'] for each in told}))}"]
        for name, unit in (("sm_clock_mhz", "MHz"), ("power_w", "W"), ("temperature_c", "degrees C")):
            known = [value for each in told for value in each.get(name, ())]
            if known:
                parts.append(f"{min(known):.0f}-{max(known):.0f} {unit}")
        reasons = sorted({reason for each in told for reason in each["throttled"]})
        if len(parts) == 1:
            return f"{parts[0]}; clocks are not known: there is no NVML"
        slowed = f"slowed down by {', '.join(reasons)}" if reasons else "never slowed down"
        return f"{', '.join(parts)}; {slowed}"

    def _signature_document(self, mine: SignatureReport) -> dict[str, Any]:
        return {
            "signature": mine.signature.to_dict(),
            "layout": mine.plan.layout if mine.plan else None,
            "facts": mine.plan.facts if mine.plan else None,
            "precision": mine.plan.precision if mine.plan else None,
            "error": mine.plan.error if mine.plan else None,
            "timing": mine.plan.timing if mine.plan else None,
            "checked": mine.plan.checked if mine.plan else None,
            "problems": [_final_document(final) for final in mine.finals],
            "front": [point_document(point) for point in mine.front],
            "plan": [asdict(entry) for entry in mine.plan.entries] if mine.plan else [],
            "prediction": [asdict(each) for each in self.qualities.get(mine.signature.key, ())],
            "unsolved": len(mine.results) - len(mine.finals),
        }


def _final_document(final: Final) -> dict[str, Any]:
    return {
        "size": final.problem.size,
        "kernel": final.winner.variant.key,
        "config": dict(final.winner.variant.config),
        "timing": final.winner_us.timing,
        "checked": final.winner_us.checked,
        "tuned": measured_document(final.winner_us),
        "default": measured_document(final.default_us),
        "speedup": asdict(final.speedup),
        "noise": final.noise.noise if final.noise else None,
        "conditions": final.winner_us.conditions,
    }


def _front(mine: SignatureReport) -> list[str]:
    """Time against error of the precisions that were raced; nothing where there is no choice."""
    if len(mine.front) < 2 or mine.plan is None:
        return []
    return [
        *front_table(mine.front, mine.front[0], mine.plan.precision),
        "error: ||out - exact|| / ||exact||, computed on a part of the problem with its whole reduction",
    ]


def _plan(mine: SignatureReport) -> list[str]:
    """What the plan came to."""
    if mine.plan is None or mine.verdict is None:
        return []
    kernels = len({entry.kernel_key for entry in mine.plan.entries})
    text = f"plan: {kernels} kernels over {len(mine.plan.entries)} ranges of sizes, distilled from "
    text += f"{mine.verdict.candidates}, which costs {mine.verdict.distilling_cost - 1:.1%}; "
    text += f"timing: {mine.plan.timing}, checked: {mine.plan.checked}"
    return [part for line in (*costs_text(mine.plan), text) for part in wrapped(line, terminal_width())]


def _predicted(found: Sequence[Quality]) -> list[str]:
    """How good the predictions were."""
    if not found:
        return []
    regret = math.exp(sum(math.log1p(each.regret) for each in found) / len(found)) - 1
    ranks = [each.rank_correlation for each in found if each.rank_correlation is not None]
    text = (
        f"prediction: at {len(found)} sizes its first choice is slower than the fastest by {regret:.1%} in the mean, "
    )
    text += f"{max(each.regret for each in found):.1%} at the most"
    if ranks:
        text += f"; its order agrees by {sum(ranks) / len(ranks):.2f} in the mean (Spearman, 1: the same)"
    return wrapped(text, terminal_width())
