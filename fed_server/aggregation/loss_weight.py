"""Weights that go by a loss which a site reports with its update."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from fed_core.errors import UpdateRefusedError
from fed_core.payload.manifest import UpdateInfo

RECEIVED_LOSS = "received_loss"
VALIDATION_LOSS = "validation_loss"

# A loss below it counts as this much: no weight and no power of it is infinite.
SMALLEST_LOSS = 1e-10


@dataclass(frozen=True)
class LossWeighting:
    """The weight max_weight * (loss / scale)^power, a whole number from 1 on. A loss beyond `scale`, on the side where the weight
    would be larger than `max_weight`, counts as `scale`: no site gets more by what it says.

    `metric` names the loss among the update's metrics. Rounded once, when the update is received; from then on it is a number in
    the store."""

    metric: str
    scale: float
    power: float
    max_weight: int

    def loss_of(self, update: UpdateInfo) -> float:
        """The loss that an update counts by. Raises UpdateRefusedError where it reports none, or none that can be reckoned with."""
        loss = update.metrics.get(self.metric)
        if loss is None or not isfinite(loss) or loss < 0:
            said = f"reports {self.metric} = {loss:g}" if loss is not None else f"reports no {self.metric}"
            raise UpdateRefusedError(
                f"the update {said}, and this run weights updates by it: expected a finite number of at least 0; install the "
                "coordinator's version at the site, look at the learning rate, or choose another aggregation"
            )
        loss = max(loss, SMALLEST_LOSS)
        return max(loss, self.scale) if self.power < 0 else min(loss, self.scale)

    def weight_of(self, update: UpdateInfo) -> int:
        """The weight of an update. Raises UpdateRefusedError as `loss_of`."""
        share: float = (self.loss_of(update) / self.scale) ** self.power
        return max(1, min(self.max_weight, round(self.max_weight * share)))
