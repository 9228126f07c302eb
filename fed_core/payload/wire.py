"""Protobuf's wire format read by hand: field by field, without copying and without building messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from fed_core.errors import PayloadError

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5

_MAX_VARINT_BYTES = 10


class Field(NamedTuple):
    """One field: its number, its wire type, where its value lies, and a varint's value (0 for the other types)."""

    number: int
    wire_type: int
    start: int
    end: int
    value: int


def read_varint(data: bytes | memoryview, start: int, end: int) -> tuple[int, int]:
    """An unsigned varint of at most 64 bits and where it ends. Raises PayloadError where it does not end in time."""
    value = 0
    for index in range(start, min(end, start + _MAX_VARINT_BYTES)):
        byte = data[index]
        value |= (byte & 0x7F) << 7 * (index - start)
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, index + 1
    raise PayloadError(f"no varint at byte {start}")


def write_varint(value: int) -> bytes:
    """An unsigned varint."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_fields(data: bytes | memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in `data[start:end]`, in order. Raises PayloadError where it is not one; never reads beyond it."""
    while start < end:
        tag, at = read_varint(data, start, end)
        number, wire_type = tag >> 3, tag & 7
        value = 0
        if wire_type == VARINT:
            value, stop = read_varint(data, at, end)
        elif wire_type == BYTES:
            length, at = read_varint(data, at, end)
            stop = at + length
        elif wire_type in (FIXED32, FIXED64):
            stop = at + (4 if wire_type == FIXED32 else 8)
        else:
            raise PayloadError(f"wire type {wire_type} at byte {start} is not used here")
        if number == 0 or stop > end:
            raise PayloadError(f"field {number} at byte {start} ends beyond its message")
        yield Field(number, wire_type, at, stop, value)
        start = stop
