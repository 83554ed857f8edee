"""Which kernel serves which size on a device: the plan of the database, checked, with its kernels loaded.

Nothing here raises for what is missing, damaged or made elsewhere: torch serves those sizes, and one warning says why.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial

import torch

from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.recipe.model import ABI_VERSION, FORMAT_VERSION, Recipe, packable
from tilewright.codegen.recipe.validity import unused_tensors
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.base import KernelRefused, Launcher
from tilewright.runtime.launchers.registry import find_launcher
from tilewright.runtime.notices import warn_once
from tilewright.runtime.serve.devices import ServingDevice, serving_device
from tilewright.runtime.serve.kernels import AnyLayout, LoadedKernel
from tilewright.runtime.serve.options import ServeOptions
from tilewright.runtime.weights.laying_out import laid_out_elements
from tilewright.tuning_db.locations import default_url
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.records import KernelRecord, PlanEntry, PlanRecord, Timing

_MOST_TIMES_LARGER = 4
_ALWAYS_ALLOWED = 1 << 20
"""Elements of a packed weight: those of a small one may be padded to many times as many."""


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
    """What serves a signature on a device, and why."""

    signature: Signature
    device: ServingDevice
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
    def layouts(self) -> tuple[AnyLayout | None, ...]:
        """Layouts that served kernels take their weight in, each once; None: as declared."""
        return tuple(dict.fromkeys(kernel.layout for kernel in self.kernels))


def resolve(signature: Signature, device: ServingDevice, options: ServeOptions) -> Resolution:
    """Find the plan for ``signature`` on ``device`` and load its kernels.

    Plans that bring a larger error than ``max_error`` are left out, and so are those that were only predicted, except
    on GPUs where there is no measured one. Of several plans for the device, those made with as many threads are taken,
    else those that come nearest, and of these the fastest. With ``batch_invariant`` only plans that promise it count,
    and one of whose sizes a tuned kernel does not serve is refused, for plain torch adds up in other orders for other
    batches.

    Raises:
        TilewrightError: with ``batch_invariant``, when there is no such plan or some of it cannot be served; for an
            environment that says what evidence is taken and cannot be read.

    """
    batch_invariant = options.batch_invariant
    database = _database_of(options)
    timings = device.timings
    try:
        device.require_kernels()
        reader = Reader.open(database, verify_key=options.verify_key)
        plans: Sequence[PlanRecord] = reader.plans_for(signature.op, signature.key)
        if batch_invariant:
            plans = _batch_invariant(plans)
        plan = _choose_plan(plans, device, timings, options)
    except TilewrightError as error:
        if batch_invariant:
            raise TilewrightError(f"{signature.describe()} cannot be served batch-invariantly: {error}") from error
        warn_once(f"{signature.describe()} is served by plain torch: {error}")
        return Resolution(signature, device, database, None, (SizeRange(None, None, None, str(error)),))
    ranges = _load_ranges(reader, plan, signature, device)
    if batch_invariant and (missing := next((part for part in ranges if part.kernel is None), None)):
        raise TilewrightError(
            f"{signature.describe()} cannot be served batch-invariantly, for no kernel serves some sizes: "
            f"{missing.why_torch}"
        )
    return Resolution(signature, device, database, plan, ranges, batch_invariant)


def is_planned(signature: Signature, options: ServeOptions, where: torch.device | None = None) -> bool:
    """Whether the database holds a plan for ``signature`` that may serve and keeps what is asked for.

    Args:
        signature: of the call.
        options: which plans may serve.
        where: the device of the weights; None: that of the options.

    False, too, where the database cannot be read, or nothing can be launched on the device.

    """
    device = serving_device(where or options.torch_device)
    timings = device.timings
    try:
        device.require_kernels()
        plans = Reader.open(_database_of(options), verify_key=options.verify_key).plans_for(signature.op, signature.key)
    except TilewrightError:
        return False
    return any(
        plan.error <= options.max_error and (plan.batch_invariant or not options.batch_invariant)
        for timing in timings
        for plan in _known_on(device.key, timing, plans)
    )


def _database_of(options: ServeOptions) -> str:
    return os.fspath(default_url() if options.database is None else options.database)


def _batch_invariant(plans: Sequence[PlanRecord]) -> list[PlanRecord]:
    """Those that promise it."""
    promising = [plan for plan in plans if plan.batch_invariant]
    if plans and not promising:
        raise TilewrightError("its plans do not promise it; tune with --batch-invariant")
    return promising


def _known_on(device_key: str, timing: Timing, plans: Sequence[PlanRecord]) -> list[PlanRecord]:
    return [plan for plan in plans if plan.device_key == device_key and plan.timing == timing]


def _choose_plan(
    plans: Sequence[PlanRecord], device: ServingDevice, timings: Sequence[Timing], options: ServeOptions
) -> PlanRecord:
    """The plan for this device within ``max_error``: of the best evidence, its thread count nearest to the caller's."""
    threads, max_error = device.threads(options), options.max_error
    here = [_known_on(device.key, timing, plans) for timing in timings]
    for known in here:
        allowed = [plan for plan in known if plan.error <= max_error]
        if allowed:
            nearest = min(allowed, key=lambda plan: (abs(plan.threads - threads), plan.threads)).threads
            return _fastest([plan for plan in allowed if plan.threads == nearest])
    if any(here):
        least = min((plan for known in here for plan in known), key=lambda plan: plan.error)
        raise TilewrightError(
            f"its plan with the least error ({least.precision}) is off by {least.error:.2g}, and max_error is "
            f"{max_error:g}; allow more, or tune with --precision {LOSSLESS}"
        )
    if any(plan.device_key == device.key for plan in plans):
        raise TilewrightError(f"its plans for this device were predicted, and {device.why_not_predicted}")
    if plans:
        elsewhere = ", ".join(sorted({plan.device_key for plan in plans}))
        raise TilewrightError(
            f"its plans were made on other devices ({elsewhere}), this one is {device.key}; "
            f"run `tune {device.tune_arguments}`"
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


def _load_ranges(
    reader: Reader, plan: PlanRecord, signature: Signature, device: ServingDevice
) -> tuple[SizeRange, ...]:
    """The plan's entries with their kernels loaded; torch where that fails, and beyond the end of the plan."""
    ranges: list[SizeRange] = []
    layouts: set[AnyLayout | None] = set()
    above = 0
    for entry in plan.entries:
        kernel, why_torch = None, "the plan found nothing faster"
        if entry.kernel_key is not None:
            try:
                kernel = _load_kernel(reader, entry.kernel_key, signature, device)
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


def _require_allowed_layout(layouts: Set[AnyLayout | None], kernel: LoadedKernel, plan: PlanRecord) -> None:
    """Each layout is a copy of the weights, and the plan names those that it needs."""
    named = plan.layout.split("+")
    allowed = len(named)
    key = kernel.layout.key if kernel.layout else ""
    if key not in named or len(layouts | {kernel.layout}) > allowed:
        raise KernelRefused(
            f"kernel {kernel.record.key[:16]} takes its weight in another layout than "
            f"{'the one' if allowed == 1 else f'the {allowed}'} of the plan; tune again"
        )


def _load_kernel(reader: Reader, key: str, signature: Signature, device: ServingDevice) -> LoadedKernel:
    """The kernel ``key``, checked to fit the device, this release and ``signature``, and loaded.

    Raises:
        TilewrightError: when it does not fit, or is damaged or not to be trusted.

    """
    record = reader.kernel(key)
    device.require_runs(record)
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
    _require_packable(recipe, layout)
    artifacts = {
        checksum: launcher.load(checksum, partial(reader.artifact, checksum))
        for checksum in dict.fromkeys(launch.artifact for launch in recipe.launches)
    }
    entries, owner = device.entries(record, recipe, artifacts)
    return LoadedKernel(record, recipe, layout, entries, owner)


def _require_packable(recipe: Recipe, layout: AnyLayout | None) -> None:
    """Refuse a layout in which the weight cannot be laid out, or takes far more memory than by itself.

    Raises:
        TilewrightError: says why.

    """
    weight = packable(recipe.tensors)
    if layout is None or weight is None:
        return
    experts, n, k = (dim for dim in weight.dims if isinstance(dim, int))
    packed = laid_out_elements(layout, (experts, n, k))
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
