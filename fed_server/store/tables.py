"""The tables, made from the records of `store.base`: a field is a column of its name, an optional field a nullable one.

A field added to a record is a column added here; the migration that adds it to existing databases is written by hand, and a test
prints it where it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from enum import StrEnum
from math import isfinite
from types import NoneType
from typing import Any, Final, get_args, get_origin, get_type_hints

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    Enum,
    ForeignKeyConstraint,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

from fed_server.store.base import (
    AssignmentRecord,
    BroadcastRecord,
    ClientRecord,
    LedgerRecord,
    ModelRecord,
    Record,
    RosterRecord,
    RoundRecord,
    RunRecord,
)

# Names that every database agrees on, so that a later migration can name what it drops.
metadata: Final = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

_STATE_LENGTH = 32


class FloatMap(TypeDecorator[dict[str, float]]):
    """Name -> number as JSON. JSON has no NaN or infinity, and a diverged loss is one: those travel as text."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: dict[str, float] | None, dialect: Dialect) -> Any:
        """As JSON allows it."""
        return value and {name: number if isfinite(number) else str(number) for name, number in value.items()}

    def process_result_value(self, value: Any, dialect: Dialect) -> dict[str, float] | None:
        """As it was."""
        return value if value is None else {name: float(number) for name, number in value.items()}


_COLUMN_TYPES: Final[dict[object, TypeEngine[Any]]] = {
    str: Text(),
    int: BigInteger(),
    float: Double(),
    bool: Boolean(),
    dict[str, str]: JSON(),
    dict[str, int]: JSON(),
    dict[str, float]: FloatMap(),
}


def _column(name: str, annotation: Any) -> Column[Any]:
    is_optional = NoneType in get_args(annotation)
    if is_optional:
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) is None and issubclass(annotation, StrEnum):
        # Text with the value, not the member's name, and no database type of its own: new states need no migration.
        kind: TypeEngine[Any] = Enum(
            annotation,
            native_enum=False,
            length=_STATE_LENGTH,
            values_callable=lambda states: [state.value for state in states],
        )
    else:
        kind = _COLUMN_TYPES[annotation]
    return Column(name, kind, nullable=is_optional)


def _table(
    name: str,
    record: type[Record],
    key: Sequence[str],
    *,
    unique: Sequence[Sequence[str]] = (),
    indexes: Sequence[Sequence[str]] = (),
    parents: Sequence[tuple[Table, Sequence[str]]] = (),
) -> Table:
    hints = get_type_hints(record)
    return Table(
        name,
        metadata,
        *(_column(field.name, hints[field.name]) for field in fields(record)),
        PrimaryKeyConstraint(*key),
        *(UniqueConstraint(*columns) for columns in unique),
        *(Index(None, *columns) for columns in indexes),
        # Checked at the commit: a transaction may write a child before its parent.
        *(
            ForeignKeyConstraint(
                columns, [parent.c[column] for column in columns], deferrable=True, initially="DEFERRED"
            )
            for parent, columns in parents
        ),
    )


clients: Final = _table("clients", ClientRecord, ["client_id"], unique=[["name"], ["enroll_request_id"]])
runs: Final = _table("runs", RunRecord, ["run_id"], unique=[["name"], ["request_id"]], indexes=[["state"]])
rounds: Final = _table("rounds", RoundRecord, ["run_id", "round"], parents=[(runs, ["run_id"])])
assignments: Final = _table(
    "assignments",
    AssignmentRecord,
    ["assignment_id"],
    unique=[["run_id", "round", "client_id", "kind", "turn"]],
    indexes=[["state", "client_id"], ["run_id", "buffer"]],
    parents=[(rounds, ["run_id", "round"]), (clients, ["client_id"])],
)
models: Final = _table("models", ModelRecord, ["run_id", "version"], parents=[(runs, ["run_id"])])
broadcasts: Final = _table(
    "broadcasts",
    BroadcastRecord,
    ["run_id", "version", "base_version"],
    parents=[(models, ["run_id", "version"])],
)
rosters: Final = _table("rosters", RosterRecord, ["run_id"], parents=[(runs, ["run_id"])])
ledger: Final = _table(
    "ledger",
    LedgerRecord,
    ["run_id", "round"],
    indexes=[["population"]],
    parents=[(rounds, ["run_id", "round"])],
)

TABLES: Final[dict[type[Record], Table]] = {
    ClientRecord: clients,
    RunRecord: runs,
    RoundRecord: rounds,
    AssignmentRecord: assignments,
    ModelRecord: models,
    BroadcastRecord: broadcasts,
    RosterRecord: rosters,
    LedgerRecord: ledger,
}
