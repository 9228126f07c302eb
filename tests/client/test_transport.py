from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from fed_client.cache import ModelCache
from fed_client.download import Downloads
from fed_client.durable import SiteDiskFullError
from fed_client.settings import Settings
from fed_client.spool import SpooledUpdate
from fed_client.state import Identity
from fed_client.stop import Stop, StoppedError
from fed_client.transport import MIN_CHUNK_BYTES, Transport, next_chunk_bytes
from fed_client.upload import SpoolCorruptError, deliver
from fed_core.errors import (
    BusyError,
    CorruptError,
    InvalidError,
    NoLongerNeededError,
    NotFoundError,
    OffsetError,
    UnauthenticatedError,
    UnavailableError,
    UpdateRefusedError,
)
from fed_core.payload.frames import CHUNK_BYTES
from fedstream.v1 import common_pb2, participation_pb2

if TYPE_CHECKING:
    from tests.client.conftest import FakeCoordinator

MakePayload = Callable[..., tuple[bytes, int]]
LOG = structlog.get_logger()


def _ignore(done: int, total: int) -> None:
    pass


@pytest.fixture
def spooled(tmp_path: Path, make_payload: MakePayload) -> SpooledUpdate:
    path = tmp_path / "a1.update"
    digest, total_bytes = make_payload(path, assignment_id="a1")
    return SpooledUpdate(participation_pb2.Assignment(assignment_id="a1"), digest, total_bytes, path)


@pytest.fixture
def payload(tmp_path: Path, make_payload: MakePayload, coordinator: FakeCoordinator) -> common_pb2.PayloadRef:
    digest, total_bytes = make_payload(tmp_path / "model")
    coordinator.payloads[digest] = (tmp_path / "model").read_bytes()
    return common_pb2.PayloadRef(digest=digest, total_bytes=total_bytes, kind=common_pb2.PAYLOAD_KIND_MODEL)


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    (tmp_path / "cache").mkdir()
    return ModelCache(tmp_path / "cache", keep=2)


# -- upload ------------------------------------------------------------------------------------------------------------


