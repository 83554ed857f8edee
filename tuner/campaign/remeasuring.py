"""Plans that were predicted, made anew from times: the kernels that are stored raced on the device that is there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.temporary import temporary_folder
from tilewright.tuner.campaign.campaign import Campaign, Report, Request, SignatureReport
from tilewright.tuner.campaign.loop import Candidate, Origin, ProblemTuner
from tilewright.tuner.campaign.prepared import Prepared
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.stored import StoredVariants
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.plan.constraint import choose_constraints
from tilewright.tuner.plan.finals import Finals
from tilewright.tuner.prediction.quality import Quality, quality
from tilewright.tuner.report.text import format_shape
from tilewright.tuning_db.store import Store

MEASURED_AGAIN = "measure"
"""In place of a search's name, of a run that searches nothing."""


class Remeasurement(Campaign):
    """Races what a database holds of a request's signatures, and stores the plans that come of it.

    Args:
        request: of the signatures, all in ``prepared``.
        store: that holds the kernels.
        progress: told of every race.
        prepared: by the keys of signatures.
        top: kernels that were predicted fastest, with each weight layout in question, that are raced at each size.

    """

    def __init__(
        self, request: Request, store: Store, progress: Progress, prepared: Mapping[str, Prepared], top: int
    ) -> None:
        super().__init__(request, store, progress)
        self._prepared = prepared
        self._top = top
        self.qualities: dict[str, list[Quality]] = {}
        """How good the predictions were, by the keys of signatures."""

    @property
    def _versions(self) -> dict[str, str]:
        return {}

    def _tune_signature(
        self, run_id: str, signature: Signature, problems: Sequence[Problem], left: int, deadline: float, report: Report
    ) -> SignatureReport:
        """Race the stored kernels at all sizes; ``left`` problems, these among them, share the time to ``deadline``."""
        mine, target = SignatureReport(signature), self._target
        self._progress.say(format_shape(signature.to_dict()))
        if time.monotonic() > deadline:
            self._progress.say("is not measured: the time is over; --resume goes on with what is left")
            return mine
        prepared, request = self._prepared[signature.key], self._request
        until = time.monotonic() + (deadline - time.monotonic()) * len(problems) / left
        with (
            temporary_folder() as folder,
            target.evaluator(prepared.op, signature, prepared.precisions, request.seed) as evaluator,
        ):
            variants = self._variants(prepared, folder)
            tuners = [self._tuner(problem, variants, evaluator, run_id) for problem in problems]
            mine.results = [tuner.result for tuner in tuners]
            self._admit(evaluator, problems, prepared.precisions)
            constraints = choose_constraints(mine.results, prepared.copies)
            finals = Finals(
                partial(self._tuner, variants=variants, evaluator=evaluator, run_id=run_id),
                evaluator,
                self._progress,
                copies=prepared.copies,
                until=until,
                finalists=self._top,
                stop_at=deadline,
            )
            if constraints:
                self._finish(mine, constraints, tuners, finals, variants, evaluator, run_id)
            report.check_s += evaluator.spent.checking_s
            report.measure_s += evaluator.spent.measuring_s
        self._judge(mine, prepared)
        return mine

    def _variants(self, prepared: Prepared, folder: Path) -> StoredVariants:
        kernels = list(prepared.kernels.values())
        variants = StoredVariants(
            prepared.op,
            prepared.signature,
            self._target.arch,
            self._store,
            kernels,
            folder,
            batch_invariant=prepared.batch_invariant,
        )
        for kernel, built in zip(kernels, variants.build(variants.configs), strict=True):
            if built.path is None:
                self._progress.say(f"kernel {kernel.key[:8]} is left out: {built.message}")
        return variants

    def _tuner(self, problem: Problem, variants: StoredVariants, evaluator: Evaluator, run_id: str) -> ProblemTuner:
        """A tuner of ``problem`` that knows the stored kernels by what was predicted for them."""
        place = self._target.location
        tuner = ProblemTuner(
            problem,
            variant_builder=variants,
            evaluator=evaluator,
            store=self._store,
            origin=Origin(run_id, place.device_key, place.threads, self._request.seed, MEASURED_AGAIN),
            progress=self._progress,
        )
        predicted = self._prepared[problem.signature.key].candidates(problem)
        for built, time_us in zip(variants.build(list(predicted)), predicted.values(), strict=True):
            if built.path is not None:
                config = built.variant.config
                tuner.result.candidates[config] = Candidate(config, built.kernel, time_us, built.variant.constraint)
        return tuner

    def _judge(self, mine: SignatureReport, prepared: Prepared) -> None:
        """Compare what was predicted with what was measured, and keep that with the plan."""
        if mine.verdict is None or mine.plan is None:
            return
        found = []
        for raced in mine.verdict.grid:
            known = prepared.predicted_us.get(raced.problem.key, {})
            both = [(known[each.key], each.median_us) for each in raced.right if each.key in known]
            if len(both) > 1:
                found.append(quality(raced.size, *zip(*both, strict=True)))
        self.qualities[mine.signature.key] = found
        if found:
            document = [
                {"size": each.size, "kernels": each.kernels, "regret": each.regret, "rank": each.rank_correlation}
                for each in found
            ]
            mine.plan = replace(mine.plan, facts=mine.plan.facts | {"prediction": document})
            self._store.put_plan(mine.plan)
