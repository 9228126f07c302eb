"""The contract of a codec, run over every codec and every encoding in the tables.

FEDSTREAM_FUZZ_EXAMPLES says how many mutated payloads each codec is given (default 300; nightly runs take millions).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.auto import AutoConfig
from fed_core.codecs.base import TileSource
from fed_core.codecs.cast import CastConfig
from fed_core.codecs.ectcq import EctcqConfig
from fed_core.codecs.eden import EdenConfig
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.lrq import LrqConfig
from fed_core.codecs.mask import MaskConfig
from fed_core.codecs.nested import FsqValues
from fed_core.codecs.powersgd import PowersgdConfig
from fed_core.codecs.randomk import RandomkConfig
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.registry import CODECS, CODECS_OF, EncodingConfig, codec_named
from fed_core.codecs.sign import SignConfig
from fed_core.codecs.ternary import TernaryConfig
from fed_core.codecs.topk import TopkConfig
from fed_core.codecs.uniform import UniformConfig
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES, MAX_CODEC_BYTES, MAX_HEAD_BYTES
from fed_core.specs import DTYPES, TensorSpec
from fed_core.tensors import torch_dtype
from tests.core.coding import (
    FLOATS,
    Body,
    decode,
    encode,
    memory_of,
    normal,
    random_bits,
    source_of,
    spec_of,
)

NUM_EXAMPLES = int(os.environ.get("FEDSTREAM_FUZZ_EXAMPLES", "300"))


class Encoding(NamedTuple):
    """An encoding under test, and what it owes: |x - x'|^2 / |x|^2 of a Gaussian update, of any tensor at all, and of a Gaussian
    tensor among larger ones."""

    config: EncodingConfig
    gaussian_error: float
    worst_error: float = 1.0
    error_among_larger: float = 0.6


ENCODINGS = {
    "raw": Encoding(RawConfig(), 0.0, 0.0),
    "cast-bfloat16": Encoding(CastConfig(to="bfloat16"), 4e-6),
    "cast-float16": Encoding(CastConfig(to="float16"), 1e-6),
    "uniform-8": Encoding(UniformConfig(), 2e-4),
    "uniform-3": Encoding(UniformConfig(bits=3, block=32), 0.1),
    "uniform-6-stochastic": Encoding(UniformConfig(bits=6, block=256, rounding="stochastic"), 5e-3, 1.5),
    "mask-float32": Encoding(MaskConfig(), 1e-15),
    "mask-float16": Encoding(MaskConfig(values="float16"), 1e-6),
    "fsq": Encoding(FsqConfig(), 0.5),
    "lrq": Encoding(LrqConfig(), 0.6),
    "auto": Encoding(AutoConfig(), 0.6),
    "sign": Encoding(SignConfig(), 0.37),
    # Of an update that has few large values everything else may be left out.
    "ternary": Encoding(TernaryConfig(fraction=0.2), 0.4, error_among_larger=1.0),
    "topk": Encoding(TopkConfig(fraction=0.3), 0.25, error_among_larger=1.0),
    "topk-raw": Encoding(TopkConfig(fraction=0.01, values=RawConfig()), 0.93, error_among_larger=1.0),
    "topk-fsq": Encoding(TopkConfig(fraction=0.5, values=FsqValues()), 0.15, error_among_larger=1.0),
    "randomk": Encoding(RandomkConfig(fraction=0.5), 1.1, 1.5, 1.2),
    "randomk-raw": Encoding(RandomkConfig(fraction=0.5, unbiased=False, values=RawConfig()), 0.55),
    "ectcq": Encoding(EctcqConfig(states=8), 0.5),
    "eden": Encoding(EdenConfig(), 0.14, 1.5),
    "eden-5-biased": Encoding(EdenConfig(bits=5, unbiased=False), 3e-3),
    "powersgd": Encoding(PowersgdConfig(rank=24, values="float16"), 0.7),
}
EVERY_CODEC = pytest.mark.parametrize("kind", CODECS)
EVERY_ENCODING = pytest.mark.parametrize("name", ENCODINGS)
EVERY_FLOAT = pytest.mark.parametrize("dtype", FLOATS)

SHAPES = [
    (),
    (1,),
    (2,),
    (7, 3),
    (3, 5, 7),
    (1, 1, 1, 1),
    (16, 4, 3, 3),
    (0, 4),
    (1000,),
    (60, 80),
    (3, 2000),
    (300, 2),
]


def values_of(kind: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Finite values of a kind that has broken some quantizer somewhere."""
    flat = normal((max(1, int(np.prod(shape))),), seed=len(shape))[: int(np.prod(shape))].double()
    info = torch.finfo(torch_dtype(dtype))
    largest = min(info.max, torch.finfo(torch.float32).max)
    made = {
        "zeros": torch.zeros_like(flat),
        "negative zeros": -torch.zeros_like(flat),
        "constant": torch.full_like(flat, -0.37),
        "one spike": torch.where(torch.arange(len(flat)) == len(flat) // 2, 5.0, 0.0),
        "spike among noise": torch.where(torch.arange(len(flat)) == len(flat) // 3, 1e4, flat),
        "huge": flat.clamp(-0.1, 0.1) * 10 * min(largest, 1e38),
        "largest": torch.where(flat > 0, largest, -largest),
        "denormal": flat.sign() * info.smallest_normal / 4,
        "every size": flat.sign() * torch.logspace(-30, 4, len(flat), dtype=torch.float64) if len(flat) else flat,
        "sparse": torch.where(flat > 0.03, flat, 0.0),
        "normal": flat,
    }[kind]
    return made.to(torch_dtype(dtype)).view(shape)


VALUES = [
    "zeros", "negative zeros", "constant", "one spike", "spike among noise", "huge", "denormal", "every size", "sparse", "normal",
]  # fmt: skip


class Payload(NamedTuple):
    """One tensor as it travels."""

    spec: TensorSpec
    codec: str
    head: bytes | None
    bodies: list[Body]


def encoded(
    config: EncodingConfig, tensors: Sequence[Tensor], *, seed: int = 0, sources: Sequence[TileSource] | None = None
) -> list[Payload]:
    """Plans all tensors together and encodes each."""
    specs = [spec_of(tensor, f"layer{index}.weight") for index, tensor in enumerate(tensors)]
    sources = [source_of(tensor) for tensor in tensors] if sources is None else sources
    plans = config.plan(list(zip(specs, sources, strict=True)), seed=seed)
    return [
        Payload(spec, plan.codec, plan.head, encode(plan, tensor))
        for spec, plan, tensor in zip(specs, plans, tensors, strict=True)
    ]


def decoded(payload: Payload, fill: int = 0x5A) -> Tensor:
    return decode(codec_named(payload.codec), payload.spec, payload.head, payload.bodies, fill)


def relative_error(tensor: Tensor, estimate: Tensor) -> float:
    """|x - x'|^2 / |x|^2, scaled first so that no square overflows; 0 where both are zero. Denormal differences count as none."""
    x, difference = tensor.double(), estimate.double() - tensor.double()
    difference = torch.where(difference.abs() <= 2.0**-125, 0.0, difference)
    if not bool(difference.any()):
        return 0.0
    largest = float(torch.maximum(x.abs().max(), difference.abs().max()))
    return float((difference / largest).square().sum() / (x / largest).square().sum())


def check(name: str, tensor: Tensor) -> Payload:
    """Everything that holds for one tensor, whatever its values; gives what was encoded."""
    config, _, worst_error, _ = ENCODINGS[name]
    (payload,) = encoded(config, [tensor])
    codec = codec_named(payload.codec)
    assert payload.codec in CODECS_OF[config.kind] | {"raw"}
    assert codec.has_head == (payload.head is not None)
    assert payload.head is None or 1 <= len(payload.head) <= MAX_HEAD_BYTES
    for body in payload.bodies:
        least, most = codec.body_bytes(payload.spec, body.num_coordinates)
        assert 1 <= body.num_coordinates <= MAX_BODY_COORDINATES
        assert 1 <= least <= len(body.data) <= most <= MAX_BODY_BYTES
    assert sum(body.num_coordinates for body in payload.bodies) == tensor.numel()

    estimate = decoded(payload)
    assert estimate.shape == tensor.shape
    assert estimate.dtype == tensor.dtype
    assert bool(estimate.isfinite().all())
    assert relative_error(tensor, estimate) <= worst_error * (1 + 1e-6)
    assert memory_of(estimate) == memory_of(decoded(payload, fill=0xA5)), "a coordinate was not written"
    shuffled = payload._replace(bodies=random.Random(0).sample(payload.bodies, len(payload.bodies)))
    assert memory_of(estimate) == memory_of(decoded(shuffled)), "the order of bodies matters"
    assert encoded(config, [tensor]) == [payload], "encoding again gives other bytes"
    return payload


@EVERY_CODEC
def test_a_codec_is_found_by_its_kind(kind: str) -> None:
    assert codec_named(kind).kind == kind
    assert 1 <= len(kind) <= MAX_CODEC_BYTES


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PayloadError, match=r"unknown codec 'pickle'; this version knows .*raw"):
        codec_named("pickle")


def test_every_encoding_and_every_codec_is_under_test() -> None:
    configs = get_args(get_args(EncodingConfig)[0])
    assert {type(encoding.config) for encoding in ENCODINGS.values()} == set(configs)
    assert {encoding.config.kind for encoding in ENCODINGS.values()} == set(CODECS_OF)
    assert {payload.codec for payload in corpus()} == set(CODECS)


def in_reach(name: str, tensor: Tensor) -> Tensor:
    """Encodings as float16 refuse what is beyond it, as their own tests show."""
    return tensor.clamp(-60_000, 60_000) if name.endswith("float16") and tensor.dtype is not torch.bfloat16 else tensor


@EVERY_ENCODING
@pytest.mark.parametrize("values", VALUES)
def test_any_values_in_any_shape(name: str, values: str) -> None:
    for shape in SHAPES:
        check(name, in_reach(name, values_of(values, shape, "float32")))


@EVERY_ENCODING
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("values", ["zeros", "huge", "denormal", "every size", "normal"])
def test_every_floating_type(name: str, dtype: str, values: str) -> None:
    for shape in [(1,), (130,), (3, 5, 7), (40, 60), (0, 4)]:
        check(name, in_reach(name, values_of(values, shape, dtype)))


@EVERY_FLOAT
@pytest.mark.parametrize("name", [name for name in ENCODINGS if not name.startswith(("cast", "mask-float16"))])
def test_the_largest_values_of_a_type(name: str, dtype: str) -> None:
    for shape in [(1,), (33,), (7, 9), (40, 60)]:
        check(name, values_of("largest", shape, dtype))


@EVERY_ENCODING
@EVERY_FLOAT
@pytest.mark.parametrize("shape", [(20_000,), (120, 140)])
def test_the_error_of_an_update(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = normal(shape, dtype)
    payload = check(name, tensor)
    of_the_type = torch.finfo(tensor.dtype).eps ** 2
    allowed = ENCODINGS[name].gaussian_error + (0 if payload.codec == "raw" else of_the_type)
    assert relative_error(tensor, decoded(payload)) <= allowed


@EVERY_ENCODING
@pytest.mark.parametrize("shape", [(300_000,), (1100, 1000)])
def test_many_bodies(name: str, shape: tuple[int, ...]) -> None:
    payload = check(name, normal(shape))
    assert len(payload.bodies) > 1 or shape == (300_000,)


@EVERY_ENCODING
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in FLOATS])
def test_what_is_no_float_is_sent_raw(name: str, dtype: str) -> None:
    tensor = random_bits(500, dtype, 3).view(10, 50)
    (payload,) = encoded(ENCODINGS[name].config, [tensor])
    assert payload.codec == "raw"
    assert memory_of(decoded(payload)) == memory_of(tensor)


