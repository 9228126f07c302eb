"""PowerSGD's wire: the best approximation of a rank, and sums in one order."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fed_core.codecs.base import TensorPlan
from fed_core.codecs.entropy import svarint, varint
from fed_core.codecs.powersgd import FactorType, PowersgdCodec, PowersgdConfig, powersgd_plan
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES
from fed_core.specs import BUFFER, TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, Body, decode, encode, memory_of, normal, source_of, spec_of

POWERSGD = PowersgdCodec()


def plan_of(tensor: Tensor, *, rank: int = 4, values: FactorType = "float32", seed: int = 0) -> TensorPlan:
    return powersgd_plan(spec_of(tensor), source_of(tensor), rank=rank, values=values, seed=seed)


def through(tensor: Tensor, *, rank: int = 4, values: FactorType = "float32") -> Tensor:
    plan = plan_of(tensor, rank=rank, values=values)
    assert plan.codec == "powersgd"
    return decode(POWERSGD, spec_of(tensor), plan.head, encode(plan, tensor))


def error(tensor: Tensor, estimate: Tensor) -> float:
    x, y = tensor.double(), estimate.double()
    return float((x - y).square().sum() / x.square().sum())


def left_by(tensor: Tensor, rank: int) -> float:
    """The least error of a matrix of that rank (Eckart and Young)."""
    squares = torch.linalg.svdvals(tensor.double().flatten(1)).square()
    return float(squares[rank:].sum() / squares.sum())


def low_rank(rows: int, cols: int, rank: int, noise: float = 0.0) -> Tensor:
    return normal((rows, rank), scale=1.0, seed=1) @ normal((rank, cols), seed=2) + normal((rows, cols), scale=noise)


def head_of(left: Tensor, right: Tensor, *, exponent: int = 0, type_index: int = 0) -> bytes:
    values = torch.cat([left.reshape(-1), right.reshape(-1)])
    return bytes([type_index]) + varint(len(left)) + svarint(exponent) + memory_of(values)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("shape", [(60, 80), (200, 30), (30, 700), (16, 8, 5, 5)])
@pytest.mark.parametrize("values", ["float32", "float16"])
def test_the_error_is_that_of_the_best_matrix_of_the_rank(
    shape: tuple[int, ...], rank: int, values: FactorType
) -> None:
    tensor = low_rank(shape[0], math.prod(shape[1:]), 6, noise=0.01).view(shape)
    allowed = 1e-3 if values == "float16" else 1e-5
    assert error(tensor, through(tensor, rank=rank, values=values)) == pytest.approx(
        left_by(tensor, rank), rel=0.05, abs=allowed
    )


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_the_size_is_that_of_the_factors(values: FactorType) -> None:
    plan = plan_of(normal((300, 500)), rank=7, values=values)
    assert plan.head is not None
    assert 0 <= len(plan.head) - 7 * 800 * torch_dtype(values).itemsize <= 16
    assert [body.data for body in encode(plan, normal((300, 500)))] == [b"\0"]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(-60, 60), st.integers(0, 2**32))
def test_a_head_means_what_the_format_says(rank: int, rows: int, cols: int, exponent: int, seed: int) -> None:
    rank = min(rank, rows, cols)
    left, right = normal((rank, rows), scale=1.0, seed=seed), normal((rank, cols), scale=1.0, seed=seed + 1)
    spec = TensorSpec("w", (rows, cols), "float32")
    out = decode(POWERSGD, spec, head_of(left, right, exponent=exponent), [Body(0, rows * cols, b"\0")])
    for row in range(rows):
        for col in range(cols):
            total = np.float32(0)
            for p, q in zip(left[:, row].numpy(), right[:, col].numpy(), strict=True):
                total = np.float32(total + np.float32(p * q))
            assert float(out[row, col]) == float(np.float32(math.ldexp(float(total), exponent)))


def test_bodies_decode_alike_wherever_they_are_cut() -> None:
    tensor = low_rank(70, 2000, 5)
    spec, plan = spec_of(tensor), plan_of(tensor)
    whole = decode(POWERSGD, spec, plan.head, [Body(0, 140_000, b"\0")])
    cuts = [0, 1, 1999, 2000, 2001, 67_000, 139_999, 140_000]
    bodies = [Body(first, end - first, b"\0") for first, end in pairwise(cuts)]
    assert memory_of(decode(POWERSGD, spec, plan.head, bodies[::-1])) == memory_of(whole)


@pytest.mark.parametrize("cols", [1000, 2**17 + 3])
def test_bodies_are_whole_rows(cols: int) -> None:
    plan = plan_of(normal((12, cols)), rank=1)
    assert plan.body_coordinates % cols == 0
    assert plan.body_coordinates <= MAX_BODY_COORDINATES


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", ["float32", "float16"])
def test_values_of_any_size_come_back(dtype: str, values: FactorType) -> None:
    info = torch.finfo(torch_dtype(dtype))
    for size in (min(info.max, torch.finfo(torch.float32).max), 1.0, max(info.smallest_normal, 1e-37)):
        tensor = (torch.outer(normal((40,)).sign(), normal((50,), seed=3).sign()).double() * size).to(
            torch_dtype(dtype)
        )
        values_back = through(tensor, rank=1, values=values)
        assert bool(values_back.isfinite().all())
        assert error(tensor.double() / size, values_back.double() / size) <= 1e-5


def test_zeros_have_no_components() -> None:
    plan = plan_of(torch.zeros(40, 50))
    assert plan.head == bytes(3)
    assert memory_of(through(torch.zeros(40, 50))) == bytes(8000)


@pytest.mark.parametrize(
    ("tensor", "rank"),
    [
        (normal((5000,)), 1),
        (normal((1, 5000)), 1),
        (normal((5000, 1)), 1),
        (normal((20, 20)), 10),
        (torch.full((40, 50), 1e300, dtype=torch.float64), 1),
        (normal(()), 1),
    ],
)
def test_what_factors_would_not_shorten_is_raw(tensor: Tensor, rank: int) -> None:
    assert plan_of(tensor, rank=rank).codec == "raw"


def test_a_table_factorizes_floating_parameters_and_sends_the_rest_raw() -> None:
    dtypes = [*map(torch_dtype, FLOATS), torch.int64, torch.bool, torch.complex64]
    tensors = [torch.ones((40, 50), dtype=dtype) for dtype in dtypes] + [torch.zeros(0, 4)]
    described = [(spec_of(tensor), source_of(tensor)) for tensor in tensors]
    described.append((TensorSpec("running_var", (40, 50), "float32", BUFFER), source_of(torch.ones(40, 50))))
    plans = PowersgdConfig().plan(described, seed=0)
    assert [plan.codec for plan in plans] == ["powersgd"] * 4 + ["raw"] * 5


def test_every_option_of_a_table_has_its_effect() -> None:
    tensor = normal((80, 90))

    def head(seed: int = 0, **options: object) -> bytes | None:
        (plan,) = PowersgdConfig.model_validate(options).plan([(spec_of(tensor), source_of(tensor))], seed=seed)
        return plan.head

    assert head() == plan_of(tensor).head
    assert head(rank=3) == plan_of(tensor, rank=3).head != head()
    assert head(values="float16") == plan_of(tensor, values="float16").head != head()
    assert head(seed=5) == plan_of(tensor, seed=5).head != head()


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 1025}, {"values": "bfloat16"}])
def test_a_table_refuses_what_makes_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PowersgdConfig.model_validate(options)


SIDE = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (None, "a tensor of the codec 'powersgd' has no head"),
        (b"", "wants 1 more bytes"),
        (head_of(SIDE, SIDE, type_index=2), r"begins 2, 2, 0 for a matrix of 4 x 4"),
        (head_of(torch.ones(5, 4), torch.ones(5, 4)), r"begins 0, 5, 0 for a matrix of 4 x 4"),
        (head_of(SIDE, SIDE, exponent=127), r"begins 0, 2, 127"),
        (head_of(SIDE, SIDE, exponent=-127), r"begins 0, 2, -127"),
        (head_of(SIDE, SIDE)[:-1], "factors of 63 bytes; expected 64"),
        (head_of(SIDE, SIDE) + b"\0", "factors of 65 bytes; expected 64"),
        (head_of(SIDE, SIDE, type_index=1), "factors of 64 bytes; expected 32"),
        (head_of(SIDE * math.nan, SIDE), "not finite, or whose products may not be"),
        (head_of(SIDE * math.inf, SIDE * 0), "not finite, or whose products may not be"),
        (head_of(SIDE * 1e20, SIDE * 1e15), "not finite, or whose products may not be"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(head: bytes | None, what: str) -> None:
    with pytest.raises(PayloadError, match=what):
        POWERSGD.decoder(TensorSpec("w", (4, 4), "float32"), head)


@pytest.mark.parametrize("body", [b"", b"\1", b"\0\0"])
def test_a_body_is_a_zero_byte(body: bytes) -> None:
    decoder = POWERSGD.decoder(TensorSpec("w", (4, 4), "float32"), head_of(SIDE, SIDE))
    with pytest.raises(
        PayloadError, match=f"a body of {len(body)} bytes of the codec 'powersgd'; expected a zero byte"
    ):
        decoder.decode(0, body, torch.zeros(16))


def test_what_is_no_float_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"the codec 'powersgd' holds float32, .*, not int8; expected raw"):
        POWERSGD.body_bytes(TensorSpec("w", (2, 2), "int8"), 4)
