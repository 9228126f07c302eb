"""Mechanisms and their account: against published figures, closed forms, and an accountant of our own."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from scipy.stats import binom, norm

from fed_core.errors import ConfigError
from fed_core.privacy import accounting
from fed_core.privacy.accounting import (
    Epsilon,
    Spend,
    check_delta,
    claim,
    default_delta,
    delta_of,
    epsilon,
    epsilon_without_sampling,
    likely_participations,
    noise_multiplier_for,
    projection,
    rounded_up,
    rounds_for,
)
from fed_core.privacy.mechanism import (
    CLIPPING_NORMS,
    Correlation,
    Everyone,
    FixedSize,
    Mechanism,
    Poisson,
    Sampling,
    central_adaptive,
    central_fixed,
    central_poisson,
    correlated,
    default_bit_sigma,
    example_poisson,
    local,
    split_noise,
)

Floats = NDArray[np.float64]

# Noise multiplier, rate, rounds, delta; epsilon by dp-accounting's RDP and by PLD, where Opacus 1.6 agrees to 0.07 and 0.011.
PUBLISHED = [
    (1.0, 1.0, 1, 1e-5, 4.72851, 4.37718),
    (1.0, 1.0, 10, 1e-5, 19.05360, 17.85659),
    (4.0, 1.0, 50, 1e-5, 9.23496, 8.59587),
    (1.0, 0.01, 1000, 1e-5, 2.10137, 1.82824),
    (1.1, 0.01, 10_000, 1e-5, 5.63201, 5.19262),
    (1.1, 256 / 60_000, 14_040, 1e-5, 2.59436, 2.37964),
    (1.0, 0.1, 100, 1e-5, 7.90385, 7.04660),
    (0.7, 0.02, 500, 1e-5, 7.66409, 6.65378),
    (2.0, 0.05, 1000, 1e-6, 4.47550, 4.16261),
    (0.5, 0.001, 2000, 1e-6, 5.77285, 4.65512),
    (1.0, 0.1, 200, 1e-3, 8.25414, 7.09615),
    (1.5, 100 / 3400, 1500, 1 / 3400, 3.33179, 2.97232),
]


@pytest.fixture
def coarse() -> Iterator[None]:
    """The grid on which guesses are made: a tenth of the time, for what does not look at the fourth digit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "INTERVAL", 1e-3)
        yield


def rounds(noise: float, rate: float, count: int) -> list[Spend]:
    return [Spend(central_poisson(1.0, noise, rate), count)]


def pld_of(spends: list[Spend], delta: float) -> float:
    found = epsilon(spends, delta).pld
    assert found is not None
    return found


# Published figures


@pytest.mark.parametrize(("noise", "rate", "count", "delta", "rdp", "pld"), PUBLISHED)
def test_epsilon_is_that_of_the_published_table(
    noise: float, rate: float, count: int, delta: float, rdp: float, pld: float
) -> None:
    found = epsilon(rounds(noise, rate, count), delta)
    assert found.rdp == pytest.approx(rdp, abs=1e-3)
    assert found.pld == pytest.approx(pld, abs=1e-3)
    assert found.reported == found.pld


@pytest.mark.parametrize(("noise", "expected"), [(1, 4.8866), (2, 2.2541), (4, 1.0607), (8, 0.5039)])
def test_a_single_gaussian_is_the_published_one(noise: float, expected: float) -> None:
    assert pld_of(rounds(noise, 1.0, 1), 1e-6) == pytest.approx(expected, abs=1e-4)


def test_a_fixed_size_is_accounted_by_noise_over_twice_the_clipping_norm() -> None:
    # The published figure is of noise as large as what replacing one of the cohort moves the sum by: 2 C.
    found = epsilon([Spend(central_fixed(3.0, 2.0, 10, 1000), 1000)], 1e-5)
    assert found.pld is None
    assert found.rdp == pytest.approx(3.57611, abs=1e-5)
    assert found.reported == found.rdp


