"""Epsilon and delta of what mechanisms have released, and the questions that go with them.

An account is a list of `Spend`. Its epsilon is computed twice by dp-accounting: over the privacy loss distribution, which is
reported (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, Connect the dots, https://arxiv.org/abs/2207.04380: pessimistic at
every step of the grid), and over Renyi divergences beside it (Mironov, Talwar, Zhang 2019, https://arxiv.org/abs/1908.10530).
We differ where nothing is sampled: Gaussians compose to a Gaussian, whose epsilon has a closed form (Balle, Wang 2018,
https://arxiv.org/abs/1805.06530, theorem 8), so that is used. For cohorts of a fixed size there is only the Renyi bound
(Wang, Balle, Kasiviswanathan 2019, https://arxiv.org/abs/1808.00087, theorem 27).

Every mechanism goes in as the ratio of its noise to its sensitivity. dp-accounting's own REPLACE_ONE is never used for privacy loss
distributions: there it doubles the sensitivity by itself, while its Renyi accountant does not.

Costs: a new mechanism takes about a second, a new number of rounds of a known one about 0.4 s and 10 MB for a moment.
dp-accounting, scipy and numpy are loaded at the first question.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from functools import lru_cache
from threading import Lock
from typing import Any, Final

from fed_core.errors import ConfigError
from fed_core.privacy.mechanism import Everyone, FixedSize, Mechanism, Poisson, Relation, Sampling

# The grid of privacy losses: epsilons in the ranges in use are within 1e-4 of its limit.
INTERVAL: Final = 1e-4
# For guesses that the fine grid then corrects.
_COARSE: Final = 1e-3
# A distribution has at most about this many points to each side: epsilons of 20 and above are computed on coarser grids.
_MAX_POINTS: Final = 2**18
# Enough to know how far a distribution reaches, at a hundredth of the cost of all.
_FEW_ORDERS: Final = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# Noise of less than a hundredth of what it hides is accounted as none: the epsilon of one round is above 4,000.
_LEAST_NOISE: Final = 0.01
# Noise multipliers are the same where they agree to so many digits: sigma / sensitivity has rounding errors.
_DIGITS: Final = 12
_RELATIVE: Final = 1e-4
MAX_ROUNDS: Final = 1_000_000
_LARGEST_EXPONENT: Final = 700.0


@dataclass(frozen=True)
class Spend:
    """A mechanism that has run, or will, `count` times on the same population. Raises ConfigError for a negative count."""

    mechanism: Mechanism
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"a mechanism cannot have run {self.count} times: give 0 or more")


@dataclass(frozen=True)
class Epsilon:
    """Two upper bounds of the same epsilon. `pld` is None where a cohort of a fixed size is in the account."""

    pld: float | None
    rdp: float

    @property
    def reported(self) -> float:
        """The one that counts against a budget."""
        return self.rdp if self.pld is None else self.pld

    @property
    def accountant(self) -> str:
        """Where `reported` comes from, for a sentence."""
        if self.pld is None:
            return "Renyi differential privacy (dp-accounting)"
        return "privacy loss distributions (dp-accounting)"


def epsilon(spends: Sequence[Spend], delta: float, failure: float = 0.0, distance: float = 0.0) -> Epsilon:
    """Epsilon of everything in `spends` together, at `delta`.

    `failure` is the part of delta that is already gone: the probability with which what was released is not what the mechanisms
    declare. What is left goes to the accountant. No spends cost 0; no noise costs infinity.

    `distance` is the total variation distance between what was released and what the mechanisms declare, as that of drawn noise to
    the ideal. Both neighbours' outputs are off by it, so it takes (1 + e^epsilon) times as much of delta.

    Raises ConfigError where delta is not between 0 and 1, failure takes all of it, or the spends protect different units or
    different relations."""
    left = _left(delta, failure)
    noises = _noises(spends)
    if not noises:
        return Epsilon(0.0, 0.0)
    if _is_bare(noises):
        return Epsilon(math.inf if _has_pld(noises) else None, math.inf)
    pld = _at_distance(lambda d: _pld_epsilon(noises, d, INTERVAL), left, distance) if _has_pld(noises) else None
    return Epsilon(pld, _at_distance(lambda d: _rdp_epsilon(noises, d), left, distance))


def delta_of(spends: Sequence[Spend], epsilon: float, failure: float = 0.0) -> float:
    """Delta of everything in `spends` together at `epsilon`, by the same accountants, with `failure` added; at most 1.

    Raises ConfigError for a negative epsilon, and as `epsilon` does."""
    if not epsilon >= 0:
        raise ConfigError(f"an epsilon of {epsilon:g} is no guarantee: give 0 or above")
    noises = _noises(spends)
    if not noises:
        return failure
    if _is_bare(noises):
        return 1.0
    found = _pld_delta(noises, epsilon, INTERVAL) if _has_pld(noises) else _rdp_delta(noises, epsilon)
    return min(1.0, found + failure)


def epsilon_without_sampling(
    spends: Sequence[Spend], max_participations: int, delta: float, failure: float = 0.0, distance: float = 0.0
) -> Epsilon:
    """Epsilon towards somebody who sees the cohorts: nothing is amplified, and one unit contributes at most so many times.

    Where the spends differ, those with the least noise are taken. A correlated mechanism has its participations in its sensitivity
    and counts as it is.

    Raises ConfigError for negative participations, and as `epsilon` does."""
    if max_participations < 0:
        raise ConfigError(f"{max_participations} participations cannot be: give 0 or more")
    whole = [spend for spend in spends if spend.mechanism.correlation is not None]
    single = [
        Spend(spend.mechanism.without_sampling(), spend.count)
        for spend in spends
        if spend.mechanism.correlation is None
    ]
    left, kept = max_participations, []
    for spend in sorted(single, key=lambda spend: spend.mechanism.noise_multiplier):
        kept.append(Spend(spend.mechanism, min(spend.count, left)))
        left -= kept[-1].count
    _noises(spends)  # what cannot be composed is refused, whatever the participations
    return epsilon([*whole, *kept], delta, failure, distance)


def likely_participations(num_rounds: int, rate: float, failure: float) -> int:
    """The fewest participations that one unit exceeds with probability at most `failure` in so many rounds of independent coins.

    The coins do not depend on the data, so who accounts for so many participations adds `failure` to delta and is right.
    Raises ConfigError unless 0 < failure < 1."""
    from scipy.stats import binom

    if not 0 < failure < 1:
        raise ConfigError(f"a failure probability of {failure:g} bounds no participations: give one between 0 and 1")
    guess = int(binom.isf(failure, num_rounds, rate))
    return next(k for k in range(max(guess - 1, 0), num_rounds + 1) if binom.sf(k, num_rounds, rate) <= failure)


def projection(
    mechanism: Mechanism,
    num_rounds: int,
    delta: float,
    failure: float = 0.0,
    before: Sequence[Spend] = (),
    num_points: int = 24,
) -> list[tuple[int, Epsilon]]:
    """Epsilon after further rounds 1 to `num_rounds`, at `num_points` of them or fewer, the first and the last among them.

    `before` is what is spent already. The cost is that of so many epsilons; raises ConfigError as `epsilon` does."""
    points = sorted(
        {max(1, round(num_rounds * step / num_points)) for step in range(1, num_points + 1)} | {1, num_rounds}
    )
    return [
        (point, epsilon([*before, Spend(mechanism, point)], delta, failure)) for point in points if point <= num_rounds
    ]


# Calibration


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    num_rounds: int,
    sampling: Sampling,
    relation: Relation = "add_remove",
    failure: float = 0.0,
) -> float:
    """The least noise, as sigma / sensitivity, with which `num_rounds` rounds cost at most `epsilon` at `delta`.

    Within 1e-4 of the least one and never below it: the epsilon reported for what is returned is at most `epsilon`. To get noise
    over clipping norm, multiply by `CLIPPING_NORMS[relation]`. Takes 1 to 5 s.

    Raises ConfigError for an epsilon that is not above 0, for no rounds, and as `epsilon` and `Mechanism` do."""
    _check_budget(epsilon)
    if num_rounds < 1:
        raise ConfigError(f"{num_rounds} rounds need no noise: give at least 1")
    left = _left(delta, failure)
    Mechanism("client", relation, 1.0, 1.0, sampling)  # refuses what is not covered
    kind = _kind_of(sampling)
    # More than enough: sampling amplifies, so without it the same noise costs no less.
    enough = math.sqrt(num_rounds) / _mu_for(epsilon, left)
    if isinstance(kind, Everyone):
        return rounded_up(max(enough, _LEAST_NOISE), _DIGITS)

    def excess(noise: float, interval: float) -> float:
        found = _reported({(_key(noise), kind): num_rounds}, left, interval)
        return math.log(max(min(found, 1e9), 1e-9) / epsilon)

    if isinstance(kind, FixedSize):
        # This bound may exceed that without sampling, which holds as well but is not what is reported.
        while excess(enough, INTERVAL) > 0:
            enough *= 2
        low, high = _bracket(lambda z: excess(z, INTERVAL), enough)
        return _least(lambda z: excess(z, INTERVAL), low, high)
    coarse = _COARSE * min(max(1.0, epsilon / 8), 50.0)
    low, high = _bracket(lambda z: excess(z, coarse), enough)
    near = _least(lambda z: excess(z, coarse), low, high)
    slope = (excess(near * 1.01, coarse) - excess(near, coarse)) / math.log(1.01)
    return _correct(lambda z: excess(z, INTERVAL), near, slope)


def rounds_for(epsilon: float, delta: float, mechanism: Mechanism, failure: float = 0.0) -> int:
    """The most rounds of `mechanism` that cost at most `epsilon` at `delta`; 0 where one is too many, at most MAX_ROUNDS.

    Takes 1 to 5 s. Raises ConfigError for an epsilon that is not above 0, for a correlated mechanism, whose event is a whole run,
    and as `epsilon` does."""
    _check_budget(epsilon)
    if mechanism.correlation is not None:
        raise ConfigError(
            "correlated noise is spent for a whole run at once: ask for its epsilon instead of its rounds"
        )
    left = _left(delta, failure)

    def fits(count: int, interval: float) -> bool:
        noises = _noises([Spend(mechanism, count)])
        return not _is_bare(noises) and _reported(noises, left, interval) <= epsilon

    known = _most(lambda count: fits(count, _COARSE), 0)
    return _most(lambda count: fits(count, INTERVAL), known if known == 0 or fits(known, INTERVAL) else 0)


# Delta


def check_delta(delta: float, population: int) -> str | None:
    """A warning where delta is above 1 / (10 population), None where it is small enough.

    Raises ConfigError where it is not above 0, or not below 1 / population: then publishing somebody's data outright would pass."""
    if not 0 < delta < 1:
        raise ConfigError(f"a delta of {delta:g} is no guarantee: give one above 0 and below 1/{population:,}")
    if delta * population >= 1:
        raise ConfigError(
            f"a delta of {delta:g} would allow the data of one of {population:,} to be published outright: give less than "
            f"1/{population:,}, better {default_delta(population):g}"
        )
    if delta > 1 / (10 * population) * (1 + 1e-9):
        return (
            f"a delta of {delta:g} is large for a population of {population:,}: it is the probability of any failure at all, "
            f"better {default_delta(population):g} or less"
        )
    return None


