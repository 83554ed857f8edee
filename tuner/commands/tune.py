"""``tune --arch A --op O[,O...]``: tune, then show what was found and what to do with it."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.codegen.archs import find_arch, runs_on
from tilewright.codegen.cpu_info import read_cpu_info, usable_cores
from tilewright.codegen.models import ModelShape, load_model
from tilewright.codegen.ops import OPS, find_op
from tilewright.codegen.ops.base import OpDeclaration, Problem
from tilewright.codegen.precisions import LOSSLESS, PRECISIONS, parse_precisions
from tilewright.codegen.routing import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign import Campaign, Report, Request, SignatureReport
from tilewright.tuner.commands.common import print_json
from tilewright.tuner.commands.findings import Findings
from tilewright.tuner.commands.model_findings import ModelFindings
from tilewright.tuner.deployed import DeployedRaces
from tilewright.tuner.finals import Probed
from tilewright.tuner.plan_facts import probed_document
from tilewright.tuner.precision import DEFAULT_MAX_ERROR
from tilewright.tuner.progress import ENDLESS_TRIALS, Progress
from tilewright.tuner.proving import Proof, Prover
from tilewright.tuner.roofline import measure_roofline
from tilewright.tuner.search import DEFAULT_SEARCH, SEARCHES
from tilewright.tuning_db.integrity import UntrustedFile, check_private
from tilewright.tuning_db.records import PlanRecord
from tilewright.tuning_db.store import Store

DEFAULT_MODEL = "mixtral-8x7b"
DEFAULT_TRIALS = 60
DEFAULT_TIME_S = 120.0
"""Of each op."""
ALL_OPS = "all"
DEFAULT_PROBES = 4
_MAX_SEED = 2**32 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tuning command."""
    what = parser.add_argument_group("what to tune")
    what.add_argument("--arch", required=True, help="native, or an arch by name")
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
    how.add_argument("--trials", type=int, metavar="N", help=f"variants per problem (default {DEFAULT_TRIALS})")
    how.add_argument(
        "--time", metavar="T", help=f"for everything: 90, 90s, 5m, 1h (default {DEFAULT_TIME_S:.0f}s an op)"
    )
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
        default=DEFAULT_MAX_ERROR,
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
    model = None if arguments.problem else _model(arguments)
    requests = _requests(arguments, model)
    progress = Progress(sys.stderr)
    with Store.open(arguments.db) as store:
        if store.path is not None:
            _warn_if_not_servable(store.path)
        progress.say("measuring this machine's roofline")
        threads = requests[0].threads
        before = measure_roofline(threads)
        tuned = [(request, _tune(request, store, progress)) for request in requests]
        measure_roofline.cache_clear()
        roofline = before.raised_to(measure_roofline(threads))
        found = tuple(Findings(report, request, roofline, store.name) for request, report in tuned)
    findings = found[0] if len(found) == 1 or model is None else ModelFindings(found, model)
    if arguments.json:
        print_json(findings.document())
    else:
        print(findings.text())
    signatures = [mine for _, report in tuned for mine in report.signatures]
    return 0 if all(len(mine.finals) == len(mine.results) for mine in signatures) else 1


def _tune(request: Request, store: Store, progress: Progress) -> Report:
    """Run ``request``, and put its plans to the test."""
    report = Campaign(request, store, progress).run()
    with DeployedRaces() as races:
        for mine in report.signatures:
            _prove(mine, store, races, request, progress)
    return report


def _warn_if_not_servable(path: Path) -> None:
    """Say at once, not after the work, that the runtime will run nothing from this database."""
    try:
        check_private(path)
    except UntrustedFile as error:
        print(f"tune: warning: {error}", file=sys.stderr)


def _model(arguments: argparse.Namespace) -> ModelShape:
    return load_model(DEFAULT_MODEL if arguments.model is None else arguments.model, tp=arguments.tp, ep=arguments.ep)


def _requests(arguments: argparse.Namespace, model: ModelShape | None) -> list[Request]:
    """One per op; they share the time by how many problems they have."""
    names = _op_names(arguments.op)
    if len(names) > 1:
        for option in ("problem", "template"):
            if getattr(arguments, option):
                raise TilewrightError(
                    f"--{option} is one op's own; name that op alone with --op instead of {arguments.op}"
                )
    requests = []
    for name in names:
        try:
            request = _request(arguments, find_op(name), model)
        except _NotInModelError as error:
            # Asked for by name, it is a mistake; as a part of everything, it is what this model does without.
            if arguments.op != ALL_OPS:
                raise
            print(f"tune: {name} is left out: {error}", file=sys.stderr)
            continue
        if len(names) > 1 and not any(request.op.precisions(problem.signature) for problem in request.problems):
            request = replace(request, precisions=(LOSSLESS,))  # it has no weights to store
        requests.append(request)
    if not requests:
        raise TilewrightError(f"none of {', '.join(names)} can be tuned for this model")
    problems = sum(len(request.problems) for request in requests)
    time_s = requests[0].time_s if arguments.time else sum(request.time_s for request in requests)
    return [replace(each, time_s=time_s * len(each.problems) / problems) for each in requests]


