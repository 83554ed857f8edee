"""What a tuning run found, for people and as a document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.problem import Problem
from tilewright.tuner.campaign.campaign import Report, Request, SignatureReport
from tilewright.tuner.campaign.precision import FrontPoint
from tilewright.tuner.campaign.standings import measured_document
from tilewright.tuner.commands.precision_front import front_table, point_document
from tilewright.tuner.commands.run_document import run_document
from tilewright.tuner.evaluation.statistics import Ratio
from tilewright.tuner.plan.constraint import Final
from tilewright.tuner.plan.deployed import Deployed
from tilewright.tuner.plan.facts import costs_text, probed_text
from tilewright.tuner.report.roofline import Achieved, Roofline, format_share
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
a row is one race of three, called in turn from Python: plain torch, the default (the config that
one would write down without tuning), and tuned (the plan as the runtime serves it)
vs: median of the ratios of neighbouring calls, with its 95 % interval
roofline: share of what bandwidth or peak allow here; >105%: the data comes from a cache
noise: a kernel raced with itself"""


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
            **run_document(report, request, self.database),
            "threads": request.target.location.threads,
            "templates": list(request.templates),
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
        """Of one race: the plan's as it is served, or where that was lost, the last one of the finalists."""
        noise = final.noise.noise if final.noise else None
        size, ending = str(final.problem.size), "-" if noise is None else f"{noise:.1%}"
        if served is None:
            tuned_us = final.winner_us.median_us or math.inf
            times = ("-", format_us(final.default_us.median_us or 0), format_us(tuned_us))
            ratios, name = (_ratio(final.speedup), "-"), self._name(final, final.winner.variant.key)
        else:
            tuned_us = served.served.median
            times = (
                format_us(served.torch.median),
                format_us(served.default.median) if served.default else "-",
                format_us(tuned_us),
            )
            ratios, name = (
                (_ratio(served.over_default), _ratio(served.over_torch)),
                self._name(final, served.kernel_key),
            )
        return size, *times, *ratios, format_share(self._roofline_share(final.problem, tuned_us)), ending, name

    def served(self, problem: Problem) -> Deployed | None:
        """The plan at ``problem`` raced against plain torch, where it was."""
        mine = next(each for each in self.report.signatures if each.signature == problem.signature)
        rows = mine.proof.rows if mine.proof else ()
        return next((row for row in rows if row.size == problem.size), None)

    def achieved(self) -> list[Achieved]:
        """Of what shares of the roofline are stated."""
        finals = [final for mine in self.report.signatures for final in mine.finals]
        served = [(final.problem, row.served.median) for final in finals if (row := self.served(final.problem))]
        raced = [(final.problem, final.winner_us.median_us) for final in finals]
        return [self._achieved(problem, time_us) for problem, time_us in (*served, *raced) if time_us]

    def _achieved(self, problem: Problem, time_us: float) -> Achieved:
        request = self.request
        work = request.op.workload(problem, request.op.inputs(problem, request.seed))
        return Achieved(work.flops, work.min_bytes, time_us)

    def _roofline_share(self, problem: Problem, time_us: float) -> float:
        return self.roofline.share(self._achieved(problem, time_us))

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
            "speedup": {
                "median": final.speedup.median,
                "low": final.speedup.low,
                "high": final.speedup.high,
                "samples": final.speedup.pairs,
            },
            "noise": final.noise.noise if final.noise else None,
            "roofline_share": self._roofline_share(final.problem, final.winner_us.median_us or math.inf),
            "deployed": None if served is None else self._deployed_document(final.problem, served),
        }

    def _deployed_document(self, problem: Problem, served: Deployed) -> dict[str, Any]:
        return {**served.document(), "roofline_share": self._roofline_share(problem, served.served.median)}

    def _name(self, final: Final, key: str | None) -> str:
        """Enough to recognise by what serves; ``the default`` where that does."""
        if key is None:
            return "torch"
        if key == final.default.variant.key:
            return "the default"
        mine = next(each for each in self.report.signatures if each.signature == final.problem.signature)
        raced = mine.verdict.grid if mine.verdict else ()
        config = next((finalist.built.variant.config for each in raced if (finalist := each.of(key))), None)
        return key[:8] if config is None else self.request.op.label(config)


def _ratio(ratio: Ratio | None) -> str:
    return "-" if ratio is None else format_ratio(ratio.median, ratio.low, ratio.high, ratio.pairs)


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
