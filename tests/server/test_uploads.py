"""What a client may send by mistake or on purpose: a named error each, the round unharmed, the coordinator's memory bounded."""

from __future__ import annotations

import asyncio
import gc
import queue
import random
import struct
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from blake3 import blake3
from torch import Tensor

from benchmarks.light_client import LightClient, MemoryFile, Update, constant, encode_update
from fed_core.errors import (
    CorruptError,
    InvalidError,
    NoLongerNeededError,
    NotFiniteError,
    NotFoundError,
    OffsetError,
    PayloadError,
    UnavailableError,
    UpdateRefusedError,
    WrongPhaseError,
)
from fed_core.payload.frames import CHUNK_BYTES, pack_chunk
from fed_core.payload.limits import MAGIC, PREAMBLE_BYTES
from fed_core.payload.manifest import Manifest, pack_specs, parse_manifest, parse_preamble
from fed_core.rpc_status import from_rpc_error
from fed_core.specs import TensorSpec
from fedstream.v1 import common_pb2, payload_pb2, runs_pb2, transfer_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import MovableClock, member, open_house, until, weights

NUM_ELEMENTS = 700_000  # three segments of raw float32
MODEL = {"w": torch.zeros(NUM_ELEMENTS), "b.count": torch.zeros((), dtype=torch.int64)}


@dataclass
class Trial:
    """A run whose only client is about to misbehave."""

    house: House
    client: LightClient
    assignment: Any
    specs: tuple[TensorSpec, ...]

    @property
    def id(self) -> str:
        return self.assignment.assignment_id

    def encode(
        self, make: Callable[[TensorSpec], Tensor] | float = 0.25, num_examples: int = 1, **changes: Any
    ) -> Update:
        """An update; honest but for the changes."""
        specs = changes.pop("specs", self.specs)
        made = constant(make) if isinstance(make, float) else make
        return encode_update(self.assignment, specs, made, num_examples, **changes)

    async def send(self, update: Update, **options: Any) -> transfer_pb2.Receipt:
        return await off_loop(self.client.upload, self.id, update, **{"retry": False} | options)

    async def stream(self, *frames: bytes) -> transfer_pb2.Receipt:
        return await off_loop(stream, self.client, iter(frames))

    async def accepted(self, update: Update) -> int:
        return (await off_loop(self.client.get_upload, self.id, update.digest)).accepted_offset

    async def is_unharmed(self, value: float = 0.25) -> None:
        """The same client sends what it should have, and the round commits exactly that."""
        await self.send(self.encode(value), retry=True)
        run = await off_loop(self.house.operator.wait)
        assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
        assert run.model_version == 1
        assert await off_loop(weights, self.house, 1) == value


@pytest.fixture
async def trial(house: House) -> AsyncIterator[Trial]:
    await off_loop(house.operator.submit, config(size=1), MODEL)
    client = await off_loop(house.client, "site")
    assignment = await off_loop(client.next_assignment)
    manifest, _ = await off_loop(client.model, assignment)
    yield Trial(house, client, assignment, manifest.specs)
    client.close()


def stream(client: LightClient, frames: Iterator[bytes]) -> transfer_pb2.Receipt:
    """An upload of any frames at all."""
    try:
        return client._upload(frames, metadata=client._metadata, timeout=60).receipt
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def header(trial: Trial, update: Update, offset: int = 0, **changes: Any) -> bytes:
    payload = {"digest": update.digest, "total_bytes": len(update.data), "kind": common_pb2.PAYLOAD_KIND_UPDATE}
    fields = {"assignment_id": trial.id, "offset": offset, "payload": common_pb2.PayloadRef(**payload | changes)}
    return transfer_pb2.UploadRequest(header=transfer_pb2.UploadHeader(**fields)).SerializeToString()


def manifest_of(update: Update) -> Manifest:
    preamble = parse_preamble(update.data)
    return parse_manifest(preamble, update.data[PREAMBLE_BYTES : PREAMBLE_BYTES + preamble.manifest_bytes])


def forge(update: Update, change: Callable[[payload_pb2.Manifest], None]) -> Update:
    """The update under a manifest that no writer of ours would write, digests in order."""
    end = PREAMBLE_BYTES + parse_preamble(update.data).manifest_bytes
    manifest = payload_pb2.Manifest.FromString(update.data[PREAMBLE_BYTES:end])
    change(manifest)
    body = manifest.SerializeToString()
    digest = blake3(body).digest()
    return Update(digest, MAGIC + digest + struct.pack("<I", len(body)) + body + update.data[end:])