def _op_names(text: str) -> list[str]:
    if text == ALL_OPS:
        return list(OPS)
    return list(dict.fromkeys(find_op(name).name for name in _names(text)))


class _NotInModelError(TilewrightError):
    """An op cannot be declared for a model."""


def _request(arguments: argparse.Namespace, op: OpDeclaration[Any, Any], model: ModelShape | None) -> Request:
    arch = find_arch(arguments.arch)
    if not any(arch.family in template.families for template in op.templates):
        raise TilewrightError(f"{op.name} has no template for {arch.name}; tune it with --arch native")
    if not runs_on(arch, read_cpu_info()):
        raise TilewrightError(
            f"arch {arch.name} does not run on this machine ({read_cpu_info().name}), so nothing could be timed; "
            "tune on such a machine, or use --arch native"
        )
    if arguments.search not in SEARCHES:
        raise TilewrightError(f"unknown search {arguments.search!r}; choose one of {', '.join(SEARCHES)}")
    routing = RoutingSpec.parse(arguments.routing)
    if not 0 <= arguments.seed <= _MAX_SEED:
        raise TilewrightError(f"--seed {arguments.seed} is impossible; give a number from 0 to {_MAX_SEED}")
    trials, time_s = _budget(arguments)
    return Request(
        op=op,
        problems=tuple(dict.fromkeys(_problems(arguments, op, model, routing))),
        arch=arch,
        threads=_threads(arguments.threads),
        trials=trials,
        time_s=time_s,
        search=arguments.search,
        seed=arguments.seed,
        resume=arguments.resume,
        model="" if model is None else model.name,
        probes=_probes(arguments.probes),
        templates=op.template_names(_names(arguments.template), arch) if arguments.template is not None else (),
        precisions=parse_precisions(arguments.precision),
        max_error=_max_error(arguments.max_error),
        batch_invariant=arguments.batch_invariant,
        weight_copies=_weight_copies(arguments.weight_copies),
    )


def _problems(
    arguments: argparse.Namespace, op: OpDeclaration[Any, Any], model: ModelShape | None, routing: RoutingSpec
) -> list[Problem]:
    """Problems of the model, or those that were given one by one."""
    if model is not None:
        asked = None if arguments.tokens is None else _tokens(arguments.tokens)
        try:
            signatures = (*op.signatures(model), *(op.further_signatures(model) if arguments.op == ALL_OPS else ()))
        except TilewrightError as error:
            raise _NotInModelError(str(error)) from error
        return [
            op.problem(signature, tokens, routing, model)
            for signature in signatures
            for tokens in asked or op.ladder(signature)
        ]
    if arguments.model is not None:
        raise TilewrightError("--model and --problem exclude each other; give one of them")
    if (arguments.tp, arguments.ep) != (1, 1):
        raise TilewrightError("--tp and --ep divide a model; give --problem the sizes of one rank instead")
    problems: list[Problem] = []
    for text in arguments.problem:
        fields = _fields(text, op.problem_example)
        for tokens in _tokens(arguments.tokens) if arguments.tokens is not None else [None]:
            sized = fields if tokens is None else {**fields, "tokens": str(tokens)}
            problems.append(op.parse_problem(sized, routing))
    return problems


def _max_error(asked: float) -> float:
    if not 0 <= asked < math.inf:
        raise TilewrightError(f"--max-error {asked} is impossible; give a number of at least 0, such as 0.01")
    return asked


def _budget(arguments: argparse.Namespace) -> tuple[int, float]:
    """Trials per problem and seconds in all; a limit that is given lifts the default of the other."""
    if arguments.trials is not None and arguments.trials < 1:
        raise TilewrightError(f"--trials {arguments.trials} is impossible; give at least 1")
    time_s = None if arguments.time is None else _seconds(arguments.time)
    if arguments.trials is None and time_s is None:
        return DEFAULT_TRIALS, DEFAULT_TIME_S
    return arguments.trials or 2 * ENDLESS_TRIALS, time_s if time_s is not None else math.inf


def _seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise TilewrightError(f"--time {text!r} is not a duration; give for example 90, 90s, 5m or 1h")
    return seconds


def _tokens(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise TilewrightError(f"--tokens {text!r} is not a list of whole numbers such as 1,4,16") from error
    if counts[0] < 1:
        raise TilewrightError(f"--tokens {text!r} holds {counts[0]}; token counts start at 1")
    return counts


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _fields(text: str, example: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not pairs or any(not sign for _, sign, _ in pairs):
        raise TilewrightError(f"--problem {text!r} is not key=value,...; for example: {example}")
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    if len(fields) < len(pairs):
        raise TilewrightError(f"--problem {text!r} gives a field twice; leave one of them out")
    return fields


def _threads(asked: int | None) -> int:
    cores = usable_cores()
    threads = cores if asked is None else asked
    if not 1 <= threads <= cores:
        raise TilewrightError(f"--threads {threads} is impossible here; this process may use 1 to {cores} cores")
    return threads


def _probes(asked: int) -> int:
    if asked < 0:
        raise TilewrightError(f"--probes {asked} is impossible; give 0 or more")
    return asked


def _weight_copies(asked: int) -> int:
    if asked < 1:
        raise TilewrightError(f"--weight-copies {asked} is impossible; give at least 1")
    return asked


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
