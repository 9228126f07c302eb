"""Integers of any size below 2^15, coded by tables that stay short: small ones are symbols, of large ones the leading bits are.

A table over all values of a heavy-tailed tensor would have thousands of entries, most of them seen once. So a magnitude of 16 or
more becomes a token that says its octave and the two bits after the leading one, and the bits below are sent as they are: within a
quarter of an octave the values of anything smooth are about equally likely. (JPEG XL's hybrid integers, Alakuijala et al. 2019,
https://doi.org/10.1117/12.2529237, with a sign.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fed_core.codecs.entropy import (
    ByteReader,
    Coder,
    FrequencyTable,
    Ints,
    decode_symbols,
    encode_symbols,
    uniform_table,
    varint,
)
from fed_core.errors import PayloadError

MAX_MAGNITUDE: Final = 2**15 - 1
NUM_DIRECT: Final = 16
"""Magnitudes below this are tokens of their own."""


def _magnitude_tables() -> tuple[Ints, Ints, Ints]:
    magnitude = np.arange(MAX_MAGNITUDE + 1)
    # frexp is exact: the bit length less one.
    octave = np.frexp(np.maximum(magnitude, 1).astype(np.float64))[1] - 1
    token = NUM_DIRECT + 4 * (octave - 4) + (magnitude >> np.maximum(octave - 2, 0) & 3)
    token = np.where(magnitude < NUM_DIRECT, magnitude, token).astype(np.int32)
    base = np.flatnonzero(np.diff(token, prepend=-1)).astype(np.int32)
    width = np.where(base < NUM_DIRECT, 0, octave[base] - 2).astype(np.int32)
    return token, base, width


# Token of each magnitude; then, for each token, its smallest magnitude and how many bits are sent besides it.
_TOKEN, _BASE, TOKEN_WIDTH = _magnitude_tables()
MAX_TOKEN: Final = len(_BASE) - 1
_WIDTHS: Final = range(2, int(TOKEN_WIDTH[-1]) + 1)


def to_tokens(values: NDArray[Any]) -> Ints:
    """Tokens, -MAX_TOKEN to MAX_TOKEN, of integers up to MAX_MAGNITUDE in magnitude; int32."""
    tokens = values.astype(np.int32)
    large = _large(tokens)
    tokens[large] = np.sign(tokens[large]) * _TOKEN[np.abs(tokens[large])]
    return tokens


def max_magnitude(table: FrequencyTable) -> int:
    """The largest magnitude that a table of tokens can give. Raises PayloadError for a table of something else."""
    largest = max(-table.lowest, table.lowest + len(table.frequencies) - 1)
    if largest > MAX_TOKEN:
        raise PayloadError(f"a frequency table of tokens up to {largest}; expected at most {MAX_TOKEN}")
    return int(_BASE[largest] + (1 << TOKEN_WIDTH[largest]) - 1)


def write_integers(parts: Sequence[tuple[NDArray[Any], FrequencyTable]], coder: Coder = "rans") -> bytes:
    """Integer arrays, each with a table of its tokens, as bytes that `read_integers` reads; ValueError for what a table lacks."""
    if not any(_is_wide(table) for _, table in parts):
        return encode_symbols(parts, coder)
    tokens, sizes = [], []
    for values, table in parts:
        tokens.append((to_tokens(values) if _is_wide(table) else values, table))
        sizes.append(np.abs(values[_large(tokens[-1][0])]))
    magnitudes = np.concatenate(sizes)
    token = _TOKEN[magnitudes]
    widths, offsets = TOKEN_WIDTH[token], magnitudes - _BASE[token]
    symbols = encode_symbols(tokens, coder)
    rest = encode_symbols([(offsets[widths == width], uniform_table(width)) for width in _WIDTHS], coder)
    return varint(len(symbols)) + symbols + rest


def read_integers(data: bytes | memoryview, parts: Sequence[tuple[int, FrequencyTable]]) -> list[Ints]:
    """The int32 arrays of so many integers; the tables must have passed `max_magnitude`.

    Raises PayloadError unless `data` is just that. Memory is a small multiple of what is returned.
    """
    if not any(_is_wide(table) for _, table in parts):
        return decode_symbols(data, parts)
    reader = ByteReader(data)
    values = decode_symbols(reader.take(reader.varint()), parts)
    places = [_large(part) for part in values]
    tokens = np.concatenate([part[place] for part, place in zip(values, places, strict=True)])
    magnitudes, widths = _BASE[np.abs(tokens)], TOKEN_WIDTH[np.abs(tokens)]
    chosen = [np.flatnonzero(widths == width) for width in _WIDTHS]
    rest = decode_symbols(
        reader.take(reader.left),
        [(len(each), uniform_table(width)) for each, width in zip(chosen, _WIDTHS, strict=True)],
    )
    for each, offsets in zip(chosen, rest, strict=True):
        magnitudes[each] += offsets
    large = np.split(np.sign(tokens) * magnitudes, np.cumsum([len(place) for place in places])[:-1])
    for part, place, exact in zip(values, places, large, strict=True):
        part[place] = exact
    return values


def max_integer_bytes(count: int, num_parts: int) -> int:
    """The most bytes that `write_integers` makes of so many integers in so many parts, whatever the tables."""
    token_bits = (2 * MAX_TOKEN).bit_length()
    symbols = 1 + -(-count * token_bits // 8) + num_parts
    return len(varint(symbols)) + symbols + 1 + -(-count * _WIDTHS[-1] // 8) + len(_WIDTHS)


def _is_wide(table: FrequencyTable) -> bool:
    return max(-table.lowest, table.lowest + len(table.frequencies) - 1) >= NUM_DIRECT


def _large(integers: NDArray[Any]) -> NDArray[np.intp]:
    """Places of those that are not tokens of themselves."""
    return np.flatnonzero((integers >= NUM_DIRECT) | (integers <= -NUM_DIRECT))
