"""Payloads in codecs other than raw: the bundle of small tensors, packed specs, results, new values, and what was lost."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.cast import CastConfig, cast_plan
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.lattice import LatticeEncoding, LosslessEncoding
from fed_core.codecs.raw import RawConfig, raw_plan
from fed_core.codecs.registry import EncodingConfig
from fed_core.codecs.uniform import UniformConfig
from fed_core.errors import CorruptError, PayloadError
from fed_core.payload import limits
from fed_core.payload.manifest import SegmentSpan, pack_bundle, split_bundle
from fed_core.payload.verify import SegmentVerifier
from fed_core.payload.wire import write_varint
from fed_core.payload.writer import identify_model
from fed_core.specs import TensorSpec
from fed_core.tensors import apply_difference
from fedstream.v1 import common_pb2, payload_pb2
from tests.core.coding import memory_of, normal, source_of
from tests.core.payloads import (
    INFO,
    named,
    opened,
    parse,
    same_bits,
    seal,
    split,
    write_delta,
    write_model,
    write_update,
)

Named = list[tuple[TensorSpec, Tensor]]

# A matrix with segments of its own, and small tensors of which some have a head, some none.
MIXED = named([normal((300, 100)), torch.tensor([3]), normal((20,)), normal((10, 20)), torch.zeros(0, 2)])
LATTICE = LatticeEncoding({"layer.0": -10, "layer.3": -8})


def bundle_of(data: bytes) -> bytes:
    span = parse(data).bundle
    assert span is not None
    return data[span.offset : span.end]


def rebundled(data: bytes, bundle: bytes) -> bytes:
    """The payload with other bytes in its bundle, digests in order."""
    message, segments = split(data)
    segments = bundle + segments[message.bundle.encoded_bytes :]
    message.encoded_bytes = len(segments)
    message.bundle.encoded_bytes, message.bundle.digest = len(bundle), blake3(bundle).digest()
    return seal(message.SerializeToString(), segments)


# --- the bundle


def test_small_tensors_share_one_segment_before_all_others(tmp_path: Path) -> None:
    _, data = write_update(MIXED, encoding=LATTICE)
    manifest = parse(data)
    assert manifest.bundle is not None
    assert manifest.segments[0] == manifest.bundle
    assert [entry.is_bundled for entry in manifest.tensors] == [False, True, True, True, False]
    assert [entry.codec for entry in manifest.tensors] == ["fsq", "raw", "raw", "fsq", "raw"]
    parts = split_bundle(manifest, bundle_of(data))
    assert [(part.tensor_index, len(part.head) > 0) for part in parts] == [(1, False), (2, False), (3, True)]
    with opened(tmp_path, data) as reader:
        assert same_bits(reader.tensor("layer.2", verify=True), MIXED[2][1])
        step = 2.0**-8
        assert reader.tensor("layer.3").equal((MIXED[3][1] / step).round() * step)


def test_a_bundled_tensor_comes_as_one_tile(tmp_path: Path) -> None:
    with opened(tmp_path, write_update(MIXED, encoding=LATTICE)[1]) as reader:
        [(first, tile)] = reader.iter_tiles("layer.2", verify=True)
        assert (first, memory_of(tile)) == (0, memory_of(MIXED[2][1]))
        assert list(reader.iter_tiles("layer.4")) == []


def test_the_raw_model_has_no_bundle_and_every_other_payload_does() -> None:
    def has_bundle(data: bytes) -> bool:
        return parse(data).bundle is not None

    assert not has_bundle(write_model(MIXED)[1])
    assert has_bundle(write_model(MIXED, encoding=LATTICE, result_digest=lambda: bytes(32))[1])
    assert has_bundle(write_update(MIXED)[1])
    assert has_bundle(write_delta(MIXED)[1])
    assert not has_bundle(write_update(MIXED[:1])[1])


def test_a_bundle_is_full_at_a_megabyte_and_the_rest_have_segments(tmp_path: Path) -> None:
    tensors = named([normal((1000,), seed=index) for index in range(300)])  # 1.2 MB
    written, data = write_update(tensors)
    manifest = parse(data)
    assert manifest.bundle is not None
    assert limits.MAX_BUNDLE_BYTES - 5000 < manifest.bundle.length <= limits.MAX_BUNDLE_BYTES
    num_bundled = sum(entry.is_bundled for entry in manifest.tensors)
    assert all(entry.is_bundled for entry in manifest.tensors[:num_bundled])
    assert len(manifest.segments) == 1 + 300 - num_bundled
    with opened(tmp_path, data) as reader:
        for (spec, tensor), received in zip(tensors, reader.tensors(verify=True).values(), strict=True):
            assert same_bits(received, tensor), spec.name
    assert written.total_bytes == len(data)


def test_a_tensor_of_4096_encoded_bytes_is_bundled_and_none_of_more() -> None:
    tensors = named([normal((1024,)), normal((1025,))])
    assert [entry.is_bundled for entry in parse(write_update(tensors)[1]).tensors] == [True, False]


def test_a_bundle_saves_what_its_segments_would_cost() -> None:
    """A segment takes some 50 bytes of the manifest, a bundled tensor two of the bundle."""
    tensors = named([torch.zeros(4)] * 1000)
    assert len(write_update(tensors)[1]) < 1000 * (16 + 10) + 2000


_SCALAR = bytes([0, 8]) + bytes(8)
_VECTOR = bytes([0, 80]) + bytes(80)


def lying(index: int, head: bytes, body: bytes) -> Callable[[bytes], bytes]:
    """Another head and body of one tensor of the bundle."""

    def change(data: bytes) -> bytes:
        parts = split_bundle(parse(data), bundle_of(data))
        return pack_bundle(
            (head, body) if at == index else (bytes(part.head), bytes(part.body)) for at, part in enumerate(parts)
        )

    return change


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "no varint at byte": lambda data: b"\xff" * 20,
    "no varint": lambda data: bundle_of(data)[:1],
    "'layer.1' claims 0 \\+ 300 bytes": lambda data: b"\x00" + write_varint(300) + bytes(10),
    "claims 0 \\+ 0 bytes": lambda data: b"\x00\x00" + bundle_of(data),
    "claims 4000 \\+ 97 bytes": lying(1, bytes(4000), bytes(97)),
    "claims 18446744073709551615 \\+": lambda data: write_varint(2**64 - 1) + b"\x01" + bytes(9),
    "1 bytes follow the last tensor": lambda data: bundle_of(data) + b"x",
    "the codec 'raw' has no head": lying(0, b"h", bytes(8)),
    "the codec 'fsq' has a head": lying(2, b"", bytes(8)),
    "a raw body of 1 coordinates has 7 bytes; expected 8 to 8": lying(0, b"", bytes(7)),
    "a raw body of 20 coordinates has 84 bytes; expected 80": lying(1, b"", bytes(84)),
    "a fsq body of 200 coordinates has 3000 bytes": lying(2, b"h", bytes(3000)),
    "'layer.3'": lying(2, b"\xff", bytes(9)),
}


@pytest.mark.parametrize("complaint", HOSTILE)
def test_a_bundle_that_lies_is_refused_by_name(tmp_path: Path, complaint: str) -> None:
    _, data = write_update(MIXED, encoding=LATTICE)
    with opened(tmp_path, rebundled(data, HOSTILE[complaint](data))) as reader:
        with pytest.raises(PayloadError, match=complaint):
            reader.tensors(verify=True)
        assert reader.tensor("layer.0", verify=True).shape == (300, 100)  # the others are unharmed


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_in_a_bundle_are_refused_or_decoded_wholly(
    tmp_path_factory: pytest.TempPathFactory, choices: st.DataObject
) -> None:
    _, data = write_update(MIXED, encoding=LATTICE)
    bundle = bytearray(bundle_of(data))
    for _ in range(choices.draw(st.integers(1, 4))):
        at = choices.draw(st.integers(0, len(bundle)))
        bundle[at : at + choices.draw(st.integers(0, 3))] = choices.draw(st.binary(max_size=4))
    if not bundle:
        return
    with opened(tmp_path_factory.getbasetemp(), rebundled(data, bytes(bundle))) as reader:
        try:
            found = reader.tensors(verify=choices.draw(st.booleans()))
        except PayloadError:
            return
    assert [(tuple(t.shape), t.dtype) for t in found.values()] == [(s.shape, t.dtype) for s, t in MIXED]


def test_a_bundle_is_verified_like_any_segment() -> None:
    written, data = write_update(MIXED, encoding=LATTICE)
    span = parse(data).segments[0]
    rotten = bytearray(data)
    rotten[span.end - 1] ^= 1
    seen: list[SegmentSpan] = []
    verifier = SegmentVerifier(written.digest, on_segment=lambda span, view: seen.append(span))
    with pytest.raises(CorruptError, match="the bundle") as caught:
        verifier.feed(rotten)
    assert caught.value.offset == span.offset
    assert seen == []


# --- specs


def test_only_the_raw_model_spells_its_specs_out() -> None:
    for data, is_packed in (
        (write_model(MIXED)[1], False),
        (write_model(MIXED, encoding=CastConfig(), result_digest=lambda: bytes(32))[1], True),
        (write_update(MIXED)[1], True),
        (write_delta(MIXED)[1], True),
    ):
        message, _ = split(data)
        assert (bool(message.packed_specs), message.HasField("specs")) == (is_packed, not is_packed)
        assert parse(data).specs == tuple(spec for spec, _ in MIXED)


def test_specs_may_be_packed_by_any_zlib() -> None:
    message, segments = split(write_update(MIXED)[1])
    specs = zlib.decompress(message.packed_specs)
    for level in (0, 1, 9):
        message.packed_specs = zlib.compress(specs, level)
        assert parse(seal(message.SerializeToString(), segments)).specs == tuple(spec for spec, _ in MIXED)


@pytest.mark.parametrize("codec", [1, 2, 63, 2**32 - 1])
def test_a_codec_beyond_the_list_is_refused(codec: int) -> None:
    message, segments = split(write_update(MIXED)[1])
    message.tensors[3].codec = codec
    with pytest.raises(PayloadError, match=f"'layer.3' names codec number {codec}; the manifest lists 1"):
        parse(seal(message.SerializeToString(), segments))


# --- identity and result


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(["float32", "int16", "bool"]))
    ),
    st.integers(0, 99),
    st.sampled_from([None, RawConfig(), LosslessEncoding()]),
)
def test_the_identity_of_a_model_does_not_depend_on_how_it_is_written(
    shapes: list[tuple[tuple[int, ...], str]], seed: int, encoding: EncodingConfig | None
) -> None:
    tensors = named([normal(shape, seed=seed).round(decimals=1).to(getattr(torch, kind)) for shape, kind in shapes])
    tiled = [(spec, source_of(tensor)) for spec, tensor in tensors]
    identity = identify_model("", 0, tensors).digest
    assert identity == identify_model("", 0, tiled).digest == write_model(tensors)[0].digest
    written, data = write_model(tensors, encoding=encoding, result_digest=lambda: identity)
    assert parse(data).model_digest == identity
    assert (written.digest == identity) == all(entry.codec == "raw" for entry in parse(data).tensors)


def test_the_identity_is_of_values_names_run_and_version() -> None:
    tensors = named([normal((3, 4))])
    identity = identify_model("r", 1, tensors)
    changed = named([normal((3, 4), seed=1)])
    renamed = [(TensorSpec("other", (3, 4), "float32"), tensors[0][1])]
    others = [identify_model("s", 1, tensors), identify_model("r", 2, tensors)]
    others += [identify_model("r", 1, changed), identify_model("r", 1, renamed)]
    assert len({identity.digest, *(other.digest for other in others)}) == 5
    assert identity.total_bytes == len(write_model(tensors)[1]) + len("r") + 2 + 2  # the run's name and the version


def test_a_raw_model_names_no_result_and_all_that_leads_to_one_does() -> None:
    raw, data = write_model(MIXED, result_digest=lambda: bytes(32))
    assert raw == write_model(MIXED)[0]
    assert parse(data).result_digest == b""
    assert parse(data).model_digest == raw.digest
    result = bytes(range(32))
    for data in (
        write_model(MIXED, encoding=LATTICE, result_digest=lambda: result)[1],
        write_delta(MIXED, encoding=LATTICE, result_digest=lambda: result)[1],
        write_delta(MIXED, result_digest=lambda: result)[1],
    ):
        assert parse(data).result_digest == parse(data).model_digest == result


def test_the_result_is_asked_for_when_all_is_decoded() -> None:
    seen: list[str] = []

    def result() -> bytes:
        assert set(seen) == {spec.name for spec, tensor in MIXED if tensor.numel()}
        return bytes(32)

    write_delta(
        MIXED,
        encoding=LATTICE,
        result_digest=result,
        on_decoded=lambda spec, codec, first, tile: seen.append(spec.name),
    )
    assert seen[:3] == ["layer.1", "layer.2", "layer.3"], "the bundle comes first"


Change = Callable[[payload_pb2.Manifest], None]


def say_result(digest: bytes) -> Change:
    return lambda message: setattr(message, "result_digest", digest)


RESULTS: dict[str, tuple[Callable[[], bytes], Change]] = {
    "a delta without": (lambda: write_delta(MIXED)[1], say_result(b"")),
    "a delta with a short one": (lambda: write_delta(MIXED)[1], say_result(bytes(31))),
    "a raw model with": (lambda: write_model(MIXED)[1], say_result(bytes(32))),
    "a model in a codec without": (
        lambda: write_model(MIXED, encoding=LATTICE, result_digest=lambda: bytes(32))[1],
        say_result(b""),
    ),
    "an update with": (lambda: write_update(MIXED)[1], say_result(bytes(32))),
}


@pytest.mark.parametrize("case", RESULTS)
def test_a_result_where_none_belongs_and_none_where_one_does(case: str) -> None:
    make, change = RESULTS[case]
    message, segments = split(make())
    change(message)
    with pytest.raises(PayloadError, match="name the digest of the raw model, and nothing else does"):
        parse(seal(message.SerializeToString(), segments))


def test_a_writer_that_forgets_the_result_writes_nothing() -> None:
    with pytest.raises(PayloadError, match="name the digest of the raw model"):
        write_delta(MIXED, result_digest=None)
    with pytest.raises(PayloadError, match="name the digest of the raw model"):
        write_model(MIXED, encoding=LATTICE)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: setattr(m, "base_digest", b""), "an update or a delta names the digest of its base model"),
        (lambda m: setattr(m, "round", 3), "a model, a delta or a variate belongs to no round; here it says 3"),
        (lambda m: m.update.MergeFrom(INFO.to_proto()), "says what work is behind it, and nothing else does"),
        (lambda m: setattr(m, "model_version", -1), "model version -1"),
    ],
)
def test_a_delta_that_breaks_a_rule_is_refused(change: Change, complaint: str) -> None:
    message, segments = split(write_delta(MIXED)[1])
    change(message)
    with pytest.raises(PayloadError, match=complaint):
        parse(seal(message.SerializeToString(), segments))


# --- new values


def test_a_tensor_that_a_delta_holds_raw_is_the_new_value_itself(tmp_path: Path) -> None:
    """As short as a difference, and exact: the sum of a base and a difference is not."""
    base, new = normal((50, 50), scale=1.0), normal((50, 50), scale=1e-9, seed=1)
    change = new - base
    assert not same_bits(apply_difference(base, change), new)
    count = torch.tensor([7])
    specs = [spec for spec, _ in named([base, count])]
    news = dict(zip(("layer.0", "layer.1"), (new, count), strict=True))
    seen: dict[str, Tensor] = {}
    for encoding in (None, LatticeEncoding({"layer.0": -12})):
        written, data = write_delta(
            list(zip(specs, (change, count - 3), strict=True)),
            encoding=encoding,
            new_values={name: source_of(tensor) for name, tensor in news.items()},
            on_decoded=lambda spec, codec, first, tile: seen.__setitem__(spec.name, tile.clone()),
        )
        with opened(tmp_path, data) as reader:
            received = reader.tensors(verify=True)
        assert same_bits(received["layer.1"], count)
        assert all(memory_of(seen[name]) == memory_of(tensor) for name, tensor in received.items())
        if encoding is None:
            assert same_bits(received["layer.0"], new)
            assert written.codecs == {"raw": 2}
        else:
            steps = received["layer.0"] * 2.0**12
            assert steps.equal(steps.round())
            assert (steps - change * 2.0**12).abs().max() <= 0.5
            assert written.codecs == {"fsq": 1, "raw": 1}


# --- what was lost


def sums(tensors: Named, received: dict[str, Tensor], codecs: dict[str, str]) -> tuple[float, float, float]:
    """|x|^2, <x, x'>, |x - x'|^2 over what is not raw, the slow way."""
    energy = product = error = 0.0
    for spec, tensor in tensors:
        if codecs[spec.name] != "raw":
            exact, seen = tensor.double(), received[spec.name].double()
            energy += float((exact * exact).sum())
            product += float((exact * seen).sum())
            error += float(((exact - seen) ** 2).sum())
    return energy, product, error


@pytest.mark.parametrize(
    "encoding",
    [CastConfig(), UniformConfig(bits=4), UniformConfig(bits=4, rounding="stochastic"), FsqConfig(), LATTICE],
)
def test_error_and_gain_are_those_of_what_the_receiver_decodes(tmp_path: Path, encoding: EncodingConfig) -> None:
    written, data = write_update(MIXED, encoding=encoding, seed=5)
    with opened(tmp_path, data) as reader:
        codecs = {entry.spec.name: entry.codec for entry in reader.manifest.tensors}
        energy, product, error = sums(MIXED, reader.tensors(verify=True), codecs)
        update = reader.manifest.update
    assert update is not None
    assert (update.error, update.gain) == (written.fidelity.error, written.fidelity.gain)
    assert update.error == pytest.approx(error / energy, rel=1e-9)
    assert update.gain == pytest.approx(product / energy, rel=1e-9)
    assert 0 < update.error < 1
    assert update.gain != 1
    assert written.codecs == reader.manifest.codecs == {c: list(codecs.values()).count(c) for c in codecs.values()}


@pytest.mark.parametrize("encoding", [None, RawConfig()])
def test_what_is_raw_loses_nothing(encoding: EncodingConfig | None) -> None:
    written, data = write_update(MIXED, encoding=encoding)
    update = parse(data).update
    assert update is not None
    assert (update.error, update.gain) == (written.fidelity.error, written.fidelity.gain) == (0.0, 1.0)


@pytest.mark.parametrize("encoding", [CastConfig(), UniformConfig(), FsqConfig(), LATTICE])
def test_an_update_that_is_zero_loses_nothing(encoding: EncodingConfig) -> None:
    written, data = write_update([(spec, torch.zeros_like(tensor)) for spec, tensor in MIXED], encoding=encoding)
    update = parse(data).update
    assert update is not None
    assert (update.error, update.gain) == (0.0, 1.0)
    assert written.fidelity.energy == 0


def test_what_an_update_claims_to_have_lost_is_replaced_by_what_it_did(tmp_path: Path) -> None:
    """The size of the manifest does not depend on it."""
    sizes = set()
    for scale in (0.0, 1e-30, 1.0, 1e30):
        tensors = [(spec, tensor * scale if tensor.is_floating_point() else tensor) for spec, tensor in MIXED]
        _, data = write_update(tensors, encoding=CastConfig())
        sizes.add(parse(data).manifest_bytes)
    assert len(sizes) == 1


class _Counting:
    """Plans cast, and counts how often each source is read."""

    kind = "counting"

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        self.seeds = [seed]
        for spec, source in tensors:
            for _ in range(2):
                source(0, spec.num_elements)
        return [
            cast_plan(spec, source, to="float16") if spec.dtype == "float32" else raw_plan(spec, source)
            for spec, source in tensors
        ]


def test_an_encoding_reads_all_tensors_before_the_first_is_written() -> None:
    reads: list[str] = []

    def watched(spec: TensorSpec, tensor: Tensor) -> TileSource:
        flat = tensor.reshape(-1)

        def source(first: int, count: int) -> Tensor:
            reads.append(spec.name)
            return flat[first : first + count]

        return source

    encoding = _Counting()
    write_update([(spec, watched(spec, tensor)) for spec, tensor in MIXED], encoding=encoding, seed=17)
    assert encoding.seeds == [17]
    planned = [f"layer.{index}" for index in range(5) for _ in range(2)]
    assert reads[: len(planned)] == planned
    assert sorted(set(reads[len(planned) :])) == ["layer.0", "layer.1", "layer.2", "layer.3"]


def test_every_kind_says_which_it_is() -> None:
    kinds = {
        common_pb2.PAYLOAD_KIND_MODEL: write_model(MIXED),
        common_pb2.PAYLOAD_KIND_UPDATE: write_update(MIXED),
        common_pb2.PAYLOAD_KIND_DELTA: write_delta(MIXED),
    }
    assert [parse(data).kind for _, data in kinds.values()] == list(kinds)
