"""ECTCQ: near to Shannon's bound at every rate, and the bits and the error that were foreseen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fed_core.codecs.base import TensorPlan
from fed_core.codecs.ectcq import MAX_BODY, MAX_MAGNITUDE, EctcqAnalysis, EctcqCodec, EctcqConfig
from fed_core.codecs.entropy import (
    ByteReader,
    FrequencyTable,
    SymbolReader,
    encode_symbols,
    read_table,
    svarint,
    varint,
    write_table,
)
from fed_core.codecs.planning import StepTooFineError
from fed_core.codecs.trellis import NUM_STATES, trellis
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.specs import BUFFER, TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import FLOATS, Body, decode, encode, memory_of, normal, source_of, spec_of

ECTCQ = EctcqCodec()


def analyze(tensor: Tensor, **options: object) -> EctcqAnalysis:
    return EctcqAnalysis(spec_of(tensor), source_of(tensor), **options)  # type: ignore[arg-type]


def decoded(tensor: Tensor, plan: TensorPlan) -> Tensor:
    return decode(ECTCQ, spec_of(tensor), plan.head, encode(plan, tensor))


def bits_of(tensor: Tensor, plan: TensorPlan) -> int:
    return 8 * sum(len(body.data) for body in encode(plan, tensor))


def step_of(tensor: Tensor, relative: float) -> float:
    """A step in units of the root mean square."""
    return relative * float(tensor.double().square().mean().sqrt())


def error(tensor: Tensor, estimate: Tensor) -> float:
    x, y = tensor.double(), estimate.double()
    return float((x - y).square().sum() / x.square().sum())


def obvious_decode(body: bytes, num_coordinates: int) -> list[float]:
    """The format's description, lane by lane and coordinate by coordinate."""
    reader = ByteReader(body)
    num_states, half = 1 << reader.u8(), math.ldexp(reader.varint(), reader.svarint())
    shifts = [byte - 256 * (byte > 127) for byte in reader.take(5)]
    tables = [read_table(reader), read_table(reader)]
    symbols = SymbolReader(reader.take(reader.left), 2 * num_coordinates)
    num_lanes = max(math.ceil(num_coordinates / 512), min(64, math.ceil(num_coordinates / 64)))
    states, values = [0] * num_lanes, []
    for first in range(0, num_coordinates, num_lanes):
        lanes = range(min(num_lanes, num_coordinates - first))
        m = dict.fromkeys(lanes, 0)
        for last_bit in (0, 1):
            mine = [lane for lane in lanes if states[lane] % 2 == last_bit]
            m.update(zip(mine, symbols.read(len(mine), tables[last_bit]).tolist(), strict=True))
        for lane in lanes:
            k = 2 * m[lane] - states[lane] % 2
            shift = shifts[min(abs(k), 5) - 1] / 128 if k else 0.0
            values.append(math.copysign((abs(k) - shift) * half, k))
            states[lane] = int(trellis(num_states).following[2 * states[lane] + m[lane] % 2])
    symbols.done()
    return values


@pytest.mark.parametrize("num_states", NUM_STATES)
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000, 4097, 40_000])
def test_a_body_means_what_the_format_says(num_states: int, count: int) -> None:
    tensor = normal((count,), seed=count)
    plan = analyze(tensor, num_states=num_states).plan(step_of(tensor, 0.7))
    (body,) = encode(plan, tensor)
    expected = torch.tensor(obvious_decode(body.data, count), dtype=torch.float64)
    assert torch.equal(decode(ECTCQ, spec_of(tensor), None, [body]), expected.float())


@pytest.mark.parametrize(("num_states", "allowed"), [(8, 0.53), (64, 0.39), (256, 0.31)])
@pytest.mark.parametrize("relative_step", [2.45, 1.0, 0.27])
def test_a_gaussian_is_near_shannons_bound(num_states: int, allowed: float, relative_step: float) -> None:
    tensor = normal((2**18,), scale=1.0, seed=1)
    plan = analyze(tensor, num_states=num_states).plan(relative_step)
    bits = bits_of(tensor, plan) / len(tensor)
    assert 0.5 < bits < 4
    assert 10 * math.log10(error(tensor, decoded(tensor, plan)) * 4**bits) < allowed


