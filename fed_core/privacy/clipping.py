"""Updates of bounded norm on a grid, with no rounding error to forgive.

An update is all its tensors together, one vector, seen tile by tile: once for the norm, once for the steps. Its sensitivity is a
whole number that can be checked: for every update, whatever its values,

    sum of to_steps(tile, clip_factor(norm.value, bound), exponent)^2 <= max_squared_steps(bound, exponent)

over whole numbers, exactly. In floating point the same promise fails: norms are sums with errors, and a product may round upwards
(Casacuberta et al. 2022, https://arxiv.org/abs/2207.10635).

**Why it holds.** Let k be the steps. Where the update is clipped, the factor is smaller than it must be by CLIP_MARGIN, which is
more than all errors together. Where it is not, k is x / step rounded toward zero, so k^2 step^2 <= x^2. Rounded sums and products
of numbers that are not negative never fall when their terms grow, and those of k^2 step^2 are exact below 2^53 step^2; so the
rounded sum of x^2, which is at most bound^2 < 2^53 step^2, is at least the exact sum of k^2 step^2, in whatever order either was
added up.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fed_core.errors import InvalidError, NotFiniteError

STD_BITS: Final = 16
"""The noise's standard deviation lies from 2^16 to 2^17 steps: rounding adds less than 2^-35 of its variance."""
CLIP_MARGIN: Final = 2.0**-20
"""What a clipped norm stays below the bound, as a part of it. A sum over 2^34 coordinates in up to 2^22 tiles is exact within
2^-30."""
SMALLEST: Final = 1e-100
LARGEST: Final = 1e100
"""Bounds and standard deviations lie between the two: no square of them, nor of a step, leaves float64's normal numbers."""

_TILE: Final = 2**16


def step_exponent(sigma: float) -> int:
    """The exponent of the step 2^exponent for which sigma is from 2^16 (included) to 2^17 steps. Raises InvalidError for a `sigma`
    that is not between SMALLEST and LARGEST."""
    _check("sigma", sigma)
    return math.frexp(sigma)[1] - 1 - STD_BITS


class SquaredNorm:
    """The squared L2 norm of a vector, seen tile by tile: `value`, a float.

    It is infinite where a square or the sum is beyond float64: only values above 1e148 lead there, which float16, bfloat16 and
    float32 do not have. NaN where a value is NaN. Memory: a tile of 2^16 float64."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, tile: Tensor) -> None:
        """Adds the squares of a 1-D tensor, floating or complex. Raises InvalidError for any other dtype."""
        reals = _reals(tile)
        for start in range(0, len(reals), _TILE):
            wide = reals[start : start + _TILE].double()
            self.value += float(torch.dot(wide, wide))


def clip_factor(squared_norm: float, bound: float) -> float:
    """What to multiply an update with: 1.0 where its norm is within the bound, else below bound / norm by CLIP_MARGIN of it, or
    0.0 where the squared norm is infinite. So an update with values beyond any reason counts as zero instead of passing as NaN.

    Off the grid, an update that is let pass may have a norm above the bound by the error of the sum, at most 2^-31 of it; its
    steps never have. Raises NotFiniteError where the norm is NaN, InvalidError for a bound that is not between SMALLEST and
    LARGEST."""
    _check("the bound", bound)
    if math.isnan(squared_norm):
        raise NotFiniteError("the update holds NaN, so it has no norm to clip; refuse it")
    if math.isinf(squared_norm):
        return 0.0
    if Fraction(squared_norm) <= Fraction(bound) ** 2:
        return 1.0
    return bound / math.sqrt(squared_norm) * (1 - CLIP_MARGIN)


def to_steps(tile: Tensor, factor: float, exponent: int, out: Tensor) -> Tensor:
    """tile * factor in steps of 2^exponent, rounded toward zero: whole numbers, written into `out` and returned.

    `tile` is 1-D, floating or complex; `out` float64 on the CPU, of the same length, or twice it for complex values (real part
    first). No coordinate grows in magnitude, and where the factor is 1.0 it loses less than a step. A factor of 0.0 gives zeros,
    whatever the values. Raises InvalidError for any other dtype."""
    reals = _reals(tile)
    if factor == 0.0:
        return out.zero_()
    return toward_zero_(out.copy_(reals).mul_(factor * 2.0**-exponent))


def toward_zero_(values: Tensor) -> Tensor:
    """Rounds float64 on the CPU toward zero, in place: `Tensor.trunc_`, which takes eight times as long."""
    numbers = values.numpy()
    np.trunc(numbers, out=numbers)
    return values


def squared_steps(steps: Tensor) -> int:
    """The exact sum of squares of whole numbers, float64, 1-D. Raises InvalidError where those of 2^16 neighbours reach 2^53."""
    total = 0
    for start in range(0, len(steps), _TILE):
        part = steps[start : start + _TILE]
        # Terms are not negative: had any partial sum been rounded, this one would have reached 2**53.
        squares = float(torch.dot(part, part))
        if not squares < 2**53:
            raise InvalidError(
                "the steps' squares sum up to 2**53 or more, beyond what is exact; clip them to a bound first"
            )
        total += int(squares)
    return total


def max_squared_steps(bound: float, exponent: int) -> int:
    """The largest squared norm in steps of 2^exponent that is within the bound: floor((bound / step)^2), exact.

    Raises InvalidError where it reaches 2^53, beyond which sums of squares in float64 are not exact, and for a bound that is not
    between SMALLEST and LARGEST."""
    _check("the bound", bound)
    squared = math.floor((Fraction(bound) / Fraction(2) ** exponent) ** 2)
    if squared >= 2**53:
        raise InvalidError(
            f"the bound {bound!r} is {bound * 2.0**-exponent:.4g} steps of 2**{exponent}; expected less than 2**26.5: raise the "
            f"noise multiplier, 0.002 is enough"
        )
    return squared


def _check(name: str, value: float) -> None:
    if not SMALLEST <= value <= LARGEST:
        raise InvalidError(f"{name} is {value!r}; expected a number from {SMALLEST:g} to {LARGEST:g}")


def _reals(tile: Tensor) -> Tensor:
    """The tile itself, or the real and imaginary parts of complex values in turn."""
    if tile.is_complex():
        return torch.view_as_real(tile.resolve_conj()).reshape(-1)
    if not tile.is_floating_point():
        raise InvalidError(f"only floating and complex tensors are clipped; this one is {tile.dtype}")
    return tile
