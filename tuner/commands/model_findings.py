"""What a run over several ops of one model found: one table of all, and what that comes to in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.signature import Signature
from tilewright.tuner.campaign.campaign import Report
from tilewright.tuner.commands.findings import HEAD, NOTES, Findings
from tilewright.tuner.report.end_to_end import Pass, not_counted, passes, telling_names
from tilewright.tuner.report.text import format_ratio, format_shape, format_us, table, terminal_width, wrapped

_NEXT_STEPS = """
next:  tune show                 what is known, and how
       tune compare              variants side by side
       from tilewright.runtime.transformers import enable   serves a Transformers model so: enable(model)"""

_LESS_ATTENTION = (
    "less attention: what a Transformers model has of it, whose cache has no pages; attention of its decoding steps "
    "stays as it is"
)


@dataclass(frozen=True)
class ModelFindings:
    """Findings of every op, in the order in which they were tuned; at least one."""

    found: tuple[Findings, ...]
    model: ModelShape

    @property
    def reports(self) -> list[Report]:
        """Of the runs, one for each op."""
        return [findings.report for findings in self.found]

    def lines(self) -> list[str]:
        """Remarks on every plan, one table, the gain of a pass, and what to do next."""
        lines = [""]
        for findings in self.found:
            for mine in findings.report.signatures:
                lines += [format_shape(mine.signature.to_dict()), *findings.remarks(mine), ""]
        lines += [*self._table(), "", *NOTES.splitlines(), "", *self._gain(), ""]
        for findings in self.found:
            lines += [f"{findings.request.op.name}:", *(f"  {line}" for line in findings.evidence())]
        return [*lines, *_NEXT_STEPS.splitlines()]

    def document(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "model": self.model.name,
            "ops": [findings.document() for findings in self.found],
            "end_to_end": [each.document() for each in self._passes],
            "not_counted": self._not_counted,
        }

    @property
    def _signatures(self) -> list[Signature]:
        return [mine.signature for findings in self.found for mine in findings.report.signatures]

    @property
    def _passes(self) -> list[Pass]:
        return passes(
            self.model,
            [
                (mine.signature, [row for final in mine.finals if (row := findings.served(final.problem))])
                for findings in self.found
                for mine in findings.report.signatures
            ],
        )

    @property
    def _not_counted(self) -> list[str]:
        return [each.what for each in not_counted(self.model, self._signatures)]

    def _table(self) -> list[str]:
        names = telling_names(self._signatures)
        rows = [
            (names[mine.signature.key], *row)
            for findings in self.found
            for mine in findings.report.signatures
            for row in findings.rows(mine)
        ]
        lines = table(("op", *HEAD), rows, width=terminal_width()) if rows else []
        unsolved = sum(
            len(mine.results) - len(mine.finals) for findings in self.found for mine in findings.report.signatures
        )
        return [*lines, *([f"{unsolved} sizes have no right kernel"] if unsolved else [])]

    def _gain(self) -> list[str]:
        """What all of it comes to in a forward pass."""
        width, model = terminal_width(), self.model
        if not (found := self._passes):
            return wrapped(
                "no gain of a forward pass is stated: it takes sizes at which every op was raced against torch", width
            )
        rows = []
        for each in found:
            shares = ", ".join(f"{part.title} {part.torch_us / each.torch_us:.0%}" for part in each.parts)
            rows.append((f"{each.phase} {each.tokens}", *_times(each), shares))
            rest = each.without("attention")
            if each.phase == "decode" and rest.parts and rest != each:
                rows.append(("  less attention", *_times(rest), ""))
        layers = f"{model.layers} layers, {model.moe_layers} with experts"
        return [
            f"a forward pass of {model.name} ({layers}), as far as it was tuned:",
            *table(("pass", "torch", "tuned", "gain", "shares in torch"), rows, width=width),
            *wrapped(
                "gain: of measured times x calls, noise added in quadrature; decode N: a token for each of N "
                f"sequences; prefill N: N tokens{self._assumed()}{self._precisions()}",
                width,
            ),
            *([] if all(row[-1] for row in rows) else wrapped(_LESS_ATTENTION, width)),
            *wrapped(f"not counted: {', '.join(self._not_counted)}", width),
        ]

    def _assumed(self) -> str:
        """What problems hold beside their size."""
        each = (problem.assumes for findings in self.found for problem in findings.request.problems)
        return "".join(f"; {assumed}" for assumed in dict.fromkeys(each) if assumed)

    def _precisions(self) -> str:
        """What weights are stored in, where that is less than they have."""
        plans = [mine.plan for findings in self.found for mine in findings.report.signatures if mine.plan]
        fewer = sorted({plan.precision for plan in plans} - {LOSSLESS})
        return f"; weights stored as {', '.join(fewer)}, torch's in {LOSSLESS}" if fewer else ""


def _times(each: Pass) -> tuple[str, str, str]:
    return format_us(each.torch_us), format_us(each.tuned_us), format_ratio(*each.gain)
