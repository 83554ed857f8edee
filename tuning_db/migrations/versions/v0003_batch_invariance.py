"""Schema version 3: plans whose results do not depend on what else is in the batch, beside those that may."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_OLD_KEY = "uq_plans_op_signature_key_device_key_threads_precision"
_KEY = ("op", "signature_key", "device_key", "threads", "precision", "batch_invariant")
_NEW_KEY = "uq_plans_identity"  # PostgreSQL keeps 63 letters of a name, and the columns' names are more


def upgrade() -> None:
    """Add the column, false in every older plan, and make it a part of the key."""
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_plans()
        op.execute("PRAGMA user_version = 3")
        return
    op.add_column("plans", sa.Column("batch_invariant", sa.Boolean, nullable=False, server_default=sa.false()))
    op.alter_column("plans", "batch_invariant", server_default=None)
    op.drop_constraint(_OLD_KEY, "plans", type_="unique")
    op.create_unique_constraint(_NEW_KEY, "plans", list(_KEY))


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
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("seal", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plans"),
        sa.UniqueConstraint(*_KEY, name=_NEW_KEY),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_plans_device_key"),
    )
    op.create_table(
        "plan_entries",
        sa.Column("plan_id", _ROW_ID, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("max_tokens", sa.BigInteger),
        sa.Column("kernel_key", sa.Text),
        sa.Column("median_us", sa.Double),
        sa.Column("default_us", sa.Double),
        sa.Column("tuned_tokens", sa.BigInteger),
        sa.PrimaryKeyConstraint("plan_id", "position", name="pk_plan_entries"),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.id"], name="fk_plan_entries_plan_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["kernel_key"], ["kernels.key"], name="fk_plan_entries_kernel_key"),
    )
    kept = (
        "id, op, signature_key, signature, device_key, threads, precision, error, model, layout, timing, checked, "
        "created_at, seal"
    )
    op.execute(f"INSERT INTO plans ({kept}, batch_invariant) SELECT {kept}, 0 FROM old_plans")
    entry = "plan_id, position, max_tokens, kernel_key, median_us, default_us, tuned_tokens"
    op.execute(f"INSERT INTO plan_entries ({entry}) SELECT {entry} FROM old_plan_entries")
    op.drop_table("old_plan_entries")
    op.drop_table("old_plans")
