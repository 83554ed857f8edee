"""What every document of a run begins with, however its times are known."""

from __future__ import annotations

from typing import Any

from tilewright.tuner.campaign.campaign import Report, Request


def run_document(report: Report, request: Request, database: str) -> dict[str, Any]:
    """Which run it was, for what, and what it took: times in seconds."""
    return {
        "run": report.run_id,
        "op": request.op.name,
        "arch": request.arch.name,
        "device": request.target.device.key,
        "model": request.model,
        "database": database,
        "trials": report.trials,
        "wall_s": report.wall_s,
    }
