"""Enrolment, polls, reports, cohorts and the ends of rounds, as sites and operators see them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.light_client import LightClient, constant, encode_update
from fed_core.errors import (
    ConflictError,
    InvalidError,
    NoLongerNeededError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
    WrongPhaseError,
)
from fedstream.v1 import common_pb2, participation_pb2, runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import MovableClock, answer, member, open_house, until, weights

WORKLOAD = participation_pb2.FAILURE_KIND_WORKLOAD


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
async def slow_house(tmp_path: Path, clock: MovableClock) -> AsyncIterator[House]:
    """A coordinator whose time the test moves, and whose clients never seem gone but by that."""
    async with open_house(tmp_path / "data", clock, lease_seconds=30) as house:
        yield house


async def given(*clients: LightClient) -> list[participation_pb2.Assignment]:
    """The next assignment of each: they poll side by side, as one that never polled is in no cohort."""
    return await asyncio.gather(*(off_loop(client.next_assignment) for client in clients))


def update_for(client: LightClient, assignment: participation_pb2.Assignment, value: float = 0.25) -> Any:
    return encode_update(assignment, client.model(assignment)[0].specs, constant(value))


# Enrolment


async def test_only_the_join_token_enrols(house: House) -> None:
    client = LightClient(house.app.address)
    for token in ("", "wrong", house.app.tokens.operator, house.app.tokens.join + "x"):
        with pytest.raises(UnauthenticatedError, match="join token"):
            await off_loop(client.enroll, token, "site")
    assert not (await off_loop(house.operator.call, "ListClients", runs_pb2.ListClientsRequest())).clients


async def test_enrolling_again_after_a_lost_answer_gives_the_same_id_and_a_fresh_secret(house: House) -> None:
    request_id = uuid.uuid4().hex
    client = LightClient(house.app.address)
    first = await off_loop(client.enroll, house.app.tokens.join, "site", request_id)
    second = await off_loop(client.enroll, house.app.tokens.join, "site", request_id)
    assert first.partition(".")[0] == second.partition(".")[0]
    assert first != second
    client.use(first)
    with pytest.raises(UnauthenticatedError, match="enrols with the join token"):
        await off_loop(client.poll, wait_seconds=0)
    client.use(second)
    await off_loop(client.poll, wait_seconds=0)


async def test_enrolling_again_after_the_first_call_is_a_conflict(house: House) -> None:
    request_id = uuid.uuid4().hex
    client = LightClient(house.app.address)
    credential = await off_loop(client.enroll, house.app.tokens.join, "site", request_id)
    await off_loop(client.poll, wait_seconds=0)
    with pytest.raises(ConflictError, match="'site' is enrolled already; choose another"):
        await off_loop(client.enroll, house.app.tokens.join, "site", request_id)
    client.use(credential)
    await off_loop(client.poll, wait_seconds=0)


async def test_a_name_is_taken_once(house: House) -> None:
    await off_loop(house.client, "site")
    with pytest.raises(ConflictError, match="'site' is enrolled already"):
        await off_loop(house.client, "site")
    client = LightClient(house.app.address)
    request_id = uuid.uuid4().hex
    await off_loop(client.enroll, house.app.tokens.join, "other", request_id)
    with pytest.raises(ConflictError, match="'site' is enrolled already"):
        await off_loop(client.enroll, house.app.tokens.join, "site", request_id)


@pytest.mark.parametrize("name", ["", "a b", "ä", "../up", "x" * 65, "line\nbreak", "site\n"])
async def test_a_bad_name_is_refused(house: House, name: str) -> None:
    with pytest.raises(InvalidError, match="1 to 64 characters"):
        await off_loop(house.client, name)


@pytest.mark.parametrize("request_id", ["short", "x" * 65, "with spaces in the middle"])
async def test_a_bad_request_id_is_refused(house: House, request_id: str) -> None:
    client = LightClient(house.app.address)
    with pytest.raises(InvalidError, match="request_id"):
        await off_loop(client.enroll, house.app.tokens.join, "site", request_id)


# Polls


async def test_a_poll_wakes_as_soon_as_there_is_work(house: House) -> None:
    client = await off_loop(house.client, "site")
    polling = asyncio.create_task(off_loop(client.poll, wait_seconds=60))
    await until(lambda: house.operator.call("ListClients", runs_pb2.ListClientsRequest()).clients[0].is_alive)
    begun = time.monotonic()
    await off_loop(house.operator.submit, config(size=1))
    assert len((await polling).assignments) == 1
    assert time.monotonic() - begun < 20


async def test_a_lost_answer_costs_nothing(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1))
    client = await off_loop(house.client, "site")
    first = await off_loop(client.next_assignment)
    again = await off_loop(client.poll, wait_seconds=60)  # at once: what is held is not what is wanted
    assert [a.assignment_id for a in again.assignments] == [first.assignment_id]
    assert again.assignments[0].plan == first.plan
    held = await off_loop(client.poll, held=(first.assignment_id,), wait_seconds=0)
    assert [a.assignment_id for a in held.assignments] == [first.assignment_id]
    assert not held.dropped


async def test_what_is_held_and_no_longer_wanted_is_dropped_with_its_reason(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, at="none"))
    client = await off_loop(house.client, "site")
    assignment = await off_loop(client.next_assignment)
    unknown = uuid.UUID(int=7).hex
    polling = asyncio.create_task(off_loop(client.poll, held=(assignment.assignment_id,), wait_seconds=60))
    await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="test"))
    dropped = (await polling).dropped
    assert [(d.assignment_id, d.reason) for d in dropped] == [(assignment.assignment_id, "cancelled by an operator")]
    answered = await off_loop(client.poll, held=(unknown,), wait_seconds=60)
    assert [(d.assignment_id, d.reason) for d in answered.dropped] == [
        (unknown, "the coordinator does not know this assignment")
    ]
    assert "no active run" in answered.idle_reason


async def test_a_poll_tells_nothing_of_another_sites_assignments(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1))
    client, other = await off_loop(house.client, "site"), await off_loop(house.client, "other")
    assignment = await off_loop(client.next_assignment)
    await off_loop(client.report_failure, assignment.assignment_id, kind=WORKLOAD, message="a secret of the site")
    answered = await off_loop(other.poll, held=(assignment.assignment_id,), wait_seconds=0)
    assert [d.reason for d in answered.dropped] == ["the coordinator does not know this assignment"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"wait_seconds": -1}, "wait_seconds"),
        ({"wait_seconds": 61}, "wait_seconds"),
        ({"held": tuple(map(str, range(1025)))}, "1024 held"),
        ({"labels": {"key": "no spaces"}}, "label 'key'"),
        ({"labels": {"k" * 64: "v"}}, "label"),
        ({"labels": {f"k{n}": "v" for n in range(33)}}, "32 labels"),
    ],
)
async def test_a_poll_out_of_range_is_refused(house: House, changes: dict[str, Any], says: str) -> None:
    client = await off_loop(house.client, "site")
    with pytest.raises(InvalidError, match=says):
        await off_loop(lambda: client.poll(**{"wait_seconds": 0} | changes))
    request = participation_pb2.PollAssignmentRequest(wait_seconds=float("nan"))
    with pytest.raises(InvalidError, match="wait_seconds"):
        await off_loop(client.call, client._stub.PollAssignment, request)


async def test_a_client_learns_why_there_is_nothing_to_do(house: House) -> None:
    client = await off_loop(house.client, "site")
    assert (await off_loop(client.poll, wait_seconds=0)).idle_reason == "there is no active run"
    await off_loop(house.operator.submit, config(size=2))
    assert "waiting for 2 clients" in (await off_loop(client.poll, wait_seconds=0)).idle_reason


# Progress and failures


async def test_progress_is_seen_by_the_operator_and_told_when_to_stop(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1))
    client = await off_loop(house.client, "site")
    assignment = await off_loop(client.next_assignment)
    said = {"phase": common_pb2.WORK_PHASE_TRAINING, "done": 30, "total": 120}
    loss = [common_pb2.Metric(name="loss", value=0.5)]
    assert not (await off_loop(client.report_progress, assignment.assignment_id, metrics=loss, **said)).should_stop
    seen = await off_loop(member, house, "site")
    assert (seen.phase, seen.done, seen.total) == (common_pb2.WORK_PHASE_TRAINING, 30, 120)
    assert [(m.name, m.value) for m in seen.metrics] == [("loss", 0.5)]
    await until(lambda: "site (training 25 %)" in house.operator.run().reason)
    await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="test"))
    stop = await off_loop(client.report_progress, assignment.assignment_id, **said)
    assert stop.should_stop
    assert stop.reason


async def test_a_failure_reaches_the_report_with_its_traceback(house: House) -> None:
    await off_loop(house.operator.submit, config(size=2))
    a, b = await off_loop(house.client, "a"), await off_loop(house.client, "b")
    first, second = await given(a, b)
    traceback = "Traceback (most recent call last):\n" + "  deep\n" * 10_000 + "ValueError: no such column"
    said = {"kind": WORKLOAD, "message": "the workload raised " + "!" * 5000, "traceback": traceback}
    await off_loop(a.report_failure, first.assignment_id, **said)
    await off_loop(a.report_failure, first.assignment_id, kind=WORKLOAD, message="another story")  # the first stands
    await until(lambda: member(house, "a").state == runs_pb2.ASSIGNMENT_STATE_FAILED)
    seen = await off_loop(member, house, "a")
    assert seen.reason.startswith("WORKLOAD: the workload raised !!!")
    assert seen.reason.endswith("ValueError: no such column")
    assert len(seen.reason) < 36 * 1024
    await off_loop(answer, b, 0.25, 1, second)
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED
    assert "failed: a (WORKLOAD" in (await off_loop(house.operator.report)).rounds[0].reason
    await off_loop(a.report_failure, first.assignment_id, **said)  # long after: harmless


async def test_a_failure_must_say_what_kind_it_is_and_be_ones_own(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1))
    client, other = await off_loop(house.client, "site"), await off_loop(house.client, "other")
    assignment = await off_loop(client.next_assignment)
    with pytest.raises(InvalidError, match="kind"):
        await off_loop(client.report_failure, assignment.assignment_id, message="?")
    with pytest.raises(NotFoundError):
        await off_loop(other.report_failure, assignment.assignment_id, kind=WORKLOAD, message="not mine")
    with pytest.raises(NotFoundError):
        await off_loop(client.report_failure, "unknown", kind=WORKLOAD, message="?")
    stop = await off_loop(other.report_progress, assignment.assignment_id, phase=3, done=1, total=2)
    assert stop.should_stop
    assert (await off_loop(member, house, "site")).state == runs_pb2.ASSIGNMENT_STATE_OPEN


# Who takes part


async def test_a_run_says_which_workload_version_or_label_its_clients_lack(house: House) -> None:
    text = config(size=1, extra='[cohort.labels]\nregion = "north"\n').replace(
        'workload = "echo"', 'workload = "echo"\nworkload_version = "1"'
    )
    await off_loop(house.operator.submit, text)
    client = await off_loop(house.client, "site", "digits")
    await off_loop(client.poll, wait_seconds=0, labels={"region": "north"})
    await until(lambda: "site has no workload 'echo' (it has digits)" in house.operator.run().reason)
    client.workload = "echo"
    answered = await off_loop(client.poll, wait_seconds=0, labels={"region": "south"})
    assert "this site has label region='south', the run wants 'north'" in answered.idle_reason
    await until(lambda: "site has label region='south', the run wants 'north'" in house.operator.run().reason)
    old = participation_pb2.PollAssignmentRequest(
        workloads=[common_pb2.WorkloadOffer(name="echo", version="0.9")], labels={"region": "north"}
    )
    await off_loop(client.call, client._stub.PollAssignment, old)
    await until(lambda: "has version '0.9' of workload 'echo', the run wants '1'" in house.operator.run().reason)
    assignments = (await off_loop(client.poll, wait_seconds=20, labels={"region": "north"})).assignments
    assert len(assignments) == 1


async def test_who_does_not_match_is_never_selected(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, max_rounds=3, extra='[cohort.labels]\nrole = "train"\n'))
    a, b = await off_loop(house.client, "a"), await off_loop(house.client, "b")
    await off_loop(b.poll, wait_seconds=0, labels={"role": "idle"})
    for _ in range(3):
        found = await until(lambda: a.poll(wait_seconds=5, labels={"role": "train"}).assignments)
        await off_loop(answer, a, 0.25, 1, found[0])
    await off_loop(house.operator.wait)
    for round in (await off_loop(house.operator.report)).rounds:
        assert [c.client_name for c in round.clients] == ["a"]


async def test_the_round_closes_at_its_deadline_with_a_quorum_and_names_who_was_missing(
    slow_house: House, clock: MovableClock
) -> None:
    await off_loop(slow_house.operator.submit, config(size=3, quorum=2, deadline=10))
    clients = [await off_loop(slow_house.client, name) for name in "abc"]
    assignments = await given(*clients)
    for client, assignment in list(zip(clients, assignments, strict=True))[:2]:
        await off_loop(answer, client, 0.25, 1, assignment)
    await until(lambda: slow_house.operator.run().reason == "2 of 3 updates; waiting for c")
    clock.advance(11)
    run = await off_loop(slow_house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED
    round = (await off_loop(slow_house.operator.report)).rounds[0]
    assert round.reason == "2 of 3 updates at the deadline of 10 s; missing: c"
    late = await off_loop(clients[2].poll, held=(assignments[2].assignment_id,), wait_seconds=60)
    assert late.dropped[0].reason == f"round 1 closed: {round.reason}"
    with pytest.raises(NoLongerNeededError, match="at the deadline of 10 s"):
        await off_loop(
            clients[2].upload,
            assignments[2].assignment_id,
            encode_update(assignments[2], (), constant(0.25)),
            retry=False,
        )


async def test_a_round_without_a_quorum_fails_and_after_so_many_the_run(slow_house: House, clock: MovableClock) -> None:
    extra = "max_failed_rounds = 2\n"
    text = config(size=2, quorum=2, deadline=10, max_rounds=5).replace("[evaluation]", extra + "[evaluation]")
    await off_loop(slow_house.operator.submit, text)
    a, b = await off_loop(slow_house.client, "a"), await off_loop(slow_house.client, "b")
    first, _ = await given(a, b)
    await off_loop(answer, a, 0.25, 1, first)
    clock.advance(11)
    await until(lambda: slow_house.operator.run().round == 2)
    first, second = await given(a, b)
    assert (first.round, first.model.version) == (2, 0)
    await off_loop(a.report_failure, first.assignment_id, kind=WORKLOAD, message="no data")
    run = await off_loop(slow_house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FAILED
    assert run.reason.startswith(
        "2 rounds in a row failed; the last: quorum of 2 out of reach: 0 of 2 updates, failed: a"
    )
    report = await off_loop(slow_house.operator.report)
    assert [r.state for r in report.rounds] == [runs_pb2.ROUND_STATE_FAILED] * 2
    assert report.rounds[0].reason == "1 of 2 updates at the deadline of 10 s; missing: b"
    assert len(report.models) == 1
    with pytest.raises(NoLongerNeededError):
        await off_loop(b.upload, second.assignment_id, update_for_over(second), retry=False)


def update_for_over(assignment: participation_pb2.Assignment) -> Any:
    """An update for a round that is over, whose model cannot be fetched any more."""
    return encode_update(assignment, (), constant(0.25))


async def test_a_round_that_commits_forgives_those_that_failed_before(slow_house: House, clock: MovableClock) -> None:
    text = config(size=1, quorum=1, deadline=10, max_rounds=4).replace(
        "[evaluation]", "max_failed_rounds = 2\n[evaluation]"
    )
    await off_loop(slow_house.operator.submit, text)
    client = await off_loop(slow_house.client, "site")
    for fails in (True, False, True, False):
        (assignment,) = await given(client)
        if fails:
            await off_loop(client.report_failure, assignment.assignment_id, kind=WORKLOAD, message="no")
        else:
            await off_loop(answer, client, 0.25, 1, assignment)
    run = await off_loop(slow_house.operator.wait)
    assert (run.state, run.model_version) == (runs_pb2.RUN_STATE_FINISHED, 2)


async def test_a_client_that_died_is_named_and_not_waited_for(slow_house: House, clock: MovableClock) -> None:
    await off_loop(slow_house.operator.submit, config(size=2, quorum=1, deadline=3600))
    alive, dead = await off_loop(slow_house.client, "alive"), await off_loop(slow_house.client, "dead")
    first, _ = await given(alive, dead)
    await off_loop(answer, alive, 0.25, 1, first)
    clock.advance(31)  # the lease
    run = await off_loop(slow_house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED
    reason = (await off_loop(slow_house.operator.report)).rounds[0].reason
    assert "1 of 2 updates, and the rest is gone: dead (not heard of for 3" in reason


async def test_over_selection_takes_the_first_and_drops_the_late_with_the_reason(house: House) -> None:
    text = config(size=2, quorum=2).replace("[schedule]", "min_clients = 3\nover_selection = 1.5\n[schedule]")
    await off_loop(house.operator.submit, text)
    clients = [await off_loop(house.client, name) for name in "abc"]
    assignments = await given(*clients)
    late = await off_loop(update_for, clients[0], assignments[0], 0.5)
    for client, assignment in list(zip(clients, assignments, strict=True))[1:]:
        await off_loop(answer, client, 0.25, 1, assignment)
    await off_loop(house.operator.wait)
    with pytest.raises(NoLongerNeededError, match="round 1 closed: goal reached: 2 of 2 updates"):
        await off_loop(clients[0].upload, assignments[0].assignment_id, late, retry=False)
    seen = await off_loop(member, house, "a")
    assert seen.state == runs_pb2.ASSIGNMENT_STATE_DROPPED
    assert seen.reason == "round 1 closed: goal reached: 2 of 2 updates"
    assert await off_loop(weights, house, 1) == 0.25


async def test_two_runs_share_their_clients_in_turns(house: House) -> None:
    for name in ("one", "two"):
        await off_loop(house.operator.submit, config(name=name, size=2, max_rounds=3))
    clients = [await off_loop(house.client, name) for name in "ab"]
    ids = {(await off_loop(house.operator.run, name)).run_id: name for name in ("one", "two")}
    turns = []
    for _ in range(6):
        assignments = await given(*clients)
        assert len({a.run_id for a in assignments}) == 1
        turns.append(ids[assignments[0].run_id])
        for client, assignment in zip(clients, assignments, strict=True):
            await off_loop(answer, client, 0.25, 1, assignment)
    assert turns in (["one", "two"] * 3, ["two", "one"] * 3)
    for name in ("one", "two"):
        assert (await off_loop(house.operator.wait, name)).state == runs_pb2.RUN_STATE_FINISHED


async def test_a_large_run_is_not_starved_by_small_ones(house: House) -> None:
    """A run that needs everybody gets its turn while another could always go on with one."""
    await off_loop(house.operator.submit, config(name="small", size=1, max_rounds=6))
    await off_loop(house.operator.submit, config(name="large", size=2, max_rounds=1))
    clients = [await off_loop(house.client, name) for name in "ab"]

    def work(client: LightClient) -> None:
        while "no active run" not in (answered := client.poll(wait_seconds=0.2)).idle_reason:
            for assignment in answered.assignments:
                answer(client, 0.25, 1, assignment)

    await asyncio.gather(*(off_loop(work, client) for client in clients))
    assert [r.num_updates for r in (await off_loop(house.operator.report, "large")).models] == [0, 2]


# Evaluation at the clients


async def evaluate(*found: tuple[LightClient, int, dict[str, float]]) -> None:
    """Each client trains, then evaluates the new version."""
    clients = [client for client, _, _ in found]
    for client, assignment in zip(clients, await given(*clients), strict=True):
        assert assignment.kind == common_pb2.ASSIGNMENT_KIND_TRAIN
        await off_loop(answer, client, 0.25, 1, assignment)
    for (client, num_examples, metrics), assignment in zip(found, await given(*clients), strict=True):
        assert assignment.kind == common_pb2.ASSIGNMENT_KIND_EVALUATE
        await off_loop(client.report_evaluation, assignment.assignment_id, num_examples, **metrics)


def metrics_of(model: runs_pb2.ModelVersion) -> dict[str, float]:
    return {metric.name: metric.value for metric in model.metrics}


async def test_metrics_are_means_weighted_by_the_examples_of_those_who_measured_them(house: House) -> None:
    await off_loop(house.operator.submit, config(size=3, at="clients"))
    a, b, c = [await off_loop(house.client, name) for name in "abc"]
    await evaluate(
        (a, 10, {"accuracy": 0.5, "loss": 1.0}),
        (b, 30, {"accuracy": 0.75, "loss": float("nan")}),
        (c, 0, {"accuracy": 0.0}),
    )
    await off_loop(house.operator.wait)
    report = await off_loop(house.operator.report)
    assert metrics_of(report.models[1]) == {"accuracy": (10 * 0.5 + 30 * 0.75) / 40, "loss": 1.0}
    assert report.rounds[0].state == runs_pb2.ROUND_STATE_COMMITTED
    assert "evaluated by 3 of 3" in report.rounds[0].reason


async def test_a_run_stops_at_its_target_and_knows_its_best_version(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, max_rounds=9, at="clients", extra="[stop]\ntarget = 0.9\n"))
    client = await off_loop(house.client, "site")
    for accuracy in (0.5, 0.25, 0.9375):
        await evaluate((client, 10, {"accuracy": accuracy}))
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED
    assert run.reason == "target reached: accuracy 0.9375 in version 3"
    assert run.best_version == 3


async def test_a_run_stops_when_patience_is_out_and_keeps_its_best_version(house: House) -> None:
    text = config(size=1, max_rounds=9, at="clients", extra="[stop]\npatience = 2\n[keep]\nversions = 1\n")
    await off_loop(house.operator.submit, text)
    client = await off_loop(house.client, "site")
    for accuracy in (0.5, 0.75, 0.75, 0.25):
        await evaluate((client, 10, {"accuracy": accuracy}))
    run = await off_loop(house.operator.wait)
    assert run.reason.startswith("no gain in accuracy for 2 evaluations (best: version 2)")
    assert run.best_version == 2
    models = (await off_loop(house.operator.report)).models
    assert [m.version for m in models if m.is_available] == [2, 4]
    assert [m.version for m in models if m.is_best] == [2]


async def test_late_evaluators_are_left_out_and_named(slow_house: House, clock: MovableClock) -> None:
    await off_loop(slow_house.operator.submit, config(size=2, at="clients"))
    a, b = await off_loop(slow_house.client, "a"), await off_loop(slow_house.client, "b")
    for client, assignment in zip((a, b), await given(a, b), strict=True):
        await off_loop(answer, client, 0.25, 1, assignment)
    mine, late = await given(a, b)
    await off_loop(a.report_evaluation, mine.assignment_id, 10, accuracy=0.5)
    for _ in range(5):  # within the lease, so that it is the deadline of 120 s that counts
        clock.advance(25)
        await off_loop(b.poll, held=(late.assignment_id,), wait_seconds=0)
        await off_loop(a.poll, wait_seconds=0)
    await off_loop(slow_house.operator.wait)
    report = await off_loop(slow_house.operator.report)
    assert "evaluated by 1 of 2 at the deadline; missing: b" in report.rounds[0].reason
    assert metrics_of(report.models[1]) == {"accuracy": 0.5}
    with pytest.raises(NoLongerNeededError, match="evaluation of version 1 is over"):
        await off_loop(b.report_evaluation, late.assignment_id, 10, accuracy=1.0)
    await off_loop(a.report_evaluation, mine.assignment_id, 99, accuracy=1.0)  # a repeat: the first stands
    assert metrics_of((await off_loop(slow_house.operator.report)).models[1]) == {"accuracy": 0.5}


async def test_an_evaluation_that_fails_is_left_out(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, at="clients"))
    client = await off_loop(house.client, "site")
    await off_loop(answer, client)
    (assignment,) = await given(client)
    for num_examples, name in ((-1, "accuracy"), (1, ""), (1, "x" * 101)):
        with pytest.raises(InvalidError):
            await off_loop(
                lambda n=num_examples, m=name: client.report_evaluation(assignment.assignment_id, n, **{m: 1.0})
            )
    await off_loop(client.report_failure, assignment.assignment_id, kind=WORKLOAD, message="no test data")
    run = await off_loop(house.operator.wait)
    assert (run.state, run.model_version, run.best_version) == (runs_pb2.RUN_STATE_FINISHED, 1, 0)
    report = await off_loop(house.operator.report)
    assert not report.models[1].metrics


async def test_a_training_assignment_takes_no_evaluation(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1))
    client, other = await off_loop(house.client, "site"), await off_loop(house.client, "other")
    assignment = await off_loop(client.next_assignment)
    with pytest.raises(WrongPhaseError, match="asks for an update"):
        await off_loop(client.report_evaluation, assignment.assignment_id, 1, accuracy=1.0)
    with pytest.raises(NotFoundError):
        await off_loop(other.report_evaluation, assignment.assignment_id, 1, accuracy=1.0)


async def test_draining_sends_pollers_away(house: House) -> None:
    client = await off_loop(house.client, "site")
    polling = asyncio.create_task(off_loop(client.poll, wait_seconds=60))
    await until(lambda: house.operator.call("ListClients", runs_pb2.ListClientsRequest()).clients[0].is_alive)
    await house.app.__aexit__(None, None, None)
    with pytest.raises(UnavailableError, match="stopping"):
        await polling
