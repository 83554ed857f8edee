"""What a tuning run for a GPU found without one, for people and as a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.codegen.hardware.devices import Device
from tilewright.codegen.ops.problem import Problem
from tilewright.tuner.campaign.campaign import KEPT_PER_PROBLEM, Report, Request, SignatureReport
from tilewright.tuner.campaign.loop import ProblemResult
from tilewright.tuner.campaign.variants import BuildResult
from tilewright.tuner.commands.precision_front import front_table, point_document
from tilewright.tuner.commands.run_document import run_document
from tilewright.tuner.plan.constraint import Final
from tilewright.tuner.plan.facts import costs_text
from tilewright.tuner.prediction.predict import Prediction, predict_config
from tilewright.tuner.prediction.resources import Resources
from tilewright.tuner.report.text import format_interval, format_shape, format_us, table, terminal_width, wrapped

_HEAD = ("tokens", "default", "tuned", "range", "vs default", "bound by", "registers", "blocks/SM", "checked", "kernel")
_NOTES = """\
Nothing was timed on a GPU: every time is what a model makes of the binary's registers, shared memory and spills.
default: the config that one would write down without tuning, compiled and predicted in the same way
range: nine of ten GEMM kernels on unseen devices were within it; the order of two kernels is surer than their times
bound by: the longest of the model's terms; checked: emulated is the source in Triton's interpreter, not the binary"""


@dataclass(frozen=True)
class PredictedFindings:
    """A finished run."""

    report: Report
    request: Request
    device: Device
    database: str

    @property
    def reports(self) -> list[Report]:
        """Of its one run."""
        return [self.report]

    def lines(self) -> list[str]:
        """A table per signature, on what evidence, and what to do next."""
        report, device = self.report, self.device
        lines = [""]
        for mine in report.signatures:
            lines += [
                format_shape(mine.signature.to_dict()),
                *self._table(mine),
                *self._front(mine),
                *_plan(mine),
                *_binaries(mine),
                "",
            ]
        lines += [
            *_NOTES.splitlines(),
            "",
            f"predicted for {device.name} ({self.request.arch.name}); compiled by {self.request.toolchains}",
            f"{report.trials} trials in {report.wall_s:.0f} s: compiling {report.build_s:.0f} s, "
            f"checking {report.check_s:.0f} s",
            f"stored in {self.database}",
            "",
            "next:  tune show                 what is known, and how",
            "       tune compare              variants side by side; two kernels: down to the machine code",
            f"       tune cost --model M --arch {self.request.arch.name}   time and money per token",
        ]
        return lines

    def document(self) -> dict[str, Any]:
        """The same as JSON; every time with its range and its evidence."""
        report, request = self.report, self.request
        return {
            **run_document(report, request, self.database),
            "templates": list(request.templates),
            "toolchain": self.request.toolchains,
            "build_s": report.build_s,
            "check_s": report.check_s,
            "signatures": [self._signature_document(mine) for mine in report.signatures],
        }

    def _table(self, mine: SignatureReport) -> list[str]:
        failed = len(mine.results) - len(mine.finals)
        return [
            *(table(_HEAD, [self._row(final) for final in mine.finals], width=terminal_width()) if mine.finals else []),
            *([f"{failed} of {len(mine.results)} sizes have no right kernel"] if failed else []),
        ]

    def _row(self, final: Final) -> Sequence[str]:
        tuned = final.winner_us
        prediction = self._prediction(final.problem, final.winner)
        main = max(final.winner.facts, key=lambda facts: facts.registers)
        spilled = "!" if any(facts.spills for facts in final.winner.facts) else ""
        same = final.winner.variant.key == final.default.variant.key
        return (
            str(final.problem.size),
            format_us(final.default_us.median_us or 0),
            format_us(tuned.median_us or 0),
            format_interval(tuned.median_us or 0, tuned.low_us, tuned.high_us),
            f"{final.speedup.median:.2f}x",
            bound_by(prediction),
            f"{main.registers}{spilled}",
            str(self._blocks_per_sm(final.winner)[0]),
            tuned.checked,
            "the default" if same else self.request.op.label(final.winner.variant.config),
        )

    def _front(self, mine: SignatureReport) -> list[str]:
        """Time against error of the precisions that were tried; nothing where there is no choice."""
        if len(mine.front) < 2 or mine.plan is None:
            return []
        return [
            *front_table(mine.front, mine.front[0], mine.plan.precision),
            "error: ||out - exact|| / ||exact||, computed on a part of the problem with its whole reduction",
        ]

    def _prediction(self, problem: Problem, built: BuildResult) -> Prediction:
        config = built.variant.config
        template = self.request.op.template(config)
        return predict_config(template, problem.signature, problem, config, self.device, built.facts)

    def _blocks_per_sm(self, built: BuildResult) -> list[int]:
        """Of each launch, the one with the most registers first."""
        ordered = sorted(built.facts, key=lambda facts: -facts.registers)
        return [Resources.of_binary(facts, 1).blocks_per_sm(self.device.arch) for facts in ordered]

    def _signature_document(self, mine: SignatureReport) -> dict[str, Any]:
        return {
            "signature": mine.signature.to_dict(),
            "layout": mine.plan.layout if mine.plan else None,
            "facts": mine.plan.facts if mine.plan else None,
            "problems": [self._final_document(final) for final in mine.finals],
            "precision": mine.plan.precision if mine.plan else None,
            "error": mine.plan.error if mine.plan else None,
            "timing": mine.plan.timing if mine.plan else None,
            "checked": mine.plan.checked if mine.plan else None,
            "front": [point_document(point) for point in mine.front],
            "plan": [asdict(entry) for entry in mine.plan.entries] if mine.plan else [],
            "binaries": dict(
                zip(
                    ("kept", "warned", "set_aside", "warned_defaults"),
                    (sum(column) for column in zip(*map(_warned, mine.results), strict=True)),
                    strict=True,
                )
            ),
            "unsolved": len(mine.results) - len(mine.finals),
        }

    def _final_document(self, final: Final) -> dict[str, Any]:
        prediction = self._prediction(final.problem, final.winner)
        return {
            "size": final.problem.size,
            "kernel": final.winner.variant.key,
            "config": dict(final.winner.variant.config),
            "timing": final.winner_us.timing,
            "checked": final.winner_us.checked,
            "error": final.winner_us.error,
            "tuned_us": final.winner_us.median_us,
            "low_us": final.winner_us.low_us,
            "high_us": final.winner_us.high_us,
            "default_us": final.default_us.median_us,
            "speedup": final.speedup.median,
            "terms_us": dict(prediction.terms),
            "facts": [facts.to_dict() for facts in final.winner.facts],
            "blocks_per_sm": self._blocks_per_sm(final.winner),
        }


def bound_by(prediction: Prediction) -> str:
    """Name of the longest of the terms."""
    return max(prediction.terms, key=lambda name: prediction.terms[name])


def _plan(mine: SignatureReport) -> list[str]:
    """What the plan came to."""
    if mine.plan is None or mine.verdict is None:
        return []
    kernels = len({entry.kernel_key for entry in mine.plan.entries})
    text = f"plan: {kernels} kernels over {len(mine.plan.entries)} ranges of sizes, distilled from "
    text += f"{mine.verdict.candidates}, which costs {mine.verdict.distilling_cost - 1:.1%}; "
    text += f"timing: {mine.plan.timing}, checked: {mine.plan.checked}"
    return [part for line in (*costs_text(mine.plan), text) for part in wrapped(line, terminal_width())]


def _binaries(mine: SignatureReport) -> list[str]:
    """How many of the kernels that were kept spill or load narrowly; and how many that seem faster were not."""
    told = [_warned(result) for result in mine.results if result.candidates]
    if not told:
        return []
    kept, warned, aside, defaults = (sum(column) for column in zip(*told, strict=True))
    text = f"binaries: of the fastest {KEPT_PER_PROBLEM} of each size {warned} of {kept} spill registers or load "
    text += f"less than 16 bytes of weights or keys at a time, and of the defaults {defaults} of {len(told)}; "
    text += f"{aside} that are predicted faster were set aside for that"
    return wrapped(text, terminal_width())


def _warned(result: ProblemResult) -> tuple[int, int, int, int]:
    """Kernels kept, those of them with performance_warnings, those set aside, and whether the default has any."""
    kept = result.finalists(KEPT_PER_PROBLEM)
    default = result.candidates.get(result.default)
    return (
        len(kept),
        sum(bool(result.performance_warnings(each.kernel)) for each in kept),
        len(result.set_aside(KEPT_PER_PROBLEM)),
        bool(default and result.performance_warnings(default.kernel)),
    )
