"""What a tuning run found, for people and as a document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.base import Problem
from tilewright.tuner.campaign.campaign import Report, Request, SignatureReport
from tilewright.tuner.campaign.precision import FrontPoint
from tilewright.tuner.campaign.standings import measured_document
from tilewright.tuner.commands.precision_front import front_table, point_document
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuner.plan.constraint import Final
from tilewright.tuner.plan.deployed import Deployed
from tilewright.tuner.plan.facts import costs_text, probed_text
from tilewright.tuner.report.roofline import Roofline
from tilewright.tuner.report.text import (
    format_ratio,
    format_shape,
    format_threads,
    format_us,
    table,
    terminal_width,
    wrapped,
)

HEAD = ("tokens", "torch", "default", "tuned", "vs default", "vs torch", "roofline", "noise", "kernel")
NOTES = """\
default: the config that one would write down without tuning, in one last race with the tuned one
torch: the same in plain torch, raced with the plan as the runtime serves it
roofline: share of what bandwidth or peak allow here; noise: the tuned kernel raced with itself"""


@dataclass(frozen=True)
class Findings:
    """A finished run, with what was measured after it."""

    report: Report
    request: Request
    roofline: Roofline
    database: str

    @property
    def reports(self) -> list[Report]:
        """Of its one run."""
        return [self.report]

    def lines(self) -> list[str]:
        """A table per signature, on what evidence, and what to do next."""
        lines = [""]
        for mine in self.report.signatures:
            lines += [format_shape(mine.signature.to_dict()), *self._table(mine), *self.remarks(mine), ""]
        return [*lines, *NOTES.splitlines(), "", *self.evidence(), *self.next_steps()]

    def remarks(self, mine: SignatureReport) -> list[str]:
        """What a signature's plan came to, beside its times."""
        return [*self._front(mine), *self._plan(mine)]

    def rows(self, mine: SignatureReport) -> list[Sequence[str]]:
        """A row under :data:`HEAD` for every tuned size of a signature."""
        return [self._row(final, self.served(final.problem)) for final in mine.finals]

    def evidence(self) -> list[str]:
        """On what the times rest, and what they took."""
        report, request, roofline, target = self.report, self.request, self.roofline, self.request.target
        return [
            f"measured on {target.device.name}, {format_threads(target.location.threads)}, {request.arch.name}; "
            "every kernel checked against fp64",
            f"{report.trials} trials in {report.wall_s:.0f} s, {report.efficiency:.0%} of them spent compiling "
            f"({report.build_s:.0f} s), checking ({report.check_s:.0f} s), measuring ({report.measure_s:.0f} s)",
            f"roofline here: {roofline.peak_gflops:.0f} GFLOP/s, {roofline.bandwidth_gbps:.0f} GB/s",
            f"stored in {self.database}",
        ]

    def next_steps(self) -> list[str]:
        """What to do with the plans."""
        return [
            "",
            "next:  tune show                 what is known, and how",
            "       tune compare              variants side by side",
            f"       from tilewright.runtime import {', '.join(self.request.op.served_by)}   "
            "serves this by itself; see README",
        ]

    def document(self) -> dict[str, Any]:
        """The same as JSON; every measured entry with its sample count, interval and error."""
        report, request = self.report, self.request
        return {
            "run": report.run_id,
            "op": request.op.name,
            "arch": request.arch.name,
            "device": request.target.device.key,
            "threads": request.target.location.threads,
            "model": request.model,
            "templates": list(request.templates),
            "database": self.database,
            "trials": report.trials,
            "wall_s": report.wall_s,
            "efficiency": report.efficiency,
            "roofline": {
                "peak_gflops": self.roofline.peak_gflops,
                "bandwidth_gbps": self.roofline.bandwidth_gbps,
            },
            "signatures": [self._signature_document(mine) for mine in report.signatures],
        }

    def _table(self, mine: SignatureReport) -> list[str]:
        rows = self.rows(mine)
        failed = len(mine.results) - len(mine.finals)
        return [
            *(table(HEAD, rows, width=terminal_width()) if rows else []),
            *([f"{failed} of {len(mine.results)} sizes have no right kernel"] if failed else []),
        ]

    def _front(self, mine: SignatureReport) -> list[str]:
        """Time against error of the precisions that were tried; nothing where there is no choice."""
        exact = next((point for point in mine.front if point.precision == LOSSLESS), None)
        if len(mine.front) < 2 or mine.plan is None or exact is None:
            return []
        return [
            *front_table(mine.front, exact, mine.plan.precision),
            "error: ||out - exact|| / ||exact||, largest: max |out - exact| / max |exact|; at the worst size",
        ]

    def _plan(self, mine: SignatureReport) -> list[str]:
        """What the plan came to, and how it did at the sizes drawn at random."""
        if mine.plan is None:
            return []
        entries = mine.plan.entries
        kernels = len({entry.kernel_key for entry in entries if entry.kernel_key})
        by_torch = [str(entry.tuned_size) for entry in entries if entry.kernel_key is None]
        texts = costs_text(mine.plan)
        line = f"plan: {kernels} kernels over {len(entries)} ranges of sizes"
        if mine.verdict is not None:
            line += f", distilled from {mine.verdict.candidates}, which costs {mine.verdict.distilling_cost - 1:.1%}"
            measured = [str(crossing.last_below) for crossing in mine.verdict.crossings]
            line += f"; they hand over after {', '.join(measured)} (raced there)" if measured else ""
        line += f"; torch is faster around {', '.join(by_torch)} and serves there" if by_torch else ""
        texts += [line, probed_text(mine.plan)]
        return [part for text in texts if text for part in wrapped(text, terminal_width())]

    def _row(self, final: Final, served: Deployed | None) -> Sequence[str]:
        return (
            str(final.problem.size),
            format_us(served.torch.median) if served else "-",
            format_us(final.default_us.median_us or 0),
            format_us(final.winner_us.median_us or 0),
            format_ratio(*_interval(final.speedup)),
            format_ratio(*_interval(served.over_torch)) if served else "-",
            f"{self._roofline_share(final):.0%}",
            f"{final.noise.noise:.1%}",
            self._name(final),
        )

    def served(self, problem: Problem) -> Deployed | None:
        """The plan at ``problem`` raced against plain torch, where it was."""
        mine = next(each for each in self.report.signatures if each.signature == problem.signature)
        rows = mine.proof.rows if mine.proof else ()
        return next((row for row in rows if row.size == problem.size), None)

    def _roofline_share(self, final: Final) -> float:
        request = self.request
        work = request.op.workload(final.problem, request.op.inputs(final.problem, request.seed))
        return self.roofline.time_us(work.flops, work.min_bytes) / (final.winner_us.median_us or math.inf)

    def _signature_document(self, mine: SignatureReport) -> dict[str, Any]:
        return {
            "signature": mine.signature.to_dict(),
            "layout": mine.plan.layout if mine.plan else None,
            "batch_invariant": self.request.batch_invariant,
            "order_cost": mine.settled.order_cost if mine.settled else None,
            "distilling_cost": mine.verdict.distilling_cost if mine.verdict else None,
            "layout_cost": mine.settled.cost if mine.settled else None,
            "facts": mine.plan.facts if mine.plan else None,
            "switches": [asdict(crossing) for crossing in mine.verdict.crossings] if mine.verdict else [],
            "problems": [self._final_document(final) for final in mine.finals],
            "precision": mine.plan.precision if mine.plan else None,
            "error": mine.plan.error if mine.plan else None,
            "front": [_point_document(point) for point in mine.front],
            "plan": [asdict(entry) for entry in mine.plan.entries] if mine.plan else [],
            "probed": mine.plan.facts.get("probed") if mine.plan else None,
            "probes": [{"size": row.size, **row.document()} for row in (mine.proof.last if mine.proof else ())],
            "unsolved": len(mine.results) - len(mine.finals),
        }

    def _final_document(self, final: Final) -> dict[str, Any]:
        served = self.served(final.problem)
        return {
            "size": final.problem.size,
            "kernel": final.winner.variant.key,
            "config": dict(final.winner.variant.config),
            "timing": "measured",
            "checked": "device",
            "tuned": measured_document(final.winner_us),
            "default": measured_document(final.default_us),
            "speedup": {"median": final.speedup.median, "low": final.speedup.low, "high": final.speedup.high},
            "noise": final.noise.noise,
            "roofline_share": self._roofline_share(final),
            "deployed": None if served is None else served.document(),
        }

    def _name(self, final: Final) -> str:
        """Enough to recognise a kernel by; ``the default`` where that won."""
        return "the default" if final.winner == final.default else self.request.op.label(final.winner.variant.config)


def _interval(ratio: Ratio) -> tuple[float, float, float]:
    return ratio.median, ratio.low, ratio.high


def _point_document(point: FrontPoint) -> dict[str, Any]:
    return {
        **point_document(point),
        "problems": [
            {
                "size": final.problem.size,
                "kernel": final.winner.variant.key,
                **measured_document(final.winner_us),
            }
            for final in point.finals
        ],
    }
