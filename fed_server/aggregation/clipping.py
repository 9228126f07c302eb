"""Norm bounding and centred clipping: what is too far away is drawn nearer, and then counts like the rest.

Norm bounding (Sun et al. 2019, arXiv:1911.07963, section 5): the mean of x_i min(1, r / |x_i|), where r is clipping_norm. A bad
update moves the mean by r / n at most; there is no breakdown point beyond that.

Centred clipping (Karimireddy, He, Jaggi 2021, arXiv:2012.10333, algorithm 2):

    v <- v + mean_i (x_i - v) min(1, r / |x_i - v|),    from v = 0, the model as it was

The paper begins at the last round's v and clips momentum that the clients keep; ours keep none, so we begin anew each round and
repeat the step. Breakdown point: fewer than half of the updates where r is the median distance, the bias growing with their part.

Without a clipping_norm r is the median of the norms, or of the distances at each step: at least half of the updates are shortened,
in return for an r that follows the training. Every update counts the same. Memory: see `stack`, and 8 n^2 bytes. Cost: n^2 products
per coordinate, once."""

from __future__ import annotations

import torch
from torch import Tensor

from fed_server.aggregation.geometry import combine, distances_to
from fed_server.aggregation.rule import Cohort, Combine, Rule
from fed_server.config import CenteredClippingConfig, NormBoundingConfig


def norm_bounding_rule(config: NormBoundingConfig) -> Rule:
    """The rule of a run."""
    return lambda cohort: _clipped(cohort, config.clipping_norm, 1)


def centered_clipping_rule(config: CenteredClippingConfig) -> Rule:
    """The rule of a run."""
    return lambda cohort: _clipped(cohort, config.clipping_norm, config.iterations)


def _clipped(cohort: Cohort, clipping_norm: float | None, iterations: int) -> Combine:
    coefficients = clip(cohort.inner_products(), clipping_norm, iterations)
    return lambda block: combine(block, coefficients)


def clip(products: Tensor, clipping_norm: float | None, iterations: int) -> Tensor:
    """Coefficients [n], float64, of v after so many steps from 0, for updates with the inner products [n, n]."""
    coefficients = torch.zeros(len(products), dtype=torch.float64)
    for _ in range(iterations):
        distances = distances_to(products, coefficients)
        radius = float(distances.median()) if clipping_norm is None else clipping_norm
        kept = torch.where(distances > radius, radius / distances, 1.0)
        coefficients = coefficients * (1 - kept.mean()) + kept / len(products)
    return coefficients
