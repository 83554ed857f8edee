"""``tune --arch A[,A...] --op O[,O...]``: tune, then show what was found and what to do with it."""

from __future__ import annotations

import argparse
import itertools
import sys

from tilewright.codegen.numbers.precisions import LOSSLESS, PRECISIONS
from tilewright.codegen.ops.registry import OPS
from tilewright.plain_text import plain
from tilewright.tuner.campaign.campaign import Campaign, Report, Request
from tilewright.tuner.campaign.precision import DEFAULT_MAX_ERROR
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.commands.common import print_json
from tilewright.tuner.commands.dry_run import DryRun, dry_runs
from tilewright.tuner.commands.requests import (
    ALL_OPS,
    DEFAULT_MODEL,
    DEFAULT_PROBES,
    HELP,
    op_names,
    parse_model,
    parse_requests,
)
from tilewright.tuner.report.terminal import print_lines
from tilewright.tuner.search import DEFAULT_SEARCH, OPTUNA, SEARCHES
from tilewright.tuner.targets.base import COMPILING, MEASURING, Shown
from tilewright.tuning_db.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tuning command."""
    what = parser.add_argument_group("what to tune")
    what.add_argument("--arch", required=True, help="native, or archs by name: sm_90,gfx942")
    what.add_argument("--device", metavar="NAME", help="product of a GPU arch: h100-sxm, h200 (default: one per arch)")
    what.add_argument(
        "--predict",
        action="store_true",
        help="time nothing, though a GPU of that arch is there: compile, predict, and check in the interpreter",
    )
    what.add_argument("--op", required=True, help=f"{', '.join(OPS)}, several of them, or {ALL_OPS}")
    what.add_argument("--model", help=f"preset name, config.json, or the model's folder (default {DEFAULT_MODEL})")
    what.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    what.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks")
    what.add_argument(
        "--problem",
        action="append",
        metavar="KEY=VALUE,...",
        help="one problem instead of a model; `--problem help` lists fields",
    )
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
    trials = f"variants per problem (default {MEASURING.trials}, of GPUs {COMPILING.trials})"
    how.add_argument("--trials", type=int, metavar="N", help=trials)
    usual = f"{MEASURING.time_s:.0f}s an op, of GPUs {COMPILING.time_s:.0f}s in all"
    how.add_argument("--time", metavar="T", help=f"for an arch: 90, 90s, 5m, 1h (default {usual})")
    how.add_argument(
        "--search",
        default=DEFAULT_SEARCH,
        metavar="NAME",
        help=f"{', '.join(SEARCHES)}, or {OPTUNA}NAME for a sampler of Optuna's, such as {OPTUNA}TPESampler",
    )
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
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be tuned, how often a model calls it, and what of it is not counted; build nothing",
    )
    where = parser.add_argument_group("where to")
    where.add_argument("--db", metavar="PATH|URL", help="database (default $TILEWRIGHT_DB, or the user's data folder)")
    where.add_argument(
        "--study",
        default="",
        metavar="FILE|URL",
        help="journal or database in which optuna-dashboard can watch the search (default: in memory)",
    )
    where.add_argument("--json", action="store_true", help="one JSON document on stdout, progress on stderr")


def run(arguments: argparse.Namespace) -> int:
    """Tune; 0 when every problem has a right kernel, else 1. Asked what problems are, say that and tune nothing.

    Raises:
        TilewrightError: for input that cannot be tuned.

    """
    if HELP in (arguments.problem or ()):
        print("\n".join(OPS[name].problem_help() for name in op_names(arguments.op)))
        return 0
    if arguments.dry_run:
        arguments.study = ""  # opened, it would be made
    model = parse_model(arguments)
    requests = parse_requests(arguments, model, _warn)
    if arguments.dry_run:
        return _show_dry_runs(dry_runs(requests, model), as_json=arguments.json)
    shown: list[Shown] = []
    reports: list[Report] = []
    with Store.open(arguments.db) as store, Progress(sys.stderr) as progress:
        for target, group in itertools.groupby(requests, key=lambda request: request.target):
            with target:
                target.begin(progress)
                runs = [(request, _tune(request, store, progress)) for request in group]
                for findings in target.findings(runs, model, store.name):
                    shown.append(findings)
                    reports += findings.reports
                    if not arguments.json:
                        print_lines(findings.lines())
    if arguments.json:
        documents = [findings.document() for findings in shown]
        print_json(documents[0] if len(documents) == 1 else documents)
    signatures = [mine for report in reports for mine in report.signatures]
    return 0 if all(len(mine.finals) == len(mine.results) for mine in signatures) else 1


def _show_dry_runs(runs: list[DryRun], *, as_json: bool) -> int:
    for run in runs:
        for request in run.requests:
            request.target.close()
    if as_json:
        documents = [run.document() for run in runs]
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        for run in runs:
            print_lines(run.lines())
    return 0


def _tune(request: Request, store: Store, progress: Progress) -> Report:
    """Run ``request``, and put its plans to the test."""
    report = Campaign(request, store, progress).run()
    request.target.prove(request, report, store, progress)
    return report


def _warn(text: str) -> None:
    print(f"tune: warning: {plain(text)}", file=sys.stderr)
