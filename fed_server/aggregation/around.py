"""Aggregators around another one, which does the work but for what they say."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from fed_core.payload.reader import PayloadReader
from fed_core.specs import PARAMETER, TensorSpec
from fed_server.aggregation.base import Aggregator

Inner = TypeVar("Inner", bound=Aggregator)


class Around(Generic[Inner]):
    """All that an `Aggregator` does, done by the one within."""

    def __init__(self, aggregator: Inner) -> None:
        self._aggregator = aggregator

    @property
    def num_updates(self) -> int:
        """Updates folded so far."""
        return self._aggregator.num_updates

    @property
    def total_weight(self) -> int:
        """Sum of their weights."""
        return self._aggregator.total_weight

    def add(self, update: PayloadReader, weight: int) -> None:
        """See `Aggregator.add`."""
        self._aggregator.add(update, weight)

    def can_report(self) -> bool:
        """See `Aggregator.can_report`."""
        return self._aggregator.can_report()

    def prepare(self) -> None:
        """See `Aggregator.prepare`."""
        self._aggregator.prepare()

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """See `Aggregator.report`."""
        return self._aggregator.report(spec, first, count)


class Scaled(Around[Inner]):
    """Makes the steps of the one within longer or shorter. Only floating parameters take steps: buffers and counters are reported
    as they are."""

    def factor(self) -> float:
        """How long a step is, beside that of the one within; asked once all updates were added."""
        raise NotImplementedError

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """See `Aggregator.report`."""
        tile = super().report(spec, first, count)
        if tile is None or spec.role != PARAMETER or not tile.is_floating_point():
            return tile
        return tile * self.factor()
