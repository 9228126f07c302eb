"""Loss scale: what a round reckons with where weights rise with losses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Adds the column, as it is where weights do not."""
    op.add_column("rounds", sa.Column("loss_scale", sa.Double(), nullable=False, server_default="0"))
