"""Server optimizers: pure functions from (state, weights, delta) to (state, weights)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ServerOptimizer(Protocol):
    """Turns the aggregate of a round into the next weights, a tile at a time."""

    def step(self, weights: Tensor, delta: Tensor) -> Tensor:
        """The next weights for a tile: `weights` and `delta` are 1-D float64, so is the result. Elementwise, so that tiles and
        threads change no bit. `delta` is the optimizer's to overwrite."""
        ...
