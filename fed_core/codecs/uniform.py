"""2 to 8 bits per coordinate on a uniform grid, one scale per block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

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
    scales_as_floats,
    split_blocks,
)
from fed_core.codecs.config import FeedbackTable
from fed_core.codecs.dither import dither, dither_key
from fed_core.codecs.floating import TILE, check_lossy, is_lossy, narrow
from fed_core.codecs.raw import raw_plan
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype

Rounding = Literal["nearest", "stochastic"]

MIN_BITS: Final = 2
MAX_BITS: Final = 8
_HEADER_BYTES: Final = 2
# The fields that make up an integer of so many bits, lowest first; each is packed by itself, several to a byte.
_FIELDS: Final = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


class UniformCodec:
    """A body is two bytes (bits, log2 of the block length), a scale of two bytes per block, and the integers.

    The value of a coordinate is k * scale, exact in float32, with |k| <= 2^(bits-1) - 1. A scale is the upper half of a float32: 0,
    or a normal number with 8 bits of mantissa. The integers k + 2^(bits-1) follow in units of 2^16 coordinates. Within a unit each
    is cut into fields of 1, 2, 4 or 8 bits, lowest first, and a field of w bits is packed in planes: byte j of h =
    ceil(length * w / 8) holds, from its lowest bits on, that of the coordinates j, j + h, j + 2h and so on. So packing is shifts of
    whole runs.
    """

    kind = "uniform"
    has_head = False

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From 2 bits in the longest blocks to the most that any bits cost in the shortest: for a few coordinates, not 8."""
        check_lossy(self.kind, spec)
        least = _body_bytes(num_coordinates, MIN_BITS, 2**MAX_LOG_BLOCK)
        most = max(_body_bytes(num_coordinates, bits, 2**MIN_LOG_BLOCK) for bits in _FIELDS)
        return least, min(most, MAX_BODY_BYTES)

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _UniformDecoder:
        """The same for every tensor of a floating type."""
        check_lossy(self.kind, spec, head)
        return _UniformDecoder()


