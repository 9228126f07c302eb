"""A payload file: every value survives, every limit holds, and no bytes make a reader do more than raise our errors."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.errors import CorruptError, NotFoundError, PayloadError
from fed_core.payload import limits
from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import Manifest, SegmentSpan, pack_specs, parse_preamble, split_bundle
from fed_core.payload.reader import PayloadReader
from fed_core.payload.verify import SegmentVerifier, verify_file, verify_prefix
from fed_core.payload.writer import write_payload
from fed_core.specs import DTYPES, TensorSpec
from fedstream.v1 import common_pb2, payload_pb2
from tests.core.coding import memory_of
from tests.core.payloads import (
    INFO,
    named,
    parse,
    random_tensor,
    same_bits,
    seal,
    split,
    write_model,
    write_update,
)

# In an update the first has a segment of its own, the others share the bundle, and one is empty.
SMALL = [
    random_tensor((30, 50), "float32"),
    random_tensor((), "int64"),
    random_tensor((0, 4), "float16"),
    random_tensor((7,), "bool"),
    random_tensor((2, 1, 3), "complex64"),
]


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, bytes]:
    """A small update as a file, and its digest."""
    written, data = write_update(named(SMALL))
    path = tmp_path / "small.update"
    path.write_bytes(data)
    return path, written.digest


def feed_all(verifier: SegmentVerifier, data: bytes | bytearray, sizes: Iterable[int] = (2**20,)) -> Manifest:
    """Feeds chunks of these sizes, over and over."""
    at = 0
    for size in cycle(sizes):
        if at >= len(data):
            break
        verifier.feed(data[at : at + size])
        at += size
        assert verifier.verified_offset <= at
    return verifier.finish()


# --- round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_survives_at_every_size(dtype: str, tmp_path: Path) -> None:
    body = limits.MAX_BODY_BYTES // DTYPES[dtype]
    tensors = [random_tensor((count,), dtype, count) for count in (0, 1, 3, body - 1, body, body + 1, 2 * body + 7)]
    tensors += [random_tensor((), dtype), random_tensor((3, 0, 2), dtype), random_tensor((5, 1, 7), dtype)]
    written, data = write_update(named(tensors))
    path = tmp_path / "all"
    path.write_bytes(data)
    manifest = verify_file(path, written.digest)
    assert (manifest.total_bytes, manifest.raw_bytes) == (len(data), written.raw_bytes)
    with PayloadReader(path, written.digest) as reader:
        for (spec, tensor), (name, received) in zip(named(tensors), reader.tensors(verify=True).items(), strict=True):
            assert name == spec.name
            assert same_bits(received, tensor)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 6), max_size=4).map(tuple), st.sampled_from(sorted(DTYPES))), max_size=6
    ),
    st.integers(0, 2**32),
)
def test_any_list_of_tensors_survives(shapes: list[tuple[tuple[int, ...], str]], seed: int) -> None:
    tensors = named([random_tensor(shape, dtype, seed) for shape, dtype in shapes])
    written, data = write_update(tensors)
    segments: dict[int, bytes] = {}

    def collect(span: SegmentSpan, view: memoryview) -> None:
        if span.is_bundle:
            assert verifier.manifest is not None
            segments.update({part.tensor_index: bytes(part.body) for part in split_bundle(verifier.manifest, view)})
        else:
            segments[span.tensor_index] = segments.get(span.tensor_index, b"") + bytes(view)

    verifier = SegmentVerifier(written.digest, len(data), on_segment=collect)
    verifier.feed(data)
    manifest = verifier.finish()
    assert manifest.specs == tuple(spec for spec, _ in tensors)
    assert [segments.get(index, b"") for index in range(len(tensors))] == [memory_of(tensor) for _, tensor in tensors]


def test_what_an_update_says_of_itself_survives(small: tuple[Path, bytes]) -> None:
    manifest = verify_file(*small)
    assert manifest.kind == common_pb2.PAYLOAD_KIND_UPDATE
    assert (manifest.run_id, manifest.round, manifest.model_version) == ("run-1", 4, 3)
    assert manifest.base_digest == bytes(range(32))
    assert manifest.update == INFO


def test_segments_follow_each_other_without_gaps(small: tuple[Path, bytes]) -> None:
    manifest = verify_file(*small)
    assert manifest.segments[0].offset == PREAMBLE_BYTES + manifest.manifest_bytes
    assert [span.offset for span in manifest.segments[1:]] == [span.end for span in manifest.segments[:-1]]
    assert manifest.segments[-1].end == manifest.total_bytes == small[0].stat().st_size


def test_a_payload_without_tensors_is_a_payload(tmp_path: Path) -> None:
    written, data = write_model([])
    path = tmp_path / "empty"
    path.write_bytes(data)
    assert verify_file(path, written.digest).segments == ()
    with PayloadReader(path) as reader:
        assert reader.tensors() == {}


def test_equal_contents_have_equal_digests_and_others_do_not() -> None:
    tensors = named([torch.zeros(3)])
    assert write_update(tensors)[0] == write_update(tensors)[0]
    assert write_update(tensors)[0].digest != write_update(named([torch.ones(3)]))[0].digest


def test_views_are_written_as_their_values() -> None:
    matrix = random_tensor((4, 6), "complex64").nan_to_num()
    for view in (matrix.t(), matrix[:, ::2], matrix.conj(), matrix.imag, torch.zeros(()).expand(5)):
        assert write_update(named([view]))[0] == write_update(named([view.resolve_conj().clone().contiguous()]))[0]


def test_a_tile_source_writes_what_the_tensor_does_and_reports_progress() -> None:
    tensor = random_tensor((700_000,), "float32")
    asked: list[tuple[int, int]] = []
    progress: list[tuple[int, int]] = []

    def source(first: int, count: int) -> Tensor:
        asked.append((first, count))
        return tensor[first : first + count]

    file = io.BytesIO()
    written = write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_MODEL,
        run_id="",
        round=0,
        model_version=0,
        base_digest=b"",
        update=None,
        tensors=[(TensorSpec("w", (700_000,), "float32"), source)],
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert written == write_model([(TensorSpec("w", (700_000,), "float32"), tensor)])[0]
    assert asked == [(0, 2**18), (2**18, 2**18), (2**19, 700_000 - 2**19)]
    assert progress == [(2**20, 2_800_000), (2**21, 2_800_000), (2_800_000, 2_800_000)]


# --- the writer refuses


@pytest.mark.parametrize(
    ("spec", "tensor", "complaint"),
    [
        (TensorSpec("w", (2,), "float32"), torch.zeros(3), r"shape \(3,\); its spec says \(2,\)"),
        (TensorSpec("w", (2,), "float32"), torch.zeros(2, dtype=torch.float64), "is float64 .*; expected float32"),
        (TensorSpec("w", (1,) * 9, "float32"), torch.zeros((1,) * 9), "9 dimensions"),
        (TensorSpec("", (1,), "float32"), torch.zeros(1), "name has 0 bytes"),
    ],
)
def test_the_writer_refuses_what_a_reader_would(spec: TensorSpec, tensor: Tensor, complaint: str) -> None:
    with pytest.raises(PayloadError, match=complaint):
        write_update([(spec, tensor)])


def test_the_writer_refuses_before_it_writes() -> None:
    file = io.BytesIO()
    with pytest.raises(PayloadError, match="names the digest of its base model"):
        write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_UPDATE,
            run_id="run-1",
            round=1,
            model_version=0,
            base_digest=b"short",
            update=INFO,
            tensors=named(SMALL),
        )
    assert file.getvalue() == b""


def test_an_interrupted_write_leaves_nothing_that_verifies(tmp_path: Path) -> None:
    path = tmp_path / "part"

    def source(first: int, count: int) -> Tensor:
        if first:
            raise KeyboardInterrupt
        return torch.zeros(count)

    with path.open("wb") as file, pytest.raises(KeyboardInterrupt):
        write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id="",
            round=0,
            model_version=0,
            base_digest=b"",
            update=None,
            tensors=[(TensorSpec("w", (2**20,), "float32"), source)],
        )
    with pytest.raises(PayloadError, match="not a payload"):
        PayloadReader(path)


# --- the manifest's limits, one by one

Change = Callable[[payload_pb2.Manifest], object]


def change_bodies(segment_bytes: int, coordinates: int) -> Change:
    def change(manifest: payload_pb2.Manifest) -> None:
        manifest.tensors[0].bodies[0].encoded_bytes = segment_bytes
        manifest.tensors[0].bodies[0].num_coordinates = coordinates

    return change


def change_specs(change: Callable[[Any], object]) -> Change:
    """Changes the packed specs, given as a list."""

    def apply(manifest: payload_pb2.Manifest) -> None:
        specs = payload_pb2.TensorSpecs.FromString(zlib.decompress(manifest.packed_specs))
        change(specs.specs)
        manifest.packed_specs = pack_specs(specs)

    return apply


def change_segment(manifest: payload_pb2.Manifest, segment: payload_pb2.Segment, num_bytes: int) -> None:
    """Another length, and the manifest's sum with it."""
    manifest.encoded_bytes += num_bytes - segment.encoded_bytes
    segment.encoded_bytes, segment.digest = num_bytes, bytes(32)