def flipped(update: Update, at: int) -> Update:
    data = bytearray(update.data)
    data[at] ^= 0x10
    return Update(update.digest, bytes(data))


# Bytes that are damaged


async def test_a_flipped_bit_is_answered_with_the_offset_to_resume_from(trial: Trial) -> None:
    update = trial.encode()
    second = manifest_of(update).segments[1]
    with pytest.raises(CorruptError, match="tensor 'w'") as caught:
        await trial.send(flipped(update, second.offset + 100))
    assert caught.value.offset == second.offset
    assert await trial.accepted(update) == second.offset
    await trial.send(update, offset=second.offset)
    await off_loop(trial.house.operator.wait)
    assert await off_loop(weights, trial.house, 1) == 0.25
    uplink = (await off_loop(member, trial.house, "site")).uplink
    assert len(update.data) <= uplink.wire_bytes < len(update.data) + second.length + 2**20


async def test_a_flipped_bit_in_the_manifest_begins_anew(trial: Trial) -> None:
    update = trial.encode()
    with pytest.raises(CorruptError) as caught:
        await trial.send(flipped(update, PREAMBLE_BYTES + 5))
    assert caught.value.offset == 0
    assert await trial.accepted(update) == 0
    await trial.is_unharmed()


async def test_another_digest_in_the_preamble_than_announced_is_corrupt(trial: Trial) -> None:
    update = trial.encode()
    with pytest.raises(CorruptError, match="digest"):
        await trial.send(Update(bytes(32), update.data))
    await trial.is_unharmed()


async def test_an_update_that_ends_early_is_corrupt_from_its_last_whole_segment(trial: Trial) -> None:
    update = trial.encode()
    third = manifest_of(update).segments[2]
    with pytest.raises(CorruptError, match="not whole") as caught:
        await trial.send(update, until=third.end - 1)
    assert caught.value.offset == third.offset == await trial.accepted(update)
    await trial.send(update, offset=third.offset)
    await off_loop(trial.house.operator.wait)
    assert await off_loop(weights, trial.house, 1) == 0.25


@pytest.mark.parametrize("length", [1, PREAMBLE_BYTES, 5000, 3 * CHUNK_BYTES])
async def test_garbage_is_refused_by_name(trial: Trial, length: int) -> None:
    garbage = random.Random(length).randbytes(length)
    with pytest.raises((PayloadError, CorruptError)):
        await trial.send(Update(blake3(garbage).digest(), garbage))
    await trial.is_unharmed()


