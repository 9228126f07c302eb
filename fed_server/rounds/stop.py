"""When a run ends, and which version is its best: pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from fed_server.store.base import Metrics

Direction = Literal["max", "min"]


@dataclass(frozen=True)
class StopRules:
    """What ends a run. None switches a rule off; `patience` counts evaluated versions without gain in `metric`."""

    max_rounds: int
    metric: str
    direction: Direction
    target: float | None = None
    patience: int | None = None
    max_seconds: float | None = None


@dataclass(frozen=True)
class Best:
    """The best version so far by the watched metric; version 0 and None before any was measured."""

    version: int = 0
    metric: float | None = None
    num_without_gain: int = 0


def update_best(best: Best, rules: StopRules, version: int, metrics: Metrics) -> Best:
    """The best after `version` was evaluated; unchanged where the watched metric was not measured. NaN is never a gain."""
    value = metrics.get(rules.metric)
    if value is None:
        return best
    if isfinite(value) and (best.metric is None or is_better(value, best.metric, rules.direction)):
        return Best(version, value, 0)
    return Best(best.version, best.metric, best.num_without_gain + 1)


def is_better(value: float, than: float, direction: Direction) -> bool:
    """Whether a metric is strictly better than another."""
    return value > than if direction == "max" else value < than


def stop_reason(rules: StopRules, *, round: int, elapsed_seconds: float, best: Best) -> str | None:
    """Why the run ends after this round, or None where it goes on."""
    if rules.target is not None and best.metric is not None:
        if best.metric == rules.target or is_better(best.metric, rules.target, rules.direction):
            return f"target reached: {rules.metric} {best.metric:.4f} in version {best.version}"
    if rules.patience is not None and best.num_without_gain >= rules.patience:
        return f"no gain in {rules.metric} for {best.num_without_gain} evaluations (best: version {best.version})"
    if rules.max_seconds is not None and elapsed_seconds >= rules.max_seconds:
        return f"{elapsed_seconds:.0f} s of run time are over (stop.max_seconds = {rules.max_seconds:g})"
    if round >= rules.max_rounds:
        return f"all {rules.max_rounds} rounds done"
    return None
