"""What a differentially private mechanism declares, in the terms an accountant needs and a reader of the guarantee can check.

A mechanism adds Gaussian noise of standard deviation sigma to a sum. It declares the unit that is protected, what neighbouring data
sets are, how far the sum moves between neighbours (its L2 sensitivity) and who contributes to it (its sampling). An accountant is
given sigma / sensitivity and never sigma / clipping norm, which is twice as much where one client may be replaced by another:

    constructor         unit      neighbours differ by        sensitivity  sampling
    central_poisson     client    adding or removing one      C            an independent coin for each client
    central_adaptive    client    adding or removing one      C            the same, clipped bits in the same event
    central_fixed       client    replacing one               2 C          m of N, without replacement
    correlated          client    adding or removing one      C x s_C      none: one event pays for all rounds
    local               client    replacing one               2 C          none
    example_poisson     example   adding or removing one      C            an independent coin for each example

C is the clipping norm, a bound of the L2 norm of one unit's contribution; s_C is the sensitivity of a factorization for norm 1.
What no accountant covers is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from fed_core.errors import ConfigError

Unit = Literal["client", "example"]
Relation = Literal["add_remove", "replace_one"]

DISTANCE_PER_NUMBER: Final = 2.0**-77
"""Total variation distance of one drawn number from the Gaussian rounded to the grid, at most (noise.py, which needs torch)."""

# By how many clipping norms a sum moves between neighbours.
CLIPPING_NORMS: Final[Mapping[Relation, int]] = {"add_remove": 1, "replace_one": 2}


@dataclass(frozen=True)
class Everyone:
    """Whoever is asked contributes; nothing is hidden by chance."""


@dataclass(frozen=True)
class Poisson:
    """Each unit is in by an independent secret coin that shows heads with probability `rate`, 0 < rate <= 1.

    Raises ConfigError for another rate."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(
                f"a sampling rate of {self.rate:g} is no probability to sample with: give one above 0, at most 1"
            )


@dataclass(frozen=True)
class FixedSize:
    """Exactly `size` of `population` units are in, each set of that size equally likely and secret.

    Raises ConfigError unless 1 <= size <= population."""

    size: int
    population: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.population:
            raise ConfigError(
                f"a cohort of {self.size} cannot be drawn from {self.population} without replacement: give a size from 1 to "
                f"{self.population}"
            )


Sampling = Everyone | Poisson | FixedSize


@dataclass(frozen=True)
class Correlation:
    """Noise that is correlated over the rounds of a run (a tree, a matrix factorization), so that one event pays for all of them.

    Attributes:
        kind: name of the factorization, as people know it.
        num_rounds: rounds that the event pays for.
        max_participations: most rounds to which one client contributes; enforced by whoever draws cohorts.
        min_separation: least distance between two rounds to which a client contributes, 1 where any two may follow each other.

    Raises ConfigError for a count below 1."""

    kind: str
    num_rounds: int
    max_participations: int
    min_separation: int

    def __post_init__(self) -> None:
        if min(self.num_rounds, self.max_participations, self.min_separation) < 1:
            raise ConfigError("correlated noise needs num_rounds, max_participations and min_separation of at least 1")


