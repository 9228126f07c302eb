"""Updates of sites that were drawn with unequal chances: an estimate that is right on average."""

from __future__ import annotations

from fed_server.aggregation.around import Scaled
from fed_server.aggregation.base import Aggregator


class Corrected(Scaled[Aggregator]):
    """The estimate of Horvitz and Thompson 1952 around a weighted mean: sum of w_i u_i over n * `unit` for n updates, where w_i /
    `unit` is what an update counts beside one of a plain mean (see `rounds.importance`).

    The weights of a cohort add up to n * `unit` on average only. To divide by what they happen to add up to would keep a mean
    within the range of its updates, and off the target. Buffers and counters are no steps that may be too long once and too short
    another time (a variance could fall below 0): they are reported as they are, as a weighted mean. Memory: that of the mean."""

    def __init__(self, aggregator: Aggregator, unit: int) -> None:
        super().__init__(aggregator)
        self._unit = unit

    def factor(self) -> float:
        """The sum of the weights over what it is on average."""
        return self.total_weight / (self._unit * self.num_updates)