def unbundle(manifest: payload_pb2.Manifest) -> None:
    for tensor in manifest.tensors:
        tensor.is_bundled = False


def say_specs_twice(manifest: payload_pb2.Manifest) -> None:
    manifest.specs.MergeFromString(zlib.decompress(manifest.packed_specs))


def spoil_a_name(manifest: payload_pb2.Manifest) -> None:
    """Bytes that are no UTF-8, which only protobuf looks for."""
    data = zlib.decompress(manifest.packed_specs)
    manifest.packed_specs = zlib.compress(data.replace(b"layer.1", b"layer.\xff"))


def claim_terabytes(manifest: payload_pb2.Manifest) -> None:
    """2^38 doubles in one tensor, in bodies of one byte each: 2 TiB in 12 MiB."""
    del manifest.tensors[:]
    body = payload_pb2.Segment(encoded_bytes=1, num_coordinates=2**20, digest=bytes(32))
    spec = common_pb2.TensorSpec(name="w", shape=[2**38], dtype=common_pb2.DTYPE_FLOAT64, role=1)
    manifest.packed_specs = pack_specs(payload_pb2.TensorSpecs(specs=[spec]))
    manifest.tensors.append(payload_pb2.TensorEntry(bodies=[body] * 2**18))
    manifest.ClearField("bundle")
    manifest.raw_bytes, manifest.encoded_bytes = 2**41, 2**18


