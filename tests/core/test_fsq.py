"""The codec fsq: what it costs and keeps, what a lattice keeps exactly, and heads and bodies that nobody wrote."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.base import TensorPlan
from fed_core.codecs.entropy import Coder, FrequencyTable
from fed_core.codecs.fsq import MAX_BODY, FsqAnalysis, FsqCodec, StepTooFineError
from fed_core.codecs.rounding import MAX_DEAD_ZONE
from fed_core.codecs.scales import Scales
from fed_core.codecs.tokens import (
    MAX_MAGNITUDE,
    MAX_TOKEN,
    max_integer_bytes,
    max_magnitude,
    read_integers,
    to_tokens,
    write_integers,
)
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.specs import TensorSpec
from fed_core.tensors import dtype_name

LOSSY = ("float32", "float16", "bfloat16", "float64")
MAX_TILE = 2**20


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec("w", tuple(tensor.shape), dtype_name(tensor.dtype))


def analysis_of(tensor: Tensor, **options: Any) -> FsqAnalysis:
    """Over a source that gives no more than a tile at once and spoils what it gave before."""
    flat, given = tensor.reshape(-1), torch.empty(0)

    def source(first: int, num_coordinates: int) -> Tensor:
        nonlocal given
        assert 0 <= first <= first + num_coordinates <= flat.numel()
        assert num_coordinates <= MAX_TILE
        given.fill_(float("nan"))
        given = flat[first : first + num_coordinates].clone()
        return given

    return FsqAnalysis(spec_of(tensor), source, **options)


def bodies_of(tensor: Tensor, plan: TensorPlan) -> list[bytes]:
    return [bytes(plan.encode(first, tile)) for first, tile in tiles_of(tensor, plan)]


def tiles_of(tensor: Tensor, plan: TensorPlan) -> list[tuple[int, Tensor]]:
    tiles = tensor.reshape(-1).split(plan.body_coordinates) if tensor.numel() else ()
    return [(at * plan.body_coordinates, tile) for at, tile in enumerate(tiles)]


def decoded(tensor: Tensor, plan: TensorPlan, bodies: list[bytes] | None = None) -> Tensor:
    """Through the codec, last body first."""
    decoder = FsqCodec().decoder(spec_of(tensor), plan.head)
    out = torch.full((tensor.numel(),), float("nan"), dtype=tensor.dtype)
    bodies = bodies_of(tensor, plan) if bodies is None else bodies
    for body, (first, tile) in reversed(list(zip(bodies, tiles_of(tensor, plan), strict=True))):
        least, most = FsqCodec().body_bytes(spec_of(tensor), len(tile))
        assert least <= len(body) <= most <= MAX_BODY_BYTES
        decoder.decode(first, body, out[first : first + len(tile)])
    return out.view(tensor.shape)


def sent(tensor: Tensor, step: float, **options: Any) -> tuple[float, float, Tensor]:
    """Bits, squared error, and what arrives."""
    plan = analysis_of(tensor, **options).plan(step)
    bodies = bodies_of(tensor, plan)
    arrived = decoded(tensor, plan, bodies)
    error = float((arrived.double() - tensor.double()).square().sum())
    return 8 * (len(plan.head or b"") + sum(map(len, bodies))), error, arrived


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def like_an_update(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    """Rows and columns of different scales, a few directions that stand out, some values far out."""
    rows, columns = torch.exp(gaussian(num_rows, 1, seed=seed)), torch.exp(gaussian(1, num_columns, seed=seed + 1))
    low_rank = gaussian(num_rows, 4, seed=seed + 2) @ gaussian(4, num_columns, seed=seed + 3)
    sparse = 20 * gaussian(num_rows, num_columns, seed=seed + 4) * (gaussian(num_rows, num_columns, seed=seed + 5) > 3)
    return 1e-3 * (rows * columns * (gaussian(num_rows, num_columns, seed=seed + 6) + low_rank) + sparse)


def energy(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


# ------------------------------------------------------------------------------------------------------------------ rate and error


@pytest.mark.parametrize("step", [1.8, 1.0, 0.24])
def test_a_gaussian_is_within_1_6_decibels_of_shannon(step: float) -> None:
    """Shannon's bound: 4^-bits; 1.53 dB is what cubes lose against spheres."""
    values = gaussian(2**16)
    bits, error, _ = sent(values, step, contexts=False)
    assert 10 * math.log10(error / energy(values) * 4 ** (bits / len(values))) < 1.6


