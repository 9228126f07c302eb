"""Noise on a grid: its distribution against the ideal one, exactly where that can be computed, and what a stream refuses."""

from __future__ import annotations

import copy
import math
import os
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fed_core.errors import InvalidError
from fed_core.privacy import noise
from fed_core.privacy.noise import (
    HIGHEST_STD,
    MAX_STD,
    MIN_STD,
    RADIX,
    REACH,
    GridGaussian,
    NoiseStream,
    Table,
    Words,
    alias_table,
    discrete_gaussian,
    joint_distance,
    rounded_gaussian,
)

Floats = NDArray[np.float64]

KEY = bytes(range(32))
CENTRAL = 2**16.5
STDS = (0.5, 0.73, 1.0, 3.7, 40.0, 150.0, 200.0, 200.1, 333.3, 6400.0, 6401.0, 2.0**16, CENTRAL, 204_801.0, MAX_STD)


def weights_of(table: Table) -> dict[int, int]:
    """What each value of a table weighs, in 2^-128, read off its buckets one by one."""
    weights: dict[int, int] = {}
    for bucket, (limit, rest) in enumerate(zip(table.limits.tolist(), table.rests.tolist(), strict=True)):
        own = ((limit - (bucket << 52)) << 64) + rest
        assert 0 <= own < 2**116
        for value, weight in zip(table.values[2 * bucket : 2 * bucket + 2].tolist(), (2**116 - own, own), strict=True):
            weights[int(value)] = weights.get(int(value), 0) + weight
    return weights


def pmf_of(table: Table, scale: int) -> Floats:
    """Probabilities of -REACH .. REACH times the scale."""
    weights = weights_of(table)
    return np.array([weights.get(k * scale, 0) / 2**128 for k in range(-REACH, REACH + 1)])


def spread(upper: Floats, lower: Floats, stride: int) -> Floats:
    """Distribution of stride * U + L, term by term; both arrays are centred."""
    total = np.zeros(stride * (len(upper) - 1) + len(lower))
    for place, weight in enumerate(upper):
        if weight:
            total[stride * place : stride * place + len(lower)] += weight * lower
    return total


def composed_pmf(gaussian: GridGaussian) -> Floats:
    pmf = pmf_of(gaussian.tables[0], 1)
    for level, table in enumerate(gaussian.tables[1:], start=1):
        pmf = spread(pmf_of(table, RADIX**level), pmf, RADIX**level)
    return pmf


def ideal_pmf(std: float, reach: int) -> Floats:
    """round(N(0, std^2)) on -reach .. reach: by erfc, or where cells are narrow by the density and its derivatives."""
    k = np.arange(reach + 1)
    if std < 50:
        tails = [math.erfc((i - 0.5) / std / math.sqrt(2)) for i in range(reach + 2)]
        half = np.array([math.erf(0.5 / std / math.sqrt(2)), *((tails[i] - tails[i + 1]) / 2 for i in k[1:])])
    else:
        x = k / std
        correction = (x**2 - 1) / (24 * std**2) + (x**4 - 6 * x**2 + 3) / (1920 * std**4)
        half = np.exp(-(x**2) / 2) / (std * math.sqrt(2 * math.pi)) * (1 + correction)
    return np.concatenate([half[:0:-1], half])


def distance(p: Floats, q: Floats) -> float:
    return float(np.abs(p - q).sum() / 2)


class Given(NoiseStream):
    """A stream of words that a test chose."""

    def __init__(self, words: list[int]) -> None:
        super().__init__()
        self.left = list(words)
        self.spares: list[int] = []

    def fill(self, out: Words) -> None:
        out.reshape(-1)[:] = np.array([self.left.pop(0) for _ in range(out.size)], np.uint64)

    def spare(self) -> int:
        return self.spares.pop(0) if self.spares else 0


# The distribution