REFUSALS: dict[str, Change] = {
    "unknown kind 0": lambda m: m.ClearField("kind"),
    "unknown kind 7": lambda m: setattr(m, "kind", 7),
    "field 2 of the manifest has 101 bytes": lambda m: setattr(m, "run_id", "r" * 101),
    "belongs to a run and a round from 1 on; here 'run-1', 0": lambda m: setattr(m, "round", 0),
    "belongs to a run and a round from 1 on; here ''": lambda m: setattr(m, "run_id", ""),
    "model version -1": lambda m: setattr(m, "model_version", -1),
    "names the digest of its base model": lambda m: setattr(m, "base_digest", b"x" * 31),
    "field 5 of the manifest has 33 bytes": lambda m: setattr(m, "base_digest", b"x" * 33),
    "says what work is behind it": lambda m: m.ClearField("update"),
    "a model names none": lambda m: (setattr(m, "kind", 1), m.ClearField("update")),
    "num_examples = 0": lambda m: setattr(m.update, "num_examples", 0),
    "num_examples = -5": lambda m: setattr(m.update, "num_examples", -5),
    "num_examples = 9223372036854775807": lambda m: setattr(m.update, "num_examples", 2**63 - 1),
    "custom_weight = -1": lambda m: setattr(m.update, "custom_weight", -1),
    "num_steps = -1": lambda m: setattr(m.update, "num_steps", -1),
    "training_seconds = nan": lambda m: setattr(m.update, "training_seconds", math.nan),
    "training_seconds = -1.0": lambda m: setattr(m.update, "training_seconds", -1),
    "names its assignment": lambda m: setattr(m.update, "assignment_id", ""),
    "at most 64 metrics, each name once": lambda m: m.update.metrics.add(name="loss"),
    "at most 64 metrics": lambda m: [m.update.metrics.add(name=f"m{index}") for index in range(63)],
    "holds a metric 'Loss!'": lambda m: m.update.metrics.add(name="Loss!"),
    "error = nan": lambda m: setattr(m.update, "error", math.nan),
    "error = -0.5": lambda m: setattr(m.update, "error", -0.5),
    "gain = inf": lambda m: setattr(m.update, "gain", math.inf),
    "holds 4 specs and 5 tensors": change_specs(lambda specs: specs.pop()),
    "holds 0 specs and 5 tensors": lambda m: m.ClearField("packed_specs"),
    "holds its specs twice": say_specs_twice,
    "the specs cannot be unpacked": lambda m: setattr(m, "packed_specs", b"not zlib's"),
    "the specs unpack to more than 16777216 bytes, or not wholly": lambda m: setattr(
        m, "packed_specs", m.packed_specs[:-1]
    ),
    "the specs unpack to more than": lambda m: setattr(m, "packed_specs", m.packed_specs + b"x"),
    "the specs unpack to more": lambda m: setattr(m, "packed_specs", zlib.compress(bytes(2**24 + 1))),
    "the specs cannot be parsed": spoil_a_name,
    "field 7 of the manifest has 16777217 bytes": lambda m: setattr(m, "packed_specs", bytes(2**24 + 1)),
    "'layer.0' is listed twice": change_specs(lambda specs: setattr(specs[1], "name", "layer.0")),
    "names codec number 1; the manifest lists 1": lambda m: setattr(m.tensors[0], "codec", 1),
    "names codec number 0; the manifest lists 0": lambda m: m.ClearField("codecs"),
    "names the codec ''": lambda m: m.codecs.__setitem__(0, ""),
    "names the codec '../x'": lambda m: m.codecs.__setitem__(0, "../x"),
    "field 8 of the manifest has 33 bytes": lambda m: m.codecs.__setitem__(0, "c" * 33),
    "field 8 more than 64 times": lambda m: m.codecs.extend(["x"] * 64),
    "field 1 of the manifest has 513 bytes": change_specs(lambda specs: setattr(specs[0], "name", "n" * 513)),
    "has 9 dimensions": change_specs(lambda specs: specs[0].shape.extend([1] * 7)),
    "hold 1500 coordinates; its shape": change_specs(lambda specs: specs[0].shape.append(2)),
    "hold 0 coordinates; its shape": lambda m: m.tensors[0].ClearField("bodies"),
    "hold 3000 coordinates": lambda m: m.tensors[0].bodies.append(m.tensors[0].bodies[0]),
    "has 0 bytes; expected 1 to 1048576": change_bodies(0, 1500),
    "has 1048577 bytes; expected 1 to 1048576": change_bodies(2**20 + 1, 1500),
    "claims 0 coordinates": change_bodies(60, 0),
    "claims 1048577 coordinates": change_bodies(60, 2**20 + 1),
    "digest of 31 bytes": lambda m: setattr(m.tensors[0].bodies[0], "digest", bytes(31)),
    "has 16777217 bytes; expected 1 to 16777216": lambda m: m.tensors[0].head.MergeFrom(
        payload_pb2.Segment(encoded_bytes=2**24 + 1, digest=bytes(32))
    ),
    "field 2 of the manifest has 44 bytes": lambda m: m.tensors[0].head.MergeFrom(
        payload_pb2.Segment(encoded_bytes=1, num_coordinates=1, digest=bytes(32))
    ),
    "has a bundle exactly where a tensor is bundled": unbundle,
    "a bundle exactly where": lambda m: m.ClearField("bundle"),
    "'layer.2' of shape (0, 4) cannot be bundled": lambda m: setattr(m.tensors[2], "is_bundled", True),
    "'layer.0' of shape (30, 50) cannot be bundled, or has segments too": lambda m: setattr(
        m.tensors[0], "is_bundled", True
    ),
    "of shape (7, 1048576) cannot be bundled": change_specs(lambda specs: specs[3].shape.append(2**20)),
    "a segment of the bundle has 1048577 bytes": lambda m: change_segment(m, m.bundle, 2**20 + 1),
    "a segment of the bundle has a digest of 3 bytes": lambda m: setattr(m.bundle, "digest", b"abc"),
    "field 10 of the manifest has 44 bytes": lambda m: setattr(m.bundle, "num_coordinates", 3),
    "digest of the raw model, and nothing else does": lambda m: setattr(m, "result_digest", bytes(32)),
    "field 14 of the manifest has 33 bytes": lambda m: setattr(m, "result_digest", bytes(33)),
    "a partial aggregate says how many updates it stands for, and nothing else": lambda m: m.partial.MergeFrom(
        payload_pb2.PartialInfo(num_updates=1, total_weight=1)
    ),
    "says 2 updates of total weight 1": lambda m: m.partial.MergeFrom(
        payload_pb2.PartialInfo(num_updates=2, total_weight=1)
    ),
    "float64 has none beyond 1074": lambda m: m.partial.MergeFrom(payload_pb2.PartialInfo(exponents=[1075])),
    "come in the raw codec only": lambda m: (
        setattr(m, "kind", 4),
        m.ClearField("update"),
        m.codecs.__setitem__(0, "uniform"),
        m.partial.MergeFrom(payload_pb2.PartialInfo(exponents=[0] * len(m.tensors))),
    ),
    "a variate or a model names none": lambda m: (setattr(m, "kind", 5), m.ClearField("update")),
    "a model, a delta or a variate belongs to no round": lambda m: (
        setattr(m, "kind", 5),
        m.ClearField("update"),
        m.ClearField("base_digest"),
    ),
    "says work = -1.0": lambda m: setattr(m.update, "work", -1),
    "claims 1 raw and": lambda m: setattr(m, "raw_bytes", 1),
    "and 1 encoded bytes": lambda m: setattr(m, "encoded_bytes", 1),
    "at most 274877906944 elements": change_specs(lambda specs: specs[0].shape.extend([2**40])),
    "decodes to 2199023255552 bytes; at most 1099511627776": claim_terabytes,
}


