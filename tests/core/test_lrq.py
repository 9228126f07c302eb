"""LRQ: matrices by their singular components."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.base import TensorPlan
from fed_core.codecs.entropy import ByteReader, svarint, varint
from fed_core.codecs.factors import fit_factors, read_factors, write_factors
from fed_core.codecs.fsq import FsqAnalysis, StepTooFineError
from fed_core.codecs.lrq import MAX_FACTOR_SYMBOLS, LrqAnalysis, LrqCodec, LrqConfig, NotLowRankError
from fed_core.codecs.planning import LAMBDA
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec
from tests.core.coding import FLOATS, Body, decode, encode, memory_of, normal, source_of, spec_of


def low_rank(rows: int, cols: int, rank: int = 4, *, noise: float = 1e-3, seed: int = 0) -> Tensor:
    """Components of falling size, heavy-tailed as those of updates are, and noise."""
    left, right = normal((rows, rank), scale=1.0, seed=seed), normal((rank, cols), scale=1.0, seed=seed + 1)
    sizes = 0.6 ** torch.arange(float(rank))
    return (left**3 * sizes) @ right**3 * 0.01 + normal((rows, cols), scale=noise, seed=seed + 2)


def error_of(tensor: Tensor, estimate: Tensor) -> float:
    """|x - x'|^2."""
    return float((tensor.double() - estimate.double()).square().sum())


def energy_of(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def step_of(tensor: Tensor, relative: float) -> float:
    """A step in units of the root mean square."""
    return relative * math.sqrt(energy_of(tensor) / tensor.numel())


def analyze(tensor: Tensor, **options: object) -> LrqAnalysis:
    return LrqAnalysis(spec_of(tensor), source_of(tensor), **options)  # type: ignore[arg-type]


def decoded(tensor: Tensor, plan: TensorPlan) -> Tensor:
    return decode(LrqCodec(), spec_of(tensor), plan.head, encode(plan, tensor))


def size_of(tensor: Tensor, plan: TensorPlan) -> int:
    """Bits of head and bodies."""
    return 8 * (len(plan.head or b"") + sum(len(body.data) for body in encode(plan, tensor)))


def rank_of(plan: TensorPlan) -> int:
    assert plan.head is not None
    return plan.head[1]


@pytest.mark.parametrize("shape", [(5, 5), (61, 83), (7, 900), (900, 7), (24, 16, 3, 3)])
@pytest.mark.parametrize("relative_step", [0.3, 2.0, 10.0])
@pytest.mark.parametrize("match_gain", [False, True])
def test_bits_and_error_are_what_was_foreseen(shape: tuple[int, ...], relative_step: float, match_gain: bool) -> None:
    tensor = low_rank(shape[0], math.prod(shape[1:])).view(shape)
    step = step_of(tensor, relative_step)
    analysis = analyze(tensor, residual=False, match_gain=match_gain)
    cost, plan = analysis.cost(step), analysis.plan(step)
    assert error_of(tensor, decoded(tensor, plan)) == pytest.approx(
        cost.squared_error, rel=1e-2, abs=1e-5 * energy_of(tensor)
    )
    assert size_of(tensor, plan) == pytest.approx(cost.bits, rel=0.02, abs=150)


def test_a_coarser_step_takes_fewer_bits_and_leaves_more_error() -> None:
    tensor = low_rank(80, 150, 12)
    analysis = analyze(tensor)
    costs = [analysis.cost(step_of(tensor, relative)) for relative in (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)]
    assert all(fine.bits > coarse.bits for fine, coarse in pairwise(costs))
    assert all(fine.squared_error < coarse.squared_error for fine, coarse in pairwise(costs))


def test_one_percent_of_the_error_takes_a_fraction_of_a_bit() -> None:
    tensor = low_rank(200, 300)
    analysis = analyze(tensor)
    step = step_of(tensor, 0.75)
    plan = analysis.plan(step)
    assert error_of(tensor, decoded(tensor, plan)) < 0.01 * energy_of(tensor)
    assert size_of(tensor, plan) < 0.25 * tensor.numel()


def test_components_are_kept_while_they_pay() -> None:
    tensor = low_rank(100, 200, 10)
    analysis = analyze(tensor, residual=False)
    step = step_of(tensor, 2.0)
    best = analysis.cost(step)
    ranks = []
    for max_rank in range(1, 12):
        cost = analyze(tensor, residual=False, max_rank=max_rank).cost(step)
        assert best.squared_error + LAMBDA * step**2 * best.bits <= (
            cost.squared_error + LAMBDA * step**2 * cost.bits
        ) * (1 + 1e-3)
        ranks.append(rank_of(analyze(tensor, residual=False, max_rank=max_rank).plan(step)))
    assert 1 < ranks[-1] < 10


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_floating_type(dtype: str) -> None:
    tensor = low_rank(40, 70).to(getattr(torch, dtype))
    for residual in (False, True):
        plan = analyze(tensor, residual=residual).plan(step_of(tensor, 0.3))
        estimate = decoded(tensor, plan)
        assert estimate.dtype == tensor.dtype
        assert error_of(tensor, estimate) < 0.02 * energy_of(tensor)


def test_decoding_is_integer_arithmetic_rounded_once() -> None:
    tensor = low_rank(9, 14, 3)
    head = analyze(tensor, residual=False).plan(step_of(tensor, 0.4)).head
    assert head is not None
    reader = ByteReader(head)
    assert reader.u8() == 0
    rank, exponent = reader.varint(), reader.svarint()
    gains = [reader.svarint() for _ in range(rank)]
    factors = read_factors(reader, rank, 9, 14).tolist()
    assert rank > 1
    for dtype in ("float32", "float64"):
        spec = TensorSpec("w", (9, 14), dtype)
        values = decode(LrqCodec(), spec, head, [Body(0, 9 * 14, b"\0")])
        for row, col in np.ndindex(9, 14):
            exact = sum(Fraction(gain) * f[row] * f[9 + col] for gain, f in zip(gains, factors, strict=True))
            exact *= Fraction(2) ** exponent
            assert float(values[row, col]) == (float(np.float32(float(exact))) if dtype == "float32" else float(exact))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(5, 30),
    cols=st.integers(5, 30),
    cuts=st.lists(st.integers(1, 899), max_size=6),
    residual=st.booleans(),
)
def test_bodies_may_be_cut_anywhere(rows: int, cols: int, cuts: list[int], residual: bool) -> None:
    tensor = low_rank(rows, cols, seed=rows)
    plan = analyze(tensor, residual=residual).plan(step_of(tensor, 1.0))
    flat, borders = tensor.view(-1), sorted({0, *(cut for cut in cuts if cut < tensor.numel()), tensor.numel()})
    bodies = [Body(first, end - first, bytes(plan.encode(first, flat[first:end]))) for first, end in pairwise(borders)]
    whole = decoded(tensor, plan)
    assert memory_of(decode(LrqCodec(), spec_of(tensor), plan.head, bodies[::-1])) == memory_of(whole)


