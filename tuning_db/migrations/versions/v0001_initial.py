"""Schema version 1: runs, devices, artifacts, kernels, trials and plans."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables and, on SQLite, write what readers check into the file's header."""
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("versions", sa.JSON, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_table(
        "devices",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("arch", sa.Text, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_devices"),
    )
    _create_kernels()
    _create_trials()
    _create_plans()
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"PRAGMA application_id = {int.from_bytes(b'TWdb')}")
        op.execute("PRAGMA user_version = 1")


def _create_kernels() -> None:
    op.create_table(
        "artifacts",
        sa.Column("checksum", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("abi_version", sa.Integer, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("checksum", name="pk_artifacts"),
    )
    op.create_table(
        "kernels",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("op", sa.Text, nullable=False),
        sa.Column("signature_key", sa.Text, nullable=False),
        sa.Column("signature", sa.JSON, nullable=False),
        sa.Column("template", sa.Text, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("arch", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("recipe", sa.JSON, nullable=False),
        sa.Column("toolchain", sa.Text, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("checked", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("seal", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_kernels"),
    )
    op.create_index("ix_kernels_op_signature_key_arch", "kernels", ["op", "signature_key", "arch"])
    op.create_table(
        "kernel_artifacts",
        sa.Column("kernel_key", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("checksum", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("kernel_key", "position", name="pk_kernel_artifacts"),
        sa.ForeignKeyConstraint(
            ["kernel_key"], ["kernels.key"], name="fk_kernel_artifacts_kernel_key", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["checksum"], ["artifacts.checksum"], name="fk_kernel_artifacts_checksum"),
    )


def _create_trials() -> None:
    op.create_table(
        "trials",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("op", sa.Text, nullable=False),
        sa.Column("signature_key", sa.Text, nullable=False),
        sa.Column("problem_key", sa.Text, nullable=False),
        sa.Column("problem", sa.JSON, nullable=False),
        sa.Column("device_key", sa.Text, nullable=False),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("template", sa.Text, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("kernel_key", sa.Text),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("timing", sa.Text, nullable=False),
        sa.Column("median_us", sa.Double),
        sa.Column("low_us", sa.Double),
        sa.Column("high_us", sa.Double),
        sa.Column("samples_us", sa.JSON, nullable=False),
        sa.Column("error", sa.Double),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("search", sa.Text, nullable=False),
        sa.Column("build_s", sa.Double, nullable=False),
        sa.Column("check_s", sa.Double, nullable=False),
        sa.Column("measure_s", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_trials"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_trials_run_id"),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_trials_device_key"),
    )
    op.create_index("ix_trials_problem_key_device_key_threads", "trials", ["problem_key", "device_key", "threads"])
    op.create_index("ix_trials_op_template_device_key", "trials", ["op", "template", "device_key"])
    op.create_index("ix_trials_run_id", "trials", ["run_id"])


def _create_plans() -> None:
    op.create_table(
        "plans",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("op", sa.Text, nullable=False),
        sa.Column("signature_key", sa.Text, nullable=False),
        sa.Column("signature", sa.JSON, nullable=False),
        sa.Column("device_key", sa.Text, nullable=False),
        sa.Column("threads", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("layout", sa.Text, nullable=False),
        sa.Column("timing", sa.Text, nullable=False),
        sa.Column("checked", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("seal", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plans"),
        sa.UniqueConstraint(
            "op", "signature_key", "device_key", "threads", name="uq_plans_op_signature_key_device_key_threads"
        ),
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
