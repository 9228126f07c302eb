"""Correlated noise: what one client can move, against every participation pattern, and what the noise adds up to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_core.errors import ConfigError
from fed_core.privacy.banded import (
    MAX_BUFFERS,
    BandedInverseRoot,
    BandedRoot,
    BufferedToeplitz,
    _Toeplitz,
    inverse_root_coefficients,
    inverse_series,
    optimize_buffered,
    root_coefficients,
)
from fed_core.privacy.correlated import FACTORIZATIONS, Factorization, from_json, max_error, rms_error
from fed_core.privacy.sensitivity import Floats, toeplitz_sensitivity
from fed_core.privacy.tree import BinaryTree, prefix_nodes

SOME_BUFFERS = BufferedToeplitz(13, (0.95, 0.7, 0.0), (0.1, 0.3, 0.2))
SMALL: list[Factorization] = [
    BinaryTree(1),
    BinaryTree(8),
    BinaryTree(13),
    BandedInverseRoot(13, 1),
    BandedInverseRoot(13, 4),
    BandedInverseRoot(13, 13),
    BandedRoot(13, 1),
    BandedRoot(13, 4),
    BandedRoot(13, 13),
    SOME_BUFFERS,
    BufferedToeplitz(13, (0.9,), (1.0,)),
]
EVERY_SMALL = pytest.mark.parametrize("factorization", SMALL, ids=repr)


@cache
def every_pattern(num_rounds: int, separation: int) -> Floats:
    """All participation patterns with any number of participations, one a row of ones and zeros."""
    if num_rounds <= 0:
        return np.zeros((1, 0))
    without = np.pad(every_pattern(num_rounds - 1, separation), ((0, 0), (0, 1)))
    earlier = every_pattern(num_rounds - separation, separation)
    last = np.pad(earlier, ((0, 0), (0, num_rounds - earlier.shape[1])))
    last[:, -1] = 1
    return np.concatenate([without, last])


def largest_square(gram: Floats, separation: int, participations: int) -> float:
    """Largest sum of |Gram| entries over all patterns: no vectors of norm at most 1 give more, and where no entry is negative,
    equal ones give as much."""
    patterns = every_pattern(len(gram), separation)
    patterns = patterns[patterns.sum(axis=1) <= participations]
    return float(((patterns @ np.abs(gram)) * patterns).sum(axis=1).max())


def inverse_of(factorization: Factorization) -> Floats:
    """C^-1, out of the noise weights."""
    matrix = np.zeros((factorization.num_rounds, factorization.num_rounds))
    for t in range(factorization.num_rounds):
        for seed, weight in factorization.noise_weights(t).items():
            matrix[t, seed] = weight
    return matrix


def toeplitz(column: Floats) -> Floats:
    matrix = np.zeros((len(column), len(column)))
    for j in range(len(column)):
        matrix[j:, j] = column[: len(column) - j]
    return matrix


def schemas(num_rounds: int) -> Iterator[tuple[int, int]]:
    """(separation, participations), with some that the rounds have no room for."""
    for separation in range(1, num_rounds + 2):
        for participations in range(1, -(-num_rounds // separation) + 2):
            yield separation, participations


# The patterns, and the worst of them.


def test_the_patterns_are_all_sets_of_rounds_that_lie_apart() -> None:
    found = {tuple(np.flatnonzero(row).tolist()) for row in every_pattern(5, 2)}
    pairs = {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    assert found == {(), (0,), (1,), (2,), (3,), (4,), (0, 2, 4)} | pairs
    assert len(every_pattern(5, 1)) == 32
    assert len(every_pattern(5, 6)) == 6


@EVERY_SMALL
def test_sensitivity_is_that_of_the_worst_pattern(factorization: Factorization) -> None:
    matrix = np.linalg.inv(inverse_of(factorization))
    gram = matrix.T @ matrix
    assert gram.min() > -1e-12  # so that the oracle is exact, not a bound
    for separation, participations in schemas(factorization.num_rounds):
        found = factorization.sensitivity(separation, participations)
        assert found == pytest.approx(sqrt(largest_square(gram, separation, participations)), rel=1e-12)


@EVERY_SMALL
def test_no_vectors_move_more_than_the_sensitivity_and_equal_ones_reach_it(factorization: Factorization) -> None:
    rng = np.random.default_rng(5)
    matrix = np.linalg.inv(inverse_of(factorization))
    bound = factorization.sensitivity(3, 4)
    patterns = [np.flatnonzero(row) for row in every_pattern(factorization.num_rounds, 3) if row.sum() <= 4]
    for _ in range(300):
        rounds = patterns[rng.integers(len(patterns))]
        vectors = rng.normal(size=(len(rounds), 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.linalg.norm(matrix[:, rounds] @ vectors) <= bound * (1 + 1e-12)
    unit = np.array([[0.6, 0.0, -0.8]])
    equal = max(np.linalg.norm(matrix[:, rounds].sum(axis=1, keepdims=True) @ unit) for rounds in patterns)
    assert equal == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("num_rounds", [*range(1, 15), 16, 21, 28, 32])
@pytest.mark.parametrize("every_node", [False, True])
def test_a_trees_sensitivity_is_that_of_the_worst_pattern(num_rounds: int, every_node: bool) -> None:
    num_levels = (num_rounds - 1).bit_length() + 1
    rows = []
    for level in range(num_levels):
        for node in range(1 << (num_levels - 1 - level)):
            first, end = node << level, (node + 1) << level
            if every_node or (node % 2 == 0 and end <= num_rounds):
                rows.append([float(first <= t < end) for t in range(num_rounds)])
    matrix = np.array(rows)
    tree = BinaryTree(num_rounds, every_node)
    for separation, participations in schemas(num_rounds):
        if num_rounds > 14 and separation < 5:
            continue
        expected = sqrt(largest_square(matrix.T @ matrix, separation, participations))
        assert tree.sensitivity(separation, participations) == pytest.approx(expected, rel=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 9), st.booleans(), st.integers(0, 2**32))
def test_no_random_pattern_moves_a_larger_tree_more(
    num_rounds: int, separation: int, participations: int, every_node: bool, seed: int
) -> None:
    bound = BinaryTree(num_rounds, every_node).sensitivity(separation, participations) ** 2
    rng = np.random.default_rng(seed)
    for _ in range(20):
        t, rounds = int(rng.integers(separation)), []
        while t < num_rounds and len(rounds) < participations:
            rounds.append(t)
            t += separation + int(rng.integers(1 + separation // 2))
        square = 0
        for level in range((num_rounds - 1).bit_length() + 1):
            counts = np.bincount([t >> level for t in rounds])
            for node, count in enumerate(counts.tolist()):
                if every_node or (node % 2 == 0 and (node + 1) << level <= num_rounds):
                    square += count**2
        assert square <= bound + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 4))
def test_any_column_gets_an_upper_bound(column: list[float], separation: int, participations: int) -> None:
    matrix = toeplitz(np.array(column))
    square = largest_square(matrix.T @ matrix, separation, participations)
    assert toeplitz_sensitivity(np.array(column), separation, participations) >= sqrt(square) * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 4))
def test_a_column_that_never_rises_gets_its_exact_sensitivity(
    column: list[float], separation: int, participations: int
) -> None:
    falling = np.sort(np.array(column))[::-1]
    matrix = toeplitz(falling)
    square = largest_square(matrix.T @ matrix, separation, participations)
    assert toeplitz_sensitivity(falling, separation, participations) == pytest.approx(sqrt(square), rel=1e-12)


def test_columns_with_no_band_in_common_add_up_as_right_angles() -> None:
    for bands, separation, participations in [(4, 4, 5), (3, 10, 9), (16, 20, 3)]:
        factorization = BandedRoot(100, bands)
        norm = np.linalg.norm(root_coefficients(bands))
        assert factorization.sensitivity(separation, participations) == pytest.approx(sqrt(participations) * norm)


@pytest.mark.parametrize("bands", [*range(1, 40), 64, 100, 256, 1000])
def test_no_column_rises(bands: int) -> None:
    for factorization in (BandedInverseRoot(1000, bands), BandedRoot(1000, bands)):
        assert (factorization.column >= 0).all()
        assert (np.diff(factorization.column) <= 0).all()


# What the noise adds up to.


@EVERY_SMALL
def test_prefix_variance_is_the_squared_norm_of_the_prefixs_weights(factorization: Factorization) -> None:
    prefixes = np.cumsum(inverse_of(factorization), axis=0)
    for t, row in enumerate(prefixes):
        assert factorization.prefix_variance(t) == pytest.approx(row @ row, rel=1e-12)


@EVERY_SMALL
def test_every_round_brings_its_own_seed_and_draws_no_more_than_it_says(factorization: Factorization) -> None:
    weights = [factorization.noise_weights(t) for t in range(factorization.num_rounds)]
    for t, row in enumerate(weights):
        assert row[t] == 1
        assert max(row) == t
    assert max(map(len, weights)) == factorization.num_draws


@EVERY_SMALL
def test_prefix_noise_of_real_draws_has_the_variance_it_says(factorization: Factorization) -> None:
    z = np.random.default_rng(7).normal(size=(factorization.num_rounds, 20_000))
    prefixes = np.cumsum(inverse_of(factorization) @ z, axis=0)
    variances = [factorization.prefix_variance(t) for t in range(factorization.num_rounds)]
    np.testing.assert_allclose(prefixes.var(axis=1), variances, rtol=0.06)  # six standard deviations


def test_a_prefix_of_the_tree_is_its_dyadic_blocks() -> None:
    for t in range(200):
        rounds: list[int] = []
        for node in prefix_nodes(t):
            length = (node + 1) & -(node + 1)
            rounds += range(node + 1 - length, node + 1)
        assert sorted(rounds) == list(range(t + 1))
        assert len(prefix_nodes(t)) == (t + 1).bit_count()


def test_nodes_of_the_tree_leave_when_a_larger_one_takes_their_place() -> None:
    tree = BinaryTree(16)
    assert tree.noise_weights(4) == {4: 1}
    assert tree.noise_weights(5) == {5: 1, 4: -1}
    assert tree.noise_weights(7) == {7: 1, 6: -1, 5: -1, 3: -1}
    held: set[int] = set()
    for t in range(16):
        for node, weight in tree.noise_weights(t).items():
            held.add(node) if weight > 0 else held.remove(node)
        assert held == set(prefix_nodes(t))
        assert t == 15 or len(held) <= tree.num_buffers


def test_both_series_are_roots_of_what_they_should_be() -> None:
    root, inverse = root_coefficients(300), inverse_root_coefficients(300)
    np.testing.assert_allclose(np.convolve(root, root)[:300], 1, rtol=1e-12)
    np.testing.assert_allclose(inverse_series(root, 300), inverse, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(inverse_series(inverse, 300), root, rtol=1e-12)


def test_the_inverse_of_a_series_times_the_series_is_one() -> None:
    for factorization in (BandedInverseRoot(500, 7), BandedRoot(500, 7), replace(SOME_BUFFERS, num_rounds=500)):
        product = np.convolve(factorization.column, factorization.inverse)[:500]
        np.testing.assert_allclose(product, np.eye(500)[0], atol=1e-13)


def noise_from_buffers(factorization: _Toeplitz, z: Floats) -> Floats:
    """What the module's recurrences make of fresh noise, with no more than `num_buffers` rows kept."""
    out = np.zeros_like(z)
    if isinstance(factorization, BufferedToeplitz):
        buffers = np.zeros((factorization.num_buffers, z.shape[1]))
        decays, scales = np.array(factorization.decays), np.array(factorization.scales)
        for t in range(len(z)):
            out[t] = z[t] - scales @ buffers
            buffers = decays[:, None] * buffers + out[t]
        return out
    coefficients = factorization.inverse if isinstance(factorization, BandedInverseRoot) else -factorization.column
    past = z if isinstance(factorization, BandedInverseRoot) else out
    for t in range(len(z)):
        kept = range(1, min(t, factorization.num_buffers) + 1)
        out[t] = z[t] + sum(coefficients[j] * past[t - j] for j in kept)
    return out


