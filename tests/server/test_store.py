"""The contract of a store, for every implementation, and what only the SQL store promises."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError

from fed_core.errors import ConfigError, ConflictError, DiskFullError, UnavailableError
from fed_server.store import migrations, sql
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
    RoundState,
    RunRecord,
    RunState,
    Store,
)
from fed_server.store.sql import SqlStore
from fed_server.store.tables import TABLES, metadata

OpenStore = Callable[[], Store]

# A second implementation joins the contract by being listed here: name -> how to open the store that lies in a directory.
IMPLEMENTATIONS: dict[str, Callable[[Path], Store]] = {
    "sqlite": lambda directory: SqlStore(f"sqlite:///{directory / 'state.sqlite'}"),
}

# Each field differs from its default, so that one that is not stored is noticed.
CLIENT = ClientRecord(
    client_id="c1",
    name="klinik-süd",
    secret_hash="5f",
    enroll_request_id="e1",
    enrolled_time=1.5,
    has_authenticated=True,
    last_seen_time=2.25,
    labels={"region": "north", "quote": "a'b\"c"},
    workloads={"digits": "1"},
    software_version="0.1.0",
    clock_skew_seconds=-3.5,
)
RUN = RunRecord(
    run_id="r1",
    name="digits",
    request_id="q1",
    state=RunState.ACTIVE,
    reason="waiting for 3 clients",
    config_toml='name = "digits"\n',
    created_time=10.0,
    fingerprint="ab",
    num_parameters=2**40,
    model_bytes=2**42,
    finished_time=11.0,
    round=3,
    model_version=2,
    best_version=1,
    best_metric=0.5,
    num_without_gain=4,
    plateau_factor=0.25,
    plateau_best=0.75,
    plateau_num_without_gain=3,
    num_failed_rounds=1,
    elapsed_seconds=0.1,
)
ROUND = RoundRecord(
    run_id="r1",
    round=1,
    state=RoundState.TRAINING,
    reason="selected",
    base_version=0,
    created_time=12.0,
    goal=3,
    quorum=2,
    model_version=1,
    grid={"layer.weight": -48},
    weights={"site": 2**40},
    weight_unit=2**17,
    chances={"site": 0.1},
    loss_scale=0.1,
    clipping_norm=0.3,
    next_clipping_norm=0.7,
    phase_seconds={"training": 0.25},
    metrics={"loss": 1e-300, "perplexity": float("inf")},
)
ASSIGNMENT = AssignmentRecord(
    assignment_id="a1",
    run_id="r1",
    round=1,
    client_id="c1",
    kind=AssignmentKind.TRAIN,
    state=AssignmentState.OPEN,
    model_version=0,
    created_time=13.0,
    seed=2**62,
    learning_rate=0.1,
    reason="lost its power",
    traceback="Traceback ...",
    received_time=14.0,
    digest="cd",
    num_examples=100,
    weight=7,
    num_steps=9,
    is_partial=True,
    training_seconds=1.25,
    metrics={"loss": 3.0},
    downlink_raw_bytes=1,
    downlink_payload_bytes=2,
    downlink_wire_bytes=3,
    uplink_raw_bytes=4,
    uplink_payload_bytes=5,
    uplink_wire_bytes=6,
    error=0.05,
    gain=0.96,
    codecs={"lrq": 2, "raw": 1},
    has_diverged=True,
    turn=2,
    asked_seconds=2.5,
    buffer=1,
    position=3,
    staleness=4,
)
MODEL = ModelRecord(
    run_id="r1",
    version=1,
    round=1,
    parent_version=0,
    digest="ee",
    payload_digest="ff",
    payload_bytes=10,
    file_bytes=11,
    created_time=15.0,
    num_updates=3,
    num_examples=300,
    is_available=False,
    metrics={"accuracy": 0.75},
    error=1.25,
    gain=0.5,
    codecs={"fsq": 3},
)
BROADCAST = BroadcastRecord(
    run_id="r1",
    version=1,
    base_version=-1,
    digest="dd",
    num_bytes=12,
    created_time=16.0,
    is_available=False,
)
ROSTER = RosterRecord(run_id="r1", population="clinics", created_time=17.0, units={"site": "owner"})
LEDGER = LedgerRecord(
    run_id="r1",
    round=1,
    population="clinics",
    created_time=18.0,
    mechanism='{"sigma": 1.0}',
    delta=1e-5,
    failure=1e-12,
    epsilon=0.5,
    epsilon_rdp=0.6,
    epsilon_of_cohort=float("inf"),
    population_epsilon=0.75,
)
# Parents first.
RECORDS: list[Record] = [CLIENT, RUN, ROUND, ASSIGNMENT, MODEL, BROADCAST, ROSTER, LEDGER]


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the test's one store; again, to see what is durable."""
    opened: list[Store] = []

    def open_() -> Store:
        opened.append(request.param(tmp_path))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    return open_store()


