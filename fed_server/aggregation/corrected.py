"""Updates of sites that were drawn with unequal chances: an estimate that is right on average."""

from __future__ import annotations

from torch import Tensor

from fed_core.payload.reader import PayloadReader
from fed_core.specs import PARAMETER, TensorSpec
from fed_server.aggregation.base import Aggregator


class Corrected:
    """The estimate of Horvitz and Thompson 1952 around a weighted mean: sum of w_i u_i over n * `unit` for n updates, where w_i /
    `unit` is what an update counts beside one of a plain mean (see `rounds.importance`).

    The weights of a cohort add up to n * `unit` on average only. To divide by what they happen to add up to would keep a mean
    within the range of its updates, and off the target. Buffers and counters are no steps that may be too long once and too short
    another time (a variance could fall below 0): they are reported as they are, as a weighted mean. Memory: that of the mean."""

    def __init__(self, aggregator: Aggregator, unit: int) -> None:
        self._aggregator = aggregator
        self._unit = unit

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
        tile = self._aggregator.report(spec, first, count)
        if tile is None or spec.role != PARAMETER or not tile.is_floating_point():
            return tile
        return tile * (self.total_weight / (self._unit * self.num_updates))
