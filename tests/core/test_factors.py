"""Integer factors as bytes, and the models that both sides make for themselves."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_core.codecs.entropy import TABLE_SUM, ByteReader, Ints
from fed_core.codecs.factors import fit_factors, groups, read_factors, write_factors
from fed_core.codecs.parametric import MAX_REACH, MAX_REACH_BITS, NUM_MODELS, code_lengths, parametric_table
from fed_core.errors import PayloadError


def random_factors(rank: int, rows: int, cols: int, *, seed: int, largest: int = 30) -> Ints:
    """Components that fall in size, at positions of very different scale, heavy-tailed; none is zero on either side."""
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.normal(0, 1.2, rows + cols)) * largest / 8 / np.arange(1, rank + 1)[:, None]
    factors = np.clip(np.rint(generator.laplace(0, 1, (rank, rows + cols)) * scales), -largest, largest).astype(
        np.int32
    )
    factors[:, 0] = factors[:, rows] = 1
    return factors


def write(factors: Ints, rows: int, coder: str = "rans") -> bytes:
    return write_factors(factors, rows, fit_factors(factors, rows), coder)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [0, 1, 20, 21, 60, 61, NUM_MODELS - 2, NUM_MODELS - 1])
@pytest.mark.parametrize("reach_bits", [1, 4, MAX_REACH_BITS])
def test_a_table_is_symmetric_falls_from_zero_and_leaves_no_symbol_out(model: int, reach_bits: int) -> None:
    table = parametric_table(model, reach_bits)
    frequencies = table.frequencies
    reach = 2**reach_bits - 1
    assert (table.lowest, len(frequencies), int(frequencies.sum())) == (-reach, 2 * reach + 1, TABLE_SUM)
    assert np.array_equal(frequencies, frequencies[::-1])
    assert frequencies.min() >= 1
    # All that rounding took goes to zero, whose neighbours may be a little larger only if it is no peak at all.
    assert (np.diff(frequencies[reach + 1 :]) <= 0).all()
    assert frequencies[reach] >= frequencies[reach + 1] - 1


@pytest.mark.parametrize("scale", [0, 7, 12, 25, 36])
def test_tables_are_the_distributions_that_they_are_named_for(scale: int) -> None:
    width = 2 ** (scale / 4 - 3)
    k = np.arange(-127, 128)
    laplace = 0.5 * (
        np.sign(k + 0.5) * -np.expm1(-abs(k + 0.5) / width) - np.sign(k - 0.5) * -np.expm1(-abs(k - 0.5) / width)
    )
    gaussian = np.exp(-(k**2) / (2 * width**2))
    for shape, expected in enumerate((laplace, gaussian)):
        probabilities = parametric_table(2 * scale + shape, 7).frequencies / TABLE_SUM
        assert np.abs(probabilities - expected / expected.sum()).max() < 0.005


def test_tables_are_the_same_on_every_machine() -> None:
    hasher = blake3()
    for reach_bits in (1, 3, 6, 12):
        for model in range(NUM_MODELS):
            hasher.update(parametric_table(model, reach_bits).frequencies.astype("<i4").tobytes())
    assert hasher.hexdigest() == "fcccab94df777c7d304732b2fc109ae7a16e709594eda097f6c7ee6d9eaafdc3"


def test_code_lengths_are_those_of_the_tables() -> None:
    lengths = code_lengths(5)
    counts = np.arange(63)
    for model in (0, 13, 40, 113):
        by_size = counts[31:] + np.concatenate([[0], counts[:31][::-1]])
        assert lengths[model] @ by_size == pytest.approx(parametric_table(model, 5).bits(counts))


@pytest.mark.parametrize(("model", "reach_bits"), [(-1, 3), (NUM_MODELS, 3), (0, 0), (0, MAX_REACH_BITS + 1)])
def test_a_table_that_there_is_not(model: int, reach_bits: int) -> None:
    with pytest.raises(ValueError, match=f"no model {model} of reach 2\\^{reach_bits}"):
        parametric_table(model, reach_bits)


@given(st.integers(0, 40))
def test_groups_cover_all_components_once(rank: int) -> None:
    assert [component for first, end in groups(rank) for component in range(first, end)] == list(range(rank))


@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(0, 9),
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    largest=st.sampled_from([1, 3, 30, MAX_REACH]),
    seed=st.integers(0, 2**32),
    coder=st.sampled_from(["rans", "packed"]),
)
def test_factors_come_back(rank: int, rows: int, cols: int, largest: int, seed: int, coder: str) -> None:
    factors = random_factors(rank, rows, cols, seed=seed, largest=largest)
    reader = ByteReader(write(factors, rows, coder))
    assert np.array_equal(read_factors(reader, rank, rows, cols), factors)
    reader.done()


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
def test_bits_are_foreseen_for_every_rank(rank: int) -> None:
    factors = random_factors(12, 300, 900, seed=4)
    fit = fit_factors(factors, 300)
    written = write_factors(factors[:rank], 300, fit, "rans")
    groups_of_rank = len(list(groups(rank)))
    assert 8 * len(written) == pytest.approx(fit.bits[:rank].sum() + 48 * groups_of_rank, rel=0.002, abs=64)


def test_what_is_known_of_a_position_saves_bits() -> None:
    scattered = random_factors(16, 400, 600, seed=1)
    generator = np.random.default_rng(2)
    mixed = np.stack(
        [np.concatenate([generator.permutation(row[:400]), generator.permutation(row[400:])]) for row in scattered]
    )
    assert len(write(scattered, 400)) < 0.85 * len(write(mixed, 400))


def test_a_group_is_as_short_as_its_distribution_allows() -> None:
    generator = np.random.default_rng(3)
    factors = np.rint(generator.laplace(0, 2.0, (1, 20_000))).astype(np.int32)
    counts = np.unique(factors, return_counts=True)[1] / factors.size
    entropy = -(counts * np.log2(counts)).sum()
    assert 8 * len(write(factors, 10_000)) / factors.size == pytest.approx(entropy, rel=0.01)


def test_reach_and_models_out_of_range_are_refused() -> None:
    factors = random_factors(3, 20, 30, seed=5)
    data = write(factors, 20)
    for position, value in [(0, 0), (0, MAX_REACH_BITS + 1), (1, NUM_MODELS), (2, 255)]:
        broken = bytearray(data)
        broken[position] = value
        with pytest.raises(PayloadError, match="factors of reach"):
            read_factors(ByteReader(broken), 3, 20, 30)
