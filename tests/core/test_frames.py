"""Hand-made chunks agree with the generated classes, whatever the bytes."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fed_core.errors import PayloadError
from fed_core.payload.frames import CHUNK_BYTES, pack_chunk, parse_frame, plan_chunks
from fed_core.payload.manifest import Manifest, parse_manifest, parse_preamble
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec
from fedstream.v1 import common_pb2, transfer_pb2

FRAMES = [transfer_pb2.UploadRequest, transfer_pb2.DownloadResponse]
OFFSETS = st.integers(0, 2**63 - 1)
DATA = st.binary(min_size=1, max_size=300)


@pytest.mark.parametrize("message", FRAMES)
@given(OFFSETS, DATA)
@example(0, b"\0")
@example(2**63 - 1, bytes(CHUNK_BYTES))
def test_a_packed_chunk_is_what_protobuf_writes(
    message: type[transfer_pb2.UploadRequest | transfer_pb2.DownloadResponse], offset: int, data: bytes
) -> None:
    frame = pack_chunk(offset, memoryview(data))
    assert frame == message(chunk=transfer_pb2.Chunk(offset=offset, data=data)).SerializeToString()
    assert parse_frame(frame) == (offset, data)


def test_the_data_of_a_parsed_chunk_is_a_view() -> None:
    frame = pack_chunk(5, b"abc")
    parsed = parse_frame(frame)
    assert parsed is not None
    assert parsed[1].obj is frame


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        transfer_pb2.UploadRequest(header=transfer_pb2.UploadHeader(assignment_id="a")).SerializeToString(),
        transfer_pb2.DownloadResponse(header=transfer_pb2.DownloadHeader()).SerializeToString(),
    ],
)
def test_what_is_not_a_chunk_is_left_to_protobuf(frame: bytes) -> None:
    assert parse_frame(frame) is None


@pytest.mark.parametrize("message", FRAMES)
@settings(max_examples=400)
@given(st.one_of(st.binary(max_size=40).map(lambda tail: b"\x12" + tail), st.binary(max_size=40)))
def test_what_is_accepted_protobuf_reads_alike(
    message: type[transfer_pb2.UploadRequest | transfer_pb2.DownloadResponse], frame: bytes
) -> None:
    try:
        parsed = parse_frame(frame)
    except PayloadError:
        return
    if parsed is not None:
        chunk = message.FromString(frame).chunk
        assert parsed == (chunk.offset, chunk.data)


@settings(max_examples=300)
@given(OFFSETS, DATA, st.data())
def test_a_mutated_chunk_is_refused_or_read_alike(offset: int, data: bytes, choices: st.DataObject) -> None:
    frame = bytearray(pack_chunk(offset, data))
    frame[choices.draw(st.integers(0, min(20, len(frame) - 1)))] ^= 1 << choices.draw(st.integers(0, 7))
    del frame[choices.draw(st.integers(0, len(frame))) :]
    try:
        parsed = parse_frame(bytes(frame))
    except PayloadError:
        return
    if parsed is not None:
        chunk = transfer_pb2.UploadRequest.FromString(bytes(frame)).chunk
        assert parsed == (chunk.offset, chunk.data)


def test_fields_in_the_other_order_are_understood() -> None:
    body = b"\x12\x02hi" + b"\x08\x07"
    assert parse_frame(b"\x12" + bytes([len(body)]) + body) == (7, b"hi")


@pytest.mark.parametrize(
    "frame",
    [
        b"\x12",  # no length
        b"\x12\x05\x12\x02hi",  # longer than it is
        b"\x12\x04\x12\x02hi\x0a\x00",  # a header behind the chunk
        b"\x12\x04\x12\x09hi",  # data that ends beyond the chunk
        b"\x12\x02\x08\x01",  # no data
        b"\x12\x06\x12\x02hi\x18\x01",  # a field that is not ours
        b"\x12\x0f\x12\x02hi\x08" + b"\xff" * 9 + b"\x01",  # a negative offset
        b"\x12\x0f\x12\x02hi\x08" + b"\xff" * 10,  # a varint without end
    ],
)
def test_a_malformed_chunk_is_refused(frame: bytes) -> None:
    with pytest.raises(PayloadError):
        parse_frame(frame)


def test_a_chunk_over_the_limit_is_refused_by_both_ends() -> None:
    with pytest.raises(ValueError, match="1048577 bytes"):
        pack_chunk(0, bytes(CHUNK_BYTES + 1))
    chunk = transfer_pb2.Chunk(data=bytes(CHUNK_BYTES + 1))
    with pytest.raises(PayloadError, match="1048577 bytes"):
        parse_frame(transfer_pb2.UploadRequest(chunk=chunk).SerializeToString())


def test_protobuf_refuses_what_we_call_garbage_too() -> None:
    with pytest.raises(DecodeError):
        transfer_pb2.UploadRequest.FromString(b"\x12\x05\x12\x02hi")


def manifest_of(sizes: list[int]) -> Manifest:
    file = io.BytesIO()
    write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_MODEL,
        run_id="",
        round=0,
        model_version=0,
        base_digest=b"",
        update=None,
        tensors=[
            (TensorSpec(f"w{index}", (size,), "uint8"), torch.zeros(size, dtype=torch.uint8))
            for index, size in enumerate(sizes)
        ],
    )
    data = file.getvalue()
    preamble = parse_preamble(data)
    return parse_manifest(preamble, data[44 : 44 + preamble.manifest_bytes])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0, 1, 1000, 700_000, 2**20, 2_500_000]), max_size=5), st.data())
def test_planned_chunks_cover_the_rest_and_end_with_segments(sizes: list[int], choices: st.DataObject) -> None:
    manifest = manifest_of(sizes)
    start = choices.draw(st.integers(0, manifest.total_bytes))
    chunks = list(plan_chunks(manifest, start))
    assert sum(length for _, length in chunks) == manifest.total_bytes - start
    assert all(1 <= length <= CHUNK_BYTES for _, length in chunks)
    assert all(one + length == other for (one, length), (other, _) in pairwise(chunks))
    ends = {manifest.first_segment, manifest.total_bytes} | {span.end for span in manifest.segments}
    for offset, length in chunks:
        assert offset + length in ends or not any(offset < end <= offset + CHUNK_BYTES for end in ends)
