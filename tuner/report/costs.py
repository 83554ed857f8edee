"""What serving a model costs by its plans: time of a step, tokens per second, money per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.ops.registry import OPS, find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.errors import TilewrightError
from tilewright.tuning_db.records import TIMINGS, Checked, PlanRecord, Timing, TrialRecord
from tilewright.tuning_db.store import Store

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Part:
    """One kernel call of a layer."""

    title: str
    layers: float
    """How often a step makes it."""
    tuned_us: float
    default_us: float
    timing: Timing
    checked: Checked


@dataclass(frozen=True)
class DeviceCost:
    """A step of ``tokens`` tokens on one device."""

    device: str
    tokens: int
    price: float
    """Dollars for an hour of all ranks."""
    parts: tuple[Part, ...]
    missing: tuple[str, ...]
    """Calls of a layer that no plan knows at this size."""

    @property
    def step_us(self) -> float:
        """Of all layers, with the plans' kernels."""
        return sum(part.layers * part.tuned_us for part in self.parts)

    @property
    def default_step_us(self) -> float:
        """Of all layers, with the default configs."""
        return sum(part.layers * part.default_us for part in self.parts)

    @property
    def timing(self) -> Timing:
        """The weakest evidence among the parts."""
        return min((part.timing for part in self.parts), key=TIMINGS.index)

    @property
    def tokens_per_s(self) -> float:
        """If the parts were all there is."""
        return self.tokens / self.step_us * 1e6

    @property
    def dollars_per_million(self) -> float:
        """Per million tokens."""
        return _dollars(self.price, self.step_us / self.tokens)

    @property
    def default_dollars_per_million(self) -> float:
        """The same with the default configs."""
        return _dollars(self.price, self.default_step_us / self.tokens)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "device": self.device,
            "tokens": self.tokens,
            "dollars_per_hour": self.price,
            "parts": [asdict(part) for part in self.parts],
            "missing": list(self.missing),
            "step_us": self.step_us,
            "default_step_us": self.default_step_us,
            "tokens_per_s": self.tokens_per_s,
            "dollars_per_million_tokens": self.dollars_per_million,
            "default_dollars_per_million_tokens": self.default_dollars_per_million,
            "timing": self.timing,
        }


def device_costs(
    store: Store, model: ModelShape, arch: Arch, price: float, *, max_error: float = 0.0
) -> list[DeviceCost]:
    """Cost of ``model`` on every device of ``arch`` that has plans for it, at the sizes that all of them know.

    A plan knows the sizes that it was tuned at, and of those between the powers of two at which its
    kernel and the default were tried.

    Args:
        store: that holds the plans.
        model: as one rank computes it.
        arch: of the devices.
        price: dollars for an hour of one device.
        max_error: largest error of a plan's precision.

    Raises:
        TilewrightError: when no device has a plan for the model.

    """
    calls = _calls(model, arch)
    devices = [device for device in store.devices() if device.arch == arch.name]
    plans = [plan for plan in store.plans() if plan.error <= max_error]
    found = []
    for device in devices:
        mine = {title: _best(plans, signature, device.key) for title, (signature, _) in calls.items()}
        parts = {
            title: _parts(store, title, plan, arch, layers=calls[title][1])
            for title, plan in mine.items()
            if plan is not None
        }
        for size in _sizes(parts):
            known = {title: at[size] for title, at in parts.items() if size in at}
            missing = tuple(title for title in calls if title not in known)
            found.append(DeviceCost(device.key, size, price * model.tp * model.ep, tuple(known.values()), missing))
    if not found:
        raise TilewrightError(
            f"no plan for {model.name} on {arch.name} is stored; run: tune --arch {arch.name} --op all "
            f"--model {model.name}"
        )
    return found


def _calls(model: ModelShape, arch: Arch) -> dict[str, tuple[Signature, float]]:
    """Calls of a step that decodes, by title: their signatures, and how often a step makes them."""
    calls: dict[str, tuple[Signature, float]] = {}
    for op in OPS.values():
        served = op.signatures_on(model, arch)
        counted = [(s, count) for s in served if (count := op.calls_per_pass(s, model, "decode"))]
        for number, (signature, count) in enumerate(counted):
            title = signature.title
            calls[f"{title} {number}" if title in calls else title] = (signature, count)
    return calls


def _best(plans: Sequence[PlanRecord], signature: Signature, device_key: str) -> PlanRecord | None:
    """The plan with the least time over its sizes; measured before predicted."""
    mine = [plan for plan in plans if plan.signature_key == signature.key and plan.device_key == device_key]
    return min(mine, key=lambda plan: (-TIMINGS.index(plan.timing), _total_us(plan)), default=None)


def _total_us(plan: PlanRecord) -> float:
    return sum(entry.median_us or 0.0 for entry in plan.entries)


def _parts(store: Store, title: str, plan: PlanRecord, arch: Arch, *, layers: float) -> dict[int, Part]:
    """What is known of the plan's kernels and the default, by size: sizes tuned, and powers of two tried between."""
    evidence = plan.timing, plan.checked
    found = {}
    op = find_op(plan.op)
    trials: dict[int, list[TrialRecord]] = {}
    for trial in store.trials(signature_key=plan.signature_key, device_key=plan.device_key, threads=plan.threads):
        if trial.timing == plan.timing and (size := op.problem_from_dict(trial.problem).size).bit_count() == 1:
            trials.setdefault(size, []).append(trial)
    for size, here in trials.items():
        entry = plan.entry_for(size)
        kernel = entry.kernel_key if entry else None
        tuned = [t.median_us for t in here if kernel and t.kernel_key == kernel and t.median_us]
        problem = op.problem_from_dict(here[0].problem)
        default_config = op.default_for(problem, arch)
        configs = (op.read_config(t.config, problem.signature, arch) for t in here)
        default = [
            t.median_us for t, config in zip(here, configs, strict=True) if config == default_config and t.median_us
        ]
        if tuned and default:
            found[size] = Part(title, layers, tuned[-1], default[-1], *evidence)
    for entry in plan.entries:
        if entry.tuned_size and entry.median_us is not None:
            default_us = entry.median_us if entry.default_us is None else entry.default_us
            found[entry.tuned_size] = Part(title, layers, entry.median_us, default_us, *evidence)
    return found


def _sizes(parts: Mapping[str, Mapping[int, Part]]) -> list[int]:
    """Sizes at which all parts are known, so that sums compare; where there is none, those that any is known at."""
    each = [set(known) for known in parts.values()]
    return sorted((set.intersection(*each) or set.union(*each)) if each else ())


def _dollars(price_per_hour: float, us_per_token: float) -> float:
    return price_per_hour / _SECONDS_PER_HOUR * us_per_token  # microseconds of one token are seconds of a million