def test_scales_of_rows_and_columns_pay() -> None:
    values = like_an_update(300, 400)
    with_scales = sent(values, 4e-3)
    without = sent(values, 4e-3, contexts=False)
    assert with_scales[0] < 0.8 * without[0]
    assert with_scales[1] < 1.1 * without[1]


@pytest.mark.parametrize(("shape", "scale"), [((400, 1), 2.0), ((1, 400), 2.0)])
def test_scales_of_rows_or_columns_alone_pay(shape: tuple[int, int], scale: float) -> None:
    values = gaussian(400, 400) * torch.exp(scale * gaussian(*shape, seed=1))
    assert sent(values, 1.0)[0] < 0.8 * sent(values, 1.0, contexts=False)[0]


def test_scales_that_do_not_pay_are_not_sent() -> None:
    for values in (gaussian(200, 300), gaussian(16, 16) * torch.exp(gaussian(16, 1, seed=1))):
        head = analysis_of(values).plan(1.0).head
        assert head is not None
        assert len(head) < 30


@pytest.mark.parametrize("step", [1e-3, 4e-3, 0.03])
@pytest.mark.parametrize("shape", [(64, 72), (700, 300), (150_000,), (9, 30_000)])
@pytest.mark.parametrize("options", [{}, {"contexts": False}, {"match_gain": True}])
def test_costs_are_estimated_well(step: float, shape: tuple[int, ...], options: dict[str, bool]) -> None:
    values = like_an_update(shape[0], math.prod(shape[1:])).reshape(shape)
    bits, error, _ = sent(values, step, **options)
    cost = analysis_of(values, **options).cost(step)
    assert cost.bits == pytest.approx(bits, rel=0.1, abs=200)
    assert cost.squared_error == pytest.approx(error, rel=0.12)


def test_a_larger_step_costs_less_and_errs_more() -> None:
    analysis = analysis_of(like_an_update(200, 200))
    costs = [analysis.cost(1e-4 * 1.5**power) for power in range(20)]
    for cost, larger in pairwise(costs):
        assert larger.bits < cost.bits
        assert larger.squared_error > cost.squared_error


@given(
    seed=st.integers(0, 1000),
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 300),
    step=st.floats(-12, 3).map(math.exp2),
    contexts=st.booleans(),
    match_gain=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_value_moves_by_more_than_its_dead_zone(
    seed: int, num_rows: int, num_columns: int, step: float, contexts: bool, match_gain: bool
) -> None:
    values = like_an_update(num_rows, num_columns, seed)
    _, error, arrived = sent(values, step, contexts=contexts, match_gain=match_gain)
    if match_gain:
        if arrived.any():
            assert float((arrived.double() * values.double()).sum()) == pytest.approx(energy(values), rel=5e-4)
    else:
        # Two steps at most are rounded off, half a step is added by the reproduction.
        assert float((arrived - values).abs().max()) <= (MAX_DEAD_ZONE + 0.5) * step * 1.001
        assert error <= energy(values) * 1.0001


def test_matched_gain_makes_the_error_uncorrelated() -> None:
    values = like_an_update(300, 200)
    _, plain, short = sent(values, 0.05)
    _, matched, arrived = sent(values, 0.05, match_gain=True)
    assert float((short * values).sum()) < 0.92 * energy(values)
    assert float((arrived.double() * values.double()).sum()) == pytest.approx(energy(values), rel=3e-4)
    assert plain < matched < 3 * plain


