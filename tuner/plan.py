"""From what was measured to a plan: one weight layout, finalists raced again, switch points between tuned sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.ops.base import Problem
from tilewright.tuner.evaluation.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuner.evaluation.statistics import Ratio, beats, paired_ratio
from tilewright.tuner.loop import Candidate, ProblemResult, ProblemTuner, layout_key_of
from tilewright.tuner.variants import BuildResult
from tilewright.tuning_db.records import Outcome, PlanEntry, PlanRecord

FINALISTS = 4
"""Fastest candidates of a problem that are raced again beside the default."""


@dataclass(frozen=True)
class Layout:
    """The weight layout that all kernels of a plan share, and what sharing it costs."""

    key: str
    cost: float
    """Geometric mean, over the tuned sizes, of the best time in this layout against the best time in any."""


@dataclass(frozen=True)
class Final:
    """The verdict on one problem, from one last interleaved race."""

    problem: Problem
    winner: BuildResult
    winner_us: Evaluation
    default: BuildResult
    default_us: Evaluation
    speedup: Ratio
    """Default's time over the winner's."""
    noise: Ratio
    """The winner against itself."""


def choose_layout(results: Sequence[ProblemResult]) -> Layout | None:
    """Layout in which the tuned sizes together lose least; None when no problem has a right kernel.

    Only layouts in which every problem has a candidate can be chosen.
    """
    solved = [result for result in results if result.candidates]
    if not solved:
        return None
    found = [{layout_key_of(c.kernel) for c in result.candidates.values()} for result in solved]
    common = [Layout(key, 1.0) for key in sorted(set.intersection(*found))]
    return min((priced(layout, solved) for layout in common), key=lambda layout: layout.cost, default=None)


def priced(layout: Layout, results: Sequence[ProblemResult]) -> Layout:
    """``layout`` with its cost by what is known now."""
    solved = [result for result in results if result.candidates]
    losses = [r.ranked(layout.key)[0].time_us / r.ranked()[0].time_us for r in solved]
    return Layout(layout.key, math.exp(sum(map(math.log, losses)) / len(losses)))


def decide(tuner: ProblemTuner, evaluator: CpuEvaluator, layout: Layout, budget_s: float) -> Final | None:
    """Race the finalists of one problem; None when none of them was right any more.

    The winner has the smallest median; within the noise of the default, the default stays.
    """
    result = tuner.result
    finalists = [c.config for c in result.ranked(layout.key)[:FINALISTS]]
    if result.default not in finalists:
        finalists.append(result.default)
    raced = tuner.race_again(finalists, budget_s)
    right = [(built, evaluation) for built, evaluation in raced if evaluation.outcome is Outcome.OK]
    default = next((pair for pair in right if pair[0].variant.config == result.default), None)
    fitting = [pair for pair in right if pair[0].variant.layout_key == layout.key]
    if default is None or not fitting:
        return None
    winner = min(fitting, key=lambda pair: pair[1].median_us or math.inf)
    noise = evaluator.measure_noise(winner[0].kernel, result.problem, budget_s=budget_s / 4)
    against_default = paired_ratio(winner[1].samples_us, default[1].samples_us)
    if default in fitting and not beats(against_default, noise.noise):
        winner = default
    speedup = paired_ratio(default[1].samples_us, winner[1].samples_us)
    return Final(result.problem, *winner, *default, speedup, noise)


def distil(
    finals: Sequence[Final], layout: Layout, *, op: str, device_key: str, threads: int, model: str
) -> PlanRecord:
    """Plan of one signature: each winner serves the sizes around the one it was tuned at.

    Between two tuned sizes the switch is at their geometric mean: times grow by ratios, not by differences.
    """
    ordered = sorted(finals, key=lambda final: final.problem.dynamic_size)
    signature = ordered[0].problem.signature
    entries: list[PlanEntry] = []
    for final, following in zip(ordered, [*ordered[1:], None], strict=True):
        size = final.problem.dynamic_size
        bound = None if following is None else math.isqrt(size * following.problem.dynamic_size)
        entries.append(
            PlanEntry(
                max_tokens=bound,
                kernel_key=final.winner.variant.key,
                median_us=final.winner_us.median_us,
                default_us=final.default_us.median_us,
                tuned_tokens=size,
            )
        )
    return PlanRecord(
        op=op,
        signature_key=signature.key,
        signature=signature.to_dict(),
        device_key=device_key,
        threads=threads,
        layout=layout.key,
        timing="measured",
        checked="device",
        entries=tuple(entries),
        model=model,
    )


def kept(result: ProblemResult, count: int) -> list[Candidate]:
    """Candidates that the database keeps as kernels: the fastest few and the default."""
    fastest = result.ranked()[:count]
    default = result.candidates.get(result.default)
    return fastest if default is None or default in fastest else [*fastest, default]
