"""Lossless: a body is the memory of its coordinates, little-endian and unpadded. Every dtype, every bit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import CodecTable
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import DTYPES, TensorSpec

if sys.byteorder != "little":
    raise ImportError("the raw codec copies memory, and the format is little-endian; this machine is not")


class RawCodec:
    """Copies memory: float32 in bodies of 2^18 coordinates, 1 MiB each. The error is zero, the rate that of the dtype."""

    kind = "raw"
    has_head = False

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """The size in memory: a raw body has no other."""
        size = num_coordinates * DTYPES[spec.dtype]
        return size, size

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _RawDecoder:
        """The same for every tensor. Raises PayloadError on a head: raw has none."""
        if head is not None:
            raise PayloadError(f"the codec 'raw' has no head; here is one of {len(head)} bytes")
        return _RawDecoder()


class _RawDecoder:
    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """One copy into `out`. Raises PayloadError on a wrong length and on a bool that is neither 0 nor 1."""
        memory = _memory(out)
        values = np.frombuffer(body, np.uint8)
        if values.size != memory.size:
            raise PayloadError(f"a raw body of {values.size} bytes; expected {memory.size}")
        if out.dtype is torch.bool and values.size and values.max() > 1:
            raise PayloadError(f"a bool of value {values.max()}; expected 0 or 1")
        np.copyto(memory, values)


def raw_plan(spec: TensorSpec, source: TileSource) -> TensorPlan:
    """Bodies of as many coordinates as fit 1 MiB, at most 2^20, each a view of its tile's memory. The source is not read."""
    body_coordinates = min(MAX_BODY_COORDINATES, MAX_BODY_BYTES // DTYPES[spec.dtype])
    return TensorPlan(RawCodec.kind, None, body_coordinates, lambda first, tile: _memory(tile).data)


class RawConfig(CodecTable):
    """Every bit of every tensor."""

    kind: Literal["raw"] = Field(default="raw", description="Lossless, no compression.")

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Every tensor raw; the seed decides nothing."""
        return [raw_plan(spec, source) for spec, source in tensors]


def _memory(tile: Tensor) -> NDArray[np.uint8]:
    return tile.view(torch.uint8).numpy()
