"""LRQ, a low-rank quantizer: a matrix as the sum of a few outer products of small integers, and what that leaves, if it pays.

A client's update of a matrix is the sum of a few hundred outer products of related gradients: nearly low rank. PowerSGD (Vogels et
al. 2019, https://arxiv.org/abs/1905.13727) and ATOMO (Wang et al. 2018, https://arxiv.org/abs/1806.04090) send its factors as
floats, at a rank that somebody chose. Here one step D rules all, as reverse water-filling has it: singular vectors, each times its
singular value, are rounded to multiples of D and entropy-coded, and a component is kept if that lowers error + lambda * bits,
where lambda = (ln 2 / 6) D^2 is the slope of a uniform quantizer's rate-distortion curve. Gains are fitted to the rounded factors
by least squares. The codec fsq may code the residual at the same step.

Decoding is exact: a sum of integer products that stays below 2^53, times a power of two, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fed_core.codecs.base import Cost, TensorDecoder, TensorPlan, TileSource
from fed_core.codecs.entropy import ByteReader, Coder, Ints, svarint, varint
from fed_core.codecs.factors import Fit, Floats, fit_factors, read_factors, write_factors
from fed_core.codecs.floating import TILE, check_lossy, is_lossy
from fed_core.codecs.fsq import FsqAnalysis, FsqCodec, StepTooFineError
from fed_core.codecs.parametric import MAX_REACH
from fed_core.codecs.planning import LAMBDA
from fed_core.codecs.subspace import leading_triples
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES, MAX_HEAD_BYTES
from fed_core.specs import TensorSpec

MAX_FACTOR_SYMBOLS: Final = 2**24
"""What a head may make its reader hold, whatever the tensor: 64 MiB of int32, and as much as 192 MiB while it reads."""

# A matrix with a shorter side has hardly anything to gain.
_SHORTEST_SIDE = 5
# The last component kept has a squared singular value of 0.15 to 0.2 (rows + cols) D^2; one below this share never pays.
_FAINT = 0.08
_LEAST_MEAN = 5 / 12
_NUM_QUANTILES = 32
_GAIN_BITS = 10
_MAX_GAIN_BITS = 30
_BITS_PER_GAIN = 16
# Of a head, and of every group of components.
_HEADER_BITS = 48
_BLOCK_COORDINATES = 2**18
_TILE_WIDTH = 4096
# A value of 2^90 leaves room for sums over the largest matrix.
_MAX_VALUE_BITS = 90
# Float64 adds integers up to this without rounding.
_EXACT = 2**53
# Values are below 2^126, so that a residual added to them is finite too; above 2^-400, so that float64 never rounds them.
_MAX_EXPONENT = 126
_MIN_EXPONENT = -400


class NotLowRankError(ValueError):
    """The tensor is no matrix that singular components could describe; fsq holds it."""


class LrqCodec:
    """Decodes the factors once per tensor, then any body by a matrix product and, where there is a residual, by fsq.

    A head is: whether there is a residual; the rank; the power of two and the integers of the gains; the factors (`write_factors`);
    the residual's head. A body without residual is a zero byte.
    """

    kind = "lrq"
    has_head = True

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """One byte where there is no residual, else what fsq takes."""
        check_lossy(self.kind, spec)
        return 1, FsqCodec().body_bytes(_residual_spec(spec), num_coordinates)[1]

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> LrqDecoder:
        """Takes at most 2 * rank symbols per coordinate, and MAX_FACTOR_SYMBOLS."""
        check_lossy(self.kind, spec)
        if head is None:
            raise PayloadError("a tensor of the codec 'lrq' has no head")
        return LrqDecoder(spec, head)


class LrqDecoder:
    """Decodes bodies of one tensor, wherever they begin and end."""

    def __init__(self, spec: TensorSpec, head: bytes | memoryview) -> None:
        rows, cols = matrix_shape(spec)
        reader = ByteReader(head)
        has_residual, rank = reader.u8(), reader.varint()
        if has_residual > 1 or rank > min(rows, cols) or rank * (rows + cols) > MAX_FACTOR_SYMBOLS:
            raise PayloadError(
                f"a head of the codec 'lrq' begins {has_residual}, {rank} for a matrix of {rows} x {cols}"
            )
        exponent = reader.svarint()
        gains = [reader.svarint() for _ in range(rank)]
        factors = _Factors(read_factors(reader, rank, rows, cols), rows, gains, exponent)
        problem = factors.explain_inexact()
        if problem:
            raise PayloadError(f"factors of the codec 'lrq' {problem}")
        self._product = factors.product()
        self._residual: TensorDecoder | None = None
        if has_residual:
            self._residual = FsqCodec().decoder(_residual_spec(spec), reader.take(reader.left))
        reader.done()

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Raises PayloadError on a body that is neither a zero byte nor fsq's, whichever the head says."""
        if self._residual is None:
            if bytes(body[:2]) != b"\0":
                raise PayloadError(
                    f"a body of {len(body)} bytes of the codec 'lrq' without residual; expected a zero byte"
                )
            self._product.write(first, out)
            return
        residual, product = torch.empty(len(out)), torch.empty(len(out))
        self._residual.decode(first, body, residual)
        self._product.write(first, product)
        out.copy_(product.add_(residual))


