"""The geometric median: the point whose distances to all updates add up to the least (RFA: Pillutla, Kakade, Harchaoui,
arXiv:1912.13445, algorithm 2, the smoothed Weiszfeld algorithm).

    v <- sum_i b_i x_i / sum_i b_i,    b_i = 1 / max(smoothing, |v - x_i|),    from the mean

We differ in three ways. Every update counts the same, where the paper weights by examples: half of the weight breaks the median,
and a site says its number of examples itself. `smoothing` is relative to the median of the first distances, where the paper's is a
length. And a step costs n^2 operations instead of a pass over the values (see `geometry`), so we make a hundred where the paper
makes three.

Breakdown point: fewer than half of the updates. Memory: see `stack`, and 8 n^2 bytes. Cost: n^2 products per coordinate, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_server.aggregation.geometry import combine, distances_to
from fed_server.aggregation.rule import Cohort, Combine, Rule
from fed_server.config import GeometricMedianConfig

# Where no coefficient moves by more, further steps would only move the last digits of the result.
_SETTLED = 1e-12


def geometric_median_rule(config: GeometricMedianConfig) -> Rule:
    """The rule of a run."""

    def rule(cohort: Cohort) -> Combine:
        coefficients = weiszfeld(cohort.inner_products(), config.iterations, config.smoothing)
        return lambda block: combine(block, coefficients)

    return rule


def weiszfeld(products: Tensor, iterations: int, smoothing: float) -> Tensor:
    """Coefficients [n], float64, that add up to 1, of the geometric median of updates with the inner products [n, n]."""
    coefficients = torch.full((len(products),), 1 / len(products), dtype=torch.float64)
    nearest = smoothing * float(distances_to(products, coefficients).median())
    if nearest == 0.0:
        return coefficients  # most updates are the mean itself, or the same
    for _ in range(iterations):
        weights = 1 / distances_to(products, coefficients).clamp(min=nearest)
        before, coefficients = coefficients, weights / weights.sum()
        if float((coefficients - before).abs().max()) <= _SETTLED:
            break
    return coefficients
