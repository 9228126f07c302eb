"""Uniform: half a scale of error, no bias where asked for, and the same bits whenever it is encoded again."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fed_core.codecs.base import is_bounded
from fed_core.codecs.uniform import UniformCodec, UniformConfig, uniform_plan
from fed_core.errors import InvalidError, PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, Body, decode, encode, finite, memory_of, normal, source_of, spec_of

UNIFORM = UniformCodec()
BITS = range(2, 9)
LEAST_SCALE = 2.0**-126


def bodies_of(tensor: Tensor, **options: object) -> list[Body]:
    return encode(uniform_plan(spec_of(tensor), source_of(tensor), **options), tensor)  # type: ignore[arg-type]


def through(tensor: Tensor, **options: object) -> Tensor:
    return decode(UNIFORM, spec_of(tensor), None, bodies_of(tensor, **options))


def coarsest_steps(tensor: Tensor, bits: int, block: int) -> Tensor:
    """For each coordinate, in float64, the most that its block's scale may be."""
    flat = tensor.reshape(-1).double().abs()
    largest = torch.cat([part.max().expand(len(part)) for part in flat.split(block)])
    return (largest / (2 ** (bits - 1) - 1) * (1 + 2**-7)).clamp_(min=LEAST_SCALE).view(tensor.shape)


