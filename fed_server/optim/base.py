"""Server optimizers: pure functions from (state, weights, delta) to (state, weights)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

State = tuple[Tensor, ...]
"""What an optimizer keeps for some elements of a parameter: one tensor for each name of `ServerOptimizer.initial`, in its order."""


class ServerOptimizer(Protocol):
    """Turns the aggregate of a round into the next weights, a tile at a time."""

    @property
    def initial(self) -> Mapping[str, float]:
        """What it keeps for every element of a parameter, by name, as it is before the first step. Empty: it keeps nothing."""
        ...

    def step(self, state: State, weights: Tensor, delta: Tensor) -> tuple[State, Tensor]:
        """The next state and weights of a tile. All tensors are 1-D float64 of one length, and the optimizer's to overwrite.

        Elementwise, so that tiles and threads change no bit; multiply and add are separate operations, so that every CPU rounds
        alike. `delta` is the mean update, local minus received: what descent would call minus the gradient."""
        ...
