"""``tune show``: what is known, for which device, and how it is known."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tilewright.codegen.ops.registry import find_op
from tilewright.tuner.campaign.standings import carried_interval, checked, measured_document, right_trials, standings
from tilewright.tuner.commands.common import add_options, only_one, open_store, print_json
from tilewright.tuner.plan.facts import costs_text, probed_text
from tilewright.tuner.report.terminal import print_lines, print_source
from tilewright.tuner.report.text import (
    format_interval,
    format_shape,
    format_us,
    labelled,
    table,
    terminal_width,
    wrapped,
)
from tilewright.tuner.targets.location import Location
from tilewright.tuning_db.records import KernelRecord, PlanEntry, PlanRecord, ProblemSummary, TrialRecord
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
    with open_store(arguments) as store:
        if arguments.kernel is not None:
            _show_kernel(store, arguments)
        elif arguments.json:
            print_json(_document(store))
        else:
            print_lines(_lines(store))
    return 0


@dataclass
class _Known:
    """What is known of one signature on one device with one thread count."""

    signature: dict[str, Any]
    device_key: str
    threads: int
    problems: list[_KnownProblem] = field(default_factory=list)
    plans: list[PlanRecord] = field(default_factory=list)
    """By rising error of their precision."""


@dataclass(frozen=True)
class _KnownProblem:
    """One problem, and its correct trials."""

    summary: ProblemSummary
    size: int
    trials: list[TrialRecord]

    @property
    def best(self) -> TrialRecord | None:
        """The trial of the best kernel."""
        return next(iter(standings(self.trials)), None)

    @property
    def failed(self) -> int:
        """Trials that were not ok."""
        return sum(count for outcome, count in self.summary.outcomes.items() if outcome != "ok")

    def timed(self, median_us: float | None) -> TrialRecord | None:
        """The last trial that took this very time."""
        return next((trial for trial in reversed(self.trials) if trial.median_us == median_us), None)


def _everything(store: Store) -> list[_Known]:
    known: dict[tuple[str, str, int], _Known] = {}
    for summary in store.summary():
        problem = find_op(summary.op).problem_from_dict(summary.problem)
        group = known.setdefault(
            (summary.signature_key, summary.device_key, summary.threads),
            _Known(problem.signature.to_dict(), summary.device_key, summary.threads),
        )
        group.problems.append(_KnownProblem(summary, problem.size, right_trials(store, summary)))
    for plan in store.plans():
        group = known.setdefault(
            (plan.signature_key, plan.device_key, plan.threads), _Known(plan.signature, plan.device_key, plan.threads)
        )
        group.plans.append(plan)
    for group in known.values():
        group.problems.sort(key=lambda problem: problem.size)
    return list(known.values())


def _document(store: Store) -> dict[str, Any]:
    known = _everything(store)
    return {
        "database": store.name,
        "devices": [asdict(device) for device in store.devices()],
        "problems": [_problem_document(problem) for group in known for problem in group.problems],
        "plans": [_plan_document(plan, group.problems) for group in known for plan in group.plans],
    }


def _problem_document(problem: _KnownProblem) -> dict[str, Any]:
    summary, best = problem.summary, problem.best
    return {
        "problem_key": summary.problem_key,
        "problem": summary.problem,
        "signature_key": summary.signature_key,
        "device_key": summary.device_key,
        "threads": summary.threads,
        "trials": summary.trials,
        "outcomes": summary.outcomes,
        "last_at": summary.last_at,
        "best": None
        if best is None
        else {
            "kernel": best.kernel_key,
            "config": best.config,
            "race": best.search,
            **measured_document(best),
            "timing": best.timing,
            "checked": checked(best),
        },
    }


def _plan_document(plan: PlanRecord, problems: Sequence[_KnownProblem]) -> dict[str, Any]:
    return {**asdict(plan), "entries": [_entry_document(entry, problems) for entry in plan.entries]}


def _entry_document(entry: PlanEntry, problems: Sequence[_KnownProblem]) -> dict[str, Any]:
    """One row of a plan, with the trials that its times come from; None for those that are not in the database."""
    sized = [problem for problem in problems if problem.size == entry.tuned_size]

    def trial(median_us: float | None) -> dict[str, Any] | None:
        found = next((t for problem in sized if median_us and (t := problem.timed(median_us))), None)
        return None if found is None else measured_document(found)

    return {**asdict(entry), "tuned": trial(entry.median_us), "default": trial(entry.default_us)}


def _lines(store: Store) -> list[str]:
    lines = [f"database {store.name}"]
    known = _everything(store)
    if not known:
        return [*lines, "nothing is known yet; run: tune --arch native --op moe_gemm"]
    lines += [f"device   {device.key}  {device.name}, {device.arch}" for device in store.devices()]
    for group in known:
        lines += ["", format_shape(group.signature), str(Location(group.device_key, group.threads))]
        if group.problems:
            lines += table(_HEAD, map(_row, group.problems), width=terminal_width())
        for plan in group.plans:
            lines += _plan_lines(plan, store)
    return lines


_HEAD = ("problem", "tokens", "trials", "best", "interval", "n", "error", "timing", "checked")


def _row(problem: _KnownProblem) -> tuple[str, ...]:
    best, summary = problem.best, problem.summary
    trials = f"{summary.trials} ({problem.failed} failed)" if problem.failed else str(summary.trials)
    counts = (summary.problem_key[:8], str(problem.size), trials)
    if best is None or best.median_us is None:
        return (*counts, *("-",) * 4, "none", "none")
    return (
        *counts,
        format_us(best.median_us),
        format_interval(best.median_us, *carried_interval(best), len(best.samples_us)),
        str(len(best.samples_us) or "-"),
        "-" if best.error is None else f"{best.error:.0e}",
        best.timing,
        checked(best),
    )


def _plan_lines(plan: PlanRecord, store: Store) -> list[str]:
    templates = {kernel.key: kernel.template for kernel in store.kernels(signature_key=plan.signature_key)}
    made = time.strftime("%Y-%m-%d", time.gmtime(plan.created_at))
    lines = [
        f"plan of {made}{f' for {plan.model}' if plan.model else ''}, weight layout {plan.layout or 'as given'}; "
        f"timing: {plan.timing}, checked: {plan.checked}",
        *([f"precision {plan.precision}, off by {plan.error:.2g}"] if plan.error else []),
        *(part for text in (*costs_text(plan), probed_text(plan)) if text for part in wrapped(text, terminal_width())),
    ]
    for entry in plan.entries:
        size = "any more" if entry.max_size is None else f"<= {entry.max_size}"
        what = "plain torch"
        if entry.kernel_key is not None:
            what = f"{entry.kernel_key[:8]} {templates.get(entry.kernel_key, 'of a missing kernel')}"
        if entry.median_us is not None and entry.default_us is not None:
            what += f"  {format_us(entry.median_us)}, default {format_us(entry.default_us)}"
        lines.append(f"  {size:>9} tokens: {what}")
    return lines


def _show_kernel(store: Store, arguments: argparse.Namespace) -> None:
    kernel = only_one("kernel", arguments.kernel, ((k.key, k) for k in store.kernels()))
    trials = store.trials(kernel_key=kernel.key)
    if arguments.json:
        print_json({**asdict(kernel), "trials": [_trial_document(trial) for trial in trials]})
    elif arguments.source:
        print_source(kernel.source)
    else:
        print_lines(_kernel_lines(kernel, trials))


def _told(value: Any) -> Any:
    """A fact in one word."""
    if isinstance(value, dict):
        return ",".join(f"{name}:{_told(inner)}" for name, inner in value.items()) or "none"
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _trial_document(trial: TrialRecord) -> dict[str, Any]:
    return {
        "problem_key": trial.problem_key,
        "problem": trial.problem,
        "device_key": trial.device_key,
        "threads": trial.threads,
        "race": trial.search,
        "outcome": trial.outcome,
        "message": trial.message,
        **measured_document(trial),
    }


def _kernel_lines(kernel: KernelRecord, trials: Sequence[TrialRecord]) -> list[str]:
    def words(fields: dict[str, Any]) -> str:
        return " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)

    rows = [
        (
            trial.problem_key[:8],
            str(find_op(trial.op).problem_from_dict(trial.problem).size),
            str(trial.threads),
            trial.search,
            trial.outcome.value,
            "-" if trial.median_us is None else format_us(trial.median_us),
            "-"
            if trial.median_us is None
            else format_interval(trial.median_us, *carried_interval(trial), len(trial.samples_us)),
            str(len(trial.samples_us) or "-"),
            "-" if trial.error is None else f"{trial.error:.0e}",
        )
        for trial in trials
    ]
    about = {
        "kernel": kernel.key,
        "signature": format_shape(kernel.signature),
        "config": words(kernel.config),
        "arch": kernel.arch,
        "toolchain": kernel.toolchain,
        "facts": words({n: v for n, v in kernel.facts.items() if n != "entries"}),
        "checked": kernel.checked,
    }
    for entry in kernel.facts.get("entries", ()):
        about[entry["entry"]] = words({name: _told(value) for name, value in entry.items() if name != "entry"})
    head = ("problem", "tokens", "threads", "race", "outcome", "median", "interval", "n", "error")
    width = terminal_width()
    return [
        *(line for label, text in about.items() for line in labelled(label, text, width=width)),
        "",
        *table(head, rows, width=width),
    ]
