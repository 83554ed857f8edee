"""``tune --arch A --op O``: tune, then show what was found and what to do with it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from tilewright.codegen.archs import find_arch, runs_on
from tilewright.codegen.cpu_info import read_cpu_info, usable_cores
from tilewright.codegen.models import load_model
from tilewright.codegen.ops import OPS, find_op
from tilewright.codegen.ops.base import Problem
from tilewright.codegen.precisions import LOSSLESS, PRECISIONS, parse_precisions
from tilewright.codegen.routing import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign import Campaign, Report, Request, SignatureReport
from tilewright.tuner.deployed import Deployed, race_against_torch
from tilewright.tuner.plan import Final
from tilewright.tuner.precision import DEFAULT_MAX_ERROR, FrontPoint
from tilewright.tuner.progress import ENDLESS_TRIALS, Progress, format_us
from tilewright.tuner.roofline import Roofline, measure_roofline
from tilewright.tuner.search import DEFAULT_SEARCH, SEARCHES
from tilewright.tuning_db.integrity import UntrustedFile, check_private
from tilewright.tuning_db.store import Store

DEFAULT_MODEL = "mixtral-8x7b"
DEFAULT_TOKENS = (1, 4, 16, 64, 256)
DEFAULT_TRIALS = 60
DEFAULT_TIME_S = 130.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tuning command."""
    what = parser.add_argument_group("what to tune")
    what.add_argument("--arch", required=True, help="native, or an arch by name")
    what.add_argument("--op", required=True, help=", ".join(OPS))
    what.add_argument("--model", help=f"preset name, config.json or its folder (default {DEFAULT_MODEL})")
    what.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    what.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks")
    what.add_argument("--problem", action="append", metavar="KEY=VALUE,...", help="one problem instead of a model")
    ladder = ",".join(map(str, DEFAULT_TOKENS))
    what.add_argument("--tokens", metavar="N,N,...", help=f"token counts (default {ladder})")
    what.add_argument(
        "--routing", default="balanced", metavar="KIND", help="balanced, power-law[:ALPHA] or recorded:FILE"
    )
    how = parser.add_argument_group("how hard")
    how.add_argument("--trials", type=int, metavar="N", help=f"variants per problem (default {DEFAULT_TRIALS})")
    how.add_argument("--time", metavar="T", help=f"for everything: 90, 90s, 5m, 1h (default {DEFAULT_TIME_S:.0f}s)")
    how.add_argument("--search", default=DEFAULT_SEARCH, help=", ".join(SEARCHES))
    how.add_argument("--threads", type=int, metavar="N", help="threads of a kernel (default: all cores)")
    how.add_argument("--seed", type=int, default=0, metavar="N")
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
    request = _request(arguments)
    progress = Progress(sys.stderr)
    with Store.open(arguments.db) as store:
        if store.path is not None:
            _warn_if_not_servable(store.path)
        before = measure_roofline(request.threads)
        report = Campaign(request, store, progress).run()
        deployed = {
            mine.signature.key: _race_deployed(mine, store, request, progress)
            for mine in report.signatures
            if mine.plan
        }
        measure_roofline.cache_clear()
        roofline = before.raised_to(measure_roofline(request.threads))
        if arguments.json:
            print(json.dumps(_document(report, request, deployed, roofline, store.name), indent=1))
        else:
            print(_text(report, request, deployed, roofline, store.name))
    return 0 if all(len(mine.finals) == len(mine.results) for mine in report.signatures) else 1


def _warn_if_not_servable(path: Path) -> None:
    """Say at once, not after the work, that the runtime will run nothing from this database."""
    try:
        check_private(path)
    except UntrustedFile as error:
        print(f"tune: warning: {error}", file=sys.stderr)