@pytest.mark.parametrize("std", STDS)
def test_probabilities_are_symmetric_and_make_one_exactly(std: float) -> None:
    for table in GridGaussian(std).tables:
        weights = weights_of(table)
        assert sum(weights.values()) == 2**128
        assert all(weights.get(-value, 0) == weight for value, weight in weights.items())


@pytest.mark.parametrize("std", [0.5, 0.73, 1.0, 3.7, 40.0, 150.0, 200.0, 200.1, 333.3, 1000.0, 6400.0, CENTRAL])
def test_the_sum_of_all_levels_is_the_rounded_gaussian(std: float) -> None:
    gaussian = GridGaussian(std)
    pmf = composed_pmf(gaussian)
    ideal = ideal_pmf(std, len(pmf) // 2)
    # The failure is below 2^-77: what floats can see of the rest is their own error.
    assert distance(pmf, ideal) < gaussian.failure(1) + 1e-14
    middle = slice(max(0, len(pmf) // 2 - int(7 * std)), len(pmf) // 2 + int(7 * std) + 1)
    np.testing.assert_allclose(pmf[middle], ideal[middle], rtol=1e-6)


@pytest.mark.parametrize("std", [std for std in STDS if std > 3])
def test_the_variance_is_exact(std: float) -> None:
    """Rounding adds 1/12 (Sheppard), up to exp(-2 pi^2 std^2)."""
    tables = GridGaussian(std).tables
    variance = sum(Fraction(sum(w * value**2 for value, w in weights_of(table).items()), 2**128) for table in tables)
    assert abs(variance / (Fraction(std) ** 2 + Fraction(1, 12)) - 1) < Fraction(1, 10**15)


@pytest.mark.parametrize("v", [0.5, 0.75, 1.0, 1.4])
@pytest.mark.parametrize("discrete", [False, True])
def test_the_bound_of_a_joint_holds_and_is_no_larger_than_it_must_be(v: float, discrete: bool) -> None:
    """At variances so small that floats can see the distance; the tables' own are so large that nothing could."""
    upper, lower = 2 * v, 2 * v * RADIX**2
    std = math.sqrt(RADIX**2 * upper + lower)

    def centred(half: list[float]) -> Floats:
        return np.array([*half[:0:-1], *half])

    def discrete_pmf(variance: float, reach: int) -> Floats:
        pmf = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * variance))
        return pmf / pmf.sum()

    below = [float(p) for p in (discrete_gaussian if discrete else rounded_gaussian)(Fraction(lower))]
    pmf = spread(discrete_pmf(upper, 40), centred(below), RADIX)
    reach = len(pmf) // 2
    ideal = discrete_pmf(std**2, reach) if discrete else ideal_pmf(std, reach)
    assert joint_distance(upper, lower) / 100 < distance(pmf, ideal) <= joint_distance(upper, lower)


@pytest.mark.parametrize("std", [0.5, 8.0, 150.0, 200.0])
def test_a_tables_distance_is_that_of_its_probabilities(std: float) -> None:
    """In whole numbers and fractions all through, tails included."""
    probabilities = rounded_gaussian(Fraction(std) ** 2)
    table = alias_table(probabilities, 1)
    weights = weights_of(table)
    ideal = [Fraction(p) for p in probabilities]
    tails = 1 - (2 * sum(ideal) - ideal[0])
    off = [abs(Fraction(weights.get(k, 0), 2**128) - ideal[abs(k)]) for k in range(-REACH, REACH + 1)]
    exact = (sum(off) + tails) / 2
    assert math.isclose(float(table.distance), float(exact), rel_tol=1e-12)
    assert abs(float(tails) - math.erfc((REACH + 0.5) / std / math.sqrt(2))) < 1e-27


@pytest.mark.parametrize("std", STDS)
def test_the_failure_is_small_and_adds_up(std: float) -> None:
    gaussian = GridGaussian(std)
    each = gaussian.failure(1)
    assert sum(float(table.distance) for table in gaussian.tables) <= each < 2**-77
    assert math.isclose(gaussian.failure(10**9), 10**9 * each, rel_tol=1e-12)
    assert gaussian.failure(0) < 1e-300
    assert gaussian.failure(2**200) == 1.0


def test_no_joint_counts_beside_its_tables() -> None:
    for num_lower in (1, 2, 3):
        worst = math.nextafter(HIGHEST_STD * RADIX ** (num_lower - 1), math.inf)
        assert len(GridGaussian(worst).tables) == num_lower + 1
    # 4.8 is the least standard deviation that is left for the highest level.
    assert joint_distance(4.8**2, noise.LOWER_STD**2) < 1e-79


# What is drawn


@pytest.mark.parametrize("std", [0.5, 3.7, 150.0, 1000.0, CENTRAL, 2.0**20])
def test_a_million_draws_pass_kolmogorov_smirnov(std: float) -> None:
    count = 10**6
    drawn = GridGaussian(std).draw(count, NoiseStream(KEY))
    values, counts = np.unique(drawn, return_counts=True)
    empirical = np.cumsum(counts) / count
    ideal = np.array([math.erfc(-(value + 0.5) / std / math.sqrt(2)) / 2 for value in values.tolist()])
    # Of a discrete distribution it is smaller than of a continuous one: 1.95 / sqrt(n) is passed with at least 99.9 %.
    assert np.abs(empirical - ideal).max() < 1.95 / math.sqrt(count)
    variance = std**2 + 1 / 12 if std > 1 else sum(k**2 * p for k, p in enumerate(ideal_pmf(std, 20)[20:])) * 2
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / count)
    assert abs(np.mean(drawn.astype(float) ** 2) / variance - 1) < 5 * math.sqrt(3 / count)