class _UniformDecoder:
    def bound(self, body: bytes | memoryview, num_coordinates: int) -> float:
        """The largest scale times the largest integer that its bits can say."""
        bits, _, scales, _ = _read_body(body, num_coordinates)
        return float(scales.max()) * 2.0 ** (bits - 1)

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Unpacks, widens and scales tile by tile, in `out` itself where it is float32."""
        bits, block, scales, packed = _read_body(body, len(out))
        shifted = np.empty(min(TILE, len(out)), np.uint8)
        integers = torch.from_numpy(shifted.view(np.int8))
        scratch = torch.empty(len(shifted)) if out.dtype is not torch.float32 else None
        for start in range(0, len(out), TILE):
            tile = out[start : start + TILE]
            size = _packed_bytes(len(tile), bits)
            _unpack(packed[:size], bits, shifted[: len(tile)])
            packed = packed[size:]
            values = tile if scratch is None else scratch[: len(tile)]
            values.copy_(integers[: len(tile)])
            for part, scale in split_blocks(values, block, scales[start // block :]):
                part.mul_(scale)
            if values is not tile:
                tile.copy_(values)


def uniform_plan(
    spec: TensorSpec,
    source: TileSource,
    *,
    bits: int = 8,
    block: int = 1024,
    rounding: Rounding = "nearest",
    seed: int = 0,
) -> TensorPlan:
    """Bodies of 2^20 coordinates, or of 983,040 where those would exceed 1 MiB. The source is not read here.

    The scale of a block is its largest absolute value over 2^(bits-1) - 1, rounded up to 8 bits of mantissa and to no less than
    2^-126; rounded down where the largest product would otherwise leave the tensor's type. "nearest" errs by at most half a scale
    (by up to one in that last case). "stochastic" (QSGD, Alistarh et al. 2017, https://arxiv.org/abs/1610.02132, with the largest
    value in place of the norm) errs by less than one, and by less than 2^-16 of one on average: it rounds by 16 random bits per
    coordinate, from Philox keyed by seed, tensor and coordinate, so that encoding again gives the same bits. A float16 or
    bfloat16 tensor adds the rounding to its own type.

    The plan's `encode` raises InvalidError, naming the tensor, where a float64 value is beyond float32. Its memory beside the body:
    some 0.5 MiB.
    """
    ceiling = min(torch.finfo(torch_dtype(spec.dtype)).max, torch.finfo(torch.float32).max)
    levels = 2 ** (bits - 1) - 1
    key = dither_key(seed, spec.name)

    def encode(first: int, tile: Tensor) -> memoryview:
        scales = _choose_scales(_largest_of_blocks(spec.name, tile, block), levels, ceiling)
        body = np.empty(_body_bytes(len(tile), bits, block), np.uint8)
        body[:_HEADER_BYTES] = bits, block.bit_length() - 1
        packed = body[_HEADER_BYTES + scales.nbytes :]
        body[_HEADER_BYTES : -len(packed)] = scales.view(np.uint8)
        # A block of zeros has the scale 0; any other number divides it as well.
        divisors = scales_as_floats(np.maximum(scales, LEAST_SCALE))
        scratch = torch.empty(min(TILE, len(tile)))
        integers = torch.empty(len(scratch), dtype=torch.int8)
        for start in range(0, len(tile), TILE):
            values = tile[start : start + TILE]
            multiples = scratch[: len(values)].copy_(values)
            for part, divisor in split_blocks(multiples, block, divisors[start // block :]):
                part.div_(divisor)
            if rounding == "stochastic":
                multiples.add_(dither(key, first + start, len(values))).floor_()
            else:
                multiples.round_()
            whole = integers[: len(values)].copy_(multiples.clamp_(-levels, levels))
            size = _packed_bytes(len(values), bits)
            _pack(whole.numpy().view(np.uint8), bits, packed[:size])
            packed = packed[size:]
        return body.data

    fitting = (n for n in range(MAX_BODY_COORDINATES, 0, -TILE) if _body_bytes(n, bits, block) <= MAX_BODY_BYTES)
    return TensorPlan(UniformCodec.kind, None, next(fitting), encode)


class UniformConfig(FeedbackTable):
    """A grid of 2^bits - 1 values per block, with zero in the middle."""

    kind: Literal["uniform"] = Field(
        default="uniform", description="Integers of a few bits and a scale per block: fast, the size known beforehand."
    )
    bits: int = Field(
        default=8,
        ge=MIN_BITS,
        le=MAX_BITS,
        description="Bits per coordinate. 8 is a quarter of float32; 4 an eighth, much coarser.",
    )
    block: BlockLength = Field(
        default=1024,
        description="Coordinates that share a scale, a power of two from 32 to 65536. A scale costs 16 bits; short blocks follow "
        "the values more closely, which pays below 8 bits.",
    )
    rounding: Rounding = Field(
        default="nearest",
        description="nearest has the smaller error in one update; stochastic has one that is zero on average and cancels over many "
        "clients.",
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Every floating tensor by this codec, the others raw. The seed rules stochastic rounding."""
        return [
            uniform_plan(spec, source, bits=self.bits, block=self.block, rounding=self.rounding, seed=seed)
            if is_lossy(spec)
            else raw_plan(spec, source)
            for spec, source in tensors
        ]