def _request(arguments: argparse.Namespace) -> Request:
    op = find_op(arguments.op)
    arch = find_arch(arguments.arch)
    if not runs_on(arch, read_cpu_info()):
        raise TilewrightError(
            f"arch {arch.name} does not run on this machine ({read_cpu_info().name}), so nothing could be timed; "
            "tune on such a machine, or use --arch native"
        )
    if arguments.search not in SEARCHES:
        raise TilewrightError(f"unknown search {arguments.search!r}; choose one of {', '.join(SEARCHES)}")
    routing = RoutingSpec.parse(arguments.routing)
    problems: list[Problem] = []
    model_name = ""
    if arguments.problem:
        if arguments.model:
            raise TilewrightError("--model and --problem exclude each other; give one of them")
        for text in arguments.problem:
            fields = _fields(text)
            for tokens in _tokens(arguments.tokens) if arguments.tokens else [None]:
                sized = fields if tokens is None else {**fields, "tokens": str(tokens)}
                problems.append(op.parse_problem(sized, routing))
    else:
        model = load_model(arguments.model or DEFAULT_MODEL, tp=arguments.tp, ep=arguments.ep)
        model_name = model.name
        ladder = _tokens(arguments.tokens) if arguments.tokens else DEFAULT_TOKENS
        problems = [op.problem(s, tokens, routing, model) for s in op.signatures(model) for tokens in ladder]
    trials, time_s = _budget(arguments)
    return Request(
        op=op,
        problems=tuple(dict.fromkeys(problems)),
        arch=arch,
        threads=_threads(arguments.threads),
        trials=trials,
        time_s=time_s,
        search=arguments.search,
        seed=arguments.seed,
        resume=arguments.resume,
        model=model_name,
        precisions=parse_precisions(arguments.precision),
        max_error=_max_error(arguments.max_error),
    )


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


