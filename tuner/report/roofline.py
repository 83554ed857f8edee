"""Measured ceilings of this machine: the fp32 multiply-add peak and the read bandwidth behind every share of roofline.

The measuring program is ``templates/shared/roofline.cpp``. It runs in a process of its own, so that its threads and
its large buffer are gone before anything else is timed.
"""

import functools
import json
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.errors import TilewrightError

# Far beyond any last-level cache of today, and still small enough for a laptop.
BUFFER_BYTES = 512 << 20
_BUILD_TIMEOUT_S = 60
_RUN_TIMEOUT_S = 120


@dataclass(frozen=True)
class Roofline:
    """What ``threads`` threads of this machine reach together, in fp32 GFLOP/s and in GB/s read from memory."""

    threads: int
    peak_gflops: float
    bandwidth_gbps: float

    def raised_to(self, other: "Roofline") -> "Roofline":
        """Return the higher of both for each ceiling: what disturbs a measurement only ever lowers it."""
        return Roofline(
            self.threads,
            max(self.peak_gflops, other.peak_gflops),
            max(self.bandwidth_gbps, other.bandwidth_gbps),
        )

    def time_us(self, flops: float, bytes_moved: float) -> float:
        """Return the least time in microseconds for this many floating-point operations and bytes from memory."""
        return max(flops / (self.peak_gflops * 1e3), bytes_moved / (self.bandwidth_gbps * 1e3))


@functools.cache
def measure_roofline(threads: int) -> Roofline:
    """Measure the ceilings of ``threads`` threads: about two seconds the first time, remembered for this process.

    On a shared machine the bandwidth drifts: call ``measure_roofline.cache_clear()`` and measure again beside a race.

    Raises:
        TilewrightError: there is no C++ compiler, or the measuring program cannot be built or run.

    """
    if threads < 1:
        raise TilewrightError(f"threads={threads} is impossible for a roofline: give at least 1.")
    with tempfile.TemporaryDirectory(prefix="tilewright-roofline-") as folder:
        program = _build(Path(folder))
        output = _run([str(program), str(threads), str(BUFFER_BYTES)], _RUN_TIMEOUT_S)
    measured = json.loads(output)
    return Roofline(threads, measured["peak_gflops"], measured["bandwidth_gbps"])


def roofline_us(flops: float, bytes_moved: float, threads: int) -> float:
    """Return the least time in microseconds that ``threads`` threads of this machine could need for such work."""
    return measure_roofline(threads).time_us(flops, bytes_moved)


def _build(folder: Path) -> Path:
    source = folder / "roofline.cpp"
    source.write_bytes(resources.files("tilewright.templates").joinpath("shared", "roofline.cpp").read_bytes())
    program = folder / "roofline"
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    _run(
        [find_compiler().command, "-std=c++17", "-O3", native, "-pthread", str(source), "-o", str(program)],
        _BUILD_TIMEOUT_S,
    )
    if not program.exists():
        raise TilewrightError(f"{find_compiler().command} built nothing; set $CXX to a C++ compiler, or unset it")
    return program


def _run(command: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout_s)
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[:500] or f"it ended with status {error.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        return done.stdout
    raise TilewrightError(f"The roofline could not be measured: `{Path(command[0]).name}` failed: {reason}")
