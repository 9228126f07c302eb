"""The contract of a codec, run over every codec in the table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.base import Codec
from fed_core.codecs.registry import CODECS, codec_named
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES, MAX_CODEC_BYTES, MAX_HEAD_BYTES
from fed_core.specs import DTYPES, TensorSpec
from fed_core.tensors import torch_dtype

EVERY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def random_values(num_coordinates: int, dtype: str, seed: int) -> Tensor:
    """Every bit pattern of the dtype, NaN payloads included; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "bool":
        return torch.randint(0, 2, (num_coordinates,), generator=generator).bool()
    memory = torch.randint(0, 256, (num_coordinates * DTYPES[dtype],), generator=generator, dtype=torch.uint8)
    return memory.view(torch_dtype(dtype))


def memory_of(tensor: Tensor) -> bytes:
    """Bits, so that NaN equals itself and -0 is not 0."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def encode(codec: Codec, tile: Tensor, dtype: str) -> tuple[bytes | None, bytes]:
    spec = TensorSpec("w", (len(tile),), dtype)
    head = codec.plan(spec, lambda first, count: tile[first : first + count])
    return head, bytes(codec.encode(head, tile))


@EVERY_CODEC
def test_a_codec_is_found_by_its_kind(codec: Codec) -> None:
    assert codec_named(codec.kind) is codec
    assert 1 <= len(codec.kind) <= MAX_CODEC_BYTES


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PayloadError, match=r"unknown codec 'pickle'; this version knows .*raw"):
        codec_named("pickle")


@EVERY_CODEC
@EVERY_DTYPE
def test_the_longest_body_keeps_within_the_limits(codec: Codec, dtype: str) -> None:
    count = codec.body_coordinates(dtype)
    assert 1 <= count <= MAX_BODY_COORDINATES
    assert codec.max_body_bytes(count, dtype) <= MAX_BODY_BYTES
    head, body = encode(codec, random_values(count, dtype, 0), dtype)
    assert codec.has_head == (head is not None)
    assert len(head or b"") <= MAX_HEAD_BYTES
    assert 1 <= codec.min_body_bytes(count, dtype) <= len(body) <= codec.max_body_bytes(count, dtype)


@EVERY_CODEC
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.sampled_from(sorted(DTYPES)), st.integers(0, 2**32))
def test_decoding_is_deterministic_and_fills_the_tile(codec: Codec, count: int, dtype: str, seed: int) -> None:
    tile = random_values(count, dtype, seed)
    head, body = encode(codec, tile, dtype)
    first, second = (random_values(count, dtype, other) for other in (seed + 1, seed + 2))
    codec.decode(head, memoryview(body), first)
    codec.decode(head, memoryview(body), second)
    assert memory_of(first) == memory_of(second)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5000), st.sampled_from(sorted(DTYPES)), st.integers(0, 2**32))
def test_raw_keeps_every_bit(count: int, dtype: str, seed: int) -> None:
    tile = random_values(count, dtype, seed)
    _, body = encode(codec_named("raw"), tile, dtype)
    out = random_values(count, dtype, seed + 1)
    codec_named("raw").decode(None, body, out)
    assert memory_of(out) == memory_of(tile) == body


def test_raw_encodes_without_copying() -> None:
    tile = torch.zeros(8)
    body = memoryview(codec_named("raw").encode(None, tile))
    tile[0] = 1.0
    assert bytes(body[:4]) == b"\x00\x00\x80\x3f"


@EVERY_CODEC
@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300), st.integers(1, 64), st.sampled_from(sorted(DTYPES)))
def test_garbage_is_refused_or_decoded_but_never_a_crash(codec: Codec, body: bytes, count: int, dtype: str) -> None:
    head, _ = encode(codec, random_values(count, dtype, 0), dtype)
    out = torch.zeros(count, dtype=torch_dtype(dtype))
    try:
        codec.decode(head, body, out)
    except PayloadError:
        return
    if dtype == "bool":
        assert out.view(torch.uint8).max() <= 1


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_raw_body_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(PayloadError, match=f"{length} bytes; expected 16"):
        codec_named("raw").decode(None, bytes(length), torch.zeros(4))


def test_a_bool_is_0_or_1() -> None:
    with pytest.raises(PayloadError, match="a bool of value 2"):
        codec_named("raw").decode(None, b"\x01\x02", torch.zeros(2, dtype=torch.bool))
