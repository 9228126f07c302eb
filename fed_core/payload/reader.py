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
from fed_core.payload.manifest import Manifest, SegmentSpan, TensorEntry, parse_manifest, parse_preamble
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
        try:
            self.manifest = self._read_manifest(expected_digest)
            for entry in self.manifest.tensors:
                _check_entry(entry)
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
            name = self.manifest.tensors[span.tensor_index].spec.name
            raise CorruptError(f"a segment of tensor {name!r} in {self.path.name} has rotted", offset=span.offset)
        return view

    def iter_tiles(self, tensor: str | TensorEntry, *, verify: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yields (first coordinate, flat tile in the tensor's dtype) in order. The tile's memory is reused by the next step."""
        entry = self.entry(tensor) if isinstance(tensor, str) else tensor
        if not entry.bodies:
            return
        buffer = torch.empty(max(body.num_coordinates for body in entry.bodies), dtype=torch_dtype(entry.spec.dtype))
        for body, tile in self._decode(entry, lambda body: buffer[: body.num_coordinates], verify):
            yield body.first_coordinate, tile

    def tensor(self, name: str, *, verify: bool = False) -> Tensor:
        """A whole tensor in fresh memory of its own."""
        entry = self.entry(name)
        tensor = torch.empty(entry.spec.shape, dtype=torch_dtype(entry.spec.dtype))
        flat = tensor.view(-1)
        for _ in self._decode(entry, lambda body: flat[body.first_coordinate :][: body.num_coordinates], verify):
            pass
        return tensor

    def tensors(self, *, verify: bool = False) -> dict[str, Tensor]:
        """All tensors in order, in memory. Compare `manifest.specs` with what you expect first."""
        return {name: self.tensor(name, verify=verify) for name in self._entries}

    def _decode(
        self, entry: TensorEntry, target: Callable[[SegmentSpan], Tensor], verify: bool
    ) -> Iterator[tuple[SegmentSpan, Tensor]]:
        codec = codec_named(entry.codec)
        head = self.read_segment(entry.head, verify=verify) if entry.head is not None else None
        encoded = bytearray(max((body.length for body in entry.bodies), default=0))
        for body in entry.bodies:
            tile = target(body)
            try:
                codec.decode(head, self.read_segment(body, encoded, verify=verify), tile)
            except PayloadError as error:
                raise PayloadError(f"tensor {entry.spec.name!r}: {error}") from error
            yield body, tile

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


def _check_entry(entry: TensorEntry) -> None:
    """Refuses a codec that is unknown and bodies of a length that it cannot make, before memory is set aside for their values."""
    codec = codec_named(entry.codec)
    if codec.has_head != (entry.head is not None):
        raise PayloadError(
            f"tensor {entry.spec.name!r}: the codec {codec.kind!r} has {'a' if codec.has_head else 'no'} head"
        )
    for body in entry.bodies:
        least = codec.min_body_bytes(body.num_coordinates, entry.spec.dtype)
        most = codec.max_body_bytes(body.num_coordinates, entry.spec.dtype)
        if not least <= body.length <= most:
            raise PayloadError(
                f"tensor {entry.spec.name!r}: a {codec.kind} body of {body.num_coordinates} coordinates has {body.length} "
                f"bytes; expected {least} to {most}"
            )
