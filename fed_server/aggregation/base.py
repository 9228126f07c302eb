"""What a round needs of an aggregator."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fed_core.payload.reader import PayloadReader
from fed_core.specs import TensorSpec


class Aggregator(Protocol):
    """Combines a round's updates, a stream: memory does not grow with the cohort.

    `add` is called once per update, from one thread, in any order; the result may not depend on it.
    """

    def add(self, update: PayloadReader, weight: int) -> None:
        """Folds one verified update. `weight` is a whole number from 1 to the run's max_weight."""
        ...

    @property
    def num_updates(self) -> int:
        """Updates folded so far."""
        ...

    @property
    def total_weight(self) -> int:
        """Sum of their weights."""
        ...

    def can_report(self) -> bool:
        """Whether there is anything to report."""
        ...

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """The combination for `count` coordinates of a tensor from `first` on, 1-D. For a floating tensor the change to apply,
        float64 (complex ones as real pairs: `count` counts complex elements and the result has twice as many); for the others
        the new value in the tensor's dtype. None where the base model's value stays."""
        ...