# -------------------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("dtype", LOSSY)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (40, 3, 3, 3), (5, 0), (0,), (1, 1000), (1000, 1)])
def test_every_shape_and_type_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    values = gaussian(*shape).to(getattr(torch, dtype))
    _, error, arrived = sent(values, 0.1)
    assert arrived.dtype == values.dtype
    assert arrived.shape == values.shape
    assert error <= values.numel() * 0.1**2


def test_bodies_are_whole_rows_and_rows_that_are_longer_are_cut() -> None:
    plan = analysis_of(gaussian(700, 1000)).plan(1.0)
    assert plan.body_coordinates == 262_000
    long_rows = torch.cat([gaussian(1, 300_000), 8 * gaussian(1, 300_000, seed=1)]) * torch.exp(gaussian(300_000))
    plan = analysis_of(long_rows).plan(1.0)
    assert plan.body_coordinates == MAX_BODY == 2**18
    arrived = decoded(long_rows, plan)
    assert float((arrived - long_rows).square().mean()) < 0.3


def test_any_range_within_a_matrix_can_be_a_body() -> None:
    values = like_an_update(60, 50)
    plan = analysis_of(values).plan(2e-3)
    whole = decoded(values, plan).reshape(-1)
    decoder = FsqCodec().decoder(spec_of(values), plan.head)
    for first, count in ((0, 3000), (7, 30), (7, 43), (7, 44), (49, 2), (149, 1001), (2999, 1)):
        out = torch.empty(count)
        decoder.decode(first, plan.encode(first, values.reshape(-1)[first : first + count]), out)
        assert torch.equal(out, whole[first : first + count])


def test_plans_repeat() -> None:
    values = like_an_update(400, 300)
    plans = [analysis_of(values).plan(2e-3) for _ in range(2)]
    assert plans[0].head == plans[1].head
    assert bodies_of(values, plans[0]) == bodies_of(values, plans[1])


def test_the_packed_coder_says_the_same() -> None:
    values = like_an_update(100, 200)
    rans, packed = (sent(values, 2e-3, coder=coder) for coder in ("rans", "packed"))
    assert torch.equal(rans[2], packed[2])
    assert rans[0] < packed[0]


# ------------------------------------------------------------------------------------------------------------------ unusual values


@pytest.mark.parametrize("shape", [(1,), (1000,), (300, 400), (2, 300_000)])
def test_zero_takes_a_byte_a_head_and_a_byte_a_body(shape: tuple[int, ...]) -> None:
    values = torch.zeros(shape)
    plan = analysis_of(values).plan(1e-30)
    assert plan.head == b"\0"
    assert set(bodies_of(values, plan)) == {b"\0"}
    assert torch.equal(decoded(values, plan), values)
    assert analysis_of(values).cost(1e-30).squared_error == 0


@pytest.mark.parametrize("step", [3.0, 1e9, 1e300])
def test_what_is_smaller_than_half_a_step_is_zero(step: float) -> None:
    values = gaussian(50, 50).clamp(-1, 1)
    analysis = analysis_of(values)
    assert analysis.cost(step).squared_error == pytest.approx(energy(values))
    plan = analysis.plan(step)
    assert plan.head == b"\0"
    assert not decoded(values, plan).any()


@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("options", [{}, {"match_gain": True}])
def test_tiny_and_huge_values_are_values(scale: float, options: dict[str, bool]) -> None:
    values = (gaussian(30, 40).clamp(-3, 3).double() * scale).float()
    unit = float(values.abs().max()) / 3
    _, error, arrived = sent(values, unit / 4, **options)
    assert arrived.isfinite().all()
    assert error < 0.05 * energy(values)


def test_constants_and_outliers_come_back() -> None:
    for values in (torch.full((30, 30), 0.7), torch.cat([torch.zeros(999), torch.tensor([1e4])]).reshape(10, 100)):
        bits, _, arrived = sent(values, 0.5)
        assert float((arrived - values).abs().max()) <= 0.5
        assert bits < 300


