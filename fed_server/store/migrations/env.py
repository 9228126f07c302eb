"""What Alembic runs for every command: it migrates the connection that it was handed, in that connection's transaction."""

from __future__ import annotations

from alembic import context

from fed_server.store.tables import metadata

# SQLite cannot alter a table in place: a batch copies it.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
