"""The aggregators there are, by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fed_core.specs import TensorSpec
from fed_server.aggregation.base import Aggregator
from fed_server.aggregation.mean import WeightedMean
from fed_server.aggregation.merge_rules import MergeRule

MakeAggregator = Callable[[Sequence[TensorSpec], Mapping[str, int], Mapping[str, MergeRule]], Aggregator]

AGGREGATORS: dict[str, MakeAggregator] = {
    "mean": WeightedMean,
}
