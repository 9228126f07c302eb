"""Leading singular triples of a matrix that is only seen in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fed_core.codecs.base import TileSource

RowBlocks = Callable[[], Iterator[tuple[int, Tensor]]]
"""One pass over a matrix: (first row, float32 block of whole rows), in order; a block is good until the next is asked for."""

_BLOCK_COORDINATES: Final = 2**18

OVERSAMPLING: Final = 8
NUM_PASSES: Final = 2

# Of a Gram matrix in float64, eigenvalues below this share of the largest are rounding.
_NEGLIGIBLE = 1e-13


class Triples(NamedTuple):
    """left (rows, r) and right (cols, r) with orthonormal columns, singular values (r,), falling; float64."""

    left: Tensor
    values: Tensor
    right: Tensor


def row_blocks(source: TileSource, rows: int, cols: int) -> Iterator[tuple[int, Tensor]]:
    """A matrix as `RowBlocks` has it, out of a source of its coordinates; no longer than 2^18 coordinates where rows are not."""
    height = max(1, _BLOCK_COORDINATES // cols)
    for row in range(0, rows, height):
        block = source(row * cols, min(height, rows - row) * cols)
        yield row, block.to(torch.float32).view(-1, cols)


def leading_triples(blocks: RowBlocks, rows: int, cols: int, rank: int, *, seed: int) -> Triples:
    """At most `rank` singular triples, fewer where the matrix has fewer to tell from rounding; exact up to the subspace found.

    Randomized subspace iteration (Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1). Each
    pass multiplies the matrix by a basis and, block by block, its transpose by the product, so that two passes make what the paper
    calls one power iteration, and the last pass already holds the projection that algorithm 5.1 would read the matrix again for.
    On client updates two passes find 0.99999 of the energy that the best subspace of that rank holds, one 0.9995.

    The products are float32, what is small is float64. Memory: O((rank + OVERSAMPLING) * (rows + cols)), and a block.
    """
    width = min(rank + OVERSAMPLING, rows, cols)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn((cols, width), generator=generator)
    # A basis as wide as the matrix misses nothing, however it was drawn.
    for _ in range(NUM_PASSES - 1 if width < min(rows, cols) else 0):
        _, projected = _multiply(blocks, rows, basis)
        projected = projected.double()
        basis = (projected @ _whitening(projected)).float()
    image, projected = (product.double() for product in _multiply(blocks, rows, basis))
    whitening = _whitening(image)
    # With Q = image @ whitening orthonormal, Q^T M is the transpose of this, and its SVD is that of Q Q^T M.
    inner = projected @ whitening
    squares, vectors = torch.linalg.eigh(inner.T @ inner)
    kept = squares.flip(0)[:rank]
    kept = kept[kept > _NEGLIGIBLE * kept[:1]]
    vectors = vectors.flip(1)[:, : len(kept)]
    values = kept.sqrt()
    return Triples(image @ (whitening @ vectors), values, inner @ vectors / values)


def _multiply(blocks: RowBlocks, rows: int, basis: Tensor) -> tuple[Tensor, Tensor]:
    """M B and M^T M B."""
    image = torch.empty((rows, basis.shape[1]))
    projected = torch.zeros_like(basis)
    for first, block in blocks():
        product = image[first : first + len(block)]
        torch.mm(block, basis, out=product)
        projected.addmm_(block.T, product)
    return image, projected


def _whitening(vectors: Tensor) -> Tensor:
    """W such that the columns of `vectors @ W` are orthonormal; directions that are only rounding are left out."""
    squares, rotation = torch.linalg.eigh(vectors.T @ vectors)
    is_kept = squares > _NEGLIGIBLE * squares[-1:].clamp_min(torch.finfo(torch.float64).tiny)
    whitening: Tensor = rotation[:, is_kept] / squares[is_kept].sqrt()
    return whitening