@pytest.mark.parametrize(
    ("target", "rate", "count", "delta", "noise"),
    # Published from a grid ten times as coarse, which asks for up to a thousandth more noise.
    [(1.0, 0.01, 1000, 1e-5, 1.4158), (8.0, 0.01, 1000, 1e-5, 0.5864), (2.0, 1, 100, 1e-5, 19.938), (8.0, 0.1, 200, 1e-3, 0.9405)],
)  # fmt: skip
def test_calibration_is_the_published_one_both_ways(
    target: float, rate: float, count: int, delta: float, noise: float
) -> None:
    found = noise_multiplier_for(target, delta, count, Poisson(rate))
    assert found == pytest.approx(noise, rel=1e-3)
    # Epsilon falls at least as fast as noise grows: a thousandth below the target is less than a thousandth of noise too much.
    assert target * 0.999 <= pld_of(rounds(found, rate, count), delta) <= target


# An accountant of our own: densities of the output on a fine grid, their privacy losses, and convolution.


def losses(noise: float, rate: float, direction: str, step: float) -> tuple[int, Floats]:
    """(lowest loss in steps, probabilities of the losses lowest, lowest + 1, ... steps under the first of the two outputs).

    The outputs are N(0, z^2) and (1 - q) N(0, z^2) + q N(1, z^2); "remove" compares the second to the first. A loss is split
    between its two neighbours on the grid such that its mean stays, so an error is of the second order in `step`."""
    x = np.linspace(-14 * noise, 1 + 14 * noise, 100_001)
    without = norm.pdf(x, 0, noise)
    with_one = (1 - rate) * without + rate * norm.pdf(x, 1, noise)
    mass = (with_one if direction == "remove" else without) * (x[1] - x[0])
    # Of the logarithms themselves: the densities' quotient is 0 / 0 in the tails.
    ratio = np.logaddexp(math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (x - 0.5) / noise**2)
    place = (ratio if direction == "remove" else -ratio) / step
    low = np.floor(place).astype(int)
    lowest = int(low.min())
    upper = place - low
    size = int(low.max()) - lowest + 2
    probabilities = np.bincount(low - lowest, mass * (1 - upper), size) + np.bincount(
        low - lowest + 1, mass * upper, size
    )
    assert probabilities.sum() == pytest.approx(1, abs=1e-9)
    return lowest, probabilities


def our_delta(steps: list[tuple[float, float]], target: float, step: float = 1e-3) -> float:
    """Hockey-stick divergence of order e^target of the composition of (noise, rate), the larger of both directions."""
    found = []
    for direction in ("add", "remove"):
        parts = [losses(noise, rate, direction, step) for noise, rate in steps]
        lowest = sum(low for low, _ in parts)
        whole = reduce(fftconvolve, (probabilities for _, probabilities in parts))
        values = (lowest + np.arange(len(whole))) * step
        above = values > target
        found.append(float((whole[above] * -np.expm1(target - values[above])).sum()))
    return max(found)


@pytest.mark.parametrize(
    ("noise", "rate", "count", "target"),
    [(1.0, 0.1, 1, 1.0), (0.7, 0.02, 1, 0.5), (2.0, 0.5, 1, 0.4), (1.0, 0.1, 6, 1.5), (0.8, 0.3, 4, 4.0), (3.0, 0.05, 8, 0.05)],
)  # fmt: skip
def test_delta_is_that_of_numerical_integration(noise: float, rate: float, count: int, target: float) -> None:
    ours = our_delta([(noise, rate)] * count, target)
    assert delta_of(rounds(noise, rate, count), target) == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize(("noise", "rate", "count"), [(1.0, 0.1, 1), (1.0, 0.1, 6), (0.8, 0.3, 4), (2.0, 0.5, 3)])
def test_epsilon_is_that_of_numerical_integration(noise: float, rate: float, count: int) -> None:
    found = pld_of(rounds(noise, rate, count), 1e-5)
    assert our_delta([(noise, rate)] * count, found + 1e-3) < 1e-5 < our_delta([(noise, rate)] * count, found - 1e-3)


def test_our_own_accountant_knows_the_closed_form() -> None:
    mu = math.sqrt(5) / 2.0
    exact = norm.cdf(mu / 2 - 1 / mu) - math.e * norm.cdf(-mu / 2 - 1 / mu)
    assert our_delta([(2.0, 1.0)] * 5, 1.0) == pytest.approx(exact, rel=1e-4)