# Streams out of order


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (b"", "expected a header"),
        (b"\xff" * 40, "is not one"),
        (pack_chunk(0, b"no header"), "expected a header"),
        (transfer_pb2.UploadRequest(header=transfer_pb2.UploadHeader()).SerializeToString(), "digest of 32 bytes"),
    ],
)
async def test_a_stream_must_begin_with_a_header(trial: Trial, first: bytes, says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        await trial.stream(first)
    await trial.is_unharmed()


async def test_an_empty_stream_is_refused(trial: Trial) -> None:
    with pytest.raises(InvalidError, match="header"):
        await trial.stream()
    await trial.is_unharmed()


async def test_a_header_alone_is_not_an_update(trial: Trial) -> None:
    with pytest.raises(CorruptError, match="not whole"):
        await trial.stream(header(trial, trial.encode()))
    await trial.is_unharmed()


async def test_a_second_header_is_refused(trial: Trial) -> None:
    update = trial.encode()
    with pytest.raises(InvalidError, match="first and once"):
        await trial.stream(header(trial, update), pack_chunk(0, update.data[:100]), header(trial, update))
    await trial.is_unharmed()


async def test_a_chunk_out_of_order_is_refused(trial: Trial) -> None:
    update = trial.encode()
    with pytest.raises(InvalidError, match="chunk at byte 200; expected the next one at 100"):
        await trial.stream(
            header(trial, update), pack_chunk(0, update.data[:100]), pack_chunk(200, update.data[200:300])
        )
    await trial.is_unharmed()


@pytest.mark.parametrize(
    "frame", [b"\x12\x00", b"\x12\x05abcde", pack_chunk(0, b"abc") + b"!", b"\x12\xff\xff\xff\xff\x0f"]
)
async def test_a_frame_that_is_no_chunk_is_refused(trial: Trial, frame: bytes) -> None:
    with pytest.raises(InvalidError):
        await trial.stream(header(trial, trial.encode()), frame)
    await trial.is_unharmed()


async def test_an_offset_other_than_the_accepted_one_is_told_the_right_one(trial: Trial) -> None:
    update = trial.encode()
    second = manifest_of(update).segments[1]
    with pytest.raises(CorruptError):
        await trial.send(update, until=second.offset)
    for wrong in (second.offset - 1, second.offset + 1, len(update.data), len(update.data) + 7, 2**62):
        with pytest.raises(OffsetError) as caught:
            await trial.stream(header(trial, update, offset=wrong))
        assert caught.value.offset == second.offset
    await trial.is_unharmed()


# Sizes


async def test_ten_times_the_genuine_size_is_refused_before_a_byte_is_taken(trial: Trial) -> None:
    update = trial.encode()
    with pytest.raises(UpdateRefusedError, match=r"at most .* can be genuine"):
        await trial.send(update, total_bytes=10 * len(update.data))
    assert not list((trial.house.app.settings.data_dir / "uploads").iterdir())
    await trial.is_unharmed()


async def test_more_bytes_than_declared_are_refused(trial: Trial) -> None:
    update = trial.encode()
    with pytest.raises(UpdateRefusedError, match="announced"):
        await trial.send(update, total_bytes=len(update.data) // 10)
    with pytest.raises(UpdateRefusedError, match="announced"):
        await trial.send(update, total_bytes=len(update.data) + 1)
    await trial.is_unharmed()


async def test_bytes_after_the_end_are_refused(trial: Trial) -> None:
    update = trial.encode()
    with pytest.raises(InvalidError):
        await trial.stream(
            header(trial, update),
            *(pack_chunk(at, update.data[at : at + CHUNK_BYTES]) for at in range(0, len(update.data), CHUNK_BYTES)),
            pack_chunk(len(update.data), b"more"),
        )
    await trial.is_unharmed()


def respec(manifest: payload_pb2.Manifest, change: Callable[[Any], object]) -> None:
    """Changes the packed specs, given as a list."""
    specs = payload_pb2.TensorSpecs.FromString(zlib.decompress(manifest.packed_specs))
    change(specs.specs)
    manifest.packed_specs = pack_specs(specs)


def claim_terabytes(manifest: payload_pb2.Manifest) -> None:
    respec(manifest, lambda specs: specs[0].shape.__setitem__(slice(None), [2**19, 2**19]))
    manifest.raw_bytes = 2**40


def claim_long_segments(manifest: payload_pb2.Manifest) -> None:
    for segment in manifest.tensors[0].bodies:
        segment.encoded_bytes = 2**31 - 1
    manifest.encoded_bytes = 2**40


def claim_many_tensors(manifest: payload_pb2.Manifest) -> None:
    def grow(specs: Any) -> None:
        for number in range(10_000):
            specs.add().CopyFrom(specs[1])
            specs[-1].name = f"more.{number}"

    respec(manifest, grow)
    manifest.tensors.extend([manifest.tensors[1]] * 10_000)
    manifest.raw_bytes += 10_000 * 8


def claim_a_bomb(manifest: payload_pb2.Manifest) -> None:
    """Half a gigabyte of specs in two megabytes."""
    packer = zlib.compressobj(1)
    manifest.packed_specs = b"".join(packer.compress(bytes(2**20)) for _ in range(500)) + packer.flush()


@pytest.mark.parametrize("claim", [claim_terabytes, claim_long_segments, claim_many_tensors, claim_a_bomb])
async def test_a_manifest_that_claims_more_than_there_is_costs_no_memory(
    trial: Trial, claim: Callable[[payload_pb2.Manifest], None]
) -> None:
    process, forged = psutil.Process(), forge(trial.encode(), claim)
    gc.collect()
    before = process.memory_info().rss
    for _ in range(3):
        with pytest.raises((PayloadError, UpdateRefusedError)):
            await trial.send(forged)
    gc.collect()
    # The claims begin at 500 MB each. What the allocator keeps of 16 MiB of specs is up to what this process did before.
    assert process.memory_info().rss - before < 200 * 2**20
    await trial.is_unharmed()


async def test_a_preamble_that_announces_a_huge_manifest_is_refused_at_once(trial: Trial) -> None:
    for length in (0, 2**26, 2**32 - 1):
        update = Update(bytes(32), MAGIC + bytes(32) + struct.pack("<I", length) + bytes(1000))
        with pytest.raises(PayloadError):
            await trial.send(update)
    await trial.is_unharmed()


# Values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
async def test_a_value_that_is_not_finite_is_refused_with_its_tensor(trial: Trial, bad: float) -> None:
    def make(spec: TensorSpec) -> Tensor:
        tensor = constant(0.25)(spec)
        if spec.name == "w":
            tensor[-1] = bad
        return tensor

    with pytest.raises(NotFiniteError, match="tensor 'w'"):
        await trial.send(trial.encode(make))
    assert not list((trial.house.app.settings.data_dir / "uploads").iterdir())
    await trial.is_unharmed()


async def test_a_value_over_the_bound_is_refused_with_the_bound_and_the_cure(trial: Trial) -> None:
    with pytest.raises(UpdateRefusedError, match=r"holds 4\.75, over this round's bound of 4; lower the learning rate"):
        await trial.send(trial.encode(4.75))
    await trial.is_unharmed(-0.5)


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ((TensorSpec("w", (NUM_ELEMENTS - 1,), "float32", "parameter"),), "shape"),
        ((TensorSpec("w", (2, NUM_ELEMENTS // 2), "float32", "parameter"),), "shape"),
        ((TensorSpec("w", (NUM_ELEMENTS,), "float16", "parameter"),), "float16"),
        ((TensorSpec("v", (NUM_ELEMENTS,), "float32", "parameter"),), "'w'"),
        ((TensorSpec("w", (NUM_ELEMENTS,), "float32", "buffer"),), "w"),
        ((), "'w'"),
    ],
    ids=["shape", "dimensions", "dtype", "name", "role", "missing"],
)
async def test_tensors_other_than_the_runs_are_refused_and_the_difference_told(
    trial: Trial, specs: tuple[TensorSpec, ...], says: str
) -> None:
    counter = tuple(spec for spec in trial.specs if spec.name != "w")
    with pytest.raises(UpdateRefusedError, match=f"not the run's: .*{says}"):
        await trial.send(trial.encode(specs=(*specs, *counter)))
    await trial.is_unharmed()


async def test_a_tensor_too_many_is_refused(trial: Trial) -> None:
    with pytest.raises(UpdateRefusedError, match="extra"):
        await trial.send(trial.encode(specs=(*trial.specs, TensorSpec("extra", (1,), "float32", "parameter"))))
    await trial.is_unharmed()


@pytest.mark.parametrize("num_examples", [0, -1, -(2**63), 2**48 + 1, 2**63 - 1, 2**20 + 1])
async def test_a_weight_out_of_range_is_refused(trial: Trial, num_examples: int) -> None:
    def weigh(manifest: payload_pb2.Manifest) -> None:
        manifest.update.num_examples = num_examples

    with pytest.raises(InvalidError, match=r"num_examples|weight"):
        await trial.send(forge(trial.encode(), weigh))
    await trial.is_unharmed()


async def test_a_custom_weight_counts_only_where_the_run_says_so(house: House) -> None:
    await off_loop(
        house.operator.submit,
        config(size=1, extra='[aggregation]\nkind = "mean"\nweighting = "custom"\nmax_weight = 50\n'),
    )
    client = await off_loop(house.client, "site")
    assignment = await off_loop(client.next_assignment)
    specs = (await off_loop(client.model, assignment))[0].specs
    for weight in (0, 51):
        update = encode_update(assignment, specs, constant(0.25), 7, custom_weight=weight)
        with pytest.raises(UpdateRefusedError, match=rf"weight {weight} \(by custom\) is outside 1\.\.50"):
            await off_loop(client.upload, assignment.assignment_id, update, retry=False)
    update = encode_update(assignment, specs, constant(0.25), 7, custom_weight=50)
    await off_loop(client.upload, assignment.assignment_id, update)
    await off_loop(house.operator.wait)
    assert (await off_loop(member, house, "site")).weight == 50


# Updates for something else


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"assignment_id": uuid.UUID(int=7).hex}, "assignment"),
        ({"run_id": uuid.UUID(int=7).hex}, "run"),
        ({"round": 2}, "round 2"),
        ({"model_version": 5}, "model version 5"),
        ({"base_digest": bytes(31) + b"x"}, "base digest"),
    ],
)
async def test_an_update_made_for_something_else_is_refused(trial: Trial, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UpdateRefusedError, match=says):
        await trial.send(trial.encode(**change))
    await trial.is_unharmed()


