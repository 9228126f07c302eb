"""Chunks of a payload as they travel, written and read without protobuf.

`UploadRequest` and `DownloadResponse` both hold their `Chunk` in field 2, so one hand-made frame serves both, and any
language's stubs still understand it. A frame costs a few bytes before the data on the way out and a memoryview on the way in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.payload.manifest import Manifest
from fed_core.payload.wire import BYTES, VARINT, read_fields, read_varint, write_varint

CHUNK_BYTES: Final = MAX_BODY_BYTES

_CHUNK_TAG: Final = 2 << 3 | BYTES
_OFFSET, _DATA = 1, 2


def pack_chunk(offset: int, data: bytes | memoryview) -> bytes:
    """The frame of `data`, 1 byte to 1 MiB, that begins at `offset` of the file: one copy of the data, into the frame."""
    if not (0 <= offset < 2**63 and 1 <= len(data) <= CHUNK_BYTES):
        raise ValueError(
            f"a chunk of {len(data)} bytes at offset {offset}; expected 1 to {CHUNK_BYTES} bytes from 0 on"
        )
    # As protobuf writes it: a field that is zero is left out.
    header = (b"\x08" + write_varint(offset) if offset else b"") + b"\x12" + write_varint(len(data))
    return b"".join((b"\x12", write_varint(len(header) + len(data)), header, data))


def parse_frame(frame: bytes) -> tuple[int, memoryview] | None:
    """Offset and data (a view into `frame`) of a chunk, or None where the frame is something else: parse that by protobuf.

    Raises PayloadError for a chunk that is malformed, empty, over 1 MiB, or followed by anything else. What it accepts, protobuf
    reads the same way.
    """
    if not frame or frame[0] != _CHUNK_TAG:
        return None
    length, start = read_varint(frame, 1, len(frame))
    if start + length != len(frame):
        raise PayloadError(f"a chunk of {length} bytes in a frame of {len(frame)}; expected one chunk and nothing else")
    offset, data = 0, memoryview(b"")
    for field in read_fields(frame, start, len(frame)):
        if field.number == _OFFSET and field.wire_type == VARINT:
            offset = field.value
        elif field.number == _DATA and field.wire_type == BYTES:
            data = memoryview(frame)[field.start : field.end]
        else:
            raise PayloadError(f"a chunk with the unexpected field {field.number}")
    if not (offset < 2**63 and 1 <= len(data) <= CHUNK_BYTES):
        raise PayloadError(
            f"a chunk of {len(data)} bytes at offset {offset}; expected 1 to {CHUNK_BYTES} bytes from 0 on"
        )
    return offset, data


def plan_chunks(manifest: Manifest, offset: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, length) of the chunks in which to send a payload from `offset` on, to the end.

    A chunk ends with a segment wherever one does within 1 MiB, so that a receiver seldom has to join two chunks to check one.
    """
    ends = iter([span.offset for span in manifest.segments[:1]] + [span.end for span in manifest.segments])
    end = next(ends, manifest.total_bytes)
    while offset < manifest.total_bytes:
        stop = min(offset + CHUNK_BYTES, manifest.total_bytes)
        boundary = offset
        while end <= stop:
            boundary = max(boundary, end)
            end = next(ends, manifest.total_bytes + 1)
        stop = boundary if boundary > offset else stop
        yield offset, stop - offset
        offset = stop