@pytest.mark.parametrize("dtype", LOSSY)
def test_reproductions_stay_finite_at_the_ends_of_a_type(dtype: str) -> None:
    largest = min(torch.finfo(getattr(torch, dtype)).max, torch.finfo(torch.float32).max)
    values = torch.tensor([largest, -largest, largest / 2, 0.0], dtype=getattr(torch, dtype))
    _, _, arrived = sent(values, largest / 2.7)
    assert arrived.isfinite().all()
    assert float((arrived.double() - values.double()).abs().max()) < largest / 2


def test_what_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(StepTooFineError, match="inf"):
        analysis_of(torch.tensor([1e300, 1.0], dtype=torch.float64)).plan(1.0)


@pytest.mark.parametrize("lattice", [False, True])
def test_a_step_that_is_too_fine_is_refused_and_one_that_is_not_is_taken(lattice: bool) -> None:
    values = torch.tensor([1.0, -MAX_MAGNITUDE, 0.0, 2**14])
    _, _, arrived = sent(values, 1.0, lattice=lattice)
    assert torch.equal(arrived[1:], values[1:])
    for call in (analysis_of(values, lattice=lattice).cost, analysis_of(values, lattice=lattice).plan):
        with pytest.raises(StepTooFineError, match="larger step, or send the tensor raw"):
            call(0.5)


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_step_that_is_none_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        analysis_of(gaussian(5)).cost(step)


# ------------------------------------------------------------------------------------------------------------------------- lattice


@given(
    exponent=st.integers(-149, 100),
    magnitude=st.sampled_from([1, 3, 100, MAX_MAGNITUDE]),
    shape=st.sampled_from([(1,), (300,), (20, 30)]),
    seed=st.integers(0, 1000),
)
@example(-149, MAX_MAGNITUDE, (20, 30), 0)
@settings(max_examples=60, deadline=None)
def test_multiples_of_a_lattice_come_back_bit_for_bit(
    exponent: int, magnitude: int, shape: tuple[int, ...], seed: int
) -> None:
    integers = np.rint(np.random.default_rng(seed).laplace(scale=magnitude / 20, size=shape))
    values = torch.from_numpy(np.ldexp(integers.clip(-magnitude, magnitude), exponent).astype(np.float32))
    values = values + 0.0  # one zero only: the other is not a multiple that integers can tell
    _, error, arrived = sent(values, 2.0**exponent, lattice=True)
    assert error == 0
    assert arrived.numpy().tobytes() == values.numpy().tobytes()


@pytest.mark.parametrize("dtype", LOSSY)
def test_a_lattice_rounds_to_the_nearest_multiple(dtype: str) -> None:
    values = gaussian(60, 50).to(getattr(torch, dtype))
    _, _, arrived = sent(values, 2.0**-4, lattice=True)
    assert torch.equal(arrived.double(), (values.double().abs() * 16 + 0.5).floor() / 16 * values.double().sign())


def test_a_lattice_takes_powers_of_two_and_no_gain() -> None:
    with pytest.raises(ValueError, match="power of two"):
        analysis_of(gaussian(5), lattice=True).plan(0.75)
    with pytest.raises(ValueError, match="exclude each other"):
        analysis_of(gaussian(5), lattice=True, match_gain=True)


# ------------------------------------------------------------------------------------------------------------- the same everywhere