def put(store: Store, *records: Record) -> None:
    with store.transaction() as tx:
        for record in records:
            tx.put(record)


def assignment(name: str, **changes: object) -> AssignmentRecord:
    return replace(ASSIGNMENT, assignment_id=name, **changes)  # type: ignore[arg-type]


# The contract


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_the_samples_leave_no_field_at_its_default(record: Record) -> None:
    for field in fields(record):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        assert getattr(record, field.name) != default


def test_records_come_back_as_they_were_put(store: Store) -> None:
    put(store, *RECORDS)
    with store.transaction() as tx:
        assert tx.client("c1") == tx.client_by_name("klinik-süd") == tx.client_by_enroll_request("e1") == CLIENT
        assert tx.run("r1") == tx.run_by_name("digits") == tx.run_by_request("q1") == RUN
        assert tx.round("r1", 1) == ROUND
        assert tx.assignment("a1") == ASSIGNMENT
        assert tx.model("r1", 1) == MODEL
        assert tx.clients() == [CLIENT]
        assert tx.runs() == [RUN]
        assert tx.rounds("r1") == [ROUND]
        assert tx.assignments("r1") == tx.assignments("r1", 1) == tx.open_assignments() == [ASSIGNMENT]
        assert tx.models("r1") == [MODEL]
        assert tx.broadcasts("r1") == [BROADCAST]


def test_states_come_back_as_members_and_absent_values_as_none(store: Store) -> None:
    put(store, replace(RUN, finished_time=None, best_metric=None))
    with store.transaction() as tx:
        run = tx.run("r1")
    assert run is not None
    assert run.state is RunState.ACTIVE
    assert run.finished_time is None
    assert run.best_metric is None


def test_a_metric_that_is_nan_comes_back_as_nan(store: Store) -> None:
    put(store, RUN, replace(ROUND, metrics={"loss": float("nan")}))
    with store.transaction() as tx:
        found = tx.round("r1", 1)
    assert found is not None
    assert found.metrics["loss"] != found.metrics["loss"]


def test_readers_that_find_nothing_say_so(store: Store) -> None:
    with store.transaction() as tx:
        assert tx.client("c1") is None
        assert tx.client_by_name("c1") is None
        assert tx.client_by_enroll_request("e1") is None
        assert tx.run("r1") is None
        assert tx.run_by_name("digits") is None
        assert tx.run_by_request("q1") is None
        assert tx.round("r1", 1) is None
        assert tx.assignment("a1") is None
        assert tx.model("r1", 1) is None
        assert tx.clients() == tx.runs() == tx.rounds("r1") == tx.models("r1") == tx.broadcasts("r1") == []
        assert tx.assignments("r1") == []
        assert tx.assignments("r1", 1) == tx.open_assignments() == tx.open_assignments("c1") == []


def test_put_replaces_the_record_with_its_key(store: Store) -> None:
    put(store, *RECORDS)
    changed = [
        replace(CLIENT, name="new", labels={}),
        replace(RUN, state=RunState.FINISHED, round=4),
        replace(ROUND, state=RoundState.COMMITTED, grid={}),
        replace(ASSIGNMENT, state=AssignmentState.RECEIVED),
        replace(MODEL, is_available=True),
        replace(BROADCAST, is_available=True),
    ]
    put(store, *changed)
    with store.transaction() as tx:
        of_run = [tx.rounds("r1"), tx.assignments("r1"), tx.models("r1"), tx.broadcasts("r1")]
        assert [tx.clients(), tx.runs(), *of_run] == [[record] for record in changed]


