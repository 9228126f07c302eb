"""PowerSGD's wire: each matrix as two thin factors of floats, at a rank that somebody chose. A baseline to compare with.

PowerSGD (Vogels et al. 2019, https://arxiv.org/abs/1905.13727) sends P (rows, r) and Q (cols, r) for a matrix M = P Q^T. What is
different here: its workers begin each step with the last one's Q and keep what was left out, which takes a state that a client who
is asked once in a hundred rounds does not have. So P and Q are the leading singular vectors themselves, which such a warm start
converges to, and nothing is carried along. Vectors are sent raw, as in the paper. `lrq` is what comes of choosing rank and bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import CodecTable
from fed_core.codecs.entropy import ByteReader, svarint, varint
from fed_core.codecs.floating import TILE, check_lossy, is_lossy_parameter
from fed_core.codecs.fsq import matrix_shape
from fed_core.codecs.raw import raw_plan
from fed_core.codecs.scales import rectangles
from fed_core.codecs.subspace import leading_triples, row_blocks
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES, MAX_HEAD_BYTES
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype

FactorType = Literal["float32", "float16"]

# What the first byte of a head says of the factors.
_TYPES: Final[tuple[FactorType, ...]] = ("float32", "float16")
_MAX_EXPONENT: Final = 126
# Sums stay finite before they are multiplied by the power of two.
_LARGEST_SUM: Final = 2.0**100
_HEADER_BYTES: Final = 16


class PowersgdCodec:
    """A head is: the type of the factors (0: float32, 1: float16), the rank r, the exponent e; P^T (r, rows) and Q^T (r, cols).

    A value is 2^e * (P_1 Q_1 + P_2 Q_2 + ..) in float32, every product and every sum rounded once, in this order: the same on every
    machine. A body is a zero byte.
    """

    kind = "powersgd"
    has_head = True

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """One byte: the head says it all."""
        check_lossy(self.kind, spec)
        return 1, 1

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _PowersgdDecoder:
        """Takes 4 bytes for each factor's value."""
        check_lossy(self.kind, spec)
        if head is None:
            raise PayloadError("a tensor of the codec 'powersgd' has no head")
        return _PowersgdDecoder(spec, head)


class _PowersgdDecoder:
    def __init__(self, spec: TensorSpec, head: bytes | memoryview) -> None:
        rows, self._cols = matrix_shape(spec)
        reader = ByteReader(head)
        type_index, rank, exponent = reader.u8(), reader.varint(), reader.svarint()
        if type_index >= len(_TYPES) or rank > min(rows, self._cols) or abs(exponent) > _MAX_EXPONENT:
            raise PayloadError(
                f"a head of the codec 'powersgd' begins {type_index}, {rank}, {exponent} for a matrix of {rows} x {self._cols}"
            )
        dtype = np.dtype(_TYPES[type_index])
        length = rank * (rows + self._cols)
        if reader.left != length * dtype.itemsize:
            raise PayloadError(f"factors of {reader.left} bytes; expected {length * dtype.itemsize}")
        factors = torch.from_numpy(np.frombuffer(reader.take(reader.left), dtype).astype(np.float32))
        self._left = factors[: rank * rows].view(rank, rows)
        self._right = factors[rank * rows :].view(rank, self._cols)
        self._unit = 2.0**exponent
        if not _largest_sum(self._left, self._right) <= _LARGEST_SUM:
            raise PayloadError("factors of the codec 'powersgd' that are not finite, or whose products may not be")

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Component by component, tile by tile, clamped to what the tensor's type holds. Takes 0.5 MiB."""
        if bytes(body[:2]) != b"\0":
            raise PayloadError(f"a body of {len(body)} bytes of the codec 'powersgd'; expected a zero byte")
        largest = min(torch.finfo(out.dtype).max, torch.finfo(torch.float32).max)
        sums, products = torch.empty(min(TILE, len(out))), torch.empty(min(TILE, len(out)))
        for row, col, target in _tiles(first, out, self._cols):
            height, width = target.shape
            total, product = (buffer[: target.numel()].view(height, width) for buffer in (sums, products))
            total.zero_()
            for left, right in zip(self._left, self._right, strict=True):
                total.add_(torch.mul(left[row : row + height, None], right[None, col : col + width], out=product))
            target.copy_(total.mul_(self._unit).clamp_(-largest, largest))


def powersgd_plan(spec: TensorSpec, source: TileSource, *, rank: int, values: FactorType, seed: int) -> TensorPlan:
    """The leading `rank` singular components, or raw where the factors would not be shorter, or too long for a head.

    Reads the tensor four times. Memory: O(rank * (rows + cols)), and a block of rows. Deterministic given the seed.
    """
    rows, cols = matrix_shape(spec)
    dtype = torch_dtype(values)
    head_bytes = _HEADER_BYTES + rank * (rows + cols) * dtype.itemsize
    if min(rows, cols) < 2 or head_bytes >= min(spec.num_bytes, MAX_HEAD_BYTES):
        return raw_plan(spec, source)

    largest = max(float(torch.stack(torch.aminmax(block)).abs().max()) for _, block in row_blocks(source, rows, cols))
    if math.isinf(largest):  # a float64 beyond float32
        return raw_plan(spec, source)
    exponent = min(max(math.frexp(largest)[1], -_MAX_EXPONENT), _MAX_EXPONENT)
    unit = 2.0**-exponent
    left, sizes, right = leading_triples(
        lambda: ((row, block * unit) for row, block in row_blocks(source, rows, cols)), rows, cols, rank, seed=seed
    )
    # Shared between both sides, singular values leave neither beyond float16's range.
    factors = torch.cat([(side * sizes.sqrt()).T.reshape(-1) for side in (left, right)]).to(dtype)
    head = (
        bytes([_TYPES.index(values)])
        + varint(len(sizes))
        + svarint(exponent)
        + factors.view(torch.uint8).numpy().tobytes()
    )
    body_coordinates = MAX_BODY_COORDINATES // cols * cols or MAX_BODY_COORDINATES
    return TensorPlan(PowersgdCodec.kind, head, body_coordinates, lambda first, tile: b"\0")


class PowersgdConfig(CodecTable):
    """Matrices as products of two thin ones."""

    kind: Literal["powersgd"] = Field(
        default="powersgd",
        description="Matrices as products of two thin ones, of floats; the rest raw. For comparisons.",
    )
    rank: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="Columns of both factors: how many singular components of each matrix are sent.",
    )
    values: FactorType = Field(
        default="float32", description="Type of the factors. float16 halves them, and loses nothing that shows."
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Matrices of a floating type by this codec where that is shorter, all else raw: vectors, buffers, integers."""
        return [
            powersgd_plan(spec, source, rank=self.rank, values=self.values, seed=seed)
            if is_lossy_parameter(spec)
            else raw_plan(spec, source)
            for spec, source in tensors
        ]


def _largest_sum(left: Tensor, right: Tensor) -> float:
    """No sum of products exceeds it; NaN or infinite where a factor is."""
    if not left.numel() or not right.numel():
        return 0.0
    return float((left.abs().amax(1).double() * right.abs().amax(1).double()).sum())


def _tiles(first: int, out: Tensor, cols: int) -> Iterator[tuple[int, int, Tensor]]:
    """(row, column, matrix view of that part of `out`) of at most TILE coordinates each."""
    for part in rectangles(first, len(out), cols):
        matrix = part.of(out)
        width = min(part.num_columns, TILE)
        height = TILE // width
        for top in range(0, part.num_rows, height):
            for start in range(0, part.num_columns, width):
                yield part.row + top, part.column + start, matrix[top : top + height, start : start + width]
