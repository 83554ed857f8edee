"""What measuring prepared kernels takes, known before any of it is done: launches, bytes and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.hardware.cores import usable_cores
from tilewright.codegen.numbers.dtypes import ITEMSIZE
from tilewright.codegen.ops.problem import Problem
from tilewright.tuner.campaign.prepared import Prepared
from tilewright.tuner.evaluation.device.kernel_race import BLOCK_US
from tilewright.tuner.evaluation.device.weights import declared_elements
from tilewright.tuner.evaluation.racing import RaceRules
from tilewright.tuner.plan.finals import LEAST_RACE_S, MOST_RACE_S, NOISE_RACE_S

_OPEN_S = 3.0
"""To start a worker and make a context."""
_REFERENCE_FLOPS_PER_S = 4e9
"""In fp64, of one core, on matrices; a guess on the low side."""
_DRAWN_BYTES_PER_S = 2e8
"""Of weights and inputs that one core draws, packs or converts; a guess on the low side."""
_COPIED_BYTES_PER_S = 3e9
"""To the device, from memory that is not pinned."""


@dataclass(frozen=True)
class ProblemEffort:
    """Of the race at one size."""

    size: int
    kernels: int
    """At the most."""
    checked_launches: int
    timed_launches: int
    """About so many, warm-up left out."""
    device_bytes: int
    """Copied to the device for this size, weights left out."""
    prepare_s: float
    """Drawing inputs, and the reference in fp64."""
    least_s: float
    """Of racing."""
    most_s: float


@dataclass(frozen=True)
class SignatureEffort:
    """Of all races of one signature."""

    prepared: Prepared
    problems: tuple[ProblemEffort, ...]
    weight_bytes: int
    """Copied to the device, in all layouts."""
    prepare_s: float
    """Starting, drawing and packing weights, and the awkward problems."""

    @property
    def least_s(self) -> float:
        """With the shortest races."""
        return self.prepare_s + sum(each.prepare_s + each.least_s for each in self.problems)

    @property
    def most_s(self) -> float:
        """With races at the sizes between and where kernels hand over, each as long as any may be."""
        return self.prepare_s + 3 * sum(each.prepare_s + each.most_s for each in self.problems)


def efforts(prepared: Sequence[Prepared], arch: Arch, top: int) -> list[SignatureEffort]:
    """One for each signature, with ``top`` kernels raced in each weight layout in question."""
    return [_effort(each, arch, top) for each in prepared]


def total_s(found: Sequence[SignatureEffort], time_s: float) -> float:
    """Seconds that a run takes at the most that may take ``time_s``.

    Once the time is over no race begins; what a race has begun to prepare by then, it finishes.
    """
    last = max((each.prepare_s + p.prepare_s + p.most_s for each in found for p in each.problems), default=0.0)
    return min(sum(each.most_s for each in found), time_s + last)


def _effort(prepared: Prepared, arch: Arch, top: int) -> SignatureEffort:
    op, signature, cores = prepared.op, prepared.signature, usable_cores()
    tensors = op.tensors(signature)
    elements = declared_elements(tensors)
    float_bytes = ITEMSIZE["fp32"] * elements
    layouts = len({plan.layout for plan in prepared.plans}) + 1
    awkward = len(op.awkward_problems(signature))
    problems = tuple(_problem_effort(prepared, problem, arch, top, layouts, awkward) for problem in prepared.problems)
    # Every awkward problem reads most weights once, for each precision.
    drawn = (1 + layouts + 2 * awkward * len(prepared.precisions)) * float_bytes
    prepare_s = _OPEN_S + drawn / (_DRAWN_BYTES_PER_S * cores) + layouts * float_bytes / _COPIED_BYTES_PER_S
    return SignatureEffort(prepared, problems, layouts * float_bytes // 2, prepare_s)


def _problem_effort(
    prepared: Prepared, problem: Problem, arch: Arch, top: int, layouts: int, awkward: int
) -> ProblemEffort:
    op, signature, cores = prepared.op, prepared.signature, usable_cores()
    candidates = prepared.candidates(problem)
    kernels = min(len(candidates), top * layouts + len(prepared.problems) + 1)
    config = op.default_for(problem, arch)
    template = op.template(config)
    launches = len(template.recipe(signature, config, arch).launches)
    flops = moved = 0.0
    if template.work is not None:
        for work in template.work(signature, config, arch, problem):
            flops += work.programs * work.steps * work.step_flops
            moved += work.dram_bytes
    input_bytes = op.input_bytes(problem)
    mean_us = sum(candidates.values()) / max(len(candidates), 1) or BLOCK_US
    timed_calls = min(RaceRules().max_samples * kernels * max(1.0, BLOCK_US / mean_us), MOST_RACE_S * 1e6 / mean_us)
    prepare_s = 2 * input_bytes / (_DRAWN_BYTES_PER_S * cores) + moved / (_DRAWN_BYTES_PER_S * cores)
    prepare_s += len(prepared.precisions) * flops / (_REFERENCE_FLOPS_PER_S * cores) + input_bytes / _COPIED_BYTES_PER_S
    return ProblemEffort(
        size=problem.size,
        kernels=kernels,
        checked_launches=kernels * (awkward + 2) * launches,
        timed_launches=round(timed_calls) * launches,
        device_bytes=input_bytes,
        prepare_s=prepare_s,
        least_s=LEAST_RACE_S + NOISE_RACE_S,
        most_s=MOST_RACE_S + NOISE_RACE_S,
    )
