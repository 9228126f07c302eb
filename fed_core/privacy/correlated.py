"""Noise that is correlated between rounds, for central privacy without sampling amplification: the matrix mechanism.

The prefix sums A X of the clipped updates' sums X (a row a round) are what a model is made of. With A = B C, the mechanism noises
C X by independent Gaussians Z and publishes B (C X + Z) = A (X + C^-1 Z): round t's released sum carries noise row t of C^-1 Z, and
prefix t the noise row t of B Z, less than if every round's noise were independent. With each entry of Z of standard deviation
noise multiplier * clipping norm * sensitivity(C), a whole run is one Gaussian mechanism with that noise multiplier (Denisov,
McMahan, Rush, Smith and Thakurta 2022, https://arxiv.org/abs/2202.08312, also where later updates depend on earlier releases).
The unit is the client, the relation add/remove one, and every client keeps to the participations declared for the sensitivity.

On a grid, where x_t, z_t (rounded Gaussians) and releases are whole numbers of steps, round t adds n_t = z_t + round(h_t) with
h_t = sum_{j > 0} r_j z_{t-j}. Whoever knows the releases before knows h_t for each data set, so the release is a rounded Gaussian
around the whole number x_t + round(h_t). Between neighbours with the same releases, these centres differ by
d_t = (X - X')_t - sum_{j > 0} r_j d_{t-j} + e_t, where rounding is all that e is made of: d = C (X - X' + e). Rounding to within
one step makes no entry of e larger than 2, so sensitivity grows by at most 2 |C| sqrt(num_rounds * num_elements) steps:
`rounding_sensitivity`. A tree's weights are whole numbers, and nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, Final, Protocol

from fed_core.errors import ConfigError
from fed_core.privacy.banded import BandedInverseRoot, BandedRoot, BufferedToeplitz
from fed_core.privacy.tree import BinaryTree


class Factorization(Protocol):
    """A = B C for `num_rounds` rounds, which count from 0. C is square and lower-triangular with ones on the diagonal."""

    @property
    def name(self) -> str:
        """What the table below calls its kind."""
        ...

    @property
    def num_rounds(self) -> int: ...

    @property
    def num_buffers(self) -> int:
        """Model-sized buffers to keep from round to round so that a round draws noise once."""
        ...

    @property
    def num_draws(self) -> int:
        """The most draws of a round where nothing is kept but seeds: the most terms of `noise_weights`."""
        ...

    def sensitivity(self, separation: int, participations: int) -> float:
        """Largest change of C X by one client with updates of norm at most 1, at most `participations` of them, any two at least
        `separation` rounds apart (1: any rounds); or an upper bound, where its docstring says so.

        Raises ConfigError where either is below 1. More participations than the rounds have room for are as many as they have."""
        ...

    def rounding_sensitivity(self, num_elements: int) -> float:
        """What must be added to sensitivity * clipping norm, in steps of the grid, where noise in whole steps is combined by
        weights that are not whole, and the sum of all terms but the newest is rounded to within one step; see the module."""
        ...

    def noise_weights(self, t: int) -> dict[int, float]:
        """Row t of C^-1: round t's released sum carries the sum of weight * z[seed] over the entries, seeds 0 ... t. Each z[seed]
        is an independent model-sized Gaussian; that of seed t, of weight 1, is new in round t. The same seed must give the same
        numbers in every round that names it, and no two seeds may share any."""
        ...

    def prefix_variance(self, t: int) -> float:
        """Variance of one element of the sum of all noise of rounds 0 ... t, in units of that of z: squared norm of row t of B."""
        ...

    def to_json(self) -> dict[str, object]:
        """What `from_json` makes an equal factorization of."""
        ...


def rms_error(factorization: Factorization, separation: int, participations: int) -> float:
    """Root mean square over all prefixes of the standard deviation of their noise, where the whole run is as private as a single
    release with noise of standard deviation 1: sensitivity * sqrt(mean prefix variance). Comparable between factorizations."""
    num_rounds = factorization.num_rounds
    mean = sum(factorization.prefix_variance(t) for t in range(num_rounds)) / num_rounds
    return factorization.sensitivity(separation, participations) * sqrt(mean)


def max_error(factorization: Factorization, separation: int, participations: int) -> float:
    """As `rms_error`, of the prefix with the most noise."""
    worst = max(factorization.prefix_variance(t) for t in range(factorization.num_rounds))
    return factorization.sensitivity(separation, participations) * sqrt(worst)


def _buffered(num_rounds: int, decays: list[float], scales: list[float]) -> BufferedToeplitz:
    return BufferedToeplitz(num_rounds, tuple(decays), tuple(scales))


FACTORIZATIONS: Final[Mapping[str, Callable[..., Factorization]]] = {
    BinaryTree.name: BinaryTree,
    BandedInverseRoot.name: BandedInverseRoot,
    BandedRoot.name: BandedRoot,
    BufferedToeplitz.name: _buffered,
}


def from_json(stored: Mapping[str, Any]) -> Factorization:
    """The factorization of which `to_json` said this. Raises ConfigError for an unknown name or other parameters."""
    parameters = dict(stored)
    name = parameters.pop("name", None)
    if name not in FACTORIZATIONS:
        raise ConfigError(f"there is no factorization {name!r}; expected one of {', '.join(FACTORIZATIONS)}")
    try:
        return FACTORIZATIONS[name](**parameters)
    except TypeError as error:
        raise ConfigError(f"factorization {name!r} with {parameters}: {error}; give what its to_json says") from error
