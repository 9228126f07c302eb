"""Plain gradient descent on the server: FedAvg (McMahan et al. 2017, arXiv:1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sgd:
    """w <- w + learning_rate * delta. With the paper's learning rate of 1 the next model is the mean of the local ones."""

    learning_rate: float = 1.0

    def step(self, weights: Tensor, delta: Tensor) -> Tensor:
        """See `ServerOptimizer.step`. Multiply and add are separate operations, so that every CPU rounds alike."""
        return delta.mul_(self.learning_rate).add_(weights)
