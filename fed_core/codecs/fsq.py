"""Factored-scale quantizer: one uniform step per tensor, entropy-coded in groups told by the scales of rows and columns.

At any rate a uniform quantizer with entropy coding is within 0.26 bits of the best there is (Gish and Pierce 1968,
https://doi.org/10.1109/TIT.1968.1054193), if the coder knows the distribution of each value. `fed_core.codecs.scales` tells it the
local scale. Three refinements bring it closer: values are rounded to what costs least in error and bits together
(`fed_core.codecs.rounding`), each group reproduces the magnitudes 1, 2 and above by the means of what was rounded to them, and
groups whose difference does not pay for a table are merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import Analysis, Cost, TensorPlan, TileSource
from fed_core.codecs.entropy import (
    ByteReader,
    Coder,
    FrequencyTable,
    Ints,
    decode_symbols,
    encode_symbols,
    read_table,
    svarint,
    varint,
    write_table,
)
from fed_core.codecs.floating import TILE, check_lossy, mantissa_exponent
from fed_core.codecs.planning import LossyTable, plan_tensors
from fed_core.codecs.planning import StepTooFineError as StepTooFineError
from fed_core.codecs.rounding import (
    FIRST,
    MIN_DEAD_ZONE,
    SHIFT_PARTS,
    Floats,
    Moments,
    Roundings,
    round_sample,
    round_values,
    to_integers,
)
from fed_core.codecs.scales import Scales, rectangles
from fed_core.codecs.tokens import (
    MAX_MAGNITUDE,
    MAX_TOKEN,
    TOKEN_WIDTH,
    max_integer_bytes,
    max_magnitude,
    read_integers,
    to_tokens,
    write_integers,
)
from fed_core.errors import PayloadError
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype

MAX_BODY: Final = 2**18
"""Coordinates of a body."""
MAX_GROUPS: Final = 32

_MANTISSA_BITS: Final = 12
_MIN_EXPONENT: Final = -200
_MAX_EXPONENT: Final = 200
_SHIFT_BITS: Final = SHIFT_PARTS.bit_length() - 1

# Flags of a head.
_NOT_ZERO, _ROWS, _COLUMNS, _SHIFTS = 1, 2, 4, 8

_MAX_LEVELS: Final = 2**22
_MAX_DISTINCT: Final = 256
_MIN_PER_LEVEL: Final = 8
# Groups span scales from 1/8 step to 32 steps; what is below is zero nearly always, what is above needs no finer model.
_LOWEST_OCTAVE: Final = -3
_NUM_OCTAVES: Final = 8

# How many coordinates there must be for each level, for so many levels per octave to pay.
_LEVELS_PER_OCTAVE: Final = ((120, 4), (25, 2))
# What heads and bodies take besides levels, tables and symbols.
_HEAD_BITS: Final = 48
_BODY_BITS: Final = 32

# Counted at once: what a group costs besides its coordinates is then shared by more of them.
_COUNTED_BODIES: Final = 4

_SAMPLE: Final = 2**16
_PIECE: Final = 2**7
# Up to here a sample's pieces are read together: each read costs as much as some 2^14 coordinates, where they are a product.
_READ_WHOLE: Final = _SAMPLE // _PIECE * 2**14
_GOLDEN: Final = (math.sqrt(5) - 1) / 2


# --------------------------------------------------------------------------------------------------------------------------- head


@dataclass(frozen=True, slots=True)
class _Head:
    """What all bodies of a tensor share: `step` = mantissa * 2^exponent, and for each group a table of tokens and three shifts."""

    mantissa: int
    exponent: int
    scales: Scales
    tables: Sequence[FrequencyTable]
    shifts: NDArray[np.int64]
    """[num_groups, 3], in parts of a step: how far below 1, 2 and all larger magnitudes their reproductions lie."""

    def reproductions(self, group: int, dtype: torch.dtype) -> Tensor:
        """Values of the integers -m .. m of a group, m its `max_magnitude`: float32, each rounded once from an exact product."""
        largest = max_magnitude(self.tables[group])
        magnitude = np.arange(largest + 1)
        shift = self.shifts[group][np.clip(magnitude, 1, 3) - 1] * (magnitude > 0)
        # At most 2^20 * 2^12: exact in float64, like the power of two.
        exact = np.ldexp(
            ((magnitude * SHIFT_PARTS - shift) * self.mantissa).astype(np.float64), self.exponent - _SHIFT_BITS
        )
        largest_value = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        upper = np.minimum(exact, largest_value).astype(np.float32)
        return torch.from_numpy(np.concatenate([-upper[:0:-1], upper]))


def _write_head(head: _Head, coder: Coder) -> bytes:
    scales = head.scales
    axes = [axis for axis in (scales.rows, scales.columns) if axis is not None]
    flags = _NOT_ZERO | _ROWS * (scales.rows is not None) | _COLUMNS * (scales.columns is not None)
    flags |= _SHIFTS * bool(head.shifts.any())
    out = [bytes([flags]), varint(head.mantissa), svarint(head.exponent)]
    if axes:
        out += [bytes([scales.num_groups]), *(svarint(bound) for bound in scales.bounds.tolist())]
        parts = [(axis, _table_of(axis)) for axis in axes]
        levels = encode_symbols(parts, coder)
        out += [*(write_table(table) for _, table in parts), varint(len(levels)), levels]
    for table, shifts in zip(head.tables, head.shifts.tolist(), strict=True):
        out.append(write_table(table))
        if flags & _SHIFTS and not _is_zero(table):
            packed = sum((shift + SHIFT_PARTS // 2) << _SHIFT_BITS * at for at, shift in enumerate(shifts))
            out.append(packed.to_bytes(2, "little"))
    return b"".join(out)


def _read_head(reader: ByteReader, num_rows: int, num_columns: int) -> _Head | None:
    """None for a tensor that is all zero."""
    flags = reader.u8()
    if not flags:
        reader.done()
        return None
    if not flags & _NOT_ZERO or flags > _NOT_ZERO | _ROWS | _COLUMNS | _SHIFTS:
        raise PayloadError(f"unknown flags {flags} of the codec 'fsq'")
    mantissa, exponent = reader.varint(), reader.svarint()
    if not (0 < mantissa < 2**_MANTISSA_BITS and _MIN_EXPONENT <= exponent <= _MAX_EXPONENT):
        raise PayloadError(f"the codec 'fsq' has the step {mantissa} * 2^{exponent}, out of range")
    scales = Scales(num_columns, None, None, [])
    if flags & (_ROWS | _COLUMNS):
        scales = _read_scales(reader, flags, num_rows, num_columns)
    tables, shifts = [], np.zeros((scales.num_groups, 3), np.int64)
    for group in range(scales.num_groups):
        tables.append(read_table(reader, 2 * MAX_TOKEN + 1))
        max_magnitude(tables[-1])
        if flags & _SHIFTS and not _is_zero(tables[-1]):
            packed = int.from_bytes(reader.take(2), "little")
            shifts[group] = (packed >> _SHIFT_BITS * np.arange(3)) % SHIFT_PARTS - SHIFT_PARTS // 2
    reader.done()
    return _Head(mantissa, exponent, scales, tables, shifts)


def _read_scales(reader: ByteReader, flags: int, num_rows: int, num_columns: int) -> Scales:
    num_groups = reader.u8()
    if not 1 <= num_groups <= MAX_GROUPS:
        raise PayloadError(f"the codec 'fsq' has {num_groups} groups; expected 1 to {MAX_GROUPS}")
    bounds = [reader.svarint() for _ in range(num_groups - 1)]
    if any(not -(2**17) < bound < 2**17 for bound in bounds) or sorted(set(bounds)) != bounds:
        raise PayloadError("the bounds of groups of the codec 'fsq' are not ascending small numbers")
    lengths = [length for flag, length in ((_ROWS, num_rows), (_COLUMNS, num_columns)) if flags & flag]
    if max(lengths) > _MAX_LEVELS:
        raise PayloadError(f"the codec 'fsq' has {max(lengths)} scales; expected at most {_MAX_LEVELS}")
    tables = [read_table(reader, _MAX_DISTINCT) for _ in lengths]
    levels = iter(decode_symbols(reader.take(reader.varint()), list(zip(lengths, tables, strict=True))))
    rows = next(levels) if flags & _ROWS else None
    columns = next(levels) if flags & _COLUMNS else None
    return Scales(num_columns, rows, columns, bounds)


def _table_of(values: Ints) -> FrequencyTable:
    lowest = int(values.min())
    return FrequencyTable.from_counts(lowest, np.bincount(values - lowest))


def _is_zero(table: FrequencyTable) -> bool:
    return table.num_symbols == 1 and table.lowest == 0


# ------------------------------------------------------------------------------------------------------------------------ decoding


class FsqCodec:
    """Decodes what `FsqAnalysis` plans. The head holds the step, the scales and the tables; a body is one range of coordinates."""

    kind = "fsq"
    has_head = True

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From one byte (all zero) to 19 bits a coordinate. Raises PayloadError for types that it does not hold and long bodies."""
        check_lossy(FsqCodec.kind, spec)
        if num_coordinates > MAX_BODY:
            raise PayloadError(
                f"a body of {num_coordinates} coordinates of the codec 'fsq'; expected at most {MAX_BODY}"
            )
        return 1, max_integer_bytes(num_coordinates, MAX_GROUPS)

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _Decoder:
        """Memory: 12 bytes for each row and column, and up to 256 KiB for each group of which values are large."""
        check_lossy(FsqCodec.kind, spec)
        if head is None:
            raise PayloadError("a tensor of the codec 'fsq' has no head")
        num_rows, num_columns = matrix_shape(spec)
        return _Decoder(spec, _read_head(ByteReader(head), num_rows, num_columns))


