"""The coordinator as a whole: starting, starting again in every state of a run, draining, disks that fill, files that go."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from benchmarks.light_client import LightClient, constant, encode_update
from benchmarks.light_operator import Operator, model_payload
from fed_core.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    DiskFullError,
    InvalidError,
    NotFoundError,
    UnavailableError,
    WrongPhaseError,
)
from fed_server.app import App
from fed_server.rounds.coordinator import Coordinator
from fed_server.rounds.run import LiveRun
from fed_server.settings import ServerSettings
from fedstream.v1 import common_pb2, participation_pb2, runs_pb2, transfer_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import MovableClock, answer, back_in, member, open_house, until, weights

CANCEL = runs_pb2.CancelRunRequest(run="test")


def files(house: House, folder: str) -> list[str]:
    """Names of the files in a folder of the data directory."""
    return sorted(path.name for path in (house.app.settings.data_dir / folder).rglob("*") if path.is_file())


async def enroll(house: House, *names: str) -> tuple[list[LightClient], list[str]]:
    """New clients with their credentials."""
    clients = [LightClient(house.app.address) for _ in names]
    tokens = [await off_loop(c.enroll, house.app.tokens.join, name) for c, name in zip(clients, names, strict=True)]
    return clients, tokens


async def given(*clients: LightClient) -> list[participation_pb2.Assignment]:
    return await asyncio.gather(*(off_loop(client.next_assignment) for client in clients))


# Starting


async def test_a_port_in_use_is_named_with_the_cure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"--listen {listen}: .*in use"):
            async with App(ServerSettings(data_dir=tmp_path / "data", listen=listen)):
                pass
    async with open_house(tmp_path / "data", listen=listen):
        pass  # the failed start left nothing behind


async def test_two_coordinators_do_not_share_a_port(house: House, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in use"):
        async with App(ServerSettings(data_dir=tmp_path / "other", listen=house.app.address)):
            pass


async def test_two_coordinators_do_not_share_a_data_directory(house: House) -> None:
    with pytest.raises(ConflictError, match=rf"in use by process {os.getpid()}"):
        async with App(ServerSettings(data_dir=house.app.settings.data_dir, listen="127.0.0.1:0")):
            pass
    await off_loop(
        house.operator.call, "ListRuns", runs_pb2.ListRunsRequest()
    )  # the first is unharmed, socket included


async def test_a_data_directory_of_another_version_is_left_alone(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data"):
        pass
    (tmp_path / "data" / "format").write_text("fedstream-data 99\n")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    with pytest.raises(ConfigError, match=r"'fedstream-data 99'.*start the fedstream that wrote it"):
        async with open_house(tmp_path / "data"):
            pass
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


async def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex"):
        async with open_house(tmp_path):
            pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


async def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data"):
        pass
    (tmp_path / "data" / "state.sqlite").write_bytes(b"not a database, but long enough to be one" * 200)
    for stale in (tmp_path / "data").glob("state.sqlite-*"):
        stale.unlink()
    with pytest.raises(ConfigError, match=r"state\.sqlite.*damaged"):
        async with open_house(tmp_path / "data"):
            pass


async def test_a_path_too_long_for_the_socket_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"longer than the 107 bytes"):
        async with open_house(tmp_path / ("x" * 100)):
            pass


# Starting again


async def test_a_run_that_waits_for_clients_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=2))
        (first, second), tokens = await enroll(house, "a", "b")
        await off_loop(first.poll, wait_seconds=0)
        await until(lambda: "1 alive (a)" in house.operator.run().reason)
        del second
    async with open_house(tmp_path / "data") as house:
        # A cohort is not drawn before those who were there had time to call again.
        await until(lambda: "waiting for a to call again" in house.operator.run().reason)
        clients = [back_in(house, token) for token in tokens]
        for client, assignment in zip(clients, await given(*clients), strict=True):
            await off_loop(answer, client, 0.25, 1, assignment)
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
        assert await off_loop(weights, house, 1) == 0.25


async def test_a_round_in_training_goes_on_after_a_restart_with_what_it_has(tmp_path: Path) -> None:
    model = {"w": torch.zeros(700_000)}
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=3), model)
        clients, tokens = await enroll(house, "a", "b", "c")
        before = await given(*clients)
        specs = (await off_loop(clients[0].model, before[0]))[0].specs
        updates = [
            encode_update(a, specs, constant(value), 2) for a, value in zip(before, (0.5, 0.25, 0.25), strict=True)
        ]
        receipt = await off_loop(clients[0].upload, before[0].assignment_id, updates[0])
        with pytest.raises(CorruptError):
            await off_loop(clients[1].upload, before[1].assignment_id, updates[1], until=2_000_000, retry=False)
    async with open_house(tmp_path / "data") as house:
        clients = [back_in(house, token) for token in tokens]
        assert not (await off_loop(clients[0].poll, wait_seconds=0)).assignments
        assert await off_loop(clients[0].upload, before[0].assignment_id, updates[0]) == receipt
        assert (await off_loop(clients[1].poll, wait_seconds=0)).assignments[0].plan == before[1].plan
        offset = (await off_loop(clients[1].get_upload, before[1].assignment_id, updates[1].digest)).accepted_offset
        assert 1_000_000 < offset < 2_000_000
        await off_loop(clients[1].upload, before[1].assignment_id, updates[1], offset=offset)
        await off_loop(clients[2].upload, before[2].assignment_id, updates[2])
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
        assert await off_loop(weights, house, 1) == pytest.approx(1 / 3, abs=1e-7)
        report = await off_loop(house.operator.report)
        assert report.models[1].num_updates == 3


async def test_an_update_that_was_published_but_not_recorded_is_taken_without_sending_it_again(tmp_path: Path) -> None:
    """As a crash between the two leaves it."""
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=1))
        (client,), (token,) = await enroll(house, "site")
        assignment = await off_loop(client.next_assignment)
        specs = (await off_loop(client.model, assignment))[0].specs
        update = encode_update(assignment, specs, constant(0.25))
    (tmp_path / "data" / "updates" / f"{assignment.assignment_id}.update").write_bytes(update.data)
    async with open_house(tmp_path / "data") as house:
        client = back_in(house, token)
        offset = (await off_loop(client.get_upload, assignment.assignment_id, update.digest)).accepted_offset
        assert offset == len(update.data)
        await off_loop(client.upload, assignment.assignment_id, update, offset=offset)
        await off_loop(house.operator.wait)
        assert await off_loop(weights, house, 1) == 0.25


async def test_a_stored_update_that_rotted_while_the_coordinator_was_down_is_set_aside_by_name(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=2, quorum=1))
        clients, tokens = await enroll(house, "a", "b")
        first, second = await given(*clients)
        await off_loop(answer, clients[0], 0.5, 1, first)
    stored = tmp_path / "data" / "updates" / f"{first.assignment_id}.update"
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    async with open_house(tmp_path / "data") as house:
        await off_loop(answer, back_in(house, tokens[1]), 0.25, 1, second)
        await off_loop(house.operator.wait)
        assert "copy of this update is damaged" in (await off_loop(member, house, "a")).reason
        assert await off_loop(weights, house, 1) == 0.25


async def test_an_evaluation_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=2, at="clients"))
        clients, tokens = await enroll(house, "a", "b")
        for client, assignment in zip(clients, await given(*clients), strict=True):
            await off_loop(answer, client, 0.25, 1, assignment)
        mine, other = await given(*clients)
        assert mine.kind == common_pb2.ASSIGNMENT_KIND_EVALUATE
        await off_loop(clients[0].report_evaluation, mine.assignment_id, 10, accuracy=0.5)
    async with open_house(tmp_path / "data") as house:
        clients = [back_in(house, token) for token in tokens]
        await off_loop(clients[0].report_evaluation, mine.assignment_id, 99, accuracy=1.0)  # a repeat: the first stands
        (again,) = (await off_loop(clients[1].poll, wait_seconds=0)).assignments
        assert again.assignment_id == other.assignment_id
        await off_loop(clients[1].model, again)
        await off_loop(clients[1].report_evaluation, other.assignment_id, 30, accuracy=0.75)
        await off_loop(house.operator.wait)
        model = (await off_loop(house.operator.report)).models[1]
        assert {m.name: m.value for m in model.metrics} == {"accuracy": (10 * 0.5 + 30 * 0.75) / 40}


async def test_a_coordinator_that_was_down_costs_nobody_the_deadline(tmp_path: Path) -> None:
    clock = MovableClock()
    async with open_house(tmp_path / "data", clock, lease_seconds=3600) as house:
        await off_loop(house.operator.submit, config(size=2, quorum=2, deadline=100))
        clients, tokens = await enroll(house, "a", "b")
        first, second = await given(*clients)
        await off_loop(answer, clients[0], 0.25, 1, first)
        clock.advance(60)
        await until(lambda: 0 < house.operator.report().rounds[0].deadline_seconds <= 40)
    clock.advance(10_000)
    async with open_house(tmp_path / "data", clock, lease_seconds=3600) as house:
        left = (await off_loop(house.operator.report)).rounds[0].deadline_seconds
        assert 30 < left <= 40.5  # uptime is counted, and was written down
        await off_loop(answer, back_in(house, tokens[1]), 0.25, 1, second)
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED


async def test_a_site_that_reports_progress_before_it_polls_again_is_not_taken_for_another(tmp_path: Path) -> None:
    """After a restart the site at work is still one with the run's workload."""
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=1, max_rounds=2))
        (client,), (token,) = await enroll(house, "site")
        assignment = await off_loop(client.next_assignment)
    async with open_house(tmp_path / "data") as house:
        client = back_in(house, token)
        await off_loop(client.report_progress, assignment.assignment_id, phase=common_pb2.WORK_PHASE_TRAINING, done=1)
        await off_loop(answer, client, 0.25, 1, assignment)
        await until(lambda: house.operator.run().round == 2)  # without a poll
        await off_loop(answer, client)
        assert (await off_loop(house.operator.wait)).model_version == 2