def _fields(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not pairs or any(not sign for _, sign, _ in pairs):
        raise TilewrightError(f"--problem {text!r} is not key=value,...; for example: experts=8,n=2048,k=1024,top_k=2")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _threads(asked: int | None) -> int:
    cores = usable_cores()
    threads = cores if asked is None else asked
    if not 1 <= threads <= cores:
        raise TilewrightError(f"--threads {threads} is impossible here; this process may use 1 to {cores} cores")
    return threads


def _race_deployed(mine: SignatureReport, store: Store, request: Request, progress: Progress) -> list[Deployed]:
    """The plan as the runtime serves it, against plain torch; only where the runtime can read the database."""
    if store.path is None:
        progress.say("the runtime reads SQLite only, so the plan is not raced against torch")
        return []
    progress.say("racing the stored plan, as the runtime serves it, against plain torch")
    return race_against_torch(
        [final.problem for final in mine.finals],
        database=str(store.path),
        threads=request.threads,
        max_error=mine.plan.error if mine.plan else 0.0,
        seed=request.seed,
        budget_s=min(8.0, 0.1 * request.time_s),
    )


def _text(
    report: Report, request: Request, deployed: dict[str, list[Deployed]], roofline: Roofline, database: str
) -> str:
    lines = [""]
    for mine in report.signatures:
        lines += [mine.signature.describe(), *_table(mine, request, deployed.get(mine.signature.key, []), roofline)]
        if mine.layout is not None and mine.layout.cost > 1.005:
            lines.append(f"  one weight layout for all sizes ({mine.layout.key}) costs {mine.layout.cost - 1:.1%}")
        lines += [*_front_table(mine), ""]
    cpu = read_cpu_info()
    lines += [
        f"measured on {cpu.name}, {request.threads} threads, {request.arch.name}; every kernel checked against fp64",
        f"{report.trials} trials in {report.wall_s:.0f} s; {report.efficiency:.0%} of the time compiling "
        f"({report.build_s:.0f} s), checking ({report.check_s:.0f} s) or measuring ({report.measure_s:.0f} s)",
        f"roofline here: {roofline.peak_gflops:.0f} GFLOP/s, {roofline.bandwidth_gbps:.0f} GB/s",
        f"stored in {database}",
        "",
        "next:  tune show                 what is known, and how",
        "       tune compare              variants side by side",
        "       from tilewright.runtime import Experts   serves these kernels by itself; see README",
    ]
    return "\n".join(lines)


def _front_table(mine: SignatureReport) -> list[str]:
    """Time against error of the precisions that were tried; nothing where there is no choice."""
    if len(mine.front) < 2:
        return []
    lossless = next((point for point in mine.front if point.precision == LOSSLESS), None)
    lines = [f"  {'precision':>9}  {'error':>8}  {'largest':>8}  {'mean us':>9}  {'vs fp32':>7}  each stored as a plan"]
    for point in mine.front:
        gain = f"{lossless.time_us / point.time_us:.2f}x" if lossless else "-"
        serves = "the result" if point.plan is mine.plan else f"serves with max_error < {_next_error(mine, point):.2g}"
        lines.append(
            f"  {point.precision:>9}  {point.error.relative:>8.2g}  {point.error.largest:>8.2g}"
            f"  {point.time_us:>9.1f}  {gain:>7}  {serves}"
        )
    lines.append("  error: ||out - exact|| / ||exact||, largest: max |out - exact| / max |exact|; at the worst size")
    return lines


def _next_error(mine: SignatureReport, point: FrontPoint) -> float:
    """From which on a faster plan serves instead."""
    following = mine.front[mine.front.index(point) + 1 :]
    return following[0].error.relative if following else math.inf


_HEAD = (
    f"  {'tokens':>6}  {'torch':>9}  {'default':>9}  {'tuned':>9}  {'vs default':>18}  {'vs torch':>18}"
    f"  {'roofline':>8}  {'noise':>6}  kernel"
)


def _table(mine: SignatureReport, request: Request, deployed: list[Deployed], roofline: Roofline) -> list[str]:
    by_tokens = {row.tokens: row for row in deployed}
    lines = [_HEAD]
    for final in mine.finals:
        row = by_tokens.get(final.problem.dynamic_size)
        lines.append(
            f"  {final.problem.dynamic_size:>6}  {format_us(row.torch_us) if row else '-':>9}"
            f"  {format_us(final.default_us.median_us or 0):>9}  {format_us(final.winner_us.median_us or 0):>9}"
            f"  {_interval(final.speedup.median, final.speedup.low, final.speedup.high):>18}"
            f"  {_interval(row.speedup, row.speedup_low, row.speedup_high) if row else '-':>18}"
            f"  {_roofline_share(final, request, roofline):>8.0%}  {final.noise.noise:>6.1%}  {_knobs(final)}"
        )
    failed = len(mine.results) - len(mine.finals)
    return [*lines, *([f"  {failed} sizes have no right kernel"] if failed else [])]


def _interval(middle: float, low: float, high: float) -> str:
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"


def _roofline_share(final: Final, request: Request, roofline: Roofline) -> float:
    work = request.op.workload(final.problem, request.op.inputs(final.problem, request.seed))
    return roofline.time_us(work.flops, work.min_bytes) / (final.winner_us.median_us or math.inf)


def _knobs(final: Final) -> str:
    """The template and the register tile: enough to recognise a kernel."""
    config = final.winner.variant.config
    same = " (the default)" if final.winner == final.default else ""
    name = str(config["template"]).rpartition("/")[2]
    return f"{name} {config.get('block_rows')}x{config.get('vectors')}{same}"


def _document(
    report: Report, request: Request, deployed: dict[str, list[Deployed]], roofline: Roofline, database: str
) -> dict[str, Any]:
    return {
        "run": report.run_id,
        "op": request.op.name,
        "arch": request.arch.name,
        "device": read_cpu_info().key,
        "threads": request.threads,
        "model": request.model,
        "database": database,
        "trials": report.trials,
        "wall_s": report.wall_s,
        "efficiency": report.efficiency,
        "roofline": {"peak_gflops": roofline.peak_gflops, "bandwidth_gbps": roofline.bandwidth_gbps},
        "signatures": [
            {
                "signature": mine.signature.to_dict(),
                "layout": mine.layout.key if mine.layout else None,
                "layout_cost": mine.layout.cost if mine.layout else None,
                "problems": [
                    _final_document(final, request, roofline, deployed.get(mine.signature.key, []))
                    for final in mine.finals
                ],
                "precision": mine.plan.precision if mine.plan else None,
                "error": mine.plan.error if mine.plan else None,
                "front": [_point_document(point) for point in mine.front],
                "unsolved": len(mine.results) - len(mine.finals),
            }
            for mine in report.signatures
        ],
    }


def _final_document(final: Final, request: Request, roofline: Roofline, deployed: list[Deployed]) -> dict[str, Any]:
    row = next((row for row in deployed if row.tokens == final.problem.dynamic_size), None)
    return {
        "tokens": final.problem.dynamic_size,
        "kernel": final.winner.variant.key,
        "config": dict(final.winner.variant.config),
        "timing": "measured",
        "checked": "device",
        "tuned": _measured(final.winner_us),
        "default": _measured(final.default_us),
        "speedup": {"median": final.speedup.median, "low": final.speedup.low, "high": final.speedup.high},
        "noise": final.noise.noise,
        "roofline_share": _roofline_share(final, request, roofline),
        "deployed": None if row is None else vars(row),
    }


def _point_document(point: FrontPoint) -> dict[str, Any]:
    return {
        "precision": point.precision,
        "error": point.error.relative,
        "largest_error": point.error.largest,
        "layout": point.plan.layout,
        "geometric_mean_us": point.time_us,
        "problems": [
            {"tokens": final.problem.dynamic_size, "kernel": final.winner.variant.key, **_measured(final.winner_us)}
            for final in point.finals
        ],
    }


def _measured(evaluation: Any) -> dict[str, Any]:
    return {
        "median_us": evaluation.median_us,
        "low_us": evaluation.low_us,
        "high_us": evaluation.high_us,
        "samples": len(evaluation.samples_us),
        "error": evaluation.error,
    }
