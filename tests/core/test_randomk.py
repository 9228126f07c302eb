"""Random-k: places that both sides draw alike, evenly; unbiased over seeds where that is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fed_core.codecs.entropy import varint
from fed_core.codecs.nested import AnyValues, FsqValues, UniformValues
from fed_core.codecs.randomk import Places, RandomkCodec, RandomkConfig
from fed_core.codecs.raw import RawConfig
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.specs import BUFFER, TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, decode, encode, memory_of, normal, source_of, spec_of

RANDOMK = RandomkCodec()


def through(tensor: Tensor, config: RandomkConfig, seed: int = 0) -> Tensor:
    (plan,) = config.plan([(spec_of(tensor), source_of(tensor))], seed=seed)
    assert plan.codec == "randomk"
    return decode(RANDOMK, spec_of(tensor), plan.head, encode(plan, tensor))


def splitmix(seed: int, counter: int) -> int:
    """As Steele et al. print it, in integers of any length."""
    mask = 2**64 - 1
    z = (seed + counter * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def obvious_draw(density: int, seed: int, first: int, num_coordinates: int) -> list[int]:
    """The format's description, stratum by stratum."""
    places = []
    for run in range(0, num_coordinates, 2**16):
        n = min(2**16, num_coordinates - run)
        k = -(-n * density // 2**20)
        for i in range(k):
            begin, end = i * n // k, (i + 1) * n // k
            places.append(run + begin + ((splitmix(seed, first + run + begin) >> 32) * (end - begin) >> 32))
    return places


def test_the_generator_is_splitmix64() -> None:
    """The first numbers of the published generator from the seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix(1234567, counter) for counter in (1, 2, 3)] == known


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 2**20),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**38) | st.sampled_from([0, 2**16]),
    st.integers(1, 2000) | st.sampled_from([2**16, 2**16 + 1]),
)
def test_places_are_what_the_format_says(density: int, seed: int, first: int, num_coordinates: int) -> None:
    positions, widths = Places(density, seed).draw(first, num_coordinates)
    assert positions.tolist() == obvious_draw(density, seed, first, num_coordinates)
    assert widths.sum() == num_coordinates
    assert (np.diff(positions) > 0).all()


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.3, 0.77])
def test_every_coordinate_is_drawn_as_often_as_its_stratum_says(fraction: float) -> None:
    density, num_coordinates, num_seeds = round(fraction * 2**20), 700, 4000
    drawn, lengths = np.zeros(num_coordinates), np.zeros(num_coordinates)
    for seed in range(num_seeds):
        positions, widths = Places(density, seed * 0x9E3779B97F4A7C15 % 2**64).draw(0, num_coordinates)
        drawn[positions] += 1
        lengths = np.repeat(1 / widths, widths)
    deviation = np.sqrt(num_seeds * lengths * (1 - lengths))
    assert (np.abs(drawn - num_seeds * lengths) <= 5 * deviation + 1e-9).all()
    # Strata differ by one coordinate at most.
    assert lengths.min() == 1 or 1 / lengths.min() - 1 / lengths.max() <= 1.001


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
def test_what_is_drawn_comes_back_scaled_and_the_others_are_zero(fraction: float, dtype: str) -> None:
    tensor = normal((300, 400), dtype)
    for unbiased in (False, True):
        decoded = through(tensor, RandomkConfig(fraction=fraction, unbiased=unbiased, values=RawConfig()))
        x, values = tensor.reshape(-1).double(), decoded.reshape(-1).double()
        is_drawn = values != 0
        assert int(is_drawn.sum()) == pytest.approx(fraction * len(x), rel=0.01)
        ratio = (values / x)[is_drawn]
        scale = 1 / fraction if unbiased else 1.0
        rounding = torch.finfo(tensor.dtype).eps
        assert bool(((ratio - scale).abs() <= rounding * scale + (1.0 if unbiased and fraction < 1 else 0.0)).all())


@pytest.mark.parametrize(
    "values", [RawConfig(), UniformValues(bits=4, block=128, rounding="stochastic")], ids=lambda values: values.kind
)
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_it_is_unbiased_over_seeds(fraction: float, values: AnyValues) -> None:
    tensor = normal((10, 30), scale=1.0)
    config, num_seeds = RandomkConfig(fraction=fraction, values=values), 1500
    total, squares = torch.zeros(10, 30, dtype=torch.float64), torch.zeros(10, 30, dtype=torch.float64)
    for seed in range(num_seeds):
        decoded = through(tensor, config, seed).double()
        total += decoded
        squares += decoded.square()
    mean = total / num_seeds
    deviation = ((squares / num_seeds - mean.square()) / num_seeds).sqrt()
    assert bool(((mean - tensor).abs() <= 5 * deviation + 1e-3).all())
    variance = float((squares / num_seeds - mean.square()).sum() / tensor.square().sum())
    assert variance == pytest.approx(1 / fraction - 1, rel=0.15)


def test_scaled_down_it_loses_what_is_not_drawn() -> None:
    tensor = normal((500, 1000))
    config = RandomkConfig(fraction=0.4, unbiased=False, values=RawConfig())
    error = float((through(tensor, config) - tensor).square().sum() / tensor.square().sum())
    assert error == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    "values", [RawConfig(), UniformValues(rounding="stochastic"), FsqValues()], ids=lambda v: v.kind
)
def test_the_seed_and_the_name_rule_the_places(values: AnyValues) -> None:
    tensor, config = normal((200, 300)), RandomkConfig(values=values)
    assert memory_of(through(tensor, config, 5)) == memory_of(through(tensor, config, 5))
    assert memory_of(through(tensor, config, 5)) != memory_of(through(tensor, config, 6))
    inputs = [(spec_of(tensor, name), source_of(tensor)) for name in ("a", "b", "a")]
    heads = [plan.head for plan in config.plan(inputs, seed=5)]
    assert heads[0] == heads[2] != heads[1]


def test_values_need_no_more_than_their_own_bytes() -> None:
    tensor = normal((1_500_000,))
    (plan,) = RandomkConfig(fraction=0.01, values=RawConfig()).plan([(spec_of(tensor), source_of(tensor))], seed=0)
    assert plan.body_coordinates == 2**20
    sizes = [len(body.data) for body in encode(plan, tensor)]
    assert sizes[0] == 4 * 16 * -(-(2**16) * round(0.01 * 2**20) // 2**20)
    assert len(plan.head or b"") == 2 + 8 + 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bodies_are_within_their_bounds(dtype: str) -> None:
    tensor = normal((1_100_000,), dtype)
    for values in (RawConfig(), UniformValues(bits=8, block=32), FsqValues()):
        (plan,) = RandomkConfig(fraction=1, values=values).plan([(spec_of(tensor), source_of(tensor))], seed=0)
        for body in encode(plan, tensor):
            least, most = RANDOMK.body_bytes(spec_of(tensor), body.num_coordinates)
            assert least <= len(body.data) <= most <= MAX_BODY_BYTES


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_scaling_would_make_infinite_is_the_largest_number(dtype: str) -> None:
    largest = min(torch.finfo(torch_dtype(dtype)).max, torch.finfo(torch.float32).max)
    tensor = torch.full((20, 20), largest, dtype=torch_dtype(dtype))
    for values in (RawConfig(), UniformValues()):
        decoded = through(tensor, RandomkConfig(fraction=0.25, values=values)).double()
        assert bool(decoded.isfinite().all())
        assert float(decoded.max()) == pytest.approx(largest, rel=2**-7)


def test_what_is_beyond_float32_itself_is_not_touched() -> None:
    tensor = torch.full((20, 20), -1e300, dtype=torch.float64)
    decoded = through(tensor, RandomkConfig(fraction=0.25, values=RawConfig()))
    assert decoded.unique().tolist() == [-1e300, 0]


def test_buffers_are_raw_and_small_vectors_uniform() -> None:
    specs = [
        TensorSpec("weight", (50, 100), "float32"),
        TensorSpec("bias", (100,), "float32"),
        TensorSpec("mean", (50, 100), "float32", BUFFER),
    ]
    plans = RandomkConfig().plan([(spec, source_of(torch.ones(spec.shape))) for spec in specs], seed=0)
    assert [plan.codec for plan in plans] == ["randomk", "uniform", "raw"]


def test_feedback_is_for_what_is_not_scaled_up() -> None:
    assert not RandomkConfig().wants_feedback
    assert RandomkConfig(unbiased=False).wants_feedback
    assert not RandomkConfig(unbiased=False, feedback=False).wants_feedback
    assert RandomkConfig(unbiased=False, feedback=True).wants_feedback
    with pytest.raises(ValidationError) as caught:
        RandomkConfig(feedback=True)
    assert "needs unbiased = false" in caught.value.errors()[0]["ctx"]["problems"]["feedback"]


SPEC = TensorSpec("w", (10, 10), "float32")


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (None, "has no head"),
        (b"", "wants 1 more bytes"),
        (b"\0" + bytes(8) + b"\1", r"a density of 0 in 2\^20; expected 1 to 2\^20"),
        (varint(2**20 + 1) + bytes(8) + b"\1", "a density of 1048577"),
        (b"\1" + bytes(7), "wants 8 more bytes"),
        (b"\1" + bytes(8), "wants 1 more bytes"),
        (b"\1" + bytes(8) + b"\0", "values in the codec 0; expected 1 to 4"),
        (b"\1" + bytes(8) + b"\3\1", "values in the codec 'uniform' with a head of 1 bytes"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(head: bytes | None, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        RANDOMK.decoder(SPEC, head)


@pytest.mark.parametrize("body", [b"", bytes(3), bytes(5)])
def test_a_body_that_does_not_fit_is_refused(body: bytes) -> None:
    decoder = RANDOMK.decoder(SPEC, b"\1" + bytes(8) + b"\1")
    with pytest.raises(PayloadError, match=f"1 values in {len(body)} bytes; expected 4 to 4"):
        decoder.decode(0, body, torch.zeros(100))
