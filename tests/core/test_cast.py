"""Cast: two bytes per coordinate, rounded once, and no value lost to infinity."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.cast import CastCodec, CastConfig, CastType, cast_plan
from fed_core.errors import InvalidError, PayloadError
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, decode, encode, finite, memory_of, normal, source_of, spec_of

CAST = CastCodec()
EVERY_TYPE = pytest.mark.parametrize("to", ["float16", "bfloat16"])


def through(tensor: Tensor, to: CastType) -> Tensor:
    spec = spec_of(tensor)
    return decode(CAST, spec, None, encode(cast_plan(spec, source_of(tensor), to=to), tensor))


@EVERY_TYPE
@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_values_are_rounded_to_the_type_and_then_to_the_tensors(
    to: CastType, dtype: str, count: int, seed: int
) -> None:
    tensor = finite(count, dtype, seed)
    in_reach = 65504 if to == "float16" else 3.3e38
    tensor = torch.where(tensor.float().abs() <= in_reach, tensor, torch.zeros_like(tensor))
    expected = tensor.float().to(torch_dtype(to)).float().to(tensor.dtype)
    assert memory_of(through(tensor, to)) == memory_of(expected)


@EVERY_TYPE
def test_a_tensor_of_many_bodies(to: CastType) -> None:
    tensor = normal((1000, 1001))
    assert torch.equal(through(tensor, to), tensor.to(torch_dtype(to)).float())


def test_the_bytes_are_the_type_and_the_values() -> None:
    tensor = torch.tensor([1.0, -2.0])
    spec = spec_of(tensor)
    (half,) = encode(cast_plan(spec, source_of(tensor), to="float16"), tensor)
    (brain,) = encode(cast_plan(spec, source_of(tensor), to="bfloat16"), tensor)
    assert half.data == b"\x00" + struct.pack("<2e", 1.0, -2.0)
    assert brain.data == b"\x01" + bytes.fromhex("803f 00c0")
    assert CAST.body_bytes(spec, 2) == (5, 5)


@pytest.mark.parametrize("value", [65520.0, -1e6, 3e38])
def test_a_value_beyond_float16_is_refused_with_the_cure(value: float) -> None:
    tensor = torch.zeros(300_000)
    tensor[299_999] = value
    with pytest.raises(InvalidError, match=r"tensor 'w' holds .* beyond float16's 65504; .* send it as bfloat16"):
        through(tensor, "float16")


@pytest.mark.parametrize(("value", "dtype"), [(3.4e38, torch.float32), (1e300, torch.float64)])
@EVERY_TYPE
def test_a_value_beyond_both_types_is_refused_with_the_cure(value: float, dtype: torch.dtype, to: CastType) -> None:
    with pytest.raises(InvalidError, match=r"tensor 'w' holds .* send it as raw"):
        through(torch.tensor([0.0, value], dtype=dtype), to)


def test_the_largest_values_pass() -> None:
    assert through(torch.tensor([65519.0]), "float16").tolist() == [65504.0]
    assert through(torch.tensor([65519.0]), "bfloat16").tolist() == [65536.0]


def test_a_table_casts_only_what_gets_smaller() -> None:
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    tensors = [torch.zeros(3, dtype=dtype) for dtype in dtypes] + [torch.zeros(0, 4)]
    plans = CastConfig().plan([(spec_of(tensor), source_of(tensor)) for tensor in tensors], seed=0)
    assert [plan.codec for plan in plans] == ["cast", "cast"] + ["raw"] * 6


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_a_table_casts_to_its_type(to: CastType) -> None:
    tensor = normal((50,))
    (plan,) = CastConfig(to=to).plan([(spec_of(tensor), source_of(tensor))], seed=0)
    assert torch.equal(decode(CAST, spec_of(tensor), None, encode(plan, tensor)), tensor.to(torch_dtype(to)).float())


@pytest.mark.parametrize("body", [b"", b"\x00", bytes(4), bytes(6)])
def test_a_body_of_another_length_is_refused(body: bytes) -> None:
    with pytest.raises(PayloadError, match=f"a cast body of {len(body)} bytes; expected 5"):
        CAST.decoder(TensorSpec("w", (2,), "float32"), None).decode(0, body, torch.zeros(2))


def test_a_body_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"type 2; expected 0 \(float16\) or 1 \(bfloat16\)"):
        CAST.decoder(TensorSpec("w", (2,), "float32"), None).decode(0, b"\x02" + bytes(4), torch.zeros(2))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_what_is_no_float_is_refused(dtype: str) -> None:
    spec = TensorSpec("w", (2,), dtype)
    with pytest.raises(PayloadError, match=f"holds float32, .*, not {dtype}; expected raw"):
        CAST.body_bytes(spec, 2)
    with pytest.raises(PayloadError, match=f"not {dtype}"):
        CAST.decoder(spec, None)


def test_a_head_is_refused() -> None:
    with pytest.raises(PayloadError, match="the codec 'cast' has no head; here is one of 1 bytes"):
        CAST.decoder(TensorSpec("w", (2,), "float32"), b"x")
