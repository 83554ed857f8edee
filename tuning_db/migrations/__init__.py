"""The schema's history. Every version is a module in ``versions``; a stored old database in the tests proves each."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from tilewright.errors import TilewrightError
from tilewright.plain_text import without_passwords
from tilewright.tuning_db.faults import damaged
from tilewright.tuning_db.schema import VERSION_TABLE, newer_schema

_POSTGRESQL_LOCK = 0x54576462  # any number that only we use


def upgrade_database(connection: Connection) -> None:
    """Bring the schema up to date inside the caller's transaction; an up-to-date one is left alone.

    Raises TilewrightError where a newer release has written the database.
    """
    if connection.dialect.name == "postgresql":
        # SQLite's writers already wait for each other at BEGIN IMMEDIATE.
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _POSTGRESQL_LOCK})
    config = _config()
    if not _is_current(connection, ScriptDirectory.from_config(config)):
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def require_current_database(connection: Connection) -> None:
    """Refuse a database that this release cannot read as it is.

    Raises TilewrightError where the schema is missing, older or newer.
    """
    if not _is_current(connection, ScriptDirectory.from_config(_config())):
        raise TilewrightError(
            f"the database {_name(connection)} is empty or was written by an older tilewright; "
            f"run `tune` on it once to upgrade it"
        )


def _is_current(connection: Connection, scripts: ScriptDirectory) -> bool:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    revisions = context.get_current_heads()
    if len(revisions) > 1:
        raise damaged(_name(connection), f"it names {len(revisions)} versions of itself")
    revision = revisions[0] if revisions else None
    known = {script.revision for script in scripts.walk_revisions()}
    if revision is not None and revision not in known:
        raise newer_schema(_name(connection), f"revision {revision!r:.40}")
    return revision == scripts.get_current_head()


def _config() -> Config:
    config = Config(attributes={"version_table": VERSION_TABLE})
    # Alembic reads % as the start of an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _name(connection: Connection) -> str:
    return without_passwords(connection.engine.url.render_as_string(hide_password=True))