@pytest.mark.parametrize("complaint", REFUSALS)
def test_a_manifest_that_breaks_a_rule_is_refused_by_name(complaint: str) -> None:
    message, segments = split(write_update(named(SMALL))[1])
    REFUSALS[complaint](message)
    with pytest.raises(PayloadError, match=re.escape(complaint)):
        parse(seal(message.SerializeToString(), segments))


ALLOWED: dict[str, Change] = {
    "the longest run id": lambda m: setattr(m, "run_id", "r" * limits.MAX_ID_BYTES),
    "the most examples": lambda m: setattr(m.update, "num_examples", limits.MAX_COUNT),
    "the most metrics": lambda m: [m.update.metrics.add(name=f"m{index}") for index in range(62)],
    "the longest codec name": lambda m: m.codecs.__setitem__(0, "c" * limits.MAX_CODEC_BYTES),
    "the most codecs": lambda m: m.codecs.extend(["x"] * (limits.MAX_CODECS - 1)),
    "the longest tensor name": change_specs(lambda specs: setattr(specs[0], "name", "n" * limits.MAX_NAME_BYTES)),
    "the most dimensions": change_specs(lambda specs: specs[0].shape.extend([1] * 6)),
    "the longest head": lambda m: (
        m.tensors[0].head.MergeFrom(payload_pb2.Segment(encoded_bytes=2**24, digest=bytes(32))),
        setattr(m, "encoded_bytes", m.encoded_bytes + 2**24),
    ),
    "the longest body": lambda m: change_segment(m, m.tensors[0].bodies[0], 2**20),
    "the longest bundle": lambda m: change_segment(m, m.bundle, 2**20),
    "no loss said": lambda m: (m.update.ClearField("error"), m.update.ClearField("gain")),
}


