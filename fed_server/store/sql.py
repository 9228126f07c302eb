"""The store in a SQL database, through SQLAlchemy Core: SQLite for one coordinator on one machine.

Statements are built once, at import, and hold nothing that only SQLite knows; what SQLite needs (pragmas, BEGIN IMMEDIATE) is said
in events of its connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Select, Table, bindparam, event, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from fed_core.errors import ConfigError, ConflictError, DiskFullError, UnavailableError
from fed_server.store import migrations
from fed_server.store.base import (
    AssignmentKind,
    AssignmentRecord,
    AssignmentState,
    BroadcastRecord,
    ClientRecord,
    LedgerRecord,
    ModelRecord,
    Participation,
    Record,
    RosterRecord,
    RoundRecord,
    RunRecord,
    RunState,
)
from fed_server.store.tables import TABLES, assignments, broadcasts, clients, ledger, models, rosters, rounds, runs

R = TypeVar("R", bound=Record)

_BUSY_SECONDS = 5
# FULL: a commit is on the disk when it returns. WAL: it costs one flush.
_SQLITE_PRAGMAS: Final = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")


class SqlStore:
    """A `Store` in the database at a SQLAlchemy URL, brought to the present schema when opened; safe to hand to another thread,
    not to use from two at once.

    Raises ConfigError for a database that a newer fedstream wrote or that is none, UnavailableError while another program
    holds it.
    """

    def __init__(self, url: str) -> None:
        is_sqlite = sa.make_url(url).get_backend_name() == "sqlite"
        self._url = url
        self._engine = sa.create_engine(
            url,
            poolclass=sa.StaticPool,
            # Errors are logged, and values hold the hashes of secrets.
            hide_parameters=True,
            connect_args={"check_same_thread": False, "timeout": _BUSY_SECONDS} if is_sqlite else {},
        )
        if is_sqlite:
            event.listen(self._engine, "connect", _set_up_sqlite)
            event.listen(self._engine, "begin", _begin_immediate)
        try:
            with self._named_errors():
                self._connection = self._engine.connect()
                with self._connection.begin():
                    migrations.upgrade(self._connection)
        except BaseException:
            self._engine.dispose()
            raise

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """See `Store.transaction`. An error of `put` ends the transaction: let it leave the block."""
        with self._named_errors():
            try:
                with self._connection.begin():
                    yield SqlTransaction(self._connection)
            except DBAPIError:
                # SQLAlchemy takes a commit that failed for the end; SQLite keeps the transaction open.
                self._connection.connection.rollback()
                raise

    def close(self) -> None:
        """See `Store.close`."""
        self._connection.close()
        self._engine.dispose()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Names what an operator can cure; the rest is a fault of ours and goes up as it is."""
        try:
            yield
        except DBAPIError as error:
            match _condition(error.orig):
                case "full":
                    raise DiskFullError(f"no space left for the database {self._url}: free some") from error
                case "locked":
                    raise UnavailableError(
                        f"another program has kept the database {self._url} locked for {_BUSY_SECONDS} s: end it"
                    ) from error
                case "not a database":
                    raise ConfigError(
                        f"{self._url} is not a database or is damaged: restore it from a backup, or start with another "
                        "data directory"
                    ) from error
                case "cannot open":
                    raise ConfigError(
                        f"the database {self._url} cannot be opened: see that its directory exists and may be written"
                    ) from error
            raise


