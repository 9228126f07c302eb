"""Frequency tables that need not be sent: two families of distributions of integers about zero, each told by one byte.

The byte is 2 * scale + shape. The scale counts quarter octaves from 1/8 on; shape 0 is a Laplace distribution of that mean absolute
deviation cut into cells of length one, shape 1 a Gaussian of that standard deviation sampled at the integers. Tables are made by
integer arithmetic alone, so that both sides have the same on every machine.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fed_core.codecs.entropy import TABLE_BITS, TABLE_SUM, FrequencyTable

NUM_MODELS: Final = 2 * 57
"""Scales up to 2^11."""
MAX_REACH_BITS: Final = 12
MAX_REACH: Final = 2**MAX_REACH_BITS - 1
"""Largest absolute value of a symbol. Every symbol within reach has a frequency of at least 1, which this keeps a small share."""

_FIXED = 96  # bits after the point
# exp(-1/(2b)) and exp(-1/(2s^2)) for b, s = 2^(j/4 - 3), j = 0 .. 3. One octave up is one square root, or two.
_LAPLACE_ROOTS = (
    0x4B0556E084F3D1DFA2BC04D,
    0x8DC4319C9CD7C0988B0D3BB,
    0xF218DE07D4091663AB1A0EB,
    0x17BB0545F6B0FAE96A643D5A,
)
_GAUSSIAN_ROOTS = (0x3908C9EEC2C8D, 0xA3C56C36015A9316, 0x1E355BBAEE85CADA65F, 0xCCC1C9BC5D172406BBB8)


@cache  # 1,368 tables at the most, 15 MB
def parametric_table(model: int, reach_bits: int) -> FrequencyTable:
    """The table of the symbols -reach .. reach, reach = 2^reach_bits - 1, under a model of 0 .. NUM_MODELS - 1.

    Raises ValueError for a model or a reach (1 .. MAX_REACH_BITS) that there is not.
    """
    if not 0 <= model < NUM_MODELS or not 1 <= reach_bits <= MAX_REACH_BITS:
        raise ValueError(
            f"no model {model} of reach 2^{reach_bits}; expected 0 to {NUM_MODELS - 1}, 1 to {MAX_REACH_BITS}"
        )
    reach = 2**reach_bits - 1
    scale, shape = divmod(model, 2)
    weights = _gaussian_weights(scale, reach) if shape else _laplace_weights(scale, reach)
    total = weights[0] + 2 * sum(weights[1:])
    spare = TABLE_SUM - (2 * reach + 1)
    half = np.ones(reach, np.int32)
    half[: len(weights) - 1] += np.array([weight * spare // total for weight in weights[1:]], np.int32)
    centre = TABLE_SUM - 2 * int(half.sum())
    return FrequencyTable(-reach, np.concatenate([half[::-1], np.array([centre], np.int32), half]))


@cache
def code_lengths(reach_bits: int) -> NDArray[np.float64]:
    """(NUM_MODELS, reach + 1): bits of a symbol of each absolute value under each model. Up to 4 MB, kept."""
    reach = 2**reach_bits - 1
    tables = [parametric_table(model, reach_bits).frequencies[reach:] for model in range(NUM_MODELS)]
    lengths: NDArray[np.float64] = TABLE_BITS - np.log2(np.stack(tables))
    return lengths


def _laplace_weights(scale: int, reach: int) -> list[int]:
    """With t = exp(-1/(2b)): 1 - t for zero, t^(2k-1) (1 - t^2) / 2 for k; only those that are not lost below the fixed point."""
    t = _root(_LAPLACE_ROOTS[scale % 4], scale // 4)
    ratio = t * t >> _FIXED
    weights = [(1 << _FIXED) - t, t * ((1 << _FIXED) - ratio) >> _FIXED + 1]
    return _extend(weights, reach, ratio, 1 << _FIXED)


def _gaussian_weights(scale: int, reach: int) -> list[int]:
    """With q = exp(-1/(2s^2)): q^(k^2), each from the one before by the factor q^(2k-1)."""
    q = _root(_GAUSSIAN_ROOTS[scale % 4], 2 * (scale // 4))
    square = q * q >> _FIXED
    return _extend([1 << _FIXED, q], reach, q * square >> _FIXED, square)


def _extend(weights: list[int], reach: int, ratio: int, change: int) -> list[int]:
    """Goes on to `reach`: every weight is the one before times a ratio, which itself is multiplied by `change` each time."""
    while len(weights) <= reach and weights[-1]:
        weights.append(weights[-1] * ratio >> _FIXED)
        ratio = ratio * change >> _FIXED
    return weights


def _root(value: int, times: int) -> int:
    for _ in range(times):
        value = math.isqrt(value << _FIXED)
    return value
