"""Measured ceilings of this machine: the fp32 multiply-add peak and the read bandwidth behind every share of roofline.

The measuring program is ``templates/shared/roofline.cpp``. It runs in a process of its own, so that its threads and
its large buffer are gone before anything else is timed.
"""

import functools
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tilewright import disks
from tilewright.codegen.backends.cpp.builder import Compiler, find_compiler
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.directories import TEMPORARY_VARIABLE, require_execution
from tilewright.errors import TilewrightError
from tilewright.temporary import temporary_folder

LARGEST_BUFFER_BYTES = 512 << 20
"""Far beyond any last-level cache of today, and still small enough for a laptop."""
_CACHES = 8
"""Buffers are this many times as large as the last-level cache where its size is known."""
PLAUSIBLE_SHARE = 1.05
"""Of the ceilings, beyond which they cannot be right."""
_MOST_AGAIN = 3
"""Times that ceilings are measured again for that."""
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

    def share(self, achieved: "Achieved") -> float:
        """Return which share of what the ceilings allow was achieved."""
        return self.time_us(achieved.flops, achieved.bytes_moved) / achieved.time_us


@dataclass(frozen=True)
class Achieved:
    """Work that was done, and how long that took."""

    flops: float
    bytes_moved: float
    time_us: float


class Ceilings:
    """Ceilings of ``threads`` threads as the best moment so far showed them: whatever disturbs only lowers them.

    Args:
        threads: at least 1.
        measure: says what they are at this moment.

    """

    def __init__(self, threads: int, measure: Callable[[int], Roofline]) -> None:
        self._threads = threads
        self._measure = measure
        self._again = 0
        self._known: Roofline | None = None

    @property
    def roofline(self) -> Roofline:
        """The highest so far; measured when first asked for."""
        return self._known or self.measure_again()

    def measure_again(self) -> Roofline:
        """Measure at this moment, too; the highest so far."""
        now = self._measure(self._threads)
        self._known = now.raised_to(self._known) if self._known else now
        return self._known

    def explaining(self, achieved: Sequence[Achieved]) -> Roofline:
        """The highest so far, measured again while some of ``achieved`` is out of its reach.

        A share over 105 % says that the ceilings were measured in a worse moment; or, after a few times, that the data
        came from a cache.
        """
        while self._again < _MOST_AGAIN and any(self.roofline.share(each) > PLAUSIBLE_SHARE for each in achieved):
            self._again += 1
            self.measure_again()
        return self.roofline


@functools.cache
def ceilings(threads: int) -> Ceilings:
    """Those of this process, which remembers them."""
    return Ceilings(threads, _measured)


def measure_roofline(threads: int) -> Roofline:
    """Measure the ceilings of ``threads`` threads: about two seconds the first time, remembered for this process.

    Raises:
        TilewrightError: there is no C++ compiler, or the measuring program cannot be built or run.

    """
    return ceilings(threads).roofline


def roofline_share(threads: int, flops: float, bytes_moved: float, time_us: float) -> float:
    """Share of what the ceilings of ``threads`` threads allow, measured again where that is over 105 %."""
    achieved = Achieved(flops, bytes_moved, time_us)
    return ceilings(threads).explaining([achieved]).share(achieved)


def format_share(share: float) -> str:
    """For people: over 105 % how much over says nothing."""
    return f">{PLAUSIBLE_SHARE:.0%}" if share > PLAUSIBLE_SHARE else f"{share:.0%}"


def _measured(threads: int) -> Roofline:
    if threads < 1:
        raise TilewrightError(f"threads={threads} is impossible for a roofline: give at least 1.")
    with disks.writing(disks.TEMPORARY), temporary_folder() as folder:
        require_execution(folder, TEMPORARY_VARIABLE)
        program = folder / "roofline"
        program.write_bytes(_built(find_compiler()))
        program.chmod(0o700)
        output = _run([str(program), str(threads), str(_buffer_bytes())], _RUN_TIMEOUT_S)
    measured = json.loads(output)
    return Roofline(threads, measured["peak_gflops"], measured["bandwidth_gbps"])


def _buffer_bytes() -> int:
    l3_bytes = read_cpu_info().l3_bytes
    return min(_CACHES * l3_bytes, LARGEST_BUFFER_BYTES) if l3_bytes else LARGEST_BUFFER_BYTES


@functools.cache
def _built(compiler: Compiler) -> bytes:
    """The measuring program, built once in a process: it runs at every beginning and end of a tuning."""
    with temporary_folder() as folder:
        source, program = folder / "roofline.cpp", folder / "roofline"
        source.write_bytes(resources.files("tilewright.templates").joinpath("shared", "roofline.cpp").read_bytes())
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        _run(
            [*compiler.words, "-std=c++17", "-O3", native, "-pthread", str(source), "-o", str(program)],
            _BUILD_TIMEOUT_S,
        )
        if not program.exists():
            raise TilewrightError(f"{compiler.command} built nothing; set $CXX to a C++ compiler, or unset it")
        return program.read_bytes()


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
