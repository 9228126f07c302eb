"""Buffered asynchronous rounds over the real service: what becomes of updates that come when they come."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.light_client import LightClient, constant, encode_update
from fed_core.errors import ConfigError, NoLongerNeededError, NotFoundError
from fed_core.safetensors_tiles import SafetensorsReader
from fed_server.aggregation.staleness import ONE, staleness_weights
from fed_server.config import PolynomialStalenessConfig
from fed_server.rounds.run import LiveRun
from fed_server.store.base import Metrics
from fedstream.v1 import participation_pb2, runs_pb2
from tests.server.conftest import EXACT, House, config, off_loop
from tests.server.houses import MovableClock, answer, open_house, until, weights

CONFIG = """
name = "{name}"
workload = "echo"
seed = 7
[cohort]
size = {size}
min_clients = {min_clients}
selection = "{selection}"
[schedule]
max_rounds = {max_rounds}
max_failed_rounds = 2
deadline_seconds = 60
[rounds]
kind = "buffered"
concurrency = {concurrency}
max_staleness = {max_staleness}
[aggregation]
kind = "mean"
weighting = "uniform"
[evaluation]
at = "{at}"
"""
WEIGHTS = staleness_weights(PolynomialStalenessConfig(), 20)


def buffered(
    size: int = 2,
    concurrency: int = 3,
    max_rounds: int = 9,
    max_staleness: int = 20,
    min_clients: int = 3,
    at: str = "none",
    name: str = "test",
    selection: str = "random",
    extra: str = EXACT,
) -> str:
    """A run config."""
    values = {"name": name, "size": size, "concurrency": concurrency, "max_rounds": max_rounds, "at": at}
    values |= {"max_staleness": max_staleness, "min_clients": min_clients, "selection": selection}
    return CONFIG.format(**values) + extra


async def given(*clients: LightClient) -> list[participation_pb2.Assignment]:
    """The next assignment of each: they poll side by side, as nobody is asked before all are there."""
    return await asyncio.gather(*(off_loop(client.next_assignment) for client in clients))


async def sites(house: House, *names: str) -> list[LightClient]:
    return [await off_loop(house.client, name) for name in names]


async def version(house: House, number: int) -> float:
    """The value that a version is filled with, once it is there."""
    await until(lambda: house.operator.run().model_version >= number)
    return float(await off_loop(weights, house, number))


def received(round: runs_pb2.Round) -> list[runs_pb2.RoundClient]:
    return [c for c in round.clients if c.state == runs_pb2.ASSIGNMENT_STATE_RECEIVED]


# Updates and versions


async def test_a_straggler_holds_up_no_version_and_counts_less_when_it_comes(house: House) -> None:
    await off_loop(house.operator.submit, buffered())
    a, b, slow = await sites(house, "a", "b", "slow")
    first = await given(a, b, slow)
    # Whoever has delivered is asked again at once, even before the buffer is full.
    await off_loop(answer, a, 0.5, 1, first[0])
    again = await off_loop(a.next_assignment)
    assert again.model.version == 0
    assert again.plan.seed != first[0].plan.seed
    await off_loop(answer, b, 0.25, 1, first[1])
    assert await version(house, 1) == (0.5 + 0.25) / 2
    await off_loop(answer, a, 0.125, 1, again)
    await off_loop(answer, slow, 1.0, 1, first[2])
    assert await version(house, 2) == 0.375 + (0.125 + 1.0) * WEIGHTS[1] / ONE / 2
    rounds = (await off_loop(house.operator.report)).rounds
    assert [(c.client_name, c.model_version, c.staleness, c.weight) for c in received(rounds[1])] == [
        ("a", 0, 1, WEIGHTS[1]),
        ("slow", 0, 1, WEIGHTS[1]),
    ]
    assert {m.name: m.value for m in rounds[1].metrics}["staleness.mean"] == 1
    assert rounds[1].reason == "buffer full: 2 of 2 updates; staleness 1 on average, 1 at most"


async def test_every_version_is_the_weighted_sum_of_its_buffer_over_its_size(house: House) -> None:
    """Five sites of very different speeds; the report says what fell where, and each version follows from it to the bit."""
    model = {"w": torch.linspace(-1, 1, 50), "b.mean": torch.zeros(3), "count": torch.tensor(5)}
    size, num_rounds = 3, 8
    await off_loop(
        house.operator.submit,
        buffered(size, 5, num_rounds, min_clients=5, extra=f"{EXACT}[keep]\nversions = 99\n"),
        model,
    )
    clients = await sites(house, *"abcde")
    sent: dict[str, dict[str, Tensor]] = {}
    began: dict[str, int] = {}

    is_over = threading.Event()

    def do(client: LightClient, assignment: participation_pb2.Assignment, drawn: random.Random) -> None:
        manifest, values = client.model(assignment)
        made = {
            "w": torch.tensor([drawn.randrange(-64, 64) / 64 for _ in range(50)]),
            "b.mean": torch.tensor([drawn.randrange(0, 64) / 64 for _ in range(3)]) - values["b.mean"],
            "count": values["count"] + 1,
        }
        encoded = encode_update(assignment, manifest.specs, lambda spec: made[spec.name])
        client.upload(assignment.assignment_id, encoded)
        sent[assignment.assignment_id], began[assignment.assignment_id] = made, assignment.model.version

    def work(client: LightClient, speed: int) -> None:
        drawn = random.Random(speed)
        while not is_over.is_set():
            for assignment in client.poll(wait_seconds=0.2).assignments:
                is_over.wait(0.3 if drawn.random() < 0.2 * speed else 0.0)
                with suppress(NoLongerNeededError, NotFoundError):  # the run has just ended
                    do(client, assignment, drawn)

    workers = [asyncio.create_task(off_loop(work, client, speed)) for speed, client in enumerate(clients)]
    run = await off_loop(house.operator.wait)
    is_over.set()
    await asyncio.gather(*workers)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    report = await off_loop(house.operator.report)
    folder = house.app.settings.data_dir / "models" / run.run_id
    versions = []
    for number in range(num_rounds + 1):
        with SafetensorsReader(folder / f"{number}.safetensors") as reader:
            versions.append({name: reader.tensor(name) for name in model})
    staleness = []
    for number, round in enumerate(report.rounds):
        updates = received(round)
        assert len(updates) == size
        expected = {name: tensor.double() for name, tensor in versions[number].items()}
        for name in ("w", "b.mean"):
            total = torch.zeros_like(expected[name])
            for client in updates:
                change = sent[client.assignment_id][name].double()
                if name == "b.mean":  # what the site had in the end counts, not what it added
                    change = versions[client.model_version][name].double() + change - versions[number][name].double()
                total += WEIGHTS[client.staleness] * change
            expected[name] += total / (size * ONE)
        for client in updates:
            assert client.model_version == began[client.assignment_id] == number - client.staleness
            staleness.append(client.staleness)
        assert versions[number + 1]["w"].equal(expected["w"].float())
        torch.testing.assert_close(versions[number + 1]["b.mean"], expected["b.mean"].float(), rtol=0, atol=1e-6)
        assert versions[number + 1]["count"] == max(
            [versions[number]["count"], *(sent[client.assignment_id]["count"] for client in updates)]
        )
    assert max(staleness) > 0
    assert len({client.assignment_id for round in report.rounds for client in received(round)}) == size * num_rounds


async def test_a_variance_stays_one_when_late_sites_have_measured_the_same(house: House) -> None:
    """Changes on top of changes would take it to 10 - 9 - 9 / sqrt 2."""
    await off_loop(
        house.operator.submit, buffered(1, 2, 3, min_clients=2), {"w": torch.zeros(2), "b.var": torch.full((2,), 10.0)}
    )
    a, b = await sites(house, "a", "b")
    first = await given(a, b)

    def measured(client: LightClient, assignment: participation_pb2.Assignment) -> None:
        manifest, values = client.model(assignment)
        change = {"w": torch.ones(2), "b.var": 1.0 - values["b.var"]}
        client.upload(
            assignment.assignment_id, encode_update(assignment, manifest.specs, lambda spec: change[spec.name])
        )

    await off_loop(measured, a, first[0])
    await until(lambda: house.operator.run().model_version == 1)
    await off_loop(measured, b, first[1])
    await until(lambda: house.operator.run().model_version == 2)
    with SafetensorsReader(house.app.settings.data_dir / "models" / first[0].run_id / "2.safetensors") as reader:
        assert reader.tensor("b.var").tolist() == [1.0, 1.0]
        assert reader.tensor("w").tolist() == [1 + WEIGHTS[1] / ONE] * 2


async def test_server_optimizers_step_with_what_a_buffer_gives(house: House) -> None:
    extra = EXACT + '[server_optimizer]\nkind = "momentum"\nmomentum = 0.5\n'
    await off_loop(house.operator.submit, buffered(1, 2, 3, min_clients=2, extra=extra))
    a, b = await sites(house, "a", "b")
    first = await given(a, b)
    await off_loop(answer, a, 0.5, 1, first[0])
    assert await version(house, 1) == 0.5
    await off_loop(answer, b, 0.5, 1, first[1])
    moved = 0.5 + 0.25 + 0.5 * WEIGHTS[1] / ONE
    assert await version(house, 2) == pytest.approx(moved, abs=1e-7)


# Staleness


async def test_work_that_is_too_late_is_called_off_when_it_is(house: House) -> None:
    await off_loop(house.operator.submit, buffered(size=1, concurrency=2, max_staleness=1, min_clients=2))
    a, slow = await sites(house, "a", "slow")
    first, late = await given(a, slow)
    await off_loop(answer, a, 0.5, 1, first)
    await until(lambda: house.operator.run().model_version == 1)
    going_on = await off_loop(slow.report_progress, late.assignment_id, phase=3, done=1, total=9)
    assert not going_on.should_stop
    await off_loop(answer, a, 0.5)
    reason = "2 versions were committed since, more than rounds.max_staleness = 1"
    told = await off_loop(slow.poll, held=(late.assignment_id,), wait_seconds=60)
    assert [(d.assignment_id, d.reason) for d in told.dropped] == [(late.assignment_id, reason)]
    with pytest.raises(NoLongerNeededError, match="2 versions were committed since"):
        await off_loop(slow.upload, late.assignment_id, encode_update(late, (), constant(0.5)))
    # Its site is asked anew, with what is the newest.
    again = await off_loop(slow.next_assignment)
    assert again.model.version >= 2
    await off_loop(answer, slow, 0.5, 1, again)
    await until(lambda: house.operator.run().model_version == 3)


async def test_what_somebody_works_on_is_kept_and_goes_when_the_work_is_done(house: House) -> None:
    extra = "[keep]\nversions = 1\n"
    await off_loop(
        house.operator.submit, buffered(size=1, concurrency=2, min_clients=2, extra=extra), {"w": torch.zeros(3000)}
    )
    a, slow = await sites(house, "a", "slow")
    first, late = await given(a, slow)
    folder = house.app.settings.data_dir / "models" / first.run_id

    def kept() -> list[int]:
        return sorted(int(path.stem) for path in folder.glob("*.safetensors"))

    await off_loop(answer, a, 0.5, 1, first)
    for number in (1, 2, 3):
        await until(lambda number=number: kept() == [0, number])
        assert len((await off_loop(house.operator.report)).models) == number + 1
        await off_loop(answer, a, 0.5)
    # A site that lost what it had fetched gets the old version once more, whole.
    again = (await off_loop(slow.poll, wait_seconds=0)).assignments[0]
    assert (again.assignment_id, again.model.version) == (late.assignment_id, 0)
    _, values = await off_loop(slow.model, again)
    assert values["w"].unique().tolist() == [0.0]
    await until(lambda: kept() == [0, 4])
    await off_loop(answer, slow, 0.25, 1, again)
    await until(lambda: kept() == [4, 5])  # the other one works on version 4
    staleness = [[c.staleness for c in received(round)] for round in (await off_loop(house.operator.report)).rounds[:5]]
    assert staleness == [[0], [0], [0], [0], [4]]


# Who is at work


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
async def slow_house(tmp_path: Path, clock: MovableClock) -> AsyncIterator[House]:
    async with open_house(tmp_path / "data", clock, lease_seconds=30) as house:
        yield house


def at_work(house: House) -> list[str]:
    """Names of those with an assignment, in the newest round's order."""
    round = house.operator.report().rounds[-1]
    return [c.client_name for c in round.clients if c.state == runs_pb2.ASSIGNMENT_STATE_OPEN]