@dataclass(frozen=True)
class Mechanism:
    """One release of a sum with Gaussian noise, or one run of them where the noise is correlated.

    Attributes:
        unit: what is protected: all that one client contributes, or one training example of one site.
        relation: what neighbouring data sets differ by.
        sensitivity: L2 distance of the sums of neighbours, at most; in the units of the sum, over all rounds where the noise
            is correlated.
        sigma: standard deviation of the noise, in the same units; 0 is no privacy and is accounted as infinite epsilon. With
            `bit_sigma` that of one Gaussian worth as much as both releases together, see `update_sigma`.
        sampling: who contributes.
        correlation: where one event pays for many rounds.
        bit_sigma: standard deviation of the noise on the number of clients whose updates were clipped, where that steers the
            clipping norm (each bit centred, so that it counts 1/2 at most); None where the clipping norm is fixed.

    Raises ConfigError for what is out of range and for combinations that no accountant covers; the message names the cure."""

    unit: Unit
    relation: Relation
    sensitivity: float
    sigma: float
    sampling: Sampling
    correlation: Correlation | None = None
    bit_sigma: float | None = None

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ConfigError(f"unit {self.unit!r} is not known: give one of {', '.join(get_args(Unit))}")
        if self.relation not in get_args(Relation):
            raise ConfigError(f"relation {self.relation!r} is not known: give one of {', '.join(get_args(Relation))}")
        if not (self.sensitivity > 0 and math.isfinite(self.sensitivity)):
            raise ConfigError(
                f"a sensitivity of {self.sensitivity:g} bounds nothing: clip to a finite norm above 0 and declare that"
            )
        if not (self.sigma >= 0 and math.isfinite(self.sigma)):
            raise ConfigError(
                f"noise of standard deviation {self.sigma:g} cannot be drawn: give a finite one, 0 or above"
            )
        if isinstance(self.sampling, Poisson) and self.relation == "replace_one":
            raise ConfigError(
                "independent coins are accounted for adding or removing one, not for replacing one: declare relation add_remove "
                "with the clipping norm as sensitivity, or draw cohorts of a fixed size"
            )
        if isinstance(self.sampling, FixedSize) and self.relation == "add_remove":
            raise ConfigError(
                "a cohort of a fixed size shows how many there are to draw from, so it is accounted for replacing one: declare "
                "relation replace_one with twice the clipping norm as sensitivity, or draw by independent coins"
            )
        if self.correlation is not None and not isinstance(self.sampling, Everyone):
            raise ConfigError(
                "correlated noise is not amplified by sampling here: declare that everyone contributes, or use independent noise"
            )
        if self.bit_sigma is not None:
            if self.correlation is not None or self.relation != "add_remove":
                raise ConfigError(
                    "an adaptive clipping norm is accounted with independent noise and adding or removing one client: use a fixed "
                    "clipping norm here"
                )
            split_noise(self.noise_multiplier, self.bit_sigma)

    @property
    def noise_multiplier(self) -> float:
        """sigma / sensitivity: all that an accountant is told of the noise."""
        return self.sigma / self.sensitivity

    @property
    def update_sigma(self) -> float:
        """Standard deviation of the noise that goes on the sum of updates: `sigma`, and more where bits are released beside it."""
        if self.bit_sigma is None:
            return self.sigma
        return self.sensitivity * split_noise(self.noise_multiplier, self.bit_sigma)

    def without_sampling(self) -> Mechanism:
        """The same as somebody sees it who knows who contributed: nothing is amplified."""
        return Mechanism(
            self.unit, self.relation, self.sensitivity, self.sigma, Everyone(), self.correlation, self.bit_sigma
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads; what is absent is left out."""
        fields: dict[str, Any] = {
            "unit": self.unit,
            "relation": self.relation,
            "sensitivity": self.sensitivity,
            "sigma": self.sigma,
        }
        match self.sampling:
            case Everyone():
                fields["sampling"] = {"kind": "everyone"}
            case Poisson(rate):
                fields["sampling"] = {"kind": "poisson", "rate": rate}
            case FixedSize(size, population):
                fields["sampling"] = {"kind": "fixed_size", "size": size, "population": population}
        if self.correlation is not None:
            fields["correlation"] = dict(vars(self.correlation))
        if self.bit_sigma is not None:
            fields["bit_sigma"] = self.bit_sigma
        return fields

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Mechanism:
        """What `to_json` wrote. Raises ConfigError for anything else: a guarantee is not read from half a record."""
        rest = dict(fields)
        try:
            sampling, correlation = dict(rest.pop("sampling")), rest.pop("correlation", None)
            return Mechanism(
                **rest,
                sampling=_SAMPLINGS[sampling.pop("kind")](**sampling),
                correlation=None if correlation is None else Correlation(**correlation),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{dict(fields)} is no mechanism as Mechanism.to_json writes it ({error}): restore the record from a backup"
            ) from error

    def sentence(self) -> str:
        """What is protected and how, in words for the person who answers for it and for a reviewer."""
        who = _UNITS[self.unit]
        noise = (
            f"Gaussian noise of standard deviation {self.sigma:.6g} on a sum of L2 sensitivity {self.sensitivity:.6g}"
        )
        if self.correlation is not None:
            c = self.correlation
            noise += (
                f" over all rounds ({c.kind}, {c.num_rounds:,} rounds, a client contributes to at most {c.max_participations:,} of "
                f"them, {c.min_separation:,} or more apart)"
            )
        if self.bit_sigma is not None:
            noise += (
                f" (both releases of a round together: {self.update_sigma:.6g} on the sum of updates, {self.bit_sigma:.6g} on the "
                "number of clipped updates)"
            )
        return (
            f"Protected is {who}: neighbouring data sets differ by {_RELATIONS[self.relation]} of them. {noise}: noise multiplier "
            f"{self.noise_multiplier:.6g}. {self._sampling_sentence()}"
        )

    def assumptions(self) -> tuple[str, ...]:
        """What the guarantee takes for granted, a sentence each."""
        found = [
            "Noise and coins come from the operating system's randomness and stay secret.",
            "Every contribution is clipped to the declared norm by whoever adds the noise.",
        ]
        if self.unit == "example":
            found.append(
                "It protects single examples: whether the site takes part, and what all its examples share, is not hidden."
            )
        match self.sampling:
            case Poisson():
                found.append("Who contributed is not shown to those for whom sampling is counted.")
                found.append(
                    f"Each {self.unit} has a coin of its own, and the sum is divided by a constant, so no count is shown."
                )
            case FixedSize():
                found.append("Who contributed is not shown to those for whom sampling is counted.")
                found.append("The number of clients to draw from is public.")
            case Everyone():
                found.append(f"That a {self.unit} contributed to a round is not hidden, what it contributed is.")
        if self.correlation is not None:
            found.append("Most participations and least separation are enforced over the whole run.")
        return tuple(found)

    def _sampling_sentence(self) -> str:
        who = "client" if self.unit == "client" else "example"
        match self.sampling:
            case Poisson(rate):
                return f"Each {who} contributes by an independent coin at {rate:.6g} (Poisson sampling)."
            case FixedSize(size, population):
                return f"{size:,} of {population:,} {who}s contribute, drawn without replacement."
            case Everyone():
                return "No amplification by sampling is counted."


_UNITS: Final = {
    "client": "one client, with all that it contributes",
    "example": "one training example of one site",
}
_RELATIONS: Final = {"add_remove": "adding or removing one", "replace_one": "replacing one"}
_SAMPLINGS: Final[Mapping[str, type[Everyone] | type[Poisson] | type[FixedSize]]] = {
    "everyone": Everyone,
    "poisson": Poisson,
    "fixed_size": FixedSize,
}


# The declared mechanisms. `noise_multiplier` is what run configs call so: standard deviation over clipping norm (in `correlated`,
# over the run's sensitivity).


def central_poisson(clipping_norm: float, noise_multiplier: float, rate: float) -> Mechanism:
    """A round of central differential privacy at client level, each client in by an independent coin."""
    return Mechanism("client", "add_remove", clipping_norm, noise_multiplier * clipping_norm, Poisson(rate))


def central_adaptive(clipping_norm: float, noise_multiplier: float, bit_sigma: float, rate: float) -> Mechanism:
    """`central_poisson` with a clipping norm that follows a quantile of the updates' norms; both releases are one event."""
    sigma = noise_multiplier * clipping_norm
    return Mechanism("client", "add_remove", clipping_norm, sigma, Poisson(rate), bit_sigma=bit_sigma)


def central_fixed(clipping_norm: float, noise_multiplier: float, size: int, population: int) -> Mechanism:
    """A round of central differential privacy at client level with a cohort of a fixed size."""
    sigma = noise_multiplier * clipping_norm
    return Mechanism("client", "replace_one", 2 * clipping_norm, sigma, FixedSize(size, population))


def correlated(
    clipping_norm: float, noise_multiplier: float, factor_sensitivity: float, correlation: Correlation
) -> Mechanism:
    """A whole run whose rounds' noises are linear combinations of independent Gaussians Z, accounted as one Gaussian mechanism.

    With A = B C the factorization of prefix sums, what is released is B (C X + Z). `factor_sensitivity` is how far C X moves at
    most by one client with updates of norm 1, over every pattern of participations that `correlation` allows. `noise_multiplier` is
    that of the whole run: Z has standard deviation noise_multiplier * clipping_norm * factor_sensitivity."""
    sensitivity = factor_sensitivity * clipping_norm
    return Mechanism("client", "add_remove", sensitivity, noise_multiplier * sensitivity, Everyone(), correlation)


def local(clipping_norm: float, noise_multiplier: float) -> Mechanism:
    """One update that a client clips and noises itself; nothing is amplified against whoever receives it."""
    return Mechanism("client", "replace_one", 2 * clipping_norm, noise_multiplier * clipping_norm, Everyone())


def example_poisson(clipping_norm: float, noise_multiplier: float, rate: float) -> Mechanism:
    """One step of DP-SGD at a site: each example in the batch by an independent coin, its gradient clipped."""
    return Mechanism("example", "add_remove", clipping_norm, noise_multiplier * clipping_norm, Poisson(rate))


# Adaptive clipping


def split_noise(noise_multiplier: float, bit_sigma: float) -> float:
    """Noise multiplier of the updates such that they and the clipped bits together are worth `noise_multiplier`.

    z_delta = (z^-2 - (2 sigma_b)^-2)^-1/2: bits centred at +-1/2 have sensitivity 1/2. Andrew, Thakkar, McMahan, Ramaswamy 2021,
    Differentially private learning with adaptive clipping, https://arxiv.org/abs/1905.03871, theorem 1; as there.

    Raises ConfigError where the bits alone would cost as much as the whole is allowed to, z >= 2 sigma_b."""
    if noise_multiplier == 0:
        return 0.0
    if not (bit_sigma > 0 and math.isfinite(bit_sigma)) or noise_multiplier >= 2 * bit_sigma:
        raise ConfigError(
            f"noise of {bit_sigma:g} on the clipped bits leaves nothing for the updates at a noise multiplier of "
            f"{noise_multiplier:g}: it must be above {noise_multiplier / 2:g}, better {2.5 * noise_multiplier:g}, or the noise "
            f"multiplier below {2 * bit_sigma:g}"
        )
    return 1.0 / math.sqrt(noise_multiplier**-2 - (2 * bit_sigma) ** -2)


def default_bit_sigma(noise_multiplier: float, rate: float, population: int) -> float:
    """Noise on the number of clipped updates: a twentieth of the expected cohort (Andrew et al. 2021), and in small cohorts 2.5
    times the noise multiplier, where the updates' noise grows by no more than 2.1 %."""
    return max(rate * population / 20, 2.5 * noise_multiplier)