@EVERY_ENCODING
def test_tensors_are_planned_together_and_in_order(name: str) -> None:
    tensors = model_tensors()
    payloads = encoded(ENCODINGS[name].config, tensors)
    for tensor, payload in zip(tensors, payloads, strict=True):
        estimate = decoded(payload)
        assert (estimate.shape, estimate.dtype) == (tensor.shape, tensor.dtype)
        assert bool(estimate.isfinite().all())
        assert payload.codec != "raw" or memory_of(estimate) == memory_of(tensor)


@EVERY_ENCODING
@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1e6])
def test_no_tensor_is_lost_among_larger_ones(name: str, factor: float) -> None:
    if name.endswith("float16"):
        factor = min(max(factor, 1e-2), 1e2)
    large, small = (
        normal((60, 70), seed=1),
        [normal((80, 40), seed=2), normal((300,), seed=3), normal((8, 8, 3, 3), seed=4)],
    )
    tensors = [large, *(tensor * factor for tensor in small)]
    for tensor, payload in zip(tensors, encoded(ENCODINGS[name].config, tensors), strict=True):
        assert relative_error(tensor, decoded(payload)) <= ENCODINGS[name].error_among_larger


@EVERY_ENCODING
def test_no_tensors_make_no_plans(name: str) -> None:
    assert ENCODINGS[name].config.plan([], seed=0) == []


