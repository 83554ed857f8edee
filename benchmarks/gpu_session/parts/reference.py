"""Serves every template through the runtime on CUDA tensors, and compares outputs with references in fp64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parts.tensors import DEVICE, SEED, as_array, device_call, device_weights
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.runtime import PreparedCall, ServeOptions, TilewrightWarning
from tilewright.tuner.evaluation.checking import compare_all
from tilewright.tuning_db.records import PlanRecord
from tilewright.tuning_db.store import Store


def run(prepared: Path, tell: Callable[[dict[str, Any]], None], _repeats: int) -> None:
    """Each plan at one size and at the awkward ones of its op."""
    rows: list[dict[str, Any]] = []
    for path in sorted((prepared / "every").glob("*.db")):
        with Store.open_read_only(path) as store:
            plans = {plan.signature_key: plan for plan in store.plans()}  # the runtime takes the device's own
        for plan in plans.values():
            for row in compared(path, plan):
                rows.append({"template": path.stem, **row})
                tell({"rows": rows, "table": [_line(each) for each in rows]})
    wrong = [each for each in rows if each["complaint"]]
    if wrong or not rows:
        raise SystemExit(f"{len(wrong)} of {len(rows)} outputs are wrong: {wrong[0] if wrong else 'nothing was run'}")


def compared(path: Path, plan: PlanRecord) -> Iterator[dict[str, Any]]:
    """What a plan's kernels give, beside the reference."""
    op = find_op(plan.op)
    signature = op.signature_from_dict(plan.signature)
    weights = op.weights(signature, SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TilewrightWarning)  # torch in a kernel's place is no success
        options = ServeOptions(database=path, device=DEVICE, max_error=1.0)
        served = PreparedCall.prepare(signature, device_weights(signature, weights), options=options)
        for problem in (op.problem(signature, 40, RoutingSpec.parse("balanced")), *op.awkward_problems(signature)):
            call = device_call(op, problem)
            try:
                served(*call.passed)
            except (TilewrightError, TilewrightWarning) as error:
                yield {"size": problem.size, "error": math.inf, "complaint": str(error)}
                continue
            found = {name: as_array(tensor) for name, tensor in call.outputs.items()}
            reference = op.reference(signature, weights, call.inputs)
            comparison = compare_all(found, reference, op.tolerance(signature))
            yield {"size": problem.size, "error": comparison.error, "complaint": comparison.complaint or ""}


def _line(row: dict[str, Any]) -> str:
    return f"{row['template']:32} {row['size']:>6} error {row['error']:.1e} {row['complaint']}"
