"""Fair federated averaging: sites count the more, the worse the model does by them."""

from __future__ import annotations

from math import fsum

import torch
from torch import Tensor

from fed_core.payload.reader import PayloadReader
from fed_core.specs import PARAMETER, TensorSpec
from fed_server.aggregation.around import Scaled
from fed_server.aggregation.loss_weight import LossWeighting
from fed_server.aggregation.mean import WeightedMean, as_reals

# Torch sums blocks of this size on one thread, so that the number of threads decides about no bit.
_BLOCK = 2**14


class QFedAvg(Scaled[WeightedMean]):
    """q-FedAvg (Li, Sanjabi, Beirami and Smith 2020, https://arxiv.org/abs/1905.10497, algorithm 2). With u_k = w_k - w the update
    of site k, F_k its loss at w, and L the Lipschitz constant that the step size stands for, the paper's

        delta_k = F_k^q L (w - w_k),   h_k = q F_k^(q-1) |L (w - w_k)|^2 + L F_k^q,   w <- w - sum delta_k / sum h_k

    is, divided by L, the sum of F_k^q u_k over the sum of F_k^q + q L F_k^(q-1) |u_k|^2. Both sums are divided by S^q, S being the
    round's `LossWeighting.scale`, and the weights (F_k / S)^q rounded to whole numbers up to max_weight, so that the sum of updates
    is exact; that of the denominators is rounded once. Neither hangs on the order of arrival.

    Where we differ: the paper draws sites in proportion to their examples; here they count alike however they are drawn. A loss
    over S counts as S. Buffers and counters are merged as by the weighted mean. Memory: that of the mean, and a number an
    update."""

    def __init__(self, mean: WeightedMean, weighting: LossWeighting, lipschitz: float) -> None:
        super().__init__(mean)
        self._weighting = weighting
        self._lipschitz = lipschitz
        self._curvatures: list[float] = []

    def add(self, update: PayloadReader, weight: int) -> None:
        """See `Aggregator.add`; the update's manifest says the loss."""
        info = update.manifest.update
        assert info is not None, "updates are verified before they are folded"
        squares: list[float] = []

        def see(spec: TensorSpec, tile: Tensor) -> None:
            if spec.role == PARAMETER:
                squares.extend(float(part.double().square_().sum()) for part in torch.split(as_reals(tile), _BLOCK))

        self._aggregator.add(update, weight, see)
        self._curvatures.append(self._curvature(self._weighting.loss_of(info), fsum(squares)))

    def _curvature(self, loss: float, squared_norm: float) -> float:
        """q L F^(q-1) |u|^2 in the unit of the weights."""
        q, scale = self._weighting.power, self._weighting.scale
        unit: float = self._weighting.max_weight / scale * (loss / scale) ** (q - 1)
        return q * self._lipschitz * squared_norm * unit

    def factor(self) -> float:
        """The weights over the denominators."""
        return self.total_weight / fsum([float(self.total_weight), *self._curvatures])
