"""The loop in which search, building, evaluation and storage meet, for one problem."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.space import Config, Space
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.recorded import attributes_of, finished_trial, state_of, study_attributes, study_title
from tilewright.tuner.campaign.variants import BuildResult, PlanConstraint, Variants
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.evaluation.outcome import BuiltKernel, Evaluation
from tilewright.tuner.search import EnumeratedSampler, Prior, config_of, distributions_of, make_sampler, params_of
from tilewright.tuner.search.storage import open_storage, saying_where
from tilewright.tuning_db.records import Outcome, TrialRecord
from tilewright.tuning_db.store import Store

BATCH = 8
"""Variants that are built together and raced together: enough to keep compilers busy, few enough to learn between."""
FINAL_RACE = "final race"
"""In place of a search's name, of trials that measure finalists again."""
_SLOW_ANCHOR = 2.0
"""Times as slow as the best of the first batch: too slow to be raced with every other batch."""
_RACE_ROUNDS = 12
"""Calls of every variant of a batch that its race takes the time for, within the two limits below."""
_LEAST_RACE_S = 0.4
_MOST_RACE_S = 4.0


@dataclass(frozen=True)
class Budget:
    """When to stop a problem: after so many trials, or at a moment (monotonic clock)."""

    trials: int
    deadline: float

    def allows(self, trials_done: int, next_batch_s: float) -> bool:
        """Whether another batch fits; the first one always does."""
        return trials_done < self.trials and (trials_done == 0 or time.monotonic() + next_batch_s <= self.deadline)


@dataclass(frozen=True)
class Origin:
    """Where trials come from: fields that all trials of a run share."""

    run_id: str
    device_key: str
    threads: int
    seed: int
    search: str
    study: str = ""
    """Where Optuna's tools can watch; see :func:`tilewright.tuner.search.storage.open_storage`."""


@dataclass(frozen=True)
class ToldTrial:
    """A finished trial, with the time that the search was told."""

    config: Config
    time_us: float | None
    outcome: str


@dataclass(frozen=True)
class Candidate:
    """A config that was right, with its time made comparable across batches."""

    config: Config
    kernel: BuiltKernel
    time_us: float
    """Median, corrected for the machine's drift; of several races, their geometric mean."""
    constraint: PlanConstraint | None
    """See :attr:`tilewright.tuner.campaign.variants.Variant.constraint`."""
    races: int = 1

    def raced_again(self, time_us: float) -> Candidate:
        """The same with one more race's time taken into account: who led by luck falls back."""
        mean = math.exp((self.races * math.log(self.time_us) + math.log(time_us)) / (self.races + 1))
        return replace(self, time_us=mean, races=self.races + 1)


@dataclass
class ProblemResult:
    """What a problem's search found so far."""

    problem: Problem
    default: Config
    candidates: dict[Config, Candidate] = field(default_factory=dict)
    told: list[ToldTrial] = field(default_factory=list)
    """Every trial, earlier runs' included when resumed."""
    performance_warnings: Callable[[BuiltKernel], Sequence[str]] = lambda _kernel: ()
    """What speaks against a kernel that was not timed; nothing against one that was."""

    @property
    def trials(self) -> int:
        """Trials that count against the budget, earlier runs' included when resumed."""
        return len(self.told)

    @property
    def outcomes(self) -> Counter[str]:
        """How many trials ended in which way."""
        return Counter(trial.outcome for trial in self.told)

    def ranked(self, constraint: PlanConstraint | None = None) -> list[Candidate]:
        """Candidates, fastest first; with one constraint if named."""
        chosen = [c for c in self.candidates.values() if constraint is None or c.constraint == constraint]
        return sorted(chosen, key=lambda c: c.time_us)

    def finalists(self, count: int, constraint: PlanConstraint | None = None) -> list[Candidate]:
        """The fastest ``count`` against which nothing speaks; where there are fewer, the fastest of the others, too."""
        clean, others = self._sifted(count, constraint)
        return (clean + others)[:count]

    def set_aside(self, count: int) -> list[Candidate]:
        """Those that are faster than some of :meth:`finalists`, and were not taken for what speaks against them."""
        clean, others = self._sifted(count)
        return others if len(clean) == count else others[count - len(clean) :]

    def _sifted(self, count: int, constraint: PlanConstraint | None = None) -> tuple[list[Candidate], list[Candidate]]:
        """The fastest ``count`` clean candidates, and those that were passed over to find them."""
        clean: list[Candidate] = []
        others: list[Candidate] = []
        for candidate in self.ranked(constraint):
            if len(clean) == count:
                break
            (others if self.performance_warnings(candidate.kernel) else clean).append(candidate)
        return clean, others


