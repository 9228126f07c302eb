"""EDEN: the published error at every number of bits, whatever the values, and no bias where it says so."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.linalg import hadamard as hadamard_matrix
from scipy.stats import norm
from torch import Tensor

from fed_core.codecs.eden import _LEVELS, EdenCodec, EdenConfig, eden_plan, hadamard
from fed_core.errors import InvalidError, PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import BUFFER, TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, Body, decode, encode, memory_of, normal, source_of, spec_of

EDEN = EdenCodec()
# Errors of the Lloyd-Max quantizers of 1 to 8 bits, as published (Max 1960, table 1, to 5 bits), and as scipy integrates them.
PUBLISHED = (0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 6.442e-4, 1.635e-4, 4.119e-5)
UNBIASED = (0.5708, 0.1331, 0.03578, 0.009592, 0.002511, 6.447e-4, 1.635e-4, 4.119e-5)
BITS = range(1, 9)


def bodies_of(tensor: Tensor, *, bits: int = 2, unbiased: bool = True, seed: int = 0, name: str = "w") -> list[Body]:
    return encode(eden_plan(spec_of(tensor, name), bits=bits, unbiased=unbiased, seed=seed), tensor)


def through(tensor: Tensor, *, bits: int = 2, unbiased: bool = True, seed: int = 0) -> Tensor:
    plan = eden_plan(spec_of(tensor), bits=bits, unbiased=unbiased, seed=seed)
    return decode(EDEN, spec_of(tensor), plan.head, encode(plan, tensor))


def error(tensor: Tensor, estimate: Tensor) -> float:
    x, y = tensor.double(), estimate.double()
    return float((x - y).square().sum() / x.square().sum())


def obvious_decode(body: Body, bits: int, seed: int) -> Tensor:
    """The format's description, in float64, with whole matrices."""
    unit_length = 2**16
    lengths = [unit_length] * (body.num_coordinates // unit_length)
    lengths += [2**k for k in range(15, -1, -1) if body.num_coordinates % unit_length & 2**k]
    scales = struct.unpack_from(f"<{len(lengths)}f", body.data)
    planes = np.unpackbits(np.frombuffer(body.data[4 * len(lengths) :], np.uint8), bitorder="little")
    upper = np.array(_LEVELS[bits - 1])
    levels = np.concatenate([-upper[::-1], upper])
    values, start = [], 0
    units: list[np.ndarray] = []
    for unit in range(0, body.num_coordinates, unit_length):
        count = min(unit_length, body.num_coordinates - unit)
        padded = 8 * math.ceil(count / 8)
        planes, mine = planes[bits * padded :], planes[: bits * padded].reshape(bits, padded)[:, :count]
        units.append(mine.T @ 2 ** np.arange(bits))
    numbers = np.concatenate(units)
    for length, scale in zip(lengths, scales, strict=True):
        words = np.random.Philox(key=seed, counter=[0, body.first + start, 0, 0]).random_raw(math.ceil(length / 64))
        signs = [1 - 2 * (int(words[i // 64]) >> i % 64 & 1) for i in range(length)]
        rotated = levels[numbers[start : start + length]]
        values.append(hadamard_matrix(length) @ rotated * scale * signs)
        start += length
    return torch.from_numpy(np.concatenate(values))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1100])
def test_a_body_means_what_the_format_says(bits: int, count: int) -> None:
    tensor = normal((count,), seed=bits)
    plan = eden_plan(spec_of(tensor), bits=bits, unbiased=True, seed=bits)
    assert plan.head is not None
    body = Body(777, count, bytes(plan.encode(777, tensor)))
    out = torch.empty(count)
    EDEN.decoder(TensorSpec("w", (9000,), "float32"), plan.head).decode(777, body.data, out)
    expected = obvious_decode(body, plan.head[0], int.from_bytes(plan.head[1:], "little"))
    assert plan.head[0] == bits
    assert float((out.double() - expected).abs().max()) <= 1e-5 * float(tensor.abs().max())


@pytest.mark.parametrize("length", [1, 2, 8, 64, 128, 2048])
def test_the_transform_is_sylvesters(length: int) -> None:
    values = normal((length,), scale=1.0)
    expected = torch.from_numpy(hadamard_matrix(length)).double() @ values.double()
    assert torch.allclose(hadamard(values).double(), expected, atol=1e-3)


@pytest.mark.parametrize("length", [2**12, 2**16])
def test_the_transform_is_its_own_inverse_but_for_a_factor(length: int) -> None:
    values = normal((length,), scale=1.0)
    assert torch.allclose(hadamard(hadamard(values)) / length, values, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_tables_are_fixed_points_of_lloyds_iteration(bits: int) -> None:
    levels = np.array(_LEVELS[bits - 1])
    assert len(levels) == 2 ** (bits - 1)
    ends = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    shares = norm.sf(ends[:-1]) - norm.sf(ends[1:])
    assert np.allclose(levels, (norm.pdf(ends[:-1]) - norm.pdf(ends[1:])) / shares, atol=2e-6)
    distortion = 1 - 2 * (levels**2 * shares).sum()
    assert distortion == pytest.approx(PUBLISHED[bits - 1], rel=3e-3)
    assert distortion / (1 - distortion) == pytest.approx(UNBIASED[bits - 1], rel=1e-3)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_gaussian_is_within_a_percent_of_the_published_error(bits: int, unbiased: bool) -> None:
    tensor = normal((2**20,), seed=1)
    published = (UNBIASED if unbiased else PUBLISHED)[bits - 1]
    assert error(tensor, through(tensor, bits=bits, unbiased=unbiased)) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_sparse_values_of_any_size_lose_no_more_than_gaussian_ones(bits: int) -> None:
    is_zero = torch.rand(2**17, generator=torch.Generator().manual_seed(bits)) > 0.01
    tensor = (10 ** normal((2**17,), scale=0.5)).masked_fill_(is_zero, 0)
    assert error(tensor, through(tensor, bits=bits)) <= 1.01 * UNBIASED[bits - 1]
    assert error(tensor, through(tensor, bits=bits, unbiased=False)) <= 1.01 * PUBLISHED[bits - 1]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_mean_of_many_rotations_is_the_vector(bits: int) -> None:
    tensor, num_draws = normal((2048,)) ** 3, 200
    mean = sum((through(tensor, bits=bits, seed=seed).double() for seed in range(num_draws)), torch.zeros(2048))
    assert error(tensor, mean / num_draws) == pytest.approx(UNBIASED[bits - 1] / num_draws, rel=0.2)


@pytest.mark.parametrize("bits", BITS)
def test_gains(bits: int) -> None:
    tensor = normal((5000,))
    x = tensor.double()
    matched, shortened = (through(tensor, bits=bits, unbiased=unbiased).double() for unbiased in (True, False))
    assert float(x @ matched / (x @ x)) == pytest.approx(1, abs=1e-5)
    # The least error is where the rest is at right angles to the estimate.
    assert float(x @ shortened / (shortened @ shortened)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5000), st.integers(0, 2**32))
def test_no_length_costs_padding(bits: int, count: int, seed: int) -> None:
    tensor = normal((count,), seed=seed)
    (body,) = bodies_of(tensor, bits=bits)
    assert len(body.data) == 4 * count.bit_count() + bits * math.ceil(count / 8)
    assert error(tensor, through(tensor, bits=bits, unbiased=False)) < 1


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 3e38, 1e-38, 1e-45])
@pytest.mark.parametrize("count", [1, 2, 64])
def test_constants_and_zeros_come_back(value: float, count: int) -> None:
    tensor = torch.full((count,), value)
    values = through(tensor, bits=8).double()
    assert bool(((values - value).abs() <= max(abs(value) * 0.05, 2.0**-140)).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_largest_values_of_a_type_stay_finite(bits: int, dtype: str) -> None:
    largest = min(torch.finfo(torch_dtype(dtype)).max, torch.finfo(torch.float32).max)
    tensor = torch.where(normal((3000,)) > 0, largest, -largest).to(torch_dtype(dtype))
    values = through(tensor, bits=bits)
    assert bool(values.isfinite().all())
    assert error(tensor / 2, values / 2) <= UNBIASED[bits - 1] * 1.2 + 1e-4


def test_encoding_repeats_itself_and_follows_seed_name_and_place() -> None:
    tensor = normal((70_000,))
    plan = eden_plan(spec_of(tensor), bits=2, unbiased=True, seed=0)
    bodies = [
        bodies_of(tensor)[0].data,
        bodies_of(tensor, seed=2)[0].data,
        bodies_of(tensor, name="v")[0].data,
        bytes(plan.encode(2**20, tensor)),
    ]
    assert len(set(bodies)) == 4
    assert bodies_of(tensor)[0].data == bodies[0]


@pytest.mark.parametrize("bits", BITS)
def test_bodies_keep_within_the_limits_and_decode_in_any_order(bits: int) -> None:
    tensor = normal((1_100_000,), seed=bits)
    spec, plan = spec_of(tensor), eden_plan(spec_of(tensor), bits=bits, unbiased=True, seed=0)
    bodies = encode(plan, tensor)
    assert len(bodies) == 2
    for body in bodies:
        least, most = EDEN.body_bytes(spec, body.num_coordinates)
        assert least <= len(body.data) <= most <= MAX_BODY_BYTES
        assert body.num_coordinates <= MAX_BODY_COORDINATES
    assert memory_of(decode(EDEN, spec, plan.head, bodies)) == memory_of(decode(EDEN, spec, plan.head, bodies[::-1]))


def test_a_value_beyond_float32_is_refused() -> None:
    with pytest.raises(InvalidError, match=r"tensor 'w' holds a value of 1e\+300, beyond float32's .* send it as raw"):
        through(torch.tensor([0.0, -1e300], dtype=torch.float64))


def test_a_table_rotates_long_floating_parameters_and_sends_the_rest_raw() -> None:
    dtypes = [*map(torch_dtype, FLOATS), torch.int64, torch.bool, torch.complex64]
    tensors = [torch.ones(40, dtype=dtype) for dtype in dtypes] + [torch.zeros(0, 4), torch.ones(31)]
    table = EdenConfig(bits=5, unbiased=False)
    described = [(spec_of(tensor), source_of(tensor)) for tensor in tensors]
    described.append((TensorSpec("running_var", (64,), "float32", BUFFER), source_of(torch.ones(64))))
    plans = table.plan(described, seed=0)
    assert [plan.codec for plan in plans] == ["eden"] * 4 + ["raw"] * 6


def test_every_option_of_a_table_has_its_effect() -> None:
    tensor = normal((5000,))

    def body_of(seed: int = 0, **options: object) -> bytes:
        (plan,) = EdenConfig.model_validate(options).plan([(spec_of(tensor), source_of(tensor))], seed=seed)
        return encode(plan, tensor)[0].data

    assert body_of() == bodies_of(tensor)[0].data
    assert body_of(bits=3) == bodies_of(tensor, bits=3)[0].data != body_of()
    assert body_of(unbiased=False) == bodies_of(tensor, unbiased=False)[0].data != body_of()
    assert body_of(seed=5) == bodies_of(tensor, seed=5)[0].data != body_of()


@pytest.mark.parametrize("bits", [0, 9])
def test_a_table_refuses_what_the_format_cannot_say(bits: int) -> None:
    with pytest.raises(ValidationError):
        EdenConfig(bits=bits)


def corrupt(position: int, *values: int) -> bytes:
    body = bytearray(bodies_of(torch.ones(40))[0].data)
    body[position : position + len(values)] = values
    return bytes(body)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an eden body of 0 bytes; expected 18"),
        (corrupt(0)[:-1], "an eden body of 17 bytes; expected 18"),
        (corrupt(0) + b"\x00", "an eden body of 19 bytes; expected 18"),
        (corrupt(2, 0x80, 0x7F), "a scale that is negative or not finite"),
        (corrupt(6, 0xC0, 0x7F), "a scale that is negative or not finite"),
        (corrupt(3, 0xBF), "a scale that is negative or not finite"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(data: bytes, what: str) -> None:
    spec = TensorSpec("w", (40,), "float32")
    with pytest.raises(PayloadError, match=what):
        EDEN.decoder(spec, bytes([2, *range(8)])).decode(0, data, torch.zeros(40))


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (None, "a tensor of the codec 'eden' has no head"),
        (bytes([2, *range(7)]), "wants 8 more bytes where 7 are left"),
        (bytes([2, *range(9)]), "is followed by 1 bytes"),
        (bytes([0, *range(8)]), "the codec 'eden' has 0 bits; expected 1 to 8"),
        (bytes([9, *range(8)]), "the codec 'eden' has 9 bits; expected 1 to 8"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(head: bytes | None, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        EDEN.decoder(TensorSpec("w", (40,), "float32"), head)


def test_what_is_no_float_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"the codec 'eden' holds float32, .*, not int8; expected raw"):
        EDEN.body_bytes(TensorSpec("w", (2,), "int8"), 2)
