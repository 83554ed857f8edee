"""``tune compare``: variants of one problem side by side, or two kernels knob by knob and line by line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilewright.codegen.hardware.archs import find_arch
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.loop import FINAL_RACE
from tilewright.tuner.campaign.standings import carried_interval, checked, measured_document, right_trials, standings
from tilewright.tuner.commands.common import add_options, only_one, open_store, print_json
from tilewright.tuner.report.comparison import compare_kernels
from tilewright.tuner.report.roofline import Achieved, ceilings, format_share
from tilewright.tuner.report.terminal import print_lines
from tilewright.tuner.report.text import (
    format_interval,
    format_shape,
    format_us,
    labelled,
    table,
    terminal_width,
)
from tilewright.tuner.targets.location import Location
from tilewright.tuning_db.records import ProblemSummary, TrialRecord
from tilewright.tuning_db.store import Store


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("compare", help="variants side by side")
    parser.add_argument("keys", nargs="*", help="a problem's key, or two kernels' keys (how they start is enough)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="fastest variants of a problem")
    parser.add_argument("--disassembly", action="store_true", help="with two kernels: compare machine code too")
    parser.add_argument("--ir", action="store_true", help="with two GPU kernels: compare TTGIR and PTX too")
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare.

    Raises:
        TilewrightError: when the keys name nothing, or too much.

    """
    if arguments.top < 1:
        raise TilewrightError(f"--top {arguments.top} is impossible; give at least 1")
    if len(arguments.keys) > 2:
        raise TilewrightError(f"{len(arguments.keys)} keys are too many; give one problem's, or two kernels'")
    if arguments.disassembly and len(arguments.keys) != 2:
        raise TilewrightError("--disassembly compares two kernels; give the keys of both (`tune compare` lists them)")
    if arguments.ir and len(arguments.keys) != 2:
        raise TilewrightError("--ir compares two kernels; give the keys of both (`tune compare` lists them)")
    with open_store(arguments) as store:
        if len(arguments.keys) == 2:
            a, b = (only_one("kernel", key, ((k.key, k) for k in store.kernels())) for key in arguments.keys)
            comparison = compare_kernels(store, a, b, ir=arguments.ir, disassembly=arguments.disassembly)
            if arguments.json:
                print_json(comparison.document())
            else:
                print_lines(comparison.lines())
            return 0
        problems = _chosen(store, arguments.keys)
        documents = [_variants(store, problem, arguments.top) for problem in problems]
    if arguments.json:
        print_json(documents)
    else:
        blocks = map(_lines, documents)
        print_lines(line for i, block in enumerate(blocks) for line in ([""] if i else []) + block)
    return 0


def _chosen(store: Store, keys: Sequence[str]) -> list[ProblemSummary]:
    """Problems to show; a key may stand for one problem on several devices or with several thread counts."""
    problems = store.summary()
    if not problems:
        raise TilewrightError("nothing is stored yet; run: tune --arch native --op moe_gemm")
    if not keys:
        return problems
    key = only_one("problem", keys[0], ((p.problem_key, p.problem_key) for p in problems))
    return [problem for problem in problems if problem.problem_key == key]


def _variants(store: Store, summary: ProblemSummary, top: int) -> dict[str, Any]:
    op = find_op(summary.op)
    problem = op.problem_from_dict(summary.problem)
    arch = next((find_arch(d.arch) for d in store.devices() if d.key == summary.device_key), None)
    if arch is None:
        raise TilewrightError(
            f"{store.name} names the device {summary.device_key!r}, which it does not hold; tune again"
        )
    default_config = op.default_for(problem, arch)
    right = right_trials(store, summary)
    ranked = standings([replace(t, config=dict(op.read_config(t.config, problem.signature, arch))) for t in right])
    default = next((trial for trial in ranked if trial.config == default_config), None)
    chosen = ranked[:top]
    if default is not None and default not in chosen:
        chosen.append(default)
    bound_us, roofline = _bound(op, problem, summary, chosen)
    return {
        "problem": summary.problem_key,
        "signature": problem.signature.to_dict(),
        "size_name": problem.signature.size_name,
        "size": problem.size,
        "threads": summary.threads,
        "device": summary.device_key,
        "roofline_us": bound_us,
        "roofline": roofline,
        "variants": [_variant(trial, ranked[0], default, bound_us) for trial in chosen],
    }


