"""One bit a coordinate: its sign, and a scale per block, the mean absolute value.

signSGD with the l1 scaling of Karimireddy et al. 2019 (EF-SignSGD, https://arxiv.org/abs/1901.09847), which takes one scale per
tensor; here blocks have one each. Given the signs, the mean is the scale with the smallest squared error, by which the code is a
contraction: |x - x'|^2 <= |x|^2, whatever x, and 1 - 2/pi = 0.363 of it for a Gaussian. The gain is as much below 1: scales that
make it 1 (|x|^2 / |x|_1, as in DRIVE, Vargaftik et al. 2021) leave 0.571 and are no contraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.blocks import (
    LEAST_SCALE,
    MAX_LOG_BLOCK,
    MIN_LOG_BLOCK,
    BlockLength,
    read_scales,
    split_blocks,
)
from fed_core.codecs.config import FeedbackTable
from fed_core.codecs.floating import TILE, check_lossy, narrow
from fed_core.codecs.sparsity import plan_parameters
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec


class SignCodec:
    """A body is a byte (log2 of the block length), a scale of two bytes per block, and a bit a coordinate.

    A scale is the upper half of a float32: 0, or a normal number with 8 bits of mantissa. Bit i % 8 of the byte i // 8 is set where
    coordinate i is negative; the value is the scale or its negative.
    """

    kind = "sign"
    has_head = False

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """A bit a coordinate, and from the fewest scales to the most."""
        check_lossy(self.kind, spec)
        least, most = (_sign_bytes(num_coordinates, 2**log) for log in (MAX_LOG_BLOCK, MIN_LOG_BLOCK))
        return least, most

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _SignDecoder:
        """The same for every tensor of a floating type."""
        check_lossy(self.kind, spec, head)
        return _SignDecoder()


class _SignDecoder:
    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Bits to signs to values, tile by tile."""
        read_signs(body, out)


def sign_plan(spec: TensorSpec, source: TileSource, *, block: int = 256) -> TensorPlan:
    """Bodies of 2^20 coordinates. The source is not read here.

    The plan's `encode` raises InvalidError, naming the tensor, where a float64 value is beyond float32.
    """

    def encode(first: int, tile: Tensor) -> memoryview:
        return write_signs(spec.name, tile, block)

    return TensorPlan(SignCodec.kind, None, MAX_BODY_COORDINATES, encode)


class SignConfig(FeedbackTable):
    """The sign of every value, and a scale per block."""

    feedback_by_default: ClassVar[bool] = True

    kind: Literal["sign"] = Field(
        default="sign", description="A bit a value and a scale per block: the least work, and a size known beforehand."
    )
    block: BlockLength = Field(
        default=256,
        description="Coordinates that share a scale, a power of two from 32 to 65536. A scale costs 16 bits; short blocks follow "
        "the values more closely.",
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Parameters by this codec, small vectors by uniform, buffers and other types raw; the seed decides nothing."""
        return plan_parameters(
            tensors, lambda large: [sign_plan(spec, source, block=self.block) for spec, source in large]
        )


# ------------------------------------------------------------------------------------------------------------- values of two levels


def write_signs(name: str, values: Tensor, block: int) -> memoryview:
    """Flat values of any floating type as signs and scales. Raises InvalidError where one is beyond float32."""
    body = np.empty(_sign_bytes(len(values), block), np.uint8)
    num_blocks = -(-len(values) // block)
    body[0] = block.bit_length() - 1
    means = torch.zeros(num_blocks, dtype=torch.float64)
    signs = body[1 + 2 * num_blocks :]
    for start in range(0, len(values), TILE):
        tile = narrow(name, values[start : start + TILE], torch.float32)
        for part, result in split_blocks(tile.abs(), block, means[start // block :]):
            torch.mean(part, 1, keepdim=True, dtype=torch.float64, out=result)
        packed = np.packbits(tile.numpy() < 0, bitorder="little")
        signs[start // 8 : start // 8 + len(packed)] = packed
    body[1 : 1 + 2 * num_blocks] = _to_scales(means, values.dtype).view(np.uint8)
    return body.data


def read_signs(data: bytes | memoryview, out: Tensor) -> None:
    """What `write_signs` wrote, into `out`. Raises PayloadError unless `data` is just that."""
    block, scales, packed = _read(data, len(out))
    scratch = torch.empty(min(TILE, len(out))) if out.dtype is not torch.float32 else None
    for start in range(0, len(out), TILE):
        tile = out[start : start + TILE]
        bits = np.unpackbits(packed[start // 8 : (start + TILE) // 8], count=len(tile), bitorder="little")
        bits *= np.uint8(254)
        bits += np.uint8(1)
        values = tile if scratch is None else scratch[: len(tile)]
        values.copy_(torch.from_numpy(bits.view(np.int8)))
        for part, scale in split_blocks(values, block, scales[start // block :]):
            part.mul_(scale)
        if values is not tile:
            tile.copy_(values)


def max_sign_bytes(num_values: int) -> int:
    """The most bytes that `write_signs` makes of so many values."""
    return _sign_bytes(num_values, 2**MIN_LOG_BLOCK)


def _sign_bytes(num_coordinates: int, block: int) -> int:
    return 1 + 2 * -(-num_coordinates // block) + (num_coordinates + 7) // 8


class _Signs(NamedTuple):
    block: int
    scales: Tensor
    packed: NDArray[np.uint8]


def _read(data: bytes | memoryview, num_coordinates: int) -> _Signs:
    log_block = data[0] if len(data) else 0
    if not MIN_LOG_BLOCK <= log_block <= MAX_LOG_BLOCK:
        raise PayloadError(f"signs in blocks of 2^{log_block}; expected 2^{MIN_LOG_BLOCK} to 2^{MAX_LOG_BLOCK}")
    expected = _sign_bytes(num_coordinates, 2**log_block)
    if len(data) != expected:
        raise PayloadError(f"signs and scales of {len(data)} bytes; expected {expected}")
    num_blocks = -(-num_coordinates // 2**log_block)
    scales = read_scales(data, num_blocks, 1)
    if num_coordinates % 8 and data[-1] >> num_coordinates % 8:
        raise PayloadError("the last byte of the signs is not filled with zeros")
    packed = np.frombuffer(data, np.uint8, offset=1 + 2 * num_blocks)
    return _Signs(2**log_block, scales, packed)


def _to_scales(means: Tensor, dtype: torch.dtype) -> NDArray[np.uint16]:
    """Rounded to the upper halves of float32, at most the largest that is finite in the type."""
    ceiling = np.float32(min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)).view(np.uint32) >> np.uint32(16)
    halves = np.minimum((means.float().numpy().view(np.uint32) + 0x8000) >> 16, ceiling)
    return np.where(halves < LEAST_SCALE, 0, halves).astype(np.uint16)