async def test_a_model_in_place_of_an_update_is_refused(trial: Trial) -> None:
    def pretend(manifest: payload_pb2.Manifest) -> None:
        manifest.kind = common_pb2.PAYLOAD_KIND_MODEL
        manifest.ClearField("update")
        manifest.ClearField("round")
        manifest.ClearField("base_digest")

    with pytest.raises(UpdateRefusedError, match="expected an update, got a"):
        await trial.send(forge(trial.encode(), pretend))
    await trial.is_unharmed()


@pytest.mark.parametrize("codec", ["unheard-of", "../raw", "uniform"])
async def test_a_codec_that_the_run_does_not_take_is_refused(trial: Trial, codec: str) -> None:
    def encode(manifest: payload_pb2.Manifest) -> None:
        manifest.codecs[0] = codec

    with pytest.raises(InvalidError, match=r"codec|encoded by"):
        await trial.send(forge(trial.encode(), encode))
    await trial.is_unharmed()


async def test_an_unknown_assignment_is_not_found(trial: Trial) -> None:
    for wrong in (uuid.UUID(int=7).hex, "", "../../etc/passwd", "x" * 5000):
        with pytest.raises(NotFoundError):
            await off_loop(trial.client.upload, wrong, trial.encode(), retry=False)
        with pytest.raises(NotFoundError):
            await off_loop(trial.client.get_upload, wrong, bytes(32))
    await trial.is_unharmed()