def obvious_decode(body: Body) -> Tensor:
    """The format's description, coordinate by coordinate."""
    data, count = body.data, body.num_coordinates
    bits, block = data[0], 2 ** data[1]
    num_blocks = -(-count // block)
    scales = [struct.unpack("<f", b"\x00\x00" + data[2 + 2 * i : 4 + 2 * i])[0] for i in range(num_blocks)]
    packed, values = data[2 + 2 * num_blocks :], []
    for unit in range(0, count, 2**16):
        length = min(2**16, count - unit)
        integers, position = [0] * length, 0
        for width in [w for w in (8, 4, 2, 1) if bits & w]:
            num_bytes = -(-length * width // 8)
            for j in range(length):
                byte = packed[j % num_bytes]
                integers[j] += (byte >> width * (j // num_bytes) & 2**width - 1) << position
            packed, position = packed[num_bytes:], position + width
        values += [(k - 2 ** (bits - 1)) * scales[(unit + j) // block] for j, k in enumerate(integers)]
    assert not packed
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 2, 7, 33, 1000, 2**16 + 5])
def test_a_body_means_what_the_format_says(bits: int, count: int) -> None:
    tensor = normal((count,), seed=bits)
    (body,) = bodies_of(tensor, bits=bits, block=64)
    assert torch.equal(decode(UNIFORM, spec_of(tensor), None, [body]).double(), obvious_decode(body))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3000), st.sampled_from([32, 256, 65536]), st.integers(0, 2**32), st.booleans())
def test_the_error_is_at_most_half_a_scale(
    dtype: str, bits: int, count: int, block: int, seed: int, is_wild: bool
) -> None:
    tensor = finite(count, dtype, seed) if is_wild else normal((count,), dtype, seed=seed)
    error = (through(tensor, bits=bits, block=block).double() - tensor.double()).abs()
    steps = coarsest_steps(tensor, bits, block)
    # Where the scale had to be rounded down, the largest values of a block may be a whole one off.
    near_the_end = tensor.double().abs() > 3.3e38
    assert bool((error <= torch.where(near_the_end, 1.0, 0.5 * (1 + 1e-6)) * steps).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("is_wild", [False, True])
def test_small_types_add_only_their_own_rounding(dtype: str, bits: int, is_wild: bool) -> None:
    tensor = finite(5000, dtype, bits) if is_wild else normal((5000,), dtype)
    values = through(tensor, bits=bits, block=32).double()
    assert bool(values.isfinite().all())
    info = torch.finfo(torch_dtype(dtype))
    error = (values - tensor.double()).abs()
    is_near_the_end = tensor.double().abs() > 0.98 * info.max
    allowed = torch.where(is_near_the_end, 1.0, 0.5 * (1 + 1e-6)) * coarsest_steps(tensor, bits, 32)
    assert bool((error <= allowed + info.eps * values.abs() + info.smallest_normal * info.eps).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_the_largest_values_of_a_type_stay_finite(bits: int, dtype: str, rounding: str) -> None:
    largest = min(torch.finfo(torch_dtype(dtype)).max, torch.finfo(torch.float32).max)
    tensor = torch.tensor([largest, -largest, 0.0, largest / 3], dtype=torch_dtype(dtype))
    values = through(tensor, bits=bits, rounding=rounding)
    assert bool(values.isfinite().all())
    assert bool((values[:2].double() / tensor[:2].double() - 1 <= 2**-7).all())
    assert bool((values[:2].double() / tensor[:2].double() - 1 >= -(2**-7)).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 1e38, 1e-38, 1e-45])
def test_a_constant_comes_back_to_eight_bits(value: float, rounding: str) -> None:
    values = through(torch.full((1500,), value), rounding=rounding)
    assert values.unique().numel() == 1 or rounding == "stochastic"
    assert bool(((values.double() - value).abs() <= max(abs(value) * 2**-7, 2 * LEAST_SCALE)).all())


def test_zeros_and_multiples_of_the_scale_come_back_exactly() -> None:
    tensor = torch.zeros(2048)
    tensor[1024:1151] = torch.arange(1.0, 128.0) * 2**-10
    for rounding in ("nearest", "stochastic"):
        assert torch.equal(through(tensor, rounding=rounding), tensor)


def test_zeros_are_scale_zero() -> None:
    (body,) = bodies_of(torch.zeros(1025), block=1024)
    assert body.data[2:6] == bytes(4)


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_rounded_up_to_eight_bits_of_mantissa(bits: int) -> None:
    tensor = normal((32 * 1000,), seed=bits)
    (body,) = bodies_of(tensor, bits=bits, block=32)
    halves = np.frombuffer(body.data, "<u2", 1000, 2)
    scales = (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    exact = tensor.double().abs().view(-1, 32).amax(1).numpy() / (2 ** (bits - 1) - 1)
    assert (scales >= exact * (1 - 2**-24)).all()
    assert (scales <= exact * (1 + 2**-7)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_has_no_bias(bits: int) -> None:
    row, num_draws = normal((64,), seed=3), 16_384
    values = through(row.repeat(num_draws, 1), bits=bits, block=64, rounding="stochastic").double()
    # Five standard deviations of a mean of coin flips, none of which is worth more than half a step.
    allowed = 5 * 0.5 * coarsest_steps(row, bits, 64) / num_draws**0.5
    assert bool(((values.mean(0) - row.double()).abs() <= allowed).all())


def test_stochastic_rounding_repeats_itself_and_follows_seed_name_and_place() -> None:
    tensor = normal((200_000,))

    def body_of(seed: int = 1, name: str = "w", first: int = 0) -> bytes:
        plan = uniform_plan(spec_of(tensor, name), source_of(tensor), bits=4, rounding="stochastic", seed=seed)
        return bytes(plan.encode(first, tensor))

    bodies = [body_of(), body_of(seed=2), body_of(name="v"), body_of(first=2**20)]
    assert bodies == [body_of(), body_of(seed=2), body_of(name="v"), body_of(first=2**20)]
    assert len(set(bodies)) == 4


def test_stochastic_rounding_draws_anew_for_every_coordinate() -> None:
    tensor = torch.full((2**17,), 0.5)
    tensor[::1024] = 127.0
    values = through(tensor, bits=8, rounding="stochastic").view(2, -1)
    ups = (values > tensor.view(2, -1)).double()
    assert abs(float(ups.mean()) - 0.5) < 0.02
    # Two tiles agree no more than chance would have it.
    assert abs(float((ups[0] == ups[1]).double().mean()) - 0.5) < 0.02


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [32, 1024, 65536])
def test_bodies_keep_within_the_limits_and_decode_in_any_order(bits: int, block: int) -> None:
    tensor = normal((1_100_000,), seed=bits)
    spec = spec_of(tensor)
    bodies = bodies_of(tensor, bits=bits, block=block)
    assert len(bodies) == 2
    for body in bodies:
        least, most = UNIFORM.body_bytes(spec, body.num_coordinates)
        assert least <= len(body.data) <= most <= MAX_BODY_BYTES
        assert body.num_coordinates <= MAX_BODY_COORDINATES
        assert len(body.data) <= (bits + 16 / block + 0.01) / 8 * body.num_coordinates + 16
    assert memory_of(decode(UNIFORM, spec, None, bodies)) == memory_of(decode(UNIFORM, spec, None, bodies[::-1]))


def test_a_value_beyond_float32_is_refused() -> None:
    with pytest.raises(InvalidError, match=r"tensor 'w' holds a value of 1e\+300, beyond float32's .* send it as raw"):
        through(torch.tensor([0.0, -1e300], dtype=torch.float64))


def test_a_table_quantizes_floats_and_sends_the_rest_raw() -> None:
    dtypes = [*map(torch_dtype, FLOATS), torch.int64, torch.bool, torch.complex64]
    tensors = [torch.zeros(3, dtype=dtype) for dtype in dtypes] + [torch.zeros(0, 4)]
    table = UniformConfig(bits=5, block=32, rounding="stochastic")
    plans = table.plan([(spec_of(tensor), source_of(tensor)) for tensor in tensors], seed=0)
    assert [plan.codec for plan in plans] == ["uniform"] * 4 + ["raw"] * 4


def test_every_option_of_a_table_has_its_effect() -> None:
    tensor = normal((5000,))

    def body_of(seed: int = 0, **options: object) -> bytes:
        (plan,) = UniformConfig.model_validate(options).plan([(spec_of(tensor), source_of(tensor))], seed=seed)
        return encode(plan, tensor)[0].data

    assert body_of() == body_of(seed=1) == bodies_of(tensor)[0].data
    assert body_of(bits=3) == bodies_of(tensor, bits=3)[0].data != body_of()
    assert body_of(block=64) == bodies_of(tensor, block=64)[0].data != body_of()
    assert body_of(rounding="stochastic", seed=5) == bodies_of(tensor, rounding="stochastic", seed=5)[0].data
    assert body_of(rounding="stochastic", seed=5) != body_of(rounding="stochastic", seed=6)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"block": 48}, {"block": 16}, {"rounding": "up"}])
def test_a_table_refuses_what_the_format_cannot_say(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        UniformConfig.model_validate(options)


def corrupt(position: int, value: int) -> bytes:
    body = bytearray(bodies_of(torch.ones(40), bits=4, block=32)[0].data)
    body[position] = value
    return bytes(body)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "a uniform body of 0 bytes; its header alone has 2"),
        (b"\x04", "a uniform body of 1 bytes; its header alone has 2"),
        (corrupt(0, 1), "a uniform body of 1 bits; expected 2 to 8"),
        (corrupt(0, 9), "a uniform body of 9 bits; expected 2 to 8"),
        (corrupt(0, 5), "a uniform body of 26 bytes; expected 31"),
        (corrupt(1, 4), r"blocks of 2\^4 coordinates; expected 2\^5 to 2\^16"),
        (corrupt(1, 17), r"blocks of 2\^17 coordinates"),
        (corrupt(1, 6), "a uniform body of 26 bytes; expected 24"),
        (corrupt(0, 4)[:-1], "a uniform body of 25 bytes; expected 26"),
        (corrupt(0, 4) + b"\x00", "a uniform body of 27 bytes; expected 26"),
        (corrupt(3, 0xFF), "the scale 0xff13; expected 0, or 0x0080 to 0x7f7f"),
        (corrupt(3, 0x00), "the scale 0x0013; expected 0"),
        (corrupt(5, 0x80), "the scale 0x8013; expected 0"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(data: bytes, what: str) -> None:
    spec = TensorSpec("w", (40,), "float32")
    with pytest.raises(PayloadError, match=what):
        UNIFORM.decoder(spec, None).decode(0, data, torch.zeros(40))


def test_what_is_no_float_or_has_a_head_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"the codec 'uniform' holds float32, .*, not int8; expected raw"):
        UNIFORM.body_bytes(TensorSpec("w", (2,), "int8"), 2)
    with pytest.raises(PayloadError, match="the codec 'uniform' has no head"):
        UNIFORM.decoder(TensorSpec("w", (2,), "float32"), b"x")


@given(st.sampled_from(BITS), st.sampled_from([32, 1024]), st.binary(min_size=200, max_size=200), st.integers(1, 150))
def test_a_bound_covers_what_any_bytes_decode_to_and_refuses_what_decoding_refuses(
    bits: int, block: int, data: bytes, count: int
) -> None:
    spec = TensorSpec("w", (count,), "float32", "parameter")
    body = bytes([bits, block.bit_length() - 1]) + data[: UNIFORM.body_bytes(spec, count)[1]]
    decoder, out = UNIFORM.decoder(spec, None), torch.empty(count)
    assert is_bounded(decoder)
    for size in (
        len(body),
        2 + 2 * -(-count // block) + sum(-(-count * width // 8) for width in (8, 4, 2, 1) if bits & width),
    ):
        try:
            decoder.decode(0, body[:size], out)
        except PayloadError:
            with pytest.raises(PayloadError):
                decoder.bound(body[:size], count)
        else:
            bound = decoder.bound(body[:size], count)
            assert bound > torch.finfo(torch.float32).max or bound >= float(out.abs().max())