def test_participations_count_who_was_asked_and_whose_updates_are_in_a_version(store: Store) -> None:
    other = replace(CLIENT, client_id="c0", name="other", enroll_request_id="e0")
    rounds = [replace(ROUND, round=1), replace(ROUND, round=2, model_version=None), replace(ROUND, round=3)]
    work = [
        ("c1", 1, AssignmentKind.TRAIN, AssignmentState.RECEIVED),
        ("c1", 1, AssignmentKind.EVALUATE, AssignmentState.RECEIVED),
        ("c1", 2, AssignmentKind.TRAIN, AssignmentState.RECEIVED),  # of a round that came to nothing
        ("c0", 2, AssignmentKind.TRAIN, AssignmentState.FAILED),
        ("c1", 3, AssignmentKind.TRAIN, AssignmentState.DROPPED),
    ]
    assigned = [
        replace(ASSIGNMENT, assignment_id=f"a{n}", client_id=client, round=round, kind=kind, state=state, buffer=0)
        for n, (client, round, kind, state) in enumerate(work)
    ]
    early = replace(
        ASSIGNMENT, assignment_id="early", client_id="c0", round=3, buffer=4, state=AssignmentState.RECEIVED
    )
    with store.transaction() as tx:
        for record in (CLIENT, other, RUN, *rounds, *assigned, early):
            tx.put(record)
        assert tx.participations("r1") == [Participation("c0", 2, 0, 3), Participation("c1", 3, 1, 3)]
        tx.put(replace(ROUND, round=4))
        assert tx.participations("r1") == [Participation("c0", 2, 1, 3), Participation("c1", 3, 1, 3)]
        assert tx.participations("r2") == []


def test_a_transaction_reads_its_own_writes(store: Store) -> None:
    with store.transaction() as tx:
        tx.put(CLIENT)
        assert tx.client("c1") == CLIENT
        tx.put(replace(CLIENT, name="new"))
        assert tx.client_by_name("new") is not None
        assert tx.client_by_name(CLIENT.name) is None


def test_a_transaction_that_raises_leaves_nothing_behind(store: Store) -> None:
    put(store, CLIENT)

    def transact() -> None:
        with store.transaction() as tx:
            tx.put(replace(CLIENT, name="new"))
            tx.put(RUN)
            raise LookupError("the block's own error")

    with pytest.raises(LookupError, match="own error"):
        transact()
    with store.transaction() as tx:
        assert tx.client("c1") == CLIENT
        assert tx.run("r1") is None


def test_what_was_committed_is_there_when_the_store_is_opened_again(open_store: OpenStore) -> None:
    first = open_store()
    put(first, *RECORDS)
    first.close()
    with open_store().transaction() as tx:
        assert tx.assignment("a1") == ASSIGNMENT


def test_children_may_be_put_before_their_parents(store: Store) -> None:
    put(store, *reversed(RECORDS))
    with store.transaction() as tx:
        assert tx.assignment("a1") == ASSIGNMENT


