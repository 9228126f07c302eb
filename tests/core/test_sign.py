"""Sign: the scale with the least error, a contraction whatever the values, and what a body may be."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fed_core.codecs.sign import SignCodec, SignConfig, sign_plan
from fed_core.errors import InvalidError, PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES
from fed_core.specs import BUFFER, TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, Body, decode, encode, finite, normal, source_of, spec_of

SIGN = SignCodec()


def bodies_of(tensor: Tensor, block: int = 256) -> list[Body]:
    return encode(sign_plan(spec_of(tensor), source_of(tensor), block=block), tensor)


def through(tensor: Tensor, block: int = 256) -> Tensor:
    return decode(SIGN, spec_of(tensor), None, bodies_of(tensor, block))


def obvious_decode(body: Body) -> Tensor:
    """The format's description, coordinate by coordinate."""
    block, num_blocks = 2 ** body.data[0], -(-body.num_coordinates // 2 ** body.data[0])
    scales = [struct.unpack("<f", b"\0\0" + body.data[1 + 2 * i : 3 + 2 * i])[0] for i in range(num_blocks)]
    bits = body.data[1 + 2 * num_blocks :]
    return torch.tensor(
        [scales[i // block] * (-1 if bits[i // 8] >> i % 8 & 1 else 1) for i in range(body.num_coordinates)]
    )


@pytest.mark.parametrize("block", [32, 1024, 65536])
@pytest.mark.parametrize("count", [1, 7, 8, 33, 1000, 2**16 + 5])
def test_a_body_means_what_the_format_says(block: int, count: int) -> None:
    tensor = normal((count,), seed=block)
    (body,) = bodies_of(tensor, block)
    assert torch.equal(decode(SIGN, spec_of(tensor), None, [body]), obvious_decode(body))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.sampled_from([32, 256, 65536]), st.integers(0, 2**32), st.sampled_from(FLOATS))
def test_every_block_is_its_mean_magnitude_with_the_signs(count: int, block: int, seed: int, dtype: str) -> None:
    tensor = finite(count, dtype, seed)
    values = through(tensor, block).double()
    for part, decoded in zip(tensor.double().split(block), values.split(block), strict=True):
        (scale,) = decoded.abs().unique()
        mean = float(part.abs().mean())
        largest = min(torch.finfo(torch_dtype(dtype)).max, torch.finfo(torch.float32).max)
        # 8 bits of mantissa; in float16 numbers near zero have fewer.
        assert (
            abs(float(scale) - mean) <= mean * 2**-8 + 2**-25 * (dtype == "float16") + 2**-126 or mean > 0.99 * largest
        )
        assert not scale or torch.equal(decoded < 0, part.float() < 0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32) | st.just(0.0), min_size=1, max_size=200),
    st.sampled_from([32, 64, 65536]),
)
def test_the_error_is_what_the_mean_magnitude_leaves(values: list[float], block: int) -> None:
    tensor = torch.tensor(values)
    x, decoded = tensor.double(), through(tensor, block).double()
    left = sum(float(part.square().sum() - part.abs().sum() ** 2 / len(part)) for part in x.split(block))
    energy = float(x.square().sum())
    # Half a unit of the scale's mantissa beside the best scale.
    rounding = energy * 2**-16 + len(x) * 2.0**-250
    assert float((x - decoded).square().sum()) <= left + rounding
    assert left <= energy


@pytest.mark.parametrize(("block", "error"), [(32, 0.3520), (256, 0.3622), (4096, 0.3633)])
def test_the_error_of_a_gaussian(block: int, error: float) -> None:
    """1 - 2/pi, less what a block's own scale gains: 1 - 2/pi times (1 - 1/block)."""
    tensor = normal((2**18,), scale=1.0)
    found = float((tensor - through(tensor, block)).square().sum() / tensor.square().sum())
    assert found == pytest.approx(error, rel=5e-3)
    assert found == pytest.approx((1 - 2 / math.pi) * (1 - 1 / block), rel=5e-3)