def test_different_mechanisms_compose_as_numerical_integration_has_it() -> None:
    steps = [(1.0, 0.1), (1.0, 0.1), (0.8, 0.3), (2.0, 0.05), (4.0, 1.0)]
    spends = [spend for noise, rate in steps for spend in rounds(noise, rate, 1)]
    assert delta_of(spends, 2.0) == pytest.approx(our_delta(steps, 2.0), rel=1e-3)


# Full participation


@pytest.mark.parametrize(
    ("noise", "count", "delta"), [(1.0, 1, 1e-5), (4.0, 50, 1e-5), (20.0, 3, 1e-9), (0.3, 7, 1e-6), (30, 1, 0.3)]
)
def test_without_sampling_epsilon_solves_the_closed_form(noise: float, count: int, delta: float) -> None:
    mu = math.sqrt(count) / noise
    found = pld_of([Spend(Mechanism("client", "add_remove", 2.0, 2.0 * noise, Everyone()), count)], delta)

    def exact(target: float) -> float:
        return float(norm.cdf(mu / 2 - target / mu) - math.exp(target) * norm.cdf(-mu / 2 - target / mu))

    if found == 0:
        assert exact(0.0) <= delta
    else:
        assert exact(found * (1 + 1e-9)) <= delta <= exact(found * (1 - 1e-9))
    assert delta_of([Spend(local(0.5, 2 * noise), count)], found) == pytest.approx(exact(found), rel=1e-6)


def test_a_rate_of_one_is_no_sampling() -> None:
    assert epsilon(rounds(1.5, 1.0, 4), 1e-5) == epsilon(
        [Spend(Mechanism("client", "add_remove", 1, 1.5, Everyone()), 4)], 1e-5
    )


# Composition and the rest of an account


@pytest.mark.usefixtures("coarse")
def test_spends_compose_in_any_order_and_grouping() -> None:
    a, b = central_poisson(1.0, 1.2, 0.05), central_poisson(0.3, 0.9, 0.02)
    whole = epsilon([Spend(a, 7), Spend(b, 5)], 1e-5)
    mixed = epsilon([Spend(b, 2), *[Spend(a)] * 7, Spend(b, 3), Spend(a, 0)], 1e-5)
    assert mixed.pld == pytest.approx(whole.pld, abs=1e-6)
    assert mixed.rdp == pytest.approx(whole.rdp, rel=1e-12)
    alone = epsilon([Spend(a, 7)], 1e-5).reported
    assert alone < whole.reported < alone + epsilon([Spend(b, 5)], 1e-5).reported


def test_a_clipping_norm_that_changes_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = [0.1 * math.exp(0.07 * k) for k in range(30)]
    made: list[float] = []
    step = accounting._step
    monkeypatch.setattr(accounting, "_step", lambda noise, *rest: made.append(noise) or step(noise, *rest))
    changing = [Spend(central_poisson(norm, 0.9, 0.05)) for norm in norms]
    assert epsilon(changing, 1e-5) == epsilon(rounds(0.9, 0.05, 30), 1e-5)
    # sigma / sensitivity differs in its last bit from round to round, and each would be a distribution of its own.
    assert len({spend.mechanism.noise_multiplier for spend in changing}) > 1
    assert set(made) <= {0.9}


@pytest.mark.usefixtures("coarse")
def test_rdp_is_that_of_the_accountant_itself() -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    theirs = RdpAccountant()
    for noise, rate, count in [(1.0, 0.1, 30), (2.0, 0.02, 50)]:
        theirs.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), count)
    theirs.compose(dp_accounting.GaussianDpEvent(6.0), 2)
    spends = [*rounds(1.0, 0.1, 30), *rounds(2.0, 0.02, 50), *rounds(6.0, 1.0, 2)]
    assert epsilon(spends, 1e-5).rdp == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-12)


@pytest.mark.usefixtures("coarse")
def test_a_distance_takes_more_of_delta_the_larger_epsilon_is() -> None:
    """What holds for the ideal at epsilon and delta holds for what is off by so much at delta + (1 + e^epsilon) distance."""
    spends = [Spend(central_poisson(1.0, 4.0, 1.0), 4)]
    ideal = epsilon(spends, 1e-5)
    for distance in (1e-12, 1e-9, 1e-7):
        found = epsilon(spends, 1e-5, distance=distance)
        for off, exact in ((found.pld, ideal.pld), (found.rdp, ideal.rdp)):
            assert off is not None
            assert exact is not None
            assert off > exact
        assert delta_of(spends, found.reported) + (1 + math.exp(found.reported)) * distance <= 1e-5
        assert delta_of(spends, found.reported * 0.999) + (1 + math.exp(found.reported * 0.999)) * distance > 1e-5
    assert epsilon(spends, 1e-5, distance=4e-6).reported == math.inf