async def test_another_sites_assignment_is_not_found(trial: Trial) -> None:
    other = await off_loop(trial.house.client, "other")
    update = trial.encode(0.5)
    with pytest.raises(NotFoundError):
        await off_loop(other.upload, trial.id, update, retry=False)
    with pytest.raises(NotFoundError):
        await off_loop(other.get_upload, trial.id, update.digest)
    with pytest.raises(NotFoundError):
        await off_loop(other.model, trial.assignment)
    await trial.is_unharmed()


async def test_only_payloads_of_the_assignments_run_can_be_downloaded(trial: Trial) -> None:
    await off_loop(trial.house.operator.submit, config(name="other", size=1), {"w": torch.ones(10)})
    (other,) = set(payloads(trial.house)) - {payload.digest.hex() for payload in trial.assignment.model.payloads}
    for digest in (bytes(32), b"", b"/etc/passwd", bytes.fromhex(other)):
        with MemoryFile() as memory, pytest.raises(NotFoundError, match="never part of the run; poll again"):
            await off_loop(trial.client.fetch, trial.id, common_pb2.PayloadRef(digest=digest, total_bytes=9), memory)
    await trial.is_unharmed()


def payloads(house: House) -> list[str]:
    return [path.stem for path in (house.app.settings.data_dir / "payloads").glob("*.payload")]


async def test_an_update_of_an_earlier_round_is_no_longer_needed(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, max_rounds=2, extra="[cohort.labels]\nkind='slow'\n"))
    late, quick = await off_loop(house.client, "late"), await off_loop(house.client, "quick")
    first = (await until(lambda: late.poll(wait_seconds=1, labels={"kind": "slow"}).assignments))[0]
    manifest, _ = await off_loop(late.model, first)
    stale = encode_update(first, manifest.specs, constant(0.5))
    await off_loop(late.poll, wait_seconds=0, labels={"kind": "other"})  # fits no further round
    await off_loop(late.report_failure, first.assignment_id, kind=1, message="gone")
    second = (await until(lambda: quick.poll(wait_seconds=1, labels={"kind": "slow"}).assignments))[0]
    with pytest.raises(NoLongerNeededError):
        await off_loop(late.upload, first.assignment_id, stale, retry=False)
    with pytest.raises(UpdateRefusedError, match=r"round 1|assignment"):
        await off_loop(quick.upload, second.assignment_id, stale, retry=False)


# Repeats


