"""The CPU of this machine as a target: kernels are measured on it, and plans raced as the runtime serves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from tilewright.codegen.hardware.archs import Arch, runs_on
from tilewright.codegen.hardware.cores import cores
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.signature import Signature
from tilewright.directories import CACHE_VARIABLE, require_execution, user_cache_directory
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.campaign import Report, Request
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.proving import prove_plans
from tilewright.tuner.commands.findings import Findings
from tilewright.tuner.commands.model_findings import ModelFindings
from tilewright.tuner.evaluation.cpu.evaluator import CpuEvaluator
from tilewright.tuner.evaluation.interface import Evaluator
from tilewright.tuner.plan.deployed import DeployedRaces
from tilewright.tuner.plan.prove import Prover
from tilewright.tuner.report.roofline import ceilings
from tilewright.tuner.targets.base import MEASURING, DefaultBudget, Shown, Target, Wishes
from tilewright.tuning_db.records import DeviceRecord, Timing
from tilewright.tuning_db.store import Store

_MOST_PROVING_S = 12.0
_PROVING_SHARE = 0.1
"""Of a run's time, for the race of a frozen plan."""


class CpuTarget(Target):
    """``threads`` threads of this machine's CPU, which has to run ``arch``."""

    budget: ClassVar[DefaultBudget] = MEASURING
    finals: ClassVar[str] = "finalists race again"
    timing: ClassVar[Timing] = "measured"

    def __init__(self, arch: Arch, threads: int) -> None:
        cpu = read_cpu_info()
        facts = {
            "l1d_bytes": cpu.l1d_bytes,
            "l2_bytes": cpu.l2_bytes,
            "l3_bytes": cpu.l3_bytes,
            "memory_bytes": cpu.memory_bytes,
            "features": sorted(cpu.features),
        }
        super().__init__(arch, DeviceRecord(cpu.key, cpu.name, arch.name, facts), threads)

    @classmethod
    def find(cls, arch: Arch, wishes: Wishes, warn: Callable[[str], None]) -> Self | None:
        """The CPU of this machine, which has to be meant."""
        del warn
        if wishes.device is not None:
            raise TilewrightError(f"--device is of GPUs; {arch.name} kernels are measured on this machine's CPU")
        if wishes.predict:
            raise TilewrightError(f"--predict is of GPUs; {arch.name} kernels are measured on this machine's CPU")
        if not runs_on(arch, read_cpu_info()):
            raise TilewrightError(
                f"arch {arch.name} does not run on this machine ({read_cpu_info().name}), so nothing could be timed; "
                "tune on such a machine, or use --arch native"
            )
        here = cores()
        threads = here.usable if wishes.threads is None else wishes.threads
        if not 1 <= threads <= here.usable:
            raise TilewrightError(
                f"--threads {threads} is impossible here; this process may use {here}, so give at most {here.usable}"
            )
        return cls(arch, threads)

    def evaluator(
        self, op: OpDeclaration[Any, Any], signature: Signature, precisions: Sequence[str], seed: int
    ) -> Evaluator:
        """Measures, in a worker process."""
        return CpuEvaluator(op, signature, threads=self.location.threads, precisions=precisions, seed=seed)

    def begin(self, progress: Progress) -> None:
        """Measure the ceilings that times are held against."""
        require_execution(user_cache_directory(), CACHE_VARIABLE)  # before anything takes time
        progress.say("measuring this machine's roofline")
        ceilings(self.location.threads).measure_again()

    def prove(self, request: Request, report: Report, store: Store, progress: Progress) -> None:
        """Race every plan as the runtime serves it."""
        with DeployedRaces() as races:
            prover = Prover(
                request.op,
                store,
                races,
                threads=self.location.threads,
                seed=request.seed,
                budget_s=min(_MOST_PROVING_S, _PROVING_SHARE * request.time_s),
                say=progress.say,
            )
            for mine in report.signatures:
                if mine.plan is not None:
                    progress.say(
                        "racing the frozen plans, as the runtime serves them, against the default and plain torch"
                    )
                    prove_plans(mine, prover, store, request.probes, progress.say)

    def findings(
        self, runs: Sequence[tuple[Request, Report]], model: ModelShape | None, database: str
    ) -> Sequence[Shown]:
        """Times, held against ceilings measured before, after and until they explain the times.

        Those of several ops of a model are in one table.
        """
        known = ceilings(self.location.threads)
        roofline = known.measure_again()
        found = tuple(Findings(report, request, roofline, database) for request, report in runs)
        roofline = known.explaining([achieved for findings in found for achieved in findings.achieved()])
        found = tuple(replace(findings, roofline=roofline) for findings in found)
        return found if len(found) == 1 or model is None else (ModelFindings(found, model),)
