"""Schema version 5: a predicted plan stands beside a measured one, and every value under the name that it has in code.

* ``timing`` is a part of a plan's identity.
* What a plan said about ``tokens`` it says about the size that its op has, whatever that counts.
* A config holds its template's own knobs, without nulls for those of other templates.
* Recipes are of format 2: every field is there, and ``dynamic_size`` is ``size_name``.
* Documents lie in their columns as they are: the schema's version says how to read them.
* Seconds of checking and measuring, which were never written, go.

Seals are over what is executed, so those of kernels and plans are made anew; one that was broken before stays broken.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

from tilewright.tuning_db.integrity import seal

revision = "0005"
down_revision = "0004"

_ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_IDENTITY = ("op", "signature_key", "device_key", "threads", "precision", "batch_invariant", "timing")
_LOSSLESS = "fp32"
_KERNEL_SEALED = (
    *("key", "op", "signature_key", "signature", "template", "config", "arch", "source", "recipe", "toolchain"),
    *("facts", "artifacts"),
)
_PLAN_SEALED_ALWAYS = (
    *("op", "signature_key", "signature", "device_key", "threads", "model", "layout", "timing", "checked", "entries"),
)
_PLAN_SEALED = (*_PLAN_SEALED_ALWAYS, "precision", "error", "batch_invariant", "facts")
_ROWS_AT_A_TIME = 1000

Row = dict[str, Any]


def upgrade() -> None:
    """Change the tables, then what is in them."""
    for column in ("check_s", "measure_s"):
        op.drop_column("trials", column)
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_plans()
    else:
        op.drop_constraint("uq_plans_identity", "plans", type_="unique")
        op.create_unique_constraint("uq_plans_identity", "plans", list(_IDENTITY))
        op.alter_column("plan_entries", "max_tokens", new_column_name="max_size")
        op.alter_column("plan_entries", "tuned_tokens", new_column_name="tuned_size")

    _change("trials", "id", {"config": sa.JSON, "samples_us": sa.JSON}, _changed_trial)
    _change("devices", "key", {"facts": sa.JSON}, _changed_device)
    documents = {"signature": sa.JSON, "config": sa.JSON, "recipe": sa.JSON, "facts": sa.JSON}
    _change("kernels", "key", documents, _changed_kernel)
    _change("plans", "id", {"signature": sa.JSON, "facts": sa.JSON}, _changed_plan)
    if op.get_bind().dialect.name == "sqlite":
        op.execute("PRAGMA user_version = 5")


def _change(table: str, key: str, documents: Mapping[str, Any], changed: Callable[[Row], Row]) -> None:
    """Update each row of ``table`` with the columns that ``changed`` gives; a row that it cannot read stays."""
    connection = op.get_bind()
    target = sa.table(table, sa.column(key), sa.column("seal"), *(sa.column(n, t) for n, t in documents.items()))
    for keys in _keys(table, key):
        rows = sa.text(f"SELECT * FROM {table} WHERE {key} IN :keys").bindparams(sa.bindparam("keys", expanding=True))
        for row in connection.execute(rows, {"keys": keys}).mappings().all():
            try:
                values = changed({**row, **{name: _parsed(row[name]) for name in documents}})
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                continue  # damaged before, and so refused by its readers before and after
            if values:
                connection.execute(sa.update(target).where(target.c[key] == row[key]).values(values))


def _keys(table: str, key: str) -> Iterator[list[Any]]:
    keys = op.get_bind().execute(sa.text(f"SELECT {key} FROM {table} ORDER BY {key}")).scalars().all()
    for first in range(0, len(keys), _ROWS_AT_A_TIME):
        yield list(keys[first : first + _ROWS_AT_A_TIME])


def _parsed(document: Any) -> Any:
    # PostgreSQL's driver has parsed it.
    return json.loads(document) if isinstance(document, str) else document


def _changed_trial(trial: Row) -> Row:
    return {"config": _own_knobs(trial["config"]), "samples_us": _opened(trial["samples_us"])}


def _changed_device(device: Row) -> Row:
    return {"facts": _opened(device["facts"])}


def _changed_kernel(kernel: Row) -> Row:
    statement = sa.text("SELECT checksum FROM kernel_artifacts WHERE kernel_key = :key ORDER BY position")
    artifacts = op.get_bind().execute(statement, {"key": kernel["key"]}).scalars().all()
    opened = {**kernel, **{name: _opened(kernel[name]) for name in ("recipe", "facts")}, "artifacts": list(artifacts)}
    sound = kernel["seal"] == _seal(opened, _KERNEL_SEALED)
    new = {
        "config": _own_knobs(kernel["config"]),
        "recipe": _recipe_of_format_2(opened["recipe"]),
        "facts": opened["facts"],
    }
    return {**new, "seal": _seal({**opened, **new}, _KERNEL_SEALED)} if sound else new


def _changed_plan(plan: Row) -> Row:
    statement = sa.text(
        "SELECT max_size, kernel_key, median_us, default_us, tuned_size FROM plan_entries "
        "WHERE plan_id = :id ORDER BY position"
    )
    entries = [dict(entry) for entry in op.get_bind().execute(statement, {"id": plan["id"]}).mappings()]
    plan = {**plan, "batch_invariant": bool(plan["batch_invariant"]), "facts": _opened(plan["facts"])}
    of_tokens = {"max_size": "max_tokens", "tuned_size": "tuned_tokens"}
    before = {**plan, "entries": [{of_tokens.get(name, name): entry[name] for name in entry} for entry in entries]}
    sealed = [*_PLAN_SEALED_ALWAYS]
    if (plan["precision"], plan["error"]) != (_LOSSLESS, 0.0):
        sealed += ["precision", "error"]
    sealed += [name for name in ("batch_invariant", "facts") if plan[name]]
    sound = plan["seal"] == _seal(before, sealed)
    new = {"facts": _facts_of_sizes(plan["facts"])}
    return {**new, "seal": _seal({**plan, **new, "entries": entries}, _PLAN_SEALED)} if sound else new


def _seal(row: Row, names: Iterable[str]) -> str:
    return seal({name: row[name] for name in names})


def _opened(document: Any) -> Any:
    if document["version"] != 1:
        raise ValueError(f"document version {document['version']!r} is unknown")
    return document["value"]


def _own_knobs(config: Row) -> Row:
    return {name: value for name, value in config.items() if value is not None}


def _facts_of_sizes(facts: Row) -> Row:
    probed = facts.get("probed")
    if not probed:
        return facts
    of_sizes = {"tokens": "size"}
    renamed = {
        name: [{of_sizes.get(key, key): value for key, value in each.items()} for each in probed[name]]
        for name in ("mended", "slower")
        if name in probed
    }
    return {**facts, "probed": {**probed, **renamed}}


def _recipe_of_format_2(recipe: Row) -> Row:
    if recipe.get("format_version") != 1:
        return recipe
    layout = recipe.get("weight_layout")
    named = {("size_name" if name == "dynamic_size" else name): value for name, value in recipe.items()}
    return {
        **_filled(_RECIPE, named),
        "tensors": [_filled(_TENSOR, tensor) for tensor in recipe["tensors"]],
        "launches": [_launch_of_format_2(launch) for launch in recipe["launches"]],
        "weight_layout": None if layout is None else _layout_of_format_2(layout),
        "format_version": 2,
    }


def _launch_of_format_2(launch: Row) -> Row:
    arguments = []
    for argument in launch["arguments"]:
        tensor_map = argument.get("map")
        arguments.append(
            {"source": "", **argument, "map": None if tensor_map is None else _filled(_TENSOR_MAP, tensor_map)}
        )
    return {**_filled(_LAUNCH, launch), "arguments": arguments}


def _layout_of_format_2(layout: Row) -> Row:
    if layout.get("form") == "rows":
        return _filled({"nibbles": "none"}, layout)
    # The first releases knew one precision, and called it the layout's dtype.
    own = {name: value for name, value in layout.items() if name not in ("dtype", "scales")}
    return {"halves": 1, "run": 0, "precision": layout.get("dtype", _LOSSLESS), **own}


_RECIPE = {"workspace_bytes": "0", "workspace_zeroed": False, "guards": [], "abi_version": 1}
_TENSOR = {"role": "input", "optional": False, "values": "none", "bound": "", "lengths": "", "page_size": 0}
_TENSOR_MAP = {"box": [], "data_type": -1, "swizzle": -1, "l2_promotion": 2}
_LAUNCH = {
    "grid": [],
    "block": [],
    "cluster": [],
    "shared_memory_bytes": "0",
    "hidden_arguments": 0,
    "programmatic": False,
    "cooperative": False,
}


def _filled(defaults: Row, fields: Row) -> Row:
    """``fields``, with what the absence of some meant in the releases that did not write them."""
    return {**defaults, **fields}


def _rebuild_plans() -> None:
    """SQLite changes no constraint in place, and forgets the entries of a plan whose table is dropped."""
    op.execute("CREATE TABLE old_plans AS SELECT * FROM plans")
    op.execute("CREATE TABLE old_plan_entries AS SELECT * FROM plan_entries")
    op.drop_table("plan_entries")
    op.drop_table("plans")
    op.create_table(
        "plans",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("op", sa.Text, nullable=False),
        sa.Column("signature_key", sa.Text, nullable=False),
        sa.Column("signature", sa.JSON, nullable=False),
        sa.Column("device_key", sa.Text, nullable=False),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("precision", sa.Text, nullable=False),
        sa.Column("error", sa.Double, nullable=False),
        sa.Column("batch_invariant", sa.Boolean, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("layout", sa.Text, nullable=False),
        sa.Column("timing", sa.Text, nullable=False),
        sa.Column("checked", sa.Text, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("seal", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plans"),
        sa.UniqueConstraint(*_IDENTITY, name="uq_plans_identity"),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_plans_device_key"),
    )
    op.create_table(
        "plan_entries",
        sa.Column("plan_id", _ROW_ID, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("max_size", sa.BigInteger),
        sa.Column("kernel_key", sa.Text),
        sa.Column("median_us", sa.Double),
        sa.Column("default_us", sa.Double),
        sa.Column("tuned_size", sa.BigInteger),
        sa.PrimaryKeyConstraint("plan_id", "position", name="pk_plan_entries"),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.id"], name="fk_plan_entries_plan_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["kernel_key"], ["kernels.key"], name="fk_plan_entries_kernel_key"),
    )
    kept = (
        "id, op, signature_key, signature, device_key, threads, precision, error, batch_invariant, model, layout, "
        "timing, checked, facts, created_at, seal"
    )
    op.execute(f"INSERT INTO plans ({kept}) SELECT {kept} FROM old_plans")
    entry = "plan_id, position, kernel_key, median_us, default_us"
    op.execute(
        f"INSERT INTO plan_entries ({entry}, max_size, tuned_size) "
        f"SELECT {entry}, max_tokens, tuned_tokens FROM old_plan_entries"
    )
    op.drop_table("old_plan_entries")
    op.drop_table("old_plans")
