"""Schema version 5: one word for the dynamic size that a plan's rows are about."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

from tilewright.tuning_db.integrity import seal

revision = "0005"
down_revision = "0004"

_LOSSLESS = "fp32"


def upgrade() -> None:
    """Rename what was called tokens. Rows whose seal was broken before keep it, and with it stay refused."""
    plans = sa.table("plans", *(sa.column(name) for name in ("id", "seal")), sa.column("facts", sa.JSON))
    sealed = [plan for plan in _plans("max_tokens", "tuned_tokens") if plan["seal"] == _old_seal(plan)]
    for old, new in (("max_tokens", "max_size"), ("tuned_tokens", "tuned_size")):
        op.execute(f"ALTER TABLE plan_entries RENAME COLUMN {old} TO {new}")
    renamed = {"max_tokens": "max_size", "tuned_tokens": "tuned_size"}
    for plan in sealed:
        facts = {"version": 1, "value": _with_sizes(plan["facts"]["value"])}
        entries = [{renamed.get(name, name): value for name, value in each.items()} for each in plan["entries"]]
        changed = {"facts": facts, "seal": _old_seal({**plan, "facts": facts, "entries": entries})}
        op.get_bind().execute(sa.update(plans).where(plans.c.id == plan["id"]).values(changed))
    if op.get_bind().dialect.name == "sqlite":
        op.execute("PRAGMA user_version = 5")


def _plans(max_size: str, tuned_size: str) -> list[dict[str, Any]]:
    connection = op.get_bind()
    documents = ("signature", "facts")
    found = []
    plans = sa.text("SELECT * FROM plans ORDER BY id").columns(**dict.fromkeys(documents, sa.JSON))
    for plan in connection.execute(plans).mappings():
        statement = sa.text(
            f"SELECT {max_size}, kernel_key, median_us, default_us, {tuned_size} FROM plan_entries "
            "WHERE plan_id = :id ORDER BY position"
        )
        entries = [dict(entry) for entry in connection.execute(statement, {"id": plan["id"]}).mappings()]
        found.append({**plan, "entries": entries})
    return found


def _with_sizes(facts: Mapping[str, Any]) -> dict[str, Any]:
    probed = dict(facts.get("probed") or {})
    for name in ("mended", "slower"):
        if name in probed:
            probed[name] = [
                {("size" if key == "tokens" else key): value for key, value in each.items()} for each in probed[name]
            ]
    return {**facts, **({"probed": probed} if probed else {})}


def _old_seal(plan: Mapping[str, Any]) -> str:
    names = (
        "op",
        "signature_key",
        "signature",
        "device_key",
        "threads",
        "model",
        "layout",
        "timing",
        "checked",
        "entries",
    )
    sealed = {name: plan[name] for name in names}
    if (plan["precision"], plan["error"]) != (_LOSSLESS, 0.0):
        sealed |= {"precision": plan["precision"], "error": plan["error"]}
    if plan["batch_invariant"]:
        sealed["batch_invariant"] = True
    if facts := plan["facts"]["value"]:
        sealed["facts"] = facts
    return seal(sealed)