async def test_what_is_over_is_read_as_it_ended_after_a_restart(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=1))
        (client,), _ = await enroll(house, "site")
        await off_loop(answer, client)
        await off_loop(house.operator.wait)
        before = await off_loop(house.operator.report)
    async with open_house(tmp_path / "data") as house:
        after = await off_loop(house.operator.report)
        for report in (before, after):
            for client in report.rounds[0].clients:
                client.is_alive = False
        assert after == before
        with pytest.raises(ConflictError, match="'test' exists already \\(finished\\); choose another name"):
            await off_loop(house.operator.submit, config(size=1))


# Submitting and cancelling


async def test_a_submission_that_is_repeated_gives_the_run_that_the_first_made(house: House) -> None:
    first = await off_loop(house.operator.submit, config(size=1), None, "r" * 32)
    assert (await off_loop(house.operator.submit, config(size=1), None, "r" * 32)).run.run_id == first.run.run_id
    with pytest.raises(ConflictError, match="'test' exists already"):
        await off_loop(house.operator.submit, config(size=1))


async def test_the_report_of_a_run_that_has_just_ended_has_no_round_that_will_never_be(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_away = asyncio.Event()
    drive = LiveRun.drive

    async def drive_and_linger(self: LiveRun) -> None:
        await drive(self)
        await put_away.wait()

    monkeypatch.setattr(LiveRun, "drive", drive_and_linger)
    try:
        await off_loop(house.operator.submit, config(size=1))
        client = await off_loop(house.client, "site")
        await off_loop(answer, client)
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
        report = await off_loop(house.operator.report)
    finally:
        put_away.set()
    assert [(round.round, round.state) for round in report.rounds] == [(1, runs_pb2.ROUND_STATE_COMMITTED)]


async def test_a_submission_whose_operator_hangs_up_still_has_its_driver(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled at the worst moment: the store has the run, nobody has heard of it."""
    reached, go_on = asyncio.Event(), asyncio.Event()
    adopt = Coordinator._adopt

    async def slow_adopt(self: Coordinator, *args: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await adopt(self, *args)

    monkeypatch.setattr(Coordinator, "_adopt", slow_adopt)
    async with grpc.aio.insecure_channel(f"unix:{house.app.socket_path}") as channel:
        create = channel.stream_unary("/fedstream.v1.Runs/CreateRun", lambda message: message.SerializeToString(), None)
        digest, data = model_payload({"w": torch.zeros(10)})
        ref = common_pb2.PayloadRef(digest=digest, total_bytes=len(data), kind=common_pb2.PAYLOAD_KIND_MODEL)
        header = runs_pb2.CreateRunHeader(request_id="r" * 32, config_toml=config(size=1), model=ref)
        chunk = transfer_pb2.Chunk(offset=0, data=data)
        submission = create(iter([runs_pb2.CreateRunRequest(header=header), runs_pb2.CreateRunRequest(chunk=chunk)]))
        await reached.wait()
        submission.cancel()
    go_on.set()
    client = await off_loop(house.client, "site")
    await off_loop(answer, client)
    assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "TOML"),
        (config(size=1) + "\nsurprise = 1\n", "surprise"),
        (config(size=1).replace("size = 1", "size = 0"), r"cohort\.size"),
        (
            config(size=1, extra='[aggregation]\nkind = "mean"\nmerge = [{ pattern = "nothing*", rule = "mean" }]\n'),
            "matches no tensor",
        ),
        (config(size=60000, extra='[aggregation]\nkind = "mean"\nmax_weight = 1000000\n'), r"aggregation\.max_weight"),
        (
            config(size=1000, extra='[aggregation]\nkind = "mean"\nimportance = { site = 1000000 }\n'),
            r"aggregation\.importance: 1,000,000 is beyond .* 134,217: lower it",
        ),
    ],
)
async def test_a_config_that_cannot_be_is_refused_with_its_field(house: House, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        await off_loop(house.operator.submit, text)
    assert not (await off_loop(house.operator.call, "ListRuns", runs_pb2.ListRunsRequest())).runs
    assert files(house, "models") == files(house, "payloads") == []


async def test_a_model_that_is_not_finite_makes_no_run(house: House) -> None:
    with pytest.raises(InvalidError, match=r"'w'.*NaN or infinity"):
        await off_loop(house.operator.submit, config(size=1), {"w": torch.tensor([1.0, float("nan")])})
    assert files(house, "models") == files(house, "payloads") == []


async def test_a_run_is_cancelled_in_any_state_and_only_once(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1))
    assert (await off_loop(house.operator.call, "CancelRun", CANCEL)).run.state == runs_pb2.RUN_STATE_CANCELLED
    await off_loop(house.operator.submit, config(name="second", size=1, at="clients"))
    client = await off_loop(house.client, "site")
    first = await off_loop(client.next_assignment)
    cancel = runs_pb2.CancelRunRequest(run="second")
    cancelled = (await off_loop(house.operator.call, "CancelRun", cancel)).run
    assert (cancelled.state, cancelled.reason) == (runs_pb2.RUN_STATE_CANCELLED, "cancelled by an operator")
    assert (await off_loop(house.operator.call, "CancelRun", cancel)).run.state == runs_pb2.RUN_STATE_CANCELLED
    assert (await off_loop(house.operator.report, "second")).rounds[0].state == runs_pb2.ROUND_STATE_FAILED
    assert (await off_loop(client.report_progress, first.assignment_id)).should_stop
    await off_loop(house.operator.submit, config(name="third", size=1, at="clients"))
    await off_loop(answer, client)
    await off_loop(client.next_assignment)  # it evaluates
    cancelled = (await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="third"))).run
    assert (cancelled.state, cancelled.model_version) == (runs_pb2.RUN_STATE_CANCELLED, 1)
    await off_loop(house.operator.submit, config(name="fourth", size=1))
    await off_loop(answer, client)
    await off_loop(house.operator.wait, "fourth")
    with pytest.raises(WrongPhaseError, match="is over already: finished"):
        await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="fourth"))
    with pytest.raises(NotFoundError, match="no run 'fifth'; there are test, second, third, fourth"):
        await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="fifth"))


async def test_a_run_cancelled_while_the_deadline_strikes_ends_cancelled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = MovableClock()
    async with open_house(tmp_path / "data", clock, lease_seconds=3600) as house:
        client = await off_loop(house.client, "site")
        for number in range(5):
            name = f"run-{number}"
            await off_loop(house.operator.submit, config(name=name, size=1, deadline=10, max_rounds=9))
            await off_loop(client.next_assignment)
            clock.advance(11)
            run = (await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run=name))).run
            assert run.state == runs_pb2.RUN_STATE_CANCELLED
    assert "internal error" not in caplog.text


# Stopping


async def test_a_coordinator_that_drains_lets_a_transfer_end_and_takes_no_new_work(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data", drain_seconds=20) as house:
        await off_loop(house.operator.submit, config(size=2, quorum=2))
        (a, b), tokens = await enroll(house, "a", "b")
        first, second = await given(a, b)
        specs = (await off_loop(a.model, first))[0].specs
        update = encode_update(first, specs, constant(0.25))
        polling = asyncio.create_task(off_loop(b.poll, held=(second.assignment_id,), wait_seconds=60))
        reached = asyncio.Event()
        loop = asyncio.get_running_loop()
        held_back = slow_upload(a, first.assignment_id, update, lambda: loop.call_soon_threadsafe(reached.set), polling)
        upload = asyncio.create_task(off_loop(held_back))
        await reached.wait()
        await house.app.__aexit__(None, None, None)
        # A call that had not arrived yet is cancelled by gRPC, to be made again all the same.
        with pytest.raises(UnavailableError, match=r"stopping; it will be back|CANCELLED"):
            await polling
        receipt = await upload
    async with open_house(tmp_path / "data") as house:
        assert (
            await off_loop(back_in(house, tokens[0]).get_upload, first.assignment_id, update.digest)
        ).receipt == receipt


def slow_upload(
    client: LightClient, assignment_id: str, update: Any, reached: Any, until_done: asyncio.Task[Any]
) -> Any:
    """An upload whose last bytes come only after another call was answered."""

    def frames() -> Iterator[bytes]:
        ref = common_pb2.PayloadRef(digest=update.digest, total_bytes=len(update.data))
        header = transfer_pb2.UploadHeader(assignment_id=assignment_id, payload=ref)
        yield transfer_pb2.UploadRequest(header=header).SerializeToString()
        yield transfer_pb2.UploadRequest(chunk=transfer_pb2.Chunk(data=update.data[:50])).SerializeToString()
        reached()
        while not until_done.done():
            time.sleep(0.01)
        rest = transfer_pb2.Chunk(offset=50, data=update.data[50:])
        yield transfer_pb2.UploadRequest(chunk=rest).SerializeToString()

    return lambda: client._upload(frames(), metadata=client._metadata, timeout=60).receipt


async def test_a_stopped_coordinator_leaves_no_socket_and_answers_nobody(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        address, path = house.app.address, house.app.socket_path
    assert not path.exists()
    operator = Operator(address, "x")
    with pytest.raises(UnavailableError):
        await off_loop(operator.call, "ListRuns", runs_pb2.ListRunsRequest())
    operator.channel.close()


# Files that go


async def test_only_the_newest_versions_are_kept_and_no_update_after_its_round(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, max_rounds=4, extra="[keep]\nversions = 2\n"))
    client = await off_loop(house.client, "site")
    for _ in range(3):
        await off_loop(answer, client)
    fourth = await off_loop(client.next_assignment)
    await until(lambda: files(house, "models") == ["2.safetensors", "3.safetensors"])
    await until(lambda: files(house, "payloads") == [f"{fourth.model.digest.hex()}.payload"])
    assert files(house, "updates") == files(house, "uploads") == []
    await off_loop(answer, client, 0.25, 1, fourth)
    await off_loop(house.operator.wait)
    await until(lambda: files(house, "models") == ["3.safetensors", "4.safetensors"])
    await until(lambda: files(house, "payloads") == [])
    assert files(house, "updates") == []
    models = (await off_loop(house.operator.report)).models
    assert [m.version for m in models if m.is_available] == [3, 4]
    stream = house.operator.stub.DownloadModel(runs_pb2.DownloadModelRequest(run="test", version=1), timeout=20)
    with pytest.raises(grpc.RpcError, match=r"version 1 of run test is not kept; there are 3, 4"):
        await off_loop(list, stream)


async def test_a_start_sweeps_what_nobody_needs_and_nothing_else(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(size=2, quorum=1))
        clients, _ = await enroll(house, "a", "b")
        first, second = await given(*clients)
        await off_loop(answer, clients[0], 0.25, 1, first)
        specs = (await off_loop(clients[1].model, second))[0].specs
        update = encode_update(second, specs, constant(0.25))
        with pytest.raises(CorruptError):
            await off_loop(clients[1].upload, second.assignment_id, update, until=len(update.data) - 1, retry=False)
    kept = {path for path in (tmp_path / "data").rglob("*") if path.is_file()}
    orphans = [
        tmp_path / "data" / "uploads" / "gone.part",
        tmp_path / "data" / "updates" / "gone.update",
        tmp_path / "data" / "payloads" / f"{'0' * 64}.payload",
        tmp_path / "data" / "models" / first.run_id / "7.safetensors",
        tmp_path / "data" / "models" / first.run_id / ".1.safetensors.dead.tmp",
    ]
    for path in orphans:
        path.write_bytes(b"left by a crash")
    async with open_house(tmp_path / "data"):
        await until(lambda: not any(path.exists() for path in orphans))
        assert all(path.exists() for path in kept if path.suffix not in (".sqlite-wal", ".sqlite-shm"))


# Disks that fill


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    """Takes all space but a little."""
    ballast = disk / "ballast"
    status = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, status.f_bavail * status.f_frsize - leave_bytes))
    return ballast


BIG = {"w": torch.zeros(500_000)}


async def test_an_upload_to_a_full_disk_is_told_so_and_goes_on_when_there_is_space(small_disk: Path) -> None:
    async with open_house(small_disk / "data") as house:
        await off_loop(house.operator.submit, config(size=1), BIG)
        client = await off_loop(house.client, "site")
        assignment = await off_loop(client.next_assignment)
        specs = (await off_loop(client.model, assignment))[0].specs
        update = encode_update(assignment, specs, constant(0.25))
        ballast = fill(small_disk, 500_000)
        with pytest.raises(DiskFullError, match=r"an update needs 2\.0 MB, but only 0\.\d MB are free"):
            await off_loop(client.upload, assignment.assignment_id, update, retry=False)
        ballast.unlink()
        await off_loop(client.upload, assignment.assignment_id, update)
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
        assert await off_loop(weights, house, 1) == 0.25


async def test_a_disk_that_fills_in_mid_upload_keeps_what_verified(small_disk: Path) -> None:
    async with open_house(small_disk / "data") as house:
        await off_loop(house.operator.submit, config(size=1), BIG)
        client = await off_loop(house.client, "site")
        assignment = await off_loop(client.next_assignment)
        specs = (await off_loop(client.model, assignment))[0].specs
        update = encode_update(assignment, specs, constant(0.25))
        ballast: list[Path] = []

        def frames() -> Iterator[bytes]:
            ref = common_pb2.PayloadRef(digest=update.digest, total_bytes=len(update.data))
            header = transfer_pb2.UploadHeader(assignment_id=assignment.assignment_id, payload=ref)
            yield transfer_pb2.UploadRequest(header=header).SerializeToString()
            part = house.app.settings.data_dir / "uploads" / f"{assignment.assignment_id}.part"
            for start in range(0, len(update.data), 2**19):
                chunk = transfer_pb2.Chunk(offset=start, data=update.data[start : start + 2**19])
                yield transfer_pb2.UploadRequest(chunk=chunk).SerializeToString()
                while not ballast and (not part.exists() or part.stat().st_size < start + 2**19):
                    time.sleep(0.01)
                if start >= 2**20 and not ballast:
                    ballast.append(fill(small_disk, 4096))

        with pytest.raises(grpc.RpcError, match="no space left"):
            await off_loop(client._upload, frames(), metadata=client._metadata, timeout=30)
        offset = (await off_loop(client.get_upload, assignment.assignment_id, update.digest)).accepted_offset
        assert offset > 2**20
        ballast[0].unlink()
        await off_loop(client.upload, assignment.assignment_id, update, offset=offset)
        await off_loop(house.operator.wait)
        assert await off_loop(weights, house, 1) == 0.25


async def test_a_run_waits_for_space_to_commit_and_says_so(small_disk: Path) -> None:
    async with open_house(small_disk / "data") as house:
        await off_loop(house.operator.submit, config(size=1), BIG)
        client = await off_loop(house.client, "site")
        assignment = await off_loop(client.next_assignment)
        specs = (await off_loop(client.model, assignment))[0].specs
        update = encode_update(assignment, specs, constant(0.25))
        ballast = fill(small_disk, len(update.data) + 400_000)  # room for the update, not for the next version
        await off_loop(client.upload, assignment.assignment_id, update)
        await until(lambda: "no space left" in house.operator.run().reason)
        assert (await off_loop(house.operator.run)).state == runs_pb2.RUN_STATE_ACTIVE
        ballast.unlink()
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
        assert await off_loop(weights, house, 1) == 0.25


async def test_a_run_too_large_for_the_disk_is_refused(small_disk: Path) -> None:
    async with open_house(small_disk / "data") as house:
        with pytest.raises(DiskFullError, match=r"run 'test' \(its versions and a round's updates\) needs"):
            await off_loop(house.operator.submit, config(size=20), BIG)
        assert files(house, "models") == files(house, "payloads") == []
        await off_loop(house.operator.submit, config(size=1), BIG)