@pytest.mark.parametrize(
    ("second", "value"),
    [
        (replace(CLIENT, client_id="c2", enroll_request_id="e2"), "name klinik-süd"),
        (replace(CLIENT, client_id="c2", name="other"), "enroll_request_id e1"),
        (replace(RUN, run_id="r2", request_id="q2"), "name digits"),
        (replace(RUN, run_id="r2", name="other"), "request_id q1"),
        (replace(ASSIGNMENT, assignment_id="a2"), "client_id c1 and kind train"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_value_that_is_taken_is_named_and_the_transaction_undone(store: Store, second: Record, value: str) -> None:
    put(store, *RECORDS)
    with pytest.raises(ConflictError, match=value):
        put(store, replace(MODEL, version=2), second)
    with store.transaction() as tx:
        assert tx.model("r1", 2) is None
        assert len(tx.clients()) == len(tx.runs()) == len(tx.assignments("r1")) == 1


def test_renaming_to_a_taken_name_is_a_conflict(store: Store) -> None:
    put(store, CLIENT, replace(CLIENT, client_id="c2", name="other", enroll_request_id="e2"))
    with pytest.raises(ConflictError, match="name other"):
        put(store, replace(CLIENT, name="other"))


def test_lists_come_in_their_order(store: Store) -> None:
    put(
        store,
        *(replace(CLIENT, client_id=f"c{n}", name=name, enroll_request_id=name) for n, name in enumerate("zab")),
        replace(RUN, run_id="late", name="late", request_id="late", created_time=30.0),
        replace(RUN, run_id="over", name="over", request_id="over", created_time=20.0, state=RunState.FAILED),
        RUN,
        *(replace(ROUND, round=number) for number in (10, 9, 1)),
        *(replace(MODEL, version=version) for version in (10, 9, 0)),
        replace(MODEL, run_id="late", version=0),
        *(replace(BROADCAST, version=version, base_version=base) for version, base in ((10, 9), (9, 0), (10, -1))),
        replace(BROADCAST, run_id="late", version=0),
    )
    with store.transaction() as tx:
        assert [client.name for client in tx.clients()] == ["a", "b", "z"]
        assert [run.run_id for run in tx.runs()] == ["r1", "over", "late"]
        assert [run.run_id for run in tx.runs(RunState.ACTIVE)] == ["r1", "late"]
        assert [record.round for record in tx.rounds("r1")] == [1, 9, 10]
        assert [record.round for record in tx.rounds("r1", newest=2)] == [9, 10]
        assert tx.rounds("r1", newest=9) == tx.rounds("r1")
        assert [model.version for model in tx.models("r1")] == [0, 9, 10]
        assert [(b.version, b.base_version) for b in tx.broadcasts("r1")] == [(9, 0), (10, -1), (10, 9)]


def test_assignments_are_found_by_round_and_open_ones_by_client(store: Store) -> None:
    late = assignment("a", created_time=99.0, buffer=0)
    done = assignment("b", kind=AssignmentKind.EVALUATE, state=AssignmentState.RECEIVED, buffer=0)
    other = assignment("c", client_id="c0", buffer=0)
    second = assignment("d", round=2, created_time=1.0, buffer=0)
    put(store, *(replace(CLIENT, client_id=c, name=c, enroll_request_id=c) for c in ("c0", "c1")), RUN)
    put(store, ROUND, replace(ROUND, round=2), second, late, done, other)
    with store.transaction() as tx:
        assert tx.assignments("r1") == [done, other, late, second]
        assert tx.assignments("r1", 1) == [done, other, late]
        assert tx.open_assignments() == [second, other, late]
        assert tx.open_assignments("c1") == [second, late]
        assert tx.open_assignments("c0") == [other]


def test_an_outcome_is_found_in_the_round_whose_buffer_it_is_in(store: Store) -> None:
    at_once, early = (assignment(name, turn=n, state=AssignmentState.RECEIVED) for n, name in enumerate("ab"))
    early = replace(early, buffer=3)  # of a round that is yet to open
    again, failed = assignment("c", turn=2, buffer=0), assignment("d", turn=3, buffer=2, state=AssignmentState.FAILED)
    next_round = assignment("e", round=2, buffer=2, state=AssignmentState.RECEIVED)
    put(store, CLIENT, RUN, ROUND, replace(ROUND, round=2), at_once, early, again, failed, next_round)
    with store.transaction() as tx:
        assert tx.assignments("r1") == [at_once, early, again, failed, next_round]
        assert [tx.assignments("r1", number) for number in (1, 2, 3)] == [
            [at_once, again],
            [failed, next_round],
            [early],
        ]
        assert tx.unsettled_assignments("r1", 1) == [at_once, early, again, failed, next_round]
        assert tx.unsettled_assignments("r1", 2) == [early, again, failed, next_round]
        assert tx.unsettled_assignments("r1", 4) == [again]
        assert [a.outcome_round for a in (at_once, early, again)] == [1, 3, 1]


def test_another_thread_may_use_the_store_after_the_one_that_opened_it(store: Store) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(put, store, *RECORDS).result()
        thread.submit(store.close).result()


# The SQL store


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of a quarter of a megabyte."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a filesystem, so no disk can be filled")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


def test_the_migrations_make_the_schema_that_the_records_need(database: Path) -> None:
    SqlStore(f"sqlite:///{database}").close()
    with sa.create_engine(f"sqlite:///{database}", poolclass=sa.NullPool).connect() as connection:
        context = MigrationContext.configure(connection, opts={"render_as_batch": True})
        missing = produce_migrations(context, metadata).upgrade_ops
        assert missing is not None
        assert compare_metadata(context, metadata) == [], (
            f"the next migration needs:\n{render_python_code(missing, render_as_batch=True)}"
        )


def test_the_head_that_is_known_without_alembic_is_the_head() -> None:
    assert ScriptDirectory(str(Path(migrations.__file__).parent)).get_current_head() == migrations.HEAD


@pytest.mark.parametrize("before", ["0001", "0002"])
def test_a_run_of_an_earlier_fedstream_is_read_with_the_defaults_of_what_is_new(database: Path, before: str) -> None:
    engine = sa.create_engine(f"sqlite:///{database}", poolclass=sa.NullPool)
    settings = Config()
    settings.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        settings.attributes["connection"] = connection
        command.upgrade(settings, before)
        known = {column["name"] for column in sa.inspect(connection).get_columns("runs")}
        row = {name: value for name, value in vars(RUN).items() if name in known} | {"state": RUN.state.value}
        names = ", ".join(row)
        connection.execute(sa.text(f"INSERT INTO runs ({names}) VALUES ({', '.join(f':{name}' for name in row)})"), row)
    store = SqlStore(f"sqlite:///{database}")
    with store.transaction() as tx:
        found = tx.run("r1")
        assert found is not None
        tx.put(found)
    store.close()
    new = {field.name: field.default for field in fields(RunRecord) if field.name not in known}
    assert found == replace(RUN, **new)


@pytest.mark.parametrize("before", ["0003", "0006"])
def test_work_that_an_earlier_fedstream_gave_out_is_as_it_was(database: Path, before: str) -> None:
    """The table is copied where a client may be asked more than once in a round."""
    engine = sa.create_engine(f"sqlite:///{database}", poolclass=sa.NullPool)
    settings = Config()
    settings.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        settings.attributes["connection"] = connection
        command.upgrade(settings, before)
        for record in (CLIENT, RUN, ROUND, ASSIGNMENT):
            table = TABLES[type(record)].name
            known = {column["name"] for column in sa.inspect(connection).get_columns(table)}
            row = {
                name: json.dumps(value) if isinstance(value, dict) else getattr(value, "value", value)
                for name, value in vars(record).items()
                if name in known
            }
            names = ", ".join(row)
            connection.execute(
                sa.text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in row)})"), row
            )
    store = SqlStore(f"sqlite:///{database}")
    new = {field.name: field.default for field in fields(AssignmentRecord) if field.name not in known}
    expected = replace(ASSIGNMENT, **new)
    with store.transaction() as tx:
        assert tx.assignments("r1") == [expected]
        tx.put(replace(expected, assignment_id="again", turn=1))
    with pytest.raises(ConflictError, match="turn 1 is taken"):
        put(store, replace(expected, assignment_id="once more", turn=1))
    with pytest.raises(IntegrityError):
        put(store, replace(expected, assignment_id="nobody", client_id="nobody"))
    store.close()