@EVERY_ENCODING
def test_a_source_may_reuse_its_memory(name: str) -> None:
    tensors = [tensor for tensor in model_tensors() if tensor.dtype is torch.float32]
    lent: list[Tensor] = []

    def lending(tensor: Tensor) -> TileSource:
        def read(first: int, count: int) -> Tensor:
            while lent:
                lent.pop().fill_(float("nan"))
            lent.append(tensor.reshape(-1)[first : first + count].clone())
            return lent[-1]

        return read

    config = ENCODINGS[name].config
    assert encoded(config, tensors, sources=[lending(tensor) for tensor in tensors]) == encoded(config, tensors)


@EVERY_ENCODING
def test_encoding_leaves_the_tensor_alone(name: str) -> None:
    tensors = model_tensors()
    before = [memory_of(tensor) for tensor in tensors]
    encoded(ENCODINGS[name].config, tensors)
    assert [memory_of(tensor) for tensor in tensors] == before


@EVERY_ENCODING
def test_the_seed_and_no_global_generator_decides(name: str) -> None:
    tensors = model_tensors()[:2]
    config = ENCODINGS[name].config
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    first = encoded(config, tensors, seed=9)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    assert encoded(config, tensors, seed=9) == first
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    encoded(config, tensors, seed=9)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(state[0], torch.get_rng_state())
    assert torch.equal(after[0], torch.get_rng_state())
    assert state[1:] == after[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]


