"""The coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498, definition 2): of every coordinate the largest and the
smallest values are left out, a fraction `trim` of the updates on each side, and the rest is averaged.

Breakdown point: `trim`, which must be at least num_byzantine over the number of updates; without a `trim`, exactly num_byzantine
values go on each side. Every update counts the same. Memory: see `stack`.
"""

from __future__ import annotations

from torch import Tensor

from fed_server.aggregation.geometry import mean_of_rows, sorted_columns
from fed_server.aggregation.rule import Cohort, Combine, Rule
from fed_server.config import TrimmedMeanConfig


def trimmed_mean_rule(config: TrimmedMeanConfig) -> Rule:
    """The rule of a run."""

    def rule(cohort: Cohort) -> Combine:
        num_trimmed = config.num_trimmed(cohort.num_updates)
        return lambda block: trimmed_mean(block, num_trimmed)

    return rule


def trimmed_mean(block: Tensor, num_trimmed: int) -> Tensor:
    """The mean [k], float64, of every coordinate of a block [n, k] without its `num_trimmed` largest and smallest values."""
    return mean_of_rows(sorted_columns(block)[num_trimmed : len(block) - num_trimmed])
