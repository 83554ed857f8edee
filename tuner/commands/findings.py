"""What a tuning run found, for people and as a document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.cpu_info import read_cpu_info
from tilewright.tuner.campaign import Report, Request, SignatureReport
from tilewright.tuner.deployed import Deployed
from tilewright.tuner.plan import Final
from tilewright.tuner.roofline import Roofline
from tilewright.tuner.standings import measured_document
from tilewright.tuner.text import format_ratio, format_shape, format_threads, format_us, table, terminal_width

_HEAD = ("tokens", "torch", "default", "tuned", "vs default", "vs torch", "roofline", "noise", "kernel")
_NOTES = """\
default: the config that one would write down without tuning, in one last race with the tuned one
torch: a loop over experts in plain torch, raced with the plan as the runtime serves it
roofline: share of what bandwidth or peak allow here; noise: the tuned kernel raced with itself"""


@dataclass(frozen=True)
class Findings:
    """A finished run, with what was measured after it."""

    report: Report
    request: Request
    deployed: dict[str, list[Deployed]]
    """By signature key: the stored plan as the runtime serves it, against plain torch."""
    roofline: Roofline
    database: str

    def text(self) -> str:
        """Several lines: a table per signature, on what evidence, and what to do next."""
        report, request, roofline = self.report, self.request, self.roofline
        lines = [""]
        for mine in report.signatures:
            lines += [format_shape(mine.signature.to_dict()), *self._table(mine)]
            if mine.layout is not None and mine.layout.cost > 1.005:
                lines.append(f"one weight layout for all sizes ({mine.layout.key}) costs {mine.layout.cost - 1:.1%}")
            lines.append("")
        lines += [
            *_NOTES.splitlines(),
            "",
            f"measured on {read_cpu_info().name}, {format_threads(request.threads)}, {request.arch.name}; "
            "every kernel checked against fp64",
            f"{report.trials} trials in {report.wall_s:.0f} s, {report.efficiency:.0%} of them spent compiling "
            f"({report.build_s:.0f} s), checking ({report.check_s:.0f} s), measuring ({report.measure_s:.0f} s)",
            f"roofline here: {roofline.peak_gflops:.0f} GFLOP/s, {roofline.bandwidth_gbps:.0f} GB/s",
            f"stored in {self.database}",
            "",
            "next:  tune show                 what is known, and how",
            "       tune compare              variants side by side",
            "       from tilewright.runtime import Experts   serves this by itself; see README",
        ]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """The same as JSON; every measured entry with its sample count, interval and error."""
        report, request = self.report, self.request
        return {
            "run": report.run_id,
            "op": request.op.name,
            "arch": request.arch.name,
            "device": read_cpu_info().key,
            "threads": request.threads,
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
        rows = [self._row(final, self._served(final)) for final in mine.finals]
        failed = len(mine.results) - len(mine.finals)
        return [
            *(table(_HEAD, rows, width=terminal_width()) if rows else []),
            *([f"{failed} of {len(mine.results)} sizes have no right kernel"] if failed else []),
        ]

    def _row(self, final: Final, served: Deployed | None) -> Sequence[str]:
        speedup = final.speedup
        return (
            str(final.problem.dynamic_size),
            format_us(served.torch.median) if served else "-",
            format_us(final.default_us.median_us or 0),
            format_us(final.winner_us.median_us or 0),
            format_ratio(speedup.median, speedup.low, speedup.high),
            format_ratio(served.speedup, served.speedup_low, served.speedup_high) if served else "-",
            f"{self._roofline_share(final):.0%}",
            f"{final.noise.noise:.1%}",
            _name(final),
        )

    def _served(self, final: Final) -> Deployed | None:
        rows = self.deployed.get(final.problem.signature.key, [])
        return next((row for row in rows if row.tokens == final.problem.dynamic_size), None)

    def _roofline_share(self, final: Final) -> float:
        request = self.request
        work = request.op.workload(final.problem, request.op.inputs(final.problem, request.seed))
        return self.roofline.time_us(work.flops, work.min_bytes) / (final.winner_us.median_us or math.inf)

    def _signature_document(self, mine: SignatureReport) -> dict[str, Any]:
        return {
            "signature": mine.signature.to_dict(),
            "layout": mine.layout.key if mine.layout else None,
            "layout_cost": mine.layout.cost if mine.layout else None,
            "problems": [self._final_document(final) for final in mine.finals],
            "unsolved": len(mine.results) - len(mine.finals),
        }

    def _final_document(self, final: Final) -> dict[str, Any]:
        served = self._served(final)
        return {
            "tokens": final.problem.dynamic_size,
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


def _name(final: Final) -> str:
    """The template and the register tile, enough to recognise a kernel; ``default`` where that won."""
    if final.winner == final.default:
        return "the default"
    config = final.winner.variant.config
    tile = [str(config[knob]) for knob in ("block_rows", "vectors") if config.get(knob) is not None]
    return " ".join([str(config["template"]).rpartition("/")[2], *(["x".join(tile)] if tile else [])])
