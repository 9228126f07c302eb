"""What updates leave behind: it stands when its update was counted, and whatever happens there is the old state or the new one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from fed_client.carried import CarriedState, settle_earlier
from fed_client.privacy import Limits, PrivacyLedger, SiteAccount
from fed_client.reports import Outbox, ProgressReporter
from fed_client.spool import Spool
from fed_client.stop import Stop, StoppedError
from fed_client.transport import Transport
from fed_client.work import Held, WorkTable
from fed_client.worker import Uploader
from fed_core import failpoints
from fed_core.errors import InvalidError, NoLongerNeededError, NotFoundError, UnavailableError, UpdateRefusedError
from fedstream.v1 import common_pb2, participation_pb2, transfer_pb2

if TYPE_CHECKING:
    from tests.client.conftest import FakeCoordinator

RUN, SHAPES = "r1", b"f" * 32
MakePayload = Callable[..., tuple[bytes, int]]


@pytest.fixture
def carried(tmp_path: Path) -> CarriedState:
    folder = tmp_path / "carried"
    folder.mkdir()
    return CarriedState(folder, keep=2)


def leave(carried: CarriedState, assignment_id: str, digest: bytes, run: str = RUN, **files: str) -> None:
    """What a trainer and its daemon do."""
    prefix = carried.prefix(run, assignment_id)
    prefix.parent.mkdir(exist_ok=True)
    files = files or {"residual": f"from {assignment_id}"}
    for kind, content in files.items():
        Path(f"{prefix}.{kind}").write_text(content)
    carried.add(run, assignment_id, digest, SHAPES, files)


def standing(carried: CarriedState, run: str = RUN) -> dict[str, str]:
    """What the next training of a run would get, by kind; its file is there."""
    found = carried.promoted(run, SHAPES)
    assert all(path.read_text() == digest for path, digest in found.values())
    return {kind: digest for kind, (_, digest) in found.items()}


def files(tmp_path: Path, run: str = RUN) -> list[str]:
    folder = tmp_path / "carried" / run
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def ids(carried: CarriedState) -> list[str]:
    return [each.assignment_id for each in carried.pending(RUN)]


# -- the folder --------------------------------------------------------------------------------------------------------


def test_what_an_update_left_stands_once_it_was_counted(carried: CarriedState, tmp_path: Path) -> None:
    assert standing(carried) == {}
    leave(carried, "a1", b"1" * 32)
    assert standing(carried) == {}
    carried.settle(RUN, "a1", b"1" * 32)
    assert standing(carried) == {"residual": "from a1"}
    leave(carried, "a2", b"2" * 32)
    assert standing(carried) == {"residual": "from a1"}
    carried.settle(RUN, "a2", b"2" * 32)
    assert standing(carried) == {"residual": "from a2"}
    assert files(tmp_path) == ["a2.residual", "promoted"]
    assert standing(CarriedState(tmp_path / "carried", keep=2)) == {"residual": "from a2"}


def test_settling_twice_changes_nothing(carried: CarriedState) -> None:
    leave(carried, "a1", b"1" * 32)
    for _ in range(2):
        carried.settle(RUN, "a1", b"1" * 32)
    leave(carried, "a2", b"2" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    assert (standing(carried), ids(carried)) == ({"residual": "from a1"}, ["a2"])
    carried.settle(RUN, "unknown", b"1" * 32)
    assert standing(carried) == {"residual": "from a1"}


def test_states_of_all_kinds_stand_together(carried: CarriedState, tmp_path: Path) -> None:
    leave(carried, "a1", b"1" * 32, residual="r", variate="v")
    carried.settle(RUN, "a1", b"1" * 32)
    assert standing(carried) == {"residual": "r", "variate": "v"}
    leave(carried, "a2", b"2" * 32, variate="w")
    carried.settle(RUN, "a2", b"2" * 32)
    assert standing(carried) == {"variate": "w"}
    assert files(tmp_path) == ["a2.variate", "promoted"]


def test_an_update_may_leave_nothing(carried: CarriedState, tmp_path: Path) -> None:
    """The old state went out with it, whatever became of the new one."""
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    carried.add(RUN, "a2", b"2" * 32, SHAPES, {})
    carried.settle(RUN, "a2", b"2" * 32)
    assert standing(carried) == {}
    assert files(tmp_path) == ["promoted"]


def test_what_was_not_counted_is_dropped_and_the_old_state_stays(carried: CarriedState, tmp_path: Path) -> None:
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    leave(carried, "a2", b"2" * 32)
    (tmp_path / "carried" / RUN / "a2.residual.tmp").write_text("half")
    for assignment_id in ("a2", "a2", "a1", "unknown", "../../x"):
        carried.drop(RUN, assignment_id)
    assert standing(carried) == {"residual": "from a1"}
    assert files(tmp_path) == ["a1.residual", "promoted"]


def test_ids_that_begin_alike_are_told_apart(carried: CarriedState, tmp_path: Path) -> None:
    for name in ("a", "a.b", "a.residual"):
        leave(carried, name, b"1" * 32)
    carried.drop(RUN, "a")
    assert ids(carried) == ["a.b", "a.residual"]
    assert files(tmp_path) == ["a.b.json", "a.b.residual", "a.residual.json", "a.residual.residual"]


def test_another_update_than_this_sites_clears_the_run(carried: CarriedState, tmp_path: Path) -> None:
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    leave(carried, "a2", b"2" * 32)
    with structlog.testing.capture_logs() as log:
        carried.settle(RUN, "a2", b"x" * 32)
    assert [each["reason"] for each in log] == ["the coordinator had counted another update than this site's"]
    assert (standing(carried), ids(carried), files(tmp_path)) == ({}, [], [])


def test_other_shapes_clear_the_run(carried: CarriedState, tmp_path: Path) -> None:
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    with structlog.testing.capture_logs() as log:
        assert carried.promoted(RUN, b"g" * 32) == {}
    assert "shapes" in log[0]["reason"]
    assert files(tmp_path) == []


@pytest.mark.parametrize("run", ["", "..", "../x", "a/b"])
def test_a_run_whose_id_could_leave_the_folder_is_refused(carried: CarriedState, run: str) -> None:
    with pytest.raises(InvalidError, match="run id"):
        carried.promoted(run, SHAPES)
    carried.drop(run, "a1")


def test_what_no_record_vouches_for_is_swept(carried: CarriedState, tmp_path: Path) -> None:
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    leave(carried, "a2", b"2" * 32)
    folder = tmp_path / "carried" / RUN
    for name in ("a3.residual", "a4.residual.tmp", "a2.variate", "a5.json.tmp"):
        (folder / name).write_text("half")
    (folder / "bad.json").write_text('{"assignment_id": 3}')
    (folder / "renamed.json").write_bytes((folder / "a2.json").read_bytes())
    empty = tmp_path / "carried" / "r2"
    empty.mkdir()
    (empty / "a1.residual").write_text("half")
    carried.sweep()
    assert files(tmp_path) == ["a1.residual", "a2.json", "a2.residual", "promoted"]
    assert not empty.exists()
    assert (standing(carried), ids(carried)) == ({"residual": "from a1"}, ["a2"])


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"assignment_id": "a1"}', '{"assignment_id": "../x"}'])
def test_a_damaged_record_is_as_none(carried: CarriedState, tmp_path: Path, damage: str) -> None:
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    leave(carried, "a2", b"2" * 32)
    for name in ("promoted", "a2.json"):
        (tmp_path / "carried" / RUN / name).write_text(damage)
    assert (standing(carried), ids(carried)) == ({}, [])
    carried.settle(RUN, "a2", b"2" * 32)
    carried.sweep()
    assert files(tmp_path) == []


def test_the_newest_runs_are_kept_besides_those_at_work(carried: CarriedState, tmp_path: Path) -> None:
    for number in range(5):
        run = f"r{number}"
        leave(carried, "a1", b"1" * 32, run)
        os.utime(tmp_path / "carried" / run, (1000 + number, 1000 + number))
    carried.trim({"r0"})
    assert sorted(path.name for path in (tmp_path / "carried").iterdir()) == ["r0", "r3", "r4"]


def _crash() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("point", ["client-before-promotion", "client-promoted"])
def test_a_crash_around_the_promotion_leaves_the_old_state_or_the_new_one(
    carried: CarriedState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    leave(carried, "a2", b"2" * 32)
    monkeypatch.setenv(failpoints.ENVIRONMENT_VARIABLE, point)
    monkeypatch.setattr(failpoints, "_reached", failpoints.Counter())
    monkeypatch.setattr(failpoints.os, "kill", lambda *_: _crash())
    with pytest.raises(KeyboardInterrupt):
        carried.settle(RUN, "a2", b"2" * 32)
    monkeypatch.delenv(failpoints.ENVIRONMENT_VARIABLE)

    after = CarriedState(tmp_path / "carried", keep=2)
    after.sweep()
    was_promoted = point == "client-promoted"
    assert standing(after) == {"residual": "from a2" if was_promoted else "from a1"}
    assert ids(after) == ([] if was_promoted else ["a2"])
    after.settle(RUN, "a2", b"2" * 32)
    assert standing(after) == {"residual": "from a2"}
    assert files(tmp_path) == ["a2.residual", "promoted"]


# -- asking the coordinator ---------------------------------------------------------------------------------------------


def receipt(assignment_id: str, digest: bytes) -> transfer_pb2.Receipt:
    return transfer_pb2.Receipt(assignment_id=assignment_id, digest=digest)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    (tmp_path / "earlier").mkdir()
    return Spool(tmp_path / "earlier")


def settle(transport: Transport, carried: CarriedState, spool: Spool, stop: Stop | None = None) -> None:
    settle_earlier(transport, carried, spool, RUN, stop or Stop(), structlog.get_logger())


def test_nothing_pending_asks_nobody(
    coordinator: FakeCoordinator, transport: Transport, carried: CarriedState, spool: Spool
) -> None:
    settle(transport, carried, spool)
    assert coordinator.calls["GetUpload"] == []


def test_a_missed_receipt_is_asked_for_until_it_comes(
    coordinator: FakeCoordinator, transport: Transport, carried: CarriedState, spool: Spool
) -> None:
    coordinator.faults["GetUpload"].extend([UnavailableError("away"), UnavailableError("away")])
    coordinator.receipts["a1"] = receipt("a1", b"1" * 32)
    leave(carried, "a1", b"1" * 32)
    settle(transport, carried, spool)
    assert standing(carried) == {"residual": "from a1"}
    assert [call.digest for call in coordinator.calls["GetUpload"]] == [b"1" * 32] * 3


@pytest.mark.parametrize("error", [NoLongerNeededError("the round closed"), NotFoundError("no such assignment")])
def test_what_the_coordinator_did_not_count_is_dropped(
    coordinator: FakeCoordinator, transport: Transport, carried: CarriedState, spool: Spool, error: Any
) -> None:
    leave(carried, "a1", b"1" * 32)
    carried.settle(RUN, "a1", b"1" * 32)
    leave(carried, "a2", b"2" * 32)
    coordinator.faults["GetUpload"].append(error)
    settle(transport, carried, spool)
    assert (standing(carried), ids(carried)) == ({"residual": "from a1"}, [])


def test_an_update_on_its_way_is_waited_for(
    coordinator: FakeCoordinator, transport: Transport, carried: CarriedState, spool: Spool
) -> None:
    leave(carried, "a1", b"1" * 32)

    def arrive(_: object) -> None:
        coordinator.receipts["a1"] = receipt("a1", b"1" * 32)

    spool.path("a1").write_bytes(b"update")
    coordinator.faults["GetUpload"].extend([lambda _: None, arrive])
    settle(transport, carried, spool)
    assert len(coordinator.calls["GetUpload"]) == 2
    assert standing(carried) == {"residual": "from a1"}


def test_an_update_that_nobody_can_deliver_any_more_is_not_waited_for(
    coordinator: FakeCoordinator, transport: Transport, carried: CarriedState, spool: Spool
) -> None:
    leave(carried, "a1", b"1" * 32)
    settle(transport, carried, spool)
    assert len(coordinator.calls["GetUpload"]) == 1
    assert (standing(carried), ids(carried)) == ({}, [])


def test_waiting_ends_with_the_work_that_waits(
    coordinator: FakeCoordinator, transport: Transport, carried: CarriedState, spool: Spool
) -> None:
    leave(carried, "a1", b"1" * 32)
    spool.path("a1").write_bytes(b"update")
    stop = Stop()
    coordinator.faults["GetUpload"].append(lambda _: stop.set("the round closed"))
    with pytest.raises(StoppedError, match="the round closed"):
        settle(transport, carried, spool, stop)
    assert ids(carried) == ["a1"]


# -- the upload --------------------------------------------------------------------------------------------------------


class Uploading:
    """An uploader at work on one spooled update, of an assignment that left a residual behind."""

    def __init__(self, transport: Transport, carried: CarriedState, folder: Path, make_payload: MakePayload) -> None:
        folder.mkdir()
        self.spool, self.table, self.carried = Spool(folder), WorkTable(), carried
        self.verdicts: list[Any] = []
        self.failed: list[BaseException] = []
        leave(carried, "a0", b"0" * 32)
        carried.settle(RUN, "a0", b"0" * 32)
        assignment = participation_pb2.Assignment(assignment_id="a1", run_id=RUN, round=2)
        self.digest, total_bytes = make_payload(self.spool.path("a1"), 2**18, "a1")
        leave(carried, "a1", self.digest)
        spooled = self.spool.add(assignment, self.digest, total_bytes)
        self.table.add(Held(assignment, common_pb2.WORK_PHASE_SPOOLED, spooled))

        class Verdicts(Outbox):
            def put(self_, held: Held, verdict: Any) -> None:
                self.verdicts.append(verdict)
                self.discard(held)

        progress = ProgressReporter(transport, lambda *_: None, self.failed.append)
        outbox = Verdicts(transport, self.discard, self.failed.append)
        account = SiteAccount(PrivacyLedger(folder / "privacy.json"), Limits(None, 0.01))
        self.uploader = Uploader(
            transport, self.spool, carried, account, self.table, progress, outbox, self.discard, self.failed.append
        )
        self.thread = threading.Thread(target=self.uploader.run, daemon=True)

    def discard(self, held: Held) -> None:
        self.spool.remove(held.assignment_id)
        self.table.finish(held)
        self.table.close("done")

    def run(self) -> None:
        self.thread.start()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.failed == []
        assert self.spool.scan() == []


@pytest.fixture
def uploading(
    transport: Transport, carried: CarriedState, tmp_path: Path, make_payload: MakePayload
) -> Iterator[Uploading]:
    uploading = Uploading(transport, carried, tmp_path / "spool", make_payload)
    yield uploading
    uploading.table.close("over")


def test_the_receipt_promotes(coordinator: FakeCoordinator, uploading: Uploading) -> None:
    uploading.run()
    assert coordinator.receipts["a1"].digest == uploading.digest
    assert (standing(uploading.carried), ids(uploading.carried)) == ({"residual": "from a1"}, [])


def test_a_repeated_receipt_promotes_too(coordinator: FakeCoordinator, uploading: Uploading) -> None:
    coordinator.receipts["a1"] = receipt("a1", uploading.digest)
    uploading.run()
    assert coordinator.calls["Upload"] == []
    assert standing(uploading.carried) == {"residual": "from a1"}


def test_a_receipt_for_another_update_clears(coordinator: FakeCoordinator, uploading: Uploading) -> None:
    coordinator.receipts["a1"] = receipt("a1", b"x" * 32)
    uploading.run()
    assert (standing(uploading.carried), ids(uploading.carried)) == ({}, [])


def test_an_aborted_update_leaves_the_old_state(coordinator: FakeCoordinator, uploading: Uploading) -> None:
    coordinator.upload_faults.append((1, NoLongerNeededError("the round closed")))
    uploading.run()
    assert (standing(uploading.carried), ids(uploading.carried)) == ({"residual": "from a0"}, [])


def test_a_refused_update_clears(coordinator: FakeCoordinator, uploading: Uploading) -> None:
    """It may be the residual that took it over a bound."""
    coordinator.upload_faults.append((1, UpdateRefusedError("tensor w: a value is over the bound")))
    uploading.run()
    assert [verdict.kind for verdict in uploading.verdicts] == [participation_pb2.FAILURE_KIND_UPDATE_REFUSED]
    assert (standing(uploading.carried), ids(uploading.carried)) == ({}, [])


def test_an_update_that_a_poll_dropped_is_asked_about_before_anything_is_forgotten(
    coordinator: FakeCoordinator, uploading: Uploading, transport: Transport
) -> None:
    """The coordinator drops what it has just received, and the receipt may be lost."""

    def drop(_: object) -> None:
        uploading.table.drop("a1", "received")
        coordinator.faults["GetUpload"].clear()

    coordinator.faults["GetUpload"].append(drop)
    coordinator.upload_faults.append((0, UnavailableError("the receipt is lost")))
    uploading.run()
    assert (standing(uploading.carried), ids(uploading.carried)) == ({"residual": "from a0"}, ["a1"])
    coordinator.receipts["a1"] = receipt("a1", uploading.digest)
    settle(transport, uploading.carried, uploading.spool)
    assert (standing(uploading.carried), ids(uploading.carried)) == ({"residual": "from a1"}, [])
