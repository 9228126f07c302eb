"""Compression: what encodings cost, and the payloads that lead to each version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the columns and the table."""
    # Rows from before need a value for a column that is never null.
    for table in ("assignments", "models"):
        op.add_column(table, sa.Column("error", sa.Double(), nullable=True))
        op.add_column(table, sa.Column("gain", sa.Double(), nullable=True))
        op.add_column(table, sa.Column("codecs", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("assignments", sa.Column("has_diverged", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.drop_index("ix_models_payload_digest", "models")
    op.create_table(
        "broadcasts",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("base_version", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.Double(), nullable=False),
        sa.Column("is_available", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "version", "base_version", name="pk_broadcasts"),
        sa.ForeignKeyConstraint(
            ["run_id", "version"],
            ["models.run_id", "models.version"],
            name="fk_broadcasts_run_id_version",
            deferrable=True,
            initially="DEFERRED",
        ),
    )
