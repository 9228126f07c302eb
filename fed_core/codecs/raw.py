"""Lossless: a body is the memory of its coordinates, little-endian and unpadded. Every dtype, every bit."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from fed_core.codecs.base import TileSource
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import DTYPES, TensorSpec

if sys.byteorder != "little":
    raise ImportError("the raw codec copies memory, and the format is little-endian; this machine is not")


class RawCodec:
    """Copies memory: float32 in bodies of 2^18 coordinates, 1 MiB each. The error is zero, the rate that of the dtype."""

    kind = "raw"
    has_head = False

    def body_coordinates(self, dtype: str) -> int:
        """As many coordinates as fit 1 MiB, at most 2^20."""
        return min(MAX_BODY_COORDINATES, MAX_BODY_BYTES // DTYPES[dtype])

    def min_body_bytes(self, num_coordinates: int, dtype: str) -> int:
        """The size in memory: a raw body has no other."""
        return num_coordinates * DTYPES[dtype]

    def max_body_bytes(self, num_coordinates: int, dtype: str) -> int:
        """The size in memory: a raw body has no other."""
        return num_coordinates * DTYPES[dtype]

    def plan(self, spec: TensorSpec, source: TileSource) -> None:
        """No head."""
        return

    def encode(self, head: bytes | None, tile: Tensor) -> memoryview:
        """A view of the tile's memory; no copy."""
        return _memory(tile).data

    def decode(self, head: bytes | memoryview | None, body: bytes | memoryview, out: Tensor) -> None:
        """One copy into `out`. Raises PayloadError on a wrong length and on a bool that is neither 0 nor 1."""
        memory = _memory(out)
        values = np.frombuffer(body, np.uint8)
        if values.size != memory.size:
            raise PayloadError(f"a raw body of {values.size} bytes; expected {memory.size}")
        if out.dtype is torch.bool and values.size and values.max() > 1:
            raise PayloadError(f"a bool of value {values.max()}; expected 0 or 1")
        np.copyto(memory, values)


def _memory(tile: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return tile.view(torch.uint8).numpy()
