"""The plans of a signature put to the test as the runtime serves them, and which of them serves after that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tilewright.tuner.campaign.campaign import SignatureReport
from tilewright.tuner.campaign.precision import FrontPoint
from tilewright.tuner.plan.constraint import noise_near
from tilewright.tuner.plan.facts import probed_document
from tilewright.tuner.plan.finals import Probed, Verdict
from tilewright.tuner.plan.prove import Proof, Prover
from tilewright.tuning_db.records import PlanRecord
from tilewright.tuning_db.store import Store


def prove_plans(mine: SignatureReport, prover: Prover, store: Store, probes: int, say: Callable[[str], None]) -> None:
    """Race every plan of a signature as it is served, and store what it becomes.

    A plan that stays slower than the default at some size, since the default reads the weights in another layout, gives
    way to the best plan within the default's layout, if that is slower at fewer sizes.
    """
    if mine.plan is None or mine.verdict is None:
        return

    def proven(plan: PlanRecord, verdict: Verdict, rehearsed: Probed) -> Proof:
        def noise_at(size: int) -> float:
            near = noise_near(verdict.grid, size)
            return (near.noise if near else None) or 0.0

        problems = [each.problem for each in verdict.grid]
        proof = prover.prove(plan, problems, mine.default_for(plan), probes, noise_at)
        return replace(
            proof, plan=replace(proof.plan, facts=plan.facts | {"probed": probed_document(rehearsed, proof)})
        )

    proof = proven(mine.plan, mine.verdict, mine.probed)
    other = mine.alternative
    if proof.slower_than_default and other is not None:
        say(f"the default is faster at {_sizes(proof)}, in another weight layout: a plan within that is tried")
        in_its_place = proven(other.plan, other.verdict, Probed())
        if len(in_its_place.slower_than_default) < len(proof.slower_than_default):
            mine.verdict, mine.probed, proof = other.verdict, Probed(), in_its_place
    mine.proof, mine.plan = proof, proof.plan
    store.put_plan(mine.plan)
    for at, point in enumerate(mine.front):
        if point.precision == mine.plan.precision:
            mine.front[at] = FrontPoint(point.precision, point.error, mine.finals, mine.plan)
        else:
            mine.front[at] = replace(point, plan=proven(point.plan, mine.verdict, Probed()).plan)
            store.put_plan(mine.front[at].plan)


def _sizes(proof: Proof) -> str:
    return ", ".join(str(row.size) for row in proof.slower_than_default)