class LrqAnalysis:
    """A matrix seen by its leading singular triples, which are found once; costs and plans take only those.

    `residual` None chooses, at each step, what has the lower error + lambda * bits. `match_gain` scales what is decoded so that its
    inner product with the tensor is |tensor|^2: the mean of many updates then keeps its length, and the error of each grows from d
    to d / (1 - d). Deterministic given the seed. Memory: O(max_rank * (rows + cols)) and a block of rows.

    Raises NotLowRankError for a tensor that does not fit, or holds values of 2^90 and more.
    """

    def __init__(
        self,
        spec: TensorSpec,
        source: TileSource,
        *,
        max_rank: int = 64,
        residual: bool | None = None,
        match_gain: bool = False,
        coder: Coder = "rans",
        seed: int = 0,
    ) -> None:
        if not self.fits(spec):
            raise ValueError(
                f"the codec 'lrq' is not for tensor {spec.name!r}, {spec.dtype} of shape {spec.shape}; take fsq"
            )
        self._spec, self._source = spec, source
        self._wants_residual, self._match_gain, self._coder = residual, match_gain, coder
        self._rows, self._cols = matrix_shape(spec)
        self._unit = self._find_unit()
        self._row_energy, self._col_energy = self._energies()
        self._energy = float(self._row_energy.sum())
        rank = min(max_rank, MAX_FACTOR_SYMBOLS // (self._rows + self._cols))
        left, self._values, right = leading_triples(self._blocks, self._rows, self._cols, rank, seed=seed)
        # They are kept while all tensors of an update are analyzed, and float32 is what they are good to.
        self._left, self._right = left.T.float().contiguous(), right.T.float().contiguous()
        self._last: _Rounded | None = None
        self._residuals: dict[int, FsqAnalysis] = {}

    @staticmethod
    def fits(spec: TensorSpec) -> bool:
        """Whether the tensor is a matrix of a floating type with at least five rows and columns, not too long for a head."""
        rows, cols = matrix_shape(spec)
        return is_lossy(spec) and min(rows, cols) >= _SHORTEST_SIDE and rows + cols <= MAX_FACTOR_SYMBOLS

    def cost(self, step: float) -> Cost:
        """Bits and error of what `plan` would make; an estimate only as far as there is a residual.

        Takes O(max_rank * (rows + cols)) operations; reads the tensor only where a residual may pay. Raises StepTooFineError.
        """
        return self._choose(step)[0]

    def plan(self, step: float) -> TensorPlan:
        """The plan at that step. Raises StepTooFineError where factors would take integers beyond MAX_REACH."""
        rounded = self._round(step)
        _, has_residual = self._choose(step)
        gains = rounded.gains * self._unit
        if self._match_gain and not has_residual and len(gains):
            gains *= self._energy / rounded.explained
        factors = _Factors.of(rounded.factors, self._rows, gains.tolist())
        head = bytes([has_residual]) + factors.gains_as_bytes()
        head += write_factors(rounded.factors, self._rows, rounded.fit, self._coder)
        if not has_residual:
            return _plan(head, _body_coordinates(self._cols), lambda first, tile: b"\0")
        product = factors.product()
        residual = self._analyze_residual(product).plan(step)
        return _plan(
            head + (residual.head or b""),
            residual.body_coordinates,
            lambda first, tile: residual.encode(first, product.subtracted_from(first, tile)),
        )

    def _find_unit(self) -> float:
        """The power of two above all values: scaled by it, no product overflows or vanishes."""
        extremes = [torch.stack(torch.aminmax(block)).abs().max() for _, block in self._read()]
        exponent = math.frexp(float(torch.stack(extremes).max()))[1]
        if exponent > _MAX_VALUE_BITS:
            raise NotLowRankError(
                f"tensor {self._spec.name!r} holds values of 2^{exponent - 1}, too large for 'lrq'; take fsq"
            )
        return 2.0 ** max(exponent, -126)

    def _read(self) -> Iterator[tuple[int, Tensor]]:
        height = max(1, _BLOCK_COORDINATES // self._cols)
        for row in range(0, self._rows, height):
            block = self._source(row * self._cols, min(height, self._rows - row) * self._cols)
            yield row, block.to(torch.float32).view(-1, self._cols)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        for row, block in self._read():
            yield row, block * (1 / self._unit)

    def _energies(self) -> tuple[Tensor, Tensor]:
        """Sums of squares of rows and of columns, float64."""
        rows, cols = torch.empty(self._rows, dtype=torch.float64), torch.zeros(self._cols, dtype=torch.float64)
        for row, block in self._blocks():
            squares = block.square_()
            rows[row : row + len(block)] = squares.sum(1)
            cols += squares.sum(0)
        return rows, cols

    def _round(self, step: float) -> _Rounded:
        """Factors at that step, as many components as pay, and their gains."""
        if self._last is not None and self._last.step == step:
            return self._last
        scale = self._unit / step
        # A unit vector has an entry of at least 1 / sqrt(2^24).
        if len(self._values) and float(self._values[0]) * scale > MAX_REACH * 2**12:
            raise _too_fine(step)
        num_bright = int((self._values.square() * scale**2 > _FAINT * (self._rows + self._cols)).sum())
        scaled = self._values[:num_bright, None] * scale
        left, right = (_round_factor(side[:num_bright] * scaled) for side in (self._left, self._right))
        rank = int((left.any(1) & right.any(1)).int().cumprod(0).sum())
        left, right = left[:rank], right[:rank]
        if rank and max(float(left.abs().max()), float(right.abs().max())) > MAX_REACH:
            raise _too_fine(step)
        factors = torch.cat([left, right], 1).int().numpy()
        fit = fit_factors(factors, self._rows)
        bits = np.cumsum([0.0, *(fit.bits + _BITS_PER_GAIN)])

        inner = ((left @ self._left.T.double()) * (right @ self._right.T.double())) @ self._values
        gram = (left @ left.T) * (right @ right.T)
        # The first r rows of a Cholesky factor are that of the first r components: one factor answers for every rank.
        root, failed_at = torch.linalg.cholesky_ex(gram)
        rank = int(failed_at) - 1 if failed_at else rank
        root = root[:rank, :rank]
        halfway = torch.linalg.solve_triangular(root, inner[:rank, None], upper=False)
        explained = np.cumsum([0.0, *halfway[:, 0].square().tolist()])
        rank = int(np.argmin(LAMBDA / scale**2 * bits[: rank + 1] - explained))
        gains = torch.linalg.solve_triangular(root[:rank, :rank].T, halfway[:rank], upper=True)[:, 0]
        self._last = _Rounded(step, factors[:rank], gains.numpy(), fit, float(bits[rank]), float(explained[rank]))
        return self._last

    def _choose(self, step: float) -> tuple[Cost, bool]:
        """The better of the two ways, and whether it has a residual."""
        rounded = self._round(step)
        error = max(0.0, self._energy - rounded.explained)
        if self._match_gain:
            error = error * self._energy / rounded.explained if rounded.explained > 0 else self._energy
        bits = rounded.bits + _HEADER_BITS * (1 + len(rounded.gains).bit_length())
        plain = Cost(bits, error * self._unit**2)
        if self._wants_residual is False or (self._wants_residual is None and not self._may_residual_pay(rounded)):
            return plain, False
        rest = self._residual_of(len(rounded.gains)).cost(step)
        both = Cost(bits + rest.bits, rest.squared_error)
        if self._wants_residual:
            return both, True
        return min((plain, False), (both, True), key=lambda way: way[0].squared_error + LAMBDA * step**2 * way[0].bits)

    def _may_residual_pay(self, rounded: _Rounded) -> bool:
        """Whether enough of the residual is so large that coding it can repay what its contexts cost.

        The variance at (i, j) is taken to be that of row i times that of column j over the mean.
        """
        rank, floor = len(rounded.gains), (rounded.step / self._unit) ** 2
        squares = self._values[:rank].square().float()
        rows = (self._row_energy - squares @ self._left[:rank].square()).clamp_min(0)
        cols = (self._col_energy - squares @ self._right[:rank].square()).clamp_min(0)
        total = float(rows.sum())
        if not total:
            return False
        quantiles = (torch.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
        rows, cols = (energy.sort()[0][(quantiles * len(energy)).long()] for energy in (rows, cols))
        variance = torch.outer(rows, cols / total)
        worth = self._rows * self._cols * float((variance - floor / 8).clamp_min(0).mean())
        return worth > 2 * LAMBDA * floor * (self._rows + self._cols)

    def _residual_of(self, rank: int) -> FsqAnalysis:
        """What about so many components leave before they are rounded, which hardly matters for the residual."""
        rank = min(2 ** (rank - 1).bit_length() if rank else 0, len(self._values))
        if rank not in self._residuals:
            scaled = self._right[:rank] * (self._values[:rank, None] * self._unit)
            self._residuals[rank] = self._analyze_residual(_Product(self._left[:rank], scaled))
        return self._residuals[rank]

    def _analyze_residual(self, product: _Product) -> FsqAnalysis:
        return FsqAnalysis(
            _residual_spec(self._spec),
            lambda first, num_coordinates: product.subtracted_from(first, self._source(first, num_coordinates)),
            match_gain=self._match_gain,
            coder=self._coder,
        )


class _Rounded(NamedTuple):
    """What rounding at a step leaves: integers (rank, rows + cols) and gains, their bits, and the energy that they explain."""

    step: float
    factors: Ints
    gains: Floats
    fit: Fit
    bits: float
    explained: float


class _Factors(NamedTuple):
    """The matrix that is the sum of gain * outer(left, right) * 2^exponent: all integers, left and right side by side."""

    integers: Ints
    rows: int
    gains: list[int]
    exponent: int

    @classmethod
    def of(cls, integers: Ints, rows: int, gains: list[float]) -> Self:
        """Rounds gains to _GAIN_BITS or more: the smallest to those, all to multiples of the same power of two.

        Raises StepTooFineError where that is not exact any more.
        """
        exponents = [math.frexp(gain)[1] for gain in gains if gain] or [0]
        exponent = max(min(exponents) - _GAIN_BITS, max(exponents) - _MAX_GAIN_BITS)
        factors = cls(integers, rows, [round(math.ldexp(gain, -exponent)) for gain in gains], exponent)
        problem = factors.explain_inexact()
        if problem:
            raise StepTooFineError(f"factors of the codec 'lrq' {problem}; take a larger step, or fsq")
        return factors

    def gains_as_bytes(self) -> bytes:
        return varint(len(self.gains)) + svarint(self.exponent) + b"".join(map(svarint, self.gains))

    def explain_inexact(self) -> str:
        """Empty where every value is exact in float64, and finite in float32 with room for a residual."""
        left, right = (np.abs(side).max(1, initial=0).tolist() for side in self._sides())
        largest = sum(abs(gain) * left * right for gain, left, right in zip(self.gains, left, right, strict=True))
        if largest >= _EXACT:
            return f"may sum to {largest:.2e}; expected less than 2^53"
        if self.exponent < _MIN_EXPONENT or largest.bit_length() + self.exponent > _MAX_EXPONENT:
            return f"are of 2^{self.exponent}; expected 2^{_MIN_EXPONENT} at least, and values below 2^{_MAX_EXPONENT}"
        return ""

    def product(self) -> _Product:
        left, right = (torch.from_numpy(side) for side in self._sides())
        scales = torch.tensor([math.ldexp(gain, self.exponent) for gain in self.gains], dtype=torch.float64)
        return _Product(left.short(), right * scales[:, None])

    def _sides(self) -> tuple[Ints, Ints]:
        return self.integers[:, : self.rows], self.integers[:, self.rows :]


class _Product:
    """left^T @ right, in parts. (rank, rows) of any type, (rank, cols) float64."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right
        self._buffer = torch.empty(2 * TILE, dtype=torch.float64)

    def write(self, first: int, out: Tensor) -> None:
        """Coordinates from `first` on, rounded once to the type of `out`."""
        cols = self._right.shape[1]
        for row, col, target in _rectangles(first, out, cols):
            height, width = target.shape
            width = min(width, _TILE_WIDTH)
            height = len(self._buffer) // width
            for top in range(0, target.shape[0], height):
                left = self._left[:, row + top : row + min(top + height, target.shape[0])].T.to(torch.float64)
                for start in range(0, target.shape[1], width):
                    part = target[top : top + height, start : start + width]
                    right = self._right[:, col + start : col + start + part.shape[1]]
                    product = self._buffer[: part.numel()].view(part.shape)
                    part.copy_(torch.mm(left, right, out=product))

    def subtracted_from(self, first: int, tile: Tensor) -> Tensor:
        """A flat tile that begins at `first`, as float32, less the product: fresh memory."""
        product = torch.empty(len(tile))
        self.write(first, product)
        return torch.sub(tile.to(torch.float32), product, out=product)


def matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    """A tensor as a matrix: its first dimension by the product of the rest; one row where there are fewer than two dimensions."""
    if len(spec.shape) < 2:
        return 1, spec.num_elements
    return spec.shape[0], math.prod(spec.shape[1:])


def _rectangles(first: int, out: Tensor, cols: int) -> Iterator[tuple[int, int, Tensor]]:
    """The rest of a begun row, whole rows, a row begun: (row, column, matrix view of that part of `out`)."""
    while len(out):
        row, col = divmod(first, cols)
        width = min(cols - col, len(out))
        height = len(out) // cols if width == cols else 1
        yield row, col, out[: height * width].view(height, width)
        first, out = first + height * width, out[height * width :]


def _round_factor(scaled: Tensor) -> Tensor:
    """(rank, length) -> whole numbers, rounded towards zero a little more than to the nearest.

    For a Laplace distribution of mean absolute value b, a step up costs 1 / (b ln 2) bits, worth lambda / (b ln 2) = 1 / (6 b) of
    squared error: it pays from k - 1/2 + 1 / (12 b) on.
    """
    sizes = scaled.abs()
    shift = 1 / (12 * sizes.mean(1, keepdim=True).clamp_min(_LEAST_MEAN))
    return (sizes + (0.5 - shift)).floor_().copysign_(scaled)


def _body_coordinates(cols: int) -> int:
    return MAX_BODY_COORDINATES // cols * cols or MAX_BODY_COORDINATES


def _residual_spec(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32")


def _plan(head: bytes, body_coordinates: int, encode: Callable[[int, Tensor], bytes | memoryview]) -> TensorPlan:
    if len(head) > MAX_HEAD_BYTES:
        raise StepTooFineError(f"a head of {len(head)} bytes of the codec 'lrq'; take a larger step, or fsq")
    return TensorPlan(LrqCodec.kind, head, body_coordinates, encode)


def _too_fine(step: float) -> StepTooFineError:
    return StepTooFineError(
        f"the step {step:.3g} makes integers beyond {MAX_REACH} of the codec 'lrq'; take a larger one, or fsq"
    )