def test_failure_is_taken_from_delta() -> None:
    spends = rounds(1.0, 0.1, 10)
    assert epsilon(spends, 1e-5, 4e-6) == epsilon(spends, 1e-5 - 4e-6)
    assert delta_of(spends, 1.0, 4e-6) == pytest.approx(delta_of(spends, 1.0) + 4e-6)
    for failure in (1e-5, 2e-5, -1e-9, math.nan):
        with pytest.raises(ConfigError, match="leaves nothing of delta"):
            epsilon(spends, 1e-5, failure)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon(rounds(1.0, 0.1, 1), delta)


def test_nothing_spent_costs_nothing() -> None:
    for spends in ([], rounds(1.0, 0.1, 0)):
        assert epsilon(spends, 1e-5) == Epsilon(0.0, 0.0)
        assert delta_of(spends, 1.0) == 0.0
    with pytest.raises(ConfigError, match="give 0 or more"):
        Spend(local(1, 1), -1)


def test_no_noise_costs_infinity() -> None:
    for bare in (central_poisson(1, 0, 0.1), local(1, 0), example_poisson(1, 0.001, 0.1)):
        assert epsilon([Spend(bare)], 1e-5) == Epsilon(math.inf, math.inf)
        assert delta_of([Spend(bare)], 5.0) == 1.0
        assert rounds_for(3.0, 1e-5, bare) == 0
    assert epsilon([Spend(central_fixed(1, 0, 2, 10))], 1e-5) == Epsilon(None, math.inf)
    with_noise = Spend(central_poisson(1, 5.0, 0.01))
    assert math.isinf(epsilon([with_noise, Spend(central_poisson(1, 0, 0.01))], 1e-5).reported)


@pytest.mark.usefixtures("coarse")
def test_little_noise_is_accounted_on_a_coarser_grid_and_stays_an_upper_bound() -> None:
    found = epsilon(rounds(0.15, 0.5, 20), 1e-5)
    # Without sampling the closed form is an upper bound, and contributing at least once a lower one.
    assert 30 < found.reported < epsilon(rounds(0.15, 1.0, 20), 1e-5).reported
    assert found.reported <= found.rdp
    assert math.isinf(epsilon(rounds(0.011, 0.5, 100_000), 1e-5).reported)
    assert delta_of(rounds(0.011, 0.5, 100_000), 10.0) == 1.0


def test_what_does_not_add_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"different units .*keep an account for each"):
        epsilon([Spend(central_poisson(1, 1, 0.1)), Spend(example_poisson(1, 1, 0.1))], 1e-5)
    with pytest.raises(ConfigError, match=r"different relations .*add_remove, replace_one"):
        delta_of([Spend(central_poisson(1, 1, 0.1)), Spend(local(1, 1))], 1.0)
    with pytest.raises(ConfigError, match="relations"):
        epsilon_without_sampling([Spend(central_poisson(1, 1, 0.1)), Spend(local(1, 1))], 0, 1e-5)


@pytest.mark.usefixtures("coarse")
def test_the_accountants_warnings_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    accounting._order_divergences.cache_clear()
    with caplog.at_level(logging.WARNING):
        epsilon(rounds(1.0, 0.1001, 3), 1e-5)  # some orders do not converge
    assert not caplog.records
    assert not logging.getLogger("absl").disabled


# Monotonicity


