"""EDEN: a random rotation makes any vector look Gaussian, then every coordinate is quantized by the best table for a Gaussian.

Vargaftik et al. 2022, https://arxiv.org/abs/2108.08842; at one bit it is their DRIVE (2021, https://arxiv.org/abs/2105.08339). The
rotation is a Hadamard transform after random signs. The error depends on the bits alone: what structure an update has is lost with
the rotation, which is why `fsq` and `lrq` need fewer bits. What is different here: no padding. A tensor is cut into blocks of 2^16
coordinates, each rotated by itself, and the rest into powers of two, as its length is written in binary.

The rotation is float arithmetic, and its sums depend on the processor. So an update, which is decoded in one place, may be sent by
this codec, a version of the model, which all must have to the bit, may not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final, Literal

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import CodecTable
from fed_core.codecs.entropy import ByteReader
from fed_core.codecs.floating import TILE, check_lossy, is_lossy_parameter, narrow
from fed_core.codecs.raw import raw_plan
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec

MIN_BITS: Final = 1
MAX_BITS: Final = 8
BLOCK: Final = TILE
"""Coordinates that are rotated together: in the cache, and so many that the result is as good as Gaussian."""
LEAST_COORDINATES: Final = 32
"""A shorter tensor is sent raw: scales and header would cost what its bits save."""

_SEED_BYTES: Final = 8
_SCALE_BYTES: Final = 4
_RADIX: Final = 64
_MAX_EXPONENT: Final = 126
_CELLS: Final = 2**16
_CELLS_PER_UNIT: Final = 2**12
# The positive half of the Lloyd-Max quantizer of a standard Gaussian, for 1, 2 .. 8 bits (Max 1960,
# https://doi.org/10.1109/TIT.1960.1057548). Lloyd's iteration from quantiles on, with scipy.stats.norm in float64, until no level
# moved by 1e-13: levels are the means of their cells, boundaries the middles between levels.
# fmt: off
_LEVELS: Final = (
    (0.7978846,),
    (0.4527800, 1.5104176),
    (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
    (
        0.0658897, 0.1980518, 0.3313783, 0.4666995, 0.6049336, 0.7471357, 0.8945651, 1.0487833, 1.2118044, 1.3863403,
        1.5762281, 1.7872332, 2.0287284, 2.3177394, 2.6911196, 3.2607325,
    ),
    (
        0.0334095, 0.1002783, 0.1672969, 0.2345670, 0.3021928, 0.3702826, 0.4389497, 0.5083138, 0.5785030, 0.6496556,
        0.7219219, 0.7954677, 0.8704766, 0.9471549, 1.0257363, 1.1064882, 1.1897201, 1.2757945, 1.3651410, 1.4582764,
        1.5558312, 1.6585889, 1.7675419, 1.8839772, 2.0096110, 2.1468102, 2.2989812, 2.4713048, 2.6722738, 2.9174068,
        3.2404371, 3.7441013,
    ),
    (
        0.0168282, 0.0504909, 0.0841726, 0.1178863, 0.1516446, 0.1854607, 0.2193476, 0.2533187, 0.2873876, 0.3215679,
        0.3558740, 0.3903203, 0.4249216, 0.4596934, 0.4946515, 0.5298122, 0.5651927, 0.6008105, 0.6366843, 0.6728333,
        0.7092778, 0.7460391, 0.7831396, 0.8206030, 0.8584542, 0.8967200, 0.9354285, 0.9746100, 1.0142967, 1.0545232,
        1.0953267, 1.1367474, 1.1788286, 1.2216174, 1.2651651, 1.3095276, 1.3547663, 1.4009486, 1.4481489, 1.4964500,
        1.5459437, 1.5967331, 1.6489339, 1.7026770, 1.7581114, 1.8154077, 1.8747625, 1.9364046, 2.0006018, 2.0676715,
        2.1379934, 2.2120275, 2.2903392, 2.3736343, 2.4628114, 2.5590405, 2.6638865, 2.7795143, 2.9090471, 3.0572462,
        3.2319332, 3.4474303, 3.7349366, 4.1896942,
    ),
    (
        0.0084462, 0.0253394, 0.0422350, 0.0591346, 0.0760399, 0.0929524, 0.1098737, 0.1268056, 0.1437496, 0.1607073,
        0.1776805, 0.1946707, 0.2116798, 0.2287092, 0.2457608, 0.2628362, 0.2799372, 0.2970656, 0.3142230, 0.3314114,
        0.3486324, 0.3658880, 0.3831800, 0.4005102, 0.4178806, 0.4352932, 0.4527499, 0.4702527, 0.4878036, 0.5054048,
        0.5230583, 0.5407663, 0.5585310, 0.5763547, 0.5942396, 0.6121881, 0.6302026, 0.6482855, 0.6664394, 0.6846668,
        0.7029703, 0.7213526, 0.7398166, 0.7583650, 0.7770008, 0.7957270, 0.8145467, 0.8334630, 0.8524793, 0.8715989,
        0.8908253, 0.9101621, 0.9296130, 0.9491818, 0.9688726, 0.9886894, 1.0086364, 1.0287182, 1.0489392, 1.0693042,
        1.0898181, 1.1104860, 1.1313133, 1.1523054, 1.1734682, 1.1948076, 1.2163300, 1.2380418, 1.2599499, 1.2820615,
        1.3043840, 1.3269253, 1.3496937, 1.3726976, 1.3959463, 1.4194493, 1.4432166, 1.4672587, 1.4915870, 1.5162131,
        1.5411497, 1.5664098, 1.5920076, 1.6179578, 1.6442765, 1.6709804, 1.6980875, 1.7256170, 1.7535894, 1.7820269,
        1.8109531, 1.8403933, 1.8703751, 1.9009281, 1.9320842, 1.9638784, 1.9963485, 2.0295357, 2.0634852, 2.0982465,
        2.1338741, 2.1704282, 2.2079755, 2.2465899, 2.2863545, 2.3273619, 2.3697171, 2.4135387, 2.4589621, 2.5061426,
        2.5552594, 2.6065215, 2.6601740, 2.7165076, 2.7758707, 2.8386858, 2.9054729, 2.9768821, 3.0537420, 3.1371325,
        3.2285002, 3.3298485, 3.4440717, 3.5755880, 3.7316663, 3.9256378, 4.1865954, 4.6035356,
    ),
)
# fmt: on


class EdenCodec:
    """A head is the bits (1 byte) and the seed of the signs (8 bytes, little-endian).

    A body is a scale for each of its blocks (float32, little-endian), then the levels' numbers in units of 2^16 coordinates, the
    lowest first: bit plane by bit plane, the lowest first, eight coordinates a byte. Of each block, numbers to levels, Hadamard
    transform, times the scale, times the signs. These are the bits of Philox 4x64 (Salmon et al. 2011,
    https://doi.org/10.1145/2063384.2063405) with the seed as its key and the block's first coordinate in the upper words of its
    counter: low bits first, a set bit is a minus.
    """

    kind = "eden"
    has_head = True

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From one bit to eight, and the scales."""
        check_lossy(self.kind, spec)
        return _body_bytes(num_coordinates, MIN_BITS), min(_body_bytes(num_coordinates, MAX_BITS), MAX_BODY_BYTES)

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _EdenDecoder:
        """The same for every tensor with that head."""
        check_lossy(self.kind, spec)
        if head is None:
            raise PayloadError("a tensor of the codec 'eden' has no head")
        reader = ByteReader(head)
        bits, seed = reader.u8(), int.from_bytes(reader.take(_SEED_BYTES), "little")
        reader.done()
        if not MIN_BITS <= bits <= MAX_BITS:
            raise PayloadError(f"the codec 'eden' has {bits} bits; expected {MIN_BITS} to {MAX_BITS}")
        return _EdenDecoder(bits, seed)


class _EdenDecoder:
    def __init__(self, bits: int, seed: int) -> None:
        self._bits = bits
        self._seed = seed

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Block by block, clamped to what the tensor's type holds. Takes some 1.5 MiB."""
        expected = _body_bytes(len(out), self._bits)
        if len(body) != expected:
            raise PayloadError(f"an eden body of {len(body)} bytes; expected {expected}")
        blocks = list(_blocks(len(out)))
        scales = np.frombuffer(body, "<f4", len(blocks))
        # Levels have both signs already: no encoder writes a scale that is negative, be it zero.
        if not (np.isfinite(scales) & ~np.signbit(scales)).all():
            raise PayloadError("an eden body with a scale that is negative or not finite")
        packed = np.frombuffer(body, np.uint8, offset=scales.nbytes)
        levels, _ = _quantizer(self._bits)
        largest = min(torch.finfo(out.dtype).max, torch.finfo(torch.float32).max)
        numbers = np.empty(0, np.uint8)
        for (start, length), scale in zip(blocks, scales.tolist(), strict=True):
            if start % TILE == 0:
                unit = min(TILE, len(out) - start)
                numbers, packed = _unpack(packed, self._bits, unit), packed[_packed_bytes(unit, self._bits) :]
            block = levels.index_select(0, torch.from_numpy(numbers[start % TILE :][:length].astype(np.int32)))
            values = _flip(hadamard(block), self._seed, first + start).mul_(scale).clamp_(-largest, largest)
            out[start : start + length].copy_(values)


def eden_plan(spec: TensorSpec, *, bits: int, unbiased: bool, seed: int) -> TensorPlan:
    """Bodies of 2^20 coordinates, or with 8 bits of 983,040. A block x with the rotation x' and levels q is sent with a scale.

    Unbiased, it is |x|^2 / <x', q>, with which the estimate's mean over rotations is x; otherwise <x', q> / |q|^2, which has the
    least error. The error over |x|^2 of so many bits is that of the tables, e, in the latter case, else e / (1 - e).

    The plan's `encode` raises InvalidError, naming the tensor, where a float64 value is beyond float32. Its memory beside the body:
    some 1.5 MiB.
    """
    levels, nearest = _quantizer(bits)
    key = blake3(f"{seed}/{spec.name}".encode()).digest(_SEED_BYTES)

    def encode(first: int, tile: Tensor) -> memoryview:
        blocks = list(_blocks(len(tile)))
        scales = np.empty(len(blocks), "<f4")
        body = np.empty(_body_bytes(len(tile), bits), np.uint8)
        packed = body[scales.nbytes :]
        numbers = np.empty(min(TILE, len(tile)), np.uint8)
        for index, (start, length) in enumerate(blocks):
            values = narrow(spec.name, tile[start : start + length], torch.float32)
            exponent = _exponent(values)
            rotated = hadamard(_flip(values * 2.0**-exponent, int.from_bytes(key, "little"), first + start))
            # Its energy is the block's times the length. A block of zeros has the scale 0, and any levels.
            size = float(torch.linalg.vector_norm(rotated, dtype=torch.float64)) / math.sqrt(length) or 1.0
            chosen = nearest.index_select(0, _cells(rotated.mul_(1 / size)))
            reproduced = levels.index_select(0, chosen.to(torch.int32))
            inner, square = float(rotated.dot(reproduced)), float(reproduced.dot(reproduced))
            scale = length / inner if unbiased and inner else inner / square
            scales[index] = min(math.ldexp(size * scale / length, exponent), float(np.finfo(np.float32).max))
            numbers[start % TILE :][:length] = chosen.numpy()
            if (start + length) % TILE == 0 or start + length == len(tile):
                unit = start % TILE + length
                _pack(numbers[:unit], bits, packed[: _packed_bytes(unit, bits)])
                packed = packed[_packed_bytes(unit, bits) :]
        body[: scales.nbytes] = scales.view(np.uint8)
        return body.data

    fitting = (n for n in range(MAX_BODY_COORDINATES, 0, -TILE) if _body_bytes(n, bits) <= MAX_BODY_BYTES)
    return TensorPlan(EdenCodec.kind, bytes([bits]) + key, next(fitting), encode)


class EdenConfig(CodecTable):
    """Every coordinate in so many bits, whatever the values. For updates only."""

    kind: Literal["eden"] = Field(
        default="eden",
        description="Random rotation, then a few bits a value: an error that depends on the bits alone. Uplink only.",
    )
    bits: int = Field(
        default=2,
        ge=MIN_BITS,
        le=MAX_BITS,
        description="Bits per coordinate. The error of 1, 2, 3 and 4 bits is 0.57, 0.13, 0.036 and 0.0096 of an update's energy.",
    )
    unbiased: bool = Field(
        default=True,
        description="Errors that are zero on average and cancel over many clients. Off: a smaller error in one update (0.36 with 1 "
        "bit, 0.12 with 2), which comes out shorter by as much.",
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Floating parameters by this codec; buffers, other types and what has fewer than 32 coordinates raw."""
        return [
            eden_plan(spec, bits=self.bits, unbiased=self.unbiased, seed=seed)
            if is_lossy_parameter(spec) and spec.num_elements >= LEAST_COORDINATES
            else raw_plan(spec, source)
            for spec, source in tensors
        ]


# ------------------------------------------------------------------------------------------------------------------------ rotation


def hadamard(values: Tensor) -> Tensor:
    """The Hadamard transform (Sylvester's order, not normalized) of a float32 vector whose length is a power of two.

    H of 2^(a + b) is the Kronecker product of those of 2^a and 2^b. So the index is taken for digits of six bits, and each digit is
    transformed by a matrix product, which also turns the digits round: after the last they are where they were.
    """
    length, done = len(values), 1
    while done < length:
        radix = min(_RADIX, length // done)
        values = torch.mm(_hadamard_matrix(radix), values.view(-1, radix).T).view(-1)
        done *= radix
    return values


@cache
def _hadamard_matrix(order: int) -> Tensor:
    matrix = torch.ones((1, 1))
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _flip(values: Tensor, seed: int, first: int) -> Tensor:
    """Times random signs, in place, the same for the same block."""
    words = np.random.Philox(key=seed, counter=first << 64).random_raw(-(-len(values) // 64)).astype("<u8")
    flips = np.unpackbits(words.view(np.uint8), count=len(values), bitorder="little")
    # Integers move no bits but that of the sign.
    values.view(torch.int32).bitwise_xor_(torch.from_numpy(flips).to(torch.int32).bitwise_left_shift_(31))
    return values


def _blocks(num_coordinates: int) -> Iterator[tuple[int, int]]:
    """(start, length) of whole blocks, then of the binary digits of what is left, the largest first."""
    start = 0
    while start < num_coordinates:
        length = min(BLOCK, 1 << (num_coordinates - start).bit_length() - 1)
        yield start, length
        start += length


def _exponent(values: Tensor) -> int:
    """Of a power of two near the largest value, by which no square overflows or vanishes."""
    largest = float(torch.stack(torch.aminmax(values)).abs().max())
    return min(max(math.frexp(largest)[1], -_MAX_EXPONENT), _MAX_EXPONENT)


# ------------------------------------------------------------------------------------------------------------------- quantization


@cache
def _quantizer(bits: int) -> tuple[Tensor, Tensor]:
    """The 2^bits levels, ascending, float32; and the number of the one that is nearest to each cell of a fine grid, uint8.

    A search between the boundaries for each value would take longer than the rotation. The grid moves them by less than 2^-13.
    """
    upper = torch.tensor(_LEVELS[bits - 1])
    levels = torch.cat([-upper.flip(0), upper])
    middles = (torch.arange(_CELLS) + 0.5 - _CELLS / 2) / _CELLS_PER_UNIT
    return levels, torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _cells(values: Tensor) -> Tensor:
    """Where on that grid values lie, int32."""
    return (values * _CELLS_PER_UNIT).add_(_CELLS / 2).clamp_(0, _CELLS - 1).to(torch.int32)


def _packed_bytes(num_coordinates: int, bits: int) -> int:
    return bits * -(-num_coordinates // 8)


def _body_bytes(num_coordinates: int, bits: int) -> int:
    num_units, last = divmod(num_coordinates, TILE)
    num_scales = num_units + last.bit_count()
    return _SCALE_BYTES * num_scales + num_units * _packed_bytes(TILE, bits) + _packed_bytes(last, bits)


def _pack(numbers: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    planes = out.reshape(bits, -1)
    for bit in range(bits):
        planes[bit] = np.packbits(numbers >> np.uint8(bit) & np.uint8(1), bitorder="little")


def _unpack(packed: NDArray[np.uint8], bits: int, num_coordinates: int) -> NDArray[np.uint8]:
    planes = packed[: _packed_bytes(num_coordinates, bits)].reshape(bits, -1)
    numbers = np.zeros(num_coordinates, np.uint8)
    for bit in range(bits):
        numbers |= np.unpackbits(planes[bit], count=num_coordinates, bitorder="little") * np.uint8(1 << bit)
    return numbers