def default_delta(population: int) -> float:
    """1 / (10 population), rounded down to one digit: 1e-4 for 1,000, and for 3,400, where it is 2.9e-5, 2e-5.

    Raises ConfigError for an empty population."""
    if population < 1:
        raise ConfigError(f"a population of {population} has nobody to protect: give at least 1")
    tenfold = 10 * population
    places = len(str(tenfold - 1))
    return float(f"{10**places // tenfold}e-{places}")


# Words


def rounded_up(value: float, digits: int) -> float:
    """The next number with so many significant digits that is not less: no epsilon and no noise is talked down."""
    # By its shortest digits: 0.1 is a little more than that, and stays 0.1.
    return float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(value)))


def claim(spends: Sequence[Spend], found: Epsilon, delta: float, distance: float = 0.0) -> str:
    """The guarantee in words that a data-protection officer can quote and a reviewer can check: figures, unit, relation,
    sensitivity, sampling, accountant and assumptions; epsilon rounded up to four digits.

    `found` is what `epsilon` or `epsilon_without_sampling` answered."""
    mechanisms = list(dict.fromkeys(spend.mechanism for spend in spends if spend.count))
    if not mechanisms:
        return "Nothing that depends on the data has been released."
    total = sum(spend.count for spend in spends)
    events = f"{total:,} release" + ("s" if total != 1 else "")
    if math.isinf(found.reported):
        return f"No differential privacy: {events} with no noise, or hardly any. {mechanisms[0].sentence()}"
    lost = ""
    if distance:
        part = (1 + math.exp(min(found.reported, _LARGEST_EXPONENT))) * distance
        lost = f", {part:.2g} of delta being for noise that is not quite Gaussian"
    beside = "" if found.pld is None else f"; {rounded_up(found.rdp, 4):g} by Renyi differential privacy"
    described = " And: ".join(mechanism.sentence() for mechanism in mechanisms[:3])
    more = f" And {len(mechanisms) - 3:,} more of the kind." if len(mechanisms) > 3 else ""
    assumed = dict.fromkeys(sentence for mechanism in mechanisms for sentence in mechanism.assumptions())
    return (
        f"({rounded_up(found.reported, 4):g}, {delta:.6g})-differential privacy over {events}{lost}. {described}{more} Composed by "
        f"{found.accountant}{beside}. Assumed: {' '.join(assumed)}"
    )


