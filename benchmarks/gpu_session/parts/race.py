"""Races the served plans of every template against plain torch on the same tensors, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from parts.tensors import DEVICE, SEED, device_call, device_weights
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.runtime import PreparedCall, ServeOptions
from tilewright.runtime.launchers.cuda.driver import Driver, find_driver
from tilewright.tuning_db.records import PlanRecord
from tilewright.tuning_db.store import Store


def run(prepared: Path, tell: Callable[[dict[str, Any]], None], repeats: int) -> None:
    """Each plan at the sizes that it was tuned at."""
    rows: list[dict[str, Any]] = []
    databases = [prepared / "models.db", *sorted((prepared / "every").glob("*.db"))]
    for path in databases:
        with Store.open_read_only(path) as store:
            plans = {plan.signature_key: plan for plan in store.plans()}  # the runtime takes the device's own
        for plan in plans.values():
            for row in raced(path, plan, repeats):
                rows.append({"database": path.stem, **row})
                tell({"rows": rows, "table": [_line(each) for each in rows]})


def raced(path: Path, plan: PlanRecord, repeats: int) -> Iterator[dict[str, Any]]:
    """Times of ours and torch's for one plan; torch's is what the runtime itself falls back to."""
    op = find_op(plan.op)
    signature = op.signature_from_dict(plan.signature)
    weights = device_weights(signature, op.weights(signature, SEED))
    ours, torchs = (
        PreparedCall.prepare(signature, weights, options=ServeOptions(database=each, device=DEVICE, max_error=1.0))
        for each in (path, path.with_name("none.db"))
    )
    for size in sorted({entry.tuned_size for entry in plan.entries if entry.tuned_size}):
        passed = device_call(op, op.problem(signature, size, RoutingSpec.parse("balanced"))).passed
        times_us: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for call, own in zip((ours.call, torchs.call), times_us, strict=True):
                own.append(_time_us(partial(call, *passed), repeats))
        yield {
            "signature": signature.describe(),
            "size": size,
            "ours_us": statistics.median(times_us[0]),
            "torch_us": statistics.median(times_us[1]),
            "ratio": statistics.median(theirs / mine for mine, theirs in zip(*times_us, strict=True)),
            "samples_us": times_us,
        }


def _time_us(call: Callable[[], object], calls: int) -> float:
    """Of one of several calls that are asked for together; the device is waited for before and after."""
    driver = find_driver()
    driver.load({"cuCtxSynchronize": ()})
    _synchronise(driver)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronise(driver)
    return 1e6 * (time.perf_counter() - begin) / calls


def _synchronise(driver: Driver) -> None:
    with driver.current(driver.device(0)):
        driver.call("cuCtxSynchronize")


def _line(row: dict[str, Any]) -> str:
    times = f"{row['ours_us']:10.1f} us {row['torch_us']:10.1f} us {row['ratio']:6.2f}x"
    return f"{row['signature']:90} {row['size']:>6} {times}"