def test_neighbouring_draws_and_levels_are_uncorrelated() -> None:
    count = 10**6
    drawn = GridGaussian(CENTRAL).draw(count, NoiseStream(KEY)) / CENTRAL
    for lag in (1, 2, 3, 2**13):
        assert abs(np.mean(drawn[:-lag] * drawn[lag:])) < 5 / math.sqrt(count)
    words = NoiseStream(KEY).words(count) / 2**64 - 0.5
    for lag in (1, 2, 3, 4):
        assert abs(12 * np.mean(words[:-lag] * words[lag:])) < 5 / math.sqrt(count)


@pytest.mark.parametrize("std", [2.0, 1000.0])
def test_a_word_draws_what_its_bucket_says_up_to_the_limit_and_beyond(std: float) -> None:
    gaussian = GridGaussian(std)
    words, expected = [], []
    for bucket in (0, 1, 700, 2047, 2048, 2049, 4094, 4095):
        for end in ("first", "before", "beyond", "last"):
            number = 0
            for table in gaussian.tables:
                limit, first, last = int(table.limits[bucket]), bucket << 52, (bucket << 52) + 2**52 - 1
                word = {"first": first, "before": max(limit - 1, first), "beyond": limit + 1, "last": last}[end]
                words.append(word)
                is_below = word < limit or (word == limit and table.rests[bucket] > 0)
                number += int(table.values[2 * bucket + is_below])
            expected.append(number)
    assert gaussian.draw(len(expected), Given(words)).tolist() == expected


@pytest.mark.parametrize("is_below", [False, True])
def test_a_word_at_its_limit_is_decided_by_another(is_below: bool) -> None:
    gaussian = GridGaussian(1000.0)
    bucket = next(b for b in range(4096) if all(table.rests[b] > 0 for table in gaussian.tables))
    rests = [int(table.rests[bucket]) for table in gaussian.tables]
    stream = Given([int(table.limits[bucket]) for table in gaussian.tables])
    stream.spares = [rest - 1 if is_below else rest for rest in rests]
    expected = sum(int(table.values[2 * bucket + is_below]) for table in gaussian.tables)
    assert gaussian.draw(1, stream).tolist() == [expected]
    assert len({int(table.values[2 * bucket]) for table in gaussian.tables} | {expected}) > 1
    assert not stream.spares


