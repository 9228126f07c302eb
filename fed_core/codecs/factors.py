"""The two integer factors of a low-rank matrix as bytes.

Both lie side by side in one matrix of (rank, rows + cols) integers. Components, its rows, are coded in groups of 1, 1, 2, 4,
8 .. by falling size. What is known of earlier groups tells how large the integers at a position are going to be: the weights of a
unit that hardly moved are small in every component. So the positions of a group fall into classes, an octave of scale apart, and
the model of a component is shifted by its positions' class. On client updates that saves 3 to 10 % of the bits and costs none; it
takes integer arithmetic only, so both sides agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fed_core.codecs.entropy import ByteReader, Coder, Ints, decode_symbols, encode_symbols, varint
from fed_core.codecs.parametric import MAX_REACH_BITS, NUM_MODELS, code_lengths, parametric_table
from fed_core.errors import PayloadError

Floats = NDArray[np.float64]
Models = NDArray[np.uint8]

# Octaves by which a class's scale differs from that of its component.
_SHIFTS: Final = (-2, -1, 0, 1, 2)
_MODELS_PER_OCTAVE = 8
_FIXED = 16  # bits after the point of an activity
# Activities at which classes meet, half an octave beyond each shift but the last.
_BORDERS = np.array([math.isqrt(2 ** (2 * _FIXED + 2 * shift + 1)) for shift in _SHIFTS[:-1]], np.int64)
# One over the scale of each model, 2^(3 - quarter octaves / 4).
_WEIGHTS = np.array(
    [math.isqrt(math.isqrt(2 ** (4 * (_FIXED + 3) - model // 2))) for model in range(NUM_MODELS)], np.int64
)


def _shift_models() -> Models:
    models = np.arange(NUM_MODELS)
    shapes = models % 2
    shifts = _MODELS_PER_OCTAVE * np.array(_SHIFTS)[:, None]
    shifted: Models = (np.clip(models - shapes + shifts, 0, NUM_MODELS - 2) + shapes).astype(np.uint8)
    return shifted


# (class, model) -> the model of the same shape that positions of that class have; the range of scales ends somewhere.
_SHIFTED: Final = _shift_models()


class Fit(NamedTuple):
    """How factors are going to be coded: (rank, 2) models of left and right, a reach per group, and (rank,) bits per component."""

    models: Models
    reach_bits: list[int]
    bits: Floats


def groups(rank: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the components that are coded together: 0-1, 1-2, 2-4, 4-8 .."""
    first, end = 0, 1
    while first < rank:
        yield first, min(end, rank)
        first, end = end, 2 * end


def fit_factors(factors: Ints, rows: int) -> Fit:
    """The models that make factors shortest; (rank, rows + cols) int32, each row with a non-zero on both sides, all within reach.

    A component's bits do not depend on later ones (but for the reach, a trifle), so that one fit tells what every rank would cost.
    """
    rank = len(factors)
    fit = Fit(np.empty((rank, 2), np.uint8), [], np.empty(rank))
    activity = _Activity(rows, factors.shape[1])
    for first, end in groups(rank):
        sizes = np.abs(factors[first:end])
        reach_bits = int(sizes.max()).bit_length()
        bits = _bits_of_models(sizes, rows, activity.classes(), reach_bits)
        fit.models[first:end] = bits.argmin(2)
        fit.reach_bits.append(reach_bits)
        fit.bits[first:end] = bits.min(2).sum(1) + 16
        activity.add(sizes, fit.models[first:end])
    return fit


def write_factors(factors: Ints, rows: int, fit: Fit, coder: Coder) -> bytes:
    """Factors as `read_factors` reads them; the fit may be one of more components."""
    out = bytearray()
    activity = _Activity(rows, factors.shape[1])
    for index, (first, end) in enumerate(groups(len(factors))):
        group, models, reach_bits = factors[first:end], fit.models[first:end], fit.reach_bits[index]
        layout = _Layout.of(models, rows, activity.classes())
        pieces = np.split(group.reshape(-1)[layout.order], np.cumsum(layout.counts)[:-1])
        symbols = encode_symbols(
            [(piece, parametric_table(model, reach_bits)) for piece, model in zip(pieces, layout.models, strict=True)],
            coder,
        )
        out += bytes([reach_bits]) + models.tobytes() + varint(len(symbols)) + symbols
        activity.add(np.abs(group), models)
    return bytes(out)


