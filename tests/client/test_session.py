from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fed_client.cache import ModelCache
from fed_client.question import MAX_DIVERGENCES, Question
from fed_client.reports import (
    MAX_MESSAGE_BYTES,
    MAX_TRACEBACK_BYTES,
    Outbox,
    ProgressReporter,
    evaluation,
    failure,
    failure_kind,
)
from fed_client.session import PollLoop, enroll
from fed_client.settings import Settings
from fed_client.state import StateDirectory
from fed_client.stop import Stop, StoppedError
from fed_client.transport import Transport
from fed_client.work import Held, WorkTable
from fed_core.errors import (
    ConflictError,
    FedstreamError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from fedstream.v1 import common_pb2, participation_pb2

if TYPE_CHECKING:
    from tests.client.conftest import FakeCoordinator

QUEUED, SPOOLED = common_pb2.WORK_PHASE_QUEUED, common_pb2.WORK_PHASE_SPOOLED


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def an_assignment(
    assignment_id: str = "a1", workload: str = "digits", version: str = "1", *payloads: common_pb2.PayloadRef
) -> participation_pb2.Assignment:
    return participation_pb2.Assignment(
        assignment_id=assignment_id,
        run_id="r1",
        round=1,
        kind=common_pb2.ASSIGNMENT_KIND_TRAIN,
        workload=common_pb2.WorkloadOffer(name=workload, version=version),
        model=participation_pb2.ModelRef(digest=b"d" * 32, payloads=payloads),
    )


@pytest.fixture
def state(settings: Settings) -> StateDirectory:
    state = StateDirectory(settings.state_dir)
    state.create()
    return state


# -- enrolment ---------------------------------------------------------------------------------------------------------


def test_a_site_enrols_once(coordinator: FakeCoordinator, settings: Settings, state: StateDirectory) -> None:
    first = enroll(settings, state, Stop())
    assert (first.client_id, first.secret, first.name) == ("c1", "s1", "site")
    assert enroll(settings, state, Stop()) == first
    assert len(coordinator.calls["Enroll"]) == 1


def test_a_lost_answer_costs_nothing(coordinator: FakeCoordinator, settings: Settings, state: StateDirectory) -> None:
    coordinator.faults["Enroll"].extend([UnavailableError("lost"), UnavailableError("lost")])
    with pytest.raises(UnavailableError):
        enroll(settings, state, Stop(), give_up_after=0)
    enroll(settings, StateDirectory(state.root), Stop())
    names = {call.request_id for call in coordinator.calls["Enroll"]}
    assert len(coordinator.calls["Enroll"]) == 3
    assert len(names) == 1


def test_a_site_without_token_or_with_a_wrong_one_is_told(
    coordinator: FakeCoordinator, settings: Settings, state: StateDirectory
) -> None:
    with pytest.raises(UnauthenticatedError, match="--join-token"):
        enroll(settings.model_copy(update={"join_token": None}), state, Stop())
    token = type(settings.join_token)("wrong")
    with pytest.raises(UnauthenticatedError, match="join token was refused"):
        enroll(settings.model_copy(update={"join_token": token}), state, Stop())


def test_a_name_that_is_taken_is_explained(
    coordinator: FakeCoordinator, settings: Settings, state: StateDirectory
) -> None:
    coordinator.faults["Enroll"].append(ConflictError("the name is taken"))
    with pytest.raises(ConflictError, match=r"--name"):
        enroll(settings, state, Stop())


# -- the table ---------------------------------------------------------------------------------------------------------


def test_what_is_finished_or_dropped_is_never_begun_again() -> None:
    table = WorkTable()
    held = Held(an_assignment())
    assert table.add(held)
    assert not table.add(Held(an_assignment()))
    table.finish(held)
    assert not table.add(Held(an_assignment()))
    table.add(Held(an_assignment("a2")))
    table.drop("a2", "not wanted")
    assert not table.add(Held(an_assignment("a2")))


def test_a_drop_leaves_the_cleaning_to_the_thread_that_has_it_in_hand() -> None:
    table = WorkTable()
    table.add(Held(an_assignment("a1")))
    table.add(Held(an_assignment("a2")))
    taken = table.take(QUEUED)
    assert taken is not None
    assert taken.assignment_id == "a1"
    assert table.drop("a1", "the round closed") is None
    assert taken.stop.reason == "the round closed"
    queued = table.drop("a2", "the round closed")
    assert queued is not None
    assert queued.assignment_id == "a2"
    assert table.held() == []
    assert table.drop("unknown", "") is None


def test_a_dropped_assignment_cannot_be_put_down() -> None:
    table = WorkTable()
    table.add(Held(an_assignment()))
    held = table.take(QUEUED)
    assert held is not None
    table.drop("a1", "the round closed")
    with pytest.raises(StoppedError, match="the round closed"):
        table.release(held, SPOOLED)


def test_closing_wakes_those_who_wait_and_interrupts_those_who_work() -> None:
    table, interrupted = WorkTable(), threading.Event()
    held = Held(an_assignment())
    table.add(held)
    waiting = threading.Thread(target=lambda: table.take(SPOOLED))
    waiting.start()
    with held.stop.interrupting(interrupted.set):
        table.close("the daemon stops")
    waiting.join(5)
    assert not waiting.is_alive()
    assert interrupted.is_set()
    assert not table.add(Held(an_assignment("a2")))


def test_interrupting_does_not_begin_what_is_already_stopped() -> None:
    stop = Stop()
    stop.set("first")
    stop.set("second")
    with pytest.raises(StoppedError, match="first"), stop.interrupting(lambda: None):
        pytest.fail("it began")


A_STEP = common_pb2.PayloadRef(digest=b"s" * 32, total_bytes=100)


def test_an_answer_refreshes_what_has_not_begun() -> None:
    table = WorkTable()
    table.add(Held(an_assignment("a1")))
    taken = table.take(QUEUED)
    assert taken is not None
    table.move(taken, common_pb2.WORK_PHASE_DOWNLOADING)
    changed = an_assignment("a1", "digits", "1", A_STEP)
    assert table.refresh(changed, ends_wait=False)
    assert taken.assignment == changed
    assert not table.refresh(changed, ends_wait=False)
    table.move(taken, common_pb2.WORK_PHASE_TRAINING)
    assert not table.refresh(an_assignment("a1"), ends_wait=True)
    assert taken.assignment == changed
    assert not table.refresh(an_assignment("a2"), ends_wait=True)


def test_what_waits_for_an_answer_is_taken_by_nobody_until_a_newer_one_has_come() -> None:
    table = WorkTable()
    table.add(Held(an_assignment("a1")))
    table.add(Held(an_assignment("a2")))
    waiting = table.take(QUEUED)
    assert waiting is not None
    table.wait_for_answer(waiting)
    assert (waiting.assignment_id, waiting.phase, waiting.num_lost) == ("a1", QUEUED, 1)
    other = table.take(QUEUED)
    assert other is not None
    assert other.assignment_id == "a2"
    # An answer to a question from before says nothing new, whatever it says.
    assert not table.refresh(an_assignment("a1", "digits", "1", A_STEP), ends_wait=False)
    assert waiting.is_waiting
    # One from after it ends the wait, even where it says the same.
    assert table.refresh(an_assignment("a1"), ends_wait=True)
    assert table.take(QUEUED) is waiting


def test_what_was_dropped_does_not_wait() -> None:
    table = WorkTable()
    table.add(Held(an_assignment()))
    held = table.take(QUEUED)
    assert held is not None
    table.drop("a1", "the round closed")
    with pytest.raises(StoppedError, match="the round closed"):
        table.wait_for_answer(held)
    assert not table.refresh(an_assignment(), ends_wait=True)


# -- the poll ----------------------------------------------------------------------------------------------------------


@dataclass
class Polling:
    table: WorkTable = field(default_factory=WorkTable)
    question: Question = field(default_factory=Question)
    cache: ModelCache | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    fatal: list[FedstreamError] = field(default_factory=list)


@contextmanager
def polling(settings: Settings, transport: Transport, found: Polling) -> Iterator[PollLoop]:
    def drop(assignment_id: str, reason: str) -> None:
        found.dropped[assignment_id] = reason
        found.table.drop(assignment_id, reason)

    loop = PollLoop(
        settings,
        transport,
        found.table,
        found.cache or ModelCache(settings.state_dir, keep=1),
        found.question,
        on_dropped=drop,
        on_refused=lambda held, problem: found.refused.update({held.assignment_id: problem}),
        fatal=found.fatal.append,
    )
    thread = threading.Thread(target=loop.run, args=({"digits": "1"},))
    thread.start()
    yield loop
    loop.close()
    transport.close()
    thread.join(5)
    assert not thread.is_alive()


def _ids(table: WorkTable) -> list[str]:
    return [held.assignment_id for held in table.held()]


def test_new_work_is_taken_at_once_and_dropped_work_stopped(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    with polling(settings, transport, found):
        until(lambda: coordinator.calls["PollAssignment"])
        coordinator.want(an_assignment("a1"), an_assignment("a2"))
        until(lambda: _ids(found.table) == ["a1", "a2"])
        coordinator.dropped["a1"] = "the round closed"
        coordinator.want(an_assignment("a2"))
        until(lambda: found.dropped == {"a1": "the round closed"})
        assert _ids(found.table) == ["a2"]
        first, *_, last = coordinator.calls["PollAssignment"]
        assert [offer.name for offer in first.workloads] == ["digits"]
        assert [held.assignment_id for held in last.held] == ["a2"] or len(last.held) == 2


def test_what_lies_in_the_spool_is_said_at_the_first_poll(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    found.table.add(Held(an_assignment("a1"), SPOOLED))
    coordinator.want(an_assignment("a1"))
    with polling(settings, transport, found):
        until(lambda: coordinator.calls["PollAssignment"])
    first = coordinator.calls["PollAssignment"][0]
    assert [(held.assignment_id, held.phase) for held in first.held] == [("a1", SPOOLED)]
    assert found.dropped == {}


def test_an_answer_older_than_the_receipt_does_not_begin_the_work_again(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    held = Held(an_assignment("a1"))
    found.table.add(held)
    found.table.finish(held)
    coordinator.want(an_assignment("a1"))
    with polling(settings, transport, found):
        until(lambda: len(coordinator.calls["PollAssignment"]) >= 2)
        assert _ids(found.table) == []


def test_a_difference_that_stays_is_no_hot_loop(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    held = Held(an_assignment("a1"))
    found.table.add(held)
    found.table.finish(held)
    coordinator.want(an_assignment("a1"))
    with polling(settings, transport, found):
        time.sleep(2)
    assert len(coordinator.calls["PollAssignment"]) < 12


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        (an_assignment(workload="xray"), "not offered here; offered are digits"),
        (an_assignment(version="2"), "version '2'; installed here is version '1'"),
        (an_assignment("../../etc/passwd"), "refused"),
        (participation_pb2.Assignment(assignment_id="a1", kind=common_pb2.AssignmentKind.ValueType(9)), "update it"),
    ],
    ids=["workload", "version", "id", "kind"],
)
def test_work_that_this_site_cannot_do_is_refused_with_the_reason(
    coordinator: FakeCoordinator,
    settings: Settings,
    transport: Transport,
    assignment: participation_pb2.Assignment,
    problem: str,
) -> None:
    found = Polling()
    coordinator.want(assignment)
    with polling(settings, transport, found):
        until(lambda: found.refused)
    assert problem in found.refused[assignment.assignment_id]


def test_a_coordinator_that_is_away_is_asked_again(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    coordinator.faults["PollAssignment"].extend([UnavailableError("draining")] * 3)
    coordinator.want(an_assignment("a1"))
    with polling(settings, transport, found):
        until(lambda: _ids(found.table) == ["a1"])


def test_an_identity_that_is_not_known_ends_the_daemon(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    coordinator.faults["PollAssignment"].append(UnauthenticatedError("unknown client"))
    with polling(settings, transport, found):
        until(lambda: found.fatal)
    assert isinstance(found.fatal[0], UnauthenticatedError)


class HoldsTwo(ModelCache):
    """A cache that says that it holds two models."""

    def digests(self) -> list[bytes]:
        return [b"n" * 32, b"o" * 32]


def test_a_poll_says_which_models_are_here(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport, tmp_path: Path
) -> None:
    found = Polling(cache=HoldsTwo(tmp_path, keep=2))
    with polling(settings, transport, found):
        until(lambda: coordinator.calls["PollAssignment"])
    assert list(coordinator.calls["PollAssignment"][0].model_digests) == [b"n" * 32, b"o" * 32]


def a_divergence(version: int) -> participation_pb2.Divergence:
    return participation_pb2.Divergence(assignment_id="a1", version=version, digest=b"x" * 32)


def test_news_are_told_at_once_and_until_a_poll_that_told_them_is_answered(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    polls = coordinator.calls["PollAssignment"]
    with polling(settings, transport, found):
        until(lambda: polls)
        coordinator.faults["PollAssignment"].extend([UnavailableError("away")] * 2)
        found.question.add(a_divergence(1))
        found.question.ask_now()
        until(lambda: len(polls) == 4)
        found.question.add(a_divergence(2))
        found.question.ask_now()
        until(lambda: len(polls) == 5)
        coordinator.want(an_assignment("a1"))
        until(lambda: _ids(found.table) == ["a1"])
        until(lambda: not polls[-1].divergences)
    told = [[each.version for each in poll.divergences] for poll in polls]
    # Two that failed, one that was given up for the second piece of news, one that was answered.
    assert told[:5] == [[], [1], [1], [1], [1, 2]]
    assert not any(told[5:])


def test_no_more_divergences_are_told_than_a_poll_takes() -> None:
    question = Question()
    for version in range(MAX_DIVERGENCES + 3):
        question.add(a_divergence(version))
    _, told = question.begin()
    assert [each.version for each in told] == list(range(3, MAX_DIVERGENCES + 3))
    question.add(a_divergence(1000))
    question.answered(told)
    assert [each.version for each in question.begin()[1]] == [1000]


def test_what_waits_is_asked_about_without_a_wait_and_goes_on_with_that_answer(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    coordinator.want(an_assignment("a1"))
    polls = coordinator.calls["PollAssignment"]
    with polling(settings, transport, found):
        until(lambda: len(polls) >= 2)  # the second waits: nothing differs
        held = found.table.take(QUEUED)
        assert held is not None
        assert polls[-1].wait_seconds > 1
        began = time.monotonic()
        found.table.wait_for_answer(held)
        found.question.ask_now()
        until(lambda: not held.is_waiting)
        assert time.monotonic() - began < 5
        assert polls[2].wait_seconds == 0
        assert [each.assignment_id for each in polls[2].held] == ["a1"]
        until(lambda: len(polls) == 4 and polls[3].wait_seconds > 1)
        assert found.table.take(QUEUED) is held


def test_an_assignment_whose_way_to_the_model_changed_is_refreshed(
    coordinator: FakeCoordinator, settings: Settings, transport: Transport
) -> None:
    found = Polling()
    coordinator.want(an_assignment("a1"))
    with polling(settings, transport, found):
        until(lambda: _ids(found.table) == ["a1"])
        coordinator.want(an_assignment("a1", "digits", "1", A_STEP))
        until(lambda: list(found.table.held()[0].assignment.model.payloads) == [A_STEP])
    assert _ids(found.table) == ["a1"]


# -- reports -----------------------------------------------------------------------------------------------------------


def test_progress_is_told_at_most_once_a_second_and_the_latest_counts(
    coordinator: FakeCoordinator, transport: Transport
) -> None:
    stopped: dict[str, str] = {}
    reporter = ProgressReporter(transport, stopped.__setitem__, pytest.fail)
    thread = threading.Thread(target=reporter.run)
    thread.start()
    for done in range(50):
        reporter.update("a1", common_pb2.WORK_PHASE_TRAINING, done, 50, {"loss": 1.0})
        time.sleep(0.03)
    until(lambda: coordinator.calls["ReportProgress"][-1].done == 49)
    assert 2 <= len(coordinator.calls["ReportProgress"]) <= 4
    coordinator.should_stop["a1"] = "the round closed"
    reporter.update("a1", common_pb2.WORK_PHASE_TRAINING, 50, 50)
    until(lambda: stopped == {"a1": "the round closed"})
    reporter.forget("a1")
    reporter.close()
    thread.join(5)
    assert not thread.is_alive()


def test_progress_of_an_assignment_that_is_not_known_stops_it(
    coordinator: FakeCoordinator, transport: Transport
) -> None:
    stopped: dict[str, str] = {}
    reporter = ProgressReporter(transport, stopped.__setitem__, pytest.fail)
    coordinator.faults["ReportProgress"].append(NotFoundError("no such assignment"))
    thread = threading.Thread(target=reporter.run)
    thread.start()
    reporter.update("a1", common_pb2.WORK_PHASE_TRAINING)
    until(lambda: "a1" in stopped)
    reporter.close()
    thread.join(5)


def test_a_verdict_is_delivered_whatever_it_takes(coordinator: FakeCoordinator, transport: Transport) -> None:
    done: list[str] = []
    outbox = Outbox(transport, lambda held: done.append(held.assignment_id), pytest.fail)
    coordinator.faults["ReportFailure"].extend([UnavailableError("away")] * 3)
    coordinator.faults["ReportEvaluation"].append(NotFoundError("the round is over"))
    outbox.put(Held(an_assignment("a1")), failure(Held(an_assignment("a1")), failure_kind("NOT_FINITE"), "w holds NaN"))
    outbox.put(Held(an_assignment("a2")), evaluation(Held(an_assignment("a2")), 7, {"accuracy": 0.5}))
    thread = threading.Thread(target=outbox.run)
    thread.start()
    until(lambda: done == ["a1", "a2"])
    assert len(coordinator.calls["ReportFailure"]) == 4
    report = coordinator.calls["ReportFailure"][-1]
    assert (report.kind, report.message) == (participation_pb2.FAILURE_KIND_NOT_FINITE, "w holds NaN")
    outbox.close()
    thread.join(5)


def test_a_long_traceback_keeps_its_end() -> None:
    report = failure(Held(an_assignment()), failure_kind("WORKLOAD"), "ä" * 5000, "x" * 40000 + "ValueError: é")
    assert len(report.message.encode()) <= MAX_MESSAGE_BYTES
    assert len(report.traceback.encode()) <= MAX_TRACEBACK_BYTES
    assert report.traceback.endswith("ValueError: é")


def test_a_failure_kind_of_a_newer_trainer_is_the_workloads() -> None:
    assert failure_kind("SOMETHING_NEW") == participation_pb2.FAILURE_KIND_WORKLOAD
