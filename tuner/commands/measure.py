"""``tune measure``: kernels that were prepared anywhere, raced on the GPU that is here, and plans made from that."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

from tilewright.codegen.hardware.archs import GPU_ARCHS, GpuArch
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.campaign import Request
from tilewright.tuner.campaign.measuring_effort import SignatureEffort, efforts, total_s
from tilewright.tuner.campaign.prepared import Prepared, prepared
from tilewright.tuner.campaign.progress import Progress
from tilewright.tuner.campaign.remeasuring import MEASURED_AGAIN, Remeasurement
from tilewright.tuner.commands.common import print_json
from tilewright.tuner.commands.measured_findings import MeasuredFindings
from tilewright.tuner.commands.requests import parse_seconds
from tilewright.tuner.report.terminal import print_lines
from tilewright.tuner.report.text import format_shape, table, terminal_width
from tilewright.tuner.targets.base import Wishes
from tilewright.tuner.targets.device import DeviceTarget, devices_here, runs
from tilewright.tuning_db.store import Store

DEFAULT_TOP = 4
DEFAULT_TIME = "9m"
_HEAD = ("size", "kernels", "checked launches", "timed launches", "MB copied", "preparing", "racing")


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("measure", help="race prepared kernels on the GPU that is here, and plan anew")
    parser.add_argument("--arch", metavar="A", help="of the device (default: that of the first device here)")
    parser.add_argument("--device", metavar="NAME", help="which of several devices of that arch")
    parser.add_argument("--op", metavar="O,O,...", default="", help=f"only these of {', '.join(OPS)} (default: all)")
    parser.add_argument(
        "--top",
        type=int,
        default=DEFAULT_TOP,
        metavar="K",
        help=f"kernels predicted fastest that are raced at each size, beside the default (default {DEFAULT_TOP})",
    )
    parser.add_argument(
        "--time",
        default=DEFAULT_TIME,
        metavar="T",
        help=f"after which no race begins: 90, 90s, 5m (default {DEFAULT_TIME})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what has a measured plan since it was predicted last"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say how many launches, bytes and seconds it would take; measure nothing"
    )
    parser.add_argument("--db", metavar="PATH|URL", help="database (default $TILEWRIGHT_DB, or the user's data folder)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, progress on stderr")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure; 0 when every size has a right kernel, else 1.

    Raises:
        TilewrightError: where there is no such device, or nothing was prepared for it.

    """
    if arguments.top < 1:
        raise TilewrightError(f"--top {arguments.top} is impossible; give at least 1")
    time_s = parse_seconds(arguments.time)
    ops = [find_op(name.strip()).name for name in arguments.op.split(",") if name.strip()]
    if arguments.dry_run:
        return _dry_run(arguments, ops, time_s)
    findings: list[MeasuredFindings] = []
    with _target(arguments) as target, Store.open(arguments.db, create=False) as store:
        found = prepared(store, target.arch, target.device.key, ops)
        if arguments.resume:
            found = _left(store, found, target.device.key)
        with Progress(sys.stderr) as progress:
            progress.say(f"measuring on {target.present.facts.name} ({target.arch.name})")
            for requests, group in _requests(found, target, time_s, arguments.seed):
                measured = Remeasurement(requests, store, progress, group, arguments.top)
                report = measured.run()
                findings.append(MeasuredFindings(report, requests, store.name, measured.qualities))
                time_s = max(0.0, time_s - report.wall_s)
    if arguments.json:
        documents = [each.document() for each in findings]
        print_json(documents[0] if len(documents) == 1 else documents)
    else:
        for each in findings:
            print_lines(each.lines())
        if not findings:
            print("every predicted plan has a measured one")
    signatures = [mine for each in findings for mine in each.report.signatures]
    return 0 if all(mine.results and len(mine.finals) == len(mine.results) for mine in signatures) else 1


def _target(arguments: argparse.Namespace) -> DeviceTarget:
    arch = _arch(arguments)
    target = DeviceTarget.find(arch, Wishes(arguments.device), _nothing)
    if target is None:
        raise TilewrightError(
            f"there is no CUDA device of {arch.name} here{f' called {arguments.device}' if arguments.device else ''}; "
            "run it where one is, or `tune --predict`"
        )
    return target


def _arch(arguments: argparse.Namespace) -> GpuArch:
    """The arch that is named, or that of the first device here that is known."""
    if arguments.arch is not None:
        if arguments.arch not in GPU_ARCHS:
            raise TilewrightError(f"--arch {arguments.arch} is no arch of GPUs; known are {', '.join(GPU_ARCHS)}")
        return GPU_ARCHS[arguments.arch]
    for device in devices_here():
        for arch in GPU_ARCHS.values():
            if runs(device, arch):
                return arch
    raise TilewrightError("there is no CUDA device here; run it where one is, or name what to plan for by --arch")


