"""Nanoseconds that a call takes of the CPU, piece by piece, and of the whole call as Python makes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tilewright.runtime import Gate, ServeOptions
from tilewright.runtime.calls.bind import IMPLEMENTATION
from tilewright.runtime.launchers.cuda.driver import find_driver
from tilewright.tuning_db.store import Store

_DEVICE = torch.device("cuda", 0)


def run(prepared: Path, tell: Callable[[dict[str, Any]], None], repeats: int) -> None:
    """A gate of one token: the smallest kernel that there is, so that the CPU's part shows."""
    path = prepared / "every/gating.triton_fused.db"
    with Store.open_read_only(path) as store:
        fields = store.plans()[0].signature
    kept = {
        name: fields[name] for name in ("experts", "top_k", "score", "renormalize", "groups", "top_groups", "scale")
    }
    gate = Gate.of(
        **kept,
        order=fields["order"],
        block_size=fields["block_size"],
        bias=torch.zeros(fields["experts"], device=_DEVICE) if fields["bias"] else None,
        options=ServeOptions(database=path, device=_DEVICE),
    )
    logits = torch.randn(1, fields["experts"]).to(_DEVICE)
    tensors = (logits, *gate.outputs(logits))
    gate.call(*tensors)
    times_us = []
    for _ in range(20 * repeats):
        begin = time.perf_counter()
        gate.call(*tensors)
        times_us.append(1e6 * (time.perf_counter() - begin))
    stages = gate.call.stage_times(tensors, repeats) if hasattr(gate.call, "stage_times") else {}
    device = find_driver().device(0)
    result = {"device": device.name, "implementation": IMPLEMENTATION, "call_us": times_us, "stage_ns": stages}
    table = [f"{IMPLEMENTATION}: a call of {len(tensors)} tensors {statistics.median(times_us):.2f} us"]
    tell({**result, "table": [*table, *(f"  {name:10} {ns:8.0f} ns" for name, ns in stages.items())]})
