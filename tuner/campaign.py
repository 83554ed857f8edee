"""A whole tuning run: every problem of every signature, then a plan per signature."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from tilewright import __version__
from tilewright.codegen.archs import Arch
from tilewright.codegen.building.cpp import CppBuilder
from tilewright.codegen.cpu_info import read_cpu_info
from tilewright.codegen.ops.base import OpDeclaration, Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.space import Config
from tilewright.tuner.evaluation.evaluator import CpuEvaluator
from tilewright.tuner.loop import FINAL_RACE, Budget, Origin, ProblemResult, ProblemTuner
from tilewright.tuner.plan import Final, Layout, choose_layout, decide, distil, kept_kernels
from tilewright.tuner.progress import Progress
from tilewright.tuner.search import Prior
from tilewright.tuner.variants import Workshop
from tilewright.tuning_db.records import DeviceRecord, PlanRecord, TrialRecord
from tilewright.tuning_db.store import Store

_KEPT_PER_PROBLEM = 6
"""Kernels of a problem that the database keeps, source and bytes, beside every trial's config."""
_PRIOR_CONFIGS = 12
"""Fastest configs of a neighbouring problem that a search is told of."""
_FINAL_SHARE = 0.2
"""Of a problem's time, for the last race among its finalists."""


@dataclass(frozen=True)
class Request:
    """What to tune, and within which budget."""

    op: OpDeclaration[Any, Any]
    problems: tuple[Problem, ...]
    """Grouped by signature, ascending in size within each."""
    arch: Arch
    threads: int
    trials: int
    """Per problem."""
    time_s: float
    """For everything, finals included."""
    search: str
    seed: int
    resume: bool
    model: str


@dataclass
class SignatureReport:
    """What a run found for one signature."""

    signature: Signature
    results: list[ProblemResult] = field(default_factory=list)
    layout: Layout | None = None
    finals: list[Final] = field(default_factory=list)
    plan: PlanRecord | None = None


@dataclass
class Report:
    """What a run found and where its time went."""

    run_id: str
    signatures: list[SignatureReport] = field(default_factory=list)
    wall_s: float = 0.0
    build_s: float = 0.0
    check_s: float = 0.0
    measure_s: float = 0.0
    prepare_s: float = 0.0

    @property
    def trials(self) -> int:
        """Trials of all problems."""
        return sum(result.trials for report in self.signatures for result in report.results)

    @property
    def efficiency(self) -> float:
        """Share of the wall time that went into compiling, checking and measuring."""
        return (self.build_s + self.check_s + self.measure_s) / self.wall_s if self.wall_s else 0.0


