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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import Analysis, Cost, TensorDecoder, TensorPlan, TileSource
from fed_core.codecs.entropy import ByteReader, Coder, Ints, varint
from fed_core.codecs.factors import Fit, Floats, fit_factors
from fed_core.codecs.floating import check_lossy, is_lossy
from fed_core.codecs.fsq import MAX_BODY as MAX_RESIDUAL_BODY
from fed_core.codecs.fsq import FsqAnalysis, FsqCodec, matrix_shape
from fed_core.codecs.parametric import MAX_REACH
from fed_core.codecs.planning import LAMBDA, LossyTable, Rival, StepTooFineError, lagrangian, plan_tensors
from fed_core.codecs.products import Factors, Product
from fed_core.codecs.subspace import leading_triples, row_blocks
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_COORDINATES, MAX_HEAD_BYTES
from fed_core.specs import TensorSpec

MAX_FACTOR_SYMBOLS: Final = 2**23
"""What a head may make its reader hold, whatever the tensor: some 80 MiB, and twice that while it reads."""

# A matrix with a shorter side has hardly anything to gain.
_SHORTEST_SIDE = 5
# The last component kept has a squared singular value of 0.15 to 0.2 (rows + cols) D^2; one below this share never pays.
_FAINT = 0.08
# Factors that are nearly all zero are rounded as those of this mean absolute value are.
_LEAST_MEAN = 5 / 12
_NUM_QUANTILES = 16
# A residual is looked at if it is expected to bring error + lambda * bits below this share; what comes out is a little more.
_HOPEFUL = 0.95
# What the contexts of a residual take for each row and column.
_CONTEXT_BITS = 2
_BITS_PER_GAIN = 16
# Of a head, and of every group of components.
_HEADER_BITS = 48
# A value of 2^90 leaves room for sums over the largest matrix.
_MAX_VALUE_BITS = 90


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
        """One byte where there is no residual, as in any body that is too long for fsq; else what fsq takes."""
        check_lossy(self.kind, spec)
        if num_coordinates > MAX_RESIDUAL_BODY:
            return 1, 1
        return FsqCodec().body_bytes(_residual_spec(spec), num_coordinates)

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
        self._product = Factors.read(reader, rank, rows, cols).product()
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
        largest = min(torch.finfo(out.dtype).max, torch.finfo(torch.float32).max)
        out.copy_(product.add_(residual).clamp_(-largest, largest))


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
            raise NotLowRankError(
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
        self._residual_rival = Rival()
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
        return self._matched(self._choose(step))

    def plan(self, step: float) -> TensorPlan:
        """The plan at that step. Raises StepTooFineError where factors would take integers beyond MAX_REACH."""
        rounded, way = self._round(step), self._choose(step)
        integers, gains = rounded.integers[: way.rank], rounded.gains(way.rank) * self._unit
        if way.has_residual and self._match_gain:
            product = Factors.of(integers, self._rows, gains.tolist()).product()
            way = way._replace(left_over=self._analyze_residual(product, 1.0).cost(step).squared_error)
        gain = self._gain(way)
        factors = Factors.of(integers, self._rows, (gains * gain).tolist())
        problem = factors.explain_inexact()
        if problem:
            raise StepTooFineError(f"factors of tensor {self._spec.name!r} {problem}; take a larger step, or fsq")
        head = bytes([way.has_residual]) + varint(way.rank) + factors.write(rounded.fit, self._coder)
        if not way.has_residual:
            return _plan(head, _body_coordinates(self._cols), lambda first, tile: b"\0")
        product = factors.product()
        residual = self._analyze_residual(product, gain).plan(step * gain)
        return _plan(
            head + (residual.head or b""),
            residual.body_coordinates,
            lambda first, tile: residual.encode(first, product.subtracted_from(first, tile, gain)),
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
        return row_blocks(self._source, self._rows, self._cols)

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
        """Factors at that step: all components that might pay."""
        if self._last is not None and self._last.step == step:
            return self._last
        scale = self._unit / step
        # A unit vector of 2^23 entries has one of 2^-11.5 at least.
        if len(self._values) and float(self._values[0]) * scale > MAX_REACH * 2**12:
            raise _too_fine(step)
        num_bright = int((self._values.square() * scale**2 > _FAINT * (self._rows + self._cols)).sum())
        scaled = self._values[:num_bright, None] * scale
        left, right = (_round_factor(side[:num_bright] * scaled) for side in (self._left, self._right))
        rank = int((left.any(1) & right.any(1)).int().cumprod(0).sum())
        left, right = left[:rank], right[:rank]
        if rank and max(float(left.abs().max()), float(right.abs().max())) > MAX_REACH:
            raise _too_fine(step)
        inner = ((left @ self._left.T.double()) * (right @ self._right.T.double())) @ self._values
        # The first r rows of a Cholesky factor are that of the first r components: one least-squares fit answers for every rank.
        root, failed_at = torch.linalg.cholesky_ex((left @ left.T) * (right @ right.T))
        rank = int(failed_at) - 1 if failed_at else rank
        root = root[:rank, :rank]
        halfway = torch.linalg.solve_triangular(root, inner[:rank, None], upper=False)
        integers = torch.cat([left[:rank], right[:rank]], 1).int().numpy()
        fit = fit_factors(integers, self._rows)
        bits = np.cumsum([0.0, *(fit.bits + _BITS_PER_GAIN)])
        bits += [_HEADER_BITS * (1 + count.bit_length()) for count in range(rank + 1)]
        explained = np.cumsum([0.0, *halfway[:, 0].square().tolist()])
        left_over = np.maximum(0.0, self._energy - explained) * self._unit**2
        self._last = _Rounded(step, integers, fit, root, halfway, bits, left_over)
        return self._last

    def _choose(self, step: float) -> _Way:
        """The better of the two ways, or the one that was asked for."""
        rounded = self._round(step)
        price = LAMBDA * step**2
        bits, left_over = rounded.bits, rounded.left_over
        rank = int(np.argmin(left_over + price * bits))
        plain = _Way(rank, float(bits[rank]), float(left_over[rank]), False)
        if self._wants_residual is False or (self._wants_residual is None and not plain.left_over):
            return plain
        # With a residual fewer components pay: what they would say, it says nearly as well.
        expected = self._expect(plain, left_over, step) + price * (bits + _CONTEXT_BITS * (self._rows + self._cols))
        rank = int(np.argmin(expected))
        if self._wants_residual is None:
            is_hopeless = expected[rank] > _HOPEFUL * (plain.left_over + price * plain.bits)
            if is_hopeless or not self._residual_rival.may_lead(step):
                return plain
        residual = self._residual_cost(rank, float(left_over[rank]), step)
        both = _Way(rank, float(bits[rank]) + residual.bits, residual.squared_error, True)
        if self._wants_residual:
            return both
        of_plain, of_both = (lagrangian(self._matched(way), step) for way in (plain, both))
        self._residual_rival.note(step, of_both, min(of_plain, of_both))
        return plain if of_plain <= of_both else both

    def _expect(self, plain: _Way, left_over: Floats, step: float) -> Floats:
        """Error + lambda * bits of an ideally coded Gaussian residual of each energy: reverse water-filling.

        The variance at (i, j) is that of row i times that of column j over the mean, as the components of `plain` leave them.
        """
        squares = self._values[: plain.rank].square().float()
        rows = (self._row_energy - squares @ self._left[: plain.rank].square()).clamp_min(0)
        cols = (self._col_energy - squares @ self._right[: plain.rank].square()).clamp_min(0)
        # What rounding leaves is all over the matrix.
        noise = max(0.0, (plain.left_over - self._tail(plain.rank)) / self._unit**2)
        rows, cols = rows + noise / self._rows, cols + noise / self._cols
        quantiles = (torch.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
        rows, cols = (energy.sort()[0][(quantiles * len(energy)).long()] for energy in (rows, cols))
        variances = torch.outer(rows, cols).reshape(-1).numpy()
        variances = variances / variances.sum() if variances.any() else np.full(len(variances), 1 / len(variances))
        water = step**2 / 12 * self._rows * self._cols / len(variances)
        depth = np.outer(left_over, variances) / water
        expected: Floats = water * np.where(depth > 1, 1 + np.log(np.maximum(depth, 1)), depth).sum(1)
        return expected

    def _residual_cost(self, rank: int, energy: float, step: float) -> Cost:
        """What coding the residual of so many components takes, of the energy that is left after rounding.

        Told by what about so many components leave before they are rounded, or fewer where that is hardly anything: a source of
        other energy costs at one step what this one costs at another. Ranks within 9 % share a look at the tensor.
        """
        if not energy:
            return Cost(8.0, 0.0)
        while rank and self._tail(rank) < energy / 4:
            rank -= 1
        rank = math.floor(2 ** (math.floor(8 * math.log2(rank)) / 8)) if rank else 0
        if rank not in self._residuals:
            scaled = self._right[:rank] * (self._values[:rank, None] * self._unit)
            self._residuals[rank] = self._analyze_residual(Product(self._left[:rank], scaled), 1.0)
        ratio = energy / self._tail(rank)
        cost = self._residuals[rank].cost(step / math.sqrt(ratio))
        return Cost(cost.bits, min(cost.squared_error * ratio, energy))

    def _tail(self, rank: int) -> float:
        """|x - x'|^2 with the first components as they are."""
        return max(0.0, self._energy - float(self._values[:rank].square().sum())) * self._unit**2

    def _matched(self, way: _Way) -> Cost:
        return Cost(way.bits, way.left_over * self._gain(way))

    def _gain(self, way: _Way) -> float:
        """What makes the inner product with the tensor what it should be, where that is wanted: of the error, a factor too."""
        energy = self._energy * self._unit**2
        return energy / (energy - way.left_over) if self._match_gain and way.left_over < energy else 1.0

    def _analyze_residual(self, product: Product, gain: float) -> FsqAnalysis:
        """Of the tensor times the gain less the product, in whose factors the gain is already."""
        return FsqAnalysis(
            _residual_spec(self._spec),
            lambda first, count: product.subtracted_from(first, self._source(first, count), gain),
            coder=self._coder,
        )


class _Way(NamedTuple):
    """A way to send a matrix: its components, its bits, and |x|^2 - <x, x'> of it before gains are matched."""

    rank: int
    bits: float
    left_over: float
    has_residual: bool


class LrqConfig(LossyTable):
    """Matrices by their leading singular components, everything else as fsq has it."""

    kind: Literal["lrq"] = Field(
        default="lrq", description="Matrices as sums of outer products of small integers, the rest as fsq does."
    )
    max_rank: int = Field(
        default=64,
        ge=1,
        le=1024,
        description="Components looked for in each matrix; those that pay are sent. More takes longer.",
    )
    residual: bool | None = Field(
        default=None,
        description="Whether what the components leave is coded too, by fsq. Unset: where it pays.",
        examples=[False],
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Matrices by lrq, even where fsq is shorter; what is no matrix by fsq, or if small by uniform."""

        def analyze(spec: TensorSpec, source: TileSource) -> Iterator[Analysis]:
            try:
                yield LrqAnalysis(
                    spec,
                    source,
                    max_rank=self.max_rank,
                    residual=self.residual,
                    match_gain=self.match_gain,
                    coder=self.coder,
                    seed=seed,
                )
            except NotLowRankError:
                yield FsqAnalysis(spec, source, match_gain=self.match_gain, coder=self.coder)

        return plan_tensors(tensors, analyze, self.aim, seed=seed)


class _Rounded(NamedTuple):
    """Components rounded at a step: integers (rank, rows + cols); and for the first 0 .. rank of them bits and energy left over.

    `root` is the Cholesky factor of the Gram matrix of the rounded components, `halfway` root^-1 times their inner products with
    the matrix.
    """

    step: float
    integers: Ints
    fit: Fit
    root: Tensor
    halfway: Tensor
    bits: Floats
    left_over: Floats

    def gains(self, rank: int) -> Floats:
        """What the first components are to be multiplied by, fitted by least squares."""
        gains = torch.linalg.solve_triangular(self.root[:rank, :rank].T, self.halfway[:rank], upper=True)
        return np.asarray(gains[:, 0])


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
