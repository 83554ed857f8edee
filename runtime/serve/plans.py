"""Which kernel serves which size on this machine: the plan of the database, checked, with its kernels loaded.

Nothing here raises for what is missing, damaged or made elsewhere: torch serves those sizes, and one warning says why.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial

from tilewright.codegen.hardware.archs import ARCHS, runs_on
from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import ABI_VERSION, FORMAT_VERSION, Recipe, packable
from tilewright.codegen.recipe.validity import unused_tensors
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused, Launcher, LoadedArtifact
from tilewright.runtime.launchers.registry import find_launcher
from tilewright.runtime.notices import warn_once
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.weights.packing import packed_shape
from tilewright.tuning_db.locations import default_url
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.records import KernelRecord, PlanEntry, PlanRecord

_MOST_TIMES_LARGER = 4
_ALWAYS_ALLOWED = 1 << 20
"""Elements of a packed weight: those of a small one may be padded to many times as many."""


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A kernel that this process can call."""

    record: KernelRecord
    recipe: Recipe
    layout: WeightLayout | None
    """In which it takes its weight; None: as the op declares it."""
    entries: tuple[int, ...]
    """Address of the entry of each launch of the recipe."""
    artifacts: tuple[LoadedArtifact, ...]


@dataclass(frozen=True)
class SizeRange:
    """Dynamic sizes above the previous range's, up to ``max_size`` (None: without end), and what serves them."""

    max_size: int | None
    kernel: LoadedKernel | None
    """None: plain torch."""
    entry: PlanEntry | None
    """Row of the plan, with its timings; None where no plan speaks of these sizes."""
    why_torch: str = ""


@dataclass(frozen=True)
class Resolution:
    """What serves a signature on this machine, and why."""

    signature: Signature
    device_key: str
    database: str
    plan: PlanRecord | None
    ranges: tuple[SizeRange, ...]
    batch_invariant: bool = False
    """Whether a token is promised the same bits in every batch, and what cannot keep that is refused."""

    @property
    def kernels(self) -> tuple[LoadedKernel, ...]:
        """Kernels that serve some size."""
        return tuple(part.kernel for part in self.ranges if part.kernel is not None)

    @property
    def layouts(self) -> tuple[WeightLayout | None, ...]:
        """Layouts that served kernels take their weight in, each once; None: as declared."""
        return tuple(dict.fromkeys(kernel.layout for kernel in self.kernels))


def resolve(signature: Signature, options: ServeOptions) -> Resolution:
    """Find the plan for ``signature`` on this machine and load its kernels.

    Plans that were only predicted, or bring a larger error than ``max_error``, are left out. Of several plans for this
    device, those made with as many threads are taken, else those that come nearest, and of these the fastest. With
    ``batch_invariant`` only plans that promise it count, and one of whose sizes a tuned kernel does not serve is
    refused, for plain torch adds up in other orders for other batches.

    Raises:
        TilewrightError: with ``batch_invariant``, when there is no such plan or some of it cannot be served.

    """
    batch_invariant = options.batch_invariant
    database = _database_of(options)
    device_key = read_cpu_info().key
    try:
        reader = Reader.open(database, verify_key=options.verify_key)
        plans: Sequence[PlanRecord] = reader.plans_for(signature.op, signature.key)
        if batch_invariant:
            plans = _batch_invariant(plans)
        plan = _choose_plan(plans, device_key, options.thread_count, options.max_error)
    except TilewrightError as error:
        if batch_invariant:
            raise TilewrightError(f"{signature.describe()} cannot be served batch-invariantly: {error}") from error
        warn_once(f"{signature.describe()} is served by plain torch: {error}")
        return Resolution(signature, device_key, database, None, (SizeRange(None, None, None, str(error)),))
    ranges = _load_ranges(reader, plan, signature)
    if batch_invariant and (missing := next((part for part in ranges if part.kernel is None), None)):
        raise TilewrightError(
            f"{signature.describe()} cannot be served batch-invariantly, for no kernel serves some sizes: "
            f"{missing.why_torch}"
        )
    return Resolution(signature, device_key, database, plan, ranges, batch_invariant)


