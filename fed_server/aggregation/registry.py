"""The aggregators there are, by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fed_server.aggregation.base import Aggregator, AggregatorSetting
from fed_server.aggregation.bulyan import bulyan_rule
from fed_server.aggregation.clipping import centered_clipping_rule, norm_bounding_rule
from fed_server.aggregation.geometric_median import geometric_median_rule
from fed_server.aggregation.krum import krum_rule, multi_krum_rule
from fed_server.aggregation.mean import WeightedMean
from fed_server.aggregation.median import median_rule
from fed_server.aggregation.qfedavg import QFedAvg
from fed_server.aggregation.robust import RobustAggregator
from fed_server.aggregation.rule import Rule
from fed_server.aggregation.trimmed_mean import trimmed_mean_rule
from fed_server.config import AggregationConfig, QFedAvgConfig

MakeAggregator = Callable[[AggregatorSetting, Any], Aggregator]


def _mean(setting: AggregatorSetting) -> WeightedMean:
    return WeightedMean(setting.specs, setting.grid, setting.rules, setting.memory, setting.divisor)


def _qfedavg(setting: AggregatorSetting, config: QFedAvgConfig) -> Aggregator:
    assert setting.loss_weighting is not None, "q-FedAvg weights by a loss"
    return QFedAvg(_mean(setting), setting.loss_weighting, config.lipschitz or 1 / setting.learning_rate)


def _robust(make_rule: Callable[[Any], Rule]) -> MakeAggregator:
    return lambda setting, config: RobustAggregator(setting, config, make_rule(config))


AGGREGATORS: dict[str, MakeAggregator] = {
    "mean": lambda setting, config: _mean(setting),
    "qfedavg": _qfedavg,
    "median": _robust(median_rule),
    "trimmed_mean": _robust(trimmed_mean_rule),
    "krum": _robust(krum_rule),
    "multi_krum": _robust(multi_krum_rule),
    "bulyan": _robust(bulyan_rule),
    "geometric_median": _robust(geometric_median_rule),
    "norm_bounding": _robust(norm_bounding_rule),
    "centered_clipping": _robust(centered_clipping_rule),
}


def new_aggregator(setting: AggregatorSetting, config: AggregationConfig) -> Aggregator:
    """An empty aggregator of one round."""
    return AGGREGATORS[config.kind](setting, config)