def test_heads_and_bodies_of_before_are_still_read() -> None:
    """Made once; whatever the encoder learns, these must decode to these values."""
    spec = TensorSpec("w", (24, 40), "float32")
    head = bytes.fromhex(
        "0f01010402080e100a108bc968100422241c010000983fe5e54866d614efe9173366b7ba7fb6fafd7ea259ed7b0520001103"
        "1544095a11143644a2375094235282509d70847c4d21101b18da236923d265a72052194a244246"
    )
    body = bytes.fromhex(
        "ab02010080fbf486fff23f70f424070fe023966d2ec709c91970cc3ffe2321897524d385949697f94da7d46b987fc7f4d907"
        "6c1749e7b9d903c7c90b74bfa3efdd4fcc7e6e80464aabe254a3a2d84e56e59dd5b4977f989a2e7e4d228e7849926f806f61"
        "1ccfd40b5e6a0f7e7e9ab7138c6f2364de828e7b1750c884e1b3c94dd8ae545dadc8d5909dda8151160219ec717497817e05"
        "e44087276e1ff834673148e1002c044893d44783edba1a3519d313212fabd7751bf6d20b47d15010f38f60611202cd39eaf5"
        "b3398535c89972039d9eba0490a6293f3c563c75e9116a07ed7e64884b2748609c1bfb85ec220ea7ee9b4f71a8237c590aee"
        "5f37b42e18e215a4a0bf007f842afa76e6fa6a9fb73d53e2ef0aaf2e87eedcafcdee04783b79c3c3373e42936872536c9843"
        "020340c103eb9d7bc9c4a280fa00192693d4a6d6dd310f80f0d818c0888b3c888888cb788848143848818888888888088888"
        "88"
    )
    out = torch.empty(24 * 40)
    FsqCodec().decoder(spec, head).decode(0, body, out)
    assert (
        hashlib.sha256(out.numpy().tobytes()).hexdigest()
        == "a39eb6f01ee7df8bb23ff8f44fb7e2996a00e474a461364693ad2c4b96b1c4b5"
    )


_DECODE = """
import hashlib, sys, torch
from fed_core.codecs.fsq import FsqCodec
from fed_core.specs import TensorSpec
torch.set_num_threads(int(sys.argv[1]))
head, body = (bytes.fromhex(line) for line in sys.stdin.read().split())
out = torch.empty(300 * 400, dtype=torch.bfloat16)
FsqCodec().decoder(TensorSpec("w", (300, 400), "bfloat16"), head).decode(0, body, out)
print(hashlib.sha256(out.view(torch.uint8).numpy().tobytes()).hexdigest(), torch.backends.cpu.get_cpu_capability())
"""


