"""Where the survivors of a sparse vector are: ascending positions as bytes, in the shortest of three forms.

A bitmap costs a bit a coordinate. Rice's code (1979, https://doi.org/10.1109/TCOM.1979.1094533) of the gaps between survivors is
within a few hundredths of a bit of what positions drawn at random cost, from one survivor in four on; sparse ternary compression
(Sattler et al. 2019, https://arxiv.org/abs/1903.02891) uses it, too. Updates of real models are not random: survivors crowd in few
rows and columns, and classes of gaps under a frequency table of their own take up to a third less than Rice's code (measured at the
largest 1 % of a CNN's update: 5.0 bits a survivor instead of 7.5). Gaps as varints, the usual fourth, never were the shortest.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fed_core.codecs.entropy import (
    ByteReader,
    Coder,
    FrequencyTable,
    decode_symbols,
    encode_symbols,
    read_table,
    varint,
    write_table,
)
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES

Positions = NDArray[np.int64]

# The form of what is neither empty nor all: one of these, or _RICE + the number of low bits.
_BITMAP, _CLASSES, _RICE = range(3)
_MAX_LOW_BITS: Final = (MAX_BODY_COORDINATES - 1).bit_length()
# Gaps below this are classes of their own; larger ones share four classes an octave, as the integers of `tokens` do.
_NUM_DIRECT: Final = 16
# The symbol of the first class: a table from zero on might be mirrored.
_FIRST_CLASS: Final = 1
# Fewer survivors do not pay for a table.
_LEAST_CLASSED: Final = 64


def _class_tables() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    octaves = np.arange(4, _MAX_LOW_BITS)
    bases = np.concatenate([np.arange(_NUM_DIRECT), ((4 + np.arange(4)) << (octaves[:, None] - 2)).reshape(-1)])
    widths = np.concatenate([np.zeros(_NUM_DIRECT, np.int64), np.repeat(octaves - 2, 4)])
    return bases.astype(np.int64), widths.astype(np.int64)


# The smallest gap of each class, and how many bits say which of its gaps it is.
_BASES, _WIDTHS = _class_tables()


def write_positions(positions: NDArray[Any], num_coordinates: int, coder: Coder = "rans") -> bytes:
    """Ascending positions below `num_coordinates` (at most 2^20), as bytes that `read_positions` reads: the shortest form.

    Never longer than `max_position_bytes`. First the number of positions, as a varint; where that is neither 0 nor
    `num_coordinates`, a byte that names the form, and that.
    """
    count = len(positions)
    if count in (0, num_coordinates):
        return varint(count)
    gaps = np.diff(positions, prepend=-1) - 1
    low_bits = _best_low_bits(gaps)
    forms = [bytes([_RICE + low_bits]) + _write_rice(gaps, low_bits)]
    if count >= _LEAST_CLASSED:
        forms.append(bytes([_CLASSES]) + _write_classes(gaps, coder))
    best = min(forms, key=len)
    if len(best) > _bitmap_bytes(num_coordinates):
        is_there = np.zeros(num_coordinates, np.bool_)
        is_there[positions] = True
        best = bytes([_BITMAP]) + np.packbits(is_there, bitorder="little").tobytes()
    return varint(count) + best


def read_positions(reader: ByteReader, num_coordinates: int) -> Positions:
    """The positions, and no more bytes than are theirs.

    Raises PayloadError on anything but ascending positions below `num_coordinates`. Memory: some 40 bytes a position and one a
    coordinate.
    """
    count = reader.varint()
    if count > num_coordinates:
        raise PayloadError(f"{count} positions among {num_coordinates} coordinates")
    if count == 0:
        return np.empty(0, np.int64)
    if count == num_coordinates:
        return np.arange(num_coordinates)
    form = reader.u8()
    if form == _BITMAP:
        positions = np.flatnonzero(_unpack(reader.take(_bitmap_bytes(num_coordinates)), num_coordinates))
        if len(positions) != count:
            raise PayloadError(f"a bitmap with {len(positions)} positions; expected {count}")
        return positions
    if form == _CLASSES:
        gaps = _read_classes(reader, count)
    elif form <= _RICE + _MAX_LOW_BITS:
        gaps = _read_rice(reader, count, form - _RICE, num_coordinates)
    else:
        raise PayloadError(f"positions in form {form}; expected 0 to {_RICE + _MAX_LOW_BITS}")
    # Before they are summed: no sum of so many may overflow.
    if gaps.max() >= num_coordinates:
        raise PayloadError(f"a gap of {gaps.max()} between {num_coordinates} coordinates")
    gaps += 1
    positions = np.cumsum(gaps)
    positions -= 1
    if positions[-1] >= num_coordinates:
        raise PayloadError(f"the position {positions[-1]} among {num_coordinates} coordinates")
    return positions


def max_position_bytes(num_coordinates: int) -> int:
    """The most bytes that any positions among so many coordinates take: those of a bitmap."""
    return len(varint(num_coordinates)) + 1 + _bitmap_bytes(num_coordinates)


def _bitmap_bytes(num_coordinates: int) -> int:
    return (num_coordinates + 7) // 8


def _unpack(data: memoryview, count: int) -> NDArray[np.bool_]:
    """So many bits, lowest first. Raises PayloadError unless the last byte is filled with zeros."""
    if count % 8 and data[-1] >> count % 8:
        raise PayloadError("the last byte of some bits is not filled with zeros")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little").view(np.bool_)


# ---------------------------------------------------------------------------------------------------------------------- Rice's
# code


def _best_low_bits(gaps: Positions) -> int:
    """The parameter with the fewest bits: their number is convex in it, and its least near the logarithm of the mean gap."""

    def num_bits(low_bits: int) -> int:
        return low_bits * len(gaps) + int((gaps >> low_bits).sum())

    best = min(max(int(gaps.mean()).bit_length() - 1, 0), _MAX_LOW_BITS)
    bits = num_bits(best)
    for direction in (1, -1):
        while 0 <= best + direction <= _MAX_LOW_BITS and (found := num_bits(best + direction)) < bits:
            best, bits = best + direction, found
    return best


def _write_rice(gaps: Positions, low_bits: int) -> bytes:
    """The low bits of all gaps, plane by plane; then what is left of each, as so many zeros and a one, in a length and bits."""
    planes = [np.packbits((gaps >> bit & 1).astype(np.uint8), bitorder="little").tobytes() for bit in range(low_bits)]
    ends = np.cumsum((gaps >> low_bits) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    packed = np.packbits(unary, bitorder="little").tobytes()
    return b"".join([*planes, varint(len(packed)), packed])


def _read_rice(reader: ByteReader, count: int, low_bits: int, num_coordinates: int) -> Positions:
    num_bytes = _bitmap_bytes(count)
    planes = reader.take(low_bits * num_bytes)
    packed = reader.take(reader.varint())
    if len(packed) > _bitmap_bytes(count + (num_coordinates >> low_bits)):
        raise PayloadError(f"{len(packed)} bytes of unary gaps between {num_coordinates} coordinates")
    ends = np.flatnonzero(_unpack(packed, 8 * len(packed)))
    if len(ends) != count or ends[-1] // 8 != len(packed) - 1:
        raise PayloadError(f"{len(ends)} unary gaps in {len(packed)} bytes; expected {count}, and no byte after them")
    gaps = np.diff(ends, prepend=-1)
    gaps -= 1
    for bit in reversed(range(low_bits)):
        gaps <<= 1
        gaps |= _unpack(planes[bit * num_bytes : (bit + 1) * num_bytes], count)
    return gaps


# ------------------------------------------------------------------------------------------------------------------ classes of
# gaps


def _write_classes(gaps: Positions, coder: Coder) -> bytes:
    """A table of classes, the length of the coded classes and these; then what places the gaps in them, bit by bit in planes."""
    # frexp is exact: the bit length.
    lengths = np.frexp(np.maximum(gaps, 1).astype(np.float64))[1].astype(np.int64)
    shifts = np.maximum(lengths - 3, 0)
    classes = np.where(gaps < _NUM_DIRECT, gaps, _NUM_DIRECT + 4 * (lengths - 5) + (gaps >> shifts & 3))
    table = FrequencyTable.from_counts(_FIRST_CLASS, np.bincount(classes))
    symbols = encode_symbols([(classes + _FIRST_CLASS, table)], coder)
    offsets, widths = gaps - _BASES[classes], _WIDTHS[classes]
    planes = [(offsets[widths > bit] >> bit & 1).astype(np.uint8) for bit in range(int(widths.max()))]
    packed = np.packbits(np.concatenate([np.empty(0, np.uint8), *planes]), bitorder="little").tobytes()
    return b"".join([write_table(table), varint(len(symbols)), symbols, packed])


def _read_classes(reader: ByteReader, count: int) -> Positions:
    table = read_table(reader, len(_BASES))
    last = table.lowest + len(table.frequencies) - 1
    if table.lowest < _FIRST_CLASS or last >= _FIRST_CLASS + len(_BASES):
        raise PayloadError(f"a table of gaps of classes {table.lowest} to {last}; expected 1 to {len(_BASES)}")
    (classes,) = decode_symbols(reader.take(reader.varint()), [(count, table)])
    classes -= _FIRST_CLASS
    gaps, widths = _BASES[classes], _WIDTHS[classes]
    num_bits = int(widths.sum())
    bits = _unpack(reader.take((num_bits + 7) // 8), num_bits)
    for bit in range(int(widths.max())):
        places = np.flatnonzero(widths > bit)
        gaps[places] += bits[: len(places)].astype(np.int64) << bit
        bits = bits[len(places) :]
    return gaps