def test_an_up_to_date_database_is_opened_without_alembic(database: Path) -> None:
    url = f"sqlite:///{database}"
    SqlStore(url).close()
    code = (
        f"import sys; from fed_server.store.sql import SqlStore; SqlStore({url!r}); sys.exit('alembic' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_a_database_of_a_newer_fedstream_is_refused_with_the_cure(database: Path) -> None:
    SqlStore(f"sqlite:///{database}").close()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    known = rf"newer fedstream \(schema 9999, .* up to {migrations.HEAD}\): install that version"
    with pytest.raises(ConfigError, match=known):
        SqlStore(f"sqlite:///{database}")


def test_a_file_that_is_no_database_is_refused(database: Path) -> None:
    database.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(ConfigError, match="restore it from a backup"):
        SqlStore(f"sqlite:///{database}")


def test_a_place_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        SqlStore(f"sqlite:///{tmp_path / 'absent' / 'state.sqlite'}")


def test_a_database_that_another_program_holds_is_unavailable(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_BUSY_SECONDS", 0)
    store = SqlStore(f"sqlite:///{database}")
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnavailableError, match="another program"):
        put(store, CLIENT)
    other.close()
    put(store, CLIENT)
    store.close()


def test_a_child_without_its_parent_is_our_own_fault(database: Path) -> None:
    store = SqlStore(f"sqlite:///{database}")
    with pytest.raises(IntegrityError):
        put(store, ROUND)
    with store.transaction() as tx:
        assert tx.rounds("r1") == []
    put(store, RUN, ROUND)
    store.close()


def test_the_work_of_a_round_is_found_without_going_through_the_run(database: Path) -> None:
    store = SqlStore(f"sqlite:///{database}")
    with store._connection.begin():
        for statement in (sql._ASSIGNMENTS_OF_ROUND, sql._ASSIGNMENTS_FROM_ROUND):
            text = statement.params(run_id="r1", round=9).compile(store._engine, compile_kwargs={"literal_binds": True})
            plan = [row[3] for row in store._connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
            searches = [step for step in plan if "SEARCH" in step]
            assert len(searches) == 2, plan
            assert all(re.search(r"\(run_id=\? AND (round|buffer)[=>]\?", step) for step in searches), plan
    store.close()


def test_commits_are_flushed(database: Path) -> None:
    store = SqlStore(f"sqlite:///{database}")
    with store._connection.begin():
        settings = [
            store._connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert settings == ["wal", 2, 1, 5000]
    store.close()


def test_errors_do_not_show_secrets(database: Path) -> None:
    store = SqlStore(f"sqlite:///{database}")
    put(store, CLIENT)
    with pytest.raises(ConflictError) as caught:
        put(store, replace(CLIENT, client_id="c2", secret_hash="topsecret"))
    assert "topsecret" not in str(caught.value.__cause__)
    store.close()


def test_a_killed_process_leaves_what_it_committed_and_nothing_of_what_it_did_not(database: Path) -> None:
    code = f"""
import os, signal
from fed_server.store.base import ClientRecord
from fed_server.store.sql import SqlStore
store = SqlStore("sqlite:///{database}")
with store.transaction() as tx:
    tx.put(ClientRecord("c1", "committed", "", "e1", 0.0))
with store.transaction() as tx:
    tx.put(ClientRecord("c2", "lost", "", "e2", 0.0))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    store = SqlStore(f"sqlite:///{database}")
    with store.transaction() as tx:
        assert [client.name for client in tx.clients()] == ["committed"]
    store.close()


def test_a_full_disk_undoes_the_transaction_and_the_store_goes_on_once_there_is_space(tiny_disk: Path) -> None:
    store = SqlStore(f"sqlite:///{tiny_disk / 'state.sqlite'}")
    put(store, CLIENT)
    ballast = tiny_disk / "ballast"
    free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
    ballast.write_bytes(b"\0" * (free - 8192))
    with pytest.raises(DiskFullError, match="no space left for the database"):
        put(store, RUN, replace(RUN, run_id="r2", name="big", request_id="q2", config_toml="#" * 200_000))
    with store.transaction() as tx:
        assert tx.client("c1") == CLIENT
        assert tx.runs() == []
    ballast.unlink()
    put(store, RUN)
    store.close()


def test_every_statement_is_sql_that_postgresql_has() -> None:
    statements = [value for value in vars(sql).values() if isinstance(value, sa.Select)]
    assert len(statements) >= 15
    for statement in statements:
        statement.compile(dialect=postgresql.dialect())
    for entry in sql._PUTS.values():
        entry.update.compile(dialect=postgresql.dialect())
        entry.insert.compile(dialect=postgresql.dialect())
    for table in TABLES.values():
        sa.schema.CreateTable(table).compile(dialect=postgresql.dialect())
