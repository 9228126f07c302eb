"""Differential privacy: who may take part, and what each round costs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds the tables, and the rounds' clipping norms as they are where nothing is clipped."""
    with op.batch_alter_table("rounds") as batch:
        for name in ("clipping_norm", "next_clipping_norm"):
            batch.add_column(sa.Column(name, sa.Double(), nullable=False, server_default="0"))
    op.create_table(
        "rosters",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("population", sa.Text(), nullable=False),
        sa.Column("created_time", sa.Double(), nullable=False),
        sa.Column("units", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_rosters"),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_rosters_run_id_runs", deferrable=True, initially="DEFERRED"
        ),
    )
    numbers = ("delta", "failure", "epsilon", "epsilon_rdp", "epsilon_of_cohort", "population_epsilon")
    op.create_table(
        "ledger",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("population", sa.Text(), nullable=False),
        sa.Column("created_time", sa.Double(), nullable=False),
        sa.Column("mechanism", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=False) for name in numbers),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_ledger"),
        sa.ForeignKeyConstraint(
            ["run_id", "round"],
            ["rounds.run_id", "rounds.round"],
            name="fk_ledger_run_id_round_rounds",
            deferrable=True,
            initially="DEFERRED",
        ),
    )
    op.create_index("ix_ledger_population", "ledger", ["population"])
