"""Plateau: what that schedule of the clients' learning rate has seen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the columns, as they are before the first measurement."""
    op.add_column("runs", sa.Column("plateau_factor", sa.Double(), nullable=False, server_default="1"))
    op.add_column("runs", sa.Column("plateau_best", sa.Double(), nullable=True))
    op.add_column("runs", sa.Column("plateau_num_without_gain", sa.BigInteger(), nullable=False, server_default="0"))