def test_rows_longer_than_a_body_are_cut() -> None:
    tensor = low_rank(5, MAX_BODY_COORDINATES + 1001, noise=0)
    plan = analyze(tensor, max_rank=4).plan(step_of(tensor, 1.0))
    assert plan.body_coordinates == MAX_BODY_COORDINATES
    assert error_of(tensor, decoded(tensor, plan)) < 0.05 * energy_of(tensor)


def test_a_body_holds_whole_rows() -> None:
    tensor = low_rank(1200, 1000)
    plan = analyze(tensor, residual=False).plan(step_of(tensor, 3.0))
    assert plan.body_coordinates == 1048 * 1000
    assert [body.data for body in encode(plan, tensor)] == [b"\0", b"\0"]


def test_a_residual_is_coded_where_it_pays() -> None:
    tensor = low_rank(300, 400, noise=0.02)
    for relative_step, pays in ((0.1, True), (8.0, False)):
        step = step_of(tensor, relative_step)
        with_one, without, free = (analyze(tensor, residual=residual) for residual in (True, False, None))
        plan = free.plan(step)
        assert plan.head is not None
        assert plan.head[0] == pays
        of_both = [each.cost(step) for each in (with_one, without)]
        lagrangians = [cost.squared_error + LAMBDA * step**2 * cost.bits for cost in of_both]
        assert (lagrangians[0] < lagrangians[1]) == pays
        assert free.cost(step) == of_both[not pays]
        assert error_of(tensor, decoded(tensor, plan)) == pytest.approx(free.cost(step).squared_error, rel=0.1)
        assert size_of(tensor, plan) == pytest.approx(free.cost(step).bits, rel=0.1)


