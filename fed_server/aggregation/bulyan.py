"""Bulyan (El Mhamdi et al. 2018, arXiv:1802.07927, section 4) over Krum.

First Krum chooses, n - 2 f times over, the best of the updates that are left. Then every coordinate becomes the mean of the n - 4 f
values among the chosen that are nearest to their median: what hides a few large coordinates in an update that looks near as a whole
is left out there. Near the end of the choice fewer than f + 3 updates are left, for which Krum's number of neighbours is not
defined; we count at least the nearest.

Breakdown point: f of n >= 4 f + 3 updates. Every update counts the same. Memory: see `stack`, and 8 n^2 bytes. Cost: n^2 products
per coordinate, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_server.aggregation.geometry import sorted_columns, squared_distances
from fed_server.aggregation.krum import krum_scores
from fed_server.aggregation.median import middle
from fed_server.aggregation.rule import Cohort, Combine, Rule
from fed_server.config import BulyanConfig


def bulyan_rule(config: BulyanConfig) -> Rule:
    """The rule of a run."""

    def rule(cohort: Cohort) -> Combine:
        num_byzantine = config.num_byzantine
        chosen = choose(squared_distances(cohort.inner_products()), num_byzantine)
        return lambda block: mean_near_median(block[chosen], cohort.num_updates - 4 * num_byzantine)

    return rule


def choose(squared: Tensor, num_byzantine: int) -> list[int]:
    """The n - 2 f updates that Krum chooses one after the other, by the squared distances [n, n] between them; in ascending
    order."""
    left = list(range(len(squared)))
    chosen: list[int] = []
    for _ in range(len(squared) - 2 * num_byzantine):
        best = int(krum_scores(squared[left][:, left], num_byzantine).argmin())
        chosen.append(left.pop(best))
    return sorted(chosen)


def mean_near_median(block: Tensor, num_averaged: int) -> Tensor:
    """The mean [k], float64, of the `num_averaged` values of every coordinate of a block [m, k] that are nearest to its median."""
    values = sorted_columns(block).to(torch.float64)
    median = middle(values)
    # In ascending order the nearest lie side by side: the best window is the one whose farther end is nearest.
    best = torch.zeros(values.shape[1], dtype=torch.int64)
    reach = torch.full((values.shape[1],), torch.inf, dtype=torch.float64)
    for first in range(len(values) - num_averaged + 1):
        farther = torch.maximum(median - values[first], values[first + num_averaged - 1] - median)
        is_better = farther < reach
        best[is_better] = first
        reach = torch.minimum(reach, farther)
    total = torch.zeros_like(median)
    for index, row in enumerate(values):
        total.add_(torch.where((best <= index) & (index < best + num_averaged), row, 0.0))
    return total.div_(num_averaged)