@EVERY_SMALL
def test_the_recurrences_give_the_same_noise_as_the_weights(factorization: Factorization) -> None:
    if isinstance(factorization, _Toeplitz):
        z = np.random.default_rng(3).normal(size=(factorization.num_rounds, 5))
        np.testing.assert_allclose(
            noise_from_buffers(factorization, z), inverse_of(factorization) @ z, rtol=0, atol=1e-13
        )


def test_one_band_is_independent_noise() -> None:
    for factorization in (BandedInverseRoot(50, 1), BandedRoot(50, 1)):
        assert factorization.noise_weights(49) == {49: 1}
        assert (factorization.num_buffers, factorization.num_draws) == (0, 1)
        assert factorization.sensitivity(10, 3) == pytest.approx(sqrt(3))
        assert max_error(factorization, 50, 1) == pytest.approx(sqrt(50))


# On a grid.


def centres(factorization: Factorization, updates: Floats, releases: Floats) -> Floats:
    """Whole numbers around which each round's release is distributed, given the releases before it."""
    found, z = np.zeros_like(updates), np.zeros_like(updates)
    for t in range(factorization.num_rounds):
        weights = factorization.noise_weights(t)
        earlier = sum((weight * z[seed] for seed, weight in weights.items() if seed != t), np.zeros(updates.shape[1]))
        found[t] = updates[t] + np.rint(earlier)
        z[t] = releases[t] - found[t]
    return found


