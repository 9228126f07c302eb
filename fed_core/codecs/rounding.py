"""Rounding to what costs least in error and bits together, and what becomes of it.

Values are measured in steps: t = |x| / step becomes a whole magnitude m. The nearest has the least error, but a smaller one takes
fewer bits, so the boundary between m - 1 and m lies where both cost the same in error + LAMBDA * bits (entropy-constrained
quantization: Chou, Lookabaugh and Gray 1989, https://doi.org/10.1109/29.17498; their iteration, begun with good boundaries and
ended after two turns). The decoder does not know of it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_core.codecs.entropy import Ints
from fed_core.codecs.floating import TILE

Floats = NDArray[np.float64]

LAMBDA: Final = 0.14
"""What a bit is worth, in squared steps. At high rates -dD/dR is ln(2) / 6 = 0.116, at low ones more; measured on updates of real
models, any value from 0.1 to 0.2 leads to the same curve within a percent, at steps that differ."""
MAX_DEAD_ZONE: Final = 2.0
MIN_DEAD_ZONE: Final = 0.5
NUM_SIZES: Final = 12
"""Magnitudes from this one on have one boundary."""
SHIFT_PARTS: Final = 32
"""Reproductions lie below their magnitudes by so many parts of a step, or above."""


class Roundings(NamedTuple):
    """How each group is rounded: to zero up to its dead zone, else to the nearest m, and from there to m - 1 if it is more than
    `drops[m]` below m. `dead_zones` [num_groups], `drops` [num_groups, NUM_SIZES + 1]: all from NUM_SIZES on have the last."""

    dead_zones: Floats
    drops: Floats


# About where the boundaries come to lie.
FIRST: Final = Roundings(np.array([0.62]), np.full((1, NUM_SIZES + 1), 0.45))


def round_values(values: Tensor, step: float, roundings: Roundings | None, group: int) -> tuple[Tensor, Tensor]:
    """t and m of some values of a group, as floats; None rounds to the nearest, halves up."""
    # Neither the step nor its inverse may be near the ends of float32.
    t = (values if 2.0**-100 < step < 2.0**100 else values.double()).abs().mul_(1 / step)
    if roundings is None:
        return t, t.add(0.5).floor_()
    kept = torch.threshold(t, float(roundings.dead_zones[group]), 0.0)
    m = kept.add(0.5).floor_()
    drops = torch.from_numpy(roundings.drops[group]).to(t.dtype)
    above = torch.sub(m, kept).gt_(drops.index_select(0, m.clamp(max=NUM_SIZES).to(torch.int32)))
    return t, m.sub_(above)


def to_integers(values: Tensor, step: float, roundings: Roundings | None, group: int) -> Ints:
    """The values of a group as signed integers."""
    integers = np.empty(len(values), np.int32)
    for first in range(0, len(values), TILE):
        block = values[first : first + TILE]
        _, m = round_values(block, step, roundings, group)
        torch.from_numpy(integers[first : first + TILE]).copy_(m.copysign_(block))
    return integers


def round_sample(t: Floats, groups: NDArray[np.intp], roundings: Roundings | None) -> Floats:
    """m of values that each have a group of their own."""
    if roundings is None:
        return np.floor(t + 0.5)
    kept = np.where(t > roundings.dead_zones[groups], t, 0.0)
    m = np.floor(kept + 0.5)
    drops = roundings.drops[groups, np.minimum(m, NUM_SIZES).astype(np.int64)]
    return np.where(m - kept > drops, m - 1, m)


class Moments:
    """Sums over what is not rounded to zero, by group and magnitude.

    `counts` and the sums `t`, [num_groups, NUM_SIZES], are for m = 1, 2 .. and, in the last place, all from NUM_SIZES on; for these
    there are also the sums `m`, `tm` and `mm`, [num_groups], of m, t * m and m * m.
    """

    def __init__(self, num_groups: int) -> None:
        self.counts, self.t = np.zeros((num_groups, NUM_SIZES)), np.zeros((num_groups, NUM_SIZES))
        self.m, self.tm, self.mm = np.zeros(num_groups), np.zeros(num_groups), np.zeros(num_groups)

    def add(
        self, groups: int | NDArray[np.intp], t: NDArray[Any], m: NDArray[Any], weights: Floats | None = None
    ) -> None:
        """Values of one group, or each of its own."""
        g, t, m, w = _taken(np.flatnonzero(m), groups, t, m, weights)
        index = g * NUM_SIZES + np.minimum(m, NUM_SIZES).astype(np.int64) - 1
        _accumulate(self.counts, index, w)
        _accumulate(self.t, index, w * t)
        g, t, m, w = _taken(np.flatnonzero(m >= NUM_SIZES), g, t, m, w)
        if len(m):
            _accumulate(self.m, g, w * m)
            _accumulate(self.tm, g, w * t * m)
            _accumulate(self.mm, g, w * m * m)

    def shifts(self) -> NDArray[np.int64]:
        """[num_groups, 3]: how far below 1, 2 and all above the means of what is rounded to them lie, in parts of a step.

        All zero where that is not worth two bytes for each group.
        """
        counts, t, m = (_of_three(each) for each in (self.counts, self.t, self._m()))
        means = (m - t) / np.maximum(counts, 1e-9)
        if (counts * means**2).sum() < 16 * LAMBDA * counts.any(axis=1).sum():
            return np.zeros(means.shape, np.int64)
        return np.clip(np.rint(means * SHIFT_PARTS), -SHIFT_PARTS // 2, SHIFT_PARTS // 2 - 1).astype(np.int64)

    def products(self, shifts: NDArray[np.int64]) -> tuple[float, float]:
        """<x, x'> and |x'|^2 in squared steps, with these shifts."""
        delta = np.repeat(shifts, (1, 1, NUM_SIZES - 2), axis=1) / SHIFT_PARTS
        sizes = np.arange(1, NUM_SIZES + 1)
        tm, mm = self.t * sizes, self.counts * sizes**2
        tm[:, -1], mm[:, -1] = self.tm, self.mm
        cross = tm - delta * self.t
        square = mm - 2 * delta * self._m() + delta**2 * self.counts
        return float(cross.sum()), float(square.sum())

    def cheapest(self, totals: Floats) -> Roundings:
        """The roundings that cost least where bits are what these counts make them; `totals` count zeros, too."""
        counts = np.column_stack([totals - self.counts.sum(axis=1), self.counts])
        # A sign is one bit; what was never seen is rarer than once.
        bits = -np.log2((counts + 0.3) / (totals[:, None] + 1)) + (np.arange(NUM_SIZES + 1) > 0)
        sizes = np.arange(1, NUM_SIZES + 1)
        means = np.where(self.counts > 0, self.t / np.maximum(self.counts, 1e-9), sizes)
        # The last place has no mean of one magnitude.
        means[:, -1] = np.maximum(means[:, -2] + 1, 1)
        points = np.column_stack([np.zeros(len(totals)), means])
        gaps = np.maximum(np.diff(points, axis=1), 0.5)
        boundaries = points[:, :-1] + gaps / 2 + LAMBDA / 2 * np.diff(bits, axis=1) / gaps
        boundaries[:, -1] = boundaries[:, -2] + 1
        drops = np.column_stack([np.full(len(totals), 0.5), np.clip(sizes - boundaries, -0.5, 0.5)])
        drops[:, 1] = 0.5  # the dead zone decides
        return Roundings(np.clip(boundaries[:, 0], MIN_DEAD_ZONE, MAX_DEAD_ZONE), drops)

    def _m(self) -> Floats:
        m: Floats = self.counts * np.arange(1, NUM_SIZES + 1)
        m[:, -1] = self.m
        return m


def _of_three(sums: Floats) -> Floats:
    return np.column_stack([sums[:, :2], sums[:, 2:].sum(axis=1)])


def _taken(
    places: NDArray[np.intp],
    groups: int | NDArray[np.intp],
    t: NDArray[Any],
    m: NDArray[Any],
    weights: Floats | None,
) -> tuple[NDArray[np.intp], Floats, Floats, Floats]:
    g = np.full(len(places), groups) if isinstance(groups, int) else groups[places]
    w = np.ones(len(places)) if weights is None else weights[places]
    return g, t[places].astype(np.float64), m[places].astype(np.float64), w


def _accumulate(sums: Floats, index: NDArray[Any], terms: Floats) -> None:
    sums += np.bincount(index, terms, sums.size).reshape(sums.shape)
