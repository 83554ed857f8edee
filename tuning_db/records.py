"""The values that go into the database and come out of it: plain, frozen, standard library only.

Times of day are seconds since the epoch (UTC). Documents (``dict`` fields) hold JSON values alone: text keys, finite
numbers, lists instead of tuples.
"""

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, get_args

from tilewright.tuning_db.integrity import sha256_hex

Document = dict[str, Any]
_END_OF_DATES_S = 253_402_300_800
"""Seconds from 1970 to the year 10000."""
ArtifactKind = Literal["host_so", "cubin", "hsaco"]
Timing = Literal["none", "predicted", "measured"]
Checked = Literal["none", "compiled", "emulated", "device"]

ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)
TIMINGS: tuple[Timing, ...] = get_args(Timing)
CHECKED_LEVELS: tuple[Checked, ...] = get_args(Checked)
"""How far a kernel was checked, weakest first."""


class Outcome(StrEnum):
    """How a trial ended; a failure is an outcome like any other."""

    OK = "ok"
    WRONG = "wrong"
    BUILD_FAILED = "build_failed"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """The bytes of one built object, named by their sha256."""

    checksum: str
    kind: ArtifactKind
    abi_version: int
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _require("artifact kind", self.kind, ARTIFACT_KINDS)

    @classmethod
    def from_bytes(cls, data: bytes, *, kind: ArtifactKind, abi_version: int) -> "ArtifactRecord":
        """Name ``data`` by its own checksum."""
        return cls(sha256_hex(data), kind, abi_version, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRecord:
    """A built variant: where it came from, what it needs to be launched, how far it was checked.

    ``key`` is given by the caller and lists everything that invalidates the kernel; two records with one key are the
    same kernel. ``recipe`` launches over ``artifacts`` (checksums, in the order that the recipe numbers them).
    """

    key: str
    op: str
    signature_key: str
    signature: Document
    template: str
    config: Document
    arch: str
    source: str = field(repr=False)
    recipe: Document = field(repr=False)
    toolchain: str
    facts: Document
    artifacts: tuple[str, ...]
    checked: Checked
    created_at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        _require("checked", self.checked, CHECKED_LEVELS)
        _require_date(self.created_at)
        _require_config(self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One evaluated variant on one problem.

    ``kernel_key`` names the variant that was built, whether or not its bytes were kept. ``error`` is relative to the
    reference; infinite where the output was not finite. A trial that was timed has ``median_us``; ``low_us`` and
    ``high_us`` bound its confidence interval, and ``conditions`` says what is known of its race: how calls were timed,
    and a GPU's clocks, power, temperature and reasons to slow down. ``id`` is given by the database.
    """

    run_id: str
    op: str
    signature_key: str
    problem_key: str
    problem: Document
    device_key: str
    threads: int
    template: str
    config: Document
    outcome: Outcome
    id: int | None = None
    kernel_key: str | None = None
    timing: Timing = "none"
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    samples_us: tuple[float, ...] = field(default=(), repr=False)
    error: float | None = None
    message: str = ""
    seed: int = 0
    search: str = ""
    build_s: float = 0.0
    conditions: Document = field(default_factory=dict, repr=False)
    created_at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        _require("timing", self.timing, TIMINGS)
        if (self.timing == "none") != (self.median_us is None):
            raise ValueError(f"a trial with timing {self.timing!r} cannot have median_us={self.median_us}")
        if self.median_us is not None and not math.isfinite(self.median_us):
            raise ValueError(f"a trial's median_us is a finite number, not {self.median_us}")
        _require_date(self.created_at)
        _require_config(self.config)


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """Which kernel serves dynamic sizes up to ``max_size``, inclusive (None: any larger size).

    ``kernel_key`` None means the torch fallback. ``tuned_size`` is the size that ``median_us`` and ``default_us``
    (the default config's time) were taken at.
    """

    max_size: int | None
    kernel_key: str | None
    median_us: float | None = None
    default_us: float | None = None
    tuned_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """For one op, signature, device, thread count and precision: which kernel serves which dynamic size.

    These, ``batch_invariant`` and ``timing`` identify it: a predicted plan stands beside a measured one.

    ``precision`` is what the weights are stored in, and ``error`` what that does to the op's output, at the most over
    the tuned sizes: ``||out - reference|| / ||reference||``, 0 for weights as the op declares them. ``timing`` and
    ``checked`` are the weakest evidence among the entries. ``layout`` names the one weight layout that all entries
    share, or several, joined by ``+``, where more copies of the weights were allowed; ``precision`` likewise. With
    ``batch_invariant`` all entries add up in one order, so that what a token gets does not depend on what else is in
    the batch. ``model`` is the preset that the plan was made for, or empty. ``facts`` says what its making found beyond
    the rows: what its restrictions cost, and how it did at sizes drawn at random.
    """

    op: str
    signature_key: str
    signature: Document
    device_key: str
    threads: int
    layout: str
    timing: Timing
    checked: Checked
    entries: tuple[PlanEntry, ...]
    model: str = ""
    precision: str
    error: float = 0.0
    batch_invariant: bool = False
    facts: Document = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        _require("timing", self.timing, TIMINGS)
        _require("checked", self.checked, CHECKED_LEVELS)
        if not 0 <= self.error < math.inf:
            raise ValueError(f"a plan's error is a finite number of at least 0, not {self.error}")
        _require_date(self.created_at)
        bounds = [math.inf if entry.max_size is None else entry.max_size for entry in self.entries]
        if not bounds or any(left >= right for left, right in itertools.pairwise(bounds)):
            raise ValueError(f"a plan's entries have rising sizes and at least one entry, not {bounds}")

    def entry_for(self, size: int) -> PlanEntry | None:
        """Return the entry that serves ``size``, or None where the plan ends below it."""
        for entry in self.entries:
            if entry.max_size is None or size <= entry.max_size:
                return entry
        return None


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device that something was measured on or predicted for."""

    key: str
    name: str
    arch: str
    facts: Document = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of a command that wrote trials. ``finished_at`` None: it still runs, or was killed."""

    id: str
    command: str
    versions: Document
    host: str
    started_at: float
    finished_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSummary:
    """What is known of one problem on one device with one thread count."""

    op: str
    signature_key: str
    problem_key: str
    problem: Document
    device_key: str
    threads: int
    outcomes: dict[Outcome, int]
    best_measured_us: float | None
    best_predicted_us: float | None
    last_at: float

    @property
    def trials(self) -> int:
        """Trials of every outcome."""
        return sum(self.outcomes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many rows of each kind the database holds, and how many bytes of artifacts."""

    runs: int
    devices: int
    trials: int
    kernels: int
    artifacts: int
    artifact_bytes: int
    plans: int


def _require_date(seconds: float) -> None:
    if not 0 <= seconds < _END_OF_DATES_S:
        raise ValueError(f"created_at counts seconds since 1970, of a year that has four digits, not {seconds}")


def _require_config(config: Document) -> None:
    """None stands in old configs for knobs of other templates."""
    if wrong := [name for name, value in config.items() if not isinstance(value, str | int | float | None)]:
        raise ValueError(f"a config's values are texts, numbers, truths or None, and {wrong[0]!r} is none of them")


def _require(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