@dataclass(frozen=True)
class Asked:
    """A trial that is being tried."""

    trial: optuna.Trial
    config: Config


@dataclass(frozen=True)
class _Batch:
    """Trials that are being tried, and their builds, which may not be finished yet."""

    asked: Sequence[Asked]
    built: Future[list[BuildResult]]


class ProblemTuner:
    """Tunes one problem. Batches of variants are built, then checked and raced.

    Args:
        problem: to tune.
        variant_builder: builds.
        evaluator: checks and races.
        store: keeps every trial.
        origin: of the trials.
        progress: told of every batch.
        beside: whether the next batch is built while one is raced; never where the compilers would disturb the races.

    """

    def __init__(
        self,
        problem: Problem,
        *,
        variant_builder: Variants,
        evaluator: Evaluator,
        store: Store,
        origin: Origin,
        progress: Progress,
        beside: bool = False,
    ) -> None:
        self._problem = problem
        self._variant_builder = variant_builder
        self._evaluator = evaluator
        self._store = store
        self._origin = origin
        self._progress = progress
        self._beside = beside
        self.result = ProblemResult(
            problem,
            variant_builder.op.default_for(problem, variant_builder.arch),
            performance_warnings=variant_builder.performance_warnings,
        )
        self.build_s = 0.0
        """Wall seconds spent building."""
        self._replayed: list[TrialRecord] = []
        """Of earlier runs, as many as ``result`` begins with."""
        self._study: optuna.Study | None = None
        self._distributions: dict[str, BaseDistribution] = {}

    def replay(self, earlier: Sequence[TrialRecord]) -> None:
        """Take over the trials of earlier runs, and race the best of them again.

        Their times are of other moments, and maybe of a busier machine; those of the rest are scaled by what the race
        says of the best. Kernels come from the build cache, or are built anew.
        """
        searched = [trial for trial in earlier if trial.search != FINAL_RACE]
        times = {Config(t.config): t.median_us for t in searched if t.median_us is not None}
        best = self._worth_racing(times, [t for t in earlier if t.search == FINAL_RACE])
        built = [b for b in self._build(best) if b.path]
        budget_s = _RACE_ROUNDS * sum(times[b.variant.config] for b in built) * 1e-6
        evaluations = self._evaluator.evaluate(
            [b.kernel for b in built], self._problem, budget_s=min(max(budget_s, _LEAST_RACE_S), _MOST_RACE_S)
        )
        now = {b.variant.config: e.median_us for b, e in zip(built, evaluations, strict=True) if e.median_us}
        drift = statistics.median(now[config] / times[config] for config in now) if now else 1.0
        for b in built:
            config = b.variant.config
            if config in now:
                self.result.candidates[config] = Candidate(config, b.kernel, now[config], b.variant.constraint)
        for trial in searched:
            config = Config(trial.config)
            time_us = now.get(config, drift * trial.median_us) if trial.median_us is not None else None
            self.result.told.append(ToldTrial(config, time_us, trial.outcome.value))
        self._replayed = searched

    def _worth_racing(self, times: Mapping[Config, float], finals: Sequence[TrialRecord]) -> list[Config]:
        """The default, the fastest of earlier last races, and the fastest of the search in each weight layout."""
        op, signature, arch = self._variant_builder.op, self._variant_builder.signature, self._variant_builder.arch
        by_layout: dict[str, list[Config]] = {}
        for config in sorted(times, key=lambda config: times[config]):
            by_layout.setdefault(op.layout_key(signature, config, arch), []).append(config)
        timed = sorted((t for t in finals if t.median_us is not None), key=lambda t: t.median_us or 0.0)
        proven = [config for t in timed if (config := Config(t.config)) in times]
        fastest = [config for configs in by_layout.values() for config in configs[:BATCH]]
        default = [self.result.default] if self.result.default in times else []
        return list(dict.fromkeys([*default, *list(dict.fromkeys(proven))[:BATCH], *fastest]))

    def search(self, space: Space, budget: Budget, priors: Iterable[Prior]) -> None:
        """Search ``space`` until the budget is spent; the default config always comes first, then what won elsewhere.

        A second call goes on in the same study, with a sampler of its own. What is left of ``space`` may be less than
        in the first, its parameters are the same.

        Raises:
            TilewrightError: when the problem does not fit the memory, or the study's storage fails.

        """
        trials = min(budget.trials, len(space))
        sampler = make_sampler(self._origin.search, space, seed=self._origin.seed, budget=trials, priors=priors)
        study = self._study = self._study or self._new_study(space)
        study.sampler = sampler
        pool = ThreadPoolExecutor(1, "building")  # has no thread unless it is given something
        try:
            self._search(study, sampler, budget, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # who ends the builders ends what it waits for

    def _search(self, study: optuna.Study, sampler: EnumeratedSampler, budget: Budget, pool: Executor) -> None:
        batch_s, ahead = 0.0, None
        while (batch := ahead or self._next_batch(study, sampler, budget, pool, batch_s=batch_s)) is not None:
            begin, ahead = time.monotonic(), None
            try:
                built = batch.built.result()
                if self._beside:
                    ahead = self._next_batch(study, sampler, budget, pool, batch_s=batch_s, waiting=batch.asked)
                self._run_batch(batch.asked, built, study, budget)
            except BaseException:
                _give_up(study, [*batch.asked, *(ahead.asked if ahead else ())])
                raise
            batch_s = time.monotonic() - begin
            self._progress.batch_done(self.result, budget.trials)

    def _next_batch(
        self,
        study: optuna.Study,
        sampler: EnumeratedSampler,
        budget: Budget,
        pool: Executor,
        *,
        batch_s: float,
        waiting: Sequence[Asked] = (),
    ) -> _Batch | None:
        """What to try next, being built; None where the budget or the space is exhausted.

        Args:
            study: that asks.
            sampler: of it.
            budget: of the problem.
            pool: builds, where that goes on beside the races.
            batch_s: seconds that a batch took.
            waiting: trials of a batch that was asked for before, and is raced meanwhile.

        """
        trials = self.result.trials + len(waiting)
        if not budget.allows(trials, batch_s):
            return None
        asked = self._ask(study, sampler, min(BATCH, budget.trials - trials), waiting)
        configs = [each.config for each in asked]
        if not asked:
            return None
        if self._beside:
            return _Batch(asked, pool.submit(self._build, configs, quiet=True))
        built: Future[list[BuildResult]] = Future()
        try:
            built.set_result(self._build(configs))
        except BaseException:
            _give_up(study, asked)
            raise
        return _Batch(asked, built)

    def _new_study(self, space: Space) -> optuna.Study:
        """A study that knows the trials of earlier runs."""
        origin, problem = self._origin, self._problem
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would report every trial beside our own progress
        # The default is tried even where its template is not searched.
        self._distributions = distributions_of(space.parameters, [self.result.default])
        with saying_where(origin.study):
            study = optuna.create_study(
                study_name=f"{study_title(problem, origin.device_key, origin.threads)} {origin.run_id[:8]}",
                storage=open_storage(origin.study),
            )
            op = self._variant_builder.op.name
            for name, value in study_attributes(problem, op, origin.device_key, origin.threads).items():
                study.set_user_attr(name, value)
            for trial, told in zip(self._replayed, self.result.told, strict=True):
                params = params_of(space.parameters, told.config)
                study.add_trial(finished_trial(trial, told.time_us, params, self._distributions))
        return study

    def _ask(
        self, study: optuna.Study, sampler: EnumeratedSampler, count: int, waiting: Sequence[Asked]
    ) -> list[Asked]:
        """Up to ``count`` trials: the default and the op's starting configs where they have not been tried, and others.

        ``waiting`` were asked before, and are not finished.
        Fewer where the space is exhausted. Whoever enqueues a trial in a study that is watched gets it tried, too.
        """
        space = sampler.space
        tried = {trial.config for trial in self.result.told} | {each.config for each in waiting}
        op, signature, arch = self._variant_builder.op, self._variant_builder.signature, self._variant_builder.arch
        precisions = next((p.values for p in space.parameters if p.name == "precision"), (LOSSLESS,))
        starts = op.starting_configs(signature, arch, [str(name) for name in precisions if name is not None])
        first = [self.result.default, *(config for config in starts if space.find(config) is not None)]
        queued = [config for config in dict.fromkeys(first) if config not in tried][:count]
        known = {tuple(params_of(space.parameters, config).values()): config for config in queued}
        asked: list[Asked] = []
        with saying_where(self._origin.study):
            for config in queued:
                study.enqueue_trial(params_of(space.parameters, config))
            while len(asked) < count and (len(asked) < len(queued) or not sampler.is_exhausted(study)):
                trial = study.ask(self._distributions)
                mine = known.get(tuple(trial.params.values()))
                try:
                    asked.append(Asked(trial, mine or config_of(space, trial.params)))
                except TilewrightError as error:  # enqueued by somebody else
                    trial.set_user_attr("message", str(error))
                    study.tell(trial, state=TrialState.PRUNED)
        return asked

    def _build(self, configs: Sequence[Config], *, quiet: bool = False) -> list[BuildResult]:
        begin = time.monotonic()
        built = self._variant_builder.build(configs, None if quiet else self._progress.built)
        self.build_s += time.monotonic() - begin
        return built

    def _run_batch(
        self, asked: Sequence[Asked], built: Sequence[BuildResult], study: optuna.Study, budget: Budget
    ) -> None:
        result = self.result
        anchor, best = self._anchor(), result.ranked()[:1]
        again = list({c.config: c for c in [*([anchor] if anchor else []), *best]}.values())
        entrants = [c.kernel for c in again] + [b.kernel for b in built if b.path]
        evaluations = self._evaluator.evaluate(
            entrants, self._problem, budget_s=self._race_seconds(len(entrants), budget)
        )
        drift = self._drift(again, evaluations)
        ready = iter(evaluations[len(again) :])
        trials = []
        for build in built:
            evaluation = next(ready) if build.path else None
            trial = self._trial(build, evaluation)
            trials.append(trial)
            told_us = trial.median_us * drift if trial.median_us is not None else None
            result.told.append(ToldTrial(build.variant.config, told_us, trial.outcome.value))
            if told_us is not None:
                result.candidates[build.variant.config] = Candidate(
                    build.variant.config, build.kernel, told_us, build.variant.constraint
                )
        self._store.add_trials(trials)
        with saying_where(self._origin.study):
            for each, trial, told in zip(asked, trials, result.told[-len(asked) :], strict=True):
                self._tell(study, each, trial, told.time_us)

    def _tell(self, study: optuna.Study, asked: Asked, record: TrialRecord, time_us: float | None) -> None:
        """Finish a trial of the study, after ours is safe in the database."""
        for name, value in attributes_of(record).items():
            asked.trial.set_user_attr(name, value)
        candidate = self.result.candidates.get(asked.config)
        # Binaries of earlier runs are not read again, and Optuna wants a constraint of all trials or of none.
        if candidate is not None and candidate.kernel.facts and not self._replayed:
            spilled = max(each.spill_store_bytes + each.spill_load_bytes for each in candidate.kernel.facts)
            asked.trial.set_constraint("bytes spilled by a thread", spilled)
        study.tell(asked.trial, time_us, state=state_of(record.outcome, time_us))

    def _anchor(self) -> Candidate | None:
        """What every batch races again, to see how fast the machine is now: the default, unless it is very slow.

        Not the best: it is the best by luck, too. It would then read slower, all times would be scaled down for that,
        and so each batch would seem faster than the one before.
        """
        first = [c for trial in self.result.told[:BATCH] if (c := self.result.candidates.get(trial.config))]
        best = min(first, key=lambda candidate: candidate.time_us, default=None)
        default = self.result.candidates.get(self.result.default)
        return default if default and best and default.time_us <= _SLOW_ANCHOR * best.time_us else best

    def _drift(self, again: Sequence[Candidate], evaluations: Sequence[Evaluation]) -> float:
        """By what to multiply times of this race to compare them with earlier ones; ``again`` begins with the anchor.

        The best of ``again`` learns from its new time.
        """
        if not again or not (now_us := evaluations[0].median_us):
            return 1.0
        drift = again[0].time_us / now_us
        for candidate, evaluation in zip(again[1:], evaluations[1:], strict=False):
            if evaluation.median_us:
                self.result.candidates[candidate.config] = candidate.raced_again(evaluation.median_us * drift)
        return drift

    def _race_seconds(self, entrants: int, budget: Budget) -> float:
        """A dozen rounds of everybody at the default's speed, within reason and the time left."""
        default = self.result.candidates.get(self.result.default)
        wanted = _RACE_ROUNDS * entrants * default.time_us * 1e-6 if default else 1.5
        left = max(0.5, 0.5 * (budget.deadline - time.monotonic()))
        return min(max(wanted, _LEAST_RACE_S), _MOST_RACE_S, left)

    def _trial(self, build: BuildResult, evaluation: Evaluation | None, search: str = "") -> TrialRecord:
        """Record of one variant; without an evaluation, its build failed."""
        timed = evaluation is not None and evaluation.median_us is not None
        failed = Outcome.REJECTED if build.rejected else Outcome.BUILD_FAILED
        facts: dict[str, Any] = {"outcome": failed, "message": build.message}
        if evaluation is not None:
            facts = {
                "outcome": evaluation.outcome,
                "message": evaluation.message,
                "timing": evaluation.timing if timed else "none",
                "median_us": evaluation.median_us,
                "low_us": evaluation.low_us,
                "high_us": evaluation.high_us,
                "samples_us": evaluation.samples_us,
                "error": evaluation.error,
                "conditions": evaluation.conditions,
            }
        return TrialRecord(
            run_id=self._origin.run_id,
            op=self._variant_builder.op.name,
            signature_key=self._variant_builder.signature.key,
            problem_key=self._problem.key,
            problem=self._problem.to_dict(),
            device_key=self._origin.device_key,
            threads=self._origin.threads,
            template=build.variant.config["template"],
            config=dict(build.variant.config),
            kernel_key=build.variant.key,
            seed=self._origin.seed,
            search=search or self._origin.search,
            build_s=build.build_s,
            **facts,
        )

    def race_again(self, configs: Sequence[Config], budget_s: float) -> list[tuple[BuildResult, Evaluation]]:
        """Race finalists once more, longer and interleaved; stored as trials of their own."""
        built = [b for b in self._build(configs) if b.path]
        kernels = [b.kernel for b in built]
        evaluations = self._evaluator.evaluate(kernels, self._problem, budget_s=budget_s, finalists=True)
        self._store.add_trials([self._trial(b, e, FINAL_RACE) for b, e in zip(built, evaluations, strict=True)])
        return list(zip(built, evaluations, strict=True))


def _give_up(study: optuna.Study, asked: Sequence[Asked]) -> None:
    """Finish trials that were interrupted: whoever watches would wait for them forever."""
    for each in asked:
        with suppress(TilewrightError), saying_where("the storage"):
            study.tell(each.trial, state=TrialState.FAIL, skip_if_finished=True)