# What an accountant is told: how often each (noise multiplier, sampling) ran.

_Noise = tuple[float, Sampling]
_Noises = dict[_Noise, int]


def _noises(spends: Sequence[Spend]) -> _Noises:
    spent = [spend for spend in spends if spend.count]
    for what, values in (
        ("units", {spend.mechanism.unit for spend in spent}),
        ("relations", {spend.mechanism.relation for spend in spent}),
    ):
        if len(values) > 1:
            raise ConfigError(
                f"guarantees for different {what} ({', '.join(sorted(values))}) do not add up: keep an account for each of them"
            )
    noises: Counter[_Noise] = Counter()
    for spend in spent:
        noises[_key(spend.mechanism.noise_multiplier), _kind_of(spend.mechanism.sampling)] += spend.count
    return dict(noises)


def _key(noise_multiplier: float) -> float:
    return float(f"{noise_multiplier:.{_DIGITS}g}")


def _kind_of(sampling: Sampling) -> Sampling:
    """The sampling, where all are drawn as what it then is."""
    everyone = (isinstance(sampling, Poisson) and sampling.rate == 1) or (
        isinstance(sampling, FixedSize) and sampling.size == sampling.population
    )
    return Everyone() if everyone else sampling


def _left(delta: float, failure: float) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"a delta of {delta:g} is no guarantee: give one between 0 and 1, well below 1 / population")
    if not 0 <= failure < delta:
        raise ConfigError(
            f"a failure probability of {failure:.3g} leaves nothing of delta {delta:g}: give a larger delta, or spend fewer rounds"
        )
    return delta - failure


