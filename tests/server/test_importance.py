"""Draws by importance: the chances that were meant, and an update that is right on average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from math import fsum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_server.rounds.cohort import ImportancePolicy, draw, draw_by_importance
from fed_server.rounds.importance import Chances, SiteReport, chances_of, correction_of, shares_of, systematic

LOSSES = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
REPORTS = st.lists(
    st.one_of(st.none(), st.builds(SiteReport, st.just(1), LOSSES, st.integers(1, 10**6))), min_size=1, max_size=20
)


def named(reports: list[SiteReport | None]) -> tuple[list[str], dict[str, SiteReport]]:
    names = [f"site-{i:02}" for i in range(len(reports))]
    return names, {name: report for name, report in zip(names, reports, strict=True) if report is not None}


def sites(losses: Mapping[str, float], num_examples: int = 1) -> dict[str, SiteReport]:
    return {name: SiteReport(1, loss, num_examples) for name, loss in losses.items()}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 8))
def test_a_systematic_draw_has_the_chances_that_were_meant_and_nobody_twice(sizes: list[int], count: int) -> None:
    """All starts there are, so nothing is left to luck."""
    from fed_server.rounds.importance import _cut

    names = [f"s{i}" for i in range(len(sizes))]
    chances = _cut(dict(zip(names, sizes, strict=True)), min(count, len(names)))
    total = sum(chances.sizes.values())
    met = dict.fromkeys(names, 0)
    for start in range(total):
        drawn = systematic([name for name in names if name in chances.sizes], chances, start)
        assert len(drawn) == len(set(drawn)) == chances.num_drawn
        for name in drawn:
            met[name] += 1
    for name in chances.sizes:
        assert Fraction(met[name], total) == chances.of(name)
    assert sum(chances.of(name) for name in names) == min(count, len(names))


@given(REPORTS, st.integers(1, 20), st.floats(0.01, 1), st.booleans())
def test_the_expected_update_is_that_of_all_sites(
    reports: list[SiteReport | None], count: int, equal_part: float, by_examples: bool
) -> None:
    """sum of c_i * (q_i / c_i) u_i over everybody, exactly: no chance is nought, and all chances make up the cohort."""
    names, known = named(reports)
    shares = shares_of(names, known, {}, by_examples=by_examples)
    count = min(count, len(names))
    chances = chances_of(shares, known, count, equal_part)
    assert all(0 < chances.of(name) <= 1 for name in names)
    assert sum(chances.of(name) for name in names) == count
    assert fsum(shares.values()) == pytest.approx(1)


@given(REPORTS, st.integers(1, 20), st.sampled_from([0.05, 0.2, 1.0]))
def test_nobody_counts_more_than_the_equal_part_allows(
    reports: list[SiteReport | None], count: int, equal_part: float
) -> None:
    names, known = named(reports)
    shares = shares_of(names, known, {}, by_examples=False)
    chances = chances_of(shares, known, min(count, len(names)), equal_part)
    correction = correction_of(names, shares, chances, 2**20)
    for name in names:
        weight = len(names) * Fraction(shares[name]) / chances.of(name)
        assert correction.weights[name] == pytest.approx(float(weight * correction.unit), abs=1)
        assert 1 <= correction.weights[name] <= 2**20
        # K q / c with c = K p, where it is not cut at 1.
        if name not in chances.certain:
            assert shares[name] / float(chances.of(name)) * min(count, len(names)) <= 1.0001 / equal_part


def test_the_mean_of_many_rounds_is_the_mean_of_all_sites_and_without_the_correction_it_is_not() -> None:
    losses = {f"s{i}": 0.1 * (i + 1) for i in range(10)}
    updates = {f"s{i}": float(i * i) for i in range(10)}
    policy = ImportancePolicy(sites(losses), 0.2, {}, False, 2**20)
    truth = fsum(updates.values()) / 10
    rounds, count = 4000, 3
    corrected, plain, ratio = [], [], []
    for round in range(1, rounds + 1):
        cohort, correction = draw_by_importance(5, round, list(updates), count, policy)
        assert len(cohort) == count
        corrected.append(fsum(correction.weights[n] * updates[n] for n in cohort) / (correction.unit * count))
        ratio.append(
            fsum(correction.weights[n] * updates[n] for n in cohort) / fsum(correction.weights[n] for n in cohort)
        )
        plain.append(fsum(updates[n] for n in cohort) / count)

    def mean_and_error(values: list[float]) -> tuple[float, float]:
        mean = fsum(values) / rounds
        return mean, math.sqrt(fsum((v - mean) ** 2 for v in values) / rounds / rounds)

    mean, error = mean_and_error(corrected)
    assert abs(mean - truth) < 4 * error
    assert error < truth / 50  # or the line above would say little
    mean, error = mean_and_error(plain)
    assert mean - truth > 10 * error


def test_where_updates_are_as_long_as_losses_are_large_the_mean_scatters_less_than_by_a_random_draw() -> None:
    losses = {f"s{i:02}": 1.25**i / 10 for i in range(20)}
    updates = {name: loss * (-1) ** i for i, (name, loss) in enumerate(losses.items())}
    policy = ImportancePolicy(sites(losses), 0.2, {}, False, 2**20)
    truth = fsum(updates.values()) / len(updates)
    by_importance = by_chance = 0.0
    for round in range(1, 1001):
        cohort, correction = draw_by_importance(5, round, list(updates), 5, policy)
        by_importance += (fsum(correction.weights[n] * updates[n] for n in cohort) / (correction.unit * 5) - truth) ** 2
        by_chance += (fsum(updates[n] for n in draw(5, round, list(updates), 5)) / 5 - truth) ** 2
    assert by_importance < by_chance / 2


def test_sites_are_drawn_as_often_as_their_chances_say() -> None:
    losses = {f"s{i}": 0.1 * (i + 1) for i in range(10)}
    policy = ImportancePolicy(sites(losses), 0.2, {}, False, 2**20)
    times = dict.fromkeys(losses, 0)
    rounds = 4000
    for round in range(1, rounds + 1):
        cohort, correction = draw_by_importance(11, round, list(losses), 3, policy)
        for name in cohort:
            times[name] += 1
            assert correction.chances[name] == pytest.approx(3 * (0.02 + 0.08 * losses[name] / 0.55))
    for name, loss in losses.items():
        chance = 3 * (0.02 + 0.08 * loss / 0.55)
        assert abs(times[name] - rounds * chance) < 4.5 * math.sqrt(rounds * chance * (1 - chance))


@given(REPORTS, st.integers(0, 2**63 - 1), st.integers(1, 20), st.randoms())
@settings(max_examples=50)
def test_a_draw_does_not_depend_on_the_order_in_which_sites_are_named(
    reports: list[SiteReport | None], seed: int, count: int, random: object
) -> None:
    names, known = named(reports)
    policy = ImportancePolicy(known, 0.2, {}, True, 2**20)
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    drawn = draw_by_importance(seed, 3, names, count, policy)
    assert draw_by_importance(seed, 3, shuffled, count, policy) == drawn
    assert len(set(drawn[0])) == len(drawn[0]) == min(count, len(names))


def test_sites_that_were_never_heard_of_have_the_mean_loss_and_the_mean_number_of_examples() -> None:
    reports = {"a": SiteReport(1, 1.0, 10), "b": SiteReport(1, 3.0, 30)}
    shares = shares_of(["a", "b", "new"], reports, {}, by_examples=True)
    assert shares == {"a": 1 / 6, "b": 1 / 2, "new": 1 / 3}
    chances = chances_of(shares, reports, 1, 0.2)
    mean = (1.0 * 10 + 3.0 * 30) / 40
    assert float(chances.of("new")) == pytest.approx(1 / 3)
    assert float(chances.of("a")) == pytest.approx(1 / 6 * (0.2 + 0.8 * 1.0 / mean))


def test_what_the_operator_says_of_a_site_is_part_of_its_share() -> None:
    assert shares_of(["a", "b"], {}, {"a": 3}, by_examples=False) == {"a": 0.75, "b": 0.25}


def test_a_cohort_of_everybody_is_the_plain_mean() -> None:
    reports = sites({"a": 0.1, "b": 5.0})
    cohort, correction = draw_by_importance(1, 1, ["a", "b"], 2, ImportancePolicy(reports, 0.2, {}, False, 2**20))
    assert cohort == ["a", "b"]
    assert set(correction.weights.values()) == {correction.unit}
    assert correction.chances == {"a": 1.0, "b": 1.0}


def test_who_is_certain_leaves_the_other_places_to_the_rest() -> None:
    chances = chances_of({"a": 0.9, "b": 0.05, "c": 0.05}, {}, 2, 1.0)
    assert chances == Chances(frozenset({"a"}), chances.sizes, 1)
    assert chances.of("b") == chances.of("c") == Fraction(1, 2)
