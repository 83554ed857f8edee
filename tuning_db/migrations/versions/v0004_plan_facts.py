"""Schema version 4: what is known of a plan beyond its rows, such as how it did at sizes drawn at random."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_NOTHING = json.dumps({"version": 1, "value": {}})


def upgrade() -> None:
    """Add the column; nothing is known of older plans."""
    op.add_column("plans", sa.Column("facts", sa.JSON, nullable=False, server_default=_NOTHING))
    if op.get_bind().dialect.name == "sqlite":
        op.execute("PRAGMA user_version = 4")
        return
    op.alter_column("plans", "facts", server_default=None)
