"""The table of contents of a payload file, and the only code that reads one from bytes.

    8 bytes "FEDSTRM1" | 32 bytes BLAKE3 of the manifest | 4 bytes its length, little-endian | manifest | segments, no gaps

The digest of the manifest is the digest of the payload: it lists the digest of every segment. Nothing here needs torch, so the
daemon and the transfer service can check a file without it.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Final, NamedTuple

from blake3 import blake3
from google.protobuf.message import DecodeError

from fed_core.errors import CorruptError, PayloadError
from fed_core.payload import limits
from fed_core.payload.wire import BYTES, read_fields, read_varint, write_varint
from fed_core.specs import TensorSpec, from_proto
from fedstream.v1 import common_pb2, payload_pb2

_PREAMBLE: Final = struct.Struct(f"<{len(limits.MAGIC)}s{limits.DIGEST_BYTES}sI")
RAW: Final = "raw"
_KINDS: Final = {
    common_pb2.PAYLOAD_KIND_MODEL,
    common_pb2.PAYLOAD_KIND_UPDATE,
    common_pb2.PAYLOAD_KIND_DELTA,
    common_pb2.PAYLOAD_KIND_PARTIAL,
    common_pb2.PAYLOAD_KIND_VARIATE,
}
_CODEC_NAME: Final = re.compile(rf"[a-z0-9_.-]{{1,{limits.MAX_CODEC_BYTES}}}")
_METRIC_NAME: Final = re.compile(rf"[a-z0-9_.]{{1,{limits.MAX_METRIC_NAME_BYTES}}}")


class SegmentSpan(NamedTuple):
    """Where one segment lies in the file and what it must hash to. `num_coordinates` is 0 for a head and for the bundle, and
    `tensor_index` is -1 for the bundle."""

    offset: int
    length: int
    digest: bytes
    tensor_index: int
    first_coordinate: int
    num_coordinates: int

    @property
    def is_bundle(self) -> bool:
        """Whether it holds the tensors that are too small for segments of their own."""
        return self.tensor_index < 0

    @property
    def is_head(self) -> bool:
        """Whether it holds what a tensor's bodies share, instead of coordinates."""
        return self.num_coordinates == 0 and not self.is_bundle

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a payload: what it is, its codec's name, and its segments; none where it lies in the bundle."""

    spec: TensorSpec
    codec: str
    head: SegmentSpan | None
    bodies: tuple[SegmentSpan, ...]
    is_bundled: bool = False


class BundledTensor(NamedTuple):
    """One tensor out of the bundle: the bytes of its head (empty where its codec has none) and of its one body."""

    tensor_index: int
    head: memoryview
    body: memoryview


@dataclass(frozen=True, slots=True)
class UpdateInfo:
    """What a client says of the work behind an update; the fields are those of the wire's UpdateInfo."""

    assignment_id: str
    num_examples: int
    custom_weight: int = 0
    num_steps: int = 0
    is_partial: bool = False
    training_seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    gain: float = 1.0
    normalizer: float = 0.0
    work: float = 0.0

    def to_proto(self) -> payload_pb2.UpdateInfo:
        """The message that travels."""
        return payload_pb2.UpdateInfo(
            assignment_id=self.assignment_id,
            num_examples=self.num_examples,
            custom_weight=self.custom_weight,
            num_steps=self.num_steps,
            is_partial=self.is_partial,
            training_seconds=self.training_seconds,
            metrics=[common_pb2.Metric(name=name, value=value) for name, value in self.metrics.items()],
            error=self.error,
            gain=self.gain,
            normalizer=self.normalizer,
            work=self.work,
        )


@dataclass(frozen=True, slots=True)
class PartialInfo:
    """What a partial aggregate stands for; the fields are those of the wire's PartialInfo."""

    num_updates: int
    total_weight: int
    exponents: tuple[int, ...]

    def to_proto(self) -> payload_pb2.PartialInfo:
        """The message that travels."""
        return payload_pb2.PartialInfo(
            num_updates=self.num_updates, total_weight=self.total_weight, exponents=self.exponents
        )


