"""Adaptive methods on the server: FedAdagrad, FedAdam and FedYogi (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

    m <- beta1 * m + (1 - beta1) * delta
    v <- v + delta^2                                        FedAdagrad
         beta2 * v + (1 - beta2) * delta^2                  FedAdam
         v - (1 - beta2) * delta^2 * sign(v - delta^2)      FedYogi
    w <- w + learning_rate * m / (sqrt(v) + tau)

They begin with m = 0 and v = tau^2, the least that the paper allows; its released code begins with v = 0. There is no correction of
bias, as in the paper: v begins at tau^2 and not at 0, and m reaches its size over about 1 / (1 - beta1) rounds, a warm-up of sorts.
A version of Adam from elsewhere takes larger first steps than this one. With beta1 = 0, m is delta and is not kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_server.optim.base import State


@dataclass(frozen=True, kw_only=True)
class _Adaptive(ABC):
    """What the three have in common: all but the rule of v."""

    learning_rate: float
    beta1: float
    tau: float

    @property
    def initial(self) -> Mapping[str, float]:
        """The first and second moments of delta."""
        return ({"m": 0.0} if self.beta1 else {}) | {"v": self.tau * self.tau}

    def step(self, state: State, weights: Tensor, delta: Tensor) -> tuple[State, Tensor]:
        """See `ServerOptimizer.step`. Square roots and quotients of float64 are rounded correctly, alike on every CPU."""
        *kept, v = state
        square = delta * delta
        v = self._second_moment(v, square)
        if kept:
            m = kept[0].mul_(self.beta1).add_(delta.mul_(1.0 - self.beta1))
            kept, delta = [m], torch.mul(m, self.learning_rate, out=delta)
        else:
            delta.mul_(self.learning_rate)
        root = torch.sqrt(v, out=square).add_(self.tau)
        return (*kept, v), delta.div_(root).add_(weights)

    @abstractmethod
    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """The next v; both are free to be overwritten."""


@dataclass(frozen=True, kw_only=True)
class Adagrad(_Adaptive):
    """FedAdagrad: steps shrink with all that a coordinate has moved so far. The paper uses it without momentum."""

    learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v.add_(square)


@dataclass(frozen=True, kw_only=True)
class Adam(_Adaptive):
    """FedAdam: steps shrink with what a coordinate has moved lately."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v.mul_(self.beta2).add_(square.mul_(1.0 - self.beta2))


@dataclass(frozen=True, kw_only=True)
class Yogi(Adam):
    """FedYogi: as FedAdam, but v falls slowly where updates become small, by no more than (1 - beta2) * delta^2."""

    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        sign = torch.sign(v - square)
        return v.sub_(square.mul_(1.0 - self.beta2).mul_(sign))