class SqlTransaction:
    """A `Transaction` on an open connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def client(self, client_id: str) -> ClientRecord | None:
        """The client with this id."""
        return self._one(ClientRecord, _CLIENT, client_id=client_id)

    def client_by_name(self, name: str) -> ClientRecord | None:
        """The client with this name."""
        return self._one(ClientRecord, _CLIENT_BY_NAME, name=name)

    def client_by_enroll_request(self, request_id: str) -> ClientRecord | None:
        """The client that this request enrolled."""
        return self._one(ClientRecord, _CLIENT_BY_REQUEST, enroll_request_id=request_id)

    def clients(self) -> list[ClientRecord]:
        """See `Transaction.clients`."""
        return self._all(ClientRecord, _CLIENTS)

    def run(self, run_id: str) -> RunRecord | None:
        """The run with this id."""
        return self._one(RunRecord, _RUN, run_id=run_id)

    def run_by_name(self, name: str) -> RunRecord | None:
        """The run with this name."""
        return self._one(RunRecord, _RUN_BY_NAME, name=name)

    def run_by_request(self, request_id: str) -> RunRecord | None:
        """The run that this request created."""
        return self._one(RunRecord, _RUN_BY_REQUEST, request_id=request_id)

    def runs(self, state: RunState | None = None) -> list[RunRecord]:
        """See `Transaction.runs`."""
        if state is None:
            return self._all(RunRecord, _RUNS)
        return self._all(RunRecord, _RUNS_IN_STATE, state=state)

    def round(self, run_id: str, round: int) -> RoundRecord | None:
        """The round of a run."""
        return self._one(RoundRecord, _ROUND, run_id=run_id, round=round)

    def rounds(self, run_id: str, newest: int | None = None) -> list[RoundRecord]:
        """See `Transaction.rounds`."""
        if newest is None:
            return self._all(RoundRecord, _ROUNDS, run_id=run_id)
        return self._all(RoundRecord, _NEWEST_ROUNDS, run_id=run_id, newest=newest)[::-1]

    def assignment(self, assignment_id: str) -> AssignmentRecord | None:
        """The assignment with this id."""
        return self._one(AssignmentRecord, _ASSIGNMENT, assignment_id=assignment_id)

    def assignments(self, run_id: str, round: int | None = None) -> list[AssignmentRecord]:
        """See `Transaction.assignments`."""
        if round is None:
            return self._all(AssignmentRecord, _ASSIGNMENTS_OF_RUN, run_id=run_id)
        return _in_order(self._all(AssignmentRecord, _ASSIGNMENTS_OF_ROUND, run_id=run_id, round=round))

    def participations(self, run_id: str) -> list[Participation]:
        """See `Transaction.participations`."""
        found = self._connection.execute(
            _PARTICIPATIONS, {"run_id": run_id, "kind": AssignmentKind.TRAIN, "received": AssignmentState.RECEIVED}
        )
        return [Participation(*row) for row in found]

    def unsettled_assignments(self, run_id: str, round: int) -> list[AssignmentRecord]:
        """See `Transaction.unsettled_assignments`."""
        found = self._all(AssignmentRecord, _ASSIGNMENTS_FROM_ROUND, run_id=run_id, round=round)
        still_open = [a for a in self.open_assignments() if a.run_id == run_id]
        return _in_order({a.assignment_id: a for a in [*found, *still_open]}.values())

    def open_assignments(self, client_id: str | None = None) -> list[AssignmentRecord]:
        """See `Transaction.open_assignments`."""
        if client_id is None:
            return self._all(AssignmentRecord, _OPEN_ASSIGNMENTS, state=AssignmentState.OPEN)
        return self._all(AssignmentRecord, _OPEN_ASSIGNMENTS_OF_CLIENT, state=AssignmentState.OPEN, client_id=client_id)

    def model(self, run_id: str, version: int) -> ModelRecord | None:
        """The version of a run's model."""
        return self._one(ModelRecord, _MODEL, run_id=run_id, version=version)

    def models(self, run_id: str) -> list[ModelRecord]:
        """The versions of a run's model, the first one first."""
        return self._all(ModelRecord, _MODELS, run_id=run_id)

    def broadcasts(self, run_id: str) -> list[BroadcastRecord]:
        """See `Transaction.broadcasts`."""
        return self._all(BroadcastRecord, _BROADCASTS, run_id=run_id)

    def roster(self, run_id: str) -> RosterRecord | None:
        """Who may take part in a private run; None before it was frozen."""
        return self._one(RosterRecord, _ROSTER, run_id=run_id)

    def charges(self, run_id: str) -> list[LedgerRecord]:
        """See `Transaction.charges`."""
        return self._all(LedgerRecord, _CHARGES, run_id=run_id)

    def charges_of_population(self, population: str) -> list[LedgerRecord]:
        """See `Transaction.charges_of_population`."""
        return self._all(LedgerRecord, _CHARGES_OF_POPULATION, population=population)

    def put(self, record: Record) -> None:
        """See `Transaction.put`. An upsert in the SQL of every database: nearly all puts replace a row."""
        put = _PUTS[type(record)]
        values = vars(record)
        key = {f"key_{name}": values[name] for name in put.key}
        try:
            if self._connection.execute(put.update, {**values, **key}).rowcount == 0:
                self._connection.execute(put.insert, values)
        except IntegrityError as error:
            for columns in put.unique:
                if _is_broken(put.table, columns, str(error.orig)):
                    taken = " and ".join(f"{name} {values[name]!s:.100}" for name in columns)
                    raise ConflictError(f"{taken} is taken by another of the {put.table.name}") from error
            raise

    def _one(self, record: type[R], statement: Select[Any], **values: object) -> R | None:
        row = self._connection.execute(statement, values).first()
        return None if row is None else record(*row)

    def _all(self, record: type[R], statement: sa.Select[Any] | sa.CompoundSelect[Any], **values: object) -> list[R]:
        return [record(*row) for row in self._connection.execute(statement, values)]


