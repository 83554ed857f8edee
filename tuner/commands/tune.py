"""``tune --arch A[,A...] --op O[,O...]``: tune, then show what was found and what to do with it."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tilewright.codegen.hardware.archs import CpuArch
from tilewright.codegen.models.shapes import ModelShape
from tilewright.codegen.numbers.precisions import LOSSLESS, PRECISIONS
from tilewright.codegen.ops.registry import OPS
from tilewright.tuner.campaign.campaign import Campaign, Report, Request, SignatureReport
from tilewright.tuner.campaign.precision import DEFAULT_MAX_ERROR
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.target import CpuTarget, GpuTarget
from tilewright.tuner.commands.common import print_json
from tilewright.tuner.commands.findings import Findings
from tilewright.tuner.commands.model_findings import ModelFindings
from tilewright.tuner.commands.predicted_findings import PredictedFindings
from tilewright.tuner.commands.requests import (
    ALL_OPS,
    DEFAULT_GPU_TIME_S,
    DEFAULT_GPU_TRIALS,
    DEFAULT_MODEL,
    DEFAULT_PROBES,
    DEFAULT_TIME_S,
    DEFAULT_TRIALS,
    parse_model,
    parse_requests,
)
from tilewright.tuner.plan.deployed import DeployedRaces
from tilewright.tuner.plan.facts import probed_document
from tilewright.tuner.plan.finals import Probed
from tilewright.tuner.plan.prove import Proof, Prover
from tilewright.tuner.report.roofline import measure_roofline
from tilewright.tuner.search import DEFAULT_SEARCH, SEARCHES
from tilewright.tuning_db.integrity import UntrustedFile, check_private
from tilewright.tuning_db.records import PlanRecord
from tilewright.tuning_db.store import Store

Shown = Findings | ModelFindings | PredictedFindings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tuning command."""
    what = parser.add_argument_group("what to tune")
    what.add_argument("--arch", required=True, help="native, or archs by name: sm_90,gfx942")
    what.add_argument("--device", metavar="NAME", help="product of a GPU arch: h100-sxm, h200 (default: one per arch)")
    what.add_argument("--op", required=True, help=f"{', '.join(OPS)}, several of them, or {ALL_OPS}")
    what.add_argument("--model", help=f"preset name, config.json, or the model's folder (default {DEFAULT_MODEL})")
    what.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    what.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks")
    what.add_argument("--problem", action="append", metavar="KEY=VALUE,...", help="one problem instead of a model")
    what.add_argument(
        "--tokens",
        metavar="N,N,...",
        help="sizes to tune; " + "; ".join(f"{name}: {op.sizes_help}" for name, op in OPS.items()),
    )
    what.add_argument(
        "--routing",
        default="balanced",
        metavar="KIND",
        help="balanced, power-law[:ALPHA] or recorded:FILE: how uneven loads of experts or lengths of sequences are",
    )
    what.add_argument("--template", metavar="NAME,...", help="search these alone, beside the default config")
    how = parser.add_argument_group("how hard")
    trials = f"variants per problem (default {DEFAULT_TRIALS}, of GPUs {DEFAULT_GPU_TRIALS})"
    how.add_argument("--trials", type=int, metavar="N", help=trials)
    usual = f"{DEFAULT_TIME_S:.0f}s an op, of GPUs {DEFAULT_GPU_TIME_S:.0f}s in all"
    how.add_argument("--time", metavar="T", help=f"for an arch: 90, 90s, 5m, 1h (default {usual})")
    how.add_argument("--search", default=DEFAULT_SEARCH, help=", ".join(SEARCHES))
    how.add_argument("--threads", type=int, metavar="N", help="threads of a kernel (default: all cores)")
    how.add_argument(
        "--probes",
        type=int,
        default=DEFAULT_PROBES,
        metavar="N",
        help="random sizes at which a plan is put to the test",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N")
    how.add_argument(
        "--batch-invariant",
        action="store_true",
        help="one order of sums for all sizes: what a token gets does not depend on what else is in the batch",
    )
    how.add_argument(
        "--weight-copies",
        type=int,
        default=1,
        metavar="N",
        help="weight layouts (and precisions) that a plan may use: each takes the memory of another copy (default 1)",
    )
    how.add_argument("--resume", action="store_true", help="count and use earlier trials of the same problems")
    how.add_argument(
        "--precision",
        default=LOSSLESS,
        metavar="P,P,...",
        help=f"what weights may be stored in: {', '.join(PRECISIONS)} (default {LOSSLESS})",
    )
    how.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help=f"largest relative error of the output, ||out - exact|| / ||exact|| (default {DEFAULT_MAX_ERROR})",
    )
    where = parser.add_argument_group("where to")
    where.add_argument("--db", metavar="PATH|URL", help="database (default $TILEWRIGHT_DB, or the user's data folder)")
    where.add_argument("--json", action="store_true", help="one JSON document on stdout, progress on stderr")


