"""The second sum of SCAFFOLD: what the sites' gradients were in a round, as their updates tell it."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, log2

from torch import Tensor

from fed_core.payload.reader import PayloadReader
from fed_core.specs import variate_specs
from fed_server.aggregation.around import Around
from fed_server.aggregation.base import Aggregator, AggregatorSetting
from fed_server.aggregation.exact import ExactSum, scratch_tile
from fed_server.aggregation.grid import GridPolicy
from fed_server.aggregation.mean import as_reals


def variate_grid(grid: Mapping[str, int], policy: GridPolicy, least_work: float) -> dict[str, int]:
    """Exponents of the steps in which update / work is summed: those of the round's grid, for values that are larger by up to
    1 / least_work and have no weights. `least_work` is what every update says at least; the grid hangs on no update."""
    return {
        name: exponent - policy.weight_bits - floor(log2(least_work)) + ceil(log2(max(policy.cohort_limit, 1)))
        for name, exponent in grid.items()
    }


class WithVariate(Around[Aggregator]):
    """SCAFFOLD around an aggregator (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1, option II): besides
    what the aggregator makes of the updates, adds up update_i / a_i over all of them, a_i being the work that update i says is
    behind it.

    With c the common variate that the sites were sent and h_i a site's own, each site goes on with h_i' = h_i - c - update_i / a_i,
    so the coordinator knows by how much its variate changed and needs nothing but the update. No weights: what the variates' mean
    needs is the plain sum. Every quotient is rounded once to a grid by itself and then added exactly, so no order of arrival,
    restart or split changes a bit. Memory: 8 bytes an element besides the aggregator's, and each update is decoded once more."""

    def __init__(self, aggregator: Aggregator, setting: AggregatorSetting, exponents: Mapping[str, int]) -> None:
        """`exponents` as `variate_grid` makes them."""
        super().__init__(aggregator)
        scratch = scratch_tile()
        self._sums = {
            spec.name: ExactSum(
                spec.num_elements * spec.reals_per_element, exponents[spec.name], scratch, setting.memory
            )
            for spec in variate_specs(setting.specs)
        }

    def add(self, update: PayloadReader, weight: int) -> None:
        """See `Aggregator.add`; the update's manifest says what work is behind it."""
        info = update.manifest.update
        assert info is not None, "updates are verified before they are folded"
        super().add(update, weight)
        for name, total in self._sums.items():
            num_reals = update.entry(name).spec.reals_per_element
            for first, tile in update.iter_tiles(name):
                total.add(first * num_reals, as_reals(tile), 1 / info.work)

    def report_quotients(self, name: str, first: int, count: int) -> Tensor:
        """The sum of update / work for `count` reals of a tensor from `first` on, 1-D float64."""
        return self._sums[name].mean(first, count, 1)
