"""Krum and multi-Krum (Blanchard et al. 2017, "Machine learning with adversaries", NeurIPS, section 4).

The score of an update is the sum of its squared distances to its n - f - 2 nearest others. Krum takes the update with the least
score; multi-Krum the mean of the m updates with the least. The paper leaves m open; ours is n - f - 2 where the run does not say,
the largest for which multi-Krum is proven to be resilient (Damaskinos et al. 2019, AggregaThor, MLSys, section 3).

Breakdown point: f of n >= 2 f + 3 updates. Distances are over the parameters as a whole, and every update counts the same. Memory:
see `stack`, and 8 n^2 bytes. Cost: n^2 products per coordinate, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_server.aggregation.geometry import combine, squared_distances
from fed_server.aggregation.rule import Cohort, Combine, Rule
from fed_server.config import KrumConfig, MultiKrumConfig


def krum_rule(config: KrumConfig) -> Rule:
    """The rule of a run."""
    return lambda cohort: _mean_of_best(cohort, config.num_byzantine, 1)


def multi_krum_rule(config: MultiKrumConfig) -> Rule:
    """The rule of a run."""
    return lambda cohort: _mean_of_best(
        cohort, config.num_byzantine, config.num_averaged or cohort.num_updates - config.num_byzantine - 2
    )


def _mean_of_best(cohort: Cohort, num_byzantine: int, num_averaged: int) -> Combine:
    scores = krum_scores(squared_distances(cohort.inner_products()), num_byzantine)
    coefficients = torch.zeros(cohort.num_updates, dtype=torch.float64)
    coefficients[scores.argsort(stable=True)[:num_averaged]] = 1 / num_averaged
    return lambda block: combine(block, coefficients)


def krum_scores(squared: Tensor, num_byzantine: int) -> Tensor:
    """The score of every update [n], float64, by the squared distances [n, n] between them; at least the nearest counts."""
    num_nearest = max(1, len(squared) - num_byzantine - 2)
    # Every update is its own nearest, at distance 0.
    return squared.sort(dim=1).values[:, 1 : 1 + num_nearest].sum(dim=1)
