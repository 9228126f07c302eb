"""Whether a mechanism leaks more than its guarantee allows: an audit in one run. The maths; the run is `rounds.private_audit`.

Canaries are clients that are made up. Each is in the run or not by a fair coin of the auditor's, and sends updates in a direction
of its own. From what is released, and from the directions, the auditor guesses the coins. Who is (epsilon, delta)-private lets
nobody guess much better than by chance, so too many right guesses contradict the guarantee; few never confirm it.

**The bound** is that of Steinke, Nasr and Jagielski 2023 (Privacy auditing with one training run, https://arxiv.org/abs/2305.08846,
section 5 and appendix D). Of m canaries the auditor guesses r, and keeps silent on the others. If adding or removing one client is
(epsilon, delta)-private, then with W binomial of r trials at e^epsilon / (1 + e^epsilon), the chance of v right guesses or more is
at most

    P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i

With delta = 0 the least epsilon that is not rejected is the log-odds of the one-sided Clopper-Pearson limit of the share of right
guesses; the second term is what delta takes from it.

**What it needs, and has.** The coins are fair, independent, and known to nothing but the choice of who is in. How many are guessed
in and out is fixed before. A coin adds or removes one client: the relation of central privacy with Poisson sampling, and of no
other here. Nothing is assumed of the noise, of the canaries' independence under the mechanism, or of how good the guesses are, so a
defect can be missed but a mechanism that keeps its guarantee is contradicted with no more than the declared probability. Rates of
true and false positives over the canaries of one run, each with a Clopper-Pearson limit (Jagielski, Ullman and Oprea 2020,
https://arxiv.org/abs/2006.07709, where each rate is over independent runs), would need that independence, and are not used.

**Where we differ.** Guesses are the extremes of the likelihood ratio that the declared mechanism would have, so that a canary which
coins left out of most rounds is not held against the auditor; with everyone in every round this orders canaries by the inner
product of their direction with the sum of all released differences. Instead of one number of guesses, chosen by trial, a few ways
to guess (`WAYS`) are fixed, and each is given its part of the error probability (Bonferroni). Directions are orthogonal, where the
paper's are independent: no canary disturbs another, and the theorem asks nothing of them.

**What it cannot see**: with m canaries at most about log(m / 5) of epsilon, see `Finding.most`; leaks that are not along the
updates' directions; a noise stream that repeats from round to round; what happens outside the audited code. It is conservative by
all that the guesses leave unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fed_core.errors import ConfigError

Reals = NDArray[np.float64]

MIN_CANARIES: Final = 100
"""With fewer, not even right guesses throughout would contradict a guarantee that anybody gives."""
_LARGEST: Final = 64.0
_HALVINGS: Final = 36


class Way(NamedTuple):
    """How much is guessed: the part of the canaries, highest likelihood first, that is guessed in, and lowest first, out."""

    part_in: float
    part_out: float


WAYS: Final = (Way(0.45, 0.45), Way(0.25, 0.25), Way(0.1, 0.1), Way(0.2, 0.0), Way(0.05, 0.0))
"""Many guesses where nothing is hidden, few where only the extremes are telling; of those only who is in where the coins seldom let
a canary contribute, since silence then says little."""


@dataclass(frozen=True)
class Canaries:
    """Who the auditor makes up: `is_in` [m] bool, the fair coins, and `directions` [m, d] float32, orthonormal rows."""

    is_in: NDArray[np.bool_]
    directions: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.is_in)

    @property
    def dimension(self) -> int:
        """Values of an update."""
        return int(self.directions.shape[1])


def make_canaries(num_canaries: int, dimension: int, seed: int) -> Canaries:
    """Canaries that a seed decides: fair coins, and a frame of directions drawn uniformly from all orthonormal ones.

    Costs 4 d m^2 operations, some seconds for 1,000 in 20,000 dimensions, and 12 d m bytes. Raises ConfigError for fewer canaries
    than MIN_CANARIES, and for more than there are dimensions."""
    if num_canaries < MIN_CANARIES:
        raise ConfigError(
            f"{num_canaries:,} canaries could not contradict any guarantee: give {MIN_CANARIES} or more, better 1,000 or more"
        )
    if num_canaries > dimension:
        raise ConfigError(
            f"{num_canaries:,} canaries have no room for directions of their own in {dimension:,} dimensions: give a dimension of "
            f"{num_canaries:,} or more, best twenty times as much"
        )
    generator = np.random.default_rng(seed)
    is_in = generator.integers(0, 2, num_canaries).astype(np.bool_)
    frame, triangle = np.linalg.qr(generator.standard_normal((dimension, num_canaries), dtype=np.float32))
    # Without the signs the frame would follow the convention of the factorization, and not be uniform.
    frame *= np.where(np.diagonal(triangle) < 0, -1, 1).astype(np.float32)
    return Canaries(is_in, np.ascontiguousarray(frame.T))


def log_likelihood_ratio(scores: Reals, noise_multiplier: float, rate: float) -> Reals:
    """How much more likely each canary's scores are if it is in than if it is not, [m], natural logarithm, by the declared
    mechanism.

    `scores` [rounds, m] are inner products of the directions with each round's released sum, over the clipping norm of the round:
    Gaussian of standard deviation `noise_multiplier` around 0, and for who is in, around 1 in each round with probability
    `rate`."""
    evidence = (scores - 0.5) / noise_multiplier**2
    if rate < 1:
        evidence = np.logaddexp(np.log1p(-rate), np.log(rate) + evidence)
    total: Reals = evidence.sum(axis=0)
    return total


def p_value(num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float) -> float:
    """Bound on the chance of so many right guesses, or more, under (epsilon, delta)-privacy; at most 1. See the module."""
    from scipy.special import betainc, expit

    at_least = np.ones(num_right + 1)  # [v]: P[W >= v], as an incomplete beta function
    right = np.arange(1, num_right + 1)
    at_least[1:] = betainc(right, num_guesses - right + 1, expit(epsilon))
    found = float(at_least[num_right])
    if delta > 0 and num_right > 0:
        steepest = float(((at_least[num_right - right] - found) / right).max())
        found += 2 * num_canaries * delta * steepest
    return min(found, 1.0)


def lower_bound(num_canaries: int, num_guesses: int, num_right: int, delta: float, error: float) -> float:
    """The largest epsilon that so many right guesses contradict at `delta`, from below, to nine digits or so; 0 where there is
    none. A mechanism that is (epsilon, delta)-private gives a bound above its epsilon with probability at most `error`."""

    def contradicts(epsilon: float) -> bool:
        return p_value(num_canaries, num_guesses, num_right, epsilon, delta) <= error

    if not contradicts(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST and contradicts(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if contradicts(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Attempt:
    """One way to guess: how many canaries were guessed to be in and out, how many of these guesses are right, and the epsilon that
    this contradicts, with its part of the error probability."""

    num_guessed_in: int
    num_guessed_out: int
    num_right: int
    bound: float

    @property
    def num_guesses(self) -> int:
        """Canaries on which the auditor did not keep silent."""
        return self.num_guessed_in + self.num_guessed_out


@dataclass(frozen=True)
class Finding:
    """What an audit found.

    Attributes:
        attempts: one for each way to guess.
        most: the bound if every guess of some way had been right: a claim at or above it cannot be contradicted by this audit."""

    attempts: tuple[Attempt, ...]
    most: float

    @property
    def best(self) -> Attempt:
        """The attempt with the largest bound."""
        return max(self.attempts, key=lambda attempt: attempt.bound)

    @property
    def bound(self) -> float:
        """Epsilon is larger than this, with the confidence that was asked for, all attempts together."""
        return self.best.bound

    def contradicts(self, claimed: float) -> bool:
        """Whether a mechanism with this epsilon, at the audited delta, would have been found so with the declared error probability
        at most."""
        return self.bound > claimed


def examine(
    ratios: Reals, is_in: NDArray[np.bool_], delta: float, confidence: float = 0.95, ways: Sequence[Way] = WAYS
) -> Finding:
    """Guesses who was in by `ratios` [m], whatever grows with the evidence for it, and says what that contradicts at `delta`.

    Ties fall by a canary's number, of which coins know nothing. Raises ConfigError for a delta or a confidence out of range."""
    if not 0 <= delta < 1:
        raise ConfigError(f"a delta of {delta:g} is no guarantee to audit: give one from 0, below 1")
    if not 0.5 <= confidence < 1:
        raise ConfigError(
            f"a confidence of {confidence:g} contradicts nothing: give one from 0.5, below 1, such as 0.95"
        )
    num_canaries, error = len(is_in), (1 - confidence) / len(ways)
    order = np.argsort(ratios, kind="stable")
    attempts, most = [], 0.0
    for way in ways:
        num_in, num_out = round(way.part_in * num_canaries), round(way.part_out * num_canaries)
        num_right = int(is_in[order[num_canaries - num_in :]].sum()) + int((~is_in[order[:num_out]]).sum())
        num_guesses = num_in + num_out
        bound = lower_bound(num_canaries, num_guesses, num_right, delta, error)
        attempts.append(Attempt(num_in, num_out, num_right, bound))
        most = max(most, lower_bound(num_canaries, num_guesses, num_guesses, delta, error))
    return Finding(tuple(attempts), most)
