"""Raw: every dtype, every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_core.codecs.raw import RawCodec, RawConfig, raw_plan
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import DTYPES, TensorSpec
from tests.core.coding import decode, encode, memory_of, random_bits, source_of, spec_of

RAW = RawCodec()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5000), st.sampled_from(sorted(DTYPES)), st.integers(0, 2**32))
def test_every_bit_is_kept(count: int, dtype: str, seed: int) -> None:
    tensor = random_bits(count, dtype, seed)
    bodies = encode(raw_plan(spec_of(tensor), source_of(tensor)), tensor)
    assert b"".join(body.data for body in bodies) == memory_of(tensor)
    assert memory_of(decode(RAW, spec_of(tensor), None, bodies)) == memory_of(tensor)


def test_encoding_copies_nothing() -> None:
    tile = torch.zeros(8)
    body = memoryview(raw_plan(spec_of(tile), source_of(tile)).encode(0, tile))
    tile[0] = 1.0
    assert bytes(body[:4]) == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_longest_body_keeps_within_the_limits(dtype: str) -> None:
    spec = TensorSpec("w", (2**21,), dtype)
    count = raw_plan(spec, lambda first, count: torch.zeros(count)).body_coordinates
    assert count <= MAX_BODY_COORDINATES
    assert RAW.body_bytes(spec, count) == (count * DTYPES[dtype],) * 2
    assert MAX_BODY_BYTES in RAW.body_bytes(spec, count) or count == MAX_BODY_COORDINATES


def test_a_table_plans_every_tensor_raw() -> None:
    tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(0, 4), torch.zeros((), dtype=torch.bool)]
    plans = RawConfig().plan([(spec_of(tensor), source_of(tensor)) for tensor in tensors], seed=7)
    assert [(plan.codec, plan.head) for plan in plans] == [("raw", None)] * 4


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_body_of_another_length_is_refused(length: int) -> None:
    spec = TensorSpec("w", (4,), "float32")
    with pytest.raises(PayloadError, match=f"{length} bytes; expected 16"):
        RAW.decoder(spec, None).decode(0, bytes(length), torch.zeros(4))


def test_a_bool_is_0_or_1() -> None:
    spec = TensorSpec("w", (2,), "bool")
    with pytest.raises(PayloadError, match="a bool of value 2"):
        RAW.decoder(spec, None).decode(0, b"\x01\x02", torch.zeros(2, dtype=torch.bool))


def test_a_head_is_refused() -> None:
    with pytest.raises(PayloadError, match="has no head; here is one of 3 bytes"):
        RAW.decoder(TensorSpec("w", (2,), "bool"), b"abc")