def test_decoding_does_not_depend_on_the_processor_or_on_threads() -> None:
    values = like_an_update(300, 400).bfloat16()
    plan = analysis_of(values, match_gain=True).plan(3e-3)
    (body,) = bodies_of(values, plan)
    here = hashlib.sha256(decoded(values, plan, [body]).view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    assert plan.head is not None
    answer = subprocess.run(
        [sys.executable, "-c", _DECODE, "3"],
        input=f"{plan.head.hex()}\n{body.hex()}",
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == [here, "DEFAULT"]


# ------------------------------------------------------------------------------------------------------------------------- hostile


def test_types_that_have_no_fractions_are_refused() -> None:
    for dtype in ("int64", "bool", "complex64"):
        spec = TensorSpec("w", (3,), dtype)
        for refuse in (
            lambda spec=spec: FsqCodec().body_bytes(spec, 3),
            lambda spec=spec: FsqCodec().decoder(spec, b"\0"),
            lambda spec=spec: FsqAnalysis(spec, lambda first, count: torch.empty(count)),
        ):
            with pytest.raises(PayloadError, match="expected raw"):
                refuse()


def test_bodies_that_are_too_long_or_outside_are_refused() -> None:
    spec = TensorSpec("w", (2**20,), "float32")
    with pytest.raises(PayloadError, match="at most 262144"):
        FsqCodec().body_bytes(spec, 2**18 + 1)
    decoder = FsqCodec().decoder(spec, b"\0")
    for first, count in ((0, 2**18 + 1), (2**20 - 1, 2), (-1, 1)):
        with pytest.raises(PayloadError, match="body of"):
            decoder.decode(first, b"\0", torch.empty(count))


def test_a_head_is_needed() -> None:
    with pytest.raises(PayloadError, match="no head"):
        FsqCodec().decoder(TensorSpec("w", (3,), "float32"), None)


@pytest.mark.parametrize("body", [b"", b"\1", b"\0\0", b"\3\0"])
def test_a_body_of_zeros_says_nothing(body: bytes) -> None:
    with pytest.raises(PayloadError, match="one zero byte"):
        FsqCodec().decoder(TensorSpec("w", (3,), "float32"), b"\0").decode(0, body, torch.empty(3))


def _try(spec: TensorSpec, head: bytes, first: int, body: bytes, count: int) -> None:
    """Finite values or PayloadError."""
    out = torch.full((count,), float("nan"), dtype=getattr(torch, spec.dtype))
    with contextlib.suppress(PayloadError):
        FsqCodec().decoder(spec, head).decode(first, body, out)
        assert out.isfinite().all()


@given(head=st.binary(max_size=40), body=st.binary(max_size=40), dtype=st.sampled_from(LOSSY))
@example(bytes([1, 255, 31, 144, 3, 32, 118]), b"\0", "float16")  # one huge value everywhere
@example(bytes([1, 0, 0, 32, 0]), b"\0", "float32")  # a step of zero
@example(bytes([7, 1, 0, 255]), b"\0", "float32")  # 255 groups
@settings(max_examples=300, deadline=None)
def test_any_head_and_body_are_values_or_an_error(head: bytes, body: bytes, dtype: str) -> None:
    _try(TensorSpec("w", (10, 9), dtype), head, 0, body, 90)


@pytest.fixture(scope="module")
def valid() -> tuple[TensorSpec, bytes, bytes]:
    values = torch.cat([like_an_update(60, 80), torch.full((1, 80), 3.0)])
    plan = analysis_of(values).plan(1e-3)
    assert plan.head is not None
    assert plan.head[0] & 6, "it has scales"
    return spec_of(values), plan.head, bodies_of(values, plan)[0]


@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
@settings(max_examples=200, deadline=None)
def test_damaged_heads_and_bodies_are_values_or_an_error(
    valid: tuple[TensorSpec, bytes, bytes], at: int, bit: int, in_head: bool
) -> None:
    spec, head, body = valid
    damaged = bytearray(head if in_head else body)
    damaged[at % len(damaged)] ^= 1 << bit
    _try(spec, bytes(damaged) if in_head else head, 0, body if in_head else bytes(damaged), spec.num_elements)


def test_heads_and_bodies_of_a_wrong_length_are_refused(valid: tuple[TensorSpec, bytes, bytes]) -> None:
    spec, head, body = valid
    for wrong in (b"", *(head[:end] for end in range(1, len(head))), head + b"\0"):
        with pytest.raises(PayloadError):
            FsqCodec().decoder(spec, wrong)
    decoder = FsqCodec().decoder(spec, head)
    for wrong in (b"", body[:1], body[: len(body) // 2], body[:-1], body + b"\0", body + body):
        with pytest.raises(PayloadError):
            decoder.decode(0, wrong, torch.empty(spec.num_elements))


def test_a_head_does_not_fit_a_tensor_of_another_shape(valid: tuple[TensorSpec, bytes, bytes]) -> None:
    spec, head, _ = valid
    for shape in ((80, 61), (61 * 80,), (61, 79)):
        with pytest.raises(PayloadError):
            FsqCodec().decoder(TensorSpec("w", shape, "float32"), head).decode(0, b"\0", torch.empty(21))
    assert FsqCodec().decoder(spec, head)


# -------------------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_ordered_and_few() -> None:
    integers = np.arange(-MAX_MAGNITUDE, MAX_MAGNITUDE + 1)
    tokens = to_tokens(integers)
    assert (np.diff(tokens) >= 0).all()
    assert np.array_equal(tokens, -tokens[::-1])
    assert tokens.max() == MAX_TOKEN == 59
    assert np.array_equal(to_tokens(np.arange(-15, 16)), np.arange(-15, 16))
    assert np.array_equal(np.unique(tokens), np.arange(-MAX_TOKEN, MAX_TOKEN + 1))


@given(
    parts=st.lists(
        st.lists(st.integers(-MAX_MAGNITUDE, MAX_MAGNITUDE) | st.integers(-20, 20), max_size=30), max_size=4
    ),
    coder=st.sampled_from(["rans", "packed"]),
)
@settings(deadline=None)
def test_integers_of_any_size_come_back(parts: list[list[int]], coder: Coder) -> None:
    arrays = [np.array(part, np.int32) for part in parts]
    tables = [
        FrequencyTable.from_counts(
            -MAX_TOKEN, np.bincount(to_tokens(array) + MAX_TOKEN, minlength=2 * MAX_TOKEN + 1) + 1
        )
        for array in arrays
    ]
    data = write_integers(list(zip(arrays, tables, strict=True)), coder)
    assert len(data) <= max_integer_bytes(sum(map(len, arrays)), len(arrays))
    again = read_integers(data, [(len(array), table) for array, table in zip(arrays, tables, strict=True)])
    assert all(np.array_equal(array, part) for array, part in zip(arrays, again, strict=True))


def test_random_integers_keep_within_the_bound_of_a_body() -> None:
    """The worst: tables that say nothing, values of 15 bits."""
    integers = np.random.default_rng(0).integers(-MAX_MAGNITUDE, MAX_MAGNITUDE, 2**18, np.int32, endpoint=True)
    table = FrequencyTable.from_counts(-MAX_TOKEN, np.ones(2 * MAX_TOKEN + 1))
    least, most = FsqCodec().body_bytes(TensorSpec("w", (2**18,), "float32"), 2**18)
    for coder in ("rans", "packed"):
        assert least <= len(write_integers([(integers, table)], coder)) <= most <= MAX_BODY_BYTES


def test_tables_of_more_than_tokens_are_refused() -> None:
    assert max_magnitude(FrequencyTable.from_counts(-MAX_TOKEN, np.ones(2))) == MAX_MAGNITUDE
    with pytest.raises(PayloadError, match="expected at most 59"):
        max_magnitude(FrequencyTable.from_counts(MAX_TOKEN, np.ones(2)))


# -------------------------------------------------------------------------------------------------------------------------- scales


@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 12),
    num_columns=st.integers(1, 12),
    has_rows=st.booleans(),
    has_columns=st.booleans(),
    bounds=st.lists(st.integers(-6, 6), max_size=4, unique=True).map(sorted),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(deadline=None)
def test_groups_are_those_of_the_sum_of_two_levels(
    seed: int,
    num_rows: int,
    num_columns: int,
    has_rows: bool,
    has_columns: bool,
    bounds: list[int],
    cut: tuple[float, float],
) -> None:
    random = np.random.default_rng(seed)
    rows, columns = (random.integers(-3, 4, size).astype(np.int32) for size in (num_rows, num_columns))
    scales = Scales(num_columns, rows if has_rows else None, columns if has_columns else None, bounds)
    num_coordinates = num_rows * num_columns
    first, stop = sorted(round(share * num_coordinates) for share in cut)
    level = np.add.outer(rows * has_rows, columns * has_columns).reshape(-1)[first:stop]
    expected = [sum(bound <= each for bound in bounds) for each in level.tolist()]
    # The values are their own places, so that a group tells which it holds.
    values = torch.arange(first, stop, dtype=torch.float32)
    layout = scales.layout(first, stop - first)
    groups = layout.split(values)
    assert layout.counts == [len(group) for group in groups] == [expected.count(at) for at in range(len(bounds) + 1)]
    for at, group in enumerate(groups):
        assert {expected[int(place) - first] for place in group.tolist()} <= {at}
    out = torch.full_like(values, float("nan"))
    layout.join(groups, out)
    assert torch.equal(out, values)
    layout.join([None] * len(groups), out)
    assert not out.any()


def test_a_source_is_asked_again_for_nothing_but_a_plan() -> None:
    values = like_an_update(300, 400)
    flat, asked = values.reshape(-1), 0

    def source(first: int, num_coordinates: int) -> Tensor:
        nonlocal asked
        asked += num_coordinates
        return flat[first : first + num_coordinates]

    analysis = FsqAnalysis(spec_of(values), source)
    assert asked == 0
    analysis.cost(1e-3)
    once = asked
    for step in (1e-3, 2e-3, 5e-4):
        analysis.cost(step)
    assert once == asked < 2 * values.numel()
    analysis.plan(1e-3)
    assert asked == once + values.numel()
