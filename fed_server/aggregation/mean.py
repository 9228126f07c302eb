"""The weighted mean (McMahan et al. 2017, arXiv:1602.05629, algorithm 1), exact and order-free.

We differ from the paper in averaging differences instead of weights, which is the same for server learning rate 1, and in the
sum, which is exact on a grid (see `grid`) instead of rounded in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fed_core.failpoints import failpoint
from fed_core.payload.reader import PayloadReader
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype
from fed_server.aggregation.exact import ExactSum, SumMemory, scratch_tile
from fed_server.aggregation.merge_rules import MergeRule


class WeightedMean:
    """sum(weight_i * update_i) / sum(weight_i) over floating tensors, the maximum over counters.

    `divisor`, where given, is what the sum is divided by instead of the sum of weights: weights below the usual then make a step
    smaller, as in FedBuff (see `staleness`). Memory: 8 bytes per element of the model, whatever the cohort, and one decoded tile.
    `specs`, `sums` and `maxima` are for those who write down a mean on its way (see `partial`).
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        grid: Mapping[str, int],
        rules: Mapping[str, MergeRule],
        memory: SumMemory | None = None,
        divisor: int | None = None,
    ) -> None:
        self.specs = list(specs)
        self._divisor = divisor
        self.sums: dict[str, ExactSum] = {}
        self.maxima: dict[str, Tensor] = {}
        scratch = scratch_tile()
        for spec in specs:
            if rules[spec.name] == "mean":
                num_reals = spec.num_elements * spec.reals_per_element
                self.sums[spec.name] = ExactSum(num_reals, grid[spec.name], scratch, memory)
            elif rules[spec.name] == "maximum":
                self.maxima[spec.name] = torch.zeros(spec.num_elements, dtype=torch_dtype(spec.dtype))
        self._num_updates = 0
        self._total_weight = 0

    @property
    def num_updates(self) -> int:
        """Updates folded so far."""
        return self._num_updates

    @property
    def total_weight(self) -> int:
        """Sum of their weights."""
        return self._total_weight

    def add(self, update: PayloadReader, weight: int, see: Callable[[TensorSpec, Tensor], None] | None = None) -> None:
        """Folds one update, tile by tile. `see` is shown each tile that goes into a mean, as it was decoded."""
        for spec in self.specs:
            name = spec.name
            if name in self.sums:
                for first, tile in update.iter_tiles(name):
                    self.sums[name].add(first * spec.reals_per_element, as_reals(tile), weight)
                    if see is not None:
                        see(spec, tile)
            elif name in self.maxima:
                for first, tile in update.iter_tiles(name):
                    self.raise_maxima(name, first, tile)
            failpoint("mid-fold")
        self.count(1, weight)

    def raise_maxima(self, name: str, first: int, tile: Tensor) -> None:
        """Takes note of a counter's values from element `first` on; those of the first update are taken as they are."""
        mine = self.maxima[name][first : first + len(tile)]
        if self._num_updates == 0:
            mine.copy_(tile)
        else:
            torch.maximum(mine, tile, out=mine)

    def count(self, num_updates: int, total_weight: int) -> None:
        """Counts updates whose values were all added."""
        self._num_updates += num_updates
        self._total_weight += total_weight

    def merge(self, other: WeightedMean) -> None:
        """Adds another partial mean of the same model on the same grid."""
        for name, partial in self.sums.items():
            partial.merge(other.sums[name])
        if other.num_updates:
            for name, largest in other.maxima.items():
                self.raise_maxima(name, 0, largest)
        self.count(other.num_updates, other.total_weight)

    def can_report(self) -> bool:
        """Whether at least one update was folded."""
        return self._total_weight > 0

    def prepare(self) -> None:
        """Nothing is left to decide."""

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """See `Aggregator.report`."""
        if spec.name in self.sums:
            return self.sums[spec.name].mean(
                first * spec.reals_per_element, count * spec.reals_per_element, self._divisor or self._total_weight
            )
        if spec.name in self.maxima:
            return self.maxima[spec.name][first : first + count]
        return None


def as_reals(tile: Tensor) -> Tensor:
    """A 1-D view of real numbers: complex elements become pairs."""
    return torch.view_as_real(tile).reshape(-1) if tile.is_complex() else tile