def _requests(
    found: Sequence[Prepared], target: DeviceTarget, time_s: float, seed: int
) -> list[tuple[Request, dict[str, Prepared]]]:
    """One for all signatures of an op that are alike in what a request says; they share the time by their problems."""

    def kind(each: Prepared) -> tuple[str, str, bool, int]:
        return each.op.name, each.model, each.batch_invariant, each.copies

    made = []
    left = sum(len(each.problems) for each in found)
    for _, group in itertools.groupby(sorted(found, key=kind), key=kind):
        members = list(group)
        problems = tuple(problem for each in members for problem in each.problems)
        first = members[0]
        request = Request(
            op=first.op,
            problems=problems,
            target=target,
            trials=0,
            time_s=time_s * len(problems) / left,
            search=MEASURED_AGAIN,
            seed=seed,
            resume=False,
            model=first.model,
            probes=0,
            precisions=tuple(dict.fromkeys(name for each in members for name in each.precisions)),
            max_error=math.inf,
            batch_invariant=first.batch_invariant,
            weight_copies=first.copies,
        )
        made.append((request, {each.signature.key: each for each in members}))
    return made


def _left(store: Store, found: Sequence[Prepared], device_key: str) -> list[Prepared]:
    """Those of ``found`` that have no measured plan since they were predicted."""
    measured = {
        (plan.op, plan.signature_key, plan.batch_invariant): plan.created_at
        for plan in store.plans(device_key=device_key)
        if plan.timing == "measured"
    }

    def is_left(each: Prepared) -> bool:
        made_at = measured.get((each.op.name, each.signature.key, each.batch_invariant))
        return made_at is None or made_at < max(plan.created_at for plan in each.plans)

    return [each for each in found if is_left(each)]


def _dry_run(arguments: argparse.Namespace, ops: Sequence[str], time_s: float) -> int:
    """Needs no device where an arch is named."""
    arch = _arch(arguments)
    with Store.open_read_only(arguments.db) as store:
        found = efforts(prepared(store, arch, arguments.device or "", ops), arch, arguments.top)
    if arguments.json:
        print_json(_effort_document(found, arch, time_s))
    else:
        print_lines(_effort_lines(found, arch, time_s))
    return 0


def _effort_document(found: Sequence[SignatureEffort], arch: GpuArch, time_s: float) -> dict[str, Any]:
    return {
        "arch": arch.name,
        "time_s": time_s,
        "most_s": total_s(found, time_s),
        "signatures": [
            {
                "op": each.prepared.op.name,
                "signature": each.prepared.signature.to_dict(),
                "weight_bytes": each.weight_bytes,
                "prepare_s": each.prepare_s,
                "sizes": [vars(problem) for problem in each.problems],
            }
            for each in found
        ],
    }


def _effort_lines(found: Sequence[SignatureEffort], arch: GpuArch, time_s: float) -> list[str]:
    lines = [f"{arch.name}: nothing is measured; this is what a run would do"]
    for each in found:
        rows = [
            (
                str(problem.size),
                str(problem.kernels),
                str(problem.checked_launches),
                str(problem.timed_launches),
                f"{problem.device_bytes / 1e6:.0f}",
                f"{problem.prepare_s:.1f} s",
                f"{problem.least_s:.1f}-{problem.most_s:.1f} s",
            )
            for problem in each.problems
        ]
        lines += [
            "",
            format_shape(each.prepared.signature.to_dict()),
            f"weights: {each.weight_bytes / 1e6:.0f} MB copied; {each.prepare_s:.0f} s to draw, pack and check",
            *table(_HEAD, rows, width=terminal_width()),
        ]
    checked = sum(problem.checked_launches for each in found for problem in each.problems)
    timed = sum(problem.timed_launches for each in found for problem in each.problems)
    copied = sum(each.weight_bytes + sum(problem.device_bytes for problem in each.problems) for each in found)
    return [
        *lines,
        "",
        f"in all at least {checked} launches that are checked, and about {timed} that are timed; "
        f"{copied / 1e9:.1f} GB copied to the device",
        f"{sum(each.least_s for each in found):.0f} s with the shortest races; no race begins after {time_s:.0f} s "
        f"(--time), so at the most {total_s(found, time_s):.0f} s",
    ]


def _nothing(text: str) -> None:
    del text