async def test_the_same_upload_twice_gets_the_same_receipt_and_counts_once(house: House) -> None:
    await off_loop(house.operator.submit, config(size=2))
    a, b = await off_loop(house.client, "a"), await off_loop(house.client, "b")
    assignment, other = await asyncio.gather(off_loop(a.next_assignment), off_loop(b.next_assignment))
    specs = (await off_loop(a.model, assignment))[0].specs
    update = encode_update(assignment, specs, constant(0.25), 3)
    first = await off_loop(a.upload, assignment.assignment_id, update)
    assert await off_loop(a.upload, assignment.assignment_id, update) == first
    assert (await off_loop(a.get_upload, assignment.assignment_id, update.digest)).receipt == first
    # The site trained again and offers other bytes: the first that was durable stands.
    again = await off_loop(a.upload, assignment.assignment_id, encode_update(assignment, specs, constant(0.5), 1000))
    assert again == first
    assert again.digest == update.digest
    await off_loop(b.upload, other.assignment_id, encode_update(other, specs, constant(0.5), 1))
    await off_loop(house.operator.wait)
    assert await off_loop(weights, house, 1) == (3 * 0.25 + 0.5) / 4
    # Long after the round: the answer that was lost is still to be had.
    assert await off_loop(a.upload, assignment.assignment_id, update) == first


async def test_other_bytes_before_the_first_were_whole_begin_anew(trial: Trial) -> None:
    first, second = trial.encode(0.5), trial.encode(0.25)
    half = manifest_of(first).segments[1].end
    with pytest.raises(CorruptError):
        await trial.send(first, until=half)
    assert await trial.accepted(first) == half
    assert await trial.accepted(second) == 0
    with pytest.raises(OffsetError) as caught:
        await trial.send(second, offset=half)
    assert caught.value.offset == 0
    await trial.is_unharmed(0.25)


async def test_equal_bytes_from_two_sites_count_twice(house: House) -> None:
    await off_loop(house.operator.submit, config(size=3))
    clients = [await off_loop(house.client, name) for name in "abc"]
    assignments = await asyncio.gather(*(off_loop(client.next_assignment) for client in clients))
    for client, assignment, value in zip(clients, assignments, (0.5, 0.5, 0.25), strict=True):
        specs = (await off_loop(client.model, assignment))[0].specs
        await off_loop(client.upload, assignment.assignment_id, encode_update(assignment, specs, constant(value), 2))
    await off_loop(house.operator.wait)
    report = await off_loop(house.operator.report)
    assert report.models[1].num_updates == 3
    assert await off_loop(weights, house, 1) == pytest.approx(1.25 / 3, abs=1e-7)


# Streams that break, stall and are taken over


async def test_an_upload_goes_on_in_a_new_stream(trial: Trial) -> None:
    update = trial.encode()
    sent = 0
    for span in manifest_of(update).segments[:3]:
        with pytest.raises(CorruptError):
            await trial.send(update, offset=sent, until=span.end - 3)
        assert await trial.accepted(update) == span.offset
        sent = span.offset
    await trial.send(update, offset=sent)
    await off_loop(trial.house.operator.wait)
    assert await off_loop(weights, trial.house, 1) == 0.25


class Pause:
    """Frames that stop coming until they are let go."""

    def __init__(self, *frames: bytes) -> None:
        self._frames: queue.Queue[bytes | None] = queue.Queue()
        for frame in frames:
            self._frames.put(frame)

    def __iter__(self) -> Iterator[bytes]:
        while (frame := self._frames.get()) is not None:
            yield frame

    def let_go(self) -> None:
        self._frames.put(None)


async def test_a_second_stream_takes_over_from_a_stalled_one(trial: Trial) -> None:
    update = trial.encode()
    first = manifest_of(update).segments[0]
    stalled = Pause(
        header(trial, update),
        *(
            pack_chunk(at, update.data[at : min(first.end + 7, at + CHUNK_BYTES)])
            for at in range(0, first.end + 7, CHUNK_BYTES)
        ),
    )
    hanging = asyncio.create_task(off_loop(stream, trial.client, iter(stalled)))
    await until(lambda: trial.client.get_upload(trial.id, update.digest).accepted_offset == first.end)
    await trial.send(update, offset=first.end)
    with pytest.raises(UnavailableError, match="newer stream"):
        await hanging
    stalled.let_go()
    await off_loop(trial.house.operator.wait)
    assert await off_loop(weights, trial.house, 1) == 0.25


