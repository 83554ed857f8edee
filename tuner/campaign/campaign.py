"""A whole tuning run: every problem of every signature, then a plan per signature."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, log
from typing import Any

import numpy as np
import optuna

from tilewright import __version__
from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.space import Config, Space
from tilewright.errors import TilewrightError
from tilewright.plain_text import without_passwords
from tilewright.tuner.campaign.loop import Budget, Origin, ProblemResult, ProblemTuner
from tilewright.tuner.campaign.precision import FrontPoint, admit, constraint_by_precision, front, left_out, storable
from tilewright.tuner.campaign.priors import PRIOR_CONFIGS, stored_priors
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.standings import resumable
from tilewright.tuner.campaign.variants import PlanConstraint, VariantBuilder, Variants
from tilewright.tuner.evaluation.checking import PrecisionError
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.plan.constraint import Final, Settled, choose_constraints, kept
from tilewright.tuner.plan.facts import conditions_document, costs_document
from tilewright.tuner.plan.finals import Finals, Probed, Verdict
from tilewright.tuner.plan.prove import Default, Proof
from tilewright.tuner.report.text import format_shape
from tilewright.tuner.search import Prior
from tilewright.tuner.targets.base import Target
from tilewright.tuning_db.records import TIMINGS, PlanRecord, TrialRecord
from tilewright.tuning_db.store import Store

KEPT_PER_PROBLEM = 6
"""Kernels of a problem that the database keeps, source and bytes, beside every trial's config."""
_EXPLORE_SHARE = 0.6
"""Of a problem's trials, before all sizes of a signature agree on a weight layout; the others stay within it."""
_REFINE_SHARE = 0.25
"""Of the time, for the search within the layout."""
_FINAL_SHARE = 0.25
"""Of the time, for the last race among the finalists."""
_NO_ERROR = PrecisionError(0.0, 0.0)
"""Of weights as the op declares them, whatever their precision is called."""


@dataclass(frozen=True)
class Request:
    """What to tune, and within which budget."""

    op: OpDeclaration[Any, Any]
    problems: tuple[Problem, ...]
    """Grouped by signature, ascending in size within each."""
    target: Target
    trials: int
    """Per problem."""
    time_s: float
    """For everything, finals included."""
    search: str
    seed: int
    resume: bool
    model: str
    probes: int
    """Sizes drawn at random at which a finished plan is raced against the default."""
    templates: tuple[str, ...] = ()
    """The only ones to search, beside the default config; empty: all."""
    precisions: tuple[str, ...] = (LOSSLESS,)
    """Of the weights; the lossless one is always tried, too."""
    max_error: float = 0.0
    """Largest relative error of the op's output that a precision may bring."""
    batch_invariant: bool = False
    """Whether the kernels of a plan must add up in one order."""
    study: str = ""
    """Where Optuna's tools can watch the search; empty: nowhere."""
    weight_copies: int = 1
    """Most weight layouts of a plan: each is a copy of the weights where it is served."""

    @property
    def arch(self) -> Arch:
        """That kernels are built for."""
        return self.target.arch

    @property
    def toolchains(self) -> str:
        """What builds the templates that are searched, in one line."""
        languages = dict.fromkeys(
            template.language
            for problem in self.problems
            for template in self.op.templates_for(problem.signature, self.arch)
            if not self.templates or template.name in self.templates
        )
        return "; ".join(self.target.builders[language].toolchain for language in languages)


@dataclass(frozen=True)
class Alternative:
    """A plan that may serve in place of the one that the last races led to."""

    verdict: Verdict
    plan: PlanRecord


@dataclass
class SignatureReport:
    """What a run found for one signature."""

    signature: Signature
    results: list[ProblemResult] = field(default_factory=list)
    verdict: Verdict | None = None
    plan: PlanRecord | None = None
    alternative: Alternative | None = None
    """Within the default's weight layout, which the default itself can join; None where the plan is such a one."""
    probed: Probed = field(default_factory=Probed)
    """While it was made, against the default alone."""
    proof: Proof | None = None
    """Of the plan as it is stored and served."""
    front: list[FrontPoint] = field(default_factory=list)
    """Time against error, by rising error: a plan is stored for each."""

    @property
    def finals(self) -> tuple[Final, ...]:
        """The verdict on every tuned size that has one."""
        return self.verdict.finals if self.verdict else ()

    @property
    def settled(self) -> Settled | None:
        """The weight layouts of the plan, and what they cost."""
        return self.verdict.settled if self.verdict else None

    def default_for(self, plan: PlanRecord) -> Default:
        """The default config's kernel, beside one of the plans; only valid with a verdict."""
        assert self.verdict is not None
        variant = self.verdict.grid[0].default.built.variant
        joins = variant.layout_key in plan.layout.split("+")
        if plan.batch_invariant:  # a verdict knows the order of sums of the plan that it led to, and of no other
            made = [(self.plan, self.verdict)]
            made += [(self.alternative.plan, self.alternative.verdict)] if self.alternative else []
            joins = any(mine is plan and variant.constraint in verdict.settled.constraints for mine, verdict in made)
        return Default(variant.key, variant.layout_key, joins)


