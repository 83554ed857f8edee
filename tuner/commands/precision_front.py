"""Time against error of the precisions that were tried, as a table and as a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilewright.tuner.campaign.precision import FrontPoint
from tilewright.tuner.report.text import format_us, table, terminal_width


def front_table(front: Sequence[FrontPoint], exact: FrontPoint, chosen: str | None) -> list[str]:
    """Lines of a table, a row for each precision; ``exact`` is compared with, ``chosen`` the plan's."""
    rows = [
        (
            point.precision,
            f"{point.error.relative:.2g}",
            f"{point.error.largest:.2g}",
            format_us(point.time_us),
            f"{exact.time_us / point.time_us:.2f}x",
            "this one" if point.precision == chosen else "stored, too",
        )
        for point in front
    ]
    head = ("precision", "error", "largest", "mean time", f"vs {exact.precision}", "plan")
    return table(head, rows, width=terminal_width())


def point_document(point: FrontPoint) -> dict[str, Any]:
    """A precision's place on the front."""
    return {
        "precision": point.precision,
        "error": point.error.relative,
        "largest_error": point.error.largest,
        "layout": point.plan.layout,
        "geometric_mean_us": point.time_us,
    }
