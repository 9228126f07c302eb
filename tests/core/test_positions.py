"""Positions: what is written comes back, the shortest form is taken, and nothing else is read."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fed_core.codecs.entropy import ByteReader, Coder, varint
from fed_core.codecs.positions import max_position_bytes, read_positions, write_positions
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES

BITMAP, CLASSES, RICE = 0, 1, 2


def drawn(num_coordinates: int, fraction: float, seed: int = 0) -> NDArray[np.int64]:
    return np.flatnonzero(np.random.default_rng(seed).random(num_coordinates) < fraction)


def crowded(num_coordinates: int, seed: int = 0) -> NDArray[np.int64]:
    """In few rows, as the survivors of real updates are."""
    rows = np.repeat(np.random.default_rng(seed).random(-(-num_coordinates // 500)) ** 8, 500)[:num_coordinates]
    return np.flatnonzero(np.random.default_rng(seed + 1).random(num_coordinates) < rows)


def read(data: bytes, num_coordinates: int) -> list[int]:
    reader = ByteReader(data)
    positions = read_positions(reader, num_coordinates)
    reader.done()
    assert positions.dtype == np.int64
    return positions.tolist()


def form_of(data: bytes) -> int:
    return data[len(varint(ByteReader(data).varint()))]


def obvious_read(data: bytes, num_coordinates: int) -> list[int]:
    """The description of bitmaps and of Rice's code, bit by bit."""
    reader = ByteReader(data)
    count = reader.varint()
    if count in (0, num_coordinates):
        return list(range(count))
    form = reader.u8()

    def bits(num_bytes: int) -> list[int]:
        return [byte >> bit & 1 for byte in reader.take(num_bytes) for bit in range(8)]

    if form == BITMAP:
        return [place for place, bit in enumerate(bits(-(-num_coordinates // 8))) if bit]
    planes = [bits(-(-count // 8)) for _ in range(form - RICE)]
    unary, positions = iter(bits(reader.varint())), []
    for index in range(count):
        gap = 0
        while not next(unary):
            gap += 1
        gap = gap << len(planes) | sum(plane[index] << bit for bit, plane in enumerate(planes))
        positions.append((positions[-1] if positions else -1) + 1 + gap)
    return positions


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 400), st.sampled_from(["rans", "packed"]))
def test_any_positions_come_back(data: st.DataObject, num_coordinates: int, coder: Coder) -> None:
    positions = sorted(data.draw(st.sets(st.integers(0, num_coordinates - 1))))
    written = write_positions(np.array(positions, np.int64), num_coordinates, coder)
    assert read(written, num_coordinates) == positions
    assert len(written) <= max_position_bytes(num_coordinates)


@pytest.mark.parametrize("coder", ["rans", "packed"])
@pytest.mark.parametrize("num_coordinates", [70, 1000, 2**16 + 3, MAX_BODY_COORDINATES])
@pytest.mark.parametrize("fraction", [0, 1e-4, 0.003, 0.05, 0.3, 0.5, 0.93, 1])
def test_any_density_comes_back(num_coordinates: int, fraction: float, coder: Coder) -> None:
    positions = drawn(num_coordinates, fraction)
    written = write_positions(positions, num_coordinates, coder)
    assert read(written, num_coordinates) == positions.tolist()
    assert len(written) <= max_position_bytes(num_coordinates)


@pytest.mark.parametrize("positions", [[0], [2**20 - 1], [0, 2**20 - 1], [5, 6, 7, 900_000], list(range(2**20 - 1))])
def test_the_ends_of_a_body_come_back(positions: list[int]) -> None:
    assert read(write_positions(np.array(positions), 2**20), 2**20) == positions


@given(st.sets(st.integers(0, 299)), st.integers(300, 2000))
def test_a_body_means_what_the_format_says(positions: set[int], num_coordinates: int) -> None:
    ascending = sorted(positions)
    written = write_positions(np.array(ascending, np.int64), num_coordinates)
    if form_of(written + b"\0") != CLASSES or len(positions) in (0, num_coordinates):
        assert obvious_read(written, num_coordinates) == ascending


def test_none_and_all_take_a_number() -> None:
    assert write_positions(np.empty(0, np.int64), 1000) == b"\0"
    assert write_positions(np.arange(100), 100) == b"\x64"
    assert write_positions(np.arange(2**20), 2**20) == varint(2**20)


@pytest.mark.parametrize("fraction", [0.0005, 0.003, 0.01, 0.05, 0.2, 0.4])
def test_positions_at_random_take_what_they_must(fraction: float) -> None:
    positions = drawn(2**20, fraction)
    share = len(positions) / 2**20
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert entropy * 2**20 <= 8 * len(write_positions(positions, 2**20)) <= 1.02 * entropy * 2**20 + 100


@pytest.mark.parametrize("num_coordinates", [3000, 2**17])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.2, 0.5, 0.9])
def test_each_form_is_taken_where_it_is_the_shortest(num_coordinates: int, fraction: float) -> None:
    positions = drawn(num_coordinates, fraction)
    count, gaps = len(positions), np.diff(positions, prepend=-1) - 1
    bitmap = num_coordinates / 8
    rice = min(k * -(-count // 8) + (count + int((gaps >> k).sum())) / 8 for k in range(20))
    written = len(write_positions(positions, num_coordinates))
    assert written <= min(bitmap, rice) + 9
    assert form_of(write_positions(positions, num_coordinates)) in (BITMAP, CLASSES, *range(RICE, RICE + 20))


def test_few_positions_are_rice_coded_halves_a_bitmap_and_crowds_get_a_table() -> None:
    assert form_of(write_positions(drawn(4000, 0.01), 4000)) >= RICE
    assert form_of(write_positions(drawn(4000, 0.5), 4000)) == BITMAP
    crowd = crowded(2**17)
    written = write_positions(crowd, 2**17)
    assert form_of(written) == CLASSES
    share = len(crowd) / 2**17
    at_random = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert 8 * len(written) < 0.85 * at_random * 2**17


def rice(count: int, low_bits: int, planes: bytes, unary: bytes) -> bytes:
    return varint(count) + bytes([RICE + low_bits]) + planes + varint(len(unary)) + unary


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "a codec's header wants 1 more bytes where 0 are left"),
        (varint(101), "101 positions among 100 coordinates"),
        (varint(2**62), "positions among 100 coordinates"),
        (b"\x02", "wants 1 more bytes"),
        (b"\x02\xff", "positions in form 255; expected 0 to 22"),
        (b"\x02" + bytes([RICE + 21]), "positions in form 23"),
        (b"\x02\x00" + bytes(12), "wants 13 more bytes"),
        (b"\x02\x00\x01" + bytes(12), "a bitmap with 1 positions; expected 2"),
        (b"\x02\x00\x01" + bytes(11) + b"\x10", "not filled with zeros"),
        (rice(2, 1, b"\x00", b"\x01"), "1 unary gaps in 1 bytes; expected 2"),
        (rice(2, 1, b"\x00", b"\x07"), "3 unary gaps in 1 bytes; expected 2"),
        (rice(2, 1, b"\x00", b"\x03\x00"), "2 unary gaps in 2 bytes; expected 2, and no byte after them"),
        (rice(2, 1, b"\x04", b"\x03"), "not filled with zeros"),
        (rice(2, 0, b"", b"\x01" + bytes(12) + b"\x01"), "14 bytes of unary gaps|the position 104"),
        (rice(2, 1, b"\x00", bytes(30) + b"\x03"), "31 bytes of unary gaps between 100 coordinates"),
        (rice(2, 20, b"\x03" * 20, b"\x03"), "a gap of 1048575 between 100 coordinates"),
        (rice(3, 6, b"\x07" * 6, b"\x07"), "the position 191 among 100 coordinates"),
        (b"\x02\x01\x20\x01", "a table of gaps of classes -1 to -1; expected 1 to 80"),
        (b"\x02\x01\x20\x00", "a table of gaps of classes 0 to 0"),
        (b"\x02\x01\x20\x02", "wants 1 more bytes"),
        (b"\x02\x01\x20\xa2\x01\x01\x00", "a table of gaps of classes 81 to 81"),
        (b"\x02\x01\x20\xa0\x01\x01\x00", "wants 5 more bytes where 0 are left"),
        (b"\x02\x01\x20\xa0\x01\x01\x00" + bytes(5), "a gap of 917504 between 100 coordinates"),
        (b"\x02\x01\x20\xa0\x01\x01\x00" + b"\xff" * 5, "not filled with zeros"),
    ],
)
def test_what_is_no_positions_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        read(data, 100)


def test_the_last_class_reaches_as_far_as_a_body() -> None:
    of_class = b"\x01\x20\xa0\x01\x01\x00"
    assert read(b"\x01" + of_class + b"\xff\xff\x01", 2**20) == [2**20 - 1]
    with pytest.raises(PayloadError, match="the position 2097151 among 1048576 coordinates"):
        read(b"\x02" + of_class + b"\xff\xff\xff\xff\x03", 2**20)


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=60), st.integers(1, 500), st.sampled_from([b"", b"\x05\x01", b"\x05\x05", b"\x50\x01"]))
def test_garbage_is_refused_or_ascending(data: bytes, num_coordinates: int, prefix: bytes) -> None:
    try:
        positions = read_positions(ByteReader(prefix + data), num_coordinates)
    except PayloadError:
        return
    assert (np.diff(positions) > 0).all()
    assert not len(positions) or 0 <= positions[0] <= positions[-1] < num_coordinates
