"""Symbols to bytes and back: any table, any coder, and bytes that nobody coded."""

from __future__ import annotations

import contextlib
import math
import sys
import tracemalloc
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fed_core.codecs.entropy import (
    TABLE_SUM,
    ByteReader,
    Coder,
    FrequencyTable,
    SymbolReader,
    decode_symbols,
    encode_symbols,
    max_symbol_bytes,
    read_table,
    svarint,
    uniform_table,
    varint,
    write_table,
)
from fed_core.errors import PayloadError

Part = tuple[NDArray[Any], FrequencyTable]
EVERY_CODER = pytest.mark.parametrize("coder", ["rans", "packed"])


@st.composite
def tables(draw: st.DrawFn) -> FrequencyTable:
    """From counts like those of quantized values, of few symbols, of many, of rare ones far away."""
    counts = draw(
        st.one_of(
            st.lists(st.integers(0, 5), min_size=1, max_size=12),
            st.lists(st.integers(0, 10**9), min_size=1, max_size=60),
            st.builds(lambda gap, far: [1000, 10] + [0] * gap + [far], st.integers(0, 3000), st.integers(1, 5)),
            st.builds(lambda size: [1] * size, st.integers(1, 700)),
        ).filter(any)
    )
    return FrequencyTable.from_counts(draw(st.integers(-50, 50)), np.array(counts))


def symbols_of(table: FrequencyTable, count: int, seed: int) -> NDArray[np.int32]:
    """Random ones that the table gives, as often as it says."""
    probabilities = table.frequencies / TABLE_SUM
    drawn = np.random.default_rng(seed).choice(len(probabilities), size=count, p=probabilities)
    return (drawn + table.lowest).astype(np.int32)


def laplace_table(scale: float, seed: int = 0, count: int = 100_000) -> tuple[FrequencyTable, NDArray[np.int32]]:
    symbols = np.rint(np.random.default_rng(seed).laplace(scale=scale, size=count)).astype(np.int32)
    lowest = int(symbols.min())
    return FrequencyTable.from_counts(lowest, np.bincount(symbols - lowest)), symbols


def rans_by_hand(data: bytes, parts: Sequence[tuple[int, FrequencyTable]]) -> list[list[int]]:
    """The decoder of the format in Python's integers: Duda's rANS, a state of 64 bits, words of 32, probabilities of 24."""
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    state = 0
    decoded = []

    def refilled(state: int) -> int:
        while state < 2**32 and words:
            state = state << 32 | words.pop()
        return state

    state = refilled(state)
    for count, table in parts:
        weights = [int(f) << 8 for f in table.frequencies]
        out = []
        for _ in range(count):
            low, rest, symbol = state % 2**24, state >> 24, 0
            while low >= weights[symbol]:
                low -= weights[symbol]
                symbol += 1
            state = refilled(rest * weights[symbol] + low)
            out.append(symbol + table.lowest)
        decoded.append(out)
    assert state == 2**24
    assert not words
    return decoded


# ------------------------------------------------------------------------------------------------------------------------- tables


@given(tables())
def test_a_table_is_read_as_it_was_written(table: FrequencyTable) -> None:
    reader = ByteReader(write_table(table))
    again = read_table(reader)
    reader.done()
    assert again.lowest == table.lowest
    assert np.array_equal(again.frequencies, table.frequencies)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40).filter(any), st.integers(-40, 40))
@example([1] * 3, 0)
@example([0, 0, 7, 0], -3)
@example([1, 10**12], -1)
@example([5, 0, 5], -1)
def test_every_counted_symbol_can_be_coded(counts: list[int], lowest: int) -> None:
    table = FrequencyTable.from_counts(lowest, np.array(counts))
    assert int(table.frequencies.sum()) == TABLE_SUM
    for at, count in enumerate(counts):
        if count:
            assert table.frequencies[lowest + at - table.lowest] >= 1


def test_a_table_of_all_symbols_exists() -> None:
    table = FrequencyTable.from_counts(-(2**15), np.ones(2**16))
    assert table.num_symbols == 2**16
    assert np.array_equal(read_table(ByteReader(write_table(table))).frequencies, table.frequencies)


def test_a_table_that_is_too_long_is_refused_before_it_is_read() -> None:
    data = write_table(FrequencyTable.from_counts(-(2**15), np.ones(2**16)))
    with pytest.raises(PayloadError, match="65536 symbols; expected at most 256"):
        read_table(ByteReader(data[:12]), 256)


def test_a_table_is_close_to_the_entropy_and_small() -> None:
    for scale in (0.1, 1.0, 20.0):
        table, symbols = laplace_table(scale)
        counts = np.bincount(symbols - table.lowest, minlength=len(table.frequencies))
        seen = counts[counts > 0]
        entropy = float(-(seen @ np.log2(seen / symbols.size)))
        assert entropy <= table.bits(counts) <= 1.001 * entropy + 100
        assert len(write_table(table)) <= 3 + table.num_symbols


