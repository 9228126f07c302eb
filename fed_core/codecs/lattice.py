"""Versions of a model on a lattice of powers of two: what makes any difference between two of them short and exact.

A tensor that holds only multiples of 2^e, none beyond 2^24 of them, adds and subtracts in float32 without rounding. If every delta
of a run is a multiple of some power of two, so is every version, and so is the difference of any two: it can be coded without loss
as whole numbers, most of them zero. Lattices of powers of two lie within each other, so the step may change from version to
version."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.dither import dither, dither_key
from fed_core.codecs.fsq import FsqAnalysis, StepTooFineError
from fed_core.codecs.raw import raw_plan
from fed_core.specs import TensorSpec

# Types whose sums on a lattice are exact. Of float16 and bfloat16 the mantissas are too short to be of use.
LATTICE_DTYPES: Final = frozenset({"float32", "float64"})

# Multiples up to this many steps are exact in float32, with a bit to spare for sums.
MAX_STEPS: Final = 2**23

_SCAN_COORDINATES = 2**18


def lattice_exponent(spec: TensorSpec, source: TileSource) -> int | None:
    """The largest e such that every value is a multiple of 2^e, 0 where all are zero; None where whole steps cannot give every bit
    back: for a negative zero, or a float64 that is no float32. One pass, O(tile) memory."""
    lowest: int | None = None
    for first in range(0, spec.num_elements, _SCAN_COORDINATES):
        tile = source(first, min(_SCAN_COORDINATES, spec.num_elements - first))
        single = tile.float()
        if ((single == 0) & single.signbit()).any() or (
            tile.dtype != single.dtype and not single.to(tile.dtype).equal(tile)
        ):
            return None
        exponent = _exponent_of(single)
        if exponent is not None:
            lowest = exponent if lowest is None else min(lowest, exponent)
    return 0 if lowest is None else lowest


def _exponent_of(tile: Tensor) -> int | None:
    """That of a float32 tile; None where it is all zero."""
    bits = tile.numpy().view(np.int32)
    exponents = (bits >> 23) & 0xFF
    mantissas = np.where(exponents > 0, (bits & 0x7FFFFF) | 0x800000, bits & 0x7FFFFF)
    present = mantissas != 0
    if not present.any():
        return None
    lowest_bits = (mantissas & -mantissas)[present]
    trailing = np.frexp(lowest_bits.astype(np.float64))[1] - 1
    return int((np.maximum(exponents[present], 1) - 150 + trailing).min())


@dataclass(frozen=True)
class LatticeEncoding:
    """Floating tensors in whole steps of 2^exponent, by `fsq`'s entropy coder; whatever has no exponent, or too many steps, or is
    in `raw`, raw.

    Without a `seed`, values are rounded to the nearest step. With one, each coordinate has a threshold of its own between two
    steps, drawn from the seed and always the same: a change reaches the receiver at once in as many coordinates as it is parts of
    a step, and in the others later, where the sender carries along what was left out. To the nearest, all coordinates would wait
    until they have moved by half a step. An ordinary (not subtractive) dither that is drawn once: drawn anew for every version,
    coordinates at rest would flicker, at 1.25 bits each.
    """

    exponents: Mapping[str, int]
    raw: Collection[str] = ()
    seed: int | None = None
    kind: ClassVar[str] = "lattice"

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Plans for all tensors. Deterministic; this seed is not used."""
        return [
            _plan(spec, source, None if spec.name in self.raw else self.exponents.get(spec.name), self._key(spec))
            for spec, source in tensors
        ]

    def _key(self, spec: TensorSpec) -> int | None:
        return None if self.seed is None else dither_key(self.seed, spec.name)

    def rounded(self, spec: TensorSpec, source: TileSource) -> TileSource:
        """The nearest values on a tensor's lattice: what is sent of one that goes raw, so that every version lies on one."""
        exponent = self.exponents.get(spec.name)
        if exponent is None or spec.dtype not in LATTICE_DTYPES:
            return source

        def tile(first: int, count: int) -> Tensor:
            value = source(first, count)
            # No negative zeros: they are on no lattice.
            return ((value.double() * 2.0**-exponent).round() * 2.0**exponent + 0.0).to(value.dtype)

        return tile


@dataclass(frozen=True)
class LosslessEncoding:
    """Every value exactly: floating tensors as whole steps of the widest lattice that they lie on, all others, and those in `raw`,
    raw."""

    raw: Collection[str] = ()
    kind: ClassVar[str] = "lossless"

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Plans for all tensors; one more pass over their values."""
        plans = []
        for spec, source in tensors:
            exponent = None
            if spec.dtype in LATTICE_DTYPES and spec.num_elements > 0 and spec.name not in self.raw:
                exponent = lattice_exponent(spec, source)
            plans.append(_plan(spec, source, exponent))
        return plans


def _plan(spec: TensorSpec, source: TileSource, exponent: int | None, key: int | None = None) -> TensorPlan:
    if exponent is None or spec.dtype not in LATTICE_DTYPES or spec.num_elements == 0:
        return raw_plan(spec, source)

    def sent(first: int, tile: Tensor) -> Tensor:
        if key is None:
            return tile
        # Whole steps stay what they are: the dither is below one.
        steps = tile.to(torch.float64).mul(2.0**-exponent).add_(dither(key, first, len(tile))).floor_()
        return steps.mul_(2.0**exponent).to(tile.dtype)

    try:
        plan = FsqAnalysis(spec, lambda first, count: sent(first, source(first, count)), lattice=True).plan(
            2.0**exponent
        )
    except StepTooFineError:
        return raw_plan(spec, source)
    return replace(plan, encode=lambda first, tile: plan.encode(first, sent(first, tile)))
