"""The first schema: clients, runs, rounds, assignments, models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "clients",
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.Text(), nullable=False),
        sa.Column("enroll_request_id", sa.Text(), nullable=False),
        sa.Column("enrolled_time", sa.Double(), nullable=False),
        sa.Column("has_authenticated", sa.Boolean(), nullable=False),
        sa.Column("last_seen_time", sa.Double(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("workloads", sa.JSON(), nullable=False),
        sa.Column("software_version", sa.Text(), nullable=False),
        sa.Column("clock_skew_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("client_id", name="pk_clients"),
        sa.UniqueConstraint("name", name="uq_clients_name"),
        sa.UniqueConstraint("enroll_request_id", name="uq_clients_enroll_request_id"),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("config_toml", sa.Text(), nullable=False),
        sa.Column("created_time", sa.Double(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("num_parameters", sa.BigInteger(), nullable=False),
        sa.Column("model_bytes", sa.BigInteger(), nullable=False),
        sa.Column("finished_time", sa.Double(), nullable=True),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("model_version", sa.BigInteger(), nullable=False),
        sa.Column("best_version", sa.BigInteger(), nullable=False),
        sa.Column("best_metric", sa.Double(), nullable=True),
        sa.Column("num_without_gain", sa.BigInteger(), nullable=False),
        sa.Column("num_failed_rounds", sa.BigInteger(), nullable=False),
        sa.Column("elapsed_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.UniqueConstraint("name", name="uq_runs_name"),
        sa.UniqueConstraint("request_id", name="uq_runs_request_id"),
    )
    op.create_index("ix_runs_state", "runs", ["state"])
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("base_version", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.Double(), nullable=False),
        sa.Column("goal", sa.BigInteger(), nullable=False),
        sa.Column("quorum", sa.BigInteger(), nullable=False),
        sa.Column("model_version", sa.BigInteger(), nullable=True),
        sa.Column("grid", sa.JSON(), nullable=False),
        sa.Column("phase_seconds", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_rounds"),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_rounds_run_id", deferrable=True, initially="DEFERRED"
        ),
    )
    op.create_table(
        "assignments",
        sa.Column("assignment_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("model_version", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.Double(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("traceback", sa.Text(), nullable=False),
        sa.Column("received_time", sa.Double(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("num_examples", sa.BigInteger(), nullable=False),
        sa.Column("weight", sa.BigInteger(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("is_partial", sa.Boolean(), nullable=False),
        sa.Column("training_seconds", sa.Double(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("downlink_raw_bytes", sa.BigInteger(), nullable=False),
        sa.Column("downlink_payload_bytes", sa.BigInteger(), nullable=False),
        sa.Column("downlink_wire_bytes", sa.BigInteger(), nullable=False),
        sa.Column("uplink_raw_bytes", sa.BigInteger(), nullable=False),
        sa.Column("uplink_payload_bytes", sa.BigInteger(), nullable=False),
        sa.Column("uplink_wire_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("assignment_id", name="pk_assignments"),
        sa.UniqueConstraint("run_id", "round", "client_id", "kind", name="uq_assignments_run_id_round_client_id_kind"),
        sa.ForeignKeyConstraint(
            ["run_id", "round"],
            ["rounds.run_id", "rounds.round"],
            name="fk_assignments_run_id_round",
            deferrable=True,
            initially="DEFERRED",
        ),
        sa.ForeignKeyConstraint(
            ["client_id"], ["clients.client_id"], name="fk_assignments_client_id", deferrable=True, initially="DEFERRED"
        ),
    )
    op.create_index("ix_assignments_state_client_id", "assignments", ["state", "client_id"])
    op.create_table(
        "models",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("parent_version", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("payload_digest", sa.Text(), nullable=False),
        sa.Column("payload_bytes", sa.BigInteger(), nullable=False),
        sa.Column("file_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.Double(), nullable=False),
        sa.Column("num_updates", sa.BigInteger(), nullable=False),
        sa.Column("num_examples", sa.BigInteger(), nullable=False),
        sa.Column("is_available", sa.Boolean(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "version", name="pk_models"),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_models_run_id", deferrable=True, initially="DEFERRED"
        ),
    )
    op.create_index("ix_models_payload_digest", "models", ["payload_digest"])
