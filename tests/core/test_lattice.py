"""Versions on a lattice: its step is found exactly, and any difference of two versions leads from one to the other, bit for bit."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.base import Encoding
from fed_core.codecs.dither import dither, dither_key
from fed_core.codecs.lattice import LATTICE_DTYPES, LatticeEncoding, LosslessEncoding, lattice_exponent
from fed_core.codecs.registry import codec_named
from fed_core.specs import TensorSpec
from fed_core.tensors import apply_difference, torch_dtype
from tests.core.coding import decode, encode, memory_of, normal, random_bits, source_of, spec_of


def exponent_of(tensor: Tensor) -> int | None:
    return lattice_exponent(spec_of(tensor), source_of(tensor))


def slow_exponent(values: list[float]) -> int | None:
    """The same with fractions: the largest e such that every value over 2^e is whole."""
    lowest: int | None = None
    for value in values:
        exact = Fraction(value)
        if exact == 0:
            continue
        # A float is n / 2^k, or n with trailing zeros.
        k = exact.denominator.bit_length() - 1
        e = -k if k else (abs(exact.numerator) & -abs(exact.numerator)).bit_length() - 1
        lowest = e if lowest is None else min(lowest, e)
    return 0 if lowest is None else lowest


FLOATS32 = st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)


@settings(deadline=None, max_examples=300)
@given(st.lists(FLOATS32.map(abs) | FLOATS32.filter(bool), max_size=8))
def test_the_exponent_is_that_of_exact_fractions(values: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert exponent_of(torch.tensor(values, dtype=dtype)) == slow_exponent(values)


@pytest.mark.parametrize("seed", range(5))
def test_the_exponent_of_any_bits_is_that_of_exact_fractions(seed: int) -> None:
    bits = random_bits(300, "float32", seed)
    tensor = torch.where(bits.isfinite() & (bits != 0), bits, 1.0)
    assert exponent_of(tensor) == slow_exponent(tensor.tolist())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], 0),
        ([1.0], 0),
        ([6.0, -4.0], 1),
        ([0.75, 3.0], -2),
        ([2.0**-149], -149),
        ([3 * 2.0**-149, 1.0], -149),
        ([2.0**127], 127),
        ([float(2**24 - 1) * 2.0**104], 104),
        ([1 + 2.0**-23], -23),
        ([-0.0, 1.0], None),
    ],
)
def test_exponents_at_the_ends_of_the_type(values: list[float], expected: int | None) -> None:
    assert exponent_of(torch.tensor(values)) == expected


@pytest.mark.parametrize("value", [0.1, 1e-60, 1e300, 1 + 2.0**-40, -0.0])
def test_a_double_that_is_no_float_is_on_no_lattice(value: float) -> None:
    assert exponent_of(torch.tensor([1.0, value], dtype=torch.float64)) is None


def test_the_exponent_is_found_wherever_it_is() -> None:
    """Beyond the first tile that is scanned."""
    tensor = torch.ones(2**18 + 5)
    tensor[-1] = 2.0**-9
    assert exponent_of(tensor) == -9
    tensor[-2] = -0.0
    assert exponent_of(tensor) is None


def test_an_empty_tensor_has_an_exponent_like_zeros() -> None:
    assert exponent_of(torch.zeros(0, 3)) == 0


# --- encodings


def sent(encoding: Encoding, tensor: Tensor) -> tuple[str, Tensor]:
    """The codec that a tensor is planned in, and what comes out of it."""
    spec = spec_of(tensor)
    [plan] = encoding.plan([(spec, source_of(tensor))], seed=0)
    return plan.codec, decode(codec_named(plan.codec), spec, plan.head, encode(plan, tensor))


def whole_steps(seed: int, shape: tuple[int, ...], exponent: int, most: int) -> Tensor:
    steps = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed))
    return (steps.double() * 2.0**exponent).float() + 0.0


@pytest.mark.parametrize("dtype", sorted(LATTICE_DTYPES))
@pytest.mark.parametrize("exponent", [-140, -60, -12, 0, 3, 90])
@pytest.mark.parametrize("most", [1, 30, 2**15 - 1])
def test_whole_steps_come_back_to_the_bit(dtype: str, exponent: int, most: int) -> None:
    tensor = whole_steps(exponent, (70, 40), exponent, most).to(torch_dtype(dtype))
    for encoding in (LosslessEncoding(), LatticeEncoding({"w": exponent})):
        codec, out = sent(encoding, tensor)
        assert codec == "fsq"
        assert memory_of(out) == memory_of(tensor)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from(["float32", "float64", "float16", "bfloat16", "int32"]), st.booleans())
def test_lossless_is_lossless_for_any_bits(seed: int, dtype: str, is_sparse: bool) -> None:
    values = random_bits(40, dtype, seed)
    if is_sparse and values.is_floating_point():
        values = torch.where(torch.arange(40) % 3 > 0, torch.zeros_like(values), values)
    if values.is_floating_point():
        values = torch.where(values.isfinite(), values, torch.ones_like(values))
    assert memory_of(sent(LosslessEncoding(), values)[1]) == memory_of(values)


def test_too_many_steps_are_sent_raw() -> None:
    tensor = normal((30, 30), scale=1.0)
    for encoding in (LosslessEncoding(), LatticeEncoding({"w": -40})):
        codec, out = sent(encoding, tensor)
        assert codec == "raw"
        assert memory_of(out) == memory_of(tensor)
    assert sent(LatticeEncoding({"w": -12}), tensor)[0] == "fsq"


@pytest.mark.parametrize(
    ("tensor", "encoding"),
    [
        (torch.arange(5), LosslessEncoding()),
        (torch.arange(5).half(), LosslessEncoding()),
        (torch.arange(5).bfloat16(), LatticeEncoding({"w": 0})),
        (torch.arange(5.0), LatticeEncoding({"other": 0})),
        (torch.zeros(0, 4), LatticeEncoding({"w": 0})),
        (torch.arange(5.0), LosslessEncoding(raw={"w"})),
    ],
)
def test_what_has_no_lattice_is_sent_raw(tensor: Tensor, encoding: Encoding) -> None:
    assert sent(encoding, tensor)[0] == "raw"


def test_a_lattice_rounds_to_the_nearest_step_and_no_further() -> None:
    tensor, step = normal((100, 50)), 2.0**-8
    codec, out = sent(LatticeEncoding({"w": -8}), tensor)
    assert codec == "fsq"
    assert (out / step).equal((out / step).round())
    assert (out - tensor).abs().max() <= step / 2


def test_thresholds_of_coordinates_round_without_bias_and_stay_where_they_are() -> None:
    tensor, step = torch.full((300, 400), 0.3 * 2.0**-8), 2.0**-8
    _, out = sent(LatticeEncoding({"w": -8}, seed=1), tensor)
    assert set(out.unique().tolist()) == {0.0, step}
    assert float(out.double().mean()) == pytest.approx(0.3 * step, rel=0.02), (
        "as many move as the change is parts of a step"
    )
    # Who did not move with less does not move back with more.
    _, more = sent(LatticeEncoding({"w": -8}, seed=1), tensor * 2)
    assert (more >= out).all()
    assert not sent(LatticeEncoding({"w": -8}, seed=2), tensor)[1].equal(out)


def test_what_was_sent_leaves_less_than_a_step_and_is_sent_no_second_time() -> None:
    encoding = LatticeEncoding({"w": -8}, seed=1)
    tensor = normal((100, 700))
    _, out = sent(encoding, tensor)
    assert (out - tensor).abs().max() < 2.0**-8
    assert not sent(encoding, tensor - out)[1].any()


@pytest.mark.parametrize("first", [0, 1, 15, 16, 1000, 2**17 + 3])
def test_a_dither_is_that_of_its_coordinates_wherever_a_tile_begins(first: int) -> None:
    whole = dither(dither_key(3, "w"), 0, 2**18)
    assert dither(dither_key(3, "w"), first, 5000).equal(whole[first : first + 5000])
    assert 0 < float(whole.min()) < 1e-3 < 1 - 1e-3 < float(whole.max()) < 1
    assert float(whole.mean()) == pytest.approx(0.5, abs=2e-3)


def test_sparse_steps_are_cheap() -> None:
    """A tensor of which one in a thousand moves by a step or two: far less than a bit each."""
    tensor = torch.where(torch.rand(500, 1000, generator=torch.Generator().manual_seed(1)) < 1e-3, 2.0**-9, 0.0)
    [plan] = LosslessEncoding().plan([(spec_of(tensor), source_of(tensor))], seed=0)
    num_bytes = len(plan.head or b"") + sum(len(body.data) for body in encode(plan, tensor))
    assert 8 * num_bytes < 0.015 * tensor.numel()


# --- spans


def rounded(tensor: Tensor, exponent: int) -> Tensor:
    return ((tensor.double() * 2.0**-exponent).round() * 2.0**exponent).float() + 0.0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.lists(st.integers(-16, -4), min_size=2, max_size=6))
def test_any_span_of_a_chain_leads_from_version_to_version_bit_for_bit(seed: int, exponents: list[int]) -> None:
    """The steps change from delta to delta, as they do from round to round."""
    generator = np.random.default_rng(seed)
    shape = (17, 13)
    versions = [rounded(torch.from_numpy(generator.normal(0, 1, shape)).float(), -6)]
    deltas = []
    for exponent in exponents:
        moved = torch.from_numpy(generator.normal(0, generator.uniform(1, 9) * 2.0**exponent, shape)).float()
        codec, delta = sent(LatticeEncoding({"w": exponent}), moved)
        assert codec == "fsq"
        deltas.append(delta)
        versions.append(apply_difference(versions[-1], delta))
    for base in range(len(versions)):
        for version in range(base + 1, len(versions)):
            total = deltas[base]
            for delta in deltas[base + 1 : version]:
                total = total + delta
            codec, span = sent(LosslessEncoding(), total)
            assert memory_of(span) == memory_of(total)
            if codec == "raw":  # too far apart for whole steps: then the new value is sent
                assert total.abs().max() >= 2**15 * 2.0 ** min(exponents[base:version])
            assert memory_of(apply_difference(versions[base], span)) == memory_of(versions[version])


def test_every_spec_may_have_an_exponent_of_its_own() -> None:
    tensors = [normal((20, 20), seed=seed) for seed in range(3)]
    specs = [TensorSpec(f"t{seed}", (20, 20), "float32") for seed in range(3)]
    plans = LatticeEncoding({"t0": -7, "t2": -9}).plan(
        [(spec, source_of(tensor)) for spec, tensor in zip(specs, tensors, strict=True)], seed=0
    )
    assert [plan.codec for plan in plans] == ["fsq", "raw", "fsq"]
    for spec, plan, tensor, exponent in zip(specs, plans, tensors, (-7, None, -9), strict=True):
        out = decode(codec_named(plan.codec), spec, plan.head, encode(plan, tensor))
        found = lattice_exponent(spec, source_of(out + 0.0))
        assert found is not None
        assert exponent is None or found >= exponent


def test_the_seed_decides_nothing() -> None:
    tensor = normal((50, 50))
    spec = spec_of(tensor)
    made = set()
    for seed in (0, 1):
        [plan] = LatticeEncoding({"w": -8}).plan([(spec, source_of(tensor))], seed=seed)
        file = io.BytesIO(plan.head or b"")
        made.add(file.getvalue() + b"".join(body.data for body in encode(plan, tensor)))
    assert len(made) == 1
