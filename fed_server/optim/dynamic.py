"""The server's part of FedDyn (Acar et al. 2021, https://arxiv.org/abs/2111.04263, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fed_server.optim.base import State


@dataclass(frozen=True)
class Dynamic:
    """s <- s + participation * delta, then w <- w + delta + s. `participation` is the share of the population that the round's
    updates came from.

    s is -h / alpha of the paper: all that the sites' updates have added up to, over the population. The paper's delta is the plain
    mean of the updates; ours is the aggregator's. With a weighted mean of all sites every round, s is the weighted sum of what the
    sites carry, and where it comes to rest the weighted sum of the local gradients is zero; with weights and part of the sites, it
    is so in the mean over many rounds only."""

    participation: float

    @property
    def initial(self) -> Mapping[str, float]:
        """What all updates have added up to."""
        return {"s": 0.0}

    def step(self, state: State, weights: Tensor, delta: Tensor) -> tuple[State, Tensor]:
        """See `ServerOptimizer.step`."""
        (s,) = state
        s.add_(delta * self.participation)
        return (s,), delta.add_(s).add_(weights)
