"""Reads a payload file tensor by tensor or tile by tile, by pread into bounded buffers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from blake3 import blake3
from torch import Tensor

from fed_core.codecs.registry import codec_named
from fed_core.errors import CorruptError, NotFoundError, PayloadError
from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import (
    BundledTensor,
    Manifest,
    SegmentSpan,
    TensorEntry,
    parse_manifest,
    parse_preamble,
    split_bundle,
)
from fed_core.tensors import torch_dtype


class PayloadReader:
    """An open payload file. Opening it reads and checks the manifest, the codecs' names and the length of the file.

    Segments are hashed only where `verify` is asked for: a file that was verified on arrival need not be again. All reads are
    positional, so threads may share a reader. Memory: the manifest, and for each iterator one body, one tile and one head.

    Raises CorruptError where digests or lengths differ and PayloadError where the manifest breaks a rule.
    """

    def __init__(self, path: Path, expected_digest: bytes | None = None) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._bundle: dict[str, tuple[memoryview | None, memoryview]] | None = None
        self._is_bundle_verified = False
        try:
            self.manifest = self._read_manifest(expected_digest)
            for entry in self.manifest.tensors:
                check_entry(entry)
        except BaseException:
            self.close()
            raise
        self._entries = {entry.spec.name: entry for entry in self.manifest.tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def entry(self, name: str) -> TensorEntry:
        """The entry of a tensor. Raises NotFoundError."""
        if name not in self._entries:
            raise NotFoundError(f"no tensor {name!r} in {self.path.name}")
        return self._entries[name]

    def read_segment(self, span: SegmentSpan, out: bytearray | None = None, *, verify: bool = True) -> memoryview:
        """The encoded bytes of a segment, in `out` where given (at least `span.length` long), else in fresh memory."""
        view = memoryview(bytearray(span.length) if out is None else out)[: span.length]
        self._read_into(view, span.offset)
        if verify and blake3(view).digest() != span.digest:
            raise CorruptError(
                f"a segment of {self.manifest.name_of(span)} in {self.path.name} has rotted", offset=span.offset
            )
        return view

    def iter_tiles(self, tensor: str | TensorEntry, *, verify: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yields (first coordinate, flat tile in the tensor's dtype) in order. The tile's memory is reused by the next step."""
        entry = self.entry(tensor) if isinstance(tensor, str) else tensor
        if entry.spec.num_elements == 0:
            return
        longest = max((body.num_coordinates for body in entry.bodies), default=entry.spec.num_elements)
        buffer = torch.empty(longest, dtype=torch_dtype(entry.spec.dtype))
        yield from self._decode(entry, lambda first, count: buffer[:count], verify)

    def tensor(self, name: str, *, verify: bool = False) -> Tensor:
        """A whole tensor in fresh memory of its own."""
        entry = self.entry(name)
        tensor = torch.empty(entry.spec.shape, dtype=torch_dtype(entry.spec.dtype))
        flat = tensor.view(-1)
        for _ in self._decode(entry, lambda first, count: flat[first : first + count], verify):
            pass
        return tensor

    def tensors(self, *, verify: bool = False) -> dict[str, Tensor]:
        """All tensors in order, in memory. Compare `manifest.specs` with what you expect first."""
        return {name: self.tensor(name, verify=verify) for name in self._entries}

    def _decode(
        self, entry: TensorEntry, target: Callable[[int, int], Tensor], verify: bool
    ) -> Iterator[tuple[int, Tensor]]:
        codec = codec_named(entry.codec)
        try:
            if entry.is_bundled:
                head, body = self._bundled(verify)[entry.spec.name]
                tile = target(0, entry.spec.num_elements)
                codec.decoder(entry.spec, head).decode(0, body, tile)
                yield 0, tile
                return
            decoder = codec.decoder(
                entry.spec, self.read_segment(entry.head, verify=verify) if entry.head is not None else None
            )
            encoded = bytearray(max((span.length for span in entry.bodies), default=0))
            for span in entry.bodies:
                tile = target(span.first_coordinate, span.num_coordinates)
                decoder.decode(span.first_coordinate, self.read_segment(span, encoded, verify=verify), tile)
                yield span.first_coordinate, tile
        except PayloadError as error:
            raise PayloadError(f"tensor {entry.spec.name!r}: {error}") from error

    def _bundled(self, verify: bool) -> dict[str, tuple[memoryview | None, memoryview]]:
        """Head and body of the bundled tensors by name. The bundle is read once."""
        if self._bundle is None or (verify and not self._is_bundle_verified):
            assert self.manifest.bundle is not None
            data = self.read_segment(self.manifest.bundle, verify=verify)
            self._bundle = {
                self.manifest.tensors[tensor.tensor_index].spec.name: check_bundled(self.manifest, tensor)
                for tensor in split_bundle(self.manifest, data)
            }
            self._is_bundle_verified = verify
        return self._bundle

    def _read_manifest(self, expected_digest: bytes | None) -> Manifest:
        size = os.fstat(self._fd).st_size
        start = memoryview(bytearray(min(size, PREAMBLE_BYTES)))
        self._read_into(start, 0)
        preamble = parse_preamble(start)
        if expected_digest is not None and preamble.digest != expected_digest:
            raise CorruptError(
                f"{self.path.name} is the payload {preamble.digest.hex()}, expected {expected_digest.hex()}", offset=0
            )
        if size < PREAMBLE_BYTES + preamble.manifest_bytes:
            raise CorruptError(f"{self.path.name} ends within its manifest, after {size} bytes", offset=0)
        data = memoryview(bytearray(preamble.manifest_bytes))
        self._read_into(data, PREAMBLE_BYTES)
        manifest = parse_manifest(preamble, data)
        if size != manifest.total_bytes:
            raise CorruptError(
                f"{self.path.name} has {size} bytes; its manifest says {manifest.total_bytes}",
                offset=min(size, manifest.total_bytes),
            )
        return manifest

    def _read_into(self, view: memoryview, offset: int) -> None:
        while view:
            num_bytes = os.preadv(self._fd, [view], offset)
            if num_bytes == 0:
                raise CorruptError(f"{self.path.name} ends at byte {offset}", offset=offset)
            view, offset = view[num_bytes:], offset + num_bytes