noises = st.sampled_from([0.8, 1.0, 1.7, 3.0])
rates = st.sampled_from([0.02, 0.1, 1.0])
deltas = st.sampled_from([1e-6, 1e-4])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=noises, rate=rates, count=st.integers(1, 60), delta=deltas, more=st.integers(1, 60))
@pytest.mark.usefixtures("coarse")
def test_more_rounds_cost_more(noise: float, rate: float, count: int, delta: float, more: int) -> None:
    few, many = epsilon(rounds(noise, rate, count), delta), epsilon(rounds(noise, rate, count + more), delta)
    assert few.reported <= many.reported + 1e-6
    assert few.rdp <= many.rdp
    assert few.reported <= few.rdp + 1e-6


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate=rates, count=st.integers(1, 60), pair=st.lists(noises, min_size=2, max_size=2, unique=True), delta=deltas)
@pytest.mark.usefixtures("coarse")
def test_more_noise_costs_less(rate: float, count: int, pair: list[float], delta: float) -> None:
    low, high = sorted(pair)
    assert epsilon(rounds(high, rate, count), delta).reported <= epsilon(rounds(low, rate, count), delta).reported
    assert delta_of(rounds(high, rate, count), 0.5) <= delta_of(rounds(low, rate, count), 0.5) + 1e-12


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=noises, count=st.integers(1, 60), pair=st.lists(rates, min_size=2, max_size=2, unique=True))
@pytest.mark.usefixtures("coarse")
def test_rarer_contributions_cost_less(noise: float, count: int, pair: list[float]) -> None:
    low, high = sorted(pair)
    assert epsilon(rounds(noise, low, count), 1e-5).reported <= epsilon(rounds(noise, high, count), 1e-5).reported


# Who sees the cohorts


def test_without_sampling_only_participations_count() -> None:
    found = epsilon_without_sampling(rounds(2.0, 0.05, 400), 9, 1e-5)
    assert found == epsilon([Spend(Mechanism("client", "add_remove", 1, 2.0, Everyone()), 9)], 1e-5)
    assert found.reported > epsilon(rounds(2.0, 0.05, 9), 1e-5).reported
    # Never more participations than rounds.
    assert epsilon_without_sampling(rounds(2.0, 0.05, 4), 9, 1e-5) == epsilon(rounds(2.0, 1.0, 4), 1e-5)
    assert epsilon_without_sampling(rounds(2.0, 0.05, 4), 0, 1e-5) == Epsilon(0, 0)
    fixed = epsilon_without_sampling([Spend(central_fixed(1, 2.0, 5, 100), 40)], 3, 1e-5)
    assert fixed == epsilon([Spend(local(1, 2.0), 3)], 1e-5)
    with pytest.raises(ConfigError, match="give 0 or more"):
        epsilon_without_sampling(rounds(2.0, 0.05, 4), -1, 1e-5)


@pytest.mark.usefixtures("coarse")
def test_without_sampling_the_participations_with_least_noise_are_taken() -> None:
    spends = [*rounds(3.0, 0.1, 5), *rounds(1.0, 0.1, 2), *rounds(2.0, 0.1, 5)]
    worst = [*rounds(1.0, 1.0, 2), *rounds(2.0, 1.0, 1)]
    assert epsilon_without_sampling(spends, 3, 1e-5) == epsilon(worst, 1e-5)


@pytest.mark.parametrize(
    ("count", "rate", "failure"), [(200, 0.05, 1e-6), (1000, 0.01, 1e-9), (5, 0.5, 1e-3), (3, 1.0, 1e-5)]
)
def test_participations_are_exceeded_no_more_often_than_said(count: int, rate: float, failure: float) -> None:
    found = likely_participations(count, rate, failure)
    assert binom.sf(found, count, rate) <= failure
    assert found == 0 or binom.sf(found - 1, count, rate) > failure


def test_correlated_noise_is_one_gaussian_for_the_run() -> None:
    tree = Correlation("tree", num_rounds=64, max_participations=4, min_separation=16)
    mechanism = correlated(0.5, 3.0, 7.25, tree)
    assert mechanism.noise_multiplier == pytest.approx(3.0)
    assert mechanism.sigma == pytest.approx(3.0 * 7.25 * 0.5)
    assert pld_of([Spend(mechanism)], 1e-5) == pytest.approx(pld_of(rounds(3.0, 1.0, 1), 1e-5))
    # Its sensitivity has the participations in it: they are not counted a second time.
    assert epsilon_without_sampling([Spend(mechanism)], 4, 1e-5) == epsilon([Spend(mechanism)], 1e-5)
    with pytest.raises(ConfigError, match="whole run"):
        rounds_for(3.0, 1e-5, mechanism)


# Calibration