async def test_no_more_than_the_concurrency_are_at_work_and_whoever_ends_is_followed_by_another(house: House) -> None:
    await off_loop(house.operator.submit, buffered(size=9, concurrency=2, selection="round_robin"))
    clients = dict(zip("abc", await sites(house, *"abc"), strict=True))
    given_to = {name: asyncio.create_task(off_loop(client.next_assignment)) for name, client in clients.items()}
    await until(lambda: len(house.operator.report().rounds) == 1)
    await until(lambda: len(at_work(house)) == 2)
    name, stays = await off_loop(at_work, house)
    [other] = set("abc") - {name, stays}
    await off_loop(answer, clients[name], 0.5, 1, await given_to[name])
    await until(lambda: set(at_work(house)) == {stays, other})
    await off_loop(answer, clients[stays], 0.5, 1, await given_to[stays])
    await until(lambda: len(at_work(house)) == 2)
    assert other in await off_loop(at_work, house)
    await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="test"))
    for client in clients.values():
        client.close()
    await asyncio.gather(*given_to.values(), return_exceptions=True)


async def test_who_is_silent_is_replaced_and_counts_all_the_same_and_who_is_over_the_deadline_does_not(
    slow_house: House, clock: MovableClock
) -> None:
    house = slow_house
    await off_loop(house.operator.submit, buffered(size=9, concurrency=2, min_clients=2))
    a, silent = await sites(house, "a", "silent")
    first, late = await given(a, silent)
    other = await off_loop(house.client, "other")
    await off_loop(other.poll, wait_seconds=0)
    assert set(await off_loop(at_work, house)) == {"a", "silent"}
    clock.advance(31)  # the lease is 30 s
    for client, assignment in ((a, first), (other, None)):
        held = (assignment.assignment_id,) if assignment is not None else ()
        await off_loop(client.poll, held=held, wait_seconds=0)
    replacing = await off_loop(other.next_assignment)
    assert set(await off_loop(at_work, house)) == {"a", "silent", "other"}
    await off_loop(answer, silent, 0.5, 1, late)
    assert [c.client_name for c in received((await off_loop(house.operator.report)).rounds[0])] == ["silent"]
    # Nobody is asked in its place: a and other are at work, as many as there should be.
    assert not (await off_loop(silent.poll, wait_seconds=0.5)).assignments
    clock.advance(30)  # a is 61 s old by now, other half of it; the deadline is 60 s
    reason = "no update within the deadline of 60 s"
    told = await off_loop(a.poll, held=(first.assignment_id,), wait_seconds=20)
    assert [(d.assignment_id, d.reason) for d in told.dropped] == [(first.assignment_id, reason)]
    await off_loop(silent.next_assignment)
    with pytest.raises(NoLongerNeededError, match=reason):
        await off_loop(a.upload, first.assignment_id, encode_update(first, (), constant(0.5)))
    assert not (await off_loop(a.poll, wait_seconds=0.5)).assignments, "not again for the same buffer"
    await off_loop(answer, other, 0.5, 1, replacing)


