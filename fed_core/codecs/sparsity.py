"""Which tensors are made sparse, and which of their values are the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.floating import TILE, is_lossy_parameter, narrow
from fed_core.codecs.planning import SMALL_COORDINATES
from fed_core.codecs.positions import Positions
from fed_core.codecs.raw import raw_plan
from fed_core.codecs.uniform import uniform_plan
from fed_core.specs import TensorSpec

Tensors = Sequence[tuple[TensorSpec, TileSource]]

Fraction = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Share of an update's values that are sent: the largest of all tensors together. A place takes about 8 bits at "
        "0.01, 6 at 0.05, 4 at 0.2.",
    ),
]

_SMALL_BITS: Final = 4
_SMALL_BLOCK: Final = 256
# Of so few, the headers would be most.
_TINY_COORDINATES: Final = 128

_HALF: Final = 2**16


def plan_parameters(tensors: Tensors, plan_large: Callable[[Tensors], Sequence[TensorPlan]]) -> list[TensorPlan]:
    """One plan per tensor, in order: parameters together by `plan_large`, what is not floating and buffers raw, and vectors of at
    most 4096 coordinates, like anything of at most 128, in 4 bits each: of biases and norms nothing is left out."""
    large = [each for each in tensors if is_lossy_parameter(each[0]) and not _is_small(each[0])]
    plans = iter(plan_large(large))

    def plan(spec: TensorSpec, source: TileSource) -> TensorPlan:
        if not is_lossy_parameter(spec):
            return raw_plan(spec, source)
        if _is_small(spec):
            return uniform_plan(spec, source, bits=_SMALL_BITS, block=_SMALL_BLOCK)
        return next(plans)

    return [plan(spec, source) for spec, source in tensors]


def _is_small(spec: TensorSpec) -> bool:
    is_vector = max(spec.shape, default=1) == spec.num_elements
    return spec.num_elements <= (SMALL_COORDINATES if is_vector else _TINY_COORDINATES)


@dataclass(frozen=True, slots=True, eq=False)
class Largest:
    """The coordinates of one tensor that are among the largest of all: those whose magnitude, as the bits of a float32, is more
    than `least`, and those before `first_left_out` that have it exactly."""

    name: str
    least: int
    first_left_out: int
    counts: NDArray[np.int64]
    """How many there are in each run of 2^16 coordinates."""

    def places(self, first: int, tile: Tensor) -> Positions:
        """Where they are in the tile that begins at coordinate `first`, ascending."""
        found = [np.empty(0, np.int64)]
        for start, magnitudes in _magnitudes(self.name, tile):
            places = np.flatnonzero(magnitudes >= self.least)
            if first + start + len(magnitudes) > self.first_left_out:
                is_left_out = (magnitudes[places] == self.least) & (places >= self.first_left_out - first - start)
                places = places[~is_left_out]
            found.append(places + start)
        return np.concatenate(found)


def largest(tensors: Tensors, fraction: float) -> list[Largest]:
    """The largest values of all tensors together: `fraction` of all coordinates, rounded, at least one; fewer where the others are
    zero. Of equal ones the first.

    Exact, by two histograms, of the upper and the lower halves of the magnitudes' bits, whose order is that of the magnitudes. Each
    tensor is read three times. Memory: one MiB, and 8 bytes for each 2^16 coordinates. Raises InvalidError, naming the tensor,
    where a float64 value is beyond float32.
    """
    wanted = max(1, round(fraction * sum(spec.num_elements for spec, _ in tensors)))
    upper = np.zeros(_HALF, np.int64)
    for spec, source in tensors:
        for magnitudes in _all_magnitudes(spec, source):
            upper += np.bincount(magnitudes.view(np.uint16)[1::2], minlength=_HALF)
    high, wanted = _bin_of(upper, wanted)
    lower = np.zeros(_HALF, np.int64)
    for spec, source in tensors:
        for magnitudes in _all_magnitudes(spec, source):
            halves = magnitudes.view(np.uint16)
            lower += np.bincount(halves[::2][halves[1::2] == high], minlength=_HALF)
    low, wanted = _bin_of(lower, wanted)
    least = high << 16 | low
    if least == 0:
        # Zeros need not be sent.
        least, wanted = 1, 2**62
    chosen = []
    for spec, source in tensors:
        of_tensor, wanted = _choose(spec, source, least, wanted)
        chosen.append(of_tensor)
    return chosen


def _choose(spec: TensorSpec, source: TileSource, least: int, wanted: int) -> tuple[Largest, int]:
    """What is above `least`, and of what is equal to it as many as are wanted; and how many of these are still wanted then."""
    counts: list[int] = []
    first_left_out = spec.num_elements
    for index, magnitudes in enumerate(_all_magnitudes(spec, source)):
        count, num_equal = (int(np.count_nonzero(is_in)) for is_in in (magnitudes >= least, magnitudes == least))
        if num_equal > wanted:
            first_left_out = min(first_left_out, index * TILE + int(np.flatnonzero(magnitudes == least)[wanted]))
            count -= num_equal - wanted
        wanted -= min(num_equal, wanted)
        counts.append(count)
    return Largest(spec.name, least, first_left_out, np.array(counts, np.int64)), wanted


def _bin_of(histogram: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin that holds the one of that rank from above, and its rank in there; the lowest bin where there are fewer."""
    from_above = np.cumsum(histogram[::-1])
    rank = min(int(np.searchsorted(from_above, wanted)), len(histogram) - 1)
    return len(histogram) - 1 - rank, wanted - int(from_above[rank - 1] if rank else 0)


def _all_magnitudes(spec: TensorSpec, source: TileSource) -> Iterator[NDArray[np.int32]]:
    for first in range(0, spec.num_elements, TILE):
        for _, magnitudes in _magnitudes(spec.name, source(first, min(TILE, spec.num_elements - first))):
            yield magnitudes


def _magnitudes(name: str, tile: Tensor) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Absolute values as the bits of float32, 2^16 at a time, each with where they begin."""
    for start in range(0, len(tile), TILE):
        values = narrow(name, tile[start : start + TILE], torch.float32)
        yield start, values.numpy().view(np.int32) & np.int32(0x7FFFFFFF)