def test_a_body_takes_a_bit_a_coordinate_and_two_bytes_a_block() -> None:
    (body, rest) = bodies_of(normal((MAX_BODY_COORDINATES + 100,)), 512)
    assert len(body.data) == 1 + MAX_BODY_COORDINATES // 8 + MAX_BODY_COORDINATES // 512 * 2
    assert len(rest.data) == 1 + 13 + 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_values_of_a_type_stay_finite(dtype: str) -> None:
    largest = min(torch.finfo(torch_dtype(dtype)).max, torch.finfo(torch.float32).max)
    tensor = torch.full((1000,), largest, dtype=torch_dtype(dtype))
    values = through(tensor).double()
    assert bool(values.isfinite().all())
    assert float(values[0]) >= 0.99 * largest


def test_what_is_beyond_float32_is_refused_with_its_name() -> None:
    tensor = torch.tensor([1.0, 1e39], dtype=torch.float64)
    with pytest.raises(InvalidError, match="'w'"):
        bodies_of(tensor)


def test_zeros_stay_zeros() -> None:
    assert not through(torch.zeros(1000)).any()
    assert not through(torch.full((1000,), 1e-40)).any()
    tensor = torch.cat([torch.zeros(64), torch.ones(64)])
    assert torch.equal(through(tensor, 32), tensor)


def test_buffers_are_raw_small_vectors_uniform_and_the_rest_signs() -> None:
    specs = [
        TensorSpec("weight", (50, 100), "float32"),
        TensorSpec("bias", (4096,), "float32"),
        TensorSpec("long", (4097,), "float32"),
        TensorSpec("little", (8, 16), "float32"),
        TensorSpec("mean", (50, 100), "float32", BUFFER),
        TensorSpec("steps", (), "int64"),
        TensorSpec("nothing", (0, 3), "float32"),
        TensorSpec("scale", (), "float32"),
    ]
    plans = SignConfig().plan([(spec, source_of(torch.zeros(spec.shape))) for spec in specs], seed=0)
    assert [plan.codec for plan in plans] == ["sign", "uniform", "sign", "uniform", "raw", "raw", "raw", "uniform"]


@pytest.mark.parametrize("block", [16, 48, 131072])
def test_a_block_is_a_power_of_two(block: int) -> None:
    with pytest.raises(ValidationError):
        SignConfig(block=block)  # type: ignore[arg-type]


def corrupt(position: int, value: int) -> bytes:
    (body,) = bodies_of(torch.linspace(-1, 1, 35), 32)
    assert len(body.data) == 1 + 2 * 2 + 5
    return body.data[:position] + bytes([value]) + body.data[position + 1 :]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", r"signs in blocks of 2\^0; expected 2\^5 to 2\^16"),
        (corrupt(0, 4), r"signs in blocks of 2\^4"),
        (corrupt(0, 17), r"signs in blocks of 2\^17"),
        (corrupt(0, 6), "signs and scales of 10 bytes; expected 8"),
        (corrupt(0, 5)[:-1], "signs and scales of 9 bytes; expected 10"),
        (corrupt(0, 5) + b"\0", "signs and scales of 11 bytes; expected 10"),
        (corrupt(2, 0xFF), "the scale 0xff"),
        (corrupt(4, 0x80), "the scale 0x80"),
        (corrupt(4, 0x00)[:3] + b"\x7f" + corrupt(4, 0x00)[4:], "the scale 0x007f"),
        (corrupt(9, 0x08), "the last byte of the signs is not filled with zeros"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        SIGN.decoder(TensorSpec("w", (35,), "float32"), None).decode(0, data, torch.zeros(35))


def test_an_infinite_scale_is_refused() -> None:
    data = b"\x05" + np.array([0x7F80], np.uint16).tobytes() + b"\0"
    with pytest.raises(PayloadError, match="the scale 0x7f80; expected 0, or 0x0080 to 0x7f7f"):
        SIGN.decoder(TensorSpec("w", (8,), "float32"), None).decode(0, data, torch.zeros(8))
