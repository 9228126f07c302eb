"""Plain gradient descent on the server: FedAvg (McMahan et al. 2017, arXiv:1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fed_server.optim.base import State


@dataclass(frozen=True)
class Sgd:
    """w <- w + learning_rate * delta. With the paper's learning rate of 1 the next model is the mean of the local ones."""

    learning_rate: float = 1.0

    @property
    def initial(self) -> Mapping[str, float]:
        """Nothing is kept."""
        return {}

    def step(self, state: State, weights: Tensor, delta: Tensor) -> tuple[State, Tensor]:
        """See `ServerOptimizer.step`."""
        return (), delta.mul_(self.learning_rate).add_(weights)
