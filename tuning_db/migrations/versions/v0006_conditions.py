"""Schema version 6: under which conditions a trial was timed, such as the clocks of a GPU."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the column; nothing is known of older trials."""
    op.add_column("trials", sa.Column("conditions", sa.JSON, nullable=False, server_default="{}"))
    if op.get_bind().dialect.name == "sqlite":
        op.execute("PRAGMA user_version = 6")
        return
    op.alter_column("trials", "conditions", server_default=None)
