"""Local differential privacy: an update gets its norm and its noise here, in the trainer process, before any of it is encoded.

With x the released tensors of the update, all together one vector, the residual of error feedback added already (residual.py), C
the clipping norm and s = 2^e the step of the grid, a power of two such that sigma / s lies between 2^16 and 2^17:

    released = s * (trunc(x * min(1, C / |x|) / s) + round(N(0, (sigma / s)^2)))

So the L2 distance between what two sites' data may lead to is at most 2 C before the noise, with no rounding error to forgive
(fed_core/privacy/clipping.py, noise.py). An update that holds NaN counts as zero: to send none would say so. The noise comes of the
operating system's entropy, never of the plan's seed, which the coordinator knows. What is done afterwards, the rounding to the
tensor's own type, the encoding, the next residual, sees the noisy vector only.

Released are the parameters that take a gradient when the training begins. All else, buffers, counters and frozen layers, is sent as
it was received: running statistics and counters follow the data and have scales that no one norm fits.
"""

from __future__ import annotations

from collections.abc import Collection
from math import isnan

import torch
from torch import Tensor, nn

from fed_client.training.leaving import Update
from fed_core.errors import InvalidError
from fed_core.plan import PrivacyPlan
from fed_core.privacy.clipping import (
    SquaredNorm,
    clip_factor,
    max_squared_steps,
    squared_steps,
    step_exponent,
    to_steps,
)
from fed_core.privacy.noise import GridGaussian, NoiseStream

TILE = 2**16


def released_names(model: nn.Module) -> set[str]:
    """Names of the tensors that a site which protects its data lets out: the parameters that take a gradient, by every name of
    theirs."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def protect(update: Update, released: Collection[str], plan: PrivacyPlan, stream: NoiseStream | None = None) -> None:
    """Cuts the released tensors of an update to the norm and adds the noise; they are replaced, the others stay.

    Values beyond what a tensor's type holds become its largest. `stream` is for tests. Raises InvalidError where the norm cannot be
    kept. Memory: a tile, and a copy of a tensor whose coordinates do not lie in order in memory."""
    sigma = plan.noise_multiplier * plan.clipping_norm
    exponent = step_exponent(sigma)
    gaussian, stream = GridGaussian(sigma * 2.0**-exponent), stream or NoiseStream()
    for index, (spec, change) in enumerate(update):
        if spec.name in released:
            update[index] = (spec, change.contiguous())
    vectors = [_reals(change) for spec, change in update if spec.name in released]
    norm = SquaredNorm()
    for vector in vectors:
        norm.add(vector)
    factor = 0.0 if isnan(norm.value) else clip_factor(norm.value, plan.clipping_norm)
    scratch, squared = torch.empty(TILE, dtype=torch.float64), 0
    for vector in vectors:
        largest = torch.finfo(vector.dtype).max
        for tile in torch.split(vector, TILE):
            steps = to_steps(tile, factor, exponent, scratch[: len(tile)])
            squared += squared_steps(steps)
            gaussian.add_to(steps, stream)
            tile.copy_(steps.mul_(2.0**exponent).clamp_(-largest, largest))
    if squared > max_squared_steps(plan.clipping_norm, exponent):
        raise InvalidError("the clipped update is longer than its norm; it is not sent")


def _reals(tensor: Tensor) -> Tensor:
    """The coordinates of a contiguous tensor as a vector on the same memory, real and imaginary parts in turn."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)