def test_with_a_residual_it_is_no_longer_than_fsq_alone() -> None:
    tensor = low_rank(300, 400, 8, noise=0.01)
    step = step_of(tensor, 0.3)
    plan, alone = analyze(tensor, residual=True).plan(step), FsqAnalysis(spec_of(tensor), source_of(tensor)).plan(step)
    assert size_of(tensor, plan) < 0.9 * size_of(tensor, alone)


@pytest.mark.parametrize("residual", [False, True])
def test_a_matched_gain_keeps_the_length(residual: bool) -> None:
    tensor = low_rank(120, 160, 20, noise=1e-2)
    step = step_of(tensor, 4.0)
    plain, matched = (
        decoded(tensor, analyze(tensor, residual=residual, match_gain=match_gain).plan(step)).double()
        for match_gain in (False, True)
    )
    along = [float((tensor.double() * estimate).sum()) / energy_of(tensor) for estimate in (plain, matched)]
    assert along[0] < 0.97
    assert along[1] == pytest.approx(1.0, abs=3e-3)


def test_the_seed_decides() -> None:
    tensor = low_rank(100, 90, 30)
    heads = [analyze(tensor, max_rank=8, seed=seed).plan(step_of(tensor, 0.5)).head for seed in (1, 1, 2)]
    assert heads[0] == heads[1] != heads[2]


def test_only_blocks_of_rows_are_asked_for() -> None:
    tensor = low_rank(3000, 400)
    largest = 0

    def read(first: int, count: int) -> Tensor:
        nonlocal largest
        largest = max(largest, count)
        return tensor.view(-1)[first : first + count]

    analysis = LrqAnalysis(spec_of(tensor), read)
    analysis.plan(step_of(tensor, 2.0))
    assert largest <= 2**18


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1.0, 1e20])
def test_values_of_any_size(scale: float) -> None:
    tensor = (low_rank(30, 40) * 100).double().mul(scale).float()
    step = 0.5 * scale
    plan = analyze(tensor, residual=False).plan(step)
    assert error_of(tensor / scale, decoded(tensor, plan) / scale) < 0.05 * energy_of(tensor / scale)


def test_zeros_take_a_few_bytes() -> None:
    tensor = torch.zeros(50, 60)
    analysis = analyze(tensor)
    assert analysis.cost(1.0).squared_error == 0
    plan = analysis.plan(1.0)
    assert size_of(tensor, plan) <= 40
    assert not decoded(tensor, plan).any()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "float32"), ((100,), "float32"), ((4, 100), "float32"), ((100, 4), "float32"), ((0, 9), "float32"),
                         ((50, 50), "int32"), ((50, 50), "complex64"), ((MAX_FACTOR_SYMBOLS, 5), "float32")]
)  # fmt: skip
def test_what_is_no_matrix_does_not_fit(shape: tuple[int, ...], dtype: str) -> None:
    spec = TensorSpec("layer.weight", shape, dtype)
    assert not LrqAnalysis.fits(spec)
    with pytest.raises(NotLowRankError, match=r"not for tensor 'layer.weight'.* take fsq"):
        LrqAnalysis(spec, lambda first, count: torch.zeros(count))


def test_values_beyond_2_to_the_90_do_not_fit() -> None:
    with pytest.raises(NotLowRankError, match=r"'w' holds values of 2\^100"):
        analyze(torch.full((9, 9), 2.0**100))


def test_a_step_that_is_too_fine_is_refused() -> None:
    tensor = torch.zeros(20, 20)
    tensor[3, 4] = 1.0
    analysis = analyze(tensor)
    for step in (1e-4, 1e-30, 1e-300):
        for refused in (analysis.cost, analysis.plan):
            with pytest.raises(StepTooFineError, match="take a larger"):
                refused(step)
    assert rank_of(analysis.plan(1e-3)) == 1


def hostile_head(gains: list[int], exponent: int, *, residual: int = 0, size: int = 1) -> bytes:
    """Components of a 6 x 8 matrix, all of whose integers are `size`."""
    factors = np.full((len(gains), 14), size, np.int32)
    head = bytes([residual]) + varint(len(gains)) + svarint(exponent) + b"".join(map(svarint, gains))
    return head + write_factors(factors, 6, fit_factors(factors, 6), "rans")


