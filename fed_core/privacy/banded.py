"""Toeplitz factorizations A = B C of the prefix sums: near the square root of A, with few terms or buffers.

A is the lower-triangular matrix of ones, 1 / (1 - x) as a power series. Its root C = A^(1/2), with coefficients c_0 = 1,
c_k = c_{k-1} (2k - 1) / 2k, is near the best factorization where each client takes part once (Fichtenberger, Henzinger and
Upadhyay 2023, https://arxiv.org/abs/2202.11205). C^-1 has the coefficients r_0 = 1, r_k = r_{k-1} (2k - 3) / 2k. To apply it
exactly, every round before must be kept or drawn again. Three ways to make do with few, where z_t is fresh noise and n_t the noise
of round t's released sum:

    BandedInverseRoot   n_t = sum_{j < p} r_j z_{t-j}            r cut off: p draws a round and nothing stored, or p - 1 buffers
    BandedRoot          n_t = z_t - sum_{0 < j < p} c_j n_{t-j}  c cut off: needs what came out, so p - 1 buffers
    BufferedToeplitz    n_t = z_t - sum_i w_i S_i                one buffer S_i <- decay_i S_i + n_t for each i

With one band, either of the first two is independent noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from math import sqrt
from typing import ClassVar, Final, Literal

import numpy as np

from fed_core.errors import ConfigError
from fed_core.privacy.sensitivity import Floats, most_participations, toeplitz_sensitivity

MAX_BUFFERS: Final = 8


def root_coefficients(num: int) -> Floats:
    """The first coefficients of (1 - x)^(-1/2), the column of A^(1/2)."""
    k = np.arange(1, num)
    return np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])


def inverse_root_coefficients(num: int) -> Floats:
    """The first coefficients of (1 - x)^(1/2), the column of A^(-1/2)."""
    k = np.arange(1, num)
    return np.concatenate([[1.0], np.cumprod((2 * k - 3) / (2 * k))])


def inverse_series(coefficients: Floats, num: int) -> Floats:
    """The first coefficients of 1 / f for a power series f with f_0 = 1, whose coefficients beyond the given ones are 0."""
    bands = len(coefficients)
    backwards = coefficients[:0:-1]
    inverse = np.zeros(num)
    inverse[0] = 1.0
    for n in range(1, num):
        terms = min(n, bands - 1)
        inverse[n] = -(backwards[bands - 1 - terms :] @ inverse[n - terms : n])
    return inverse


class _Toeplitz(ABC):
    """What all of them share, given the first columns (num_rounds,) of C and of C^-1; see `Factorization`."""

    num_rounds: int
    name: ClassVar[str]

    @property
    @abstractmethod
    def column(self) -> Floats: ...

    @property
    @abstractmethod
    def inverse(self) -> Floats: ...

    @property
    @abstractmethod
    def num_buffers(self) -> int: ...

    def sensitivity(self, separation: int, participations: int) -> float:
        """By `toeplitz_sensitivity`. Exact: no column here has a negative entry, and none rises."""
        return toeplitz_sensitivity(self.column, separation, participations)

    def rounding_sensitivity(self, num_elements: int) -> float:
        """By |C| <= sum_n c_n. Nothing where a round has one term only. Where rounded n_t are fed back rather than z_t, d is
        C (X - X') + e, which is less."""
        return 2 * float(self.column.sum()) * sqrt(self.num_rounds * num_elements) if self.num_buffers else 0.0

    def noise_weights(self, t: int) -> dict[int, float]:
        """The terms of row t that are not 0, the newest first."""
        return {t - j: float(self.inverse[j]) for j in range(t + 1) if self.inverse[j] != 0}

    def prefix_variance(self, t: int) -> float:
        """Squared norm of row t of B, whose first column is the running sum of C^-1's. It never falls with t."""
        return float(self._prefix_variances[t])

    @cached_property
    def _prefix_variances(self) -> Floats:
        variances: Floats = np.cumsum(np.square(np.cumsum(self.inverse)))
        return variances

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, **self._parameters()}

    @abstractmethod
    def _parameters(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class _Banded(_Toeplitz):
    num_rounds: int
    bands: int

    def __post_init__(self) -> None:
        if not 1 <= self.bands <= self.num_rounds:
            raise ConfigError(f"bands is {self.bands}; expected 1 ... num_rounds, here {self.num_rounds}")

    @property
    def num_buffers(self) -> int:
        """The terms before the newest."""
        return self.bands - 1

    def _parameters(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class BandedInverseRoot(_Banded):
    """C^-1 is the inverse root cut off after `bands` coefficients, C its dense inverse.

    Kalinin, McKenna, Upadhyay and Lampert 2025, "Back to Square Roots" (BISR, https://arxiv.org/abs/2505.12128), without their
    weights for momentum and weight decay, which stay outside as post-processing. C's column is the root's up to band p, and
    c_n = sum_{0 < j < p} |r_j| c_{n-j} from there on: positive, and by induction c_{n+1} - c_n is a sum of such differences, so it
    never rises."""

    name: ClassVar[str] = "banded-inverse-root"

    @property
    def num_draws(self) -> int:
        """One for each band."""
        return self.bands

    @cached_property
    def column(self) -> Floats:
        return inverse_series(self.inverse[: self.bands], self.num_rounds)

    @cached_property
    def inverse(self) -> Floats:
        return _cut(inverse_root_coefficients(self.num_rounds), self.bands)


@dataclass(frozen=True)
class BandedRoot(_Banded):
    """C is the root cut off after `bands` coefficients: n_t = z_t - sum_{0 < j < bands} c_j n_{t-j}.

    Kalinin and Lampert 2024 (BSR, https://arxiv.org/abs/2405.13763), without their momentum and weight decay; a closed form where
    BandMF (Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153) optimizes each entry. From seeds alone a round needs every
    draw before it."""

    name: ClassVar[str] = "banded-root"

    @property
    def num_draws(self) -> int:
        """One for each round, unless there is but one band."""
        return self.num_rounds if self.bands > 1 else 1

    @cached_property
    def column(self) -> Floats:
        return _cut(root_coefficients(self.num_rounds), self.bands)

    @cached_property
    def inverse(self) -> Floats:
        return inverse_series(self.column[: self.bands], self.num_rounds)


def _cut(coefficients: Floats, bands: int) -> Floats:
    coefficients[bands:] = 0.0
    return coefficients


@dataclass(frozen=True)
class BufferedToeplitz(_Toeplitz):
    """C's column is c_0 = 1, c_n = sum_i scales_i decays_i^(n-1): n_t = z_t - sum_i scales_i S_i, then S_i <- decays_i S_i + n_t.

    BLT: Dvijotham, McMahan, Pillutla, Steinke and Thakurta 2024 (https://arxiv.org/abs/2404.16706), for several participations
    McMahan, Xu and Zhang 2024 (https://arxiv.org/abs/2408.08868). Find the parameters with `optimize_buffered`. From seeds alone a
    round needs every draw before it.

    Raises ConfigError unless there are 1 ... MAX_BUFFERS decays in [0, 1) and as many positive scales that sum to at most 1: then
    the column never rises, and its sensitivity is exact."""

    num_rounds: int
    decays: tuple[float, ...]
    scales: tuple[float, ...]
    name: ClassVar[str] = "buffered"

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"num_rounds is {self.num_rounds}; expected a whole number of at least 1")
        if not 1 <= len(self.decays) == len(self.scales) <= MAX_BUFFERS:
            raise ConfigError(
                f"{len(self.decays)} decays and {len(self.scales)} scales; expected as many of both, 1 ... {MAX_BUFFERS}"
            )
        if not all(0 <= decay < 1 for decay in self.decays):
            raise ConfigError(f"decays are {self.decays}; expected numbers from 0 to below 1: take optimize_buffered's")
        if not (all(scale > 0 for scale in self.scales) and sum(self.scales) <= 1):
            raise ConfigError(f"scales are {self.scales}; expected positive numbers that sum to at most 1")

    @property
    def num_buffers(self) -> int:
        """One for each decay."""
        return len(self.decays)

    @property
    def num_draws(self) -> int:
        """One for each round."""
        return self.num_rounds

    @cached_property
    def column(self) -> Floats:
        return _buffered_column(self.num_rounds, np.array(self.decays), np.array(self.scales))

    @cached_property
    def inverse(self) -> Floats:
        return inverse_series(self.column, self.num_rounds)

    def _parameters(self) -> dict[str, object]:
        return {"num_rounds": self.num_rounds, "decays": list(self.decays), "scales": list(self.scales)}


def optimize_buffered(
    num_rounds: int,
    separation: int,
    participations: int,
    max_buffers: int = 4,
    objective: Literal["rms", "max"] = "rms",
) -> BufferedToeplitz:
    """The BufferedToeplitz with the least prefix error times sensitivity that a local search finds, with the fewest buffers.

    Tries 1 ... `max_buffers` buffers, and takes more only where that lowers the error by a hundredth. `objective` is the root mean
    square over all prefixes, or the largest, which is the last. Same arguments, same result on one machine and set of libraries;
    elsewhere the last digits may differ, so keep `to_json`, not the arguments. Privacy does not rest on the search: `sensitivity`
    is computed from what it found. Takes 2 s for 4 buffers and 2,048 rounds, 8 s for 8. Needs scipy; it comes with dp-accounting.

    Raises ConfigError for max_buffers outside 1 ... MAX_BUFFERS, and for rounds, separation or participations below 1.

    McMahan, Xu and Zhang search over the poles of C and C^-1 with penalties that keep the scales positive, for the largest error.
    We search over logits of the decays and a softmax of the scales, so that every point is a valid C with exact sensitivity, by
    L-BFGS with finite differences, from decays that are a geometric grid of 1 - decay between 1 / num_rounds and 1 / 2."""
    if not 1 <= max_buffers <= MAX_BUFFERS:
        raise ConfigError(f"max_buffers is {max_buffers}; expected 1 ... {MAX_BUFFERS}")
    most_participations(num_rounds, separation, participations)
    from scipy.optimize import minimize

    def log_error(logits: Floats) -> float:
        decays, scales = _decays_and_scales(logits)
        variances = np.cumsum(np.square(np.cumsum(_buffered_inverse(num_rounds, decays, scales))))
        sensitivity = toeplitz_sensitivity(_buffered_column(num_rounds, decays, scales), separation, participations)
        variance = variances.mean() if objective == "rms" else variances[-1]
        return float(np.log(sensitivity) + np.log(variance) / 2)

    best_error, best = np.inf, np.empty(0)
    for num_buffers in range(1, max_buffers + 1):
        # The root's column is an integral over all decays u with weight sqrt((1 - u) / u) / pi, in the grid's spacing.
        gaps = np.geomspace(1 / max(2, num_rounds), 1 / 2, num_buffers) if num_buffers > 1 else np.array([0.1])
        start = np.concatenate([np.log((1 - gaps) / gaps), np.log(np.sqrt(gaps) / np.sqrt(gaps).sum())])
        # Beyond these bounds a decay or the rest of the scales would round to 0 or 1.
        bounds = [(-30.0, 30.0)] * len(start)
        found = minimize(log_error, start, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "maxiter": 1000})
        if found.fun < best_error - 0.01:
            best_error, best = found.fun, found.x
    decays, scales = _decays_and_scales(best)
    return BufferedToeplitz(num_rounds, tuple(decays.tolist()), tuple(scales.tolist()))