def test_a_table_of_even_odds_between_signs_says_it_once() -> None:
    one_sided, mirrored = (
        write_table(FrequencyTable.from_counts(lowest, np.array([31, 960, 40_000, 1000, 29]))) for lowest in (0, -2)
    )
    assert len(mirrored) < len(one_sided) - 2


def test_bits_are_infinite_for_a_symbol_that_cannot_occur() -> None:
    table = FrequencyTable.from_counts(0, np.array([500, 0, 500]))
    assert table.bits(np.array([4, 0, 4])) == pytest.approx(8)
    assert table.bits(np.array([0, 1, 0])) == math.inf
    assert table.bits(np.array([0, 0, 0, 1])) == math.inf


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1]])
def test_nothing_counted_is_no_table(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="positive count"):
        FrequencyTable.from_counts(0, np.array(counts))


@pytest.mark.parametrize(
    ("lowest", "frequencies"),
    [(0, [1, 2]), (0, [0, TABLE_SUM]), (0, [TABLE_SUM, 0]), (0, [-1, TABLE_SUM + 1]), (2**15, [TABLE_SUM]), (0, [])],
)
def test_what_is_no_table_is_refused(lowest: int, frequencies: list[int]) -> None:
    with pytest.raises(ValueError, match=r"frequencies|symbol"):
        FrequencyTable(lowest, np.array(frequencies, np.int32))


@settings(max_examples=300)
@given(st.binary(max_size=24))
@example(b"\x20")  # a single symbol, not named
@example(b"\x20\xff\xff\xff\xff\xff\xff\xff\xff\x7f")  # far outside of int16
@example(b"\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x00")  # 2^62 symbols
@example(b"\x10\x03\x80\x80\x80")
@example(b"\x0f\x00\x03\x00\x00\x00\x00\x00\x00\x00")
def test_any_bytes_are_a_table_or_an_error(data: bytes) -> None:
    try:
        table = read_table(ByteReader(data))
    except PayloadError:
        return
    assert int(table.frequencies.sum()) == TABLE_SUM
    assert len(table.frequencies) <= 2**16