@pytest.mark.parametrize("limit", ALLOWED)
def test_a_manifest_exactly_at_a_limit_is_taken(limit: str) -> None:
    message, segments = split(write_update(named(SMALL))[1])
    ALLOWED[limit](message)
    parse(seal(message.SerializeToString(), segments))


def test_as_many_tensors_as_allowed_and_no_more() -> None:
    message, _ = split(write_model([])[1])
    message.codecs.append("raw")
    for index in range(limits.MAX_TENSORS):
        message.specs.specs.add(name=str(index), shape=[0], dtype=1, role=1)
        message.tensors.add()
    assert len(parse(seal(message.SerializeToString())).tensors) == limits.MAX_TENSORS
    message.specs.specs.add(name="one more", shape=[0], dtype=1, role=1)
    message.tensors.add()
    with pytest.raises(PayloadError, match=r"field [19] more than 65536 times"):
        parse(seal(message.SerializeToString()))


@pytest.mark.parametrize(
    "field",
    [b"\x80\x01\x01", b"\x78\x01", b"\x50\x01", b"\x08\x01", b"\x0a\x00", b"\x3d\0\0\0\0", b"\x0b", b"\x00\x00"],
)
def test_a_field_that_is_unknown_doubled_or_of_another_type_is_refused(field: bytes) -> None:
    message, segments = split(write_update(named(SMALL))[1])
    with pytest.raises(PayloadError):
        parse(seal(message.SerializeToString() + field, segments))


@pytest.mark.parametrize("length", [0, limits.MAX_MANIFEST_BYTES + 1, 2**32 - 1])
def test_a_manifest_of_an_absurd_length_is_refused_by_its_preamble(length: int) -> None:
    with pytest.raises(PayloadError, match=f"a manifest of {length} bytes"):
        parse_preamble(struct.pack("<8s32sI", b"FEDSTRM1", bytes(32), length))


BLOATED = {
    "tensors": "b'\\x4a\\x00' * (N // 2)",
    "bodies": "b'\\x4a' + varint(N) + b'\\x1a\\x00' * (N // 2)",
    "metrics": "b'\\x6a' + varint(N) + b'\\x3a\\x00' * (N // 2)",
    "codecs": "b'\\x42\\x00' * (N // 2)",
    "specs": "b'\\x32' + varint(N // 4) + b'\\x0a\\x00' * (N // 8)",
    "shape": "b'\\x32' + varint(N // 4 + 10) + b'\\x0a' + varint(N // 4 + 5) + b'\\x12' + varint(N // 4) + bytes(N // 4)",
    "packed specs": "packed(b'\\x0a\\x00' * 2**9, N >> 12)",
    "packed shape": "packed(bytes(2**10), N >> 12, b'\\x0a' + varint(N // 4 + 5) + b'\\x12' + varint(N // 4))",
    "a bomb": "packed(bytes(2**20), 600)",
    "unknown": "b'\\x78\\x01' * (N // 2)",
    "doubled": "b'\\x08\\x01' * (N // 2)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by RLIMIT_AS")
