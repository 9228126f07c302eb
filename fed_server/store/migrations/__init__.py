"""The history of the schema. `versions/` holds one Alembic migration per change, run when a store is opened.

To change the schema: change a record, run the test of the migrations, put the operations that it prints into the next file of
`versions/`, and name it in `HEAD`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

from fed_core.errors import ConfigError

# Known without importing Alembic, which a database that is up to date does not need.
HEAD: Final = "0008"


def upgrade(connection: Connection) -> None:
    """Brings a database to the present schema within the caller's transaction. Raises ConfigError if its schema is newer."""
    current = _revision(connection)
    if current == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise ConfigError(
            f"the database {connection.engine.url} was written by a newer fedstream (schema {current}, this one knows up to "
            f"{HEAD}): install that version again, or start with another data directory"
        )
    command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