def test_an_update_arrives_as_it_lies_in_the_spool(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    seen: list[tuple[int, int]] = []
    receipt = deliver(transport, spooled, Stop(), lambda done, total: seen.append((done, total)), LOG)
    assert receipt.digest == spooled.digest
    assert coordinator.received["a1"] == spooled.path.read_bytes()
    assert seen[-1] == (spooled.total_bytes, spooled.total_bytes)
    assert seen == sorted(seen)


def test_nothing_but_the_header_is_sent_before_its_turn(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    seen: list[tuple[int, int]] = []
    coordinator.turn.clear()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(deliver, transport, spooled, Stop(), lambda *done: seen.append(done), LOG)
        while not coordinator.calls["Upload"]:
            time.sleep(0.01)
        time.sleep(0.2)
        assert not seen
        coordinator.turn.set()
        assert sending.result(30).digest == spooled.digest
    assert coordinator.received["a1"] == spooled.path.read_bytes()


def test_an_upload_that_is_stopped_before_its_turn_ends(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    stop = Stop()
    coordinator.turn.clear()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(deliver, transport, spooled, stop, _ignore, LOG)
        while not coordinator.calls["Upload"]:
            time.sleep(0.01)
        stop.set("no longer wanted")
        try:
            with pytest.raises(StoppedError):
                sending.result(10)
        finally:
            coordinator.turn.set()


def test_an_update_that_is_durable_already_is_not_sent_again(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    deliver(transport, spooled, Stop(), _ignore, LOG)
    deliver(transport, spooled, Stop(), _ignore, LOG)
    assert len(coordinator.calls["Upload"]) == 1


def test_a_broken_upload_goes_on_from_the_accepted_offset(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    coordinator.upload_faults.append((2**20, UnavailableError("gone")))
    coordinator.upload_faults.append((2**20, UnavailableError("gone again")))
    deliver(transport, spooled, Stop(), _ignore, LOG)
    assert coordinator.received["a1"] == spooled.path.read_bytes()
    assert coordinator.offsets[0] == 0
    assert coordinator.offsets == sorted(set(coordinator.offsets))


@pytest.mark.parametrize(
    "error",
    [BusyError("full", retry_after_seconds=0.1), UnavailableError("draining"), OffsetError("moved", offset=0)],
    ids=lambda error: type(error).__name__,
)
def test_what_passes_by_itself_is_waited_for(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate, error: Any
) -> None:
    coordinator.faults["Upload"].append(error)
    coordinator.faults["GetUpload"].append(error)
    deliver(transport, spooled, Stop(), _ignore, LOG)
    assert coordinator.received["a1"] == spooled.path.read_bytes()


def test_a_damaged_part_is_sent_again(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    def damage(context: Any) -> None:
        del coordinator.received["a1"][2**20 :]
        context.abort_with_status(_status(CorruptError("digest differs", offset=2**20)))

    coordinator.upload_faults.append((2**21, damage))
    deliver(transport, spooled, Stop(), _ignore, LOG)
    assert coordinator.offsets == [0, 2**20]
    assert coordinator.received["a1"] == spooled.path.read_bytes()


def test_two_failures_at_one_offset_find_a_rotten_spool(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    data = bytearray(spooled.path.read_bytes())
    data[2**21] ^= 1
    spooled.path.write_bytes(data)
    for _ in range(2):
        coordinator.faults["Upload"].append(CorruptError("digest differs", offset=2**21))
    with pytest.raises(SpoolCorruptError, match="no longer verifies"):
        deliver(transport, spooled, Stop(), _ignore, LOG)


def test_two_failures_at_one_offset_of_a_good_spool_are_the_lines(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    for _ in range(3):
        coordinator.faults["Upload"].append(CorruptError("digest differs", offset=0))
    deliver(transport, spooled, Stop(), _ignore, LOG)
    assert coordinator.received["a1"] == spooled.path.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "garbage"])
def test_a_spool_that_is_not_what_was_spooled_is_not_sent(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate, make_payload: MakePayload, damage: str
) -> None:
    match damage:
        case "cut":
            spooled.path.write_bytes(spooled.path.read_bytes()[:-1])
        case "gone":
            spooled.path.unlink()
        case "other":
            make_payload(spooled.path, num_values=7, assignment_id="a1")
        case "garbage":
            spooled.path.write_bytes(b"x" * spooled.total_bytes)
    with pytest.raises(SpoolCorruptError):
        deliver(transport, spooled, Stop(), _ignore, LOG)
    assert not coordinator.calls["Upload"]


@pytest.mark.parametrize(
    "error",
    [
        NoLongerNeededError("the round closed"),
        NotFoundError("unknown"),
        UpdateRefusedError("tensor w has another shape"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_get_better_is_raised_with_the_coordinators_words(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate, error: Any
) -> None:
    coordinator.upload_faults.append((1, error))
    with pytest.raises(type(error), match=str(error)):
        deliver(transport, spooled, Stop(), _ignore, LOG)
    assert len(coordinator.calls["Upload"]) == 1


def test_a_dropped_upload_ends_at_once(
    coordinator: FakeCoordinator, transport: Transport, tmp_path: Path, make_payload: MakePayload
) -> None:
    path = tmp_path / "large"  # more than the buffers of the line take
    digest, total_bytes = make_payload(path, num_values=2**23, assignment_id="a1")
    spooled = SpooledUpdate(participation_pb2.Assignment(assignment_id="a1"), digest, total_bytes, path)
    stop, released = Stop(), threading.Event()
    coordinator.upload_faults.append((1, lambda context: released.wait(20)))
    timer = threading.Timer(0.3, stop.set, args=["the round closed"])
    timer.start()
    began = time.monotonic()
    with pytest.raises(StoppedError, match="the round closed"):
        deliver(transport, spooled, stop, _ignore, LOG)
    assert time.monotonic() - began < 1.5
    released.set()


def test_a_drop_after_the_last_byte_waits_for_the_receipt(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    stop = Stop()

    def drop(context: Any) -> None:
        time.sleep(0.3)  # the client has handed everything over by now
        stop.set("received")
        time.sleep(0.2)

    coordinator.upload_faults.append((spooled.total_bytes, drop))
    assert deliver(transport, spooled, stop, _ignore, LOG).digest == spooled.digest


def test_an_upload_that_stalls_is_broken_off_and_resumed(
    coordinator: FakeCoordinator, transport: Transport, spooled: SpooledUpdate
) -> None:
    released = threading.Event()
    coordinator.upload_faults.append((2**20, lambda context: released.wait(20)))
    began = time.monotonic()
    thread = threading.Timer(2.5, released.set)  # the half-dead handler wakes up after the client has given up
    thread.start()
    deliver(transport, spooled, Stop(), _ignore, LOG)
    assert time.monotonic() - began < 15
    assert coordinator.received["a1"] == spooled.path.read_bytes()
    assert len(coordinator.calls["Upload"]) >= 2


def test_chunks_shrink_on_a_slow_line_and_grow_on_a_fast_one() -> None:
    size = CHUNK_BYTES
    for _ in range(10):
        size = next_chunk_bytes(size, seconds=5.0)
    assert size == MIN_CHUNK_BYTES
    assert next_chunk_bytes(size, seconds=1.0) == size
    for _ in range(10):
        size = next_chunk_bytes(size, seconds=0.01)
    assert size == CHUNK_BYTES


# -- download ----------------------------------------------------------------------------------------------------------


def fetch(transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef, stop: Stop | None = None) -> Path:
    downloads = Downloads(transport, cache)
    return downloads.fetch("a1", payload, stop or Stop(), lambda num_bytes: None, LOG, is_model=True)


def test_a_payload_arrives_as_it_lies_at_the_coordinator(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    seen: list[int] = []
    path = Downloads(transport, cache).fetch("a1", payload, Stop(), seen.append, LOG, is_model=True)
    assert path.read_bytes() == coordinator.payloads[payload.digest]
    assert not cache.part(payload.digest).exists()
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, payload.total_bytes)


def test_a_broken_download_goes_on_where_it_stopped(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    coordinator.download_faults.append((2**21, UnavailableError("gone")))
    coordinator.download_faults.append((2**20, UnavailableError("gone again")))
    path = fetch(transport, cache, payload)
    assert path.read_bytes() == coordinator.payloads[payload.digest]
    assert len(coordinator.offsets) == 3
    assert coordinator.offsets == [0, 2**21, 2**21 + 2**20]


def test_a_partial_file_of_an_earlier_process_is_gone_on_with(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    data = coordinator.payloads[payload.digest]
    # As a power cut leaves it: the end was never written.
    cache.part(payload.digest).write_bytes(data[: 3 * 2**20] + bytes(2**19))
    path = fetch(transport, cache, payload)
    assert path.read_bytes() == data
    assert 2 * 2**20 < coordinator.offsets[0] < 3 * 2**20


def test_a_part_damaged_on_the_way_is_fetched_again(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    coordinator.flips[2 * 2**20] = 1
    path = fetch(transport, cache, payload)
    assert path.read_bytes() == coordinator.payloads[payload.digest]
    assert 2**20 <= coordinator.offsets[1] <= 2 * 2**20


def test_a_model_that_is_rotten_at_the_coordinator_is_not_fetched_for_ever(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    coordinator.flips[2 * 2**20] = 1000
    with pytest.raises(InvalidError, match="arrived damaged 3 times"):
        fetch(transport, cache, payload)


def test_a_payload_of_another_length_than_announced_is_refused(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    payload.total_bytes = 1000
    with pytest.raises(InvalidError, match="1000"):
        fetch(transport, cache, payload)


def test_a_model_too_large_for_the_disk_is_refused_before_it_is_fetched(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    payload.total_bytes = 2**60
    with pytest.raises(SiteDiskFullError, match="free some"):
        fetch(transport, cache, payload)
    assert not coordinator.calls["Download"]


def test_a_payload_that_is_not_found_is_not_asked_for_again(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    coordinator.faults["Download"].append(NotFoundError("no such payload"))
    with pytest.raises(NotFoundError):
        fetch(transport, cache, payload)


def test_a_download_that_stalls_is_broken_off_and_resumed(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    released = threading.Event()
    coordinator.download_faults.append((2**21, lambda context: released.wait(20)))
    path = fetch(transport, cache, payload)
    released.set()
    assert path.read_bytes() == coordinator.payloads[payload.digest]
    assert coordinator.offsets[1] == 2**21


def test_a_dropped_download_ends_at_once(
    coordinator: FakeCoordinator, transport: Transport, cache: ModelCache, payload: common_pb2.PayloadRef
) -> None:
    stop, released = Stop(), threading.Event()
    coordinator.download_faults.append((2**20, lambda context: released.wait(20)))
    threading.Timer(0.3, stop.set, args=["the run was cancelled"]).start()
    with pytest.raises(StoppedError, match="cancelled"):
        fetch(transport, cache, payload, stop)
    released.set()


# -- calls -------------------------------------------------------------------------------------------------------------


def test_a_wrong_secret_is_told_as_such(coordinator: FakeCoordinator, settings: Settings) -> None:
    transport = Transport(settings, Identity("c1", "wrong", "site", coordinator.address))
    with pytest.raises(UnauthenticatedError):
        transport.get_upload("a1", b"d" * 32)
    transport.close()


def test_a_poll_that_was_told_to_stop_ends_at_once(coordinator: FakeCoordinator, transport: Transport) -> None:
    stop = Stop()
    threading.Timer(0.3, stop.set, args=["there is news"]).start()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(StoppedError, match="there is news"):
            transport.poll(participation_pb2.PollAssignmentRequest(wait_seconds=20), stop)
    assert time.monotonic() - began < 5


def test_closing_ends_calls_in_flight_and_later_ones(coordinator: FakeCoordinator, transport: Transport) -> None:
    threading.Timer(0.3, transport.close).start()
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        transport.poll(participation_pb2.PollAssignmentRequest(wait_seconds=20))
    assert time.monotonic() - began < 5
    with pytest.raises(UnavailableError):
        transport.poll(participation_pb2.PollAssignmentRequest())


def _status(error: Any) -> Any:
    from fed_core.rpc_status import to_status

    return to_status(error)
