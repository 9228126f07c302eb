"""Learning rate: what each site was told."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds the column; of assignments from before it is not known."""
    op.add_column("assignments", sa.Column("learning_rate", sa.Double(), nullable=False, server_default="0"))
