"""What the making of a plan found beyond its rows: as the document that is stored with it, and in words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.recipe.model import packable
from tilewright.errors import TilewrightError
from tilewright.tuner.plan.finals import Probed, Verdict
from tilewright.tuner.plan.prove import Proof
from tilewright.tuning_db.records import Document, PlanRecord

_WORD_BYTES = 4


def costs_document(verdict: Verdict) -> Document:
    """What the plan's restrictions cost, as ratios of geometric mean times over the tuned sizes, and its memory."""
    settled = verdict.settled
    document: Document = {"layout_cost": settled.cost, "distilling_cost": verdict.distilling_cost}
    if settled.order:
        document["order_cost"] = settled.order_cost
    if another := settled.another:
        document["another_layout"] = {"layout": another.layout, "layout_cost": another.cost}
    recipes = [finalist.built.variant.recipe for finalist in verdict.chosen]
    if weight := packable(recipes[0].tensors):
        dims = [int(dim) for dim in weight.dims]
        layouts = {recipe.weight_layout for recipe in recipes}
        document["packed_bytes"] = sum(_packed_bytes(layout, dims) for layout in layouts)
    return document


def conditions_document(verdict: Verdict) -> Document:
    """How the calls of who serves were timed, where that is known; empty where it is not."""
    known = [each.evaluation.conditions for each in verdict.chosen if each.evaluation.conditions]
    if not known:
        return {}
    return {
        "methods": sorted({each["method"] for each in known}),
        "drivers": sorted({each["driver"] for each in known}),
        "throttled": sorted({reason for each in known for reason in each["throttled"]}),
    }


def _packed_bytes(layout: WeightLayout | RowLayout | None, dims: Sequence[int]) -> int:
    experts, n, k = dims
    match layout:
        case RowLayout():
            return layout.packed_bytes(experts, n, k)
        case WeightLayout():
            return _WORD_BYTES * layout.packed_words(experts, n, k)
        case None:
            return _WORD_BYTES * math.prod(dims)


def probed_document(rehearsed: Probed, proof: Proof) -> Document:
    """How the plan did at sizes drawn at random: in the worker while it was made, then frozen, as it is served."""
    made = [size for each in rehearsed.rounds for size in (probe.problem.size for probe in each)]
    return {
        "sizes": [*made, *(size for drawn in proof.rounds for size in drawn)],
        "frozen": [row.size for row in proof.last],
        "mended": [
            *({"size": size, "by": "another kernel"} for size in rehearsed.mended_sizes),
            *({"size": mend.size, "by": mend.by} for mend in proof.mends),
        ],
        "slower": [
            {"size": row.size, "than": than, "ratio": ratio.median}
            for row in proof.still_served
            for than, ratio, slower in (
                ("default", row.over_default, row.slower_than_default),
                ("torch", row.over_torch, row.slower_than_torch),
            )
            if slower and ratio is not None
        ],
    }


T = TypeVar("T")


def _reading(read: Callable[[PlanRecord], T]) -> Callable[[PlanRecord], T]:
    """``read`` with a sentence for facts that were not written by ``tune``: in a document anything may stand."""

    @functools.wraps(read)
    def checked(plan: PlanRecord) -> T:
        try:
            return read(plan)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise TilewrightError(
                f"the facts of the plan for {plan.op} on {plan.device_key} are not what `tune` writes ({error}); "
                "tune again"
            ) from error

    return checked


@_reading
def costs_text(plan: PlanRecord) -> list[str]:
    """A line for each restriction that the plan is under, and what it costs."""
    facts, lines = plan.facts, []
    if (cost := facts.get("layout_cost")) is not None and plan.layout:
        layouts = plan.layout.split("+")
        many = "one weight layout" if len(layouts) == 1 else f"{len(layouts)} weight layouts"
        text = f"{many} for all sizes ({' and '.join(layouts)}"
        text += f", {facts['packed_bytes'] / 1e6:.1f} MB" if "packed_bytes" in facts else ""
        text += f") costs {cost - 1:.1%} of the time with any at each size"
        if another := facts.get("another_layout"):
            names = another["layout"].split("+")
            text += f"; --weight-copies {len(names)} ({' and '.join(names)}): {another['layout_cost'] - 1:.1%}"
        lines.append(text)
    if plan.batch_invariant:
        cost = facts.get("order_cost")
        known = "" if cost is None else f", which costs {cost - 1:.1%} of the time with any order at each size"
        lines.append(f"batch-invariant: one order of sums for all sizes{known}")
    return lines


@_reading
def probed_text(plan: PlanRecord) -> str:
    """One sentence on the sizes drawn at random; empty where there were none."""
    probed: Mapping[str, Any] = plan.facts.get("probed") or {}
    frozen: Sequence[int] = probed.get("frozen") or ()
    if not frozen:
        return ""
    worse = [f"{each['size']} ({each['ratio']:.2f}x {each['than']})" for each in probed["slower"]]
    found = f"slower at {', '.join(worse)}" if worse else "at none slower than the default or torch"
    text = f"probed frozen at {len(frozen)} sizes drawn at random ({', '.join(map(str, frozen))}): {found}"
    text += " beyond the noise"
    if mended := probed["mended"]:
        by = ", ".join(f"{each['size']} ({each['by']})" for each in mended)
        text += f"; {len(probed['sizes'])} sizes probed in all, mended at {by}"
    return text