def is_planned(signature: Signature, options: ServeOptions) -> bool:
    """Whether the database holds a plan, measured on this machine, for ``signature`` that keeps what is asked for.

    False, too, where it cannot be read.
    """
    try:
        plans = Reader.open(_database_of(options), verify_key=options.verify_key).plans_for(signature.op, signature.key)
    except TilewrightError:
        return False
    return any(
        plan.error <= options.max_error and (plan.batch_invariant or not options.batch_invariant)
        for plan in _measured_on(read_cpu_info().key, plans)
    )


def _database_of(options: ServeOptions) -> str:
    return os.fspath(default_url() if options.database is None else options.database)


def _batch_invariant(plans: Sequence[PlanRecord]) -> list[PlanRecord]:
    """Those that promise it."""
    promising = [plan for plan in plans if plan.batch_invariant]
    if plans and not promising:
        raise TilewrightError("its plans do not promise it; tune with --batch-invariant")
    return promising


def _measured_on(device_key: str, plans: Sequence[PlanRecord]) -> list[PlanRecord]:
    return [plan for plan in plans if plan.device_key == device_key and plan.timing == "measured"]


def _choose_plan(plans: Sequence[PlanRecord], device_key: str, threads: int, max_error: float) -> PlanRecord:
    """The plan measured on this device, within ``max_error``, whose thread count is nearest to ``threads``."""
    here = _measured_on(device_key, plans)
    allowed = [plan for plan in here if plan.error <= max_error]
    if allowed:
        nearest = min(allowed, key=lambda plan: (abs(plan.threads - threads), plan.threads)).threads
        return _fastest([plan for plan in allowed if plan.threads == nearest])
    if here:
        least = min(here, key=lambda plan: plan.error)
        raise TilewrightError(
            f"its plan with the least error ({least.precision}) is off by {least.error:.2g}, and max_error is "
            f"{max_error:g}; allow more, or tune with --precision {LOSSLESS}"
        )
    if any(plan.device_key == device_key for plan in plans):
        raise TilewrightError("its plans for this device were predicted, and none was measured here; tune here")
    if plans:
        elsewhere = ", ".join(sorted({plan.device_key for plan in plans}))
        raise TilewrightError(
            f"its plans were made on other devices ({elsewhere}), this one is {device_key}; tune here"
        )
    raise TilewrightError("the database holds no plan for it; run `tune` with its shapes")


def _fastest(plans: Sequence[PlanRecord]) -> PlanRecord:
    """The plan with the least geometric mean of times over the sizes that all of them were tuned at."""
    times = [
        {e.tuned_size: e.median_us or 0.0 for e in plan.entries if e.tuned_size and 0 < (e.median_us or 0) < math.inf}
        for plan in plans
    ]
    common = set.intersection(*(set(each) for each in times))

    def cost(pair: tuple[PlanRecord, dict[int, float]]) -> tuple[float, float]:
        return sum(math.log(pair[1][size]) for size in common), pair[0].error

    return min(zip(plans, times, strict=True), key=cost)[0]


def _load_ranges(reader: Reader, plan: PlanRecord, signature: Signature) -> tuple[SizeRange, ...]:
    """The plan's entries with their kernels loaded; torch where that fails, and beyond the end of the plan."""
    ranges: list[SizeRange] = []
    layouts: set[WeightLayout | None] = set()
    above = 0
    for entry in plan.entries:
        kernel, why_torch = None, "the plan found nothing faster"
        if entry.kernel_key is not None:
            try:
                kernel = _load_kernel(reader, entry.kernel_key, signature)
                _require_allowed_layout(layouts, kernel, plan)
                layouts.add(kernel.layout)
            except TilewrightError as error:
                kernel, why_torch = None, str(error)
                sizes = f"{above + 1} to {entry.max_size}" if entry.max_size else f"above {above}"
                warn_once(f"{signature.describe()} is served by plain torch for sizes {sizes}: {error}")
        ranges.append(SizeRange(entry.max_size, kernel, entry, "" if kernel else why_torch))
        above = entry.max_size or above
    if ranges[-1].max_size is not None:
        ranges.append(SizeRange(None, None, None, "the plan ends below these sizes"))
    return tuple(ranges)