class Campaign:
    """Runs a request against a store."""

    def __init__(self, request: Request, store: Store, progress: Progress) -> None:
        self._request = request
        self._store = store
        self._progress = progress
        self._device_key = read_cpu_info().key
        self._builder = CppBuilder(request.arch)

    def run(self) -> Report:
        """Tune everything; interrupted, all finished trials are in the store already.

        Raises:
            TilewrightError: for a problem that does not fit this machine.

        """
        begin = time.monotonic()
        run = self._start_run()
        report = Report(run.id)
        deadline = begin + self._request.time_s
        groups = list(_by_signature(self._request.problems))
        left = len(self._request.problems)
        for signature, problems in groups:
            report.signatures.append(self._tune_signature(run.id, signature, problems, left, deadline, report))
            left -= len(problems)
        self._store.finish_run(run.id)
        report.wall_s = time.monotonic() - begin
        return report

    def _start_run(self) -> Any:
        cpu = read_cpu_info()
        facts = {
            "l1d_bytes": cpu.l1d_bytes,
            "l2_bytes": cpu.l2_bytes,
            "l3_bytes": cpu.l3_bytes,
            "memory_bytes": cpu.memory_bytes,
            "features": sorted(cpu.features),
        }
        self._store.put_device(DeviceRecord(cpu.key, cpu.name, self._request.arch.name, facts))
        versions = {
            "tilewright": __version__,
            "python": platform.python_version(),
            "optuna": optuna.__version__,
            "toolchain": self._builder.toolchain,
        }
        return self._store.start_run(shlex.join(["tune", *sys.argv[1:]]), versions=versions, host=platform.node())

    def _tune_signature(
        self, run_id: str, signature: Signature, problems: Sequence[Problem], left: int, deadline: float, report: Report
    ) -> SignatureReport:
        request = self._request
        mine = SignatureReport(signature)
        workshop = Workshop(request.op, signature, request.arch, self._builder)
        origin = Origin(run_id, self._device_key, request.threads, request.seed, request.search)
        space = request.op.space(signature, request.arch)
        self._progress.say(f"{signature.describe()}")
        self._progress.say(space.describe().splitlines()[0])
        with CpuEvaluator(request.op, signature, threads=request.threads, seed=request.seed) as evaluator:
            tuners: list[tuple[ProblemTuner, ProblemResult, float]] = []
            for done, problem in enumerate(problems):
                share = max(0.0, deadline - time.monotonic()) / (left - done)
                tuner = ProblemTuner(
                    problem,
                    workshop=workshop,
                    evaluator=evaluator,
                    store=self._store,
                    origin=origin,
                    progress=self._progress,
                )
                self._progress.problem(problem_title(problem))
                earlier = self._earlier(problem) if request.resume else []
                budget = Budget(request.trials, time.monotonic() + share * (1 - _FINAL_SHARE))
                result = tuner.run(budget, self._priors(problem, mine.results), earlier)
                mine.results.append(result)
                self._keep(workshop, result)
                tuners.append((tuner, result, min(share * _FINAL_SHARE, 6.0)))
            self._finish_signature(mine, tuners, evaluator, workshop)
            spent = evaluator.spent
        report.build_s += sum(tuner.build_s for tuner, _, _ in tuners)
        report.check_s += spent.checking_s
        report.measure_s += spent.measuring_s
        report.prepare_s += spent.preparing_s
        return mine

    def _finish_signature(
        self,
        mine: SignatureReport,
        tuners: Sequence[tuple[ProblemTuner, ProblemResult, float]],
        evaluator: CpuEvaluator,
        workshop: Workshop,
    ) -> None:
        """Choose the layout, race the finalists, and store the plan with its kernels."""
        mine.layout = choose_layout(mine.results)
        if mine.layout is None:
            return
        self._progress.say(f"finalists race again, all in weight layout {mine.layout.key}")
        for tuner, result, seconds in tuners:
            final = decide(tuner, evaluator, result, mine.layout, max(seconds, 1.0)) if result.candidates else None
            if final is None:
                self._progress.say(f"{problem_title(result.problem)}: no finalist was right; the plan leaves it out")
                continue
            mine.finals.append(final)
            record, artifact = workshop.record(final.winner, "device")
            self._store.add_kernel(record, [artifact])
        if mine.finals:
            mine.plan = distil(
                mine.finals,
                mine.layout,
                op=self._request.op.name,
                device_key=self._device_key,
                threads=self._request.threads,
                model=self._request.model,
            )
            self._store.put_plan(mine.plan)

    def _keep(self, workshop: Workshop, result: ProblemResult) -> None:
        """Store the fastest kernels, so that they can be compared later."""
        for built in workshop.build([c.config for c in kept_kernels(result, _KEPT_PER_PROBLEM)]):
            record, artifact = workshop.record(built, "device")
            self._store.add_kernel(record, [artifact])

    def _earlier(self, problem: Problem) -> list[TrialRecord]:
        """Trials of interrupted runs on this problem, oldest first."""
        known = self._store.trials(problem_key=problem.key, device_key=self._device_key, threads=self._request.threads)
        return [trial for trial in known if trial.search != FINAL_RACE]

    def _priors(self, problem: Problem, siblings: Sequence[ProblemResult]) -> Iterator[Prior]:
        """What is known of neighbours: this run's other sizes, nearest first, then the database's problems."""
        for result in sorted(siblings, key=lambda r: -r.problem.dynamic_size):
            best = result.ranked()[:_PRIOR_CONFIGS]
            yield Prior(problem_title(result.problem), tuple((c.config, c.time_us) for c in best))
        seen = {result.problem.key for result in siblings}
        neighbours: dict[str, list[TrialRecord]] = {}
        known = self._store.neighbours(
            other_than=problem.key,
            per_problem=_PRIOR_CONFIGS,
            op=self._request.op.name,
            device_key=self._device_key,
        )
        for trial in known:
            if trial.problem_key not in seen and trial.median_us:
                neighbours.setdefault(trial.problem_key, []).append(trial)
        for key, trials in neighbours.items():
            yield Prior(key, tuple((Config(t.config), t.median_us or 0.0) for t in trials))


def problem_title(problem: Problem) -> str:
    """Short name of a problem for progress lines and tables."""
    stage = getattr(problem.signature, "stage", problem.signature.op)
    return f"{stage:5s} tokens={problem.dynamic_size:<5d}"


def _by_signature(problems: Sequence[Problem]) -> Iterator[tuple[Signature, list[Problem]]]:
    """Problems of one signature together, in the order in which signatures first appear."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.signature.key, []).append(problem)
    for group in groups.values():
        yield group[0].signature, sorted(group, key=lambda p: p.dynamic_size)