def _in_order(found: Iterable[AssignmentRecord]) -> list[AssignmentRecord]:
    return sorted(found, key=lambda a: (a.round, a.kind, a.client_id, a.turn))


def _where(table: Table, *names: str, order: tuple[str, ...] = ()) -> Select[Any]:
    """Rows whose columns have the values of parameters with their names; the columns come in the order of the record's fields."""
    return (
        select(table)
        .where(*(table.c[name] == bindparam(name) for name in names))
        .order_by(*(table.c[o] for o in order))
    )


_CLIENT = _where(clients, "client_id")
_CLIENT_BY_NAME = _where(clients, "name")
_CLIENT_BY_REQUEST = _where(clients, "enroll_request_id")
_CLIENTS = _where(clients, order=("name",))
_RUN = _where(runs, "run_id")
_RUN_BY_NAME = _where(runs, "name")
_RUN_BY_REQUEST = _where(runs, "request_id")
_RUNS = _where(runs, order=("created_time", "run_id"))
_RUNS_IN_STATE = _where(runs, "state", order=("created_time", "run_id"))
_ROUND = _where(rounds, "run_id", "round")
_ROUNDS = _where(rounds, "run_id", order=("round",))
_NEWEST_ROUNDS = (
    select(rounds)
    .where(rounds.c.run_id == bindparam("run_id"))
    .order_by(rounds.c.round.desc())
    .limit(bindparam("newest"))
)
_ASSIGNMENT = _where(assignments, "assignment_id")
_ASSIGNMENTS_OF_RUN = _where(assignments, "run_id", order=("round", "kind", "client_id", "turn"))
# Two searches by an index each; with an "or", or an order, SQLite goes through the whole run.
_OF_RUN = _where(assignments, "run_id")
_OF_OWN_ROUND = _OF_RUN.where(assignments.c.buffer == 0)
_ASSIGNMENTS_OF_ROUND = sa.union_all(
    _OF_RUN.where(assignments.c.buffer == bindparam("round")),
    _OF_OWN_ROUND.where(assignments.c.round == bindparam("round")),
)
_ASSIGNMENTS_FROM_ROUND = sa.union_all(
    _OF_RUN.where(assignments.c.buffer >= bindparam("round")),
    _OF_OWN_ROUND.where(assignments.c.round >= bindparam("round")),
)
# That of an update which came early is yet to open.
_OUTCOME_ROUND = sa.case((assignments.c.buffer > 0, assignments.c.buffer), else_=assignments.c.round)
_PARTICIPATIONS = (
    select(
        assignments.c.client_id,
        sa.func.count(),
        sa.func.count(
            sa.case(
                (
                    sa.and_(
                        assignments.c.state == bindparam("received", type_=assignments.c.state.type),
                        rounds.c.model_version.is_not(None),
                    ),
                    1,
                )
            )
        ),
        sa.func.max(assignments.c.round),
    )
    .outerjoin(rounds, sa.and_(rounds.c.run_id == assignments.c.run_id, rounds.c.round == _OUTCOME_ROUND))
    .where(assignments.c.run_id == bindparam("run_id"), assignments.c.kind == bindparam("kind"))
    .group_by(assignments.c.client_id)
    .order_by(assignments.c.client_id)
)
_OPEN_ASSIGNMENTS = _where(assignments, "state", order=("created_time", "assignment_id"))
_OPEN_ASSIGNMENTS_OF_CLIENT = _where(assignments, "state", "client_id", order=("created_time", "assignment_id"))
_MODEL = _where(models, "run_id", "version")
_MODELS = _where(models, "run_id", order=("version",))
_BROADCASTS = _where(broadcasts, "run_id", order=("version", "base_version"))
_ROSTER = _where(rosters, "run_id")
_CHARGES = _where(ledger, "run_id", order=("round",))
_CHARGES_OF_POPULATION = _where(ledger, "population", order=("created_time", "run_id", "round"))