async def test_streams_that_hang_hold_up_nobody_else_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fed_server.services.transfer.STALL_SECONDS", 0.5)
    async with open_house(tmp_path / "data", max_concurrent_transfers=1) as house:
        await off_loop(house.operator.submit, config(size=2))
        hanging, honest = await off_loop(house.client, "hanging"), await off_loop(house.client, "honest")
        held, other = await asyncio.gather(off_loop(hanging.next_assignment), off_loop(honest.next_assignment))
        specs = (await off_loop(honest.model, other))[0].specs
        update = encode_update(held, specs, constant(0.25))
        stalled = Pause(header(Trial(house, hanging, held, specs), update))
        task = asyncio.create_task(off_loop(stream, hanging, iter(stalled)))
        await until(lambda: list((tmp_path / "data" / "uploads").iterdir()))
        await off_loop(honest.upload, other.assignment_id, encode_update(other, specs, constant(0.5)))
        with pytest.raises(UnavailableError, match="resume"):
            await task
        stalled.let_go()
        await off_loop(hanging.upload, held.assignment_id, update)
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED


async def test_an_upload_under_way_when_its_round_closes_is_no_longer_needed(tmp_path: Path) -> None:
    clock = MovableClock()
    async with open_house(tmp_path / "data", clock, lease_seconds=3600) as house:
        await off_loop(house.operator.submit, config(size=2, quorum=1, deadline=60))
        slow, quick = await off_loop(house.client, "slow"), await off_loop(house.client, "quick")
        held, other = await asyncio.gather(off_loop(slow.next_assignment), off_loop(quick.next_assignment))
        specs = (await off_loop(quick.model, other))[0].specs
        update = encode_update(held, specs, constant(0.5))
        stalled = Pause(header(Trial(house, slow, held, specs), update), pack_chunk(0, update.data))
        task = asyncio.create_task(off_loop(stream, slow, iter(stalled)))
        await until(lambda: list((tmp_path / "data" / "uploads").iterdir()))
        await off_loop(quick.upload, other.assignment_id, encode_update(other, specs, constant(0.25)))
        clock.advance(61)
        await off_loop(house.operator.wait)
        stalled.let_go()
        with pytest.raises(NoLongerNeededError, match=r"round 1 closed: 1 of 2 updates at the deadline.*slow"):
            await task
        assert await off_loop(weights, house, 1) == 0.25
        await until(lambda: not list((tmp_path / "data" / "uploads").iterdir()))


# Where an upload stands


async def test_get_upload_tells_where_an_upload_stands_in_every_state(house: House) -> None:
    await off_loop(house.operator.submit, config(size=3, quorum=2, at="clients"))
    clients = {name: await off_loop(house.client, name) for name in "abc"}
    given = await asyncio.gather(*(off_loop(client.next_assignment) for client in clients.values()))
    assignments = dict(zip(clients, given, strict=True))
    specs = (await off_loop(clients["a"].model, assignments["a"]))[0].specs
    updates = {name: encode_update(a, specs, constant(0.25)) for name, a in assignments.items()}

    def ask(name: str) -> transfer_pb2.GetUploadResponse:
        return clients[name].get_upload(assignments[name].assignment_id, updates[name].digest)

    assert (await off_loop(ask, "a")).accepted_offset == 0
    await off_loop(clients["a"].upload, assignments["a"].assignment_id, updates["a"])
    received = await off_loop(ask, "a")
    assert received.accepted_offset == len(updates["a"].data)
    assert received.receipt.digest == updates["a"].digest
    await off_loop(clients["c"].report_failure, assignments["c"].assignment_id, kind=1, message="no data today")
    with pytest.raises(NoLongerNeededError, match="no data today"):
        await off_loop(ask, "c")
    await off_loop(clients["b"].upload, assignments["b"].assignment_id, updates["b"])
    # The round is closed; its clients evaluate.
    await until(lambda: house.operator.run().model_version == 1)
    assert (await off_loop(ask, "a")).receipt == received.receipt
    evaluation = await off_loop(clients["a"].next_assignment)
    assert evaluation.kind == common_pb2.ASSIGNMENT_KIND_EVALUATE
    with pytest.raises(InvalidError, match="asks for an evaluation"):
        await off_loop(clients["a"].upload, evaluation.assignment_id, updates["a"], retry=False)
    with pytest.raises(WrongPhaseError):
        await off_loop(clients["a"].report_evaluation, assignments["a"].assignment_id, 1, accuracy=0.5)
    await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="test"))
    assert (await off_loop(ask, "a")).receipt == received.receipt
    with pytest.raises(NoLongerNeededError, match="no data today"):
        await off_loop(ask, "c")