async def test_who_fails_is_not_asked_again_for_the_same_buffer_and_with_nobody_left_it_fails(house: House) -> None:
    text = buffered(size=2, concurrency=2, min_clients=2).replace("[schedule]", "quorum = 2\n[schedule]")
    await off_loop(house.operator.submit, text)
    a, b = await sites(house, "a", "b")
    first, second = await given(a, b)
    said = {"kind": participation_pb2.FAILURE_KIND_WORKLOAD, "message": "no images"}
    await off_loop(a.report_failure, first.assignment_id, **said)
    assert not (await off_loop(a.poll, wait_seconds=0.5)).assignments
    await until(lambda: house.operator.run().reason == "0 of 2 updates; waiting for b")
    await off_loop(answer, b, 0.5, 1, second)
    again = await off_loop(b.next_assignment)  # whoever delivers is asked on
    await off_loop(b.report_failure, again.assignment_id, **said)
    # The next buffer is open to both, and the failed one's update is gone with it.
    given_again = await given(a, b)
    assert [each.round for each in given_again] == [2, 2]
    for client, assignment in zip((a, b), given_again, strict=True):
        await off_loop(client.report_failure, assignment.assignment_id, **said)
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FAILED
    failures = "failed: a (WORKLOAD: no images), b (WORKLOAD: no images)"
    assert run.reason == f"2 rounds in a row failed; the last: nobody left to ask: 0 of 2 updates, {failures}"
    rounds = (await off_loop(house.operator.report)).rounds
    assert [round.reason for round in rounds] == [
        f"nobody left to ask: {count} of 2 updates, {failures}" for count in (1, 0)
    ]