def check_bundled(manifest: Manifest, tensor: BundledTensor) -> tuple[memoryview | None, memoryview]:
    """Head, or None where the codec has none, and body of a tensor out of the bundle. Raises PayloadError where they cannot be
    its."""
    entry = manifest.tensors[tensor.tensor_index]
    codec = codec_named(entry.codec)
    _check_head(entry, len(tensor.head) > 0)
    _check_body(entry, entry.spec.num_elements, len(tensor.body))
    return tensor.head if codec.has_head else None, tensor.body


def check_entry(entry: TensorEntry) -> None:
    """Refuses a codec that is unknown and bodies of a length that it cannot make, before memory is set aside for their values."""
    codec_named(entry.codec)
    if entry.is_bundled:
        return  # checked when the bundle is read
    _check_head(entry, entry.head is not None)
    for body in entry.bodies:
        _check_body(entry, body.num_coordinates, body.length)


def _check_head(entry: TensorEntry, has_head: bool) -> None:
    codec = codec_named(entry.codec)
    if codec.has_head != has_head:
        raise PayloadError(
            f"tensor {entry.spec.name!r}: the codec {codec.kind!r} has {'a' if codec.has_head else 'no'} head"
        )


def _check_body(entry: TensorEntry, num_coordinates: int, num_bytes: int) -> None:
    least, most = codec_named(entry.codec).body_bytes(entry.spec, num_coordinates)
    if not least <= num_bytes <= most:
        raise PayloadError(
            f"tensor {entry.spec.name!r}: a {entry.codec} body of {num_coordinates} coordinates has {num_bytes} bytes; "
            f"expected {least} to {most}"
        )