@EVERY_SMALL
@pytest.mark.parametrize("largest", [0, 1, 1000])
def test_whole_numbers_move_no_more_than_their_rounding_may(factorization: Factorization, largest: int) -> None:
    rng = np.random.default_rng(largest)
    shape = factorization.num_rounds, 50
    for _ in range(5):
        rounds = np.arange(rng.integers(3), factorization.num_rounds, 3)
        client = np.zeros(shape)
        client[rounds] = rng.integers(-largest, largest + 1, (len(rounds), 50))
        others, releases = rng.integers(-1000, 1000, shape), rng.integers(-(10**6), 10**6, shape)
        found = centres(factorization, others + client, releases) - centres(factorization, others + 0.0, releases)
        norm = np.linalg.norm(client, axis=1).max()
        bound = factorization.sensitivity(3, 5) * norm + factorization.rounding_sensitivity(50)
        assert np.linalg.norm(found) <= bound * (1 + 1e-12)
        exact = np.linalg.inv(inverse_of(factorization)) @ client
        assert np.linalg.norm(found - exact) <= factorization.rounding_sensitivity(50) + 1e-6 * norm


def test_rounding_does_move_what_is_not_a_whole_number() -> None:
    """Without the allowance, the claim would be wrong: one step of one client grows to several."""
    client = np.zeros((13, 500))
    client[0] = 1
    releases = np.random.default_rng(1).integers(-(10**6), 10**6, client.shape)
    factorization = BandedInverseRoot(13, 4)
    found = centres(factorization, client, releases) - centres(factorization, 0 * client, releases)
    assert np.linalg.norm(found) > 1.05 * factorization.sensitivity(13, 1) * sqrt(500)