def _at_distance(epsilon_at: Callable[[float], float], delta: float, distance: float) -> float:
    """The least epsilon with epsilon_at(delta - (1 + e^epsilon) distance) <= epsilon, a millionth above it at most; infinite where
    the distance leaves nothing of delta."""
    found = epsilon_at(delta)
    while distance > 0 and found < _LARGEST_EXPONENT:
        left = delta - (1 + math.exp(found)) * distance
        if left <= 0:
            break
        again = epsilon_at(left)
        if again <= found:
            return found
        found = again * (1 + 1e-6)
    return found if distance == 0 else math.inf


def _check_budget(epsilon: float) -> None:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(f"an epsilon of {epsilon:g} is no budget: give a finite one above 0")


def _is_bare(noises: _Noises) -> bool:
    return any(noise < _LEAST_NOISE for noise, _ in noises)


def _has_pld(noises: _Noises) -> bool:
    return not any(isinstance(sampling, FixedSize) for _, sampling in noises)


def _reported(noises: _Noises, delta: float, interval: float) -> float:
    if _is_bare(noises):
        return math.inf
    return _pld_epsilon(noises, delta, interval) if _has_pld(noises) else _rdp_epsilon(noises, delta)


def _mu(noises: _Noises) -> float:
    """What all unsampled Gaussians together are worth: 1 / noise multiplier of one."""
    return math.sqrt(
        sum(count / noise**2 for (noise, sampling), count in noises.items() if isinstance(sampling, Everyone))
    )


