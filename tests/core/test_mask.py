"""Mask: survivors come back to the bit, all else is zero, and the bitmap takes its shortest form."""

from __future__ import annotations

import math
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.mask import MaskCodec, MaskConfig, ValueType, mask_plan
from fed_core.errors import InvalidError, PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.specs import DTYPES, TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, Body, decode, encode, finite, memory_of, normal, source_of, spec_of

MASK = MaskCodec()
HEADER = struct.Struct("<BBI")
NONE, ALL, BITS, DEFLATED = range(4)


def bodies_of(tensor: Tensor, values: ValueType = "float32") -> list[Body]:
    return encode(mask_plan(spec_of(tensor), source_of(tensor), values=values), tensor)


def through(tensor: Tensor, values: ValueType = "float32") -> Tensor:
    return decode(MASK, spec_of(tensor), None, bodies_of(tensor, values))


def pruned(tensor: Tensor, density: float, seed: int = 0) -> Tensor:
    keep = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(keep, tensor, torch.zeros_like(tensor))


def decode_bytes(data: bytes, num_coordinates: int = 16) -> Tensor:
    return decode(MASK, TensorSpec("w", (num_coordinates,), "float32"), None, [Body(0, num_coordinates, data)])


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 2**32))
def test_survivors_keep_every_bit_and_negative_zero_becomes_zero(
    dtype: str, count: int, density: float, seed: int
) -> None:
    tensor = pruned(finite(count, dtype, seed), density, seed).float().to(torch_dtype(dtype))
    # Adding zero turns -0.0 into +0.0 and changes nothing else.
    assert memory_of(through(tensor)) == memory_of(tensor + 0.0)


@pytest.mark.parametrize("values", ["float16", "bfloat16"])
def test_values_are_rounded_to_the_smaller_type(values: ValueType) -> None:
    tensor = pruned(normal((300, 300)), 0.3)
    assert torch.equal(through(tensor, values), tensor.to(torch_dtype(values)).float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("values", ["float16", "bfloat16", "float32"])
def test_a_tensor_of_a_small_type_keeps_it(dtype: str, values: ValueType) -> None:
    tensor = pruned(normal((500,), dtype), 0.5)
    assert torch.equal(through(tensor, values), tensor)
    assert len(bodies_of(tensor, values)[0].data) <= HEADER.size + 63 + 2 * int(tensor.count_nonzero())


def test_what_is_too_small_for_the_values_type_is_no_survivor() -> None:
    tensor = torch.tensor([1e-30, -1e-30, 1.0])
    (body,) = bodies_of(tensor, "float16")
    assert len(body.data) == HEADER.size + 1 + 2
    assert memory_of(through(tensor, "float16")) == memory_of(torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("tensor", "form", "bitmap_bytes"),
    [
        (torch.zeros(100_000), NONE, 0),
        (torch.ones(100_000), ALL, 0),
        (pruned(torch.ones(100_000), 0.5), BITS, 12_500),
        (torch.tensor([0.0, 1.0]), BITS, 1),
    ],
    ids=["zeros", "ones", "half", "two"],
)
def test_the_bitmap_takes_the_simplest_form_that_is_short(tensor: Tensor, form: int, bitmap_bytes: int) -> None:
    (body,) = bodies_of(tensor)
    assert HEADER.unpack_from(body.data)[1:] == (form, bitmap_bytes)
    assert len(body.data) == HEADER.size + bitmap_bytes + 4 * int(tensor.count_nonzero())
    assert torch.equal(through(tensor), tensor)


def test_a_bitmap_of_pruned_columns_costs_next_to_nothing() -> None:
    keeps = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.2
    tensor = torch.ones(400, 300) * keeps
    (body,) = bodies_of(tensor)
    _, form, bitmap_bytes = HEADER.unpack_from(body.data)
    assert form == DEFLATED
    assert bitmap_bytes < 120_000 / 8 / 20
    assert torch.equal(through(tensor), tensor)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2])
def test_a_scattered_bitmap_comes_close_to_its_entropy(density: float) -> None:
    tensor = pruned(torch.ones(190_000), density)
    (body,) = bodies_of(tensor)
    share = float(tensor.mean())
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert HEADER.unpack_from(body.data)[2] * 8 < (0.05 + 1.02 * entropy) * 190_000