@pytest.mark.parametrize("what", BLOATED)
def test_a_manifest_that_would_swell_in_memory_is_refused_while_it_is_small(what: str) -> None:
    """64 MiB of the smallest fields there are would be gigabytes of protobuf messages, and less than one of zlib's 600; 400 MB
    must do."""
    code = f"""
import resource, zlib
from fed_core.errors import PayloadError
from fed_core.payload.manifest import pack_preamble, parse_manifest, parse_preamble
from fed_core.payload.wire import write_varint as varint
N = 60 * 2**20
def packed(piece, times, start=b''):
    packer = zlib.compressobj(1)
    specs = packer.compress(start) + b''.join(packer.compress(piece) for _ in range(times)) + packer.flush()
    return b'\\x3a' + varint(len(specs)) + specs
pages = int(open('/proc/self/statm').read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 400 * 2**20,) * 2)
data = {BLOATED[what]}
try:
    parse_manifest(parse_preamble(pack_preamble(data)), data)
except PayloadError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search("field|unpack to more than", done.stdout), done.stdout


# --- mutated bytes


def mutate(data: bytes, choices: st.DataObject) -> bytes:
    mutated = bytearray(data)
    for _ in range(choices.draw(st.integers(1, 3))):
        at = choices.draw(st.integers(0, len(mutated) - 1)) if mutated else 0
        match choices.draw(st.sampled_from(["flip", "cut", "drop", "insert", "garbage"])):
            case "flip" if mutated:
                mutated[at] ^= 1 << choices.draw(st.integers(0, 7))
            case "cut":
                del mutated[at:]
            case "drop":
                del mutated[at : at + choices.draw(st.integers(1, 50))]
            case "insert":
                mutated[at:at] = choices.draw(st.binary(min_size=1, max_size=50))
            case _:
                mutated[at : at + 8] = choices.draw(st.binary(min_size=8, max_size=8))
    return bytes(mutated)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_change_to_the_file_is_noticed(choices: st.DataObject) -> None:
    written, data = write_update(named(SMALL))
    mutated = mutate(data, choices)
    verifier = SegmentVerifier(written.digest)
    if mutated == data:
        return
    with pytest.raises((PayloadError, CorruptError)):
        feed_all(verifier, mutated)
    assert data[: verifier.verified_offset] == mutated[: verifier.verified_offset]


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_a_mutated_manifest_with_a_right_digest_is_refused_or_means_what_it_says(choices: st.DataObject) -> None:
    message, segments = split(write_update(named(SMALL))[1])
    manifest = mutate(message.SerializeToString(), choices)
    try:
        parsed = parse(seal(manifest, segments))
    except PayloadError:
        return
    assert sum(span.length for span in parsed.segments) == parsed.encoded_bytes
    assert sum(spec.num_bytes for spec in parsed.specs) == parsed.raw_bytes
    assert len({spec.name for spec in parsed.specs}) == len(parsed.specs)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_reader_of_a_hostile_file_raises_our_errors_only(
    tmp_path_factory: pytest.TempPathFactory, choices: st.DataObject
) -> None:
    message, segments = split(write_update(named(SMALL))[1])
    path = tmp_path_factory.getbasetemp() / "hostile"
    manifest = message.SerializeToString()
    if choices.draw(st.booleans()):
        path.write_bytes(seal(mutate(manifest, choices), segments))
    else:
        path.write_bytes(mutate(seal(manifest, segments), choices))
    verify = choices.draw(st.booleans())
    try:
        with PayloadReader(path) as reader:
            assert [tuple(tensor.shape) for tensor in reader.tensors(verify=verify).values()] == [
                spec.shape for spec in reader.manifest.specs
            ]
    except (PayloadError, CorruptError):
        pass


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_refused(garbage: bytes, has_magic: bool) -> None:
    verifier = SegmentVerifier(bytes(32))
    with pytest.raises((PayloadError, CorruptError)):
        feed_all(verifier, limits.MAGIC + garbage if has_magic else garbage)
    assert verifier.verified_offset == 0


# --- the verifier


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 300), min_size=1).filter(any))
def test_chunks_of_any_size_verify_alike(sizes: list[int]) -> None:
    written, data = write_update(named(SMALL))
    seen: list[tuple[SegmentSpan, bytes]] = []
    verifier = SegmentVerifier(written.digest, on_segment=lambda span, view: seen.append((span, bytes(view))))
    manifest = feed_all(verifier, data, sizes)
    assert [span for span, _ in seen] == list(manifest.segments)
    assert all(data[span.offset : span.end] == view for span, view in seen)


def test_a_segment_within_one_chunk_is_passed_without_copying() -> None:
    written, data = write_update(named(SMALL))
    owners: list[object] = []
    verifier = SegmentVerifier(written.digest, on_segment=lambda _, view: owners.append(view.obj))
    verifier.feed(data)
    assert owners
    assert all(owner is data for owner in owners)


def test_a_bad_segment_is_named_and_all_before_it_is_kept() -> None:
    written, data = write_update(named([torch.zeros(600_000), torch.ones(4)]))
    manifest = parse(data)
    bad = manifest.segments[1]
    rotten = bytearray(data)
    rotten[bad.end - 1] ^= 1
    verifier = SegmentVerifier(written.digest)
    with pytest.raises(CorruptError, match=r"'layer\.0'") as caught:
        feed_all(verifier, rotten)
    assert caught.value.offset == bad.offset == verifier.verified_offset
    with pytest.raises(PayloadError, match="already failed"):
        verifier.feed(b"more")
    resumed = SegmentVerifier(written.digest, verified=(bad.offset, verifier.manifest))
    resumed.feed(data[bad.offset :])
    assert resumed.finish() == manifest


@pytest.mark.parametrize("cut", ["start", "preamble", "manifest", "first segment", "middle", "whole"])
def test_a_verification_goes_on_after_a_restart(cut: str, tmp_path: Path) -> None:
    written, data = write_update(named([random_tensor((600_000,), "float32"), random_tensor((3,), "int8")]))
    manifest = parse(data)
    first, second = manifest.segments[0], manifest.segments[1]
    length, expected = {
        "start": (0, 0),
        "preamble": (20, 0),
        "manifest": (manifest.first_segment - 1, 0),
        "first segment": (first.end - 1, manifest.first_segment),
        "middle": (second.end + 5, second.end),
        "whole": (len(data), len(data)),
    }[cut]
    path = tmp_path / "upload.part"
    path.write_bytes(data[:length])
    offset, found = verify_prefix(path, written.digest)
    assert (offset, found) == (expected, manifest if expected else None)
    verifier = SegmentVerifier(written.digest, verified=(offset, found))
    verifier.feed(data[offset:])
    assert verifier.finish() == manifest


def test_a_prefix_of_another_payload_counts_for_nothing(small: tuple[Path, bytes]) -> None:
    assert verify_prefix(small[0], bytes(32)) == (0, None)
    with pytest.raises(CorruptError, match="another payload"):
        SegmentVerifier(bytes(32), verified=verify_prefix(*small))


def test_bytes_beyond_the_end_are_refused(small: tuple[Path, bytes]) -> None:
    path, digest = small
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(PayloadError, match=f"follow the end of the payload at {size}"):
        verify_file(path, digest)
    assert verify_prefix(path, digest)[0] == size


def test_a_file_that_ends_early_is_not_whole(small: tuple[Path, bytes]) -> None:
    path, digest = small
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptError, match="not whole"):
        verify_file(path, digest)


def test_a_payload_over_the_allowed_total_is_refused_before_its_segments() -> None:
    written, data = write_update(named(SMALL))
    SegmentVerifier(written.digest, len(data)).feed(data)
    verifier = SegmentVerifier(written.digest, len(data) - 1)
    with pytest.raises(PayloadError, match=f"has {len(data)} bytes; at most {len(data) - 1}"):
        verifier.feed(data[: parse(data).first_segment])
    with pytest.raises(PayloadError, match="at most 50"):
        SegmentVerifier(written.digest, 50).feed(data[:PREAMBLE_BYTES])


def test_the_manifest_is_shown_before_any_segment_is_taken() -> None:
    written, data = write_update(named(SMALL))

    def refuse(manifest: Manifest) -> None:
        raise PayloadError(f"not the {len(manifest.tensors)} tensors that were asked for")

    segments: list[SegmentSpan] = []
    verifier = SegmentVerifier(written.digest, on_manifest=refuse, on_segment=lambda span, _: segments.append(span))
    with pytest.raises(PayloadError, match="not the 5 tensors"):
        verifier.feed(data)
    assert (verifier.manifest, verifier.verified_offset, segments) == (None, 0, [])


def test_a_segment_that_is_refused_is_not_verified() -> None:
    written, data = write_update(named(SMALL))

    def refuse(span: SegmentSpan, view: memoryview) -> None:
        if not span.is_bundle:
            raise PayloadError("no")

    verifier = SegmentVerifier(written.digest, on_segment=refuse)
    with pytest.raises(PayloadError, match="no"):
        verifier.feed(data)
    assert verifier.verified_offset == parse(data).segments[0].end


# --- the reader


def test_tiles_come_in_order_and_reuse_their_memory(tmp_path: Path) -> None:
    tensor = random_tensor((600_001,), "float32")
    path = tmp_path / "model"
    path.write_bytes(write_model(named([tensor]))[1])
    with PayloadReader(path) as reader:
        tiles = [(first, tile.clone(), tile.data_ptr()) for first, tile in reader.iter_tiles("layer.0", verify=True)]
    assert [first for first, _, _ in tiles] == [0, 2**18, 2**19]
    assert len({address for _, _, address in tiles}) == 1
    assert same_bits(torch.cat([tile for _, tile, _ in tiles]), tensor)


@pytest.mark.parametrize(("name", "where"), [("layer.0", "tensor 'layer.0'"), ("layer.4", "the bundle")])
def test_rot_is_seen_by_a_reader_that_verifies(small: tuple[Path, bytes], name: str, where: str) -> None:
    path, digest = small
    data = bytearray(path.read_bytes())
    manifest = parse(bytes(data))
    rotten = manifest.segments[0 if where == "the bundle" else 1]
    data[rotten.end - 1] ^= 0x40
    path.write_bytes(data)
    with PayloadReader(path, digest) as reader:
        reader.tensor(name)
        with pytest.raises(CorruptError, match=f"a segment of {where} in small.update has rotted") as caught:
            reader.tensor(name, verify=True)
        assert caught.value.offset == rotten.offset


def test_a_segment_is_read_into_the_callers_memory(small: tuple[Path, bytes]) -> None:
    buffer = bytearray(10_000)
    with PayloadReader(small[0]) as reader:
        view = reader.read_segment(reader.entry("layer.0").bodies[0], buffer)
        assert view.obj is buffer
        assert bytes(view) == memory_of(SMALL[0])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_not_opened(small: tuple[Path, bytes], change: int) -> None:
    os.truncate(small[0], small[0].stat().st_size + change)
    with pytest.raises(CorruptError, match="its manifest says"):
        PayloadReader(small[0])


def test_another_payload_than_the_expected_is_not_opened(small: tuple[Path, bytes]) -> None:
    with pytest.raises(CorruptError, match="expected 0000"):
        PayloadReader(small[0], bytes(32))


def hostile_file(path: Path, change: Callable[[payload_pb2.Manifest], object], segments: bytes | None = None) -> Path:
    message, good = split(write_update(named(SMALL))[1])
    change(message)
    path.write_bytes(seal(message.SerializeToString(), good if segments is None else segments))
    return path


def test_an_unknown_codec_is_refused_when_a_file_is_opened(tmp_path: Path) -> None:
    path = hostile_file(tmp_path / "x", lambda m: m.codecs.__setitem__(0, "zip"))
    with pytest.raises(PayloadError, match=r"unknown codec 'zip'; this version knows .*raw"):
        PayloadReader(path)


def test_bodies_that_cannot_hold_what_they_claim_are_refused_before_memory_is_set_aside(tmp_path: Path) -> None:
    """64 GiB of float32 in one byte a body: the limits of the format allow the claim, the codec does not."""

    def claim(manifest: payload_pb2.Manifest) -> None:
        del manifest.tensors[:]
        manifest.ClearField("bundle")
        spec = common_pb2.TensorSpec(name="w", shape=[2**34], dtype=common_pb2.DTYPE_FLOAT32, role=1)
        manifest.packed_specs = pack_specs(payload_pb2.TensorSpecs(specs=[spec]))
        manifest.tensors.add(
            bodies=[payload_pb2.Segment(encoded_bytes=1, num_coordinates=2**20, digest=blake3(b"x").digest())] * 2**14,
        )
        manifest.raw_bytes, manifest.encoded_bytes = 2**36, 2**14

    path = hostile_file(tmp_path / "bomb", claim, b"x" * 2**14)
    with pytest.raises(PayloadError, match="raw body of 1048576 coordinates has 1 bytes; expected 4194304 to 4194304"):
        PayloadReader(path)


def test_a_head_where_the_codec_has_none_is_refused(tmp_path: Path) -> None:
    def add_head(manifest: payload_pb2.Manifest) -> None:
        manifest.tensors[0].head.MergeFrom(payload_pb2.Segment(encoded_bytes=1, digest=bytes(32)))
        manifest.encoded_bytes += 1

    _, segments = split(write_update(named(SMALL))[1])
    with pytest.raises(PayloadError, match="'raw' has no head"):
        PayloadReader(hostile_file(tmp_path / "x", add_head, b"h" + segments))


def test_a_tensor_that_is_not_there_is_named(small: tuple[Path, bytes]) -> None:
    with PayloadReader(small[0]) as reader, pytest.raises(NotFoundError, match=r"no tensor 'nope' in small\.update"):
        reader.tensor("nope")


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_a_refused_file_is_closed_again(tmp_path: Path) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(b"garbage")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(PayloadError):
            PayloadReader(path)
    assert len(os.listdir("/proc/self/fd")) == before