class _Decoder:
    def __init__(self, spec: TensorSpec, head: _Head | None) -> None:
        self._num_coordinates = spec.num_elements
        self._head = head
        self._reproductions = (
            [self._head.reproductions(group, torch_dtype(spec.dtype)) for group in range(self._head.scales.num_groups)]
            if self._head
            else []
        )

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Integers to values by a table, and from their groups to their places. Takes some 12 bytes a coordinate."""
        if not 0 <= first <= first + len(out) <= self._num_coordinates or len(out) > MAX_BODY:
            raise PayloadError(
                f"a body of {len(out)} coordinates from {first} on, in a tensor of {self._num_coordinates}; "
                f"expected at most {MAX_BODY}"
            )
        if self._head is None:
            if bytes(body[:2]) != b"\0":
                raise PayloadError(f"a body of {len(body)} bytes of a tensor that is zero; expected one zero byte")
            out.zero_()
            return
        layout = self._head.scales.layout(first, len(out))
        integers = read_integers(body, list(zip(layout.counts, self._head.tables, strict=True)))
        groups = [
            None if _is_zero(table) else values.index_select(0, torch.from_numpy(k).add_(len(values) // 2))
            for k, values, table in zip(integers, self._reproductions, self._head.tables, strict=True)
        ]
        layout.join(groups, out)


def matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor is taken for; one row where it has fewer than two dimensions."""
    if len(spec.shape) < 2:
        return 1, spec.num_elements
    return spec.shape[0], math.prod(spec.shape[1:])


