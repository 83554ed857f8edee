"""``tune doctor``: whether this machine can build, measure, store and serve."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tilewright import disks
from tilewright.codegen.backends.cpp.builder import CppBuilder, find_compiler
from tilewright.codegen.backends.kept import BUILDS, KeptBuilds
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.hardware.cores import cores
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.directories import CACHE_VARIABLE, TEMPORARY_VARIABLE, require_execution, user_cache_directory
from tilewright.errors import TilewrightError
from tilewright.runtime.calls.extension import native_module
from tilewright.runtime.launchers.openmp import fork_address
from tilewright.temporary import temporary_files, temporary_folder
from tilewright.tuner.commands.common import add_options, print_json
from tilewright.tuner.evaluation.statistics import paired_ratio
from tilewright.tuner.report.terminal import print_lines
from tilewright.tuner.report.text import labelled, terminal_width
from tilewright.tuning_db.locations import default_url, sqlite_path
from tilewright.tuning_db.store import Store


class Finding(NamedTuple):
    """What one check found."""

    status: Literal["ok", "warn", "fail"]
    message: str
    """One sentence: what is, and where it is not well what to do."""
    measured: dict[str, float] | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        fields: dict[str, Any] = {"status": self.status, "message": self.message}
        return fields if self.measured is None else {**fields, "measured": self.measured}


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("doctor", help="whether this machine can build, measure and store")
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine everything; 1 when something fails."""
    checks: dict[str, Callable[[], Finding]] = {
        "cpu": _cpu,
        "compiler": _compiler,
        "cache": _cache,
        "temporary": _temporary,
        "database": lambda: _database(arguments.db, arguments.verify),
        "extension": _extension,
        "openmp": _openmp,
        "noise": _noise,
    }
    findings: dict[str, Finding] = {}
    for name, check in checks.items():
        try:
            findings[name] = check()
        except TilewrightError as error:
            findings[name] = Finding("fail", str(error))
        except OSError as error:
            findings[name] = Finding("fail", disks.sentence(error))
    if arguments.json:
        print_json({name: finding.document() for name, finding in findings.items()})
    else:
        for name, finding in findings.items():
            print_lines(labelled(f"{finding.status:4}  {name}", finding.message, width=terminal_width(), indent=17))
    return 1 if any(finding.status == "fail" for finding in findings.values()) else 0


def _cpu() -> Finding:
    cpu, arch = read_cpu_info(), native_arch()
    return Finding(
        "ok",
        f"{cpu.name}, {cores()}, {cpu.memory_bytes / 2**30:.0f} GiB; arch {arch.name} "
        f"({', '.join(arch.features)}); device {cpu.key}",
    )


def _compiler() -> Finding:
    compiler = find_compiler()
    build = CppBuilder(native_arch(), compiler).build('extern "C" int tilewright_doctor() { return 0; }\n')
    if build.path is None:
        return Finding("fail", f"{compiler.command} does not build kernels: {build.message}")
    return Finding("ok", f"{compiler.command}: {compiler.version}")


def _cache() -> Finding:
    path = user_cache_directory()
    require_execution(path, CACHE_VARIABLE)
    if path.exists() and not os.access(path, os.W_OK):
        return Finding("warn", f"{path} cannot be written; kernels can be served from it, but not tuned")
    folders = [KeptBuilds(path, folder.name) for folder in sorted(path.glob(f"{BUILDS}*"))]
    builds, unfit = sum(map(len, folders)), sum(len(folder.unfit()) for folder in folders)
    if unfit:
        return Finding("warn", f"{path}: {unfit} of {builds} builds are not what was put there; they are built again")
    return Finding("ok", f"{path}: {builds} builds, each as it was put there")


def _temporary() -> Finding:
    path = temporary_files()
    require_execution(path, TEMPORARY_VARIABLE)
    with temporary_folder():
        return Finding("ok", str(path))


def _database(url: str | None, verify_key: Path | None) -> Finding:
    path = sqlite_path(url or default_url())
    if path is not None and not path.exists():
        return Finding("warn", f"{path} does not exist yet; it is made by the first run of tune")
    with Store.open_read_only(url, verify_key=verify_key) as store:
        problems = store.check()
        counts = store.counts()
    if problems:
        return Finding("fail", f"{len(problems)} things are wrong, the first: {problems[0]}")
    if path is not None and not os.access(path, os.W_OK):
        return Finding("warn", f"{path} cannot be written; kernels can be served from it, but not tuned")
    known = f"{counts.trials} trials, {counts.kernels} kernels, {counts.plans} plans"
    return Finding(
        "ok", f"{path or url}: {known}, {counts.artifact_bytes / 1e6:.1f} MB of kernels, all checksums match"
    )


def _extension() -> Finding:
    if native_module() is None:
        return Finding("warn", "the compiled extension is missing, so calls cost more; reinstall with a C compiler")
    return Finding("ok", "the compiled extension is there")


def _openmp() -> Finding:
    import torch  # noqa: F401  (its OpenMP is what kernels run on)

    if not fork_address():
        return Finding("warn", "no GOMP_parallel was found, so kernels run on one thread")
    return Finding("ok", "kernels share torch's OpenMP threads")


def _noise() -> Finding:
    """The same small product timed twice, interleaved: what this machine makes of two equal times."""
    x = np.random.default_rng(0).standard_normal((384, 384), dtype=np.float32)
    times: tuple[list[int], list[int]] = ([], [])
    for _ in range(100):
        for samples in times:
            begin = time.perf_counter_ns()
            x @ x
            samples.append(time.perf_counter_ns() - begin)
    ratio = paired_ratio(*times)
    slow = float(np.percentile(times[0], 90) / np.median(times[0]))
    assert ratio.low is not None  # a hundred samples carry an interval
    assert ratio.high is not None
    assert ratio.noise is not None
    text = (
        f"two equal products took times in the ratio {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]; "
        f"one in ten took {slow:.2f}x the median"
    )
    measured = {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, "samples": ratio.pairs, "slow_tenth": slow}
    if ratio.noise < 0.05 and slow < 1.5:
        return Finding("ok", text, measured)
    return Finding("warn", f"{text}: the machine is busy, so tuning takes longer and tells less", measured)
