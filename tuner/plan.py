"""From what was measured to a plan: one weight layout, finalists raced again, switch points between tuned sizes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.ops.base import Problem
from tilewright.codegen.precisions import LOSSLESS
from tilewright.codegen.space import Config
from tilewright.tuner.evaluation.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuner.evaluation.statistics import Ratio, beats, clearly_slower, paired_ratio
from tilewright.tuner.loop import Candidate, ProblemResult, ProblemTuner, layout_key_of
from tilewright.tuner.variants import BuildResult
from tilewright.tuning_db.records import Outcome, PlanEntry, PlanRecord

FINALISTS = 4
"""Fastest candidates of a problem, in each layout in question, that are raced again beside the default."""
_TOLERATED = 0.02
"""By which a size may be slower than its default before that speaks against a layout: what races here resolve."""


@dataclass(frozen=True)
class Layout:
    """The weight layout that all kernels of a plan share, and what sharing it costs."""

    key: str
    cost: float
    """Geometric mean, over the tuned sizes, of the best time in this layout against the best time in any."""


@dataclass(frozen=True)
class Finalist:
    """A kernel in the last race of a problem."""

    built: BuildResult
    evaluation: Evaluation

    @property
    def layout_key(self) -> str:
        """The weight layout that it reads."""
        return self.built.variant.layout_key

    @property
    def samples_us(self) -> NDArray[np.float64]:
        """Of the race, in order."""
        return np.asarray(self.evaluation.samples_us)

    @property
    def median_us(self) -> float:
        """Of the race; infinite when it was never timed."""
        return self.evaluation.median_us or math.inf


@dataclass(frozen=True)
class Raced:
    """The last race of one problem: who was right in it, the default among them."""

    problem: Problem
    right: tuple[Finalist, ...]
    default: Finalist

    @property
    def best(self) -> Finalist:
        """The fastest, whatever its layout."""
        return min(self.right, key=lambda finalist: finalist.median_us)

    def fastest(self, layout_key: str) -> Finalist | None:
        """The fastest of one layout."""
        fitting = [finalist for finalist in self.right if finalist.layout_key == layout_key]
        return min(fitting, key=lambda finalist: finalist.median_us, default=None)


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


def choose_layout(results: Sequence[ProblemResult], precision: str | None = None) -> str | None:
    """Key of the layout to search on in, of one precision if named; None when it has no layout for all problems.

    Of the layouts in which every problem has a candidate, those come first in which none is slower than the default,
    then the one in which the sizes together lose least.
    """
    solved = [result for result in results if result.candidates]
    if not solved:
        return None

    def loss(key: str) -> tuple[int, float]:
        best = [result.ranked(key)[0].time_us for result in solved]
        slower = sum(
            time_us > default.time_us * (1 + _TOLERATED)
            for result, time_us in zip(solved, best, strict=True)
            if (default := result.candidates.get(result.default))
        )
        return slower, _geometric_mean(
            [time_us / result.ranked()[0].time_us for result, time_us in zip(solved, best, strict=True)]
        )

    common = set.intersection(
        *(
            {
                layout_key_of(c.kernel)
                for c in result.candidates.values()
                if precision in (None, c.kernel.recipe.precision)
            }
            for result in solved
        )
    )
    return min(sorted(common), key=loss, default=None)


def race_finalists(tuner: ProblemTuner, layout_keys: Sequence[str], budget_s: float) -> Raced | None:
    """Race the fastest candidates of each layout and the default once more; None when the default was not right."""
    finalists = [c.config for key in layout_keys for c in tuner.result.ranked(key)[:FINALISTS]]
    return race_configs(tuner, finalists, budget_s)


def race_configs(tuner: ProblemTuner, configs: Sequence[Config], budget_s: float) -> Raced | None:
    """Race ``configs`` and the default; None when the default was not right."""
    result = tuner.result
    raced = tuner.race_again(list(dict.fromkeys([*configs, result.default])), budget_s)
    right = tuple(Finalist(*pair) for pair in raced if pair[1].outcome is Outcome.OK)
    default = next((finalist for finalist in right if finalist.built.variant.config == result.default), None)
    return None if default is None else Raced(result.problem, right, default)


def sizes_between(sizes: Sequence[int]) -> list[int]:
    """The geometric mean of each two neighbours among ascending ``sizes``, where it is neither of them."""
    means = [(math.isqrt(below * above), below) for below, above in itertools.pairwise(sizes)]
    return [mean for mean, below in means if mean > below]


def settle_layout(raced: Sequence[Raced]) -> Layout:
    """The layout of the plan: by the last race, not by the search's many short ones.

    A layout in which a size would be clearly slower than the default is taken only if there is no other, and the
    default's is always such another.
    """
    keys = dict.fromkeys(finalist.layout_key for each in raced for finalist in each.right)

    def loss(key: str) -> tuple[int, int, float]:
        fastest = [(each, best) for each in raced if (best := each.fastest(key))]
        slower = sum(clearly_slower(best.samples_us, each.default.samples_us, _TOLERATED) for each, best in fastest)
        return len(raced) - len(fastest), slower, priced(key, raced).cost

    return priced(min(keys, key=loss), raced)


def priced(layout_key: str, raced: Sequence[Raced]) -> Layout:
    """The layout with what it costs in the last race."""
    losses = [best.median_us / each.best.median_us for each in raced if (best := each.fastest(layout_key))]
    return Layout(layout_key, _geometric_mean(losses))


def slower_than_default(raced: Raced, kernel_key: str) -> bool:
    """Whether the kernel is slower than the default beyond the noise."""
    mine = next((each for each in raced.right if each.built.variant.key == kernel_key), None)
    return mine is None or clearly_slower(mine.samples_us, raced.default.samples_us, _TOLERATED)


def decide(raced: Raced, layout: Layout, evaluator: CpuEvaluator, budget_s: float) -> Final | None:
    """The winner of one problem within ``layout``; None when the layout has no finalist that was right.

    The winner has the smallest median; within the noise of the default, the default stays.
    """
    winner, default = raced.fastest(layout.key), raced.default
    if winner is None:
        return None
    noise = evaluator.measure_noise(winner.built.kernel, raced.problem, budget_s=budget_s)
    against_default = paired_ratio(winner.samples_us, default.samples_us)
    if default.layout_key == layout.key and not beats(against_default, noise.noise):
        winner = default
    speedup = paired_ratio(default.samples_us, winner.samples_us)
    return Final(raced.problem, winner.built, winner.evaluation, default.built, default.evaluation, speedup, noise)


def distil(
    finals: Sequence[Final],
    between: Sequence[Final],
    layout: Layout,
    *,
    op: str,
    device_key: str,
    threads: int,
    model: str,
    torch_us: Mapping[int, float] | None = None,
    precision: str = LOSSLESS,
    error: float = 0.0,
) -> PlanRecord:
    """Plan of one signature: each winner serves the sizes around the one that it won at.

    Where plain torch is faster still, at the sizes of ``torch_us``, torch serves.

    ``finals`` are of the tuned sizes. ``between``, the sizes at which only the winners of those were raced, gets an
    entry of its own where neither neighbour won. From one size to the next the switch is at their geometric mean:
    times grow by ratios, not by differences.
    """
    ordered = sorted([*finals, *between], key=lambda final: final.problem.dynamic_size)
    signature = ordered[0].problem.signature
    entries: list[PlanEntry] = []
    for final, following in zip(ordered, [*ordered[1:], None], strict=True):
        size = final.problem.dynamic_size
        bound = None if following is None else math.isqrt(size * following.problem.dynamic_size)
        by_torch = None if torch_us is None else torch_us.get(size)
        entry = PlanEntry(
            max_tokens=bound,
            kernel_key=final.winner.variant.key if by_torch is None else None,
            median_us=final.winner_us.median_us if by_torch is None else by_torch,
            default_us=final.default_us.median_us,
            tuned_tokens=size,
        )
        last = entries[-1] if entries else None
        if last is None or last.kernel_key != entry.kernel_key:
            entries.append(entry)
        elif final in between:
            entries[-1] = replace(last, max_tokens=bound)
        elif last.tuned_tokens in {each.problem.dynamic_size for each in between}:
            entries[-1] = entry
        else:
            entries.append(entry)
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
        precision=precision,
        error=error,
    )


def probe_sizes(largest: int, known: Collection[int], count: int, seed: int) -> list[int]:
    """Sizes in [1, largest] that are not ``known``, ascending; drawn so that every octave is as likely as any other."""
    draw = random.Random(seed)
    unknown = [size for size in range(1, largest + 1) if size not in known]
    drawn: set[int] = set()
    while len(drawn) < min(count, len(unknown)):
        size = round(math.exp(draw.uniform(0, math.log(largest))))
        if size not in known:
            drawn.add(size)
    return sorted(drawn)


def kept(result: ProblemResult, count: int) -> list[Candidate]:
    """Candidates that the database keeps as kernels: the fastest few and the default."""
    fastest = result.ranked()[:count]
    default = result.candidates.get(result.default)
    return fastest if default is None or default in fastest else [*fastest, default]


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
