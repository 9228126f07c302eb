"""An exponential moving average of the versions, smoother than any of them (Polyak and Juditsky 1992, SIAM J. Control Optim. 30).

    a_t = d_t * a_(t-1) + (1 - d_t) * v_t,  a_0 = v_0,  d_t = min(decay, (1 + t) / (10 + t))

The rising decay is that of TensorFlow's ExponentialMovingAverage: it forgets version 0, which is random, within ten versions or so.
"""

from __future__ import annotations

from torch import Tensor


def decay_at(decay: float, version: int) -> float:
    """The decay with which a version enters the average."""
    return min(decay, (1 + version) / (10 + version))


def blend(average: Tensor, values: Tensor, decay: float) -> Tensor:
    """decay * average + (1 - decay) * values, elementwise in float64; both are overwritten."""
    return average.mul_(decay).add_(values.mul_(1.0 - decay))
