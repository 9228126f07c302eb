"""How much one client can move the noised sums C X of the matrix mechanism, when it may take part more than once.

X holds one clipped update a row, a round each. Neighbouring inputs differ in what one client sent (add/remove one): a vector of
norm at most 1 in each of at most `participations` rounds, any two of which lie at least `separation` rounds apart (|s - t| >=
separation; with 1 any rounds do). The sensitivity is the largest Frobenius norm of sum_i C[:, i] u_i over all such rounds i and
vectors |u_i| <= 1. Its square is at most sum_ij |G_ij| over the rounds' Gram matrix G = C^T C; where no entry of G is negative,
equal u_i reach it, so that the rounds alone are left to search. Fewer participations than allowed never help then.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fed_core.errors import ConfigError

Floats = NDArray[np.float64]


def most_participations(num_rounds: int, separation: int, participations: int) -> int:
    """How often one client can take part: `participations`, or less where the rounds have no room for so many.

    Raises ConfigError where one of the three is below 1."""
    for name, value in (("num_rounds", num_rounds), ("separation", separation), ("participations", participations)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected a whole number of at least 1")
    return min(participations, -(-num_rounds // separation))


def toeplitz_sensitivity(column: Floats, separation: int, participations: int) -> float:
    """Sensitivity of the lower-triangular Toeplitz matrix C with this first column (T,), in O(T).

    Exact where the column has no negative entry and never rises: the entry of the Gram matrix for rounds i <= j is
    sum_{m < T - j} c_m c_{m + j - i}, which falls as j or the distance grows, and rounds 0, b, 2b, ... have the smallest of both at
    once (Kalinin and Lampert 2024, https://arxiv.org/abs/2405.13763). Where C has at most b bands, its columns b apart do not
    meet, and this is sqrt(k) times the column's norm, but for columns that the last round cuts off.

    Any other column is replaced by the least one above its absolute values that never rises. No entry of the Gram matrix becomes
    smaller than its absolute value was, so the result is an upper bound."""
    num_rounds = len(column)
    k = most_participations(num_rounds, separation, participations)
    falling = np.maximum.accumulate(np.abs(column)[::-1])[::-1]
    padded = np.zeros(-(-num_rounds // separation) * separation)
    padded[:num_rounds] = falling
    # Row n holds entries n b ... n b + b - 1; the columns shifted by 0, b, ..., (k-1) b add up to sums of k successive rows.
    sums = padded.reshape(-1, separation).cumsum(axis=0)
    sums[k:] -= sums[:-k].copy()
    return sqrt(float(np.square(sums.reshape(-1)[:num_rounds]).sum()))