# Privacy loss distributions


def _pld_epsilon(noises: _Noises, delta: float, interval: float) -> float:
    sampled = any(not isinstance(sampling, Everyone) for _, sampling in noises)
    if not sampled:
        return _gaussian_epsilon(_mu(noises), delta)
    found = _pld(noises, interval)
    return math.inf if found is None else float(found.get_epsilon_for_delta(delta))


def _pld_delta(noises: _Noises, epsilon: float, interval: float) -> float:
    if all(isinstance(sampling, Everyone) for _, sampling in noises):
        return _gaussian_delta(_mu(noises), epsilon)
    found = _pld(noises, interval)
    return 1.0 if found is None else float(found.get_delta_for_epsilon(epsilon))


def _pld(noises: _Noises, interval: float) -> Any:
    """None where epsilon is beyond 200,000, which is accounted as infinite."""
    # Where epsilon is so large that nobody asks for its fourth digit the grid is coarser, and as pessimistic as any.
    reach = _rdp_epsilon(noises, 1e-15, _FEW_ORDERS)
    if reach > _MAX_POINTS:
        return None
    while reach / interval > _MAX_POINTS:
        interval *= 2
    parts = [
        _composed(noise, sampling.rate, count, interval)
        for (noise, sampling), count in noises.items()
        if isinstance(sampling, Poisson)
    ]
    if (mu := _mu(noises)) > 0:
        parts.append(_step(1 / mu, 1.0, interval))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return whole


@lru_cache(maxsize=8)
def _step(noise: float, rate: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=interval
    )


# A few: an account that grows by a round asks for the last count and the next, beside what other mechanisms have spent.
@lru_cache(maxsize=8)
def _composed(noise: float, rate: float, count: int, interval: float) -> Any:
    return _step(noise, rate, interval).self_compose(count)


# A Gaussian of sensitivity mu and standard deviation 1