@dataclass(frozen=True)
class _Put:
    """The two statements that write a record, and the columns that tell rows apart."""

    table: Table
    key: tuple[str, ...]
    unique: tuple[tuple[str, ...], ...]
    update: sa.Update
    insert: sa.Insert


def _put(table: Table) -> _Put:
    # A parameter may not have the name of a column in the WHERE of an UPDATE.
    update = (
        table.update()
        .where(*(column == bindparam(f"key_{column.name}") for column in table.primary_key))
        .values({column.name: bindparam(column.name) for column in table.c if not column.primary_key})
    )
    return _Put(
        table=table,
        key=tuple(column.name for column in table.primary_key),
        unique=tuple(
            tuple(column.name for column in constraint.columns)
            for constraint in table.constraints
            if isinstance(constraint, sa.UniqueConstraint)
        ),
        update=update,
        insert=table.insert(),
    )


_PUTS: Final[Mapping[type[Record], _Put]] = {record: _put(table) for record, table in TABLES.items()}


def _is_broken(table: Table, columns: tuple[str, ...], message: str) -> bool:
    """Whether a database's message says that these values are not unique: SQLite names the columns, PostgreSQL the constraint."""
    by_columns = ", ".join(f"{table.name}.{name}" for name in columns)
    by_constraint = f'"uq_{table.name}_{"_".join(columns)}"'
    return message.endswith(f": {by_columns}") or by_constraint in message


def _condition(error: BaseException | None) -> str:
    """What is wrong with the database, in a word or two; empty where it is nothing that we know."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0)
        # The file that the connections share could not grow: the one kind of "I/O error" that is a full disk.
        if code == sqlite3.SQLITE_IOERR_SHMSIZE:
            return "full"
        return {
            sqlite3.SQLITE_FULL: "full",
            sqlite3.SQLITE_BUSY: "locked",
            sqlite3.SQLITE_NOTADB: "not a database",
            sqlite3.SQLITE_CORRUPT: "not a database",
            sqlite3.SQLITE_CANTOPEN: "cannot open",
            sqlite3.SQLITE_READONLY: "cannot open",
        }.get(code & 0xFF, "")
    return {"53100": "full", "55P03": "locked"}.get(getattr(error, "sqlstate", ""), "")


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver would begin transactions by itself, deferred and late.
    connection.isolation_level = None
    for pragma in _SQLITE_PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails as "locked", whatever the busy timeout, once another wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