def test_a_tensor_of_many_bodies() -> None:
    tensor = pruned(normal((1000, 1001)), 0.1)
    bodies = bodies_of(tensor)
    assert len(bodies) == 6
    assert torch.equal(decode(MASK, spec_of(tensor), None, reversed(bodies)), tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_longest_body_keeps_within_the_limits(dtype: str) -> None:
    tensor = torch.ones(500_000, dtype=torch_dtype(dtype))
    tensor[::500] = 0
    spec = spec_of(tensor)
    for body in bodies_of(tensor):
        least, most = MASK.body_bytes(spec, body.num_coordinates)
        assert least <= len(body.data) <= most <= MAX_BODY_BYTES
        plain = HEADER.size + body.num_coordinates // 8 + min(4, DTYPES[dtype]) * body.num_coordinates
        assert plain <= most


@pytest.mark.parametrize(
    ("value", "dtype", "values", "cure"),
    [
        (70_000.0, "float32", "float16", "bfloat16"),
        (3.4e38, "float32", "bfloat16", "raw"),
        (1e300, "float64", "float32", "raw"),
    ],
)
def test_a_value_beyond_the_values_type_is_refused_with_the_cure(
    value: float, dtype: str, values: ValueType, cure: str
) -> None:
    with pytest.raises(InvalidError, match=rf"tensor 'w' holds .* beyond {values}'s .* send it as {cure}"):
        through(torch.tensor([0.0, value], dtype=torch_dtype(dtype)), values)


def test_a_table_masks_floats_and_sends_the_rest_raw() -> None:
    dtypes = [*map(torch_dtype, FLOATS), torch.int64, torch.bool, torch.complex64]
    tensors = [torch.zeros(3, dtype=dtype) for dtype in dtypes] + [torch.zeros(0, 4)]
    plans = MaskConfig(values="float16").plan([(spec_of(tensor), source_of(tensor)) for tensor in tensors], seed=0)
    assert [plan.codec for plan in plans] == ["mask"] * 4 + ["raw"] * 4
    tensor = torch.tensor([0.1, 0.0, 0.0])
    assert len(encode(plans[0], tensor)[0].data) == HEADER.size + 1 + 2


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "a mask body of 0 bytes; its header alone has 6"),
        (HEADER.pack(3, NONE, 0), "values of type 3; expected 0 to 2"),
        (HEADER.pack(0, 4, 0), "a bitmap in form 4"),
        (HEADER.pack(0, NONE, 1) + b"\x00", "a bitmap in form 0 of 1 bytes; expected 0"),
        (HEADER.pack(0, BITS, 2) + b"\x00", "a bitmap of 2 bytes in a mask body that has 1 left"),
        (HEADER.pack(0, BITS, 1) + b"\x00", "a bitmap in form 2 of 1 bytes; expected 2"),
        (HEADER.pack(0, BITS, 2) + b"\x03\x00" + bytes(4), "4 bytes of values for 2 survivors; expected 8"),
        (HEADER.pack(0, NONE, 0) + b"\x00", "1 bytes of values for 0 survivors"),
        (HEADER.pack(2, ALL, 0) + bytes(64), "64 bytes of values for 16 survivors; expected 32"),
        (HEADER.pack(0, DEFLATED, 2) + b"\xff\xff", "cannot be inflated"),
        (HEADER.pack(0, DEFLATED, 0), "does not end where it says"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        decode_bytes(data)


@pytest.mark.parametrize("length", [0, 1, 3, 10_000_000])
def test_a_deflated_bitmap_of_another_length_is_refused(length: int) -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bitmap = deflater.compress(bytes(length)) + deflater.flush()
    with pytest.raises(PayloadError, match=r"a bitmap in form 3 of|does not end where it says"):
        decode_bytes(HEADER.pack(0, DEFLATED, len(bitmap)) + bitmap)


def test_a_deflated_bitmap_with_bytes_behind_it_is_refused() -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bitmap = deflater.compress(bytes(2)) + deflater.flush()
    assert decode_bytes(HEADER.pack(0, DEFLATED, len(bitmap)) + bitmap).count_nonzero() == 0
    with pytest.raises(PayloadError, match="does not end where it says"):
        decode_bytes(HEADER.pack(0, DEFLATED, len(bitmap) + 1) + bitmap + b"\x00")


def test_what_is_no_float_or_has_a_head_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"the codec 'mask' holds float32, .*, not int32; expected raw"):
        MASK.body_bytes(TensorSpec("w", (2,), "int32"), 2)
    with pytest.raises(PayloadError, match="the codec 'mask' has no head"):
        MASK.decoder(TensorSpec("w", (2,), "float32"), b"x")
