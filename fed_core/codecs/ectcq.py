"""ECTCQ, entropy-coded trellis-coded quantization: nearest to Shannon's bound where values are as good as independent.

Fischer and Wang 1992, https://doi.org/10.1109/18.144705, with the step and the union of quantizers of Marcellin 1994,
https://doi.org/10.1109/26.328971: the even and the odd multiples of half a step, of which `fed_core.codecs.trellis` allows one kind
at each coordinate. Like an entropy-coded uniform quantizer it has one step and takes any rate, and at every rate it has about two
thirds of its distance from the bound. What is different here: the path is the one with the least error + lambda * bits, the rates
being those of a sample, and many paths run side by side, so that array operations do the work.

It knows no contexts. Updates of real models have structure that `fsq` and `lrq` live on and this codec does not see; what has none
is its field, such as updates that noise was added to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    SymbolReader,
    encode_symbols,
    read_table,
    svarint,
    varint,
    write_table,
)
from fed_core.codecs.floating import TILE, check_lossy, mantissa_exponent
from fed_core.codecs.planning import LossyTable, StepTooFineError, plan_tensors
from fed_core.codecs.trellis import NUM_STATES, SUBSETS, best_parities, states_of, trellis
from fed_core.errors import PayloadError
from fed_core.specs import TensorSpec

MAX_BODY: Final = 2**19
"""Coordinates of a body."""
MAX_MAGNITUDE: Final = 2**12 - 1
"""Half steps from zero that values may be away."""

Floats = NDArray[np.float64]
NumStates = Literal[8, 64, 256]

# Steps of a lane. Its first cost a little, for it begins in state 0; but many steps of few lanes take long.
_STEPS: Final = 512
_SAMPLE_STEPS: Final = 256
# Of a sample these are not typical.
_FIRST_STEPS: Final = 16
_USUAL_LANES: Final = 64
_FEWEST_STEPS: Final = 64
_MAX_INDEX: Final = MAX_MAGNITUDE // 2 + 1
_TABLE_SYMBOLS: Final = 2 * _MAX_INDEX + 1
_MANTISSA_BITS: Final = 16
_MAX_EXPONENT: Final = 200
# The magnitudes 1, 2 .. of half steps, the last with all above, are reproduced by their means, in parts of a half step.
_NUM_SHIFTS: Final = 5
_SHIFT_BITS: Final = 7
_HEADER_BYTES: Final = 1 + 3 + 2 + _NUM_SHIFTS
_ENTRY_BYTES: Final = 8

# What a bit is worth, in squared half steps. The slope is 2 ln(2) times the error, 0.26 at high rates and more at low ones; on a
# Gaussian any value from 0.3 to 0.7 leads to the same curve within 0.01 dB.
_LAMBDA: Final = 0.45
_NUM_TURNS: Final = 2
_UNSEEN: Final = 0.2
_SAMPLE: Final = 2**15
_PIECE: Final = 2**7


# ------------------------------------------------------------------------------------------------------------------------ decoding


class EctcqCodec:
    """A body of zeros is a zero byte. Any other is: log2 of the number of states; mantissa and exponent of half a step; five shifts
    (signed bytes); the frequency tables of even and of odd states; the symbols.

    Coordinates lie in lanes: n of them in l = max(ceil(n / 512), min(64, ceil(n / 64))), and step i of all lanes is the l
    coordinates from i l on. Symbols come step by step, those of lanes in even states first. A symbol m in a state of last bit q
    stands for k = 2 m - q, and its own last bit leads to the next state. The value of k is (|k| - shift / 128) half steps with the
    sign of k; the shift is that of the magnitude: 1, 2, 3, 4, or more. It is exact in float64, and rounded once.
    """

    kind = "ectcq"
    has_head = False

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From one byte (all zero) to 13 bits a coordinate and long tables."""
        check_lossy(self.kind, spec)
        if num_coordinates > MAX_BODY:
            raise PayloadError(
                f"a body of {num_coordinates} coordinates of the codec 'ectcq'; expected at most {MAX_BODY}"
            )
        # Each step has two parts, whose last byte need not be full.
        symbols = 1 + 2 * _STEPS + -(-num_coordinates * (_TABLE_SYMBOLS - 1).bit_length() // 8)
        tables = 2 * (_ENTRY_BYTES + _ENTRY_BYTES * min(num_coordinates, _TABLE_SYMBOLS))
        return 1, _HEADER_BYTES + tables + symbols

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _EctcqDecoder:
        """The same for every tensor of a floating type."""
        check_lossy(self.kind, spec, head)
        return _EctcqDecoder()


class _EctcqDecoder:
    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Step by step through the lanes, then all values by one table. Takes some 8 bytes a coordinate."""
        if len(out) > MAX_BODY:
            raise PayloadError(f"a body of {len(out)} coordinates of the codec 'ectcq'; expected at most {MAX_BODY}")
        reader = ByteReader(body)
        log_states = reader.u8()
        if log_states == 0:
            reader.done()
            out.zero_()
            return
        if 1 << log_states not in NUM_STATES:
            raise PayloadError(f"a trellis of 2^{log_states} states; expected one of {', '.join(map(str, NUM_STATES))}")
        mantissa, exponent = reader.varint(), reader.svarint()
        if not (0 < mantissa < 2**_MANTISSA_BITS and abs(exponent) <= _MAX_EXPONENT):
            raise PayloadError(f"the codec 'ectcq' has the half step {mantissa} * 2^{exponent}, out of range")
        shifts = np.frombuffer(reader.take(_NUM_SHIFTS), np.int8)
        tables = [_read_table(reader) for _ in range(2)]
        points = _read_points(reader.take(reader.left), tables, 1 << log_states, len(out))
        largest = min(torch.finfo(out.dtype).max, torch.finfo(torch.float32).max)
        values = _reproductions(max(map(_reach, tables)), mantissa, exponent, shifts, largest)
        for start in range(0, len(out), TILE):
            index = torch.from_numpy(points[start : start + TILE].astype(np.int32)).add_(len(values) // 2)
            out[start : start + TILE].copy_(values.index_select(0, index))


def _read_table(reader: ByteReader) -> FrequencyTable:
    table = read_table(reader, _TABLE_SYMBOLS)
    if _reach(table) > _MAX_INDEX:
        raise PayloadError(f"a table of the codec 'ectcq' reaches {_reach(table)}; expected at most {_MAX_INDEX}")
    return table


def _reach(table: FrequencyTable) -> int:
    return max(abs(table.lowest), abs(table.lowest + len(table.frequencies) - 1))


def _read_points(
    data: memoryview, tables: Sequence[FrequencyTable], num_states: int, num_coordinates: int
) -> NDArray[np.int16]:
    """The k of all coordinates."""
    following = trellis(num_states).following
    num_lanes = _num_lanes(num_coordinates, _STEPS)
    reader = SymbolReader(data, 2 * num_coordinates)
    points = np.empty(num_coordinates, np.int16)
    states = np.zeros(num_lanes, np.uint8)
    for first in range(0, num_coordinates, num_lanes):
        here = points[first : first + num_lanes]
        # Of the last step, some lanes may be empty.
        states = states[: len(here)]
        last_bits = states & np.uint8(1)
        symbols = np.empty(len(here), np.int32)
        for last_bit, table in enumerate(tables):
            (places,) = np.nonzero(last_bits == last_bit)
            symbols[places] = reader.read(len(places), table)
        here[...] = 2 * symbols - last_bits
        states = following.take(np.intp(2) * states + (symbols & 1))
    reader.done()
    return points


def _reproductions(reach: int, mantissa: int, exponent: int, shifts: NDArray[np.int8], largest: float) -> Tensor:
    """Values of k from -(2 reach + 1) on, float32, each rounded once from an exact product."""
    magnitudes = np.arange(2 * reach + 2)
    # At most 2^12 * 2^7 * 2^16: exact in float64, like the power of two.
    parts = (magnitudes << _SHIFT_BITS) - np.concatenate([[0], shifts.astype(np.int64)])[
        magnitudes.clip(max=_NUM_SHIFTS)
    ]
    upper = np.minimum(np.ldexp((parts * mantissa).astype(np.float64), exponent - _SHIFT_BITS), largest)
    return torch.from_numpy(np.concatenate([-upper[:0:-1], upper]).astype(np.float32))


def _num_lanes(num_coordinates: int, max_steps: int) -> int:
    return max(-(-num_coordinates // max_steps), min(_USUAL_LANES, -(-num_coordinates // _FEWEST_STEPS)))


# ------------------------------------------------------------------------------------------------------------------------ analysis


class _Statistics(NamedTuple):
    """|x|^2, max |x|, and |x|^2 of each whole piece."""

    energy: float
    largest: float
    pieces: Floats


class _Sample(NamedTuple):
    """Some coordinates, and of how many of the sample's length each is typical."""

    values: Tensor
    weights: Floats


class _Design(NamedTuple):
    """What is decided from the sample: the price of each k (`_prices`), and what comes of it."""

    prices: Tensor
    cost: Cost


class EctcqAnalysis:
    """A tensor seen by the codec 'ectcq': the cost of any step, and the plan for one. Nothing is read before the first call.

    `match_gain`: reproductions are scaled so that <x, x'> = |x|^2 in every body; the error is then larger, and uncorrelated with x.

    The first call reads the tensor once and keeps a sample of 2^15 coordinates. Memory while encoding: some 40 bytes for each of
    2^19 coordinates, and 16 MiB.

    Raises PayloadError for types that the codec does not hold; `cost` and `plan` raise ValueError for a step that is not positive
    and finite, and StepTooFineError for one that is too small for the largest value.
    """

    def __init__(
        self,
        spec: TensorSpec,
        source: TileSource,
        *,
        num_states: NumStates = 64,
        match_gain: bool = False,
        coder: Coder = "rans",
    ) -> None:
        check_lossy(EctcqCodec.kind, spec)
        self._num_coordinates = spec.num_elements
        self._source = source
        self._num_states, self._match_gain, self._coder = num_states, match_gain, coder
        self._costs: dict[float, Cost] = {}
        self._last: tuple[float, _Design | None] | None = None

    def cost(self, step: float) -> Cost:
        """Bits of the bodies and squared error, from the sample: within a few percent."""
        half = _half(step)
        if half not in self._costs:
            design = self._design(half)
            self._costs[half] = design.cost if design else Cost(8.0 * self._num_bodies, self._statistics.energy)
        return self._costs[half]

    def plan(self, step: float) -> TensorPlan:
        """The plan at that step, of which half is rounded to a mantissa of 16 bits."""
        half = _half(step)
        design = self._design(half)

        def encode(first: int, tile: Tensor) -> bytes:
            return self._encode(tile, half, design.prices) if design else b"\0"

        return TensorPlan(EctcqCodec.kind, None, MAX_BODY, encode)

    def _encode(self, tile: Tensor, half: float, prices: Tensor) -> bytes:
        t = _in_half_steps(tile, half)
        points = _best_points(t, prices, self._num_states, _STEPS)
        if not points.any():
            return b"\0"
        moments = _Moments.of(t, points, np.ones(len(t)))
        shifts = moments.shifts()
        gain = moments.gain(shifts) if self._match_gain else 1.0
        mantissa, exponent = mantissa_exponent(half * gain, _MANTISSA_BITS)
        tables = [_table_of(points[points & 1 == last_bit], last_bit) for last_bit in (0, 1)]
        num_lanes, parts = _num_lanes(len(points), _STEPS), []
        for first in range(0, len(points), num_lanes):
            here = points[first : first + num_lanes]
            last_bits = here & 1
            for last_bit, table in enumerate(tables):
                parts.append((here[last_bits == last_bit] + last_bit >> 1, table))
        return b"".join(
            [
                bytes([self._num_states.bit_length() - 1]),
                varint(mantissa) + svarint(exponent) + shifts.astype(np.int8).tobytes(),
                *map(write_table, tables),
                encode_symbols(parts, self._coder),
            ]
        )

    @property
    def _num_bodies(self) -> int:
        return -(-self._num_coordinates // MAX_BODY)

    @cached_property
    def _statistics(self) -> _Statistics:
        largest, energy, pieces = 0.0, 0.0, []
        for first in range(0, self._num_coordinates, MAX_BODY):
            tile = self._source(first, min(MAX_BODY, self._num_coordinates - first)).float()
            largest = max(largest, float(torch.stack(torch.aminmax(tile)).abs().max()))
            squares = tile.double().square_()
            energy += float(squares.sum())
            pieces.append(squares[: len(squares) // _PIECE * _PIECE].view(-1, _PIECE).sum(1).numpy())
        return _Statistics(energy, largest, np.concatenate(pieces))

    @cached_property
    def _sample(self) -> _Sample:
        """The whole of a small tensor; else pieces: those of most energy, and as many of the others."""
        if self._num_coordinates <= _SAMPLE:
            return _Sample(self._copy(0, self._num_coordinates), np.ones(self._num_coordinates))
        # The last piece, which is not whole, is left out.
        order, half = np.argsort(-self._statistics.pieces, kind="stable"), _SAMPLE // _PIECE // 2
        top, others = np.sort(order[:half]), order[half:]
        others = np.sort(others[((np.arange(half) + 0.5) * (len(others) / half)).astype(np.int64)])
        starts = _PIECE * np.concatenate([others, top])
        values = torch.cat([self._copy(start, _PIECE) for start in starts.tolist()])
        settled, middle = _FIRST_STEPS * _num_lanes(_SAMPLE, _SAMPLE_STEPS), half * _PIECE
        weights = np.zeros(_SAMPLE)
        weights[settled:middle] = _PIECE * (len(order) - half) / (middle - settled)
        weights[middle:] = 1
        return _Sample(values, weights * (_SAMPLE / weights.sum()))

    def _copy(self, first: int, count: int) -> Tensor:
        """Part of the tensor, float64: a tile is good until the next one only."""
        return self._source(first, count).to(torch.float64, copy=True)

    def _design(self, half: float) -> _Design | None:
        """None where all is nearer to zero than to anything else. Keeps the last one: a plan mostly follows its cost."""
        if not self._last or self._last[0] != half:
            self._last = half, self._new_design(half)
        return self._last[1]

    def _new_design(self, half: float) -> _Design | None:
        energy, largest, _ = self._statistics
        # Room for the candidates beyond the largest value.
        if largest > (MAX_MAGNITUDE - 4) * half or math.isinf(largest):
            raise StepTooFineError(
                f"values up to {largest:.6g} at a step of {2 * half:.6g}; the codec 'ectcq' holds {MAX_MAGNITUDE // 2} steps. "
                "Take a larger step, or send the tensor raw"
            )
        if largest < half:
            return None
        t, weights = _in_half_steps(self._sample.values, half), self._sample.weights
        reach = math.ceil(largest / half) + 4
        # To begin with: each value to the nearest k, be it even or odd.
        points = np.concatenate([2 * np.rint(t / 2), 2 * np.rint((t + 1) / 2) - 1]).astype(np.int16)
        counts = _counts(points, np.tile(weights, 2), reach)
        num_steps = _STEPS if len(t) == self._num_coordinates else _SAMPLE_STEPS
        for _ in range(_NUM_TURNS):
            prices = _prices(counts)
            points = _best_points(t, prices, self._num_states, num_steps)
            counts = _counts(points, weights, reach)
        moments = _Moments.of(t, points, weights)
        share = self._num_coordinates / len(t)
        shifts = moments.shifts()
        cross, square = moments.products(shifts)
        gain = moments.gain(shifts) if self._match_gain else 1.0
        error = energy * max(0.0, 1 - (2 * gain * cross - gain**2 * square) / max(moments.energy, 1e-300))
        bits = share * _entropy_bits(counts) + self._num_bodies * (
            8 * _HEADER_BYTES + 32 + 6 * np.count_nonzero(counts)
        )
        return _Design(prices, Cost(bits, error))


class _Moments(NamedTuple):
    """Of each magnitude 0, 1 .. of k: how often it comes, and the sum of t along it, the sign of k taken off. And |t|^2."""

    counts: Floats
    sums: Floats
    energy: float

    @classmethod
    def of(cls, t: NDArray[np.float32], points: NDArray[np.int16], weights: Floats) -> _Moments:
        magnitudes, weighted = np.abs(points), weights * t
        counts, sums = (
            np.bincount(magnitudes, each).astype(np.float64) for each in (weights, weighted * np.sign(points))
        )
        return cls(counts, sums, float(weighted @ t))

    def shifts(self) -> NDArray[np.int64]:
        """How far below 1, 2 .. the means of what became them lie, in 1/128 of a half step: from -128 to 127."""
        magnitudes = np.arange(len(self.counts))
        below, counts = (
            np.bincount(magnitudes.clip(max=_NUM_SHIFTS), each, _NUM_SHIFTS + 1)[1:]
            for each in (magnitudes * self.counts - self.sums, self.counts)
        )
        return np.clip(np.rint(below / np.maximum(counts, 1) * (1 << _SHIFT_BITS)), -128, 127).astype(np.int64)

    def products(self, shifts: NDArray[np.int64]) -> tuple[float, float]:
        """<t, t'> and |t'|^2."""
        magnitudes = np.arange(len(self.counts))
        values = magnitudes - np.concatenate([[0], shifts])[magnitudes.clip(max=_NUM_SHIFTS)] / (1 << _SHIFT_BITS)
        return float(values @ self.sums), float(values**2 @ self.counts)

    def gain(self, shifts: NDArray[np.int64]) -> float:
        """What makes <t, t'> what |t|^2 is."""
        cross, _ = self.products(shifts)
        return self.energy / cross if cross > 0 else 1.0


def _half(step: float) -> float:
    """Half a step, as a body can say it."""
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"a step of {step}; expected a positive number")
    return math.ldexp(*mantissa_exponent(step / 2, _MANTISSA_BITS))


def _in_half_steps(values: Tensor, half: float) -> NDArray[np.float32]:
    # Neither the step nor its inverse may be near the ends of float32.
    return (values.double() * (1 / half)).float().numpy()


def _best_points(t: NDArray[np.float32], prices: Tensor, num_states: int, num_steps: int) -> NDArray[np.int16]:
    """The k of the path with the least squared error + prices."""
    num_lanes = _num_lanes(len(t), num_steps)
    num_steps = -(-len(t) // num_lanes)
    padded = torch.zeros(num_steps * num_lanes)
    padded[: len(t)] = torch.from_numpy(t)
    costs = np.empty((num_steps, 4, num_lanes), np.float32)
    height = max(1, TILE // num_lanes)
    for step in range(0, num_steps, height):
        values = padded[step * num_lanes : (step + height) * num_lanes]
        for subset, offset in enumerate(SUBSETS):
            _, cheapest = _nearest(values, offset, prices)
            costs[step : step + height, subset] = cheapest.view(-1, num_lanes).numpy()
    parities = best_parities(costs, num_states)
    subsets = 2 * (states_of(parities, num_states) & 1) + parities
    offsets = np.array(SUBSETS, np.float32).take(subsets.reshape(-1)[: len(t)])
    points = np.empty(len(t), np.int16)
    for first in range(0, len(t), TILE):
        chosen, _ = _nearest(
            padded[first : first + TILE][: len(t) - first], torch.from_numpy(offsets[first : first + TILE]), prices
        )
        points[first : first + TILE] = chosen.numpy()
    return points


def _nearest(values: Tensor, offset: float | Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """The cheaper of the nearest k of a subset and the next towards zero, and what it costs; float32."""
    outer = ((values - offset) * 0.25).round_().mul_(4).add_(offset)
    inner = outer - torch.full((), 4.0).copysign(outer)
    middle = len(prices) // 2
    outer_cost, inner_cost = (
        (values - point).square_().add_(prices.index_select(0, point.to(torch.int32).add_(middle)))
        for point in (outer, inner)
    )
    is_outer = outer_cost <= inner_cost
    return torch.where(is_outer, outer, inner), torch.where(is_outer, outer_cost, inner_cost)


def _counts(points: NDArray[np.int16], weights: Floats, reach: int) -> Floats:
    """How often each k from -reach to reach comes."""
    return np.bincount(points.astype(np.int64) + reach, weights, 2 * reach + 1).astype(np.float64)


def _prices(counts: Floats) -> Tensor:
    """LAMBDA * bits of each k, even and odd ones under tables of their own; float32."""
    prices = np.empty(len(counts))
    for last_bit in (0, 1):
        mine = counts[last_bit::2] + _UNSEEN
        prices[last_bit::2] = _LAMBDA * (np.log2(mine.sum()) - np.log2(mine))
    return torch.from_numpy(prices.astype(np.float32))


def _entropy_bits(counts: Floats) -> float:
    bits = 0.0
    for mine in (counts[0::2], counts[1::2]):
        seen = mine[mine > 0]
        bits += float(seen.sum() * np.log2(max(seen.sum(), 1)) - seen @ np.log2(seen))
    return bits


def _table_of(points: NDArray[np.int16], last_bit: int) -> FrequencyTable:
    if not len(points):
        return FrequencyTable.from_counts(0, np.ones(1))
    symbols = points + last_bit >> 1
    lowest = int(symbols.min())
    return FrequencyTable.from_counts(lowest, np.bincount(symbols - lowest))


# ------------------------------------------------------------------------------------------------------------------------ encoding


class EctcqConfig(LossyTable):
    """Trellis-coded quantization of every tensor, with entropy coding."""

    kind: Literal["ectcq"] = Field(
        default="ectcq",
        description="A trellis of quantizers: nearest to Shannon's bound where values have no structure, such as those with noise.",
    )
    states: NumStates = Field(
        default=64,
        description="States of the trellis. More come a tenth of a decibel nearer, and take longer to encode.",
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Lossy tensors by ectcq at one step; small ones by uniform where that is better."""

        def analyze(spec: TensorSpec, source: TileSource) -> Iterator[Analysis]:
            yield EctcqAnalysis(spec, source, num_states=self.states, match_gain=self.match_gain, coder=self.coder)

        return plan_tensors(tensors, analyze, self.aim, seed=seed)
