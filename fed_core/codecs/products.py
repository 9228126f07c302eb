"""Matrices that are sums of a few outer products: those of integers, which decode alike on every machine, and their tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fed_core.codecs.entropy import ByteReader, Coder, Ints, svarint
from fed_core.codecs.factors import Fit, read_factors, write_factors
from fed_core.codecs.floating import TILE
from fed_core.errors import PayloadError

_GAIN_BITS = 10
_MAX_GAIN_BITS = 30
# Float64 adds integers up to this without rounding.
_EXACT = 2**53
# Values are below 2^126, so that a residual added to them is finite too; above 2^-400, so that float64 never rounds them.
_MAX_EXPONENT = 126
_MIN_EXPONENT = -400
_LARGEST = 2.0**_MAX_EXPONENT
_TILE_WIDTH = 4096


class Factors(NamedTuple):
    """The matrix that is the sum of gain * outer(left, right) * 2^exponent: all integers, left and right side by side."""

    integers: Ints
    rows: int
    gains: list[int]
    exponent: int

    @classmethod
    def of(cls, integers: Ints, rows: int, gains: list[float]) -> Self:
        """Rounds gains to _GAIN_BITS or more: the smallest to those, all to multiples of the same power of two."""
        exponents = [math.frexp(gain)[1] for gain in gains if gain] or [0]
        exponent = max(min(exponents) - _GAIN_BITS, max(exponents) - _MAX_GAIN_BITS)
        return cls(integers, rows, [round(math.ldexp(gain, -exponent)) for gain in gains], exponent)

    @classmethod
    def read(cls, reader: ByteReader, rank: int, rows: int, cols: int) -> Self:
        """What `write` wrote. Raises PayloadError, also where values would not be exact."""
        exponent = reader.svarint()
        gains = [reader.svarint() for _ in range(rank)]
        factors = cls(read_factors(reader, rank, rows, cols), rows, gains, exponent)
        problem = factors.explain_inexact()
        if problem:
            raise PayloadError(f"factors of a matrix {problem}")
        return factors

    def write(self, fit: Fit, coder: Coder) -> bytes:
        """The exponent, the gains, the integers."""
        gains = svarint(self.exponent) + b"".join(map(svarint, self.gains))
        return gains + write_factors(self.integers, self.rows, fit, coder)

    def explain_inexact(self) -> str:
        """Empty where every value is exact in float64, and finite in float32 with room for a residual."""
        left, right = (np.abs(side).max(1, initial=0).tolist() for side in self._sides())
        largest = sum(abs(gain) * left * right for gain, left, right in zip(self.gains, left, right, strict=True))
        if largest >= _EXACT:
            return f"may sum to {largest:.2e}; expected less than 2^53"
        if self.exponent < _MIN_EXPONENT or largest.bit_length() + self.exponent > _MAX_EXPONENT:
            return f"are of 2^{self.exponent}; expected 2^{_MIN_EXPONENT} at least, and values below 2^{_MAX_EXPONENT}"
        return ""

    def product(self) -> Product:
        left, right = (torch.from_numpy(side) for side in self._sides())
        scales = torch.tensor([math.ldexp(gain, self.exponent) for gain in self.gains], dtype=torch.float64)
        return Product(left.short(), right * scales[:, None])

    def _sides(self) -> tuple[Ints, Ints]:
        return self.integers[:, : self.rows], self.integers[:, self.rows :]


class Product:
    """left^T @ right, in parts. (rank, rows) of any type, (rank, cols) float64."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def write(self, first: int, out: Tensor) -> None:
        """Coordinates from `first` on, rounded once to the type of `out`. Takes 0.5 MiB."""
        largest = torch.finfo(out.dtype).max
        buffer = torch.empty(min(TILE, len(out)), dtype=torch.float64)
        for row, col, target in _rectangles(first, out, self._right.shape[1]):
            width = min(target.shape[1], _TILE_WIDTH)
            height = len(buffer) // width
            for top in range(0, target.shape[0], height):
                left = self._left[:, row + top : row + min(top + height, target.shape[0])].T.to(torch.float64)
                for start in range(0, target.shape[1], width):
                    part = target[top : top + height, start : start + width]
                    right = self._right[:, col + start : col + start + part.shape[1]]
                    product = torch.mm(left, right, out=buffer[: part.numel()].view(part.shape))
                    if largest < _LARGEST:
                        product.clamp_(-largest, largest)
                    # Whether a zero comes out negative is up to the library that multiplies: adding zero makes it positive.
                    part.copy_(product).add_(0.0)

    def subtracted_from(self, first: int, tile: Tensor, gain: float) -> Tensor:
        """A flat tile that begins at `first`, times a gain, less the product: float32, fresh memory."""
        product = torch.empty(len(tile))
        self.write(first, product)
        return torch.sub(tile.to(torch.float32) * gain, product, out=product)


def _rectangles(first: int, out: Tensor, cols: int) -> Iterator[tuple[int, int, Tensor]]:
    """The rest of a begun row, whole rows, a row begun: (row, column, matrix view of that part of `out`)."""
    while len(out):
        row, col = divmod(first, cols)
        width = min(cols - col, len(out))
        height = len(out) // cols if width == cols else 1
        yield row, col, out[: height * width].view(height, width)
        first, out = first + height * width, out[height * width :]