MATRIX = TensorSpec("w", (6, 8), "float32")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "wants 1 more bytes"),
        (b"\2\0\0", r"begins 2, 0 for a matrix of 6 x 8"),
        (b"\0\7\0", r"begins 0, 7 for a matrix of 6 x 8"),
        (b"\0" + varint(2**40), r"for a matrix of 6 x 8"),
        (hostile_head([1], 0) + b"\0", "followed by 1 bytes"),
        (hostile_head([2**53], 0), r"expected less than 2\^53"),
        (hostile_head([-(2**52), 2**52], 0), r"expected less than 2\^53"),
        (hostile_head([2**40], 0, size=100), r"expected less than 2\^53"),
        (hostile_head([1], 126), r"values below 2\^126"),
        (hostile_head([2**20], 107), r"values below 2\^126"),
        (hostile_head([1], 2**60), r"values below 2\^126"),
        (hostile_head([1], -401), r"expected 2\^-400"),
        (hostile_head([1], 0)[:-1], "."),
    ],
)
def test_a_hostile_head_is_refused(head: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        LrqCodec().decoder(MATRIX, head)


def test_the_largest_and_the_smallest_that_is_allowed() -> None:
    for gain, exponent in ((2**53 - 1, 72), (1, 125), (-1, -400), (1, -149)):
        out = decode(LrqCodec(), MATRIX, hostile_head([gain], exponent), [Body(0, 48, b"\0")])
        assert torch.equal(out, torch.full((6, 8), gain * 2.0**exponent, dtype=torch.float64).float())


def test_a_head_cannot_ask_for_more_than_its_share_of_memory() -> None:
    spec = TensorSpec("w", (2**19, 2**19), "float32")
    with pytest.raises(PayloadError, match=r"begins 0, 17 for a matrix"):
        LrqCodec().decoder(spec, b"\0\x11\0" + bytes(17))


def test_no_components_of_the_largest_matrix_take_no_memory() -> None:
    decoder = LrqCodec().decoder(TensorSpec("w", (2**19, 2**19), "float32"), b"\0\0\0")
    out = torch.ones(100)
    decoder.decode(2**38 - 100, b"\0", out)
    assert not out.any()


@pytest.mark.parametrize("body", [b"", b"\1", b"\0\0", bytes(100)])
def test_a_body_without_residual_is_a_zero_byte(body: bytes) -> None:
    decoder = LrqCodec().decoder(MATRIX, hostile_head([1], 0))
    with pytest.raises(PayloadError, match=f"a body of {len(body)} bytes"):
        decoder.decode(0, body, torch.empty(48))


def test_a_head_is_needed() -> None:
    with pytest.raises(PayloadError, match="has no head"):
        LrqCodec().decoder(MATRIX, None)


def test_a_config_plans_matrices_by_lrq_and_the_rest_otherwise() -> None:
    tensors = [low_rank(70, 90), normal((90,)), normal((9000,)), normal((3, 3000)), torch.arange(100).view(10, 10)]
    specs = [spec_of(tensor, f"layer{index}") for index, tensor in enumerate(tensors)]
    sources = [source_of(tensor) for tensor in tensors]
    plans = LrqConfig(target_error=0.1).plan(list(zip(specs, sources, strict=True)), seed=0)
    assert [plan.codec for plan in plans] == ["lrq", "uniform", "fsq", "fsq", "raw"]


def test_each_option_of_the_config_has_an_effect() -> None:
    tensor = low_rank(100, 120, 20, noise=2e-3)

    def heads(config: LrqConfig) -> bytes | None:
        return config.plan([(spec_of(tensor), source_of(tensor))], seed=0)[0].head

    default = LrqConfig(target_error=0.1)
    assert heads(default) == heads(LrqConfig(target_error=0.1))
    for change in (
        {"target_error": 0.05},
        {"max_rank": 2},
        {"residual": True},
        {"match_gain": True},
        {"max_tensor_error": 0.05},
        {"coder": "packed"},
    ):
        assert heads(default.model_copy(update=change)) != heads(default), change