def _gaussian_delta(mu: float, epsilon: float) -> float:
    from scipy.special import log_ndtr

    return float(math.exp(log_ndtr(mu / 2 - epsilon / mu)) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    if _gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while _gaussian_delta(mu, high) > delta:
        high *= 2
    return _halve(lambda epsilon: _gaussian_delta(mu, epsilon) <= delta, high / 2 if high > 1 else 0.0, high)


def _mu_for(epsilon: float, delta: float) -> float:
    """The largest mu that is (epsilon, delta)-private."""
    high = 1.0
    while _gaussian_delta(high, epsilon) <= delta:
        high *= 2
    low = high / 2
    while _gaussian_delta(low, epsilon) > delta:
        low, high = low / 2, low
    return 1 / _halve(lambda z: _gaussian_delta(1 / z, epsilon) <= delta, 1 / high, 1 / low)


def _halve(is_enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least x in (low, high] that is enough, from above, to the last digits; `high` is enough."""
    for _ in range(60):
        middle = (low + high) / 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


# Renyi divergences


def _rdp_epsilon(noises: _Noises, delta: float, orders: tuple[int, ...] | None = None) -> float:
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    used, divergences = _divergences(noises, orders)
    with _quiet():
        return float(compute_epsilon(used, divergences, delta)[0])


def _rdp_delta(noises: _Noises, epsilon: float) -> float:
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    orders, divergences = _divergences(noises)
    with _quiet():
        return float(compute_delta(orders, divergences, epsilon)[0])


def _divergences(noises: _Noises, orders: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    parts = [(_order_divergences(*noise, orders), count) for noise, count in noises.items()]
    return parts[0][0][0], sum(divergences * count for (_, divergences), count in parts)


@lru_cache(maxsize=64)
def _order_divergences(noise: float, sampling: Sampling, orders: tuple[int, ...] | None) -> tuple[Any, Any]:
    """Orders (dp-accounting's own by default), and the divergence of one release at each of them; infinite where it cannot be
    computed, which is pessimistic."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    gaussian = dp_accounting.GaussianDpEvent(noise)
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    match sampling:
        case Everyone():
            event = gaussian
        case Poisson(rate):
            event = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        case FixedSize(size, population):
            event = dp_accounting.SampledWithoutReplacementDpEvent(population, size, gaussian)
            relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    with _quiet():
        accountant = RdpAccountant(orders, relation).compose(event)
    # Divergences add up, and the accountant has no way of its own to ask for them; dp-accounting is pinned to a minor version.
    return accountant._orders, accountant._rdp


_SILENCE = Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dp-accounting's warnings of orders that it leaves out: others take their place."""
    logger = logging.getLogger("absl")
    with _SILENCE:
        before, logger.disabled = logger.disabled, True
        try:
            yield
        finally:
            logger.disabled = before


# Searches


def _bracket(excess: Callable[[float], float], enough: float) -> tuple[float, float]:
    """(too little or _LEAST_NOISE, enough) with a ratio of at most 2."""
    low = high = max(enough, _LEAST_NOISE)
    while low > _LEAST_NOISE:
        low = max(high / 2, _LEAST_NOISE)
        if excess(low) > 0:
            break
        high = low
    return low, high


def _least(excess: Callable[[float], float], low: float, high: float) -> float:
    """The least noise in [low, high] without excess, from above, to 1e-4; there is none at `high`, and it falls with noise."""
    from scipy.optimize import brentq

    if excess(low) <= 0:
        return low
    if excess(high) == 0:
        return high
    root = brentq(lambda log: excess(math.exp(log)), math.log(low), math.log(high), xtol=_RELATIVE / 5)
    # The root is within xtol of where the sign changes, and brentq adds a few last digits.
    return rounded_up(min(high, math.exp(root + _RELATIVE / 4)), _DIGITS)


def _correct(excess: Callable[[float], float], near: float, slope: float) -> float:
    """The least noise without excess, from above, to 1e-4, given one `near` it and the slope of excess over log(noise)."""
    slope = min(slope, -0.1)
    band = -slope * _RELATIVE
    low, high = 0.0, math.inf
    noise = near
    while True:
        noise = rounded_up(max(noise, _LEAST_NOISE), _DIGITS)
        found = excess(noise)
        low, high = (low, noise) if found <= 0 else (noise, high)
        if -band <= found <= 0 or high <= max(low, _LEAST_NOISE) * (1 + _RELATIVE):
            return high
        noise *= math.exp((found + band / 2) / -slope)
        if not low < noise < high:
            noise = math.sqrt(low * high)


def _most(fits: Callable[[int], bool], known: int) -> int:
    """The most rounds that fit, `known` of which do; doubling steps up, then halving."""
    low, step = known, 1
    while low + step <= MAX_ROUNDS and fits(low + step):
        low, step = low + step, step * 2
    high = min(low + step, MAX_ROUNDS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
