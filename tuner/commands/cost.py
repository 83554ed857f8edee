"""``tune cost``: from plans to milliseconds per layer, tokens per second and dollars per million tokens."""

from __future__ import annotations

import argparse
import math
from typing import Any

from tilewright.codegen.hardware.archs import find_arch
from tilewright.codegen.models.shapes import load_model
from tilewright.errors import TilewrightError
from tilewright.tuner.commands.common import add_options, open_store, print_json
from tilewright.tuner.report.costs import DeviceCost, device_costs
from tilewright.tuner.report.terminal import print_lines
from tilewright.tuner.report.text import table, terminal_width

_HEAD = ("device", "tokens", "part", "default", "tuned", "timing", "checked")
_SUM_HEAD = ("device", "tokens", "ms/step", "tokens/s", "$/M tokens", "before", "speedup", "timing", "left out")
_NOTE = """\
The parts are those that have a plan; the rest of the model takes its own time. A step is one pass over all layers with
so many tokens (sequences, for attention), on one device; before: with the default config everywhere."""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("cost", help="time and money per token, from plans")
    parser.add_argument("--model", required=True, help="preset name, config.json or its folder")
    parser.add_argument("--arch", required=True, metavar="A,A,...", help="archs to set side by side")
    parser.add_argument("--price", required=True, metavar="P,P,...", help="$ per device and hour; one, or one per arch")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks")
    parser.add_argument(
        "--max-error", type=float, default=0.0, metavar="E", help="of plans that may be used (default 0)"
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show what a model costs.

    Raises:
        TilewrightError: for prices that make no sense, and where there is no plan.

    """
    archs = [find_arch(name.strip()) for name in arguments.arch.split(",")]
    prices = _prices(arguments.price, len(archs))
    model = load_model(arguments.model, tp=arguments.tp, ep=arguments.ep)
    found: list[DeviceCost] = []
    with open_store(arguments) as store:
        for arch, price in zip(archs, prices, strict=True):
            found += device_costs(store, model, arch, price, max_error=arguments.max_error)
    if arguments.json:
        print_json({"model": model.name, "tp": model.tp, "ep": model.ep, "costs": [c.document() for c in found]})
    else:
        print_lines(_lines(found))
    return 0


def _prices(text: str, count: int) -> list[float]:
    try:
        prices = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise TilewrightError(f"--price {text!r} is no list of numbers such as 3.5 or 3.5,2.2") from error
    if not all(0 < price < math.inf for price in prices):
        raise TilewrightError(f"--price {text!r} is impossible; give dollars per hour, above 0")
    if len(prices) not in (1, count):
        raise TilewrightError(f"--price names {len(prices)} prices for {count} archs; give one, or one for each")
    return prices * count if len(prices) == 1 else prices


def _lines(found: list[DeviceCost]) -> list[str]:
    width = terminal_width()
    parts = [
        (
            cost.device,
            str(cost.tokens),
            part.title,
            f"{part.default_us / 1e3:.4g} ms",
            f"{part.tuned_us / 1e3:.4g} ms",
            part.timing,
            part.checked,
        )
        for cost in found
        for part in cost.parts
    ]
    sums = [
        (
            cost.device,
            str(cost.tokens),
            f"{cost.step_us / 1e3:.4g}",
            f"{cost.tokens_per_s:.4g}",
            f"{cost.dollars_per_million:.3g}",
            f"{cost.default_dollars_per_million:.3g}",
            f"{cost.default_step_us / cost.step_us:.2f}x",
            cost.timing,
            ", ".join(cost.missing) or "-",
        )
        for cost in found
    ]
    return [*table(_HEAD, parts, width=width), "", *table(_SUM_HEAD, sums, width=width), "", *_NOTE.splitlines()]
