"""The aggregator around every robust rule: keeps the updates until the round closes, then lets the rule decide.

What the rule is for: floating parameters. Buffers have a scale of their own and are no part of the distances that rules go by, so
what a rule trusts says nothing about them: they become their coordinate-wise median. A counter becomes the largest value but for
the num_byzantine largest, so that a bad site cannot push it beyond every honest one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fed_core.errors import InvalidError
from fed_core.payload.reader import PayloadReader
from fed_core.specs import PARAMETER, TensorSpec
from fed_server.aggregation.base import AggregatorSetting
from fed_server.aggregation.geometry import inner_products, squared_distances
from fed_server.aggregation.median import coordinate_median
from fed_server.aggregation.mixing import mix, mix_products, neighbours
from fed_server.aggregation.rule import Cohort, Combine, Rule
from fed_server.aggregation.stack import UpdateStack
from fed_server.config import RobustConfig


class RobustAggregator:
    """A rule over all updates of a round. The same set of updates gives the same bits, in any order of arrival.

    Memory: a few blocks of `stack.BLOCK_VALUES` values and what the rule says; the updates lie on disk.
    """

    def __init__(self, setting: AggregatorSetting, config: RobustConfig, rule: Rule) -> None:
        self._setting = setting
        self._config = config
        self._rule = rule
        self._stack = UpdateStack(setting.specs, setting.scratch_folder)
        self._total_weight = 0
        self._combine: Combine | None = None
        self._chosen: Tensor | None = None

    @property
    def num_updates(self) -> int:
        """Updates added so far."""
        return len(self._stack)

    @property
    def total_weight(self) -> int:
        """Sum of their weights, which the rule does not look at."""
        return self._total_weight

    def add(self, update: PayloadReader, weight: int) -> None:
        """Keeps one update."""
        self._stack.add(update)
        self._total_weight += weight

    def can_report(self) -> bool:
        """Whether at least one update was added."""
        return self.num_updates > 0

    def prepare(self) -> None:
        """Lets the rule decide. Raises InvalidError where it needs more updates than there are."""
        if self._combine is not None:
            return
        config = self._config
        if self.num_updates < config.least_updates():
            raise InvalidError(
                f"{config.kind} with num_byzantine = {config.num_byzantine} needs {config.NEEDS} = {config.least_updates()} "
                f"updates and got {self.num_updates}: raise cohort.quorum, or lower aggregation.num_byzantine"
            )
        if config.mixing == "nearest":
            products = self._inner_products()
            chosen = neighbours(squared_distances(products), config.num_byzantine)
            mixed = mix_products(products, chosen)
            combine = self._rule(Cohort(self.num_updates, lambda: mixed))
            self._chosen = chosen
        else:
            combine = self._rule(Cohort(self.num_updates, self._inner_products))
        self._combine = combine

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """See `Aggregator.report`; after `prepare`."""
        rule = self._setting.rules[spec.name]
        if rule == "keep":
            return None
        parts = [self._value(spec, block) for _, _, block in self._stack.blocks(spec, first, count)]
        return torch.cat(parts)

    def _value(self, spec: TensorSpec, block: Tensor) -> Tensor:
        assert self._combine is not None, "prepare comes before report"
        if self._setting.rules[spec.name] == "maximum":
            return block.sort(dim=0).values[len(block) - 1 - self._config.num_byzantine]
        if spec.role != PARAMETER:
            return coordinate_median(block)
        if self._chosen is not None:
            block = mix(block, self._chosen, self._setting.grid[spec.name])
        return self._combine(block)

    def _inner_products(self) -> Tensor:
        return inner_products(self._parameters(), self.num_updates)

    def _parameters(self) -> Iterator[Tensor]:
        for spec in self._setting.specs:
            if spec.role == PARAMETER and self._setting.rules[spec.name] == "mean":
                for _, _, block in self._stack.blocks(spec):
                    yield block
