"""Ternary: the largest of all tensors, as plus or minus a mean; and that nothing else survives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fed_core.codecs.base import TileSource
from fed_core.codecs.entropy import ByteReader, varint
from fed_core.codecs.positions import read_positions
from fed_core.codecs.sparsity import largest
from fed_core.codecs.ternary import TernaryCodec, TernaryConfig
from fed_core.errors import InvalidError, PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec
from tests.core.coding import FLOATS, Body, decode, encode, finite, normal, source_of, spec_of

TERNARY = TernaryCodec()


def encoded(tensors: list[Tensor], fraction: float) -> list[list[Body]]:
    inputs = [(spec_of(tensor, f"w{index}"), source_of(tensor)) for index, tensor in enumerate(tensors)]
    plans = TernaryConfig(fraction=fraction).plan(inputs, seed=0)
    assert {plan.codec for plan in plans} == {"ternary"}
    assert all(plan.head is None for plan in plans)
    return [encode(plan, tensor) for plan, tensor in zip(plans, tensors, strict=True)]


def through(tensors: list[Tensor], fraction: float) -> list[Tensor]:
    bodies = encoded(tensors, fraction)
    return [decode(TERNARY, spec_of(tensor), None, of) for tensor, of in zip(tensors, bodies, strict=True)]


def magnitudes_of(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).float().abs() for tensor in tensors])


def selected(tensors: list[Tensor], fraction: float) -> list[list[int]]:
    """Places by `largest`, read in tiles that fit nothing."""
    found = []
    inputs = [(spec_of(tensor), source_of(tensor)) for tensor in tensors]
    for (spec, source), chosen in zip(inputs, largest(inputs, fraction), strict=True):
        step = 2**16 + 1000
        places = [
            first + chosen.places(first, source(first, min(step, spec.num_elements - first)))
            for first in range(0, spec.num_elements, step)
        ]
        found.append(np.concatenate(places).tolist())
        assert len(found[-1]) == chosen.counts.sum()
        assert len(chosen.counts) == -(-spec.num_elements // 2**16)
    return found


# ----------------------------------------------------------------------------------------------------------------------- selection


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -2.0, 1e-44, 3e38]), min_size=1), min_size=1, max_size=4
    ),
    st.floats(0.001, 1),
)
def test_the_largest_are_chosen_and_of_equal_ones_the_first(values: list[list[float]], fraction: float) -> None:
    tensors = [torch.tensor(each) for each in values]
    magnitudes = magnitudes_of(tensors)
    wanted = max(1, round(fraction * len(magnitudes)))
    order = torch.sort(magnitudes, descending=True, stable=True).indices[:wanted]
    expected = sorted(int(place) for place in order if magnitudes[place] > 0)
    starts = np.cumsum([0, *(len(tensor) for tensor in tensors)])
    found = selected(tensors, fraction)
    assert [int(start) + place for start, of in zip(starts, found, strict=False) for place in of] == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fraction", [1e-6, 0.01, 0.3, 0.999, 1.0])
def test_as_many_are_chosen_as_the_fraction_says(fraction: float, dtype: str) -> None:
    # bfloat16 has many equal values.
    tensors = [normal((300, 400), dtype, seed=1), normal((70_001,), dtype, scale=0.05, seed=2)]
    found = selected(tensors, fraction)
    total = sum(tensor.numel() for tensor in tensors)
    zeros = int((magnitudes_of(tensors) == 0).sum())
    assert sum(map(len, found)) == min(max(1, round(fraction * total)), total - zeros)
    chosen = torch.cat(
        [t.reshape(-1).float().abs()[torch.tensor(of, dtype=torch.int64)] for t, of in zip(tensors, found, strict=True)]
    )
    assert chosen.min() >= torch.sort(magnitudes_of(tensors), descending=True).values[len(chosen) - 1]


def test_tensors_are_read_in_tiles_a_few_times() -> None:
    tensor, asked = normal((500, 1000)), []

    def source(first: int, count: int) -> Tensor:
        asked.append(count)
        return tensor.reshape(-1)[first : first + count]

    largest([(spec_of(tensor), source)], 0.01)
    assert max(asked) <= 2**16
    assert sum(asked) == 3 * tensor.numel()


def test_what_is_beyond_float32_is_refused_with_its_name() -> None:
    tensor = normal((50, 60), "float64")
    tensor[3, 4] = 1e39
    source: TileSource = source_of(tensor)
    with pytest.raises(InvalidError, match="'big'"):
        TernaryConfig().plan([(spec_of(tensor, "big"), source)], seed=0)


# --------------------------------------------------------------------------------------------------------------------- what arrives


@settings(deadline=None, max_examples=60)
@given(st.integers(130, 3000), st.floats(0.001, 1), st.integers(0, 2**32))
def test_survivors_are_the_mean_of_their_block_with_their_sign(count: int, fraction: float, seed: int) -> None:
    tensor = finite(count, "float32", seed).clamp(-1e30, 1e30).view(1, -1).repeat(2, 1)
    (decoded,) = through([tensor], fraction)
    (places,) = selected([tensor], fraction)
    x, values = tensor.reshape(-1).double(), decoded.reshape(-1).double()
    is_left_out = torch.ones(len(x), dtype=torch.bool)
    is_left_out[places] = False
    assert not values[is_left_out].any()
    for block in torch.tensor(places, dtype=torch.int64).split(256):
        mean = float(x[block].abs().mean())
        expected = mean * torch.where(x[block] < 0, -1.0, 1.0).double()
        assert torch.allclose(values[block], expected, rtol=2**-8, atol=2**-126)


@pytest.mark.parametrize(
    ("fraction", "error", "bits"), [(0.01, 0.9162, 0.0917), (0.05, 0.727, 0.340), (0.2, 0.384, 0.936)]
)
def test_the_error_and_the_bits_of_a_gaussian(fraction: float, error: float, bits: float) -> None:
    tensor = normal((1024, 1024), scale=1.0)
    (bodies,) = encoded([tensor], fraction)
    (decoded,) = through([tensor], fraction)
    assert float((tensor - decoded).square().sum() / tensor.square().sum()) == pytest.approx(error, abs=0.002)
    assert 8 * sum(len(body.data) for body in bodies) / tensor.numel() == pytest.approx(bits, rel=0.01)
    if fraction == 0.01:
        # Shannon's bound, in decibels.
        assert 10 * math.log10(error) + 20 * math.log10(2) * bits < 0.2


def test_a_tensor_of_small_values_sends_a_byte_a_body() -> None:
    tensors = [normal((100, 1000)), normal((3000, 1000), scale=1e-6)]
    large, small = encoded(tensors, 0.01)
    assert [body.data for body in small] == [b"\0"] * 3
    assert large[0].num_coordinates == 100_000
    assert not through(tensors, 0.01)[1].any()


def test_a_body_is_positions_and_signs() -> None:
    tensor = normal((100, 100))
    ((body,),) = encoded([tensor], 0.05)
    reader = ByteReader(body.data)
    positions = read_positions(reader, 10_000)
    assert positions.tolist() == selected([tensor], 0.05)[0]
    assert reader.left == 1 + 2 * 2 + -(-500 // 8)


def test_bodies_are_long_and_within_their_bounds() -> None:
    tensor = normal((1_500_000,))
    (bodies,) = encoded([tensor], 1.0)
    assert [body.num_coordinates for body in bodies] == [MAX_BODY_COORDINATES, 1_500_000 - MAX_BODY_COORDINATES]
    for body in bodies:
        least, most = TERNARY.body_bytes(spec_of(tensor), body.num_coordinates)
        assert least <= len(body.data) <= most


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_a_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ValidationError):
        TernaryConfig(fraction=fraction)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "wants 1 more bytes"),
        (b"\0\0", "followed by 1 bytes that nothing explains"),
        (varint(10) + b"\x05\x01\0\0", "signs and scales of 4 bytes; expected 5"),
        (varint(10), "signs in blocks of"),
        (varint(11), "11 positions among 10 coordinates"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        TERNARY.decoder(TensorSpec("w", (10,), "float32"), None).decode(0, data, torch.zeros(10))