def read_factors(reader: ByteReader, rank: int, rows: int, cols: int) -> Ints:
    """(rank, rows + cols) int32. Raises PayloadError. The caller has seen to it that this much memory may be taken."""
    factors = np.empty((rank, rows + cols), np.int32)
    if not rank:  # then the matrix may be of any size
        return factors
    activity = _Activity(rows, rows + cols)
    for first, end in groups(rank):
        group = factors[first:end]
        reach_bits = reader.u8()
        models = np.frombuffer(reader.take(2 * len(group)), np.uint8).reshape(-1, 2)
        if not 1 <= reach_bits <= MAX_REACH_BITS or models.max() >= NUM_MODELS:
            raise PayloadError(
                f"factors of reach 2^{reach_bits} under model {models.max()}; expected 2^1 to 2^{MAX_REACH_BITS}, and models "
                f"below {NUM_MODELS}"
            )
        layout = _Layout.of(models, rows, activity.classes())
        parts = [
            (count, parametric_table(model, reach_bits))
            for count, model in zip(layout.counts, layout.models, strict=True)
        ]
        group.reshape(-1)[layout.order] = np.concatenate(decode_symbols(reader.take(reader.varint()), parts))
        activity.add(np.abs(group), models)
    return factors


class _Activity:
    """How large the integers at each position have been, in units of their models' scales."""

    def __init__(self, rows: int, length: int) -> None:
        self._rows = rows
        self._sum: NDArray[np.int64] = np.full(length, 2**_FIXED, np.int64)
        self._num_components = 1

    def add(self, sizes: Ints, models: Models) -> None:
        weights = _WEIGHTS[models]
        self._sum[: self._rows] += weights[:, 0] @ sizes[:, : self._rows]
        self._sum[self._rows :] += weights[:, 1] @ sizes[:, self._rows :]
        self._num_components += len(sizes)

    def classes(self) -> NDArray[np.intp]:
        """An index into _SHIFTS for each position; before anything is known that of no shift."""
        return np.searchsorted(_BORDERS * self._num_components, self._sum, side="right")


class _Layout(NamedTuple):
    """A group's integers sorted by model: the order, and the models that occur with how often they do."""

    order: NDArray[np.intp]
    models: list[int]
    counts: list[int]

    @classmethod
    def of(cls, models: Models, rows: int, classes: NDArray[np.intp]) -> _Layout:
        left, right = models[:, :1], models[:, 1:]
        keys = np.concatenate([_SHIFTED[classes[:rows], left], _SHIFTED[classes[rows:], right]], axis=1).reshape(-1)
        counts = np.bincount(keys)
        present = np.flatnonzero(counts)
        return cls(np.argsort(keys, kind="stable"), present.tolist(), counts[present].tolist())


def _bits_of_models(sizes: Ints, rows: int, classes: NDArray[np.intp], reach_bits: int) -> Floats:
    """(components, 2, NUM_MODELS): bits of both sides of each component under each model, the classes being what they are."""
    lengths = code_lengths(reach_bits)
    num_components, num_sizes, num_classes = len(sizes), lengths.shape[1], len(_SHIFTS)
    columns = classes.copy()
    columns[rows:] += num_classes
    keys = (np.arange(0, 2 * num_classes * num_components, 2 * num_classes)[:, None] + columns) * num_sizes + sizes
    counts = np.bincount(keys.reshape(-1), minlength=2 * num_classes * num_components * num_sizes)
    bits = (counts.reshape(-1, num_sizes) @ lengths.T).reshape(num_components, 2, num_classes, NUM_MODELS)
    return sum((bits[:, :, index, shifted] for index, shifted in enumerate(_SHIFTED)), np.zeros(1))
