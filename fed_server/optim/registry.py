"""The server optimizers there are, by the `kind` of their config, whose options are the fields of the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fed_server.config import ServerOptimizerConfig
from fed_server.optim.adaptive import Adagrad, Adam, Yogi
from fed_server.optim.base import ServerOptimizer
from fed_server.optim.momentum import Momentum
from fed_server.optim.sgd import Sgd

OPTIMIZERS: Final[dict[str, Callable[..., ServerOptimizer]]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "adagrad": Adagrad,
    "adam": Adam,
    "yogi": Yogi,
}


def make_optimizer(config: ServerOptimizerConfig, factor: float = 1.0) -> ServerOptimizer:
    """The optimizer of a round, whose learning rate is `factor` times the config's."""
    constants = config.model_dump(exclude={"kind", "schedule"})
    return OPTIMIZERS[config.kind](**constants | {"learning_rate": config.learning_rate * factor})
