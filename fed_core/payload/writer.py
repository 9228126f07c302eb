"""Writes a payload file in one pass.

The segment table has fixed-width entries, so the manifest's size is known before a segment is encoded: a placeholder first,
then the segments, then the manifest over the placeholder. A crash in between leaves a file whose preamble does not verify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

from blake3 import blake3
from torch import Tensor

from fed_core.codecs.base import Codec, TileSource
from fed_core.codecs.registry import codec_named
from fed_core.errors import PayloadError
from fed_core.payload.limits import DIGEST_BYTES, MAX_BODY_BYTES, MAX_HEAD_BYTES
from fed_core.payload.manifest import UpdateInfo, pack_preamble, parse_manifest, parse_preamble
from fed_core.specs import TensorSpec, to_proto
from fed_core.tensors import dtype_name, torch_dtype
from fedstream.v1 import common_pb2, payload_pb2

OnProgress = Callable[[int, int], None]
"""Called with (raw bytes done, raw bytes in all) after every body."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the payload's digest, the length of the file, and what its tensors cost undone."""

    digest: bytes
    total_bytes: int
    raw_bytes: int


def write_payload(
    file: BinaryIO,
    *,
    kind: common_pb2.PayloadKind.ValueType,
    run_id: str,
    round: int,
    model_version: int,
    base_digest: bytes,
    update: UpdateInfo | None,
    tensors: Iterable[tuple[TensorSpec, Tensor | TileSource]],
    codec: str = "raw",
    on_progress: OnProgress | None = None,
) -> Written:
    """Encodes tensors into an empty, seekable file; the caller flushes, fsyncs and renames it.

    A source is the tensor itself, on any device, or a function that gives it tile by tile: memory is then O(tile), whatever the
    model. Raises PayloadError, before a byte is written, where the manifest would break a limit, and later where a tile is not
    what its spec says.
    """
    sources = tuple(tensors)
    encoder = codec_named(codec)
    manifest = payload_pb2.Manifest(
        kind=kind,
        run_id=run_id,
        round=round,
        model_version=model_version,
        base_digest=base_digest,
        tensors=[_placeholder(spec, encoder) for spec, _ in sources],
        raw_bytes=sum(spec.num_bytes for spec, _ in sources),
        update=update.to_proto() if update is not None else None,
    )
    manifest.encoded_bytes = sum(len(entry.bodies) + entry.HasField("head") for entry in manifest.tensors)
    placeholder = manifest.SerializeToString()
    preamble = pack_preamble(placeholder)
    # The placeholder is itself a valid manifest, of segments of one byte: what a reader would refuse is refused here first.
    parse_manifest(parse_preamble(preamble), placeholder)
    file.write(bytes(len(preamble) + len(placeholder)))

    encoded_bytes = done = 0
    for (spec, source), entry in zip(sources, manifest.tensors, strict=True):
        read = _tile_source(spec, source)
        head = encoder.plan(spec, read)
        if head is not None:
            encoded_bytes += _write_segment(file, entry.head, head, MAX_HEAD_BYTES)
        first = 0
        for segment in entry.bodies:
            tile = read(first, segment.num_coordinates)
            _check_tile(spec, tile, segment.num_coordinates)
            encoded_bytes += _write_segment(file, segment, encoder.encode(head, tile), MAX_BODY_BYTES)
            first += segment.num_coordinates
            done += tile.nbytes
            if on_progress is not None:
                on_progress(done, manifest.raw_bytes)
    manifest.encoded_bytes = encoded_bytes

    final = manifest.SerializeToString()
    assert len(final) == len(placeholder), "a manifest's size must not depend on its segments"
    preamble = pack_preamble(final)
    file.seek(0)
    file.write(preamble + final)
    file.seek(0, 2)
    total_bytes = len(preamble) + len(final) + encoded_bytes
    return Written(parse_preamble(preamble).digest, total_bytes, manifest.raw_bytes)


def _placeholder(spec: TensorSpec, codec: Codec) -> payload_pb2.TensorEntry:
    """An entry of the final size: proto3 leaves out what is zero, so nothing is that will not be."""
    digest = bytes(DIGEST_BYTES)
    step = codec.body_coordinates(spec.dtype)
    num_elements = spec.num_elements
    return payload_pb2.TensorEntry(
        spec=to_proto(spec),
        codec=codec.kind,
        head=payload_pb2.Segment(encoded_bytes=1, digest=digest) if codec.has_head else None,
        bodies=[
            payload_pb2.Segment(encoded_bytes=1, num_coordinates=min(step, num_elements - first), digest=digest)
            for first in range(0, num_elements, step)
        ],
    )


def _write_segment(file: BinaryIO, segment: payload_pb2.Segment, data: bytes | memoryview, max_bytes: int) -> int:
    num_bytes = len(data)
    assert 1 <= num_bytes <= max_bytes, f"a codec made a segment of {num_bytes} bytes"
    segment.encoded_bytes = num_bytes
    segment.digest = blake3(data).digest()
    file.write(data)
    return num_bytes


def _tile_source(spec: TensorSpec, source: Tensor | TileSource) -> TileSource:
    if not isinstance(source, Tensor):
        return source
    if tuple(source.shape) != spec.shape:
        raise PayloadError(f"tensor {spec.name!r} has shape {tuple(source.shape)}; its spec says {spec.shape}")
    flat = source.detach().reshape(-1)

    def read(first: int, num_coordinates: int) -> Tensor:
        # A strided view stays one when it is flattened, and lazy conjugates and negatives are flags, not bits in memory.
        return flat[first : first + num_coordinates].to("cpu").resolve_conj().resolve_neg().contiguous()

    return read


def _check_tile(spec: TensorSpec, tile: Tensor, num_coordinates: int) -> None:
    if tile.dtype != torch_dtype(spec.dtype) or tile.shape != (num_coordinates,) or not tile.is_contiguous():
        raise PayloadError(
            f"a tile of tensor {spec.name!r} is {dtype_name(tile.dtype)} of shape {tuple(tile.shape)}; expected "
            f"{spec.dtype} of shape ({num_coordinates},), contiguous"
        )