@given(tables(), st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_table_is_a_table_or_an_error(table: FrequencyTable, at: int, flip: int) -> None:
    data = bytearray(write_table(table))
    data[at % len(data)] ^= flip
    with contextlib.suppress(PayloadError):
        assert int(read_table(ByteReader(bytes(data))).frequencies.sum()) == TABLE_SUM
    with pytest.raises(PayloadError):
        read_table(ByteReader(write_table(table)[:-1]))


def test_a_table_s_bytes_stay_as_they_are() -> None:
    """The format is a contract between versions: who changes these bytes needs a codec of another name."""
    assert write_table(FrequencyTable(-1, np.array([2048, 61440, 2048], np.int32))) == bytes.fromhex("100110")
    assert write_table(FrequencyTable(3, np.array([49152, 0, 0, 16384], np.int32))) == bytes.fromhex("0006040004083e")


# ------------------------------------------------------------------------------------------------------------------------- numbers


@given(st.integers(-(2**61), 2**61))
def test_numbers_come_back(value: int) -> None:
    reader = ByteReader(varint(abs(value)) + svarint(value))
    assert (reader.varint(), reader.svarint()) == (abs(value), value)
    reader.done()


def test_reading_past_the_end_is_refused() -> None:
    for data in (b"", b"\x80", b"\xff" * 9):
        with pytest.raises(PayloadError, match="header"):
            ByteReader(data).varint()
    with pytest.raises(PayloadError, match="wants 4 more bytes where 3 are left"):
        ByteReader(b"abc").take(4)
    with pytest.raises(PayloadError, match="followed by 3 bytes"):
        ByteReader(b"abc").done()
    with pytest.raises(ValueError, match="varint"):
        varint(-1)


# ------------------------------------------------------------------------------------------------------------------------- symbols


@EVERY_CODER
@given(
    parts=st.lists(st.tuples(tables(), st.integers(0, 400)), max_size=4),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([np.int16, np.int32, np.int64]),
)
def test_symbols_come_back(
    coder: Coder, parts: list[tuple[FrequencyTable, int]], seed: int, dtype: type[np.signedinteger[Any]]
) -> None:
    coded = [(symbols_of(table, count, seed).astype(dtype), table) for table, count in parts]
    data = encode_symbols(coded, coder)
    sizes = [(count, table) for table, count in parts]
    assert 1 <= len(data) <= max_symbol_bytes(sizes)
    decoded = decode_symbols(data, sizes)
    assert len(decoded) == len(parts)
    for (symbols, _), again in zip(coded, decoded, strict=True):
        assert again.dtype == np.int32
        assert np.array_equal(symbols, again)


@EVERY_CODER
@pytest.mark.parametrize("num_symbols", [2, 3, 6, 7, 16, 17, 256, 257, 4000, 2**16])
def test_alphabets_of_every_size_come_back(coder: Coder, num_symbols: int) -> None:
    table = FrequencyTable.from_counts(-(2**15), np.ones(num_symbols))
    symbols = np.concatenate([symbols_of(table, 1001, 1), [table.lowest, table.lowest + num_symbols - 1]])
    (again,) = decode_symbols(encode_symbols([(symbols, table)], coder), [(symbols.size, table)])
    assert np.array_equal(symbols, again)


def test_rans_is_what_the_format_says() -> None:
    """Integers alone decide: constriction's floats would show here on any machine where they round."""
    parts = [laplace_table(scale, seed, 3000) for seed, scale in enumerate((0.2, 2.0, 150.0))]
    data = encode_symbols([(symbols, table) for table, symbols in parts])
    assert data[0] == 1
    decoded = rans_by_hand(data[1:], [(symbols.size, table) for table, symbols in parts])
    for (_, symbols), again in zip(parts, decoded, strict=True):
        assert symbols.tolist() == again


def test_coded_symbols_stay_as_they_are() -> None:
    """Bytes that other versions and other machines must read."""
    table = FrequencyTable(-1, np.array([2048, 61440, 2048], np.int32))
    symbols = np.array([0, 0, 1, 0, 0, 0, -1, 0] * 8)
    assert encode_symbols([(symbols, table)]).hex() == "01000008cb1424aba38e88dabcc016"


def test_rans_is_within_a_few_bytes_of_the_ideal() -> None:
    for scale in (0.1, 1.0, 20.0):
        table, symbols = laplace_table(scale)
        counts = np.bincount(symbols - table.lowest, minlength=len(table.frequencies))
        assert len(encode_symbols([(symbols, table)])) <= table.bits(counts) / 8 * 1.0001 + 5


def test_packing_is_close_to_rans_at_a_bit_and_more() -> None:
    table, symbols = laplace_table(1.0)
    rans, packed = (len(encode_symbols([(symbols, table)], coder)) for coder in ("rans", "packed"))
    assert rans < packed < 1.05 * rans


def test_parts_share_one_state() -> None:
    table, symbols = laplace_table(1.0, count=400)
    together = len(encode_symbols([(symbols[at : at + 10], table) for at in range(0, 400, 10)]))
    assert together <= len(encode_symbols([(symbols, table)])) + 1


@EVERY_CODER
def test_what_the_tables_say_already_costs_one_byte(coder: Coder) -> None:
    single = FrequencyTable.from_counts(7, np.array([3]))
    several, _ = laplace_table(1.0)
    parts = [(np.full(1000, 7), single), (np.empty(0, np.int32), several)]
    data = encode_symbols(parts, coder)
    assert data == b"\0"
    sevens, nothing = decode_symbols(data, [(1000, single), (0, several)])
    assert sevens.tolist() == [7] * 1000
    assert nothing.tolist() == []
    with pytest.raises(PayloadError, match="nothing to say"):
        decode_symbols(b"\0\0", [(1000, single)])


@EVERY_CODER
def test_a_table_that_does_not_fit_never_costs_more_than_plain_bits(coder: Coder) -> None:
    table = FrequencyTable(0, np.array([TABLE_SUM - 4, 1, 1, 1, 1], np.int32))
    symbols = np.arange(4000) % 4 + 1
    assert len(encode_symbols([(symbols, table)], coder)) <= 1 + 4000 * 3 // 8


@pytest.mark.parametrize("symbol", [-1, 1, 3])
def test_a_symbol_that_the_table_lacks_is_refused(symbol: int) -> None:
    table = FrequencyTable.from_counts(0, np.array([5, 0, 5]))
    with pytest.raises(ValueError, match="symbol"):
        encode_symbols([(np.array([0, symbol]), table)])


def test_uniform_bits_cost_what_they_are() -> None:
    bits = np.random.default_rng(0).integers(0, 2**9, 1000)
    data = encode_symbols([(bits, uniform_table(9))])
    assert len(data) <= 1 + 1000 * 9 / 8 + 4
    assert np.array_equal(decode_symbols(data, [(1000, uniform_table(9))])[0], bits)


# ----------------------------------------------------------------------------------------------------------- without constriction


def test_without_constriction_a_sender_packs_and_a_receiver_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, symbols = laplace_table(1.0)
    coded = encode_symbols([(symbols, table)], "rans")
    monkeypatch.setitem(sys.modules, "constriction", None)
    packed = encode_symbols([(symbols, table)], "rans")
    assert packed == encode_symbols([(symbols, table)], "packed")
    assert np.array_equal(decode_symbols(packed, [(symbols.size, table)])[0], symbols)
    with pytest.raises(PayloadError, match="pip install constriction"):
        decode_symbols(coded, [(symbols.size, table)])


@EVERY_CODER
def test_a_reader_takes_parts_whose_tables_follow_from_those_before(coder: Coder) -> None:
    fair, rare = uniform_table(1), FrequencyTable.from_counts(0, np.array([1000, 10, 1]))
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 2, 50), fair)]
    for _ in range(40):
        # One symbol of the last part tells how long the next one is, and another of what kind.
        before, _ = parts[-1]
        parts.append((rng.integers(0, 2, 30 + before[0]), rare if before[-1] else fair))
    data = encode_symbols(parts, coder)
    reader = SymbolReader(data, 2 * sum(len(symbols) for symbols, _ in parts))
    length, table = 50, fair
    for symbols, _ in parts:
        read = reader.read(length, table)
        assert np.array_equal(read, symbols)
        length, table = 30 + int(read[0]), rare if read[-1] else fair
    reader.done()


