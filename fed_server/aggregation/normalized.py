"""Updates that stand for different amounts of work: normalized averaging."""

from __future__ import annotations

import math

from fed_core.payload.reader import PayloadReader
from fed_server.aggregation.around import Scaled
from fed_server.aggregation.base import Aggregator


class Normalized(Scaled[Aggregator]):
    """FedNova around any aggregator (Wang et al. 2020, https://arxiv.org/abs/2007.07481, equation 7): clients sent d_i = update_i /
    a_i, a_i being the work behind it, and what they have in common is scaled back by tau_eff = sum w_i a_i / sum w_i. Whoever does
    more steps than others pulls the model no further in its own direction than its weight says.

    The paper's default tau_eff. Buffers and counters are no steps of an optimizer: they are sent and reported as they are. tau_eff
    is summed exactly and rounded once, so no order of arrival changes it. Memory: two numbers an update."""

    def __init__(self, aggregator: Aggregator) -> None:
        super().__init__(aggregator)
        self._work: list[tuple[int, float]] = []

    def add(self, update: PayloadReader, weight: int) -> None:
        """See `Aggregator.add`; the update's manifest says what it was divided by."""
        info = update.manifest.update
        assert info is not None, "updates are verified before they are folded"
        super().add(update, weight)
        self._work.append((weight, info.normalizer))

    def factor(self) -> float:
        """tau_eff."""
        return math.fsum(weight * work for weight, work in self._work) / sum(weight for weight, _ in self._work)
