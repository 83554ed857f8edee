"""The schema's history. Every version is a module in ``versions``; a stored old database in the tests proves each."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from tilewright.tuning_db.schema import newer_schema

VERSION_TABLE = "tilewright_alembic_version"

_POSTGRESQL_LOCK = 0x54576462  # any number that only we use


def upgrade_database(connection: Connection) -> None:
    """Bring the schema up to date inside the caller's transaction; an up-to-date one is left alone.

    Raises TilewrightError where a newer release has written the database.
    """
    if connection.dialect.name == "postgresql":
        # SQLite's writers already wait for each other at BEGIN IMMEDIATE.
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _POSTGRESQL_LOCK})
    config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
    config.set_main_option("script_location", str(Path(__file__).parent))
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    current = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    if current is not None and current not in known:
        raise newer_schema(connection.engine.url.render_as_string(hide_password=True), f"revision {current}")
    if current != scripts.get_current_head():
        command.upgrade(config, "head")
