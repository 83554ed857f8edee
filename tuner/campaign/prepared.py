"""What a database holds that was predicted for a kind of GPU, to be measured where such a one is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.ops.base import OpDeclaration
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.space import Config
from tilewright.errors import TilewrightError
from tilewright.tuning_db.records import KernelRecord, Outcome, PlanRecord
from tilewright.tuning_db.store import Store


@dataclass(frozen=True)
class Prepared:
    """One signature with predicted plans."""

    op: OpDeclaration[Any, Any]
    signature: Signature
    plans: tuple[PlanRecord, ...]
    """For one device, one for each precision; at least one."""
    problems: tuple[Problem, ...]
    """That the plans rest on, ascending in size."""
    kernels: Mapping[str, KernelRecord]
    """That are stored, by their keys."""
    predicted_us: Mapping[str, Mapping[str, float]]
    """By the keys of problem and kernel."""

    @property
    def batch_invariant(self) -> bool:
        """Whether the plans add up in one order."""
        return self.plans[0].batch_invariant

    @property
    def model(self) -> str:
        """That the plans were made for; empty for none."""
        return self.plans[0].model

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of the weights in any of the plans."""
        return tuple(dict.fromkeys(name for plan in self.plans for name in plan.precision.split("+")))

    @property
    def copies(self) -> int:
        """Most weight layouts of a plan."""
        return max(len(plan.layout.split("+")) for plan in self.plans)

    def candidates(self, problem: Problem) -> dict[Config, float]:
        """Stored kernels with what was predicted for them, in microseconds, fastest first."""
        known = self.predicted_us.get(problem.key, {})
        found = {Config(self.kernels[key].config): time_us for key, time_us in known.items()}
        return dict(sorted(found.items(), key=lambda each: each[1]))


def prepared(store: Store, arch: Arch, device_key: str, ops: Collection[str] = ()) -> list[Prepared]:
    """Signatures that have predicted plans for ``arch``, in the order of the plans.

    Of plans for several products of the arch, those for ``device_key`` are taken, and where there are none those for
    the product whose key comes first.

    Args:
        store: that was filled by ``tune``, anywhere.
        arch: of the device that is there.
        device_key: of that device.
        ops: names of the only ones that are asked for; empty: all.

    Raises:
        TilewrightError: when it holds none.

    """
    archs = {device.key: device.arch for device in store.devices()}
    groups: dict[tuple[str, str, bool], list[PlanRecord]] = {}
    for plan in store.plans():
        if plan.timing == "predicted" and archs.get(plan.device_key) == arch.name and (not ops or plan.op in ops):
            groups.setdefault((plan.op, plan.signature_key, plan.batch_invariant), []).append(plan)
    found = []
    for plans in groups.values():
        keys = sorted({plan.device_key for plan in plans}, key=lambda key: (key != device_key, key))
        of_one = [plan for plan in plans if plan.device_key == keys[0]]
        if (each := _prepared(store, arch, of_one)).problems:
            found.append(each)
    if not found:
        of_ops = f" of {', '.join(ops)}" if ops else ""
        raise TilewrightError(
            f"the database {store.name} holds no predicted plans{of_ops} for {arch.name} with stored kernels; "
            f"`tune --arch {arch.name} --predict --op all` makes some, on any machine"
        )
    return found


def _prepared(store: Store, arch: Arch, plans: Sequence[PlanRecord]) -> Prepared:
    first = plans[0]
    op = find_op(first.op)
    signature = op.signature_from_dict(first.signature)
    kernels = {
        kernel.key: kernel for kernel in store.kernels(op=first.op, signature_key=first.signature_key, arch=arch.name)
    }
    sizes = {entry.tuned_size for plan in plans for entry in plan.entries}
    predicted: dict[str, dict[str, float]] = {}
    latest: dict[int, Problem] = {}
    trials = store.trials(
        op=first.op, signature_key=first.signature_key, device_key=first.device_key, outcome=Outcome.OK
    )
    for trial in trials:
        if trial.timing != "predicted" or trial.median_us is None or trial.kernel_key not in kernels:
            continue
        predicted.setdefault(trial.problem_key, {})[trial.kernel_key] = trial.median_us
        problem = op.problem_from_dict(trial.problem)
        if problem.size in sizes:
            latest[problem.size] = problem
    problems = tuple(latest[size] for size in sorted(latest))
    return Prepared(op, signature, tuple(plans), problems, kernels, predicted)