@dataclass(frozen=True)
class Manifest:
    """A payload's table of contents, checked against every limit. `digest` identifies the payload."""

    kind: common_pb2.PayloadKind.ValueType
    run_id: str
    round: int
    model_version: int
    base_digest: bytes
    tensors: tuple[TensorEntry, ...]
    bundle: SegmentSpan | None
    raw_bytes: int
    encoded_bytes: int
    update: UpdateInfo | None
    result_digest: bytes
    digest: bytes
    manifest_bytes: int
    partial: PartialInfo | None = None

    @property
    def first_segment(self) -> int:
        """Offset at which the segments begin."""
        return limits.PREAMBLE_BYTES + self.manifest_bytes

    @property
    def total_bytes(self) -> int:
        """Length of the whole file."""
        return self.first_segment + self.encoded_bytes

    @cached_property
    def segments(self) -> tuple[SegmentSpan, ...]:
        """Every segment in the order of the file."""
        spans = [self.bundle] if self.bundle is not None else []
        for entry in self.tensors:
            spans += (entry.head, *entry.bodies) if entry.head is not None else entry.bodies
        return tuple(spans)

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors' specs in order."""
        return tuple(entry.spec for entry in self.tensors)

    def name_of(self, span: SegmentSpan) -> str:
        """What a segment belongs to, for messages."""
        return "the bundle" if span.is_bundle else f"tensor {self.tensors[span.tensor_index].spec.name!r}"

    @property
    def codecs(self) -> dict[str, int]:
        """How many tensors there are by codec."""
        counts: dict[str, int] = {}
        for entry in self.tensors:
            counts[entry.codec] = counts.get(entry.codec, 0) + 1
        return counts

    @property
    def model_digest(self) -> bytes:
        """Identity of the model that a model or a delta leads to: the digest of that model's payload in the raw codec."""
        return self.result_digest or self.digest


class Preamble(NamedTuple):
    """The first 44 bytes of a payload: the manifest's digest, which is the payload's, and its length."""

    digest: bytes
    manifest_bytes: int


def parse_preamble(data: bytes | bytearray | memoryview) -> Preamble:
    """Reads the first `PREAMBLE_BYTES` bytes. Raises PayloadError where they do not begin a payload or the manifest is too long."""
    if len(data) < limits.PREAMBLE_BYTES:
        raise PayloadError(f"a payload begins with {limits.PREAMBLE_BYTES} bytes of preamble; here are {len(data)}")
    magic, digest, manifest_bytes = _PREAMBLE.unpack_from(data)
    if magic != limits.MAGIC:
        raise PayloadError(f"not a payload: it begins with {magic!r}, expected {limits.MAGIC!r}")
    if not 1 <= manifest_bytes <= limits.MAX_MANIFEST_BYTES:
        raise PayloadError(f"a manifest of {manifest_bytes} bytes; expected 1 to {limits.MAX_MANIFEST_BYTES}")
    return Preamble(digest, manifest_bytes)


def pack_preamble(manifest: bytes) -> bytes:
    """The 44 bytes that stand before a manifest."""
    return _PREAMBLE.pack(limits.MAGIC, blake3(manifest).digest(), len(manifest))


def parse_manifest(preamble: Preamble, data: bytes | bytearray | memoryview) -> Manifest:
    """The manifest in `data`, exactly the bytes that the preamble announced.

    Every limit, sum and name is checked first; memory is bounded by the limits, whatever the bytes say. Raises CorruptError
    where the digest differs and PayloadError, naming what is wrong, where an intact manifest breaks a rule.
    """
    data = bytes(data)
    if len(data) != preamble.manifest_bytes or blake3(data).digest() != preamble.digest:
        raise CorruptError(
            "the manifest does not match its digest; send the payload again from its beginning", offset=0
        )
    _check_structure(data)
    try:
        message = payload_pb2.Manifest.FromString(data)
    except DecodeError as error:
        raise PayloadError(f"the manifest cannot be parsed: {error}") from error
    tensors, bundle = _read_tensors(message, _read_specs(message), limits.PREAMBLE_BYTES + len(data))
    manifest = Manifest(
        kind=message.kind,
        run_id=message.run_id,
        round=message.round,
        model_version=message.model_version,
        base_digest=message.base_digest,
        tensors=tensors,
        bundle=bundle,
        raw_bytes=message.raw_bytes,
        encoded_bytes=message.encoded_bytes,
        update=_read_update(message.update) if message.HasField("update") else None,
        result_digest=message.result_digest,
        digest=preamble.digest,
        manifest_bytes=len(data),
        partial=_read_partial(message.partial) if message.HasField("partial") else None,
    )
    _check_header(manifest)
    _check_sums(manifest)
    return manifest


