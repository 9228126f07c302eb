"""What a robust rule is: how the parameters of many updates become one, some of which may be anything at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Combine = Callable[[Tensor], Tensor]
"""A block of the updates' values, [updates, coordinates] in float32 or float64 -> what becomes of these coordinates,
[coordinates] in float64. Blocks are cut as memory likes: each coordinate is combined for itself."""


@dataclass(frozen=True)
class Cohort:
    """The updates of a round as a rule sees them before it is given their values: how many there are, and their inner products
    [updates, updates] in float64 over all parameters, which cost a pass over the values."""

    num_updates: int
    inner_products: Callable[[], Tensor]


class Rule(Protocol):
    """A rule with its options. The rows of all blocks are in one order, which says nothing about who sent them."""

    def __call__(self, cohort: Cohort) -> Combine:
        """Decides what can only be decided for the updates as a whole, such as whom to trust. Called once a round."""
        ...