def _packed_bytes(num_coordinates: int, bits: int) -> int:
    """Size of the integers of one unit."""
    return sum(-(-num_coordinates * width // 8) for width in _FIELDS[bits])


def _body_bytes(num_coordinates: int, bits: int, block: int) -> int:
    num_units, last = divmod(num_coordinates, TILE)
    packed = num_units * _packed_bytes(TILE, bits) + _packed_bytes(last, bits)
    return _HEADER_BYTES + 2 * -(-num_coordinates // block) + packed


class _Body(NamedTuple):
    bits: int
    block: int
    scales: Tensor
    packed: NDArray[np.uint8]


def _read_body(body: bytes | memoryview, num_coordinates: int) -> _Body:
    """The parts of a body, the integers still packed. Raises PayloadError on a size or scale that cannot be."""
    if len(body) < _HEADER_BYTES:
        raise PayloadError(f"a uniform body of {len(body)} bytes; its header alone has {_HEADER_BYTES}")
    bits, log_block = body[0], body[1]
    if bits not in _FIELDS:
        raise PayloadError(f"a uniform body of {bits} bits; expected {MIN_BITS} to {MAX_BITS}")
    if not MIN_LOG_BLOCK <= log_block <= MAX_LOG_BLOCK:
        raise PayloadError(f"blocks of 2^{log_block} coordinates; expected 2^{MIN_LOG_BLOCK} to 2^{MAX_LOG_BLOCK}")
    expected = _body_bytes(num_coordinates, bits, 2**log_block)
    if len(body) != expected:
        raise PayloadError(f"a uniform body of {len(body)} bytes; expected {expected}")
    num_blocks = -(-num_coordinates // 2**log_block)
    scales = read_scales(body, num_blocks, _HEADER_BYTES)
    packed = np.frombuffer(body, np.uint8, offset=_HEADER_BYTES + 2 * num_blocks)
    return _Body(bits, 2**log_block, scales, packed)


def _largest_of_blocks(name: str, tile: Tensor, block: int) -> NDArray[np.float32]:
    """The largest absolute value of each block. Raises InvalidError where one is beyond float32."""
    largest = torch.zeros(-(-len(tile) // block))
    for start in range(0, len(tile), TILE):
        values = narrow(name, tile[start : start + TILE], torch.float32)
        mine = largest[start // block :]
        for part, result in split_blocks(values, block, mine):
            torch.maximum(part.amax(1, keepdim=True), -part.amin(1, keepdim=True), out=result)
    return largest.numpy()


def _choose_scales(largest: NDArray[np.float32], levels: int, ceiling: float) -> NDArray[np.uint16]:
    """The upper halves of the smallest scales that reach the largest values in `levels` steps, and stay below the ceiling there."""
    halves = ((largest / np.float32(levels)).view(np.uint32) + 0xFFFF) >> 16
    halves = np.where(largest > 0, np.maximum(halves, LEAST_SCALE), 0)
    is_beyond = (halves << 16).view(np.float32).astype(np.float64) * levels > ceiling
    return (halves - is_beyond).astype(np.uint16)


def _pack(integers: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    """Packs one unit of integers, given in two's complement; changes them."""
    integers += np.uint8(2 ** (bits - 1))
    for width in _FIELDS[bits]:
        num_bytes = -(-len(integers) * width // 8)
        field, out = out[:num_bytes], out[num_bytes:]
        mask = np.uint8(2**width - 1)
        np.bitwise_and(integers[:num_bytes], mask, out=field)
        for shift in range(width, 8, width):
            plane = integers[shift // width * num_bytes :][:num_bytes] & mask
            # To the left by a product: numpy's shift is several times slower.
            field[: len(plane)] |= plane * np.uint8(2**shift)
        integers = integers >> np.uint8(width % 8)


def _unpack(packed: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    """Unpacks one unit into two's complement."""
    if bits == 8:
        np.bitwise_xor(packed, np.uint8(0x80), out=out)
        return
    out.fill(-(2 ** (bits - 1)) % 256)
    position = 0
    for width in _FIELDS[bits]:
        num_bytes = -(-len(out) * width // 8)
        field, packed = packed[:num_bytes], packed[num_bytes:]
        for shift in range(0, 8, width):
            plane = out[shift // width * num_bytes :][:num_bytes]
            digits = (field[: len(plane)] >> np.uint8(shift)) & np.uint8(2**width - 1)
            plane += digits * np.uint8(2**position) if position else digits
        position += width
