"""Top-k: the largest survive wherever they are, and what is lost is the rest and what the values' own encoding loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fed_core.codecs.base import TensorPlan
from fed_core.codecs.cast import CastConfig
from fed_core.codecs.entropy import varint
from fed_core.codecs.nested import AnyValues, FsqValues, UniformValues, ValuesConfig
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.topk import TopkCodec, TopkConfig
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import BUFFER, TensorSpec
from tests.core.coding import FLOATS, Body, decode, encode, finite, memory_of, normal, source_of, spec_of

TOPK = TopkCodec()
RAW, CAST, UNIFORM, FSQ = 1, 2, 3, 4
VALUES: list[AnyValues] = [
    RawConfig(),
    CastConfig(),
    UniformValues(bits=3, block=32),
    UniformValues(bits=8, rounding="stochastic"),
    FsqValues(target_error=0.02),
]
EVERY_VALUES = pytest.mark.parametrize("values", VALUES, ids=lambda values: values.kind)


def plans_of(tensors: list[Tensor], fraction: float, values: AnyValues, seed: int = 0) -> list[TensorPlan]:
    inputs = [(spec_of(tensor, f"w{index}"), source_of(tensor)) for index, tensor in enumerate(tensors)]
    plans = TopkConfig(fraction=fraction, values=values).plan(inputs, seed=seed)
    assert {plan.codec for plan in plans} == {"topk"}
    return plans


def through(tensors: list[Tensor], fraction: float, values: AnyValues) -> list[Tensor]:
    return [
        decode(TOPK, spec_of(tensor, f"w{index}"), plan.head, encode(plan, tensor))
        for index, (tensor, plan) in enumerate(zip(tensors, plans_of(tensors, fraction, values), strict=True))
    ]


def survivors_of(tensors: list[Tensor], fraction: float) -> Tensor:
    """Which survive, over all tensors."""
    magnitudes = torch.cat([tensor.reshape(-1).float().abs() for tensor in tensors])
    wanted = max(1, round(fraction * len(magnitudes)))
    chosen = torch.sort(magnitudes, descending=True, stable=True).indices[:wanted]
    survives = torch.zeros(len(magnitudes), dtype=torch.bool)
    survives[chosen] = True
    return survives & (magnitudes > 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(130, 3000), st.floats(0.001, 1), st.integers(0, 2**32), st.sampled_from(FLOATS))
def test_raw_survivors_keep_every_bit_and_the_others_are_zero(
    count: int, fraction: float, seed: int, dtype: str
) -> None:
    tensors = [finite(2 * count, dtype, seed).view(2, -1), finite(3 * 70, dtype, seed + 1).view(3, 70)]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    decoded = torch.cat([tensor.reshape(-1) for tensor in through(tensors, fraction, RawConfig())])
    survives = survivors_of(tensors, fraction)
    assert memory_of(decoded) == memory_of(torch.where(survives, flat, torch.zeros_like(flat)))


@EVERY_VALUES
@pytest.mark.parametrize("fraction", [0.003, 0.05, 0.5, 1.0])
def test_the_error_is_that_of_the_rest_and_of_the_values(values: AnyValues, fraction: float) -> None:
    tensors = [normal((150, 200), seed=1), normal((20_000,), scale=0.03, seed=2), normal((40, 10), scale=1e-4, seed=3)]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).double()
    decoded = torch.cat([tensor.reshape(-1) for tensor in through(tensors, fraction, values)]).double()
    survives = survivors_of(tensors, fraction)
    assert not decoded[~survives].any()
    error, energy = (flat - decoded).square(), flat.square()
    rest, inner = float(error[~survives].sum()), float(error[survives].sum())
    assert rest == pytest.approx(float(energy[~survives].sum()))
    of_values = {"raw": 0.0, "cast": 4e-6, "uniform": 0.055, "fsq": 0.022}[values.kind]
    assert inner <= of_values * float(energy[survives].sum())


def test_values_of_a_tensor_are_one_vector() -> None:
    """The survivors are encoded as the same vector would be by itself."""
    tensor = normal((300, 400))
    values = FsqValues(target_error=0.05)
    (plan,) = plans_of([tensor], 0.3, values)
    vector = tensor.reshape(-1)[survivors_of([tensor], 0.3)]
    (of_vector,) = values.plan([(spec_of(vector, "w0"), source_of(vector))], seed=0)
    assert plan.head == bytes([FSQ]) + (of_vector.head or b"")
    assert plan.encode(0, tensor.reshape(-1)).endswith(of_vector.encode(0, vector))


@EVERY_VALUES
def test_bodies_are_as_long_as_their_survivors_allow(values: AnyValues) -> None:
    tensor = normal((2_500_000,), "float64" if values.kind == "raw" else "float32")
    dense = torch.zeros(2_500_000, dtype=tensor.dtype)
    dense[:600_000] = tensor[:600_000]
    for each, fraction, longest in ((tensor, 0.01, MAX_BODY_COORDINATES), (tensor, 1.0, 0), (dense, 0.24, 0)):
        (plan,) = plans_of([each], fraction, values)
        assert plan.body_coordinates >= max(longest, 2**16)
        decoded = torch.empty_like(each)
        for body in encode(plan, each):
            least, most = TOPK.body_bytes(spec_of(each), body.num_coordinates)
            assert least <= len(body.data) <= most <= MAX_BODY_BYTES
            out = decoded[body.first : body.first + body.num_coordinates]
            TOPK.decoder(spec_of(each), plan.head).decode(body.first, body.data, out)
        kept = survivors_of([each], fraction)
        assert float((decoded - each)[kept].square().sum()) <= 0.06 * float(each.square().sum())


def test_a_tensor_of_which_nothing_survives_takes_two_bytes() -> None:
    tensors = [normal((100, 100)), normal((100, 100), scale=1e-6), torch.zeros(50, 50)]
    plans = plans_of(tensors, 0.1, UniformValues())
    assert [plan.head for plan in plans] == [bytes([UNIFORM]), b"\0", b"\0"]
    assert [encode(plan, tensor)[0].data for plan, tensor in zip(plans[1:], tensors[1:], strict=True)] == [b"\0", b"\0"]
    assert not through(tensors, 0.1, UniformValues())[1].any()


def test_at_one_percent_a_survivor_takes_eight_bits_and_its_value() -> None:
    tensor = normal((1024, 1024))
    for values, bits in ((RawConfig(), 32.0), (CastConfig(), 16.0), (UniformValues(bits=4, block=128), 4.13)):
        (plan,) = plans_of([tensor], 0.01, values)
        (body,) = encode(plan, tensor)
        assert 8 * len(body.data) / 10_486 == pytest.approx(8.11 + bits, abs=0.05)


def test_buffers_are_raw_and_small_vectors_uniform() -> None:
    specs = [
        TensorSpec("weight", (50, 100), "float32"),
        TensorSpec("bias", (100,), "float32"),
        TensorSpec("mean", (50, 100), "float32", BUFFER),
        TensorSpec("steps", (), "int64"),
    ]
    plans = TopkConfig().plan([(spec, source_of(torch.ones(spec.shape))) for spec in specs], seed=0)
    assert [plan.codec for plan in plans] == ["topk", "uniform", "raw", "raw"]


@pytest.mark.parametrize("kind", ["topk", "randomk", "ternary", "sign", "mask", "auto", "lrq"])
def test_values_are_not_sparse_themselves(kind: str) -> None:
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        TypeAdapter(ValuesConfig).validate_python({"kind": kind})


def test_feedback_is_on_unless_told_otherwise() -> None:
    assert TopkConfig().wants_feedback
    assert not TopkConfig(feedback=False).wants_feedback


SPEC = TensorSpec("w", (10, 10), "float32")


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (None, "has no head"),
        (b"", "wants 1 more bytes"),
        (b"\x05", "values in the codec 5; expected 1 to 4"),
        (b"\0\0", "values in the codec 0"),
        (b"\x01\0", "values in the codec 'raw' with a head of 1 bytes"),
        (b"\x04", "wants 1 more bytes"),
        (b"\x04\xff", "unknown flags 255 of the codec 'fsq'"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(head: bytes | None, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        TOPK.decoder(SPEC, head)


@pytest.mark.parametrize(
    ("head", "body", "what"),
    [
        (b"\0", b"", "wants 1 more bytes"),
        (b"\0", b"\0\0", "followed by 1 bytes"),
        (b"\0", varint(100), "100 survivors of a tensor that has none"),
        (b"\x01", varint(100), "100 values in 0 bytes; expected 400 to 400"),
        (b"\x01", varint(100) + bytes(401), "100 values in 401 bytes"),
        (b"\x02", varint(100) + bytes([7]) + bytes(200), "a cast body of type 7"),
        (b"\x03", varint(100) + bytes(60), "a uniform body of 0 bits"),
        (b"\x04\0", varint(100) + b"\1", "expected one zero byte"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(head: bytes, body: bytes, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        TOPK.decoder(SPEC, head).decode(0, body, torch.zeros(100))


def test_every_body_can_be_decoded_by_itself() -> None:
    tensor = normal((1_200_000,)) * (torch.arange(1_200_000) % 1000 < 500)
    for values in VALUES:
        (plan,) = plans_of([tensor], 0.4, values)
        bodies = encode(plan, tensor)
        assert len(bodies) > 1
        whole = decode(TOPK, spec_of(tensor), plan.head, bodies)
        last: Body = bodies[-1]
        out = torch.full((last.num_coordinates,), np.nan)
        TOPK.decoder(spec_of(tensor), plan.head).decode(last.first, last.data, out)
        assert torch.equal(out, whole[last.first :])