# At equal privacy.


@dataclass(frozen=True)
class Published:
    """Prefix noise at equal privacy over 1,024 rounds, as this project's survey of mechanisms has it."""

    separation: int
    participations: int
    independent: float
    tree: float
    root: float
    banded: float


PUBLISHED = [
    Published(1024, 1, 22.6, 7.4, 3.11, 3.11),
    Published(128, 8, 64.0, 29.7, 13.0, 10.3),
    Published(32, 32, 128.1, 104.3, 45.7, 31.3),
]
EVERY_PUBLISHED = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.separation}-{row.participations}")


@EVERY_PUBLISHED
def test_prefix_errors_are_those_published(row: Published) -> None:
    def error(factorization: Factorization) -> float:
        return rms_error(factorization, row.separation, row.participations)

    assert error(BandedRoot(1024, 1)) == pytest.approx(row.independent, abs=0.05)
    assert error(BinaryTree(1024, every_node=True)) == pytest.approx(row.tree, abs=0.05)
    assert error(BandedRoot(1024, 1024)) == pytest.approx(row.root, abs=0.05 if row.root > 10 else 0.005)
    assert error(BandedRoot(1024, row.separation)) == pytest.approx(row.banded, abs=0.05 if row.banded > 10 else 0.005)
    assert error(BandedInverseRoot(1024, 1024)) == pytest.approx(error(BandedRoot(1024, 1024)), rel=1e-9)


def test_nodes_that_nobody_draws_cost_nothing() -> None:
    """Right children are part of the published tree, and of no prefix: without them a client that comes back moves less."""
    errors = [rms_error(BinaryTree(1024), row.separation, row.participations) for row in PUBLISHED]
    assert errors == pytest.approx([7.417, 27.206, 91.660], abs=5e-4)


@EVERY_PUBLISHED
def test_two_buffers_do_as_well_as_a_band_for_every_round_of_the_separation(row: Published) -> None:
    found = optimize_buffered(1024, row.separation, row.participations, max_buffers=2)
    assert rms_error(found, row.separation, row.participations) < 1.05 * row.banded
    small = BandedInverseRoot(1024, MAX_BUFFERS + 1)
    assert rms_error(found, row.separation, row.participations) < rms_error(small, row.separation, row.participations)


def test_one_round_costs_one_release_under_every_factorization() -> None:
    for factorization in (BinaryTree(1), BandedInverseRoot(1, 1), BandedRoot(1, 1), optimize_buffered(1, 1, 1)):
        assert rms_error(factorization, 1, 1) == pytest.approx(1)


# The search for buffers.


