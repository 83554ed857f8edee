"""What a session of races adds up to: ours against the best peer at each point, and the share of the roofline."""

import math
from dataclasses import dataclass

from interleave import Estimate


@dataclass(frozen=True)
class Point:
    """One race: ``speedup`` is the best peer's time over ours, paired."""

    table: str
    label: str
    threads: int
    ours_us: Estimate
    best_peer: str
    speedup: Estimate
    noise: Estimate
    roofline_share: float | None = None
    """None where more than kernels is timed."""


POINTS: list[Point] = []
TABLES: list[list[str]] = []
"""Lines of text that races made themselves."""


def render() -> list[str]:
    """Lines of text: every point, then per table and thread count the geometric mean and the worst point."""
    lines = [
        f"{'':28} {'thr':>3} {'ours us':>10}  {'best peer':>22}  {'speed-up [95 %]':>22}"
        f"  {'A/A noise':>16} {'roofline':>8}"
    ]
    for key in sorted({(p.table, p.threads) for p in POINTS}):
        chosen = [p for p in POINTS if (p.table, p.threads) == key]
        lines += [
            f"{p.label:28} {p.threads:>3} {p.ours_us.median:>10.0f}  {p.best_peer:>22}  {p.speedup:.2f}"
            f"  {p.noise:.2f} {'-' if p.roofline_share is None else f'{p.roofline_share:.0%}':>8}"
            for p in chosen
        ]
        mean = math.exp(sum(math.log(p.speedup.median) for p in chosen) / len(chosen))
        worst = min(chosen, key=lambda p: p.speedup.median)
        lines.append(
            f"{key[0]}, {key[1]} threads: geometric mean {mean:.2f}x, worst {worst.speedup.median:.2f}x ({worst.label})"
        )
    return lines