async def test_a_buffered_run_leaves_others_their_turn(house: House) -> None:
    """Three sites; a run that takes them again as soon as they are free, and one that needs all of them at once."""
    await off_loop(house.operator.submit, buffered(size=2, concurrency=3, max_rounds=999, name="always"))
    clients = await sites(house, "a", "b", "c")
    is_over = asyncio.Event()

    async def work(client: LightClient) -> None:
        while not is_over.is_set():
            for assignment in (await off_loop(client.poll, wait_seconds=0.2)).assignments:
                await off_loop(answer, client, 0.25, 1, assignment)

    workers = [asyncio.create_task(work(client)) for client in clients]
    await until(lambda: house.operator.run("always").model_version >= 2)
    await off_loop(house.operator.submit, config(name="other", size=3, max_rounds=3))
    run = await off_loop(house.operator.wait, "other")
    assert run.state == runs_pb2.RUN_STATE_FINISHED
    seen = (await off_loop(house.operator.run, "always")).model_version
    await until(lambda: house.operator.run("always").model_version > seen)
    is_over.set()
    await asyncio.gather(*workers)
    for round in (await off_loop(house.operator.report, "other")).rounds:
        assert len(received(round)) == 3


# While a version is made or measured


async def test_what_comes_while_a_version_is_made_falls_into_the_next_buffer_and_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = asyncio.Event()

    async def hang(run: LiveRun) -> None:
        making.set()
        await asyncio.Event().wait()

    async with open_house(tmp_path / "data") as house:
        with monkeypatch.context() as patched:
            patched.setattr(LiveRun, "_aggregate_and_commit", hang)
            await off_loop(house.operator.submit, buffered(size=1, concurrency=3))
            a, b, c = await sites(house, "a", "b", "c")
            first = await given(a, b, c)
            await off_loop(answer, a, 0.5, 1, first[0])
            await asyncio.wait_for(making.wait(), 20)
            await off_loop(answer, b, 0.25, 1, first[1])
            await off_loop(answer, c, 0.125, 1, first[2])
            assert not (await off_loop(a.poll, wait_seconds=0.3)).assignments, "a new version is about to be there"
    async with open_house(tmp_path / "data") as house:
        run = await until(lambda: house.operator.run().model_version == 3 and house.operator.run())
        rounds = (await off_loop(house.operator.report)).rounds[:3]
        assert [[(u.client_name, u.staleness) for u in received(round)] for round in rounds] == [
            [("a", 0)],
            [("b", 1)],
            [("c", 2)],
        ]
        assert await version(house, 1) == 0.5
        assert await version(house, 2) == 0.5 + 0.25 * WEIGHTS[1] / ONE
        assert run.state == runs_pb2.RUN_STATE_ACTIVE