@pytest.mark.parametrize(
    ("target", "count", "sampling", "relation"),
    [
        (1.0, 10, Everyone(), "replace_one"), (0.05, 20, Poisson(0.1), "add_remove"),
        pytest.param(3.0, 50, FixedSize(20, 400), "replace_one", marks=pytest.mark.slow),
        pytest.param(60.0, 3, Poisson(0.5), "add_remove", marks=pytest.mark.slow),
        pytest.param(1e7, 1, Poisson(0.5), "add_remove", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_calibrated_noise_is_enough_and_hardly_more(
    target: float, count: int, sampling: Sampling, relation: str
) -> None:
    assert relation in CLIPPING_NORMS
    noise = noise_multiplier_for(target, 1e-5, count, sampling, relation, failure=1e-7)  # type: ignore[arg-type]

    def cost(noise: float) -> float:
        mechanism = Mechanism("client", relation, 0.3, 0.3 * noise, sampling)  # type: ignore[arg-type]
        return epsilon([Spend(mechanism, count)], 1e-5, 1e-7).reported

    assert cost(noise) <= target < cost(noise * (1 - 3e-4))


def test_rounds_for_a_budget_are_the_most() -> None:
    mechanism = central_poisson(1, 1.0, 0.05)
    found = rounds_for(2.0, 1e-5, mechanism, failure=1e-6)
    assert epsilon([Spend(mechanism, found)], 1e-5, 1e-6).reported <= 2.0
    assert epsilon([Spend(mechanism, found + 1)], 1e-5, 1e-6).reported > 2.0


def test_rounds_for_without_sampling_are_those_of_the_closed_form() -> None:
    # (2, 1e-5) takes mu = 10 / 19.938: as many rounds as fit under z^2 mu^2.
    assert rounds_for(2.0, 1e-5, local(1.0, 2 * 19.9381245)) == 100
    assert rounds_for(2.0, 1e-5, local(1.0, 2 * 19.93)) == 99
    assert rounds_for(2.0, 1e-5, local(1.0, 2.0)) == 0
    assert rounds_for(2.0, 1e-5, local(1.0, 1e6)) == accounting.MAX_ROUNDS


def test_questions_without_an_answer_are_refused() -> None:
    for budget in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="no budget"):
            noise_multiplier_for(budget, 1e-5, 10, Poisson(0.1))
        with pytest.raises(ConfigError, match="no budget"):
            rounds_for(budget, 1e-5, local(1, 1))
    with pytest.raises(ConfigError, match="at least 1"):
        noise_multiplier_for(1.0, 1e-5, 0, Poisson(0.1))
    with pytest.raises(ConfigError, match="declare relation add_remove"):
        noise_multiplier_for(1.0, 1e-5, 10, Poisson(0.1), "replace_one")
    with pytest.raises(ConfigError, match="0 or above"):
        delta_of([], -1.0)


@pytest.mark.usefixtures("coarse")
def test_a_projection_ends_with_the_epsilon_of_all_rounds() -> None:
    mechanism, before = central_poisson(1, 1.0, 0.05), rounds(2.0, 0.1, 3)
    points = projection(mechanism, 60, 1e-5, failure=1e-6, before=before, num_points=5)
    assert [point for point, _ in points] == [1, 12, 24, 36, 48, 60]
    assert points[-1][1] == epsilon([*before, Spend(mechanism, 60)], 1e-5, 1e-6)
    costs = [found.reported for _, found in points]
    assert costs == sorted(costs)
    assert [point for point, _ in projection(local(1, 9.0), 2, 1e-5)] == [1, 2]


# Delta


def test_delta_is_refused_from_one_in_n_and_warned_of_from_a_tenth_of_it() -> None:
    for delta in (1e-3, 2e-3, 0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="give"):
            check_delta(delta, 1000)
    for delta in (9.99e-4, 1.01e-4):
        warning = check_delta(delta, 1000)
        assert warning is not None
        assert "0.0001" in warning
    for delta in (1e-4, 1e-9):
        assert check_delta(delta, 1000) is None


@given(population=st.integers(1, 10**9))
def test_the_default_delta_passes_and_has_one_digit(population: int) -> None:
    delta = default_delta(population)
    assert check_delta(delta, population) is None
    assert f"{delta:.0e}" == f"{delta:e}".replace(".000000", "")
    # Down to one digit: never by more than half.
    assert delta >= 1 / (10 * population) / 2


@pytest.mark.parametrize(("population", "delta"), [(1, 0.1), (539, 1e-4), (1000, 1e-4), (3400, 2e-5), (1001, 9e-5)])
def test_the_default_delta_is_a_tenth_of_one_in_n(population: int, delta: float) -> None:
    assert default_delta(population) == delta


# Mechanisms


@pytest.mark.parametrize(
    ("mechanism", "unit", "relation", "sensitivity", "noise"),
    [
        (central_poisson(0.5, 1.2, 0.1), "client", "add_remove", 0.5, 1.2),
        (central_adaptive(0.5, 1.2, 4.0, 0.1), "client", "add_remove", 0.5, 1.2),
        (central_fixed(0.5, 1.2, 10, 100), "client", "replace_one", 1.0, 0.6),
        (local(0.5, 1.2), "client", "replace_one", 1.0, 0.6),
        (example_poisson(0.5, 1.2, 0.1), "example", "add_remove", 0.5, 1.2),
    ],
)
def test_mechanisms_declare_what_the_accountant_needs(
    mechanism: Mechanism, unit: str, relation: str, sensitivity: float, noise: float
) -> None:
    assert (mechanism.unit, mechanism.relation, mechanism.sensitivity) == (unit, relation, sensitivity)
    assert mechanism.sigma == pytest.approx(0.6)
    assert mechanism.noise_multiplier == pytest.approx(noise)
    assert CLIPPING_NORMS[mechanism.relation] * 0.5 == sensitivity


TREE = Correlation("tree", 64, 4, 16)
ALL = [
    central_poisson(0.1, 1.2, 1 / 3),
    central_adaptive(0.1, 1.2, 4.0, 0.1),
    central_fixed(0.7, 1.1, 10, 100),
    correlated(0.3, 2.0, 5.5, TREE),
    local(0.5, 1.2),
    example_poisson(0.5, 1.2, 0.01),
]


@pytest.mark.parametrize("mechanism", ALL)
def test_a_mechanism_survives_a_ledger(mechanism: Mechanism) -> None:
    assert Mechanism.from_json(json.loads(json.dumps(mechanism.to_json()))) == mechanism


def test_half_a_record_is_refused() -> None:
    good = ALL[0].to_json()
    broken = [
        {key: value for key, value in good.items() if key != "sigma"},
        {key: value for key, value in good.items() if key != "sampling"},
        good | {"more": 1},
        good | {"sigma": "1"},
        good | {"sampling": {"kind": "sortition"}},
        good | {"sampling": {"kind": "poisson"}},
        good | {"sampling": 3},
        good | {"correlation": {"kind": "tree"}},
        good | {"relation": "add"},
        good | {"unit": "silo"},
    ]
    for fields in broken:
        with pytest.raises(ConfigError):
            Mechanism.from_json(fields)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Mechanism("client", "replace_one", 2, 1, Poisson(0.1)), "declare relation add_remove"),
    (lambda: Mechanism("client", "add_remove", 1, 1, FixedSize(2, 10)), "declare relation replace_one with twice"),
    (lambda: Mechanism("client", "add_remove", 1, 1, Poisson(0.1), TREE), "everyone contributes"),
    (lambda: Mechanism("client", "replace_one", 2, 1, Everyone(), bit_sigma=3.0), "use a fixed clipping norm"),
    (lambda: Mechanism("client", "add_remove", 0, 1, Everyone()), "clip to a finite norm"),
    (lambda: Mechanism("client", "add_remove", math.inf, 1, Everyone()), "clip to a finite norm"),
    (lambda: Mechanism("client", "add_remove", math.nan, 1, Everyone()), "clip to a finite norm"),
    (lambda: Mechanism("client", "add_remove", 1, -1, Everyone()), "0 or above"),
    (lambda: Mechanism("client", "add_remove", 1, math.nan, Everyone()), "0 or above"),
    (lambda: Poisson(0.0), "above 0, at most 1"),
    (lambda: Poisson(1.1), "above 0, at most 1"),
    (lambda: Poisson(math.nan), "above 0, at most 1"),
    (lambda: FixedSize(11, 10), "from 1 to 10"),
    (lambda: FixedSize(0, 10), "from 1 to 10"),
    (lambda: replace(TREE, min_separation=0), "at least 1"),
    (lambda: central_adaptive(1.0, 2.0, 1.0, 0.1), "below 2"),
]


