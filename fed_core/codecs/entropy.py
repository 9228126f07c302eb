"""Lossless coding of small integers under transmitted frequency tables: the last stage of every lossy codec.

The coder is range ANS (Duda 2013, https://arxiv.org/abs/1311.2540) in the implementation of `constriction` (Bamler 2022,
https://arxiv.org/abs/2201.01741): 32-bit words, a 64-bit state, models of 24 bits. A sender that lacks the package packs symbols
into bytes and lets zlib's Huffman coder have them, at a few percent more. The integers decoded are the same in every case.

Both sides derive their models from the same integers and from nothing else: see `_model`.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fed_core.errors import PayloadError

Coder = Literal["rans", "packed"]
Ints = NDArray[np.int32]

TABLE_BITS: Final = 16
TABLE_SUM: Final = 2**TABLE_BITS
LOWEST_SYMBOL: Final = -(2**15)
HIGHEST_SYMBOL: Final = 2**15 - 1
# About what an entry of a table takes.
_ENTRY_BITS: Final = 5
# What constriction's coders work with; a table's frequencies are scaled up to it.
_MODEL_BITS: Final = 24

# Where an encoder begins and a decoder must end. From a state below 2^24 a decoder goes on forever without using it up: damage and
# wrong lengths would not show.
_FIRST_STATE: Final = np.array([2**_MODEL_BITS], np.uint32)

# The first byte of coded symbols.
_NOTHING, _RANS, _DEFLATED, _PLAIN = range(4)
# The first byte of a table: mantissa bits, or one of these.
_MIRRORED: Final = 16
_SINGLE: Final = 32


# ------------------------------------------------------------------------------------------------------------------ reading bytes


class ByteReader:
    """A cursor over bytes that a peer sent. Whatever would pass the end raises PayloadError."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, num_bytes: int) -> memoryview:
        """The next bytes: a view, no copy."""
        if not 0 <= num_bytes <= self.left:
            raise PayloadError(f"a codec's header wants {num_bytes} more bytes where {self.left} are left")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def u8(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """A number below 2^63, seven bits a byte, low ones first."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.u8()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise PayloadError("a codec's header holds a varint of more than 9 bytes")

    def svarint(self) -> int:
        """A number of either sign: 0, -1, 1, -2 .. as the varints 0, 1, 2, 3 .."""
        return _unzigzag(self.varint())

    def done(self) -> None:
        """Raises PayloadError where bytes are left."""
        if self.left:
            raise PayloadError(f"a codec's header is followed by {self.left} bytes that nothing explains")


def varint(value: int) -> bytes:
    """What `ByteReader.varint` reads. Raises ValueError outside of 0 .. 2^63-1."""
    if not 0 <= value < 2**63:
        raise ValueError(f"a varint holds 0 to 2^63-1, not {value}")
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def svarint(value: int) -> bytes:
    """What `ByteReader.svarint` reads."""
    return varint(_zigzag(value))


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def _unzigzag(value: int) -> int:
    return -(value + 1) // 2 if value & 1 else value // 2


class _BitWriter:
    """Bits, high ones first, gathered into bytes; the last is filled with zeros."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._pending = 0
        self._num_pending = 0

    def write(self, value: int, num_bits: int) -> None:
        self._pending = self._pending << num_bits | value
        self._num_pending += num_bits
        if self._num_pending >= 1024:
            self._flush()

    def write_gamma(self, value: int) -> None:
        """Elias' gamma code of value + 1: 1, 3, 3, 5, 5, 5, 5, 7 .. bits."""
        self.write(value + 1, 2 * (value + 1).bit_length() - 1)

    def finish(self) -> bytes:
        self.write(0, -self._num_pending % 8)
        self._flush()
        return bytes(self._out)

    def _flush(self) -> None:
        num_bytes, self._num_pending = divmod(self._num_pending, 8)
        self._out += (self._pending >> self._num_pending).to_bytes(num_bytes, "big")
        self._pending &= (1 << self._num_pending) - 1


class _BitReader:
    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader
        self._byte = 0
        self._num_left = 0

    def read(self, num_bits: int) -> int:
        value = 0
        for _ in range(num_bits):
            if not self._num_left:
                self._byte, self._num_left = self._reader.u8(), 8
            self._num_left -= 1
            value = value << 1 | self._byte >> self._num_left & 1
        return value

    def read_gamma(self) -> int:
        length = 1
        while not self.read(1):
            length += 1
            if length > TABLE_BITS + 1:
                raise PayloadError("a frequency table holds a number beyond 2^16")
        return (1 << length - 1 | self.read(length - 1)) - 1

    def finish(self) -> None:
        if self._byte & (1 << self._num_left) - 1:
            raise PayloadError("the last byte of a frequency table is not filled with zeros")


# --------------------------------------------------------------------------------------------------------------- frequency tables


@dataclass(frozen=True, slots=True, eq=False)
class FrequencyTable:
    """How often each of the symbols `lowest` .. `lowest + len(frequencies) - 1` comes, out of 2^16. int32; zero: it never comes.

    The first and the last frequency are not zero. Raises ValueError for anything that is no such table.
    """

    lowest: int
    frequencies: Ints
    present: Ints = field(init=False, repr=False)
    """Positions of the frequencies that are not zero."""

    def __post_init__(self) -> None:
        size = len(self.frequencies)
        if not size or not LOWEST_SYMBOL <= self.lowest <= self.lowest + size - 1 <= HIGHEST_SYMBOL:
            raise ValueError(f"{size} symbols from {self.lowest} on; expected at least one, and all within int16")
        if self.frequencies.min() < 0 or int(self.frequencies.sum(dtype=np.int64)) != TABLE_SUM:
            raise ValueError(f"frequencies must be zero or positive and sum to {TABLE_SUM}")
        if not (self.frequencies[0] and self.frequencies[-1]):
            raise ValueError("a table begins and ends with a symbol that occurs")
        object.__setattr__(self, "present", np.flatnonzero(self.frequencies).astype(np.int32))

    @classmethod
    def from_counts(cls, lowest: int, counts: NDArray[Any]) -> FrequencyTable:
        """The table that makes symbols with these counts, and itself, shortest; `counts[i]` belongs to the symbol `lowest + i`.

        A symbol that was counted gets at least 1. Frequencies are rounded to a few leading bits, as many as their counts can bear
        (about half the logarithm of the count: Rissanen 1978), and mirrored about zero where that is no loss. Raises ValueError
        where nothing was counted, or outside of int16.
        """
        counts = np.asarray(counts, np.float64)
        seen = np.flatnonzero(counts)
        if not seen.size or counts.min() < 0:
            raise ValueError("a frequency table needs a symbol with a positive count, and none with a negative one")
        lowest, counts = lowest + int(seen[0]), counts[seen[0] : seen[-1] + 1]
        weights = counts
        half = max(abs(lowest), abs(lowest + len(counts) - 1))
        if seen.size > 1 and half <= HIGHEST_SYMBOL and 2 * half + 1 < 2 * len(counts):
            both = np.zeros(2 * half + 1)
            both[lowest + half : lowest + half + len(counts)] = counts
            both += both[::-1]
            if _entropy_bits(both) / 2 - _entropy_bits(counts) < _ENTRY_BITS * seen.size / 2:
                counts, weights, lowest = np.pad(counts, (lowest + half, 0)), both, -half
        # Half the logarithm of a typical count, less what the constant is.
        likely = min(max(round(0.5 * math.log2(max(1.0, counts.sum() / seen.size))) - 1, 0), TABLE_BITS - 3)
        ways = [_normalised(weights, num_bits, mirrored=weights is not counts) for num_bits in (likely, likely + 1)]
        tables = [cls(lowest, frequencies) for frequencies in ways if frequencies is not None]
        if not tables:
            tables = [cls(lowest, _rounded_down(weights, mirrored=weights is not counts))]
        return min(tables, key=lambda table: table.bits(counts) + 8 * len(write_table(table)))

    @property
    def num_symbols(self) -> int:
        """Symbols that can occur. Where it is 1, symbols cost nothing."""
        return len(self.present)

    def bits(self, counts: NDArray[Any]) -> float:
        """Ideal length of symbols with these counts (the first belongs to `lowest`); infinite where one of them cannot occur."""
        occurring = np.flatnonzero(counts)
        if occurring.size and occurring[-1] >= len(self.frequencies):
            return math.inf
        frequencies = self.frequencies[occurring]
        if not frequencies.all():
            return math.inf
        return float(np.asarray(counts)[occurring] @ (TABLE_BITS - np.log2(frequencies)))


def uniform_table(num_bits: int) -> FrequencyTable:
    """All symbols 0 .. 2^num_bits - 1 equally often, `num_bits` at most 15: for bits that are as good as random."""
    return FrequencyTable(0, np.full(2**num_bits, TABLE_SUM >> num_bits, np.int32))


def _normalised(weights: NDArray[np.float64], num_bits: int, *, mirrored: bool) -> Ints | None:
    """Frequencies with so many bits after the leading one; the peak takes what is left. None where it is the peak no more."""
    wanted = _wanted(weights)
    unit = np.ldexp(1.0, np.maximum(np.frexp(wanted)[1] - 1 - num_bits, 0))
    return _peaked((np.rint(wanted / unit) * unit).astype(np.int32), weights, mirrored)


def _rounded_down(weights: NDArray[np.float64], *, mirrored: bool) -> Ints:
    """Frequencies of all bits. The peak only gains by it, so that there are such for any weights."""
    frequencies = _peaked(np.floor(_wanted(weights)).astype(np.int32), weights, mirrored)
    assert frequencies is not None
    return frequencies


def _wanted(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positive shares of what is left of the table's sum when each symbol has 1."""
    present = weights > 0
    wanted: NDArray[np.float64] = present + weights * ((TABLE_SUM - np.count_nonzero(present)) / weights.sum())
    return wanted


def _peaked(frequencies: Ints, weights: NDArray[np.float64], mirrored: bool) -> Ints | None:
    peak = len(weights) // 2 if mirrored else int(weights.argmax())
    frequencies[peak] += TABLE_SUM - int(frequencies.sum(dtype=np.int64))
    if frequencies[peak] < (weights[peak] > 0) or _peak(frequencies, mirrored) != peak:
        return None
    return frequencies


def _entropy_bits(counts: NDArray[np.float64]) -> float:
    seen, total = counts[counts > 0], counts.sum()
    return float(total * np.log2(total) - seen @ np.log2(seen))


def _peak(frequencies: Ints, mirrored: bool) -> int:
    return len(frequencies) // 2 if mirrored else int(frequencies.argmax())


def write_table(table: FrequencyTable) -> bytes:
    """The table as it travels, a few bits a symbol: `read_table` gives it back.

    One byte says the shape: a single symbol, or how many bits follow the leading one of a frequency, and whether the table is
    mirrored about zero (then only one half is sent). The largest frequency, of a mirrored table that of zero, is the rest and not
    sent. Of each other the bit length goes first, as the difference from the one before in Elias' gamma code; then its bits, or, if
    it is zero, how many more zeros follow.
    """
    frequencies = table.frequencies
    if table.num_symbols == 1:
        return bytes([_SINGLE]) + svarint(table.lowest)
    half = -table.lowest
    mirrored = len(frequencies) == 2 * half + 1 and bool((frequencies == frequencies[::-1]).all())
    peak = _peak(frequencies, mirrored)
    entries = frequencies[peak + 1 :].tolist() if mirrored else np.delete(frequencies, peak).tolist()
    num_bits = max((f.bit_length() - (f & -f).bit_length() for f in entries if f), default=0)
    if mirrored:
        header = bytes([_MIRRORED | num_bits]) + varint(half)
    else:
        header = bytes([num_bits]) + svarint(table.lowest) + varint(len(frequencies)) + varint(peak)
    bits = _BitWriter()
    before, at = TABLE_BITS, 0
    while at < len(entries):
        frequency = entries[at]
        length = frequency.bit_length()
        bits.write_gamma(_zigzag(length - before))
        at += 1
        if frequency:
            kept = min(num_bits, length - 1)
            bits.write((frequency >> length - 1 - kept) - (1 << kept), kept)
        else:
            run = next((more for more, f in enumerate(entries[at:]) if f), len(entries) - at)
            bits.write_gamma(run)
            at += run
        before = length
    return header + bits.finish()


def read_table(reader: ByteReader, max_symbols: int = 2**16) -> FrequencyTable:
    """Raises PayloadError on anything but a table over at most so many symbols. Takes about a microsecond a symbol."""
    shape = reader.u8()
    if shape == _SINGLE:
        return _checked_table(reader.svarint(), np.array([TABLE_SUM]))
    if shape >= _SINGLE:
        raise PayloadError(f"unknown kind of frequency table {shape}; expected 0 to {_SINGLE}")
    num_bits, mirrored = shape % _MIRRORED, shape >= _MIRRORED
    if mirrored:
        half = reader.varint()
        lowest, size, peak, num_entries = -half, 2 * half + 1, half, half
    else:
        lowest, size, peak = reader.svarint(), reader.varint(), reader.varint()
        num_entries = size - 1
    if peak >= size or not LOWEST_SYMBOL <= lowest <= lowest + size - 1 <= HIGHEST_SYMBOL:
        raise PayloadError(f"a frequency table of {size} symbols from {lowest} on; all must lie within int16")
    if size > max_symbols:
        raise PayloadError(f"a frequency table of {size} symbols; expected at most {max_symbols}")
    entries = _read_entries(_BitReader(reader), num_entries, num_bits)
    rest = TABLE_SUM - int(entries.sum()) * (2 if mirrored else 1)
    if mirrored:
        frequencies = np.concatenate([entries[::-1], [rest], entries])
    else:
        frequencies = np.concatenate([entries[:peak], [rest], entries[peak:]])
    return _checked_table(lowest, frequencies)


def _read_entries(bits: _BitReader, num_entries: int, num_bits: int) -> NDArray[np.int64]:
    entries = np.zeros(num_entries, np.int64)
    length, at = TABLE_BITS, 0
    while at < num_entries:
        length += _unzigzag(bits.read_gamma())
        if not 0 <= length <= TABLE_BITS:
            raise PayloadError(f"a frequency of {length} bits in a table of {TABLE_BITS}")
        if length:
            kept = min(num_bits, length - 1)
            entries[at] = (1 << kept | bits.read(kept)) << length - 1 - kept
            at += 1
        else:
            at += 1 + bits.read_gamma()
    if at > num_entries:
        raise PayloadError("a frequency table's run of zeros passes its end")
    bits.finish()
    return entries


def _checked_table(lowest: int, frequencies: NDArray[np.int64]) -> FrequencyTable:
    if frequencies.min() < 0:
        raise PayloadError(f"the frequencies of a table sum to more than {TABLE_SUM}")
    try:
        return FrequencyTable(lowest, frequencies.astype(np.int32))
    except ValueError as error:
        raise PayloadError(f"not a frequency table: {error}") from error


# ------------------------------------------------------------------------------------------------------------------------ symbols

# What remains to be coded: parts that are not empty and whose table has more than one symbol.
_Coded = Sequence[tuple[Ints, FrequencyTable]]


def encode_symbols(parts: Sequence[tuple[NDArray[Any], FrequencyTable]], coder: Coder = "rans") -> bytes:
    """Integer arrays, each with its table, as bytes that `decode_symbols` reads; never longer than `max_symbol_bytes`.

    Parts share one coder state, so that a part costs no more than its symbols; one whose table has a single symbol costs nothing.
    "rans" without `constriction` installed falls back to "packed". Raises ValueError for a symbol that its table does not have.
    """
    indices = [(_to_indices(symbols, table), table) for symbols, table in parts]
    indices = [(index, table) for index, table in indices if index.size and table.num_symbols > 1]
    if not indices:
        return bytes([_NOTHING])
    constriction = _constriction() if coder == "rans" else None
    if constriction:
        coded = bytes([_RANS]) + _encode_rans(indices, constriction)
    else:
        coded = bytes([_DEFLATED]) + _encode_deflated(indices)
    if len(coded) > max_symbol_bytes([(index.size, table) for index, table in indices]):
        coded = bytes([_PLAIN]) + b"".join(_to_bits(index, table.num_symbols) for index, table in indices)
    return coded


def decode_symbols(data: bytes | memoryview, parts: Sequence[tuple[int, FrequencyTable]]) -> list[Ints]:
    """The int32 arrays of so many symbols, of which each has its table; a symbol out of its table never comes.

    Raises PayloadError unless `data` is just that and nothing else, and where it takes `constriction` and that is not installed.
    Memory is a small multiple of what is returned.
    """
    coded = [(count, table) for count, table in parts if count and table.num_symbols > 1]
    reader = SymbolReader(data, sum(_packed_bytes(count, table.num_symbols) for count, table in coded))
    decoded = [reader.read(count, table) for count, table in parts]
    reader.done()
    return decoded


class SymbolReader:
    """The same part by part, where the table of a part follows from the symbols before it.

    `max_packed_bytes` bounds the memory that packed symbols may take: two for each symbol are always enough. Raises PayloadError,
    as `decode_symbols` does.
    """

    def __init__(self, data: bytes | memoryview, max_packed_bytes: int) -> None:
        data = memoryview(data).cast("B")
        coding = data[0] if len(data) else None
        if coding not in _SOURCES:
            raise PayloadError(f"{len(data)} bytes of symbols begin with {coding}, which is no coding")
        self._source = _SOURCES[coding](data[1:], max_packed_bytes)
        self._is_needed = coding == _NOTHING

    def read(self, count: int, table: FrequencyTable) -> Ints:
        """The next `count` symbols, int32."""
        if not count or table.num_symbols == 1:
            return np.full(count, table.lowest, np.int32)
        self._is_needed = True
        return _from_indices(self._source.take(count, table), table)

    def done(self) -> None:
        """Raises PayloadError where data are left, or there were none to read."""
        if not self._is_needed:
            raise PayloadError("coded symbols where there is nothing to say")
        self._source.done()


def max_symbol_bytes(parts: Sequence[tuple[int, FrequencyTable]]) -> int:
    """The most bytes that `encode_symbols` makes of so many symbols of each table: the plain form, which always remains."""
    return 1 + sum(_plain_bytes(count, table.num_symbols) for count, table in parts)


def _to_indices(symbols: NDArray[Any], table: FrequencyTable) -> Ints:
    """Positions among the symbols that occur."""
    if not symbols.size:
        return np.empty(0, np.int32)
    if symbols.min() < table.lowest or symbols.max() >= table.lowest + len(table.frequencies):
        raise ValueError(f"symbols {symbols.min()} to {symbols.max()}, but the table begins at {table.lowest}")
    positions: Ints = np.subtract(symbols, table.lowest, dtype=np.int32)
    if table.num_symbols == len(table.frequencies):
        return positions
    index_of = np.full(len(table.frequencies), -1, np.int32)
    index_of[table.present] = np.arange(table.num_symbols, dtype=np.int32)
    indices: Ints = index_of[positions]
    if indices.min() < 0:
        raise ValueError(f"the symbol {symbols[indices.argmin()]} has frequency zero")
    return indices


def _from_indices(indices: Ints, table: FrequencyTable) -> Ints:
    if table.num_symbols == len(table.frequencies):
        indices += np.int32(table.lowest)
        return indices
    symbols: Ints = (table.present + np.int32(table.lowest))[indices]
    return symbols


class _Source(Protocol):
    def take(self, count: int, table: FrequencyTable) -> Ints:
        """Positions among the symbols that occur, of which there are at least two; at least one."""
        ...

    def done(self) -> None: ...


class _NothingSource:
    def __init__(self, data: memoryview, max_packed_bytes: int) -> None:
        if len(data):
            raise PayloadError(f"{len(data)} bytes of symbols where there is nothing to say")

    def take(self, count: int, table: FrequencyTable) -> Ints:
        raise PayloadError(f"no bytes for {count} symbols of which each says something")

    def done(self) -> None:
        pass


# ------------------------------------------------------------------------------------------------------------------------ the rANS


def _constriction() -> ModuleType | None:
    try:
        return importlib.import_module("constriction")
    except ImportError:
        return None


def _model(table: FrequencyTable, constriction: ModuleType) -> Any:
    """The model in which a symbol's probability is exactly its frequency / 2^16.

    With `perfect=False`, constriction gives the i-th of n symbols the left end floor(P_i * (2^24 - n) / P_n) + i, with P the
    running sum of the floats that it was given. We give it weights - 1, where the weights are the frequencies scaled to a sum of
    2^24: the quotient is 1, all sums are integers below 2^24, hence exact in float32 in whatever order, and the left ends are the
    running sums of the weights on every machine.
    """
    weights = table.frequencies[table.present].astype(np.float32) * np.float32(2 ** (_MODEL_BITS - TABLE_BITS))
    return constriction.stream.model.Categorical(weights - np.float32(1), perfect=False)


def _encode_rans(indices: _Coded, constriction: ModuleType) -> bytes:
    stack = constriction.stream.stack.AnsCoder(_FIRST_STATE)
    models = {table: _model(table, constriction) for _, table in indices}
    for index, table in reversed(indices):
        stack.encode_reverse(index, models[table])
    words: NDArray[np.uint32] = stack.get_compressed()
    # The last word is never zero, but its high bytes may be; they are understood.
    return words.astype("<u4").tobytes().rstrip(b"\0")


class _RansSource:
    def __init__(self, data: memoryview, max_packed_bytes: int) -> None:
        constriction = _constriction()
        if not constriction:
            raise PayloadError("values are coded by rANS, which takes a package: run `pip install constriction`")
        if len(data) and not data[-1]:
            raise PayloadError("rANS data that ends in a zero byte")
        words = np.frombuffer(bytes(data) + bytes(-len(data) % 4), "<u4").astype(np.uint32)
        self._constriction = constriction
        self._stack = constriction.stream.stack.AnsCoder(words)
        self._models: dict[FrequencyTable, Any] = {}

    def take(self, count: int, table: FrequencyTable) -> Ints:
        if table not in self._models:
            self._models[table] = _model(table, self._constriction)
        indices: Ints = self._stack.decode(self._models[table], count)
        return indices

    def done(self) -> None:
        # Every symbol taken back leads to where the encoder began: a check of the length, not a digest.
        if self._stack.get_compressed().tolist() != _FIRST_STATE.tolist():
            raise PayloadError("rANS data that is not of the length of its symbols, or damaged")


# ------------------------------------------------------------------------------------------------ symbols packed in bytes, deflated


def _symbols_per_byte(num_symbols: int) -> int:
    """The largest k with num_symbols^k <= 256; 0 where one symbol takes two bytes."""
    return next((k for k in range(8, 0, -1) if num_symbols**k <= 256), 0)


def _packed_bytes(count: int, num_symbols: int) -> int:
    per_byte = _symbols_per_byte(num_symbols)
    return -(-count // per_byte) if per_byte else 2 * count


def _pack(index: Ints, num_symbols: int) -> bytes:
    """Several symbols a byte, as digits to the base of the alphabet; or all low bytes, then all high bytes."""
    per_byte = _symbols_per_byte(num_symbols)
    if not per_byte:
        return (index & 255).astype(np.uint8).tobytes() + (index >> 8).astype(np.uint8).tobytes()
    digits = np.zeros((_packed_bytes(index.size, num_symbols), per_byte), np.uint8)
    digits.reshape(-1)[: index.size] = index
    packed = digits[:, per_byte - 1].copy()
    for position in range(per_byte - 2, -1, -1):
        packed *= np.uint8(num_symbols)
        packed += digits[:, position]
    return packed.tobytes()


def _unpack(packed: NDArray[np.uint8], count: int, num_symbols: int) -> Ints:
    per_byte = _symbols_per_byte(num_symbols)
    if not per_byte:
        return _in_alphabet(packed[:count] | packed[count:].astype(np.int32) << 8, num_symbols)
    if packed.max() >= num_symbols**per_byte:
        raise PayloadError(f"a packed byte of {packed.max()}; expected less than {num_symbols}^{per_byte}")
    digits = np.arange(256)[:, None] // num_symbols ** np.arange(per_byte) % num_symbols
    indices: Ints = digits.astype(np.int32)[packed].reshape(-1)[:count]
    return indices


def _encode_deflated(indices: _Coded) -> bytes:
    # Matches between quantized values are chance, and cost more than they save.
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return b"".join(deflater.compress(_pack(index, table.num_symbols)) for index, table in indices) + deflater.flush()


class _BytesSource:
    """Parts that lie in whole bytes, one after the other."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._at = 0

    def _next(self, num_bytes: int) -> NDArray[np.uint8]:
        if num_bytes > len(self._data) - self._at:
            raise PayloadError(f"{num_bytes} bytes of symbols where {len(self._data) - self._at} are left")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def done(self) -> None:
        if self._at != len(self._data):
            raise PayloadError(f"symbols are followed by {len(self._data) - self._at} bytes that nothing explains")


class _DeflatedSource(_BytesSource):
    def __init__(self, data: memoryview, max_packed_bytes: int) -> None:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            inflated = inflater.decompress(data, max_packed_bytes + 1)
        except zlib.error as error:
            raise PayloadError(f"packed symbols do not inflate: {error}") from error
        if len(inflated) > max_packed_bytes or not inflater.eof or inflater.unused_data:
            raise PayloadError(f"packed symbols do not inflate to at most {max_packed_bytes} bytes")
        super().__init__(inflated)

    def take(self, count: int, table: FrequencyTable) -> Ints:
        return _unpack(self._next(_packed_bytes(count, table.num_symbols)), count, table.num_symbols)


# ----------------------------------------------------------------------------------------------------------------- plain bit fields


def _plain_bits(num_symbols: int) -> int:
    return (num_symbols - 1).bit_length()


def _plain_bytes(count: int, num_symbols: int) -> int:
    return -(-count * _plain_bits(num_symbols) // 8)


def _to_bits(index: Ints, num_symbols: int) -> bytes:
    bits = np.unpackbits(index.astype(">u2").view(np.uint8)).reshape(-1, 16)
    return np.packbits(bits[:, 16 - _plain_bits(num_symbols) :]).tobytes()


def _from_bits(data: NDArray[np.uint8], count: int, num_symbols: int) -> Ints:
    width = _plain_bits(num_symbols)
    bits = np.zeros((count, 16), np.uint8)
    bits[:, 16 - width :] = np.unpackbits(data, count=count * width).reshape(count, width)
    return _in_alphabet(np.packbits(bits).view(">u2").astype(np.int32), num_symbols)


class _PlainSource(_BytesSource):
    def __init__(self, data: memoryview, max_packed_bytes: int) -> None:
        super().__init__(data)

    def take(self, count: int, table: FrequencyTable) -> Ints:
        return _from_bits(self._next(_plain_bytes(count, table.num_symbols)), count, table.num_symbols)


def _in_alphabet(indices: Ints, num_symbols: int) -> Ints:
    if indices.max() >= num_symbols:
        raise PayloadError(f"symbol {indices.max()} of an alphabet of {num_symbols}")
    return indices


_SOURCES: Final[dict[int | None, Callable[[memoryview, int], _Source]]] = {
    _NOTHING: _NothingSource,
    _RANS: _RansSource,
    _DEFLATED: _DeflatedSource,
    _PLAIN: _PlainSource,
}
