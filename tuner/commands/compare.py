"""``tune compare``: variants of one problem side by side, or two kernels knob by knob and line by line."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tilewright.codegen.archs import native_arch
from tilewright.codegen.ops import find_op
from tilewright.errors import TilewrightError
from tilewright.tuner.commands.common import add_options, only_one, print_json, table
from tilewright.tuner.progress import format_us
from tilewright.tuner.roofline import measure_roofline
from tilewright.tuning_db.records import KernelRecord, ProblemSummary, TrialRecord
from tilewright.tuning_db.store import Store


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("compare", help="variants side by side")
    parser.add_argument("keys", nargs="*", help="a problem's key, or two kernels' keys (how they start is enough)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="fastest variants of a problem")
    parser.add_argument("--disassembly", action="store_true", help="with two kernels: compare machine code too")
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare.

    Raises:
        TilewrightError: when the keys name nothing, or too much.

    """
    with Store.open_read_only(arguments.db) as store:
        if len(arguments.keys) == 2:
            chosen = [only_one("kernel", key, ((k.key, k) for k in store.kernels())) for key in arguments.keys]
            _compare_kernels(store, chosen[0], chosen[1], arguments)
            return 0
        problems = store.summary()
        if arguments.keys:
            problems = [only_one("problem", arguments.keys[0], ((p.problem_key, p) for p in problems))]
        if not problems:
            raise TilewrightError("nothing is stored yet; run: tune --arch native --op moe_gemm")
        documents = [_variants(store, problem, arguments.top) for problem in problems]
    if arguments.json:
        print_json(documents)
    else:
        print("\n\n".join("\n".join(_lines(document)) for document in documents))
    return 0


def _variants(store: Store, summary: ProblemSummary, top: int) -> dict[str, Any]:
    op = find_op(summary.op)
    problem = op.problem_from_dict(summary.problem)
    work = op.workload(problem, op.inputs(problem, 0))
    bound_us = measure_roofline(summary.threads).time_us(work.flops, work.min_bytes)
    default_config = dict(op.default_config(problem.signature, native_arch()))
    ranked: dict[str, TrialRecord] = {}
    known = store.best_trials(
        limit=10 * top + 50,
        problem_key=summary.problem_key,
        device_key=summary.device_key,
        threads=summary.threads,
    )
    for trial in known:
        ranked.setdefault(trial.kernel_key or "", trial)
    default = next((t for t in ranked.values() if t.config == default_config), None)
    chosen = list(ranked.values())[:top]
    if default is not None and default not in chosen:
        chosen.append(default)
    return {
        "problem": summary.problem_key,
        "what": f"{problem.signature.describe()} tokens={problem.dynamic_size} threads={summary.threads}",
        "roofline_us": bound_us,
        "variants": [_variant(t, chosen[0], default, bound_us) for t in chosen],
    }


def _variant(trial: TrialRecord, best: TrialRecord, default: TrialRecord | None, bound_us: float) -> dict[str, Any]:
    median = trial.median_us or 0.0
    return {
        "kernel": trial.kernel_key,
        "median_us": median,
        "low_us": trial.low_us,
        "high_us": trial.high_us,
        "samples": len(trial.samples_us),
        "against_best": median / (best.median_us or median),
        "against_default": median / default.median_us if default and default.median_us else None,
        "within_noise_of_best": (trial.low_us or 0.0) <= (best.high_us or 0.0),
        "is_default": trial is default,
        "roofline_share": bound_us / median,
        "error": trial.error,
        "timing": trial.timing,
        "checked": "device",
        "config": trial.config,
    }


def _lines(document: dict[str, Any]) -> list[str]:
    variants = document["variants"]
    varying = [
        name
        for name in (variants[0]["config"] if variants else {})
        if len({str(v["config"].get(name)) for v in variants}) > 1
    ]
    head = ("kernel", "median", "95 % us", "n", "x best", "x default", "roofline", "error", *varying)
    rows = [
        (
            v["kernel"][:8] + (" default" if v["is_default"] else ""),
            format_us(v["median_us"]),
            f"{v['low_us']:.4g}-{v['high_us']:.4g}",
            str(v["samples"]),
            f"{v['against_best']:.2f}" + (" ~" if v["within_noise_of_best"] else "  "),
            "-" if v["against_default"] is None else f"{v['against_default']:.2f}",
            f"{v['roofline_share']:.0%}",
            f"{v['error']:.0e}",
            *(str(v["config"].get(name, "-")).removeprefix("moe_gemm/") for name in varying),
        )
        for v in variants
    ]
    title = f"{document['problem'][:8]}  {document['what'].split(' x_dtype')[0]}"
    note = "timing: measured, checked: device; ~ within the noise of the best (intervals overlap)"
    return [title, *table(head, rows), note]


def _compare_kernels(store: Store, a: KernelRecord, b: KernelRecord, arguments: argparse.Namespace) -> None:
    names = sorted(a.config.keys() | b.config.keys())
    knobs = {n: [a.config.get(n), b.config.get(n)] for n in names if a.config.get(n) != b.config.get(n)}
    source = _diff(a.source, b.source, a, b)
    code = _diff(_disassemble(store, a), _disassemble(store, b), a, b) if arguments.disassembly else []
    if arguments.json:
        print_json({"kernels": [a.key, b.key], "knobs": knobs, "source": source, "disassembly": code})
        return
    print("\n".join(table(("knob", a.key[:8], b.key[:8]), ((n, str(x), str(y)) for n, (x, y) in knobs.items()))))
    print("\n".join(["", *source, *code]))


def _diff(old: str, new: str, a: KernelRecord, b: KernelRecord) -> list[str]:
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), a.key[:8], b.key[:8], lineterm=""))


def _disassemble(store: Store, kernel: KernelRecord) -> str:
    """Machine code as text, without addresses, so that only differing instructions differ."""
    tool = shutil.which("objdump") or shutil.which("llvm-objdump")
    if tool is None:
        raise TilewrightError("no objdump was found; install binutils (Debian: apt install binutils)")
    data = store.artifact(kernel.artifacts[0])
    if data is None:
        raise TilewrightError(f"the bytes of kernel {kernel.key} are not in the database; tune the problem again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        path.write_bytes(data)
        done = subprocess.run(
            [tool, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise TilewrightError(f"{tool} cannot read kernel {kernel.key}: {done.stderr.strip()}")
    text = re.sub(r"^\s*[0-9a-f]+:\s*", "", done.stdout, flags=re.MULTILINE)
    return re.sub(r"\b[0-9a-f]{3,}\b(?= <)|<[^>]*>|# [0-9a-f]+", "", text)