def pack_specs(specs: payload_pb2.TensorSpecs) -> bytes:
    """The specs as every payload but a lossless model carries them."""
    return zlib.compress(specs.SerializeToString(), 9)


def pack_bundle(tensors: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The bundle of tensors given as (head or nothing, body), in the order of the manifest."""
    return b"".join(write_varint(len(head)) + write_varint(len(body)) + head + body for head, body in tensors)


def split_bundle(manifest: Manifest, data: bytes | memoryview) -> list[BundledTensor]:
    """The tensors in the bytes of a manifest's bundle. Raises PayloadError unless they are exactly the bundled ones."""
    view, at = memoryview(data), 0
    tensors: list[BundledTensor] = []
    for index, entry in enumerate(manifest.tensors):
        if not entry.is_bundled:
            continue
        head_bytes, at = read_varint(view, at, len(view))
        body_bytes, at = read_varint(view, at, len(view))
        body_at = at + head_bytes
        end = body_at + body_bytes
        if body_bytes == 0 or head_bytes + body_bytes > limits.MAX_BUNDLED_BYTES or end > len(view):
            raise PayloadError(
                f"tensor {entry.spec.name!r} claims {head_bytes} + {body_bytes} bytes of the bundle; expected a body and at most "
                f"{limits.MAX_BUNDLED_BYTES} in all"
            )
        tensors.append(BundledTensor(index, view[at:body_at], view[body_at:end]))
        at = end
    if at != len(view):
        raise PayloadError(f"{len(view) - at} bytes follow the last tensor of the bundle")
    return tensors


class _Shape(NamedTuple):
    """What a field of a manifest may look like on the wire: bytes (None for a number), how often, and what is inside."""

    max_bytes: int | None = None
    max_count: int = 1
    message: Mapping[int, _Shape] | None = None


_NUMBER: Final = _Shape()
# A segment with all three fields is 44 bytes and a head 39: any other length is refused, so neither needs a look inside.
_BODY_BYTES, _HEAD_BYTES = 44, 39
_SPEC_SHAPE: Final = {
    1: _Shape(limits.MAX_NAME_BYTES),
    2: _Shape(10 * limits.MAX_DIMENSIONS),
    3: _NUMBER,
    4: _NUMBER,
}
_SPECS_SHAPE: Final = {1: _Shape(limits.MAX_SPECS_BYTES, max_count=limits.MAX_TENSORS, message=_SPEC_SHAPE)}
_TENSOR_SHAPE: Final = {
    1: _NUMBER,
    2: _Shape(_HEAD_BYTES),
    3: _Shape(_BODY_BYTES, max_count=limits.MAX_SEGMENTS),
    4: _NUMBER,
}
_MANIFEST_SHAPE: Final = {
    1: _NUMBER,
    2: _Shape(limits.MAX_ID_BYTES),
    3: _NUMBER,
    4: _NUMBER,
    5: _Shape(limits.DIGEST_BYTES),
    6: _Shape(limits.MAX_SPECS_BYTES, message=_SPECS_SHAPE),
    7: _Shape(limits.MAX_SPECS_BYTES),
    8: _Shape(limits.MAX_CODEC_BYTES, max_count=limits.MAX_CODECS),
    9: _Shape(limits.MAX_MANIFEST_BYTES, max_count=limits.MAX_TENSORS, message=_TENSOR_SHAPE),
    10: _Shape(_HEAD_BYTES),
    11: _NUMBER,
    12: _NUMBER,
    13: _Shape(limits.MAX_UPDATE_INFO_BYTES),
    14: _Shape(limits.DIGEST_BYTES),
    15: _Shape(limits.MAX_PARTIAL_INFO_BYTES),
}


def _check_structure(data: bytes, shape_of_all: Mapping[int, _Shape] = _MANIFEST_SHAPE) -> None:
    """Bounds what protobuf may build of these bytes: unchecked, 64 MiB of two-byte submessages grow to gigabytes.

    A field that this version does not know is refused too: whoever ignored it might decode the payload wrongly.
    """
    num_fields = 0
    pending: list[tuple[int, int, Mapping[int, _Shape]]] = [(0, len(data), shape_of_all)]
    while pending:
        start, end, shapes = pending.pop()
        counts = dict.fromkeys(shapes, 0)
        for number, wire_type, at, stop, _ in read_fields(data, start, end):
            num_fields += 1
            shape = shapes.get(number)
            if shape is None:
                raise PayloadError(
                    f"the manifest holds the unknown field {number}; a newer version may have written it"
                )
            counts[number] += 1
            if counts[number] > shape.max_count or num_fields > limits.MAX_MANIFEST_FIELDS:
                raise PayloadError(
                    f"the manifest holds field {number} more than {shape.max_count} times, or too much in all"
                )
            if (shape.max_bytes is not None) != (wire_type == BYTES):
                raise PayloadError(f"field {number} of the manifest has the wrong wire type {wire_type}")
            if shape.max_bytes is not None and stop - at > shape.max_bytes:
                raise PayloadError(f"field {number} of the manifest has {stop - at} bytes; at most {shape.max_bytes}")
            if shape.message is not None:
                pending.append((at, stop, shape.message))


# Specs up to so long are remembered once they were read: a run's payloads all carry the same.
_MAX_KNOWN_SPECS_BYTES = 2**18


def _read_specs(message: payload_pb2.Manifest) -> Sequence[TensorSpec]:
    if message.packed_specs:
        if message.HasField("specs"):
            raise PayloadError("the manifest holds its specs twice")
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(message.packed_specs, limits.MAX_SPECS_BYTES)
        except zlib.error as error:
            raise PayloadError(f"the specs cannot be unpacked: {error}") from error
        if not unpacker.eof or unpacker.unused_data:
            raise PayloadError(f"the specs unpack to more than {limits.MAX_SPECS_BYTES} bytes, or not wholly")
        specs = _parse_known_specs(data) if len(data) <= _MAX_KNOWN_SPECS_BYTES else _parse_specs(data)
    else:
        specs = _checked_specs(message.specs)
    if len(specs) != len(message.tensors):
        raise PayloadError(f"the manifest holds {len(specs)} specs and {len(message.tensors)} tensors")
    return specs


def _parse_specs(data: bytes) -> tuple[TensorSpec, ...]:
    _check_structure(data, _SPECS_SHAPE)
    try:
        return _checked_specs(payload_pb2.TensorSpecs.FromString(data))
    except DecodeError as error:
        raise PayloadError(f"the specs cannot be parsed: {error}") from error


_parse_known_specs = lru_cache(maxsize=8)(_parse_specs)


def _checked_specs(specs: payload_pb2.TensorSpecs) -> tuple[TensorSpec, ...]:
    read = tuple(from_proto(spec) for spec in specs.specs)
    names: set[str] = set()
    for spec in read:
        if spec.name in names:
            raise PayloadError(f"tensor {spec.name!r} is listed twice")
        names.add(spec.name)
    return read


def _read_tensors(
    message: payload_pb2.Manifest, specs: Sequence[TensorSpec], offset: int
) -> tuple[tuple[TensorEntry, ...], SegmentSpan | None]:
    num_segments = sum(len(entry.bodies) + entry.HasField("head") for entry in message.tensors)
    if num_segments > limits.MAX_SEGMENTS:
        raise PayloadError(f"the manifest lists {num_segments} segments; at most {limits.MAX_SEGMENTS} are allowed")
    for codec in message.codecs:
        if not _CODEC_NAME.fullmatch(codec):
            raise PayloadError(f"the manifest names the codec {codec!r}; expected a short lower-case name")
    bundle = None
    if message.HasField("bundle"):
        bundle = _read_segment("the bundle", message.bundle, offset, -1, 0, limits.MAX_BUNDLE_BYTES)
        if bundle.num_coordinates != 0:
            raise PayloadError(f"the bundle claims {bundle.num_coordinates} coordinates; expected 0")
        offset = bundle.end
    if any(entry.is_bundled for entry in message.tensors) != (bundle is not None):
        raise PayloadError("a payload has a bundle exactly where a tensor is bundled")
    tensors: list[TensorEntry] = []
    for index, (spec, entry) in enumerate(zip(specs, message.tensors, strict=True)):
        if entry.codec >= len(message.codecs):
            raise PayloadError(
                f"tensor {spec.name!r} names codec number {entry.codec}; the manifest lists {len(message.codecs)}"
            )
        codec = message.codecs[entry.codec]
        if entry.is_bundled:
            if entry.HasField("head") or entry.bodies or not 1 <= spec.num_elements <= limits.MAX_BODY_COORDINATES:
                raise PayloadError(f"tensor {spec.name!r} of shape {spec.shape} cannot be bundled, or has segments too")
            tensors.append(TensorEntry(spec, codec, None, (), is_bundled=True))
            continue
        head = None
        if entry.HasField("head"):
            head = _read_segment(f"tensor {spec.name!r}", entry.head, offset, index, 0, limits.MAX_HEAD_BYTES)
            if not head.is_head:
                raise PayloadError(
                    f"the head of tensor {spec.name!r} claims {head.num_coordinates} coordinates; expected 0"
                )
            offset = head.end
        bodies: list[SegmentSpan] = []
        coordinate = 0
        for segment in entry.bodies:
            body = _read_segment(f"tensor {spec.name!r}", segment, offset, index, coordinate, limits.MAX_BODY_BYTES)
            if not 1 <= body.num_coordinates <= limits.MAX_BODY_COORDINATES:
                raise PayloadError(
                    f"a body of tensor {spec.name!r} claims {body.num_coordinates} coordinates; "
                    f"expected 1 to {limits.MAX_BODY_COORDINATES}"
                )
            bodies.append(body)
            offset, coordinate = body.end, coordinate + body.num_coordinates
        if coordinate != spec.num_elements:
            raise PayloadError(
                f"the bodies of tensor {spec.name!r} hold {coordinate} coordinates; its shape {spec.shape} has "
                f"{spec.num_elements}"
            )
        tensors.append(TensorEntry(spec, codec, head, tuple(bodies)))
    return tuple(tensors), bundle


def _read_segment(
    what: str, segment: payload_pb2.Segment, offset: int, index: int, coordinate: int, max_bytes: int
) -> SegmentSpan:
    if not 1 <= segment.encoded_bytes <= max_bytes:
        raise PayloadError(f"a segment of {what} has {segment.encoded_bytes} bytes; expected 1 to {max_bytes}")
    if len(segment.digest) != limits.DIGEST_BYTES:
        raise PayloadError(f"a segment of {what} has a digest of {len(segment.digest)} bytes; expected 32")
    return SegmentSpan(offset, segment.encoded_bytes, segment.digest, index, coordinate, segment.num_coordinates)


def _read_update(message: payload_pb2.UpdateInfo) -> UpdateInfo:
    for name, value, least in (
        ("num_examples", message.num_examples, 1),
        ("custom_weight", message.custom_weight, 0),
        ("num_steps", message.num_steps, 0),
    ):
        if not least <= value <= limits.MAX_COUNT:
            raise PayloadError(f"the update says {name} = {value}; expected {least} to {limits.MAX_COUNT}")
    if not (math.isfinite(message.training_seconds) and message.training_seconds >= 0):
        raise PayloadError(
            f"the update says training_seconds = {message.training_seconds}; expected a number from 0 on"
        )
    for name in ("error", "gain", "normalizer", "work"):
        number = getattr(message, name)
        if not math.isfinite(number) or (name != "gain" and number < 0):
            raise PayloadError(
                f"the update says {name} = {number}; expected a number, and at least 0 for the error and the normalizer"
            )
    if not 1 <= len(message.assignment_id.encode()) <= limits.MAX_ID_BYTES:
        raise PayloadError(f"an update names its assignment in 1 to {limits.MAX_ID_BYTES} bytes")
    metrics = {metric.name: metric.value for metric in message.metrics}
    if len(message.metrics) > limits.MAX_METRICS or len(metrics) != len(message.metrics):
        raise PayloadError(f"an update holds at most {limits.MAX_METRICS} metrics, each name once")
    for name in metrics:
        if not _METRIC_NAME.fullmatch(name):
            raise PayloadError(f"the update holds a metric {name!r}; names are 1 to 100 of a-z, 0-9, '_' and '.'")
    return UpdateInfo(
        assignment_id=message.assignment_id,
        num_examples=message.num_examples,
        custom_weight=message.custom_weight,
        num_steps=message.num_steps,
        is_partial=message.is_partial,
        training_seconds=message.training_seconds,
        metrics=metrics,
        error=message.error,
        gain=message.gain if message.HasField("gain") else 1.0,
        normalizer=message.normalizer,
        work=message.work,
    )


def _read_partial(message: payload_pb2.PartialInfo) -> PartialInfo:
    if not 0 <= message.num_updates <= message.total_weight <= limits.MAX_COUNT:
        raise PayloadError(
            f"the partial aggregate says {message.num_updates} updates of total weight {message.total_weight}; expected 0 to "
            f"{limits.MAX_COUNT}, and the weight to be no less"
        )
    for exponent in message.exponents:
        if abs(exponent) > limits.MAX_EXPONENT:
            raise PayloadError(
                f"the partial aggregate says exponent {exponent}; float64 has none beyond {limits.MAX_EXPONENT}"
            )
    return PartialInfo(message.num_updates, message.total_weight, tuple(message.exponents))


def _check_header(manifest: Manifest) -> None:
    if manifest.kind not in _KINDS:
        raise PayloadError(
            f"the payload is of the unknown kind {manifest.kind}; expected a model, an update, a delta, a partial aggregate or "
            "a variate"
        )
    is_update = manifest.kind == common_pb2.PAYLOAD_KIND_UPDATE
    is_model = manifest.kind == common_pb2.PAYLOAD_KIND_MODEL
    is_partial = manifest.kind == common_pb2.PAYLOAD_KIND_PARTIAL
    is_variate = manifest.kind == common_pb2.PAYLOAD_KIND_VARIATE
    if manifest.model_version < 0:
        raise PayloadError(f"the payload says model version {manifest.model_version}; expected 0 or more")
    if is_update != (manifest.update is not None):
        raise PayloadError("an update says what work is behind it, and nothing else does")
    if is_partial != (manifest.partial is not None):
        raise PayloadError("a partial aggregate says how many updates it stands for, and nothing else does")
    if manifest.partial is not None and len(manifest.partial.exponents) != len(manifest.tensors):
        raise PayloadError(
            f"the partial aggregate has {len(manifest.partial.exponents)} exponents for {len(manifest.tensors)} tensors"
        )
    if len(manifest.base_digest) != (0 if is_model or is_variate else limits.DIGEST_BYTES):
        raise PayloadError(
            "an update or a delta names the digest of its base model, and a variate or a model names none"
        )
    if (is_update or is_partial) and not (manifest.run_id and manifest.round >= 1):
        raise PayloadError(
            f"an update belongs to a run and a round from 1 on; here {manifest.run_id!r}, {manifest.round}"
        )
    if not (is_update or is_partial) and manifest.round != 0:
        raise PayloadError(
            f"a model, a delta or a variate belongs to no round; here it says {manifest.round}, expected 0"
        )
    is_raw = all(entry.codec == RAW for entry in manifest.tensors)
    if is_partial and not is_raw:
        raise PayloadError("the sums of a partial aggregate are exact; they come in the raw codec only")
    names_no_result = is_update or is_partial or is_variate or (is_model and is_raw)
    if len(manifest.result_digest) != (0 if names_no_result else limits.DIGEST_BYTES):
        raise PayloadError(
            "a delta, and a model that is not in the raw codec throughout, name the digest of the raw model, and nothing else does"
        )


def _check_sums(manifest: Manifest) -> None:
    raw_bytes = sum(entry.spec.num_bytes for entry in manifest.tensors)
    encoded_bytes = sum(span.length for span in manifest.segments)
    if raw_bytes > limits.MAX_RAW_BYTES:
        raise PayloadError(f"the payload decodes to {raw_bytes} bytes; at most {limits.MAX_RAW_BYTES} are allowed")
    if (manifest.raw_bytes, manifest.encoded_bytes) != (raw_bytes, encoded_bytes):
        raise PayloadError(
            f"the manifest claims {manifest.raw_bytes} raw and {manifest.encoded_bytes} encoded bytes; its tensors add up "
            f"to {raw_bytes} and {encoded_bytes}"
        )