def _require_allowed_layout(layouts: Set[WeightLayout | None], kernel: LoadedKernel, plan: PlanRecord) -> None:
    """Each layout is a copy of the weights, and the plan names those that it needs."""
    named = plan.layout.split("+")
    allowed = len(named)
    key = kernel.layout.key if kernel.layout else ""
    if key not in named or len(layouts | {kernel.layout}) > allowed:
        raise KernelRefused(
            f"kernel {kernel.record.key[:16]} takes its weight in another layout than "
            f"{'the one' if allowed == 1 else f'the {allowed}'} of the plan; tune again"
        )


def _load_kernel(reader: Reader, key: str, signature: Signature) -> LoadedKernel:
    """The kernel ``key``, checked to fit this machine, this release and ``signature``, and loaded.

    Raises:
        TilewrightError: when it does not fit, or is damaged or not to be trusted.

    """
    record = reader.kernel(key)
    arch = ARCHS.get(record.arch)
    if arch is None or not runs_on(arch, read_cpu_info()):
        raise KernelRefused(f"kernel {key[:16]} was built for {record.arch}, which this CPU does not run; tune here")
    recipe = _read_recipe(record)
    if recipe.tensors != signature.tensors() or recipe.size_name != signature.size_name:
        raise KernelRefused(f"kernel {key[:16]} takes other tensors than this tilewright's {signature.op}; tune again")
    launcher = _launcher(reader, record)
    launcher.require(recipe)
    if unused := unused_tensors(recipe):
        raise KernelRefused(f"kernel {key[:16]} launches nothing that takes {unused[0]}; tune again")
    if strange := [each.artifact for each in recipe.launches if each.artifact not in record.artifacts]:
        raise KernelRefused(
            f"kernel {key[:16]} launches {strange[0]!r:.20}, which is none of its artifacts; tune again"
        )
    layout = launcher.weight_layout(recipe)
    if isinstance(layout, RowLayout):
        raise KernelRefused(f"kernel {key[:16]} takes its weight in the layout {layout.key}, which only GPUs read")
    _require_packable(recipe, layout)
    artifacts = {
        checksum: launcher.load(checksum, partial(reader.artifact, checksum))
        for checksum in dict.fromkeys(launch.artifact for launch in recipe.launches)
    }
    entries = tuple(artifacts[launch.artifact].entry_address(launch.entry) for launch in recipe.launches)
    return LoadedKernel(record, recipe, layout, entries, tuple(artifacts.values()))


def _require_packable(recipe: Recipe, layout: WeightLayout | None) -> None:
    """Refuse a layout in which the weight cannot be laid out, or takes far more memory than by itself.

    Raises:
        TilewrightError: says why.

    """
    weight = packable(recipe.tensors)
    if layout is None or weight is None:
        return
    experts, n, k = (dim for dim in weight.dims if isinstance(dim, int))
    packed = math.prod(packed_shape(layout, (experts, n, k)))
    if packed > _MOST_TIMES_LARGER * experts * n * k + _ALWAYS_ALLOWED:
        raise KernelRefused(f"the weight layout {layout.key} takes {packed} elements for a weight of {experts * n * k}")


def _launcher(reader: Reader, record: KernelRecord) -> Launcher:
    """The launcher of the one kind that a kernel's artifacts are of."""
    kinds = reader.artifact_kinds(record.key)
    if len(kinds) != 1:
        raise KernelRefused(
            f"kernel {record.key[:16]} has artifacts of {len(kinds)} kinds ({', '.join(kinds) or 'none'}), and is "
            "launched by one launcher; tune again"
        )
    return find_launcher(kinds[0])


def _read_recipe(record: KernelRecord) -> Recipe:
    version, abi = record.recipe.get("format_version"), record.recipe.get("abi_version")
    if (version, abi) != (FORMAT_VERSION, ABI_VERSION):
        raise KernelRefused(
            f"kernel {record.key[:16]} has recipe format {version} for ABI version {abi}, this tilewright reads "
            f"{FORMAT_VERSION} for {ABI_VERSION}; tune again"
        )
    try:
        return Recipe.from_dict(record.recipe)
    except TilewrightError as error:
        raise KernelRefused(f"kernel {record.key[:16]} cannot be called: {error}") from error
