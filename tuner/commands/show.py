"""``tune show``: what is known, for which device, and how it is known."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from tilewright.codegen.ops import find_op
from tilewright.tuner.commands.common import add_options, only_one, print_json, table
from tilewright.tuner.progress import format_us
from tilewright.tuning_db.records import KernelRecord, PlanRecord, ProblemSummary
from tilewright.tuning_db.store import Store


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("show", help="what is known, for which device, how")
    parser.add_argument("kernel", nargs="?", help="key of a kernel, or how it starts: show that one")
    parser.add_argument("--source", action="store_true", help="with a kernel: print its source")
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show everything, or one kernel.

    Raises:
        TilewrightError: when there is no database, or no such kernel.

    """
    with Store.open_read_only(arguments.db) as store:
        if arguments.kernel:
            kernel = only_one("kernel", arguments.kernel, ((k.key, k) for k in store.kernels()))
            _show_kernel(kernel, arguments)
            return 0
        problems, plans = store.summary(), store.plans()
        if arguments.json:
            print_json(
                {
                    "database": store.name,
                    "devices": [asdict(device) for device in store.devices()],
                    "problems": [{**asdict(p), "trials": p.trials, "best": _best(store, p)} for p in problems],
                    "plans": [asdict(plan) for plan in plans],
                }
            )
            return 0
        print(f"database {store.name}")
        if not problems:
            print("nothing is known yet; run: tune --arch native --op moe_gemm")
            return 0
        for device in store.devices():
            print(f"device   {device.key}  {device.name}, {device.arch}")
        print()
        print("\n".join(table(_HEAD, (_row(store, p) for p in problems))))
        for plan in plans:
            print()
            print("\n".join(_plan_lines(plan, store)))
    return 0


_HEAD = ("problem", "tokens", "threads", "trials", "failed", "best", "95 %", "samples", "error", "timing", "what")


def _best(store: Store, problem: ProblemSummary) -> dict[str, Any] | None:
    """Fastest measured trial of a problem, with its sample count, interval and error."""
    found = store.best_trials(
        limit=1, problem_key=problem.problem_key, device_key=problem.device_key, threads=problem.threads
    )
    if not found:
        return None
    trial = found[0]
    return {
        "kernel": trial.kernel_key,
        "config": trial.config,
        "median_us": trial.median_us,
        "low_us": trial.low_us,
        "high_us": trial.high_us,
        "samples": len(trial.samples_us),
        "error": trial.error,
        "timing": trial.timing,
        "checked": "device",
    }


def _row(store: Store, summary: ProblemSummary) -> tuple[str, ...]:
    best = _best(store, summary)
    problem = find_op(summary.op).problem_from_dict(summary.problem)
    failed = sum(count for outcome, count in summary.outcomes.items() if outcome != "ok")
    shape = problem.signature.describe().split(" x_dtype")[0]
    measured = (
        ("-",) * 5
        if best is None
        else (
            format_us(best["median_us"]),
            f"{best['low_us']:.4g}-{best['high_us']:.4g}",
            str(best["samples"]),
            f"{best['error']:.0e}",
            best["timing"],
        )
    )
    counts = (str(problem.dynamic_size), str(summary.threads), str(summary.trials), str(failed))
    return (summary.problem_key[:8], *counts, *measured, shape)


def _plan_lines(plan: PlanRecord, store: Store) -> list[str]:
    kernels = {kernel.key: kernel for kernel in store.kernels(signature_key=plan.signature_key)}
    shape = " ".join(f"{name}={value}" for name, value in plan.signature.items() if not name.endswith("dtype"))
    lines = [
        f"plan     {shape}  {plan.model}",
        f"         {plan.threads} threads, layout {plan.layout}; timing: {plan.timing}, checked: {plan.checked}",
        *([f"         precision {plan.precision}, off by {plan.error:.2g}"] if plan.error else []),
    ]
    for entry in plan.entries:
        upto = "any more" if entry.max_tokens is None else f"<= {entry.max_tokens}"
        kernel = kernels.get(entry.kernel_key or "")
        what = "plain torch" if kernel is None else f"{kernel.key[:8]}  {kernel.template}"
        time = ""
        if entry.median_us is not None and entry.default_us is not None:
            time = f"{format_us(entry.median_us)} (default {format_us(entry.default_us)})"
        lines.append(f"         {upto:>9} tokens: {what}  {time}")
    return lines


def _show_kernel(kernel: KernelRecord, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(asdict(kernel))
    elif arguments.source:
        print(kernel.source, end="")
    else:
        knobs = " ".join(f"{name}={value}" for name, value in kernel.config.items() if value is not None)
        shape = " ".join(f"{name}={value}" for name, value in kernel.signature.items())
        print(f"kernel     {kernel.key}\nsignature  {shape}\nconfig     {knobs}\narch       {kernel.arch}")
        print(f"toolchain  {kernel.toolchain}\nfacts      {kernel.facts}\nchecked    {kernel.checked}")