@pytest.mark.parametrize("relative_step", [2.2, 1.0, 0.1])
@pytest.mark.parametrize("shape", [(5000,), (600, 500)])
@pytest.mark.parametrize("match_gain", [False, True])
def test_bits_and_error_are_what_was_foreseen(shape: tuple[int, ...], relative_step: float, match_gain: bool) -> None:
    tensor = normal(shape)
    analysis = analyze(tensor, num_states=8, match_gain=match_gain)
    cost, plan = analysis.cost(step_of(tensor, relative_step)), analysis.plan(step_of(tensor, relative_step))
    energy = float(tensor.double().square().sum())
    assert error(tensor, decoded(tensor, plan)) * energy == pytest.approx(cost.squared_error, rel=0.06)
    assert bits_of(tensor, plan) == pytest.approx(cost.bits, rel=0.06)


@pytest.mark.parametrize("relative_step", [2.0, 0.5])
def test_matched_gain_keeps_the_length_and_the_bits(relative_step: float) -> None:
    tensor = normal((100_000,))
    step = step_of(tensor, relative_step)
    plain, matched = (analyze(tensor, match_gain=match_gain).plan(step) for match_gain in (False, True))
    x, y, z = tensor.double(), decoded(tensor, plain).double(), decoded(tensor, matched).double()
    assert float(x @ z / (x @ x)) == pytest.approx(1, abs=1e-4)
    # Means are the best reproductions, so that what is left is at right angles to them.
    assert float(x @ y / (y @ y)) == pytest.approx(1, abs=2e-3)
    assert error(tensor, z) == pytest.approx(error(tensor, y) / (1 - error(tensor, y)), rel=0.02)
    assert abs(bits_of(tensor, plain) - bits_of(tensor, matched)) <= 64


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.floats(0.01, 20), st.integers(0, 2**32))
def test_no_value_is_further_off_than_the_price_allows(count: int, relative_step: float, seed: int) -> None:
    tensor = normal((count,), seed=seed)
    step = step_of(tensor, relative_step)
    values = decoded(tensor, analyze(tensor, num_states=8).plan(step))
    # At most one step to what the trellis allows, and one more towards zero for the sake of bits.
    assert float((values - tensor).abs().max()) <= 2.6 * step
    assert error(tensor, values) <= 1.0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_states", NUM_STATES)
def test_the_largest_values_of_a_type_stay_finite(dtype: str, num_states: int) -> None:
    largest = min(torch.finfo(torch_dtype(dtype)).max, torch.finfo(torch.float32).max)
    tensor = torch.where(normal((3000,)) > 0, largest, -largest).to(torch_dtype(dtype))
    for relative in (0.01, 0.7, 1.9):
        values = decoded(tensor, analyze(tensor, num_states=num_states, match_gain=True).plan(relative * largest))
        assert bool(values.isfinite().all())
        assert error(tensor.double() / largest, values.double() / largest) <= 0.5 * relative


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e20, 1e37])
def test_values_of_any_size_are_coded_alike(size: float) -> None:
    tensor = normal((5000,), scale=1.0)
    expected = error(tensor, decoded(tensor, analyze(tensor).plan(1.0)))
    sized = (tensor.double() * size).float()
    values = decoded(sized, analyze(sized).plan(size))
    assert error(sized.double() / size, values.double() / size) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("tensor", [torch.zeros(3000), -torch.zeros(3000), torch.full((3000,), 0.4)])
def test_what_is_nearer_to_zero_is_a_zero_byte(tensor: Tensor) -> None:
    analysis = analyze(tensor)
    plan = analysis.plan(1.0)
    assert [body.data for body in encode(plan, tensor)] == [b"\0"]
    assert memory_of(decoded(tensor, plan)) == bytes(12_000)
    assert analysis.cost(1.0) == (8.0, float(tensor.double().square().sum()))


