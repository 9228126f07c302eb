"""Writes a payload file: plans every tensor, then one pass over their values.

The segment table has fixed-width entries, so the manifest's size is known before a segment is encoded: a placeholder first,
then the segments, then the manifest over the placeholder. A crash in between leaves a file whose preamble does not verify.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

import torch
from blake3 import blake3
from torch import Tensor

from fed_core.codecs.base import Encoding, TensorPlan, TileSource
from fed_core.codecs.floating import TILE
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.registry import codec_named
from fed_core.errors import PayloadError
from fed_core.payload.limits import (
    DIGEST_BYTES,
    MAX_BODY_BYTES,
    MAX_BUNDLE_BYTES,
    MAX_BUNDLED_BYTES,
    MAX_HEAD_BYTES,
)
from fed_core.payload.manifest import (
    RAW,
    PartialInfo,
    UpdateInfo,
    pack_bundle,
    pack_preamble,
    pack_specs,
    parse_manifest,
    parse_preamble,
)
from fed_core.specs import TensorSpec, to_proto
from fed_core.tensors import dtype_name, torch_dtype
from fedstream.v1 import common_pb2, payload_pb2

OnProgress = Callable[[int, int], None]
"""Called with (raw bytes done, raw bytes in all) after every body."""

OnDecoded = Callable[[TensorSpec, str, int, Tensor], None]
"""Called with (spec, codec, first coordinate, what a receiver will decode there), tile by tile, each tensor in order; the tile is
good until the call returns. Bundled tensors come before the others."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Sums over the tensors x that were written in a lossy codec and what they decode to, x': |x|^2, <x, x'> and |x - x'|^2."""

    energy: float = 0.0
    product: float = 0.0
    squared_error: float = 0.0

    @property
    def error(self) -> float:
        """|x - x'|^2 / |x|^2; 0 where x is zero."""
        return self.squared_error / self.energy if self.energy > 0 else 0.0

    @property
    def gain(self) -> float:
        """<x, x'> / |x|^2: below 1 the code shrinks what it carries; 1 where x is zero."""
        return self.product / self.energy if self.energy > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the payload's digest, the length of the file, what its tensors cost undone, what the codec lost, and the
    number of tensors by codec."""

    digest: bytes
    total_bytes: int
    raw_bytes: int
    fidelity: Fidelity
    codecs: dict[str, int]


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
    encoding: Encoding | None = None,
    seed: int = 0,
    new_values: Mapping[str, TileSource] | None = None,
    result_digest: Callable[[], bytes] | None = None,
    on_decoded: OnDecoded | None = None,
    on_progress: OnProgress | None = None,
    partial: PartialInfo | None = None,
) -> Written:
    """Encodes tensors into an empty, seekable file; the caller flushes, fsyncs and renames it.

    A source is the tensor itself, on any device, or a function that gives it tile by tile, as often as it is asked. `encoding`
    (default: raw) plans all tensors first; what is lossy is decoded again as it is written, so that error and gain are measured and
    not estimated, and go into `update` where there is one. `new_values` belong to a delta, whose tensors in the raw codec hold the
    new value itself: as short as a difference, and exact. `result_digest` is called when all segments are written: the identity of
    the model that a delta, or a model in another codec than raw, leads to. Memory: the heads, a bundle of at most 1 MiB, and a few
    tiles.

    Raises PayloadError, before a byte is written, where the manifest would break a limit, and later where a tile is not what its
    spec says; and whatever `encoding` raises for tensors that it cannot hold."""
    sources = tuple((spec, _tile_source(spec, source)) for spec, source in tensors)
    raw_bytes = sum(spec.num_bytes for spec, _ in sources)
    plans = (encoding or RawConfig()).plan(sources, seed=seed)
    assert len(plans) == len(sources), "an encoding plans every tensor"
    if new_values is not None:
        sources = tuple(
            (spec, new_values[spec.name] if plan.codec == RAW else source)
            for (spec, source), plan in zip(sources, plans, strict=True)
        )
    meter = _Meter()
    writer = _SegmentWriter(sources, raw_bytes, meter, on_decoded, on_progress)

    codecs = list(dict.fromkeys(plan.codec for plan in plans))
    is_raw = all(codec == RAW for codec in codecs)
    specs = payload_pb2.TensorSpecs(specs=[to_proto(spec) for spec, _ in sources])
    is_lossless_model = kind == common_pb2.PAYLOAD_KIND_MODEL and is_raw
    bundled = [] if is_lossless_model else _choose_bundled(sources, plans)
    manifest = payload_pb2.Manifest(
        kind=kind,
        run_id=run_id,
        round=round,
        model_version=model_version,
        base_digest=base_digest,
        # Compressed bytes differ from one zlib to another, and a model's identity may not.
        specs=specs if is_lossless_model else None,
        packed_specs=b"" if is_lossless_model else pack_specs(specs),
        codecs=codecs,
        tensors=[
            payload_pb2.TensorEntry(codec=codecs.index(plan.codec), is_bundled=True)
            if index in bundled
            else _placeholder(spec, plan, codecs.index(plan.codec))
            for index, ((spec, _), plan) in enumerate(zip(sources, plans, strict=True))
        ],
        bundle=payload_pb2.Segment(encoded_bytes=1, digest=bytes(DIGEST_BYTES)) if bundled else None,
        raw_bytes=raw_bytes,
        update=update.to_proto() if update is not None else None,
        result_digest=bytes(DIGEST_BYTES) if result_digest is not None and not is_lossless_model else b"",
        partial=partial.to_proto() if partial is not None else None,
    )
    manifest.encoded_bytes = bool(bundled) + sum(
        len(entry.bodies) + entry.HasField("head") for entry in manifest.tensors
    )
    placeholder = manifest.SerializeToString()
    preamble = pack_preamble(placeholder)
    # The placeholder is itself a valid manifest, of segments of one byte: what a reader would refuse is refused here first.
    parse_manifest(parse_preamble(preamble), placeholder)
    file.write(bytes(len(preamble) + len(placeholder)))

    encoded_bytes = 0
    if bundled:
        bundle = pack_bundle(
            (plans[index].head or b"", bytes(body))
            for index in bundled
            for _, body in writer.bodies(index, plans[index])
        )
        encoded_bytes += _write_segment(file, manifest.bundle, bundle, MAX_BUNDLE_BYTES)
    for index, (plan, entry) in enumerate(zip(plans, manifest.tensors, strict=True)):
        if index in bundled:
            continue
        if plan.head is not None:
            encoded_bytes += _write_segment(file, entry.head, plan.head, MAX_HEAD_BYTES)
        for segment, (_, body) in zip(entry.bodies, writer.bodies(index, plan), strict=True):
            encoded_bytes += _write_segment(file, segment, body, MAX_BODY_BYTES)
    manifest.encoded_bytes = encoded_bytes
    fidelity = meter.fidelity()
    if manifest.HasField("update"):
        manifest.update.error, manifest.update.gain = fidelity.error, fidelity.gain
    digest = result_digest() if result_digest is not None else b""
    if not is_lossless_model:
        manifest.result_digest = digest

    final = manifest.SerializeToString()
    assert len(final) == len(placeholder), "a manifest's size must not depend on its segments"
    preamble = pack_preamble(final)
    file.seek(0)
    file.write(preamble + final)
    file.seek(0, 2)
    return Written(
        digest=parse_preamble(preamble).digest,
        total_bytes=len(preamble) + len(final) + encoded_bytes,
        raw_bytes=raw_bytes,
        fidelity=fidelity,
        codecs={codec: sum(plan.codec == codec for plan in plans) for codec in codecs},
    )


def identify_model(
    run_id: str, model_version: int, tensors: Iterable[tuple[TensorSpec, Tensor | TileSource]]
) -> Written:
    """Digest and length of a model's payload in the raw codec, which are its identity, without writing it. One pass, O(tile)
    memory."""
    return write_payload(
        cast(BinaryIO, _Nowhere()),
        kind=common_pb2.PAYLOAD_KIND_MODEL,
        run_id=run_id,
        round=0,
        model_version=model_version,
        base_digest=b"",
        update=None,
        tensors=tensors,
    )


class _Nowhere(io.RawIOBase):
    """A file that forgets what is written to it."""

    def write(self, data: object) -> int:
        return 0

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0


class _Meter:
    """Adds up what the receiver will be left with, in parts that stay in the cache."""

    def __init__(self) -> None:
        self._energy = self._product = self._squared_error = 0.0
        self._exact, self._seen = torch.empty(2, TILE, dtype=torch.float64)

    def add(self, values: Tensor, decoded: Tensor) -> None:
        for start in range(0, len(values), TILE):
            part = values[start : start + TILE]
            exact = self._exact[: len(part)].copy_(part)
            seen = self._seen[: len(part)].copy_(decoded[start : start + TILE])
            self._energy += float(exact.dot(exact))
            self._product += float(exact.dot(seen))
            left = seen.sub_(exact)
            self._squared_error += float(left.dot(left))

    def fidelity(self) -> Fidelity:
        return Fidelity(self._energy, self._product, self._squared_error)


class _SegmentWriter:
    """Encodes the bodies of planned tensors, and sees to it that what they decode to is measured and passed on."""

    def __init__(
        self,
        sources: tuple[tuple[TensorSpec, TileSource], ...],
        raw_bytes: int,
        meter: _Meter,
        on_decoded: OnDecoded | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._sources = sources
        self._raw_bytes = raw_bytes
        self._meter = meter
        self._on_decoded = on_decoded
        self._on_progress = on_progress
        self._done = 0

    def bodies(self, index: int, plan: TensorPlan) -> Iterable[tuple[int, bytes | memoryview]]:
        spec, read = self._sources[index]
        is_lossy = plan.codec != RAW
        decoder = codec_named(plan.codec).decoder(spec, plan.head) if is_lossy else None
        buffer: Tensor | None = None
        for first in range(0, spec.num_elements, plan.body_coordinates):
            count = min(plan.body_coordinates, spec.num_elements - first)
            tile = read(first, count)
            _check_tile(spec, tile, count)
            body = plan.encode(first, tile)
            decoded = tile
            if decoder is not None:
                if buffer is None:
                    buffer = torch.empty_like(tile)
                decoded = buffer[:count]
                decoder.decode(first, body, decoded)
                self._meter.add(tile, decoded)
            if self._on_decoded is not None:
                self._on_decoded(spec, plan.codec, first, decoded)
            self._done += tile.nbytes
            if self._on_progress is not None:
                self._on_progress(self._done, self._raw_bytes)
            yield first, body


def _choose_bundled(sources: tuple[tuple[TensorSpec, TileSource], ...], plans: list[TensorPlan]) -> list[int]:
    """The tensors whose head and single body fit into 4 KiB, as many as fit into the bundle: decided from plans and specs alone."""
    chosen: list[int] = []
    total = 0
    for index, ((spec, _), plan) in enumerate(zip(sources, plans, strict=True)):
        if not 1 <= spec.num_elements <= plan.body_coordinates:
            continue
        most = len(plan.head or b"") + codec_named(plan.codec).body_bytes(spec, spec.num_elements)[1]
        if most <= MAX_BUNDLED_BYTES and total + most + 8 <= MAX_BUNDLE_BYTES:
            chosen.append(index)
            total += most + 8
    return chosen


def _placeholder(spec: TensorSpec, plan: TensorPlan, codec: int) -> payload_pb2.TensorEntry:
    """An entry of the final size: proto3 leaves out what is zero, so nothing is that will not be."""
    digest = bytes(DIGEST_BYTES)
    step, num_elements = plan.body_coordinates, spec.num_elements
    return payload_pb2.TensorEntry(
        codec=codec,
        head=payload_pb2.Segment(encoded_bytes=1, digest=digest) if plan.head is not None else None,
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
