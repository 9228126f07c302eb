"""Momentum on the server: FedAvgM (Hsu, Qi and Brown 2019, arXiv:1909.06335, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fed_server.optim.base import State


@dataclass(frozen=True)
class Momentum:
    """m <- momentum * m + delta, then w <- w + learning_rate * m.

    The paper has no server learning rate, which is ours at 1. A constant delta moves the weights by
    learning_rate / (1 - momentum) times itself in the end: ten times at 0.9."""

    learning_rate: float = 1.0
    momentum: float = 0.9

    @property
    def initial(self) -> Mapping[str, float]:
        """The sum of deltas that fade."""
        return {"m": 0.0}

    def step(self, state: State, weights: Tensor, delta: Tensor) -> tuple[State, Tensor]:
        """See `ServerOptimizer.step`."""
        (m,) = state
        m.mul_(self.momentum).add_(delta)
        return (m,), (m * self.learning_rate).add_(weights)
