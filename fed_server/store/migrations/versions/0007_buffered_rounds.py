"""Buffered rounds: a client may be asked again in a round, and an update may count in a later one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds the columns, as they are where rounds are synchronous."""
    with op.batch_alter_table("assignments") as batch:
        for name in ("turn", "buffer", "position", "staleness"):
            batch.add_column(sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("asked_seconds", sa.Double(), nullable=False, server_default="0"))
        batch.drop_constraint("uq_assignments_run_id_round_client_id_kind", type_="unique")
        batch.create_unique_constraint(
            "uq_assignments_run_id_round_client_id_kind_turn", ["run_id", "round", "client_id", "kind", "turn"]
        )
        batch.create_index("ix_assignments_run_id_buffer", ["run_id", "buffer"])