def run(arguments: argparse.Namespace) -> int:
    """Tune; 0 when every problem has a right kernel, else 1.

    Raises:
        TilewrightError: for input that cannot be tuned.

    """
    model = parse_model(arguments)
    requests = parse_requests(arguments, model, _warn)
    progress = Progress(sys.stderr)
    shown: list[Shown] = []
    reports: list[Report] = []
    with Store.open(arguments.db) as store:
        if store.path is not None:
            _warn_if_not_servable(store.path)
        for _, group in itertools.groupby(requests, key=lambda request: request.arch.name):
            of_arch = list(group)
            tune = _measure if of_arch[0].device is None else _predict
            for findings in tune(of_arch, model, store, progress):
                shown.append(findings)
                reports += findings.reports
                if not arguments.json:
                    print(findings.text(), flush=True)
    if arguments.json:
        documents = [findings.document() for findings in shown]
        print_json(documents[0] if len(documents) == 1 else documents)
    signatures = [mine for report in reports for mine in report.signatures]
    return 0 if all(len(mine.finals) == len(mine.results) for mine in signatures) else 1


def _measure(
    requests: Sequence[Request], model: ModelShape | None, store: Store, progress: Progress
) -> Sequence[Shown]:
    """Tune for this machine's CPU, and put the plans to the test."""
    progress.say("measuring this machine's roofline")
    threads = requests[0].threads
    before = measure_roofline(threads)
    tuned = [(request, _tune(request, store, progress)) for request in requests]
    measure_roofline.cache_clear()
    roofline = before.raised_to(measure_roofline(threads))
    found = tuple(Findings(report, request, roofline, store.name) for request, report in tuned)
    return found if len(found) == 1 or model is None else (ModelFindings(found, model),)


def _tune(request: Request, store: Store, progress: Progress) -> Report:
    """Run ``request``, and put its plans to the test."""
    assert isinstance(request.arch, CpuArch)
    report = Campaign(request, CpuTarget(request.arch, request.threads), store, progress).run()
    with DeployedRaces() as races:
        for mine in report.signatures:
            _prove(mine, store, races, request, progress)
    return report


def _predict(
    requests: Sequence[Request], model: ModelShape | None, store: Store, progress: Progress
) -> Sequence[Shown]:
    """Tune for a GPU that need not be there."""
    del model
    found = []
    for request in requests:
        assert request.device is not None
        progress.say(f"{request.op.name} for {request.device.name} ({request.arch.name}): nothing is timed on a GPU")
        with closing(GpuTarget(request.device)) as target:
            report = Campaign(request, target, store, progress).run()
            found.append(PredictedFindings(report, request, target.builder.toolchain, store.name))
    return found


def _warn(text: str) -> None:
    print(f"tune: warning: {text}", file=sys.stderr)


def _warn_if_not_servable(path: Path) -> None:
    """Say at once, not after the work, that the runtime will run nothing from this database."""
    try:
        check_private(path)
    except UntrustedFile as error:
        _warn(str(error))


def _prove(mine: SignatureReport, store: Store, races: DeployedRaces, request: Request, progress: Progress) -> None:
    """Race each plan as the runtime serves it against the default and plain torch, and store what it becomes."""
    if mine.plan is None or mine.verdict is None:
        return
    progress.say("racing the frozen plans, as the runtime serves them, against the default and plain torch")
    grid = {each.size: each.problem for each in mine.verdict.grid}
    prover = Prover(
        request.op,
        store,
        races,
        threads=request.threads,
        seed=request.seed,
        budget_s=min(12.0, 0.1 * request.time_s),
        say=progress.say,
    )

    def proven(plan: PlanRecord, rehearsed: Probed) -> Proof:
        proof = prover.prove(plan, list(grid.values()), mine.default_for(plan), request.probes)
        facts = plan.facts | {"probed": probed_document(rehearsed, proof)}
        store.put_plan(replace(proof.plan, facts=facts))
        return replace(proof, plan=replace(proof.plan, facts=facts))

    mine.proof = proven(mine.plan, mine.probed)
    mine.plan = mine.proof.plan
    mine.front = [
        replace(point, plan=mine.plan if point.precision == mine.plan.precision else proven(point.plan, Probed()).plan)
        for point in mine.front
    ]