# ----------------------------------------------------------------------------------------------------------------------- analysis


class _Statistics(NamedTuple):
    """Of a tensor: |x|^2, max |x|, and |x|^2 by row and column where these may tell a group."""

    energy: float
    largest: float
    rows: Floats | None
    columns: Floats | None


class _Sample(NamedTuple):
    """Some coordinates, and of how many each of them is typical."""

    values: Floats
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    weights: Floats


class _Scheme(NamedTuple):
    """Scales, bits of their levels and of all, coordinates of each group, and the groups of the active part of the sample."""

    scales: Scales
    side_bits: float
    bits: float
    totals: Floats
    groups: NDArray[np.intp]


class _Design(NamedTuple):
    """What is decided from the sample: groups, how each is rounded, and what comes of it."""

    scales: Scales
    roundings: Roundings | None
    cost: Cost


class FsqAnalysis:
    """A tensor seen by the codec 'fsq': the cost of any step, and the plan for one. Nothing is read before the first call.

    `contexts` off: one group for the whole tensor, no scales. `lattice`: steps must be powers of two, values are rounded to the
    nearest multiple and reproduced as just that, so that a tensor of multiples below 2^15 comes back bit for bit. `match_gain`:
    reproductions are scaled so that <x, x'> = |x|^2; the error is then larger, and uncorrelated with x.

    The first call reads the tensor once for its statistics and keeps a sample of 2^16 coordinates; each plan reads it once more.
    Memory: 8 bytes for each row and column, and while planning some 20 bytes for each of 2^20 coordinates.

    Raises PayloadError for types that the codec does not hold, and ValueError for `lattice` with `match_gain`; `cost` and `plan`
    raise ValueError for a step that is not positive and finite, or in a lattice no power of two, and StepTooFineError for one that
    is too small for the largest value.
    """

    def __init__(
        self,
        spec: TensorSpec,
        source: TileSource,
        *,
        contexts: bool = True,
        lattice: bool = False,
        match_gain: bool = False,
        coder: Coder = "rans",
    ) -> None:
        check_lossy(FsqCodec.kind, spec)
        if lattice and match_gain:
            raise ValueError("values on a lattice cannot be scaled: lattice and match_gain exclude each other")
        self._num_coordinates = spec.num_elements
        self._num_rows, self._num_columns = matrix_shape(spec)
        self._source = source
        self._lattice = lattice
        self._match_gain = match_gain
        self._coder = coder
        self._by_row = 1 < self._num_rows <= _MAX_LEVELS and self._num_columns >= _MIN_PER_LEVEL
        self._by_column = 1 < self._num_columns <= _MAX_LEVELS and self._num_rows >= _MIN_PER_LEVEL
        self._schemes = [
            (by_row, by_column)
            for by_row in sorted({False, contexts and self._by_row})
            for by_column in sorted({False, contexts and self._by_column})
        ]
        self._costs: dict[float, Cost] = {}
        self._last: tuple[float, _Design | None] | None = None
        self._axes: tuple[float, tuple[bool, bool]] | None = None

    def cost(self, step: float) -> Cost:
        """Bits of head and bodies, and squared error, from the sample: within a few percent. Some milliseconds after the first."""
        step = self._representable(step)
        if step not in self._costs:
            design = self._design(step)
            # A zero byte for the head, and one for each body.
            zero = Cost(8.0 * (1 + self._num_bodies), self._statistics.energy)
            self._costs[step] = design.cost if design else zero
        return self._costs[step]

    def plan(self, step: float) -> TensorPlan:
        """Counts the tensor's integers at that step, the nearest with a mantissa of 12 bits, and decides all that bodies share."""
        step = self._representable(step)
        design = self._design(step)
        if not design:
            return self._zero_plan()
        scales, roundings, _ = design
        counts = np.zeros((scales.num_groups, 2 * MAX_TOKEN + 1))
        moments = Moments(scales.num_groups)
        for first in range(0, self._num_coordinates, _COUNTED_BODIES * self._body):
            tile = self._tile(first, min(_COUNTED_BODIES * self._body, self._num_coordinates - first))
            for group, values in enumerate(scales.layout(first, len(tile)).split(tile)):
                for block in torch.split(values, TILE):
                    t, m = round_values(block, step, roundings, group)
                    moments.add(group, t.numpy(), m.numpy())
                    tokens = to_tokens(m.copysign_(block).to(torch.int32).numpy())
                    counts[group] += np.bincount(tokens + MAX_TOKEN, minlength=counts.shape[1])
        if not np.delete(counts, MAX_TOKEN, axis=1).any():
            return self._zero_plan()
        shifts = self._shifts(moments)
        cross, _ = moments.products(shifts)
        gain = self._statistics.energy / step**2 / cross if self._match_gain else 1.0
        zero = FrequencyTable.from_counts(0, np.ones(1))
        tables = [FrequencyTable.from_counts(-MAX_TOKEN, each) if each.any() else zero for each in counts]
        mantissa, exponent = mantissa_exponent(step * gain, _MANTISSA_BITS)
        head = _Head(mantissa, exponent, scales, tables, shifts)

        def encode(first: int, tile: Tensor) -> bytes:
            groups = scales.layout(first, len(tile)).split(tile.float())
            integers = [
                np.zeros(len(values), np.int32) if _is_zero(table) else to_integers(values, step, roundings, group)
                for group, (values, table) in enumerate(zip(groups, tables, strict=True))
            ]
            return write_integers(list(zip(integers, tables, strict=True)), self._coder)

        return TensorPlan("fsq", _write_head(head, self._coder), self._body, encode)

    def _representable(self, step: float) -> float:
        """The step as a head can say it."""
        if not (math.isfinite(step) and step > 0):
            raise ValueError(f"a step of {step}; expected a positive number")
        if self._lattice:
            if math.frexp(step)[0] != 0.5:
                raise ValueError(f"a lattice's step of {step}; expected a power of two")
            return step
        mantissa, exponent = math.frexp(step)
        return math.ldexp(round(math.ldexp(mantissa, _MANTISSA_BITS)), exponent - _MANTISSA_BITS)

    @property
    def _body(self) -> int:
        """Coordinates of a body: whole rows, if one fits."""
        if self._num_columns > MAX_BODY:
            return MAX_BODY
        return max(1, self._num_columns * min(self._num_rows, MAX_BODY // max(1, self._num_columns)))

    @property
    def _num_bodies(self) -> int:
        return -(-self._num_coordinates // self._body)

    def _zero_plan(self) -> TensorPlan:
        return TensorPlan("fsq", b"\0", self._body, lambda first, tile: b"\0")

    def _tile(self, first: int, count: int) -> Tensor:
        return self._source(first, count).float()

    # -------------------------------------------------------------------------------------------------------- statistics, sample

    @cached_property
    def _statistics(self) -> _Statistics:
        rows = np.zeros(self._num_rows if self._by_row else 0)
        columns = np.zeros(self._num_columns if self._by_column else 0)
        energy = largest = 0.0
        for first in range(0, self._num_coordinates, MAX_BODY):
            tile = self._tile(first, min(MAX_BODY, self._num_coordinates - first))
            largest = max(largest, *(abs(float(extreme)) for extreme in torch.aminmax(tile)))
            for part in rectangles(first, len(tile), self._num_columns):
                squares = part.of(tile).double().square_()
                sums = squares.sum(1).numpy()
                energy += float(sums.sum())
                if self._by_row:
                    rows[part.row : part.row + part.num_rows] += sums
                if self._by_column:
                    columns[part.column : part.column + part.num_columns] += squares.sum(0).numpy()
        return _Statistics(energy, largest, rows if self._by_row else None, columns if self._by_column else None)

    @cached_property
    def _sample(self) -> _Sample:
        """The whole of a small tensor; else pieces from evenly spread places and, as many, from rows of much energy.

        Coordinates are weighted so that each product of a row scale and a column scale has the share of the tensor that is its own.
        """
        if self._num_coordinates <= _SAMPLE:
            starts, length = np.zeros(1, np.int64), self._num_coordinates
        else:
            starts, length = self._piece_starts(), _PIECE
        values = self._pieces(starts, length)
        rows, columns = np.divmod((starts[:, None] + np.arange(length)).reshape(-1), self._num_columns)
        weights = np.ones(len(values))
        if len(values) < self._num_coordinates:
            weights = self._weights(rows, columns)
        return _Sample(values, rows, columns, weights)

    def _pieces(self, starts: NDArray[np.int64], length: int) -> Floats:
        """The coordinates of pieces that begin at ascending starts: alone, or out of longer reads where they are close."""
        values = np.empty((len(starts), length))
        span = max(length, TILE if self._num_coordinates <= _READ_WHOLE else 0)
        done = 0
        while done < len(starts):
            first = int(starts[done])
            stop = int(np.searchsorted(starts, first + span - length, side="right"))
            # A tile is good until the next one only: what is kept of it is copied.
            tile = self._tile(first, int(starts[stop - 1]) + length - first).numpy()
            values[done:stop] = tile[(starts[done:stop] - first)[:, None] + np.arange(length)]
            done = stop
        return values.reshape(-1)

    def _piece_starts(self) -> NDArray[np.int64]:
        place = (np.arange(_SAMPLE // _PIECE) + 0.5) / (_SAMPLE // _PIECE)
        weights = np.ones(self._num_rows) if self._statistics.rows is None else np.sqrt(self._statistics.rows)
        share = np.cumsum(weights / max(weights.mean(), 1e-300) + 1)
        row = np.searchsorted(share, place * share[-1])
        # Multiples of the golden ratio spread evenly whatever their number.
        column = np.arange(len(row)) * _GOLDEN % 1 * max(0, self._num_columns - _PIECE)
        starts: NDArray[np.int64] = row * self._num_columns + column.astype(np.int64)
        return np.sort(np.minimum(starts, self._num_coordinates - _PIECE))

    def _weights(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Floats:
        row_strata, column_strata = (
            np.zeros(size, np.int64) if energies is None else _half_octaves(energies)
            for energies, size in (
                (self._statistics.rows, self._num_rows),
                (self._statistics.columns, self._num_columns),
            )
        )
        strata = row_strata[rows] + column_strata[columns]
        sizes = np.convolve(np.bincount(row_strata), np.bincount(column_strata)).astype(np.float64)
        sampled = np.bincount(strata, minlength=len(sizes))
        present = np.flatnonzero(sampled)
        nearest = present[np.abs(np.arange(len(sizes))[:, None] - present).argmin(axis=1)]
        weights: Floats = (np.bincount(nearest, sizes, len(sizes)) / np.maximum(sampled, 1))[strata]
        return weights

    # --------------------------------------------------------------------------------------------------------------------- design

    def _design(self, step: float) -> _Design | None:
        """None where all is rounded to zero. Keeps the last one: scales take memory, and a plan mostly follows its cost."""
        if not self._last or self._last[0] != step:
            self._last = step, self._new_design(step)
        return self._last[1]

    def _new_design(self, step: float) -> _Design | None:
        energy, largest, *_ = self._statistics
        if largest > MAX_MAGNITUDE * step or math.isinf(largest):
            raise StepTooFineError(
                f"values up to {largest:.6g} at a step of {step:.6g}; the codec 'fsq' holds {MAX_MAGNITUDE} steps. "
                "Take a larger step, or send the tensor raw"
            )
        if largest < step / 2:
            return None
        t = np.abs(self._sample.values) / step
        sampled = float(self._sample.weights @ t**2)
        # The others are zero however they are rounded.
        active = np.flatnonzero(t >= MIN_DEAD_ZONE)
        t, weights = t[active], self._sample.weights[active]
        m = round_sample(t, np.zeros(len(t), np.int64), None if self._lattice else FIRST)
        scales, side, _, totals, groups = self._best_scheme(step, active, m)
        roundings = None
        for _ in range(0 if self._lattice else 2):
            roundings = _moments(totals, groups, t, m, weights).cheapest(totals)
            m = round_sample(t, groups, roundings)
        histograms, moments = _histograms(totals, groups, m, weights), _moments(totals, groups, t, m, weights)
        cross, square = moments.products(self._shifts(moments))
        gain = sampled / cross if self._match_gain and cross else 1.0
        error = energy * max(0.0, 1 - (2 * gain * cross - gain**2 * square) / max(sampled, 1e-300))
        bits = side + float((_entropy_bits(histograms) + _table_bits(histograms)).sum())
        bits += float(histograms.sum(axis=0) @ TOKEN_WIDTH[: histograms.shape[1]])
        return _Design(scales, roundings, Cost(bits + _HEAD_BITS + _BODY_BITS * self._num_bodies, error))

    def _shifts(self, moments: Moments) -> NDArray[np.int64]:
        return np.zeros((len(moments.counts), 3), np.int64) if self._lattice else moments.shifts()

    def _best_scheme(self, step: float, active: NDArray[np.intp], m: Floats) -> _Scheme:
        """The scheme with the fewest bits. Which one that is hardly depends on the step: all are tried again where it has changed
        by a factor of four."""
        if self._axes and abs(math.log2(step / self._axes[0])) < 2:
            return self._scheme(step, active, m, *self._axes[1])
        best, axes = min(
            ((self._scheme(step, active, m, *axes), axes) for axes in self._schemes), key=lambda tried: tried[0].bits
        )
        self._axes = step, axes
        return best

    def _scheme(self, step: float, active: NDArray[np.intp], m: Floats, by_row: bool, by_column: bool) -> _Scheme:
        """The scales of rows or columns or both or none, of which groups are made for the magnitudes m of the active part of the
        sample, all others being zero."""
        rows, columns, num_classes = self._levels(step, by_row, by_column)
        classes = np.zeros(len(self._sample.values), np.int64)
        side = 0.0
        for levels, of_sample in ((rows, self._sample.rows), (columns, self._sample.columns)):
            if levels is not None:
                classes += levels[of_sample]
                side += _level_bits(levels)
        classes = classes.clip(0, num_classes - 1)
        totals: Floats = np.bincount(classes, self._sample.weights, num_classes).astype(np.float64)
        classes = classes[active]
        bounds, bits = _cheapest_runs(_histograms(totals, classes, m, self._sample.weights[active]))
        if not bounds:
            rows, columns, side = None, None, 0.0
        group = np.searchsorted(bounds, np.arange(num_classes), side="right")
        group_totals: Floats = np.bincount(group, totals).astype(np.float64)
        return _Scheme(
            Scales(self._num_columns, rows, columns, bounds), side, side + bits, group_totals, group[classes]
        )

    def _levels(self, step: float, by_row: bool, by_column: bool) -> tuple[Ints | None, Ints | None, int]:
        """Levels of rows and columns whose sum is a class, and the number of classes; the lower, the nearer to zero."""
        if not (by_row or by_column):
            return None, None, 1
        num_rows, num_columns = self._num_rows, self._num_columns
        per_level = self._num_coordinates / (num_rows * by_row + num_columns * by_column)
        per_octave = next((levels for least, levels in _LEVELS_PER_OCTAVE if per_level >= least), 1)
        top = per_octave * _NUM_OCTAVES - 1
        # The scale of a coordinate is that of its row, times that of its column relative to the whole.
        unit = self._statistics.energy / self._num_coordinates / step**2
        rows = columns = None
        if by_row and self._statistics.rows is not None:
            rows = _logarithms(self._statistics.rows / num_columns / step**2, per_octave) - per_octave * _LOWEST_OCTAVE
        if by_column and self._statistics.columns is not None:
            relative = self._statistics.columns / num_rows / step**2 / (unit if by_row else 1.0)
            columns = _logarithms(relative, per_octave) - (0 if by_row else per_octave * _LOWEST_OCTAVE)
        # A level that cannot matter, whatever it is added to, need not be told from others: fewer levels cost less.
        if rows is not None:
            low, high = (0, 0) if columns is None else (int(columns.min()), int(columns.max()))
            rows = _narrowed(rows.clip(-high, top - low))
        if columns is not None:
            low, high = (0, 0) if rows is None else (int(rows.min()), int(rows.max()))
            columns = _narrowed(columns.clip(-high, top - low))
        return rows, columns, top + 1


def _half_octaves(energies: Floats) -> NDArray[np.int64]:
    """Classes of about equal energy, the smallest 0: at most 64."""
    levels = _logarithms(energies / max(float(energies.max()), 1e-300), 2)
    return np.maximum(levels + 63, 0).astype(np.int64)


def _narrowed(levels: Ints) -> Ints:
    return levels.clip(int(levels.max()) - _MAX_DISTINCT + 1, None)


def _logarithms(energies: Floats, per_octave: int) -> Ints:
    """Of the scales, the roots; what is zero or nearly has a very low one."""
    levels: Ints = np.rint(per_octave / 2 * np.log2(np.maximum(energies, 2.0**-120))).astype(np.int32)
    return levels


def _moments(totals: Floats, groups: NDArray[np.intp], t: Floats, m: Floats, weights: Floats) -> Moments:
    moments = Moments(len(totals))
    moments.add(groups, t, m, weights)
    return moments


def _histograms(totals: Floats, rows: NDArray[np.intp], m: Floats, weights: Floats) -> Floats:
    """How often each token of a magnitude comes, [len(totals), num_tokens]; what only the totals count is zero."""
    tokens = to_tokens(m)
    num_tokens = int(tokens.max(initial=0)) + 1
    index = rows * num_tokens + tokens
    counted: Floats = np.bincount(index, weights, len(totals) * num_tokens).astype(np.float64).reshape(-1, num_tokens)
    counted[:, 0] = np.maximum(totals - counted[:, 1:].sum(axis=1), 0.0)
    return counted


def _entropy_bits(histograms: Floats) -> Floats:
    """Ideal length of what each histogram of magnitudes counts, signs included; over the last axis."""
    total = histograms.sum(axis=-1)
    logarithms = histograms * np.log2(np.maximum(histograms, 1e-9))
    bits: Floats = total * np.log2(np.maximum(total, 1e-9)) - logarithms.sum(axis=-1) + total - histograms[..., 0]
    return bits


def _table_bits(histograms: Floats) -> Floats:
    """About what a group's table and shifts take."""
    each = np.where(histograms[..., 1:] > 0, 3 + np.log2(1 + histograms[..., 1:]) / 2, 0).sum(axis=-1)
    bits: Floats = 16 + each + 24 * (each > 0)
    return bits


def _level_bits(levels: Ints) -> float:
    counts = np.bincount(levels - levels.min()).astype(np.float64)
    return float(_entropy_bits(np.pad(counts, (1, 0))) - counts.sum() + 24 + 8 * np.count_nonzero(counts))


def _cheapest_runs(histograms: Floats) -> tuple[list[int], float]:
    """The division of classes into runs with the fewest bits, each run with a table of its own: where runs begin, and the bits."""
    sums = np.pad(histograms.cumsum(axis=0), ((1, 0), (0, 0)))
    num_classes = len(histograms)
    starts, stops = np.triu_indices(num_classes + 1, 1)
    run = sums[stops] - sums[starts]
    cost = np.full((num_classes + 1, num_classes + 1), np.inf)
    cost[starts, stops] = _entropy_bits(run) + _table_bits(run)
    best, before = np.zeros(num_classes + 1), np.zeros(num_classes + 1, np.int64)
    for stop in range(1, num_classes + 1):
        ways = best[:stop] + cost[:stop, stop]
        before[stop] = ways.argmin()
        best[stop] = ways[before[stop]]
    bounds: list[int] = []
    stop = int(before[num_classes])
    while stop:
        bounds.insert(0, stop)
        stop = int(before[stop])
    return bounds, float(best[-1])


# ---------------------------------------------------------------------------------------------------------------------- encoding


class FsqConfig(LossyTable):
    """Uniform steps under a model of the scale of rows and columns."""

    kind: Literal["fsq"] = Field(
        default="fsq",
        description="One step for all values, entropy-coded with the scales of rows and columns as context.",
    )
    contexts: bool = Field(
        default=True, description="Whether rows and columns tell a value's model. Off: one model per tensor, faster."
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Lossy tensors by fsq at one step; small ones by uniform where that is better."""

        def analyze(spec: TensorSpec, source: TileSource) -> Iterator[Analysis]:
            yield FsqAnalysis(spec, source, contexts=self.contexts, match_gain=self.match_gain, coder=self.coder)

        return plan_tensors(tensors, analyze, self.aim, seed=seed)