async def test_work_goes_on_while_a_version_is_evaluated_and_a_target_ends_the_run(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, may_end = asyncio.Event(), asyncio.Event()

    async def measure(run: LiveRun, path: Path) -> tuple[Metrics, str]:
        measuring.set()
        await may_end.wait()
        with SafetensorsReader(path) as reader:
            return {"accuracy": float(reader.tensor("w")[0])}, ""

    monkeypatch.setattr(LiveRun, "_evaluate_here", measure)
    extra = EXACT + "[stop]\ntarget = 0.6\n"
    await off_loop(house.operator.submit, buffered(size=1, concurrency=2, min_clients=2, at="coordinator", extra=extra))
    a, b = await sites(house, "a", "b")
    first = await given(a, b)
    await off_loop(answer, a, 0.5, 1, first[0])
    await asyncio.wait_for(measuring.wait(), 20)
    again = await off_loop(a.next_assignment)
    assert again.model.version == 1
    await off_loop(answer, b, 0.25, 1, first[1])
    assert (await off_loop(house.operator.run)).model_version == 1
    may_end.set()
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED
    assert (run.model_version, run.best_version) == (2, 2)
    told = await off_loop(a.poll, held=(again.assignment_id,), wait_seconds=20)
    assert [d.assignment_id for d in told.dropped] == [again.assignment_id]
    measured = [{m.name: m.value for m in model.metrics} for model in (await off_loop(house.operator.report)).models]
    assert measured == [{}, {"accuracy": 0.5}, {"accuracy": pytest.approx(0.5 + 0.25 * WEIGHTS[1] / ONE, abs=1e-7)}]


# Submission


async def test_a_submission_says_how_updates_will_count(house: House) -> None:
    made = await off_loop(house.operator.submit, buffered(max_staleness=5))
    assert made.notices[0] == (
        "an update that is 0, 1, 2, 5 versions late counts 1, 0.707, 0.577, 0.408; one that is more than 5 late is refused"
    )
    statistics = {"w": torch.zeros(2), "b.mean": torch.zeros(2)}
    bound = buffered(name="bound").replace("[evaluation]", "bound = 4.0\n[evaluation]")
    with pytest.raises(ConfigError, match=r"running statistics \('b.mean'\), .*: delete it"):
        await off_loop(house.operator.submit, bound, statistics)
    await off_loop(house.operator.submit, bound)