def _bound(
    op: OpDeclaration[Any, Any], problem: Problem, summary: ProblemSummary, shown: Sequence[TrialRecord]
) -> tuple[float | None, str]:
    """Least time of a problem in us, and in words where it comes from; None where it is not known here."""
    if shown and all(trial.timing == "predicted" for trial in shown):
        return None, f"predicted for {summary.device_key}; nothing was timed on it"
    if summary.device_key != read_cpu_info().key:
        return None, "the roofline is not known here: the times are of another device"
    try:
        work = op.workload(problem, op.inputs(problem, 0))
        achieved = [Achieved(work.flops, work.min_bytes, t.median_us) for t in shown if t.median_us]
        roofline = ceilings(summary.threads).explaining(achieved)
    except TilewrightError as error:  # no compiler, or recorded routing that is gone
        return None, f"the roofline is not known here: {error}"
    words = f"{roofline.peak_gflops:.0f} GFLOP/s, {roofline.bandwidth_gbps:.0f} GB/s"
    return roofline.time_us(work.flops, work.min_bytes), f"roofline as measured just now: {words}"


def _variant(
    trial: TrialRecord, best: TrialRecord, default: TrialRecord | None, bound_us: float | None
) -> dict[str, Any]:
    median = trial.median_us or 0.0
    return {
        "kernel": trial.kernel_key,
        **measured_document(trial),
        "against_best": median / (best.median_us or median),
        "against_default": median / default.median_us if default and default.median_us else None,
        "within_noise_of_best": trial.timing == "measured" and not _told_apart(trial, best),
        "is_default": trial is default,
        "race": trial.search,
        "roofline_share": None if bound_us is None else bound_us / median,
        "timing": trial.timing,
        "checked": checked(trial),
        "config": trial.config,
    }


def _told_apart(trial: TrialRecord, best: TrialRecord) -> bool:
    """Whether the intervals do not overlap; too few samples for one tell nothing apart."""
    low_us, best_high_us = carried_interval(trial)[0], carried_interval(best)[1]
    return trial is not best and low_us is not None and best_high_us is not None and low_us > best_high_us


_HEAD = (
    "kernel",
    "median",
    "interval",
    "n",
    "time/best",
    "time/default",
    "roofline",
    "error",
    "race",
    "timing",
    "checked",
)
_NOTE = """\
time/best 1.10 is 10 % slower than the best; ~: the intervals overlap, or samples are too few for one.
race: finalists met in one last race (final); the others were timed at other moments, and compare only roughly."""


def _lines(document: dict[str, Any]) -> list[str]:
    variants = document["variants"]
    title = [
        f"{document['problem'][:8]}  {format_shape(document['signature'])} {document['size_name']}={document['size']}",
        str(Location(document["device"], document["threads"])),
    ]
    if not variants:
        return [*title, "no variant was right; `tune show` counts what failed"]
    rows = [
        (
            v["kernel"][:8] + (" default" if v["is_default"] else ""),
            format_us(v["median_us"]),
            format_interval(v["median_us"], v["low_us"], v["high_us"], v["samples"]),
            str(v["samples"] or "-"),
            f"{v['against_best']:.2f}" + (" ~" if v["within_noise_of_best"] else "  "),
            "-" if v["against_default"] is None else f"{v['against_default']:.2f}",
            "-" if v["roofline_share"] is None else format_share(v["roofline_share"]),
            "-" if v["error"] is None else f"{v['error']:.0e}",
            "final" if v["race"] == FINAL_RACE else v["race"],
            v["timing"],
            v["checked"],
        )
        for v in variants
    ]
    width = terminal_width()
    return [
        *title,
        *table(_HEAD, rows, width=width),
        "",
        *_knob_lines(variants, width),
        "",
        document["roofline"],
        *_NOTE.splitlines(),
    ]


def _knob_lines(variants: Sequence[dict[str, Any]], width: int | None) -> list[str]:
    """One row per variant of what sets it apart, "-" for a knob that its template lacks; below, what all share."""
    names = dict.fromkeys(name for v in variants for name in v["config"])
    values = {name: [str(v["config"].get(name, "-")) for v in variants] for name in names}
    varying = [name for name in names if len(set(values[name])) > 1]
    rows = [(v["kernel"][:8], *(values[name][index] for name in varying)) for index, v in enumerate(variants)]
    same = " ".join(f"{name}={values[name][0]}" for name in names if name not in varying)
    return [
        *(table(("kernel", *varying), rows, width=width) if varying else []),
        *(labelled("all", same, width=width) if same else []),
    ]