def test_bodies_keep_within_the_limits_and_decode_in_any_order() -> None:
    tensor = normal((1_100_000,))
    spec, plan = spec_of(tensor), analyze(tensor, num_states=8).plan(step_of(tensor, 0.01))
    bodies = encode(plan, tensor)
    assert [body.num_coordinates for body in bodies] == [MAX_BODY, MAX_BODY, 1_100_000 - 2 * MAX_BODY]
    for body in bodies:
        least, most = ECTCQ.body_bytes(spec, body.num_coordinates)
        assert least <= len(body.data) <= most <= MAX_BODY_BYTES
    assert memory_of(decode(ECTCQ, spec, None, bodies)) == memory_of(decode(ECTCQ, spec, None, bodies[::-1]))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100, 5000])
def test_the_finest_step_keeps_within_the_limits(count: int) -> None:
    tensor = torch.linspace(-1, 1, count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    plan = analyze(tensor).plan(2.001 / (MAX_MAGNITUDE - 4))
    (body,) = encode(plan, tensor)
    least, most = ECTCQ.body_bytes(spec_of(tensor), count)
    assert least <= len(body.data) <= most
    assert float((decoded(tensor, plan) - tensor).abs().max()) < 2 / MAX_MAGNITUDE * 1.3


def test_a_step_is_positive_and_not_too_fine() -> None:
    analysis = analyze(normal((100,)))
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a positive number"):
            analysis.cost(step)
    with pytest.raises(StepTooFineError, match=r"holds 2047 steps\. Take a larger step, or send the tensor raw"):
        analysis.plan(1e-9)
    with pytest.raises(StepTooFineError):
        analyze(torch.tensor([1e300], dtype=torch.float64)).plan(1.0)


@pytest.mark.parametrize("target_error", [0.5, 0.1, 0.01])
def test_a_table_meets_the_target_error(target_error: float) -> None:
    tensors = [normal((300, 200)), normal((120, 100), scale=0.05, seed=1), normal((500,), seed=2)]
    described = [(spec_of(tensor), source_of(tensor)) for tensor in tensors]
    plans = EctcqConfig(target_error=target_error, max_tensor_error=0.9, states=8).plan(described, seed=0)
    assert [plan.codec for plan in plans] == ["ectcq", "ectcq", "uniform"]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors[:2]])
    values = torch.cat([decoded(tensor, plan).reshape(-1) for tensor, plan in zip(tensors[:2], plans, strict=False)])
    assert error(flat, values) == pytest.approx(target_error, rel=0.08)


def test_a_few_values_among_zeros_are_not_overlooked() -> None:
    tensor = torch.zeros(300_000)
    tensor[::70_001] = 3.0
    (plan,) = EctcqConfig().plan([(spec_of(tensor), source_of(tensor))], seed=0)
    assert plan.codec == "ectcq"
    assert bits_of(tensor, plan) < 1000
    assert error(tensor, decoded(tensor, plan)) <= 0.05


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [5000, 40_000])
def test_a_source_may_reuse_its_memory(dtype: str, count: int) -> None:
    tensor, lent = normal((count,), dtype), torch.empty(count, dtype=torch_dtype(dtype))

    def lend(first: int, length: int) -> Tensor:
        lent.fill_(math.nan)
        return lent[:length].copy_(tensor[first : first + length])

    step = step_of(tensor, 1.0)
    plan = EctcqAnalysis(spec_of(tensor), lend).plan(step)
    assert encode(plan, tensor) == encode(analyze(tensor).plan(step), tensor)


def test_a_table_sends_buffers_and_other_types_raw() -> None:
    dtypes = [*map(torch_dtype, FLOATS), torch.int64, torch.bool, torch.complex64]
    tensors = [normal((70, 80)).to(dtype) for dtype in dtypes] + [torch.zeros(0, 4)]
    described = [(spec_of(tensor), source_of(tensor)) for tensor in tensors]
    described.append((TensorSpec("running_var", (70, 80), "float32", BUFFER), source_of(normal((70, 80)))))
    plans = EctcqConfig().plan(described, seed=0)
    assert [plan.codec for plan in plans] == ["ectcq"] * 4 + ["raw"] * 5