def _decays_and_scales(logits: Floats) -> tuple[Floats, Floats]:
    """Decays in (0, 1), and positive scales whose sum is below 1: a softmax with one entry more, whose logit is 0."""
    decay_logits, scale_logits = np.split(logits, 2)
    scales = np.exp(np.append(scale_logits, 0.0) - max(0.0, scale_logits.max()))
    return 1 / (1 + np.exp(-decay_logits)), scales[:-1] / scales.sum()


def _buffered_column(num_rounds: int, decays: Floats, scales: Floats) -> Floats:
    powers = decays[:, None] ** np.arange(num_rounds - 1)
    return np.concatenate([[1.0], scales @ powers])


def _buffered_inverse(num_rounds: int, decays: Floats, scales: Floats) -> Floats:
    """C^-1's column in O(T) where `inverse_series` takes O(T^2): r_n = -s^T M^(n-1) s in the eigenbasis of M, where
    s = sqrt(scales) and M = diag(decays) - s s^T."""
    roots = np.sqrt(scales)
    eigenvalues, vectors = np.linalg.eigh(np.diag(decays) - np.outer(roots, roots))
    powers = eigenvalues[:, None] ** np.arange(num_rounds - 1)
    return np.concatenate([[1.0], -np.square(vectors.T @ roots) @ powers])
