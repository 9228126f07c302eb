"""The coordinate-wise median (Yin et al. 2018, arXiv:1803.01498, definition 1): of an even number the mean of the middle two.

Breakdown point: fewer than half of the updates. Every update counts the same, as in the paper: what a site says of its number of
examples would be a way to vote twice. Memory: see `stack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_server.aggregation.geometry import sorted_columns
from fed_server.aggregation.rule import Rule
from fed_server.config import MedianConfig


def median_rule(config: MedianConfig) -> Rule:
    """The rule of a run."""
    return lambda cohort: coordinate_median


def coordinate_median(block: Tensor) -> Tensor:
    """The median [k], float64, of every coordinate of a block [n, k]."""
    return middle(sorted_columns(block))


def middle(values: Tensor) -> Tensor:
    """The median [k], float64, of values [n, k] in ascending order."""
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    # Halved before they are added: the sum of two of the largest doubles is none.
    return low.to(torch.float64) * 0.5 + high.to(torch.float64) * 0.5