@pytest.mark.parametrize(("make", "cure"), REFUSED)
def test_what_no_accountant_covers_is_refused_with_the_cure(make: Callable[[], object], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        make()


# Adaptive clipping


@given(noise=st.floats(0.05, 20), factor=st.floats(0.51, 100))
def test_updates_and_bits_together_are_worth_the_noise_multiplier(noise: float, factor: float) -> None:
    bit_sigma = factor * noise
    update = split_noise(noise, bit_sigma)
    assert update >= noise
    # A query of sensitivity 1 with noise z_delta beside one of sensitivity 1/2 with noise sigma_b is one Gaussian of this ratio.
    together = math.hypot(1 / update, 0.5 / bit_sigma)
    assert 1 / together == pytest.approx(noise, rel=1e-9)


def test_adaptive_clipping_costs_what_both_releases_cost() -> None:
    mechanism = central_adaptive(0.2, 1.3, 4.0, 1.0)
    both = [
        Spend(Mechanism("client", "add_remove", 0.2, mechanism.update_sigma, Everyone())),
        Spend(Mechanism("client", "add_remove", 0.5, 4.0, Everyone())),
    ]
    assert pld_of([Spend(mechanism)], 1e-5) == pytest.approx(pld_of(both, 1e-5), rel=1e-9)
    assert mechanism.update_sigma > mechanism.sigma == pytest.approx(0.26)
    assert central_poisson(0.2, 1.3, 0.5).update_sigma == pytest.approx(0.26)


@pytest.mark.parametrize("bit_sigma", [0.5, 0.4, 0.0, -1.0, math.nan])
def test_bits_that_cost_all_are_refused(bit_sigma: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0\.5, better 2\.5"):
        split_noise(1.0, bit_sigma)


def test_the_default_noise_on_bits_hardly_costs_the_updates_anything() -> None:
    assert default_bit_sigma(1.0, 0.1, 539) == pytest.approx(2.695)
    assert default_bit_sigma(2.0, 0.1, 100) == 5.0
    assert split_noise(2.0, default_bit_sigma(2.0, 0.1, 100)) <= 2.0 * 1.0207
    assert split_noise(0.0, 1.0) == 0.0


# Words


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("mechanism", ALL)
def test_a_claim_says_what_a_reviewer_asks_for(mechanism: Mechanism) -> None:
    spends = [Spend(mechanism, 1)]
    found = epsilon(spends, 1e-5, distance=1e-12)
    text = claim(spends, found, 1e-5, 1e-12)
    quoted = re.match(r"\(([0-9.]+), 1e-05\)-differential privacy", text)
    assert quoted is not None
    assert found.reported <= float(quoted[1]) <= found.reported * 1.001
    assert mechanism.unit in text
    assert {"add_remove": "adding or removing one", "replace_one": "replacing one"}[mechanism.relation] in text
    assert f"L2 sensitivity {mechanism.sensitivity:.6g}" in text
    assert ("Renyi differential privacy (dp-accounting)" if found.pld is None else "privacy loss distributions") in text
    assert {Poisson: "Poisson", FixedSize: "without replacement", Everyone: "No amplification"}[
        type(mechanism.sampling)
    ] in text
    assert f"{(1 + math.exp(found.reported)) * 1e-12:.2g} of delta being for noise" in text
    assert "Assumed:" in text


@given(value=st.floats(1e-6, 1e6), digits=st.integers(1, 12))
def test_figures_are_rounded_up(value: float, digits: int) -> None:
    shown = rounded_up(value, digits)
    assert value * (1 - 1e-15) <= shown <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-15)
    assert rounded_up(shown, digits) == shown


def test_a_claim_without_noise_claims_nothing() -> None:
    spends = [Spend(local(1.0, 0.0), 3)]
    assert claim(spends, epsilon(spends, 1e-5), 1e-5).startswith("No differential privacy: 3 releases")
    assert claim([], epsilon([], 1e-5), 1e-5) == "Nothing that depends on the data has been released."


def test_the_modules_load_neither_torch_nor_the_accountant() -> None:
    code = (
        "import sys, fed_core.privacy.mechanism, fed_core.privacy.accounting\n"
        "print(sorted({'torch', 'dp_accounting', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
