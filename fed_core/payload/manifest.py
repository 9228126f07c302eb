"""The table of contents of a payload file, and the only code that reads one from bytes.

    8 bytes "FEDSTRM1" | 32 bytes BLAKE3 of the manifest | 4 bytes its length, little-endian | manifest | segments, no gaps

The digest of the manifest is the digest of the payload: it lists the digest of every segment. Nothing here needs torch, so the
daemon and the transfer service can check a file without it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

from blake3 import blake3
from google.protobuf.message import DecodeError

from fed_core.errors import CorruptError, PayloadError
from fed_core.payload import limits
from fed_core.payload.wire import BYTES, read_fields
from fed_core.specs import TensorSpec, from_proto
from fedstream.v1 import common_pb2, payload_pb2

_PREAMBLE: Final = struct.Struct(f"<{len(limits.MAGIC)}s{limits.DIGEST_BYTES}sI")
_CODEC_NAME: Final = re.compile(rf"[a-z0-9_.-]{{1,{limits.MAX_CODEC_BYTES}}}")
_METRIC_NAME: Final = re.compile(rf"[a-z0-9_.]{{1,{limits.MAX_METRIC_NAME_BYTES}}}")


class SegmentSpan(NamedTuple):
    """Where one segment lies in the file and what it must hash to. `num_coordinates` is 0 for a head."""

    offset: int
    length: int
    digest: bytes
    tensor_index: int
    first_coordinate: int
    num_coordinates: int

    @property
    def is_head(self) -> bool:
        """Whether it holds what a tensor's bodies share, instead of coordinates."""
        return self.num_coordinates == 0

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a payload: what it is, its codec's name, and its segments."""

    spec: TensorSpec
    codec: str
    head: SegmentSpan | None
    bodies: tuple[SegmentSpan, ...]


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
    raw_bytes: int
    encoded_bytes: int
    update: UpdateInfo | None
    digest: bytes
    manifest_bytes: int

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
        return tuple(
            span
            for entry in self.tensors
            for span in ((entry.head, *entry.bodies) if entry.head is not None else entry.bodies)
        )

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors' specs in order."""
        return tuple(entry.spec for entry in self.tensors)


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
    tensors = _read_tensors(message, limits.PREAMBLE_BYTES + len(data))
    manifest = Manifest(
        kind=message.kind,
        run_id=message.run_id,
        round=message.round,
        model_version=message.model_version,
        base_digest=message.base_digest,
        tensors=tensors,
        raw_bytes=message.raw_bytes,
        encoded_bytes=message.encoded_bytes,
        update=_read_update(message.update) if message.HasField("update") else None,
        digest=preamble.digest,
        manifest_bytes=len(data),
    )
    _check_header(manifest)
    _check_sums(manifest)
    return manifest


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
_TENSOR_SHAPE: Final = {
    1: _Shape(limits.MAX_MANIFEST_BYTES, message=_SPEC_SHAPE),
    2: _Shape(limits.MAX_CODEC_BYTES),
    3: _Shape(_HEAD_BYTES),
    4: _Shape(_BODY_BYTES, max_count=limits.MAX_SEGMENTS),
}
_MANIFEST_SHAPE: Final = {
    1: _NUMBER,
    2: _Shape(limits.MAX_ID_BYTES),
    3: _NUMBER,
    4: _NUMBER,
    5: _Shape(limits.DIGEST_BYTES),
    6: _Shape(limits.MAX_MANIFEST_BYTES, max_count=limits.MAX_TENSORS, message=_TENSOR_SHAPE),
    7: _NUMBER,
    8: _NUMBER,
    9: _Shape(limits.MAX_UPDATE_INFO_BYTES),
}


def _check_structure(data: bytes) -> None:
    """Bounds what protobuf may build of these bytes: unchecked, 64 MiB of two-byte submessages grow to gigabytes.

    A field that this version does not know is refused too: whoever ignored it might decode the payload wrongly.
    """
    num_fields = 0
    pending: list[tuple[int, int, Mapping[int, _Shape]]] = [(0, len(data), _MANIFEST_SHAPE)]
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


def _read_tensors(message: payload_pb2.Manifest, offset: int) -> tuple[TensorEntry, ...]:
    num_segments = sum(len(entry.bodies) + entry.HasField("head") for entry in message.tensors)
    if num_segments > limits.MAX_SEGMENTS:
        raise PayloadError(f"the manifest lists {num_segments} segments; at most {limits.MAX_SEGMENTS} are allowed")
    tensors: list[TensorEntry] = []
    names: set[str] = set()
    for index, entry in enumerate(message.tensors):
        spec = from_proto(entry.spec)
        if spec.name in names:
            raise PayloadError(f"tensor {spec.name!r} is listed twice")
        names.add(spec.name)
        if not _CODEC_NAME.fullmatch(entry.codec):
            raise PayloadError(
                f"tensor {spec.name!r} names the codec {entry.codec!r}; expected a short lower-case name"
            )
        head = None
        if entry.HasField("head"):
            head = _read_segment(spec, entry.head, offset, index, 0, limits.MAX_HEAD_BYTES)
            if not head.is_head:
                raise PayloadError(
                    f"the head of tensor {spec.name!r} claims {head.num_coordinates} coordinates; expected 0"
                )
            offset = head.end
        bodies: list[SegmentSpan] = []
        coordinate = 0
        for segment in entry.bodies:
            body = _read_segment(spec, segment, offset, index, coordinate, limits.MAX_BODY_BYTES)
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
        tensors.append(TensorEntry(spec, entry.codec, head, tuple(bodies)))
    return tuple(tensors)


def _read_segment(
    spec: TensorSpec, segment: payload_pb2.Segment, offset: int, index: int, coordinate: int, max_bytes: int
) -> SegmentSpan:
    if not 1 <= segment.encoded_bytes <= max_bytes:
        raise PayloadError(
            f"a segment of tensor {spec.name!r} has {segment.encoded_bytes} bytes; expected 1 to {max_bytes}"
        )
    if len(segment.digest) != limits.DIGEST_BYTES:
        raise PayloadError(
            f"a segment of tensor {spec.name!r} has a digest of {len(segment.digest)} bytes; expected 32"
        )
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
    )


def _check_header(manifest: Manifest) -> None:
    if manifest.kind not in (common_pb2.PAYLOAD_KIND_MODEL, common_pb2.PAYLOAD_KIND_UPDATE):
        raise PayloadError(f"the payload is of the unknown kind {manifest.kind}; expected a model or an update")
    is_update = manifest.kind == common_pb2.PAYLOAD_KIND_UPDATE
    if manifest.model_version < 0:
        raise PayloadError(f"the payload says model version {manifest.model_version}; expected 0 or more")
    if is_update != (manifest.update is not None):
        raise PayloadError("an update says what work is behind it, and a model does not")
    if len(manifest.base_digest) != (limits.DIGEST_BYTES if is_update else 0):
        raise PayloadError("an update names the digest of its base model, and a model names none")
    if is_update and not (manifest.run_id and manifest.round >= 1):
        raise PayloadError(
            f"an update belongs to a run and a round from 1 on; here {manifest.run_id!r}, {manifest.round}"
        )
    if not is_update and manifest.round != 0:
        raise PayloadError(f"a model belongs to no round; here it says {manifest.round}, expected 0")


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