@given(st.lists(st.integers(0, 20_000), max_size=4), st.sampled_from([1.0, 500.0, CENTRAL, 2.0**20]))
def test_how_draws_are_cut_changes_nothing(counts: list[int], std: float) -> None:
    gaussian, stream = GridGaussian(std), NoiseStream(KEY)
    parts = [gaussian.draw(count, stream) for count in counts]
    whole = gaussian.draw(sum(counts), NoiseStream(KEY))
    np.testing.assert_array_equal(np.concatenate([*parts, np.zeros(0, np.int64)]), whole)


def test_noise_is_added_to_what_is_there() -> None:
    gaussian = GridGaussian(CENTRAL)
    steps = torch.arange(100_000, dtype=torch.float64) * 2**30
    before = steps.clone()
    gaussian.add_to(steps, NoiseStream(KEY))
    np.testing.assert_array_equal((steps - before).numpy(), gaussian.draw(100_000, NoiseStream(KEY)))


@pytest.mark.parametrize(
    "steps",
    [
        torch.zeros(4, dtype=torch.float32),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.zeros(8, dtype=torch.float64)[::2],
        torch.zeros(4, dtype=torch.float64, device="meta"),
    ],
)
def test_other_tensors_are_refused(steps: torch.Tensor) -> None:
    with pytest.raises(InvalidError, match="contiguous 1-D float64 tensors on the CPU"):
        GridGaussian(8.0).add_to(steps, NoiseStream())


@pytest.mark.parametrize(
    "std", [0.0, -1.0, math.nextafter(MIN_STD, 0), math.nextafter(MAX_STD, math.inf), math.inf, math.nan]
)
def test_a_standard_deviation_out_of_range_is_refused_by_name(std: float) -> None:
    with pytest.raises(InvalidError, match=r"std_steps is .* expected from 0.5 to 4.1943e\+06 grid steps"):
        GridGaussian(std)


def test_a_sampler_is_pickled_without_the_numbers_it_drew() -> None:
    gaussian = GridGaussian(2.0)
    gaussian.draw(1000, NoiseStream())
    assert len(pickle.dumps(gaussian)) < 200
    assert copy.deepcopy(gaussian).std_steps == 2.0


def test_tables_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        GridGaussian(1000.0).tables[0].values[0] = 1


# The stream


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=3))
def test_words_are_aes_of_a_counter(counts: list[int]) -> None:
    stream = NoiseStream(KEY)
    words = np.concatenate([stream.words(count) for count in counts])
    counters = b"".join(counter.to_bytes(16, "big") for counter in range(-(-len(words) // 2)))
    expected = Cipher(algorithms.AES256(KEY), modes.ECB()).encryptor().update(counters)
    assert words.dtype == np.uint64
    assert words.tobytes() == expected[: words.nbytes]


def test_streams_without_a_key_differ() -> None:
    assert not np.any(NoiseStream().words(100) == NoiseStream().words(100))


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused_and_not_shown(length: int) -> None:
    with pytest.raises(InvalidError, match="32 bytes") as refused:
        NoiseStream(bytes([0xAB]) * length)
    assert "abab" not in str(refused.value)
    assert r"\xab" not in str(refused.value)


def test_a_stream_shows_its_key_to_nobody() -> None:
    stream = NoiseStream(KEY)
    shown = repr(stream) + str(stream) + repr(vars(stream))
    assert all(form not in shown for form in (KEY.hex(), repr(KEY), str(list(KEY))))
    assert KEY not in vars(stream).values()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_stream_is_not_copied(copied: object) -> None:
    assert callable(copied)
    with pytest.raises(TypeError, match="never copied or pickled"):
        copied(NoiseStream(KEY))


def test_a_stream_does_not_go_on_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = NoiseStream(KEY)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="belongs to the process that made it"):
        stream.words(1)