@EVERY_CODER
def test_a_reader_that_is_not_at_the_end_says_so(coder: Coder) -> None:
    table, symbols = laplace_table(2.0, count=200)
    reader = SymbolReader(encode_symbols([(symbols, table)], coder), 400)
    reader.read(100, table)
    with pytest.raises(PayloadError):
        reader.done()
    with pytest.raises(PayloadError, match="nothing to say"):
        SymbolReader(encode_symbols([(symbols, table)], coder), 400).done()
    SymbolReader(encode_symbols([]), 0).done()


# ------------------------------------------------------------------------------------------------------------------- hostile bytes


@settings(max_examples=300)
@given(
    data=st.binary(max_size=60),
    coding=st.integers(0, 4),
    parts=st.lists(st.tuples(st.integers(0, 40), tables()), max_size=3),
)
def test_any_bytes_are_symbols_of_their_tables_or_an_error(
    data: bytes, coding: int, parts: list[tuple[int, FrequencyTable]]
) -> None:
    try:
        decoded = decode_symbols(bytes([coding]) + data, parts)
    except PayloadError:
        return
    _check_members(decoded, parts)


@settings(max_examples=200)
@given(
    table=tables(),
    coder=st.sampled_from(["rans", "packed"]),
    at=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_damaged_symbols_are_symbols_of_their_table_or_an_error(
    table: FrequencyTable, coder: Coder, at: int, bit: int
) -> None:
    data = bytearray(encode_symbols([(symbols_of(table, 300, 0), table)], coder))
    data[at % len(data)] ^= 1 << bit
    try:
        decoded = decode_symbols(data, [(300, table)])
    except PayloadError:
        return
    _check_members(decoded, [(300, table)])


def _check_members(decoded: list[NDArray[np.int32]], parts: list[tuple[int, FrequencyTable]]) -> None:
    for symbols, (count, table) in zip(decoded, parts, strict=True):
        assert symbols.shape == (count,)
        assert np.isin(symbols, table.present + table.lowest).all()


@EVERY_CODER
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_a_wrong_length_is_refused(coder: Coder, scale: float) -> None:
    table, symbols = laplace_table(scale, count=2000)
    data = encode_symbols([(symbols, table)], coder)
    for wrong in (b"", data[:1], data[:-1], data[:-4], data + b"\1", data + b"\0", data + data):
        with pytest.raises(PayloadError):
            decode_symbols(wrong, [(2000, table)])
    for count in (0, 1, 1990, 2010):
        with pytest.raises(PayloadError):
            decode_symbols(data, [(count, table)])


def test_plain_symbols_of_a_wrong_length_or_value_are_refused() -> None:
    table = FrequencyTable(0, np.array([TABLE_SUM - 4, 1, 1, 1, 1], np.int32))
    data = encode_symbols([(np.array([1, 2, 3, 4] * 10), table)])
    assert data[0] == 3
    for wrong in (data[:-1], data + b"\0", data[:1] + b"\xff" * (len(data) - 1)):
        with pytest.raises(PayloadError):
            decode_symbols(wrong, [(40, table)])


def test_a_bomb_is_not_inflated() -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"\2" + deflater.compress(bytes(200 * 2**20)) + deflater.flush()
    table, _ = laplace_table(1.0)
    tracemalloc.start()
    with pytest.raises(PayloadError, match="at most 1000 bytes"):
        decode_symbols(bomb, [(1000, table)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
