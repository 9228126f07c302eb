"""Nearest-neighbour mixing before a rule (Allouah et al. 2023, arXiv:2302.01772, algorithm 2): every update becomes the mean of the
n - f updates nearest to it, itself among them.

Where sites differ much, honest updates lie so far apart that a rule takes them for bad or lets bad ones in between; their means lie
closer together. Sums are taken on the round's grid (see `grid`), where they are exact in any order. Cost: n^2 products per
coordinate, twice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neighbours(squared: Tensor, num_byzantine: int) -> Tensor:
    """Who is averaged into whom [n, n], float64: 1 in row i for the n - f updates nearest to i by the squared distances [n, n]."""
    num_nearest = len(squared) - num_byzantine
    nearest = squared.argsort(dim=1, stable=True)[:, :num_nearest]
    return torch.zeros_like(squared).scatter_(1, nearest, 1.0)


def mix_products(products: Tensor, chosen: Tensor) -> Tensor:
    """The inner products [n, n] of the mixed updates, out of those of the updates."""
    means = chosen / chosen[0].sum()
    return means @ products @ means.T


def mix(block: Tensor, chosen: Tensor, exponent: int) -> Tensor:
    """A block [n, k] of the mixed updates, float64: means of values rounded to whole multiples of 2**exponent."""
    steps = (block.to(torch.float64) * 2.0**-exponent).round_()
    return (chosen @ steps).mul_(2.0**exponent).div_(float(chosen[0].sum()))
