"""Clipping on a grid: for every update the exact norm of its steps is within the bound, and little is lost on the way."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.errors import InvalidError, NotFiniteError
from fed_core.privacy.clipping import (
    CLIP_MARGIN,
    LARGEST,
    SMALLEST,
    SquaredNorm,
    clip_factor,
    max_squared_steps,
    squared_steps,
    step_exponent,
    to_steps,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
BOUNDS = st.one_of(
    st.sampled_from([1.0, 0.1, 5.0, 1e-3, 1e3, 1e-30, 1e30, SMALLEST, LARGEST]),
    st.floats(1e-6, 1e6),
    st.floats(1e-50, 1e50),
)
NOISE_MULTIPLIERS = st.floats(0.002, 50.0)
Update = dict[str, Tensor]


def reals(tile: Tensor) -> Tensor:
    return (torch.view_as_real(tile).reshape(-1) if tile.is_complex() else tile).double()


def exact_squared_norm(update: Update) -> Fraction:
    return sum((Fraction(x) ** 2 for tile in update.values() for x in reals(tile).tolist()), Fraction(0))


def norm_of(update: Update) -> float:
    norm = SquaredNorm()
    for tile in update.values():
        norm.add(tile)
    return norm.value


def steps_of(update: Update, factor: float, exponent: int) -> Update:
    return {
        name: to_steps(tile, factor, exponent, torch.full((len(reals(tile)),), math.nan, dtype=torch.float64))
        for name, tile in update.items()
    }


def exact_squared_steps(steps: Update) -> int:
    values = [x for tile in steps.values() for x in tile.tolist()]
    assert all(x.is_integer() for x in values)
    return sum(int(x) ** 2 for x in values)


def check_sensitivity(update: Update, bound: float, exponent: int) -> float:
    """What the module promises, in whole numbers all through; gives the factor."""
    factor = clip_factor(norm_of(update), bound)
    steps = steps_of(update, factor, exponent)
    found = exact_squared_steps(steps)
    assert found <= max_squared_steps(bound, exponent)
    assert Fraction(found) * Fraction(4) ** exponent <= Fraction(bound) ** 2
    assert sum(squared_steps(tile) for tile in steps.values()) == found
    for name, tile in update.items():
        for x, k in zip(reals(tile).tolist(), steps[name].tolist(), strict=True):
            kept = int(k) * Fraction(2) ** exponent
            assert abs(kept) <= abs(Fraction(x))
            assert kept * Fraction(x) >= 0
            if factor == 1.0:
                assert abs(Fraction(x)) - abs(kept) < Fraction(2) ** exponent
    return factor


@st.composite
def parts(draw: st.DrawFn, dtype: torch.dtype, size: int) -> Tensor:
    """Real values of any magnitude that the dtype has, zeros and denormal numbers among them."""
    finfo = torch.finfo(dtype)
    # The logarithm of the largest float64 is rounded to 1024, which is beyond it.
    smallest, largest = math.log2(finfo.smallest_normal) - 10, min(math.log2(finfo.max), 1023.9999)
    middle = draw(st.one_of(st.floats(-12, 12), st.floats(smallest, largest)))
    width = draw(st.sampled_from([0.0, 1.0, 30.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = np.clip(middle + width * generator.uniform(-1, 1, size), smallest, largest)
    signs = generator.choice([-1.0, 0.0, 1.0], size, p=[0.45, 0.1, 0.45])
    return torch.from_numpy(signs * np.exp2(exponents)).clamp(finfo.min, finfo.max).to(dtype)


@st.composite
def updates(draw: st.DrawFn) -> Update:
    update = {}
    for index in range(draw(st.integers(0, 4))):
        dtype, size = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 60))
        real = draw(parts(dtype.to_real(), size))
        update[f"t{index}"] = torch.complex(real, draw(parts(dtype.to_real(), size))) if dtype.is_complex else real
    return update


# Every update


@settings(deadline=None, max_examples=100)
@given(updates(), BOUNDS, NOISE_MULTIPLIERS)
def test_no_update_is_larger_than_the_declared_sensitivity(
    update: Update, bound: float, noise_multiplier: float
) -> None:
    sigma = min(max(noise_multiplier * bound, SMALLEST), LARGEST)
    check_sensitivity(update, bound, step_exponent(sigma))


@settings(deadline=None, max_examples=60)
@given(updates(), st.floats(0.25, 4), NOISE_MULTIPLIERS)
@example({"one": torch.tensor([1.0])}, 1.0, 1.0)
@example({"one": torch.tensor([3.0, 4.0])}, 1.0, 1.0)
def test_updates_about_as_large_as_the_bound(update: Update, ratio: float, noise_multiplier: float) -> None:
    norm = math.sqrt(norm_of(update))
    if not 1e-90 < norm < 1e90:
        return
    for bound in (norm, math.nextafter(norm, 0), math.nextafter(norm, math.inf), norm * ratio):
        factor = check_sensitivity(update, bound, step_exponent(noise_multiplier * bound))
        exact = exact_squared_norm(update)
        if exact <= Fraction(bound) ** 2 * (1 - Fraction(1, 2**40)):
            assert factor == 1.0
        if exact > Fraction(bound) ** 2 * (1 + Fraction(1, 2**40)):
            assert 1 - 2 * CLIP_MARGIN < factor * norm / bound < 1 - CLIP_MARGIN / 2


def squares_of(total: int) -> list[int]:
    """A few whole numbers whose squares make the total."""
    roots = []
    while total:
        roots.append(math.isqrt(total))
        total -= roots[-1] ** 2
    return roots


@settings(deadline=None)
@given(BOUNDS, NOISE_MULTIPLIERS, st.integers(0, 3), st.booleans(), st.integers(0, 40))
def test_an_update_on_the_grid_passes_whole_up_to_the_largest_norm_and_not_beyond(
    bound: float, noise_multiplier: float, excess: int, nudged: bool, num_ones: int
) -> None:
    """Nothing is lost to the grid here, so one square too much must be seen, wherever it hides among the others."""
    exponent = step_exponent(min(max(noise_multiplier * bound, SMALLEST), LARGEST))
    most = max_squared_steps(bound, exponent)
    ones = min(num_ones, most)
    roots = [1] * ones + squares_of(most + excess - ones)
    values = torch.tensor(roots, dtype=torch.float64) * 2.0**exponent
    if nudged:
        values = values.nextafter(torch.tensor(math.inf, dtype=torch.float64))
    factor = check_sensitivity({"a": values[::2], "b": values[1::2]}, bound, exponent)
    if excess:
        assert factor < 1.0
    elif not nudged:
        assert factor == 1.0
        steps = to_steps(values, factor, exponent, torch.empty_like(values))
        assert steps.tolist() == roots


@pytest.mark.parametrize("size", [1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 + 5])
def test_tiles_of_any_length_make_one_norm(size: int) -> None:
    values = torch.from_numpy(np.random.default_rng(size).standard_normal(size)).float()
    exact = math.fsum(x * x for x in values.double().tolist())
    many = SquaredNorm()
    for tile in values.split(1000):
        many.add(tile)
    assert math.isclose(norm_of({"whole": values}), exact, rel_tol=2**-40)
    assert math.isclose(many.value, exact, rel_tol=2**-40)
    bound, exponent = math.sqrt(exact) / 3, step_exponent(math.sqrt(exact) / 3)
    steps = to_steps(values, clip_factor(many.value, bound), exponent, torch.empty(size, dtype=torch.float64))
    whole = int((steps.numpy().astype(np.int64).astype(object) ** 2).sum())
    assert squared_steps(steps) == whole <= max_squared_steps(bound, exponent)
    # Rounding takes less than a step from each coordinate, so less than the root of their number from the norm.
    assert math.sqrt(whole) > bound * 2.0**-exponent * (1 - 2 * CLIP_MARGIN) - math.sqrt(size)


# Beyond all reason


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([3e38, -3e38, 1e-38], torch.float32),
        ([65504.0, -65504.0], torch.float16),
        ([1e140, 1.0], torch.float64),
        ([1e300, -1e300, 1.0], torch.float64),
        ([1.7976931348623157e308] * 5, torch.float64),
        ([1e200j, 1.0], torch.complex128),
    ],
)
def test_a_huge_update_comes_out_within_the_bound(values: list[complex], dtype: torch.dtype) -> None:
    update = {"w": torch.tensor(values, dtype=dtype)}
    factor = check_sensitivity(update, 0.5, step_exponent(0.5))
    assert factor < 1e-4
    beyond = any(abs(value) > 1e160 for value in values)
    assert (factor == 0.0) is beyond
    assert (exact_squared_steps(steps_of(update, factor, step_exponent(0.5))) == 0) is beyond


@pytest.mark.parametrize("values", [[5e-324, -5e-324], [2.2e-308] * 9, [1e-200, 0.0], [0.0, -0.0], []])
def test_tiny_values_are_nothing(values: list[float]) -> None:
    update = {"w": torch.tensor(values, dtype=torch.float64)}
    for bound in (SMALLEST, 1.0, LARGEST):
        exponent = step_exponent(bound)
        assert check_sensitivity(update, bound, exponent) == 1.0
        assert exact_squared_steps(steps_of(update, 1.0, exponent)) == 0


def test_infinities_come_out_as_zeros_and_nan_not_at_all() -> None:
    infinite = {"w": torch.tensor([math.inf, 1.0, -math.inf])}
    assert steps_of(infinite, clip_factor(norm_of(infinite), 1.0), -17)["w"].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(NotFiniteError, match="holds NaN"):
        clip_factor(norm_of({"w": torch.tensor([math.nan, math.inf])}), 1.0)


# The parts by themselves


@given(st.one_of(st.floats(SMALLEST, LARGEST), st.integers(-300, 300).map(lambda e: 2.0**e)))
@example(1.0)
@example(math.nextafter(2.0, 0))
def test_sigma_is_from_2_to_the_16_to_2_to_the_17_steps(sigma: float) -> None:
    assert 2**16 <= Fraction(sigma) / Fraction(2) ** step_exponent(sigma) < 2**17


def test_the_norm_is_that_of_the_values_at_hand() -> None:
    assert norm_of({"a": torch.tensor([3.0]), "b": torch.tensor([4.0], dtype=torch.float16)}) == 25.0
    assert norm_of({"c": torch.tensor([3 + 4j, 12j])}) == 169.0
    assert norm_of({"c": torch.tensor([3 + 4j]).conj()}) == 25.0
    assert norm_of({"b": torch.tensor([1.0, 2.0, 3.0, 4.0])[::2]}) == 10.0
    assert norm_of({}) == 0.0


@pytest.mark.parametrize(
    ("squared", "bound", "factor"),
    [
        (0.0, 1.0, 1.0),
        (25.0, 5.0, 1.0),
        (math.nextafter(25.0, 26), 5.0, 1 - CLIP_MARGIN),
        (100.0, 5.0, (1 - CLIP_MARGIN) / 2),
        (math.inf, 5.0, 0.0),
        # 0.1 as a float, squared exactly, lies between these two.
        (0.010000000000000002, 0.1, 1 - CLIP_MARGIN),
        (0.01, 0.1, 1.0),
    ],
)
def test_the_factor(squared: float, bound: float, factor: float) -> None:
    assert math.isclose(clip_factor(squared, bound), factor, rel_tol=1e-15)


def test_steps_are_toward_zero() -> None:
    values = torch.tensor([1.0, -1.0, 0.99, -0.99, 2.5, -2.5, 0.0])
    out = torch.empty(7, dtype=torch.float64)
    assert to_steps(values, 1.0, 0, out) is out
    assert out.tolist() == [1, -1, 0, 0, 2, -2, 0]
    assert to_steps(values, 0.5, -2, out).tolist() == [2, -2, 1, -1, 5, -5, 0]
    assert to_steps(torch.tensor([1.5 - 3j]), 1.0, 0, out[:2]).tolist() == [1, -3]


@given(st.floats(SMALLEST, LARGEST), st.integers(-20, 60))
def test_the_largest_squared_norm_is_exact(bound: float, bits: int) -> None:
    exponent = math.frexp(bound)[1] - bits
    try:
        most = max_squared_steps(bound, exponent)
    except InvalidError:
        assert bits >= 26
        return
    assert bits <= 27
    step = Fraction(2) ** exponent
    assert most * step**2 <= Fraction(bound) ** 2 < (most + 1) * step**2


def test_squares_are_exact_up_to_2_to_the_53_and_refused_from_there() -> None:
    roots = squares_of(2**53 - 1)
    assert squared_steps(torch.tensor(roots, dtype=torch.float64)) == 2**53 - 1
    # Each tile by itself is within; their sum is a Python number.
    apart = torch.zeros(3 * 2**16, dtype=torch.float64)
    apart[[0, 2**16, 2**17]] = 2.0**26 + 1
    assert squared_steps(apart) == 3 * (2**26 + 1) ** 2
    for steps in ([*roots, 1], [2.0**27], [math.inf], [math.nan]):
        with pytest.raises(InvalidError, match=r"2\*\*53"):
            squared_steps(torch.tensor(steps, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nextafter(SMALLEST, 0), 1.1e100, math.inf, math.nan])
def test_bounds_and_sigmas_out_of_range_are_refused_by_name(value: float) -> None:
    with pytest.raises(InvalidError, match=r"the bound is .* expected a number from 1e-100 to 1e\+100"):
        clip_factor(1.0, value)
    with pytest.raises(InvalidError, match="the bound is"):
        max_squared_steps(value, 0)
    with pytest.raises(InvalidError, match="sigma is"):
        step_exponent(value)


def test_a_bound_of_too_many_steps_is_refused_with_the_cure() -> None:
    assert max_squared_steps(1.0, step_exponent(0.002)) < 2**53
    with pytest.raises(
        InvalidError, match=r"1.678e\+08 steps .* expected less than 2\*\*26.5: raise the noise multiplier"
    ):
        max_squared_steps(1.25, -27)
    with pytest.raises(InvalidError, match="raise the noise multiplier"):
        max_squared_steps(LARGEST, step_exponent(SMALLEST))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    tile = torch.ones(2, dtype=dtype)
    with pytest.raises(InvalidError, match=f"floating and complex.*{dtype}"):
        SquaredNorm().add(tile)
    with pytest.raises(InvalidError, match="floating and complex"):
        to_steps(tile, 1.0, 0, torch.empty(2, dtype=torch.float64))