@pytest.mark.parametrize("kind", [kind for kind in CODECS if kind != "raw"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in FLOATS])
def test_a_lossy_codec_refuses_what_is_no_float(kind: str, dtype: str) -> None:
    spec = TensorSpec("w", (40, 50), dtype)
    with pytest.raises(PayloadError):
        codec_named(kind).body_bytes(spec, 2000)
    with pytest.raises(PayloadError):
        codec_named(kind).decoder(spec, sample(kind).head)


@EVERY_CODEC
def test_a_head_where_none_belongs_and_none_where_one_does(kind: str) -> None:
    spec, _, head, _ = sample(kind)
    with pytest.raises(PayloadError):
        codec_named(kind).decoder(spec, b"\x00" if head is None else None)


def model_tensors() -> list[Tensor]:
    """A small model's update: matrices, some of low rank, a convolution, biases, buffers, and what is empty."""
    low_rank = normal((90, 3), scale=1.0, seed=1) @ normal((3, 120), seed=2)
    return [
        low_rank,
        normal((32, 16, 3, 3), seed=3),
        normal((120, 90), seed=4) * torch.logspace(-2, 0, 90),
        normal((90,), seed=5),
        torch.zeros(64, 64),
        torch.where(normal((50, 60), seed=6) > 0.03, normal((50, 60), seed=7), 0.0),
        normal((40, 50), "float64", seed=8),
        normal((64, 65), "bfloat16", seed=9),
        normal((64, 65), "float16", seed=10),
        torch.tensor(3, dtype=torch.int64),
        torch.zeros(0, 8),
        normal((), seed=11),
    ]


