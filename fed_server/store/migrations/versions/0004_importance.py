"""Importance: what updates count in rounds whose cohort was drawn with unequal chances."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the columns, as they are for a cohort that was drawn otherwise."""
    op.add_column("rounds", sa.Column("weights", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("rounds", sa.Column("weight_unit", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("rounds", sa.Column("chances", sa.JSON(), nullable=False, server_default="{}"))
