"""Learning rates from round to round, of the server's optimizer and of the clients': pure functions of the round."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

from fed_server.config import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    ExponentialScheduleConfig,
    PlateauScheduleConfig,
    RoundSchedule,
    StepScheduleConfig,
)


@dataclass(frozen=True)
class Plateau:
    """What a plateau schedule has seen: the factor that it has come to, the best value so far, and the measurements in a row since
    then, or since the last fall, without a better one."""

    factor: float = 1.0
    best: float | None = None
    num_without_gain: int = 0


NO_PLATEAU: Final = Plateau()


def rate_factor(
    schedule: RoundSchedule | PlateauScheduleConfig, round: int, max_rounds: int, plateau: Plateau = NO_PLATEAU
) -> float:
    """What the learning rate is multiplied by in a round, 1 the first: more than 0, at most 1.

    It rises in equal steps to 1 in round `warmup_rounds`; the schedule begins with the round after, so that its first factor is 1
    too. A cosine ends with `max_rounds`. `plateau` is what a plateau schedule has seen before the round."""
    if round <= schedule.warmup_rounds:
        return round / schedule.warmup_rounds
    num_done, num_rounds = round - schedule.warmup_rounds - 1, max_rounds - schedule.warmup_rounds
    match schedule:
        case ConstantScheduleConfig():
            return 1.0
        case StepScheduleConfig():
            factor = schedule.factor ** (num_done // schedule.every)
        case ExponentialScheduleConfig():
            factor = schedule.factor**num_done
        case CosineScheduleConfig():
            share = min(num_done / num_rounds, 1.0)
            return schedule.floor + (1.0 - schedule.floor) * (1.0 + math.cos(math.pi * share)) / 2.0
        case PlateauScheduleConfig():
            factor = plateau.factor
    return max(factor, schedule.floor)


def update_plateau(
    plateau: Plateau, schedule: PlateauScheduleConfig, round: int, value: float | None, direction: Literal["max", "min"]
) -> Plateau:
    """What the schedule has seen after a round that measured `value`, None where it was not measured. NaN is never a gain.

    After `patience` measurements in a row without a new best the factor falls, and the count begins anew. Rounds of the warm-up
    are not counted."""
    if value is None:
        return plateau
    is_gain = plateau.best is None or (value > plateau.best if direction == "max" else value < plateau.best)
    if is_gain and math.isfinite(value):
        return replace(plateau, best=value, num_without_gain=0)
    if round <= schedule.warmup_rounds:
        return plateau
    if plateau.num_without_gain + 1 < schedule.patience:
        return replace(plateau, num_without_gain=plateau.num_without_gain + 1)
    return replace(plateau, factor=max(plateau.factor * schedule.factor, schedule.floor), num_without_gain=0)