@pytest.mark.parametrize(
    ("num_rounds", "separation", "participations"), [(2, 1, 1), (40, 7, 3), (50, 1, 50), (50, 49, 2)]
)
def test_the_search_finds_no_more_noise_than_independent(num_rounds: int, separation: int, participations: int) -> None:
    found = optimize_buffered(num_rounds, separation, participations, 2)
    independent = rms_error(BandedRoot(num_rounds, 1), separation, participations)
    assert rms_error(found, separation, participations) < 1.0001 * independent


def test_the_search_takes_no_buffers_that_hardly_help() -> None:
    errors = []
    for max_buffers in (1, 2, 3):
        found = optimize_buffered(200, 200, 1, max_buffers)
        errors.append((found.num_buffers, rms_error(found, 200, 1)))
    assert errors[1][0] == 2
    assert errors[1][1] < 0.99 * errors[0][1]
    assert errors[2] == errors[1]


def test_the_search_minimizes_what_it_is_asked_to() -> None:
    rms, largest = (optimize_buffered(200, 20, 10, 2, objective) for objective in ("rms", "max"))
    assert rms_error(rms, 20, 10) < rms_error(largest, 20, 10)
    assert max_error(largest, 20, 10) < max_error(rms, 20, 10)


def test_the_search_ends_where_no_parameter_helps() -> None:
    found = optimize_buffered(200, 20, 10, 1)
    least = rms_error(found, 20, 10)
    for decay_factor, scale_factor in [(0.99, 1), (1.01, 1), (1, 0.98), (1, 1.02)]:
        other = BufferedToeplitz(200, (found.decays[0] * decay_factor,), (found.scales[0] * scale_factor,))
        assert rms_error(other, 20, 10) > least


def test_the_search_gives_the_same_bits_twice() -> None:
    assert optimize_buffered(100, 10, 5, 2) == optimize_buffered(100, 10, 5, 2)


# Storage and bad input.


@EVERY_SMALL
def test_a_factorization_survives_storage(factorization: Factorization) -> None:
    again = from_json(json.loads(json.dumps(factorization.to_json())))
    assert again == factorization
    assert again.sensitivity(3, 2) == factorization.sensitivity(3, 2)


def test_every_kind_is_in_the_table_and_in_the_tests() -> None:
    assert {factorization.name for factorization in SMALL} == set(FACTORIZATIONS)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"name": "wavelet", "num_rounds": 4}, "no factorization 'wavelet'"),
        ({"num_rounds": 4}, "no factorization None"),
        ({"name": "tree"}, "to_json"),
        ({"name": "tree", "num_rounds": 4, "bands": 2}, "to_json"),
        ({"name": "tree", "num_rounds": "4"}, "to_json"),
        ({"name": "tree", "num_rounds": 0}, "num_rounds is 0"),
        ({"name": "banded-root", "num_rounds": 4, "bands": 0}, "bands is 0"),
        ({"name": "banded-inverse-root", "num_rounds": 4, "bands": 5}, "bands is 5"),
        ({"name": "buffered", "num_rounds": 0, "decays": [0.5], "scales": [0.5]}, "num_rounds is 0"),
        ({"name": "buffered", "num_rounds": 4, "decays": [], "scales": []}, "0 decays"),
        ({"name": "buffered", "num_rounds": 4, "decays": [0.1] * 9, "scales": [0.1] * 9}, "9 decays"),
        ({"name": "buffered", "num_rounds": 4, "decays": [0.5, 0.4], "scales": [0.5]}, "1 scales"),
        ({"name": "buffered", "num_rounds": 4, "decays": [1.0], "scales": [0.5]}, "below 1"),
        ({"name": "buffered", "num_rounds": 4, "decays": [float("nan")], "scales": [0.5]}, "below 1"),
        ({"name": "buffered", "num_rounds": 4, "decays": [0.5, 0.6], "scales": [0.5, 0.6]}, "sum"),
        ({"name": "buffered", "num_rounds": 4, "decays": [0.5], "scales": [-0.5]}, "sum"),
    ],
)
def test_parameters_that_make_no_factorization_are_refused(stored: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_json(stored)


@EVERY_SMALL
def test_a_schema_that_means_nothing_is_refused(factorization: Factorization) -> None:
    with pytest.raises(ConfigError, match="separation is 0"):
        factorization.sensitivity(0, 1)
    with pytest.raises(ConfigError, match="participations is 0"):
        factorization.sensitivity(1, 0)


def test_a_search_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_buffers is 9"):
        optimize_buffered(10, 1, 1, 9)
    with pytest.raises(ConfigError, match="num_rounds is 0"):
        optimize_buffered(0, 1, 1)
