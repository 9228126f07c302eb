"""Singular triples of a matrix that is seen in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fed_core.codecs.subspace import RowBlocks, leading_triples


def blocks_of(matrix: Tensor, height: int) -> RowBlocks:
    """The matrix in blocks, of which each is spoilt when the next is asked for."""

    def read() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(matrix), height):
            block = matrix[first : first + height].clone()
            yield first, block
            block.fill_(float("nan"))

    return read


def falling(rows: int, cols: int, decay: float, noise: float, seed: int = 0) -> Tensor:
    """Singular values 1, decay, decay^2 .., at most 12, and noise of that spectral norm."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(12, rows, cols)
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (rows, cols))
    spread = noise * torch.randn(rows, cols, generator=generator) / (rows**0.5 + cols**0.5)
    return left * decay ** torch.arange(float(rank)) @ right.T + spread


@pytest.mark.parametrize(("rows", "cols"), [(5, 5), (40, 9), (9, 40), (300, 200), (64, 1000)])
def test_components_are_as_good_as_those_of_a_whole_svd(rows: int, cols: int) -> None:
    matrix = falling(rows, cols, 0.6, 1e-3)
    left, values, right = leading_triples(blocks_of(matrix, 7), rows, cols, 10, seed=0)
    expected = torch.linalg.svdvals(matrix.double())[:10]
    torch.testing.assert_close(values, expected[: len(values)], rtol=1e-3, atol=1e-4)
    for side in (left, right):
        torch.testing.assert_close(side.T @ side, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-4)
    best = float(matrix.double().square().sum() - expected.square().sum())
    left_over = float((matrix.double() - left * values @ right.T).square().sum())
    assert left_over <= 1.01 * best + 1e-9


def test_a_matrix_of_low_rank_is_found_wholly() -> None:
    matrix = falling(80, 60, 0.5, 0.0)
    left, values, right = leading_triples(blocks_of(matrix, 33), 80, 60, 30, seed=0)
    assert 8 <= len(values) <= 30
    torch.testing.assert_close((left * values @ right.T).float(), matrix, rtol=0, atol=1e-4)


def test_a_matrix_of_zeros_has_no_components() -> None:
    left, values, right = leading_triples(blocks_of(torch.zeros(30, 20), 8), 30, 20, 5, seed=0)
    assert (left.shape, values.shape, right.shape) == ((30, 0), (0,), (20, 0))


def test_the_seed_decides_and_the_height_of_blocks_does_not() -> None:
    matrix = falling(90, 120, 0.8, 1e-2)
    once, again = (leading_triples(blocks_of(matrix, 90), 90, 120, 8, seed=3) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    thin = leading_triples(blocks_of(matrix, 11), 90, 120, 8, seed=3)
    torch.testing.assert_close(thin.values, once.values, rtol=1e-5, atol=0)