@cache
def corpus() -> tuple[Payload, ...]:
    """Valid payloads to mutate: every codec, with and without structure, each dtype, one and several bodies."""
    payloads: dict[tuple[bytes | None, tuple[Body, ...]], Payload] = {}
    for encoding in ENCODINGS.values():
        for payload in encoded(encoding.config, model_tensors()):
            payloads.setdefault((payload.head, tuple(payload.bodies)), payload)
    return tuple(payload for payload in payloads.values() if payload.bodies)


def of_kind(kind: str) -> list[Payload]:
    return [payload for payload in corpus() if payload.codec == kind]


def sample(kind: str) -> Payload:
    return of_kind(kind)[0]


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One of the ways in which bytes go wrong, most of them small."""
    mutated = bytearray(data)
    position = rng.randrange(len(mutated)) if mutated else 0
    match rng.randrange(9):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 2, 8))):
                if mutated:
                    mutated[rng.randrange(min(len(mutated), rng.choice((8, 64, 2**20))))] ^= 1 << rng.randrange(8)
        case 2:
            del mutated[position:]
        case 3:
            del mutated[position : position + rng.randrange(1, 9)]
        case 4:
            mutated[position:position] = rng.randbytes(rng.randrange(1, 9))
        case 5:
            end = rng.randrange(len(other) + 1)
            mutated[position:] = other[end:]
        case 6:
            mutated[position : position + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\x80" * 4))
        case 7:
            mutated = bytearray(rng.randbytes(len(mutated)))
        case 8:
            mutated += rng.randbytes(rng.randrange(1, 20))
    return bytes(mutated)


def mutant(kind: str, rng: random.Random) -> Payload:
    """A payload of that codec with something wrong in its head, a body, its cut into bodies, or its spec."""
    payloads = of_kind(kind)
    payload, other = rng.choice(payloads), rng.choice(payloads)
    index = rng.randrange(len(payload.bodies))
    bodies = list(payload.bodies)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        what = rng.randrange(11)
        if what < 4 and payload.head is not None:
            payload = payload._replace(head=mutate(payload.head, other.head or b"", rng))
        elif what < 8:
            bodies[index] = bodies[index]._replace(data=mutate(bodies[index].data, other.bodies[0].data, rng))
        elif what == 8:
            payload = payload._replace(spec=other.spec)
        elif what == 9:
            shape = rng.choice(((2**38,), (2**37, 2), (2, 2**37), (2**19, 2**19), (2**21, 1), (1, 2**21), (1,) * 8))
            payload = payload._replace(spec=replace(payload.spec, shape=shape))
        else:
            count = min(rng.randrange(1, payload.spec.num_elements + 1), rng.choice((1000, MAX_BODY_COORDINATES)))
            first = rng.randrange(payload.spec.num_elements - count + 1)
            bodies[index] = Body(first, count, bodies[index].data)
    total = payload.spec.num_elements
    fitting = [body for body in bodies if body.first + body.num_coordinates <= total]
    return payload._replace(bodies=fitting)


def outcomes_of(payload: Payload) -> list[Tensor | None]:
    """What each body decodes to, None where it is refused; anything but PayloadError comes through."""
    codec = codec_named(payload.codec)
    outcomes: list[Tensor | None] = []
    try:
        decoder = codec.decoder(payload.spec, payload.head)
    except PayloadError:
        return [None]
    for body in payload.bodies:
        outs = []
        for fill in (0x5A, 0xA5):
            size = body.num_coordinates * DTYPES[payload.spec.dtype]
            out = torch.full((size,), fill, dtype=torch.uint8).view(torch_dtype(payload.spec.dtype))
            if payload.spec.dtype == "bool":
                out.zero_()
            try:
                decoder.decode(body.first, memoryview(body.data), out)
            except PayloadError:
                continue
            outs.append(out)
        assert len(outs) != 1, "refused once and decoded once"
        assert not outs or memory_of(outs[0]) == memory_of(outs[1]), "a coordinate was not written"
        outcomes.append(outs[0] if outs else None)
    return outcomes


@EVERY_CODEC
@settings(deadline=None, max_examples=NUM_EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**64))
def test_a_mutated_payload_is_refused_or_decoded_wholly(kind: str, seed: int) -> None:
    payload = mutant(kind, random.Random(seed))
    for outcome in outcomes_of(payload):
        if outcome is not None and payload.spec.dtype == "bool":
            assert outcome.view(torch.uint8).max() <= 1


@EVERY_CODEC
@settings(deadline=None, max_examples=NUM_EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.data(), st.binary(max_size=300), st.sampled_from(FLOATS))
def test_garbage_is_refused_or_decoded_wholly(kind: str, data: st.DataObject, body: bytes, dtype: str) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), max_size=4)))
    spec = TensorSpec("w", shape, dtype)
    has_head = codec_named(kind).has_head
    head = data.draw(st.one_of(st.binary(max_size=200), st.just(sample(kind).head or b""))) if has_head else None
    outcomes_of(Payload(spec, kind, head, [Body(0, spec.num_elements, body)]))


@EVERY_CODEC
def test_decoding_a_mutated_payload_takes_memory_in_proportion(kind: str) -> None:
    rng = random.Random(5)
    outcomes_of(mutant(kind, rng))
    for _ in range(200):
        payload = mutant(kind, rng)
        given_bytes = payload.spec.num_bytes + len(payload.head or b"") + sum(len(body.data) for body in payload.bodies)
        tracemalloc.start()
        try:
            outcomes_of(payload)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= 2**20 + 32 * given_bytes


_IN_LITTLE_MEMORY = """
import random, resource, sys
sys.path[:0] = {path!r}
from tests.core.test_codec_contract import CODECS, outcomes_of, mutant
rng = random.Random(11)
for kind in CODECS:
    outcomes_of(mutant(kind, rng))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
for kind in CODECS:
    print(kind, flush=True)
    for _ in range({num_examples}):
        outcomes_of(mutant(kind, rng))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_no_mutated_payload_reaches_for_much_memory() -> None:
    # torch's memory is not Python's: only the system can tell, and only in a process of its own.
    program = _IN_LITTLE_MEMORY.format(path=[path for path in sys.path if path], num_examples=min(NUM_EXAMPLES, 2000))
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]


@EVERY_CODEC
def test_decoding_a_whole_body_takes_memory_in_proportion(kind: str) -> None:
    config = next(
        encoding.config for encoding in ENCODINGS.values() if kind in CODECS_OF[encoding.config.kind] | {"raw"}
    )
    tensor = normal((1000, 3), seed=1) @ normal((3, 1000), seed=2)
    (payload,) = encoded(config, [tensor])
    decoded(payload)
    tracemalloc.start()
    try:
        decoded(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 4 * MAX_BODY_COORDINATES * 4