def test_every_option_of_a_table_has_its_effect() -> None:
    tensor = normal((80, 90))

    def body_of(**options: object) -> bytes:
        (plan,) = EctcqConfig.model_validate(options).plan([(spec_of(tensor), source_of(tensor))], seed=0)
        return encode(plan, tensor)[0].data

    bodies = [
        body_of(),
        body_of(states=8),
        body_of(states=256),
        body_of(target_error=0.1),
        body_of(match_gain=True),
        body_of(coder="packed"),
        body_of(target_error=0.4, max_tensor_error=0.2),
    ]
    assert [body[0] for body in bodies[:3]] == [6, 3, 8]
    assert len(set(bodies)) == len(bodies)
    packed = decode(ECTCQ, spec_of(tensor), None, [Body(0, 7200, bodies[5])])
    assert memory_of(packed) == memory_of(decode(ECTCQ, spec_of(tensor), None, [Body(0, 7200, bodies[0])]))


@pytest.mark.parametrize("options", [{"states": 4}, {"states": "8"}, {"target_error": 0.0}, {"contexts": True}])
def test_a_table_refuses_what_the_format_cannot_say(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EctcqConfig.model_validate(options)


def body(
    *,
    log_states: int = 3,
    mantissa: int = 1,
    exponent: int = 0,
    lowest: int = -1,
    highest: int = 1,
    symbols: tuple[int, ...] = (0, 1, 0, -1),
) -> bytes:
    """Of coordinates that are each a lane's step: one lane, of which the path is in even states only where no symbol is odd."""
    counts = np.ones(highest - lowest + 1)
    table = FrequencyTable.from_counts(lowest, counts)
    state, parts = 0, []
    for symbol in symbols:
        parts.append((np.array([symbol]), table))
        state = int(trellis(8).following[2 * state + symbol % 2])
    return b"".join(
        [
            bytes([log_states]),
            varint(mantissa) + svarint(exponent) + bytes(5),
            2 * write_table(table),
            encode_symbols(parts),
        ]
    )


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "wants 1 more bytes"),
        (b"\0\0", "is followed by 1 bytes"),
        (body(log_states=4), r"a trellis of 2\^4 states; expected one of 8, 64, 256"),
        (body(log_states=200), r"a trellis of 2\^200 states"),
        (body(mantissa=0), r"the half step 0 \* 2\^0, out of range"),
        (body(mantissa=2**16), "out of range"),
        (body(exponent=201), "out of range"),
        (body(exponent=-201), "out of range"),
        (
            body(lowest=2040, highest=2049, symbols=(2040,) * 4),
            "a table of the codec 'ectcq' reaches 2049; expected at most 2048",
        ),
        (body(lowest=-2100, highest=2100), "a frequency table of 4201 symbols; expected at most 4097"),
        (body()[:-1], "symbols|rANS"),
        (body() + b"\1", "symbols|rANS"),
        (body(symbols=(0, 1, 0)), "symbols|rANS"),
        (body(symbols=(0, 1, 0, 1, 1)), "symbols|rANS"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(data: bytes, what: str) -> None:
    assert decode(ECTCQ, TensorSpec("w", (4,), "float32"), None, [Body(0, 4, body())]).isfinite().all()
    with pytest.raises(PayloadError, match=what):
        ECTCQ.decoder(TensorSpec("w", (4,), "float32"), None).decode(0, data, torch.zeros(4))


def test_what_is_no_float_has_a_head_or_is_too_long_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"the codec 'ectcq' holds float32, .*, not int8; expected raw"):
        ECTCQ.body_bytes(TensorSpec("w", (2,), "int8"), 2)
    with pytest.raises(PayloadError, match="the codec 'ectcq' has no head"):
        ECTCQ.decoder(TensorSpec("w", (2,), "float32"), b"x")
    spec = TensorSpec("w", (2**20,), "float32")
    with pytest.raises(
        PayloadError, match=f"a body of {MAX_BODY + 1} coordinates of the codec 'ectcq'; expected at most"
    ):
        ECTCQ.body_bytes(spec, MAX_BODY + 1)
    with pytest.raises(PayloadError, match=f"a body of {MAX_BODY + 1} coordinates"):
        ECTCQ.decoder(spec, None).decode(0, b"\0", torch.empty(MAX_BODY + 1))