@dataclass
class Report:
    """What a run found and where its time went."""

    run_id: str
    signatures: list[SignatureReport] = field(default_factory=list)
    wall_s: float = 0.0
    build_s: float = 0.0
    check_s: float = 0.0
    measure_s: float = 0.0

    @property
    def trials(self) -> int:
        """Trials of all problems."""
        return sum(result.trials for report in self.signatures for result in report.results)

    @property
    def efficiency(self) -> float:
        """Share of the wall time that went into compiling, checking and measuring."""
        return (self.build_s + self.check_s + self.measure_s) / self.wall_s if self.wall_s else 0.0


def recorded_command() -> str:
    """How this process was called, as a database may keep it: without passwords."""
    return shlex.join(["tune", *map(without_passwords, sys.argv[1:])])


class Campaign:
    """Runs a request against a store."""

    def __init__(self, request: Request, store: Store, progress: Progress) -> None:
        self._request = request
        self._target = request.target
        self._store = store
        self._progress = progress
        self._errors: dict[tuple[str, str], PrecisionError] = {}
        """What precisions cost, by signature key and precision: of those within the budget."""

    def run(self) -> Report:
        """Tune everything; interrupted, all finished trials are in the store already.

        Raises:
            TilewrightError: for a problem that does not fit this machine.

        """
        begin = time.monotonic()
        run = self._start_run()
        report = Report(run.id)
        deadline = begin + self._request.time_s
        self._progress.begin(self._request.trials * len(self._request.problems), deadline)
        groups = list(_by_signature(self._request.problems))
        left = len(self._request.problems)
        for signature, problems in groups:
            report.signatures.append(self._tune_signature(run.id, signature, problems, left, deadline, report))
            left -= len(problems)
        self._store.finish_run(run.id)
        report.wall_s = time.monotonic() - begin
        return report

    def _start_run(self) -> Any:
        self._store.put_device(self._target.device)
        versions = {"tilewright": __version__, "python": platform.python_version(), **self._versions}
        return self._store.start_run(recorded_command(), versions=versions, host=platform.node())

    @property
    def _versions(self) -> dict[str, str]:
        """Of what a run uses beside Python and this package."""
        return {"optuna": optuna.__version__, "toolchain": self._request.toolchains}

    def _tune_signature(
        self, run_id: str, signature: Signature, problems: Sequence[Problem], left: int, deadline: float, report: Report
    ) -> SignatureReport:
        """Search every problem freely, choose one weight layout, search on within it, and race the finalists.

        ``left`` problems, these included, share the time until ``deadline``.
        """
        request = self._request
        mine = SignatureReport(signature)
        target = self._target
        variant_builder = VariantBuilder(
            request.op, signature, target.arch, target.builders, batch_invariant=request.batch_invariant
        )
        origin = Origin(run_id, target.device.key, target.location.threads, request.seed, request.search, request.study)
        self._progress.say(format_shape(signature.to_dict()))
        precisions = storable(request.precisions, request.op.precisions(signature, target.arch), self._progress.say)
        with target.evaluator(request.op, signature, precisions, request.seed) as evaluator:
            admitted = self._admit(evaluator, problems, precisions)
            space = request.op.space(signature, target.arch, request.templates, admitted)
            self._progress.say(space.summary())
            make_tuner = partial(
                ProblemTuner,
                variant_builder=variant_builder,
                evaluator=evaluator,
                store=self._store,
                origin=origin,
                progress=self._progress,
                beside=target.compiles_beside,
            )
            tuners = [make_tuner(problem) for problem in problems]
            mine.results = [tuner.result for tuner in tuners]
            until = time.monotonic() + (deadline - time.monotonic()) * len(problems) / left
            for tuner in tuners:
                if request.resume:
                    tuner.replay(self._earlier(tuner.result.problem, space, variant_builder))
            explore = ceil(request.trials * _EXPLORE_SHARE)
            self._search(tuners, space, explore, _share(until, 1 - _REFINE_SHARE - _FINAL_SHARE))
            constraints = choose_constraints(mine.results, request.weight_copies)
            if request.batch_invariant and not constraints and any(tuner.result.candidates for tuner in tuners):
                raise TilewrightError(
                    f"no kernel of {signature.describe()} adds up in an order that is its own whatever the batch; "
                    "leave out --batch-invariant"
                )
            if constraints:
                layouts = " and ".join(dict.fromkeys(constraint.layout for constraint in constraints))
                if layouts:
                    self._progress.say(f"searching on in the weight layout {layouts}")
                # The default alone may read that layout, where its template is not searched.
                within = self._with_constraints(space, variant_builder, constraints) or space
                remaining = _REFINE_SHARE / (_REFINE_SHARE + _FINAL_SHARE)
                self._search(tuners, within, request.trials, _share(until, remaining))
                finals = Finals(
                    make_tuner,
                    evaluator,
                    self._progress,
                    copies=request.weight_copies,
                    until=until,
                    starts=request.op.starting_configs(signature, target.arch, admitted),
                )
                self._finish(mine, constraints, tuners, finals, variant_builder, evaluator, run_id)
            spent = evaluator.spent
        report.build_s += sum(tuner.build_s for tuner in tuners)
        report.check_s += spent.checking_s
        report.measure_s += spent.measuring_s
        return mine

    def _admit(self, evaluator: Evaluator, problems: Sequence[Problem], precisions: Sequence[str]) -> list[str]:
        """Precisions within the budget of errors."""
        errors = {LOSSLESS: _NO_ERROR}
        if len(precisions) > 1:
            errors = admit(evaluator, problems, precisions, self._request.max_error, self._progress.say)
        self._errors |= {(problems[0].signature.key, name): error for name, error in errors.items()}
        return list(errors)

    def _search(self, tuners: Sequence[ProblemTuner], space: Space, trials: int, until: float) -> None:
        """Search every problem in turn, up to ``trials`` each; they share the time evenly."""
        for done, tuner in enumerate(tuners):
            problem = tuner.result.problem
            self._progress.problem(problem.title, tuner.result.trials)
            budget = Budget(trials, _share(until, 1 / (len(tuners) - done)))
            siblings = [other.result for other in tuners if other is not tuner]
            tuner.search(space, budget, self._priors(problem, space, siblings))

    def _with_constraints(
        self, space: Space, variant_builder: VariantBuilder, constraints: Sequence[PlanConstraint]
    ) -> Space:
        """The part of ``space`` whose kernels have one of ``constraints``."""
        chosen = [variant_builder.constraint(config) in constraints for config in space]
        return space.only(np.array(chosen))

    def _finish(
        self,
        mine: SignatureReport,
        constraints: Sequence[PlanConstraint],
        tuners: Sequence[ProblemTuner],
        finals: Finals,
        variant_builder: Variants,
        evaluator: Evaluator,
        run_id: str,
    ) -> None:
        """Race the finalists, store the plan and the kernels that are worth keeping, and probe the plan."""
        self._progress.searched()
        self._progress.say(self._target.finals)
        keep = partial(self._keep, variant_builder, evaluator)
        op, signature, arch = self._request.op, mine.signature, self._target.arch
        # The default's layout is the one in which no size can be slower than the default.
        default = variant_builder.constraint(op.default_config(signature, arch))
        defaults = [op.default_for(tuner.result.problem, arch) for tuner in tuners]
        of_precisions = constraint_by_precision(mine.results)
        in_question = [*constraints, *([default] if default else []), *of_precisions.values()]
        mine.verdict = finals.run(tuners, list(dict.fromkeys(in_question)))
        decided = {final.problem.key: final for final in mine.finals}
        for tuner in tuners:
            final = decided.get(tuner.result.problem.key)
            if final is None:
                self._progress.say(f"{tuner.result.problem.title}: no finalist was right; the plan leaves it out")
            else:
                fastest = kept(tuner.result, KEPT_PER_PROBLEM)
                keep([final.winner.variant.config, *(c.config for c in fastest)])
        if not mine.verdict or not mine.finals:
            return
        mine.verdict, mine.probed = finals.probe(mine.verdict, self._request.probes, self._request.seed)
        served = [finalist.built.variant.config for finalist in mine.verdict.chosen]
        keep([*served, *defaults])
        mine.plan = self._plan(mine.verdict)
        self._put_plan(mine.plan)
        if (other := finals.alternative(mine.verdict, default)) and other.finals:
            plan = self._plan(other)
            if plan.precision == mine.plan.precision:
                mine.alternative = Alternative(other, plan)
                keep([finalist.built.variant.config for finalist in other.chosen])
        others = [constraint for name, constraint in of_precisions.items() if name != mine.plan.precision]
        verdicts = [verdict for constraint in others if (verdict := finals.within([constraint])) and verdict.finals]
        points = [self._point(mine.verdict, mine.plan), *(self._point(v, self._plan(v)) for v in verdicts)]
        title = f"precision against error of {format_shape(signature.to_dict())} {run_id[:8]}"
        mine.front = front(points, title, self._request.study if len(points) > 1 else "")
        exact = op.lossless(signature)
        admitted = [exact if name == LOSSLESS else name for key, name in self._errors if key == signature.key]
        for line in left_out(admitted, points, mine.front):
            self._progress.say(line)
        for point in mine.front:
            if point.precision != mine.plan.precision:
                keep([final.winner.variant.config for final in point.finals])
                self._put_plan(point.plan)

    def _put_plan(self, plan: PlanRecord) -> None:
        if not self._store.put_plan(plan):
            self._progress.say(
                f"the stored {plan.timing} plan of {plan.precision} stays, for it was checked further than this one "
                f"(checked: {plan.checked}); tune with the same checks as it to replace it"
            )

    def _point(self, verdict: Verdict, plan: PlanRecord) -> FrontPoint:
        return FrontPoint(plan.precision, self._error(plan.signature_key, plan.precision), verdict.finals, plan)

    def _error(self, signature_key: str, precisions: str) -> PrecisionError:
        """The largest that one of ``precisions`` (joined by +) brings."""
        known = [self._errors.get((signature_key, name), _NO_ERROR) for name in precisions.split("+")]
        return max(known, key=lambda error: error.relative)

    def _plan(self, verdict: Verdict) -> PlanRecord:
        """The plan that follows from ``verdict``, as if there were no plain torch."""
        signature = verdict.finals[0].problem.signature
        used = [finalist.built.variant for finalist in verdict.chosen]
        precision = "+".join(dict.fromkeys(variant.recipe.precision for variant in used))
        return PlanRecord(
            op=self._request.op.name,
            signature_key=signature.key,
            signature=signature.to_dict(),
            device_key=self._target.device.key,
            threads=self._target.location.threads,
            layout="+".join(dict.fromkeys(variant.layout_key for variant in used)),
            timing=verdict.timing,
            checked=verdict.checked,
            entries=verdict.entries,
            model=self._request.model,
            precision=precision,
            error=self._error(signature.key, precision).relative,
            batch_invariant=self._request.batch_invariant,
            facts=costs_document(verdict) | ({"timed": timed} if (timed := conditions_document(verdict)) else {}),
        )

    def _keep(self, variant_builder: Variants, evaluator: Evaluator, configs: Sequence[Config]) -> None:
        """Store kernels, source and bytes, so that they can be served and compared."""
        for built in variant_builder.build(list(dict.fromkeys(configs))):
            if built.path is None:
                continue  # a default that cannot be launched
            record, artifacts = variant_builder.record(built, evaluator.checked(built.variant.key))
            self._store.add_kernel(record, artifacts)

    def _earlier(self, problem: Problem, space: Space, variant_builder: VariantBuilder) -> list[TrialRecord]:
        """Trials of earlier runs on this problem, oldest first: of kernels that would be built from the same code.

        Measured times and predicted ones do not compare. A failure, which has none, is one to both.
        """
        place = self._target.location
        found = self._store.trials(problem_key=problem.key, device_key=place.device_key, threads=place.threads)
        known = [trial for trial in found if trial.timing in ("none", self._target.timing)]
        return resumable(known, space, variant_builder)

    def _priors(self, problem: Problem, space: Space, siblings: Sequence[ProblemResult]) -> list[Prior]:
        """What is known beforehand: measured results, then predicted ones.

        Of equal evidence first what a model says, then this run's other sizes, nearest first, then the database's.
        """
        size, timing = problem.size, self._target.timing
        priors = list(self._target.priors(self._request.op, problem, space))
        for result in sorted(siblings, key=lambda r: abs(log(r.problem.size / size))):
            best = result.ranked()[:PRIOR_CONFIGS]
            priors.append(Prior(result.problem.title, tuple((c.config, c.time_us) for c in best), timing))
        seen = {result.problem.key for result in siblings}
        priors += stored_priors(self._store, problem, space, timing, device_key=self._target.device.key, seen=seen)
        return sorted(priors, key=lambda prior: -TIMINGS.index(prior.timing))


def _share(until: float, share: float) -> float:
    """The moment at which ``share`` of the time from now to ``until`` is over."""
    now = time.monotonic()
    return now + max(0.0, until - now) * share


def _by_signature(problems: Sequence[Problem]) -> Iterator[tuple[Signature, list[Problem]]]:
    """Problems of one signature together, in the order in which signatures first appear."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.signature.key, []).append(problem)
    for group in groups.values():
        yield group[0].signature, sorted(group, key=lambda p: p.size)
