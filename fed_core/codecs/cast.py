"""Every value as a float16 or a bfloat16: two bytes per coordinate, no analysis, no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import CodecTable
from fed_core.codecs.floating import TILE, check_lossy, is_lossy, narrow
from fed_core.codecs.raw import raw_plan
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.specs import DTYPES, TensorSpec
from fed_core.tensors import torch_dtype

CastType = Literal["float16", "bfloat16"]

# What the first byte of a body says of the rest.
_TYPES: Final[tuple[CastType, ...]] = ("float16", "bfloat16")
_BODY_COORDINATES: Final = (MAX_BODY_BYTES - 1) // 2 // TILE * TILE


class CastCodec:
    """A body is one byte that names the type (0: float16, 1: bfloat16) and the values in it, little-endian.

    The relative error is at most 2^-11 (float16, between 6.1e-5 and 65504) or 2^-9 (bfloat16, at any size).
    """

    kind = "cast"
    has_head = False

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """One byte, and two for each coordinate."""
        check_lossy(self.kind, spec)
        size = 1 + 2 * num_coordinates
        return size, size

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _CastDecoder:
        """The same for every tensor of a floating type."""
        check_lossy(self.kind, spec, head)
        return _CastDecoder()


class _CastDecoder:
    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Widens tile by tile; a float16 or bfloat16 tensor is rounded to once more."""
        if len(body) != 1 + 2 * len(out):
            raise PayloadError(f"a cast body of {len(body)} bytes; expected {1 + 2 * len(out)}")
        if body[0] >= len(_TYPES):
            raise PayloadError(f"a cast body of type {body[0]}; expected 0 ({_TYPES[0]}) or 1 ({_TYPES[1]})")
        # The values begin at an odd byte, and torch wants them aligned.
        values = np.frombuffer(body, np.uint16, offset=1)
        aligned = np.empty(min(TILE, len(out)), np.uint16)
        typed = torch.from_numpy(aligned).view(torch_dtype(_TYPES[body[0]]))
        for start in range(0, len(out), TILE):
            tile = out[start : start + TILE]
            np.copyto(aligned[: len(tile)], values[start : start + TILE])
            tile.copy_(typed[: len(tile)])


def cast_plan(spec: TensorSpec, source: TileSource, *, to: CastType) -> TensorPlan:
    """Bodies of 458,752 coordinates. The source is not read here.

    The plan's `encode` raises InvalidError, naming the tensor and the cure, where a value would become infinite.
    """

    def encode(first: int, tile: Tensor) -> memoryview:
        body = np.empty(1 + 2 * len(tile), np.uint8)
        body[0] = _TYPES.index(to)
        body[1:] = narrow(spec.name, tile, torch_dtype(to)).view(torch.uint8).numpy()
        return body.data

    return TensorPlan(CastCodec.kind, None, _BODY_COORDINATES, encode)


class CastConfig(CodecTable):
    """Two bytes per coordinate, whatever the values."""

    kind: Literal["cast"] = Field(
        default="cast", description="Every value as a 16-bit float: half the bytes of float32."
    )
    to: CastType = Field(
        default="bfloat16",
        description="bfloat16 takes any value, to 2 to 3 decimal digits. float16 keeps 3 to 4, but refuses an update that holds a "
        "value over 65504, and values under 6e-8 become zero.",
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Casts float32 and float64. What has two bytes already is sent raw, as are integers; the seed decides nothing."""
        return [
            cast_plan(spec, source, to=self.to) if is_lossy(spec) and DTYPES[spec.dtype] > 2 else raw_plan(spec, source)
            for spec, source in tensors
        ]
