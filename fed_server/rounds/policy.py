"""What a run's config says, in the terms of the pure functions that decide."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from fed_core.codecs.auto import AutoConfig
from fed_core.codecs.registry import EncodingConfig
from fed_core.plan import ObjectivePlan, OptimizerPlan, TrainingPlan
from fed_server.aggregation.grid import GridPolicy, grid_policy
from fed_server.aggregation.loss_weight import RECEIVED_LOSS, VALIDATION_LOSS, LossWeighting
from fed_server.aggregation.staleness import ONE
from fed_server.config import (
    BufferedConfig,
    EpochsConfig,
    FedDynConfig,
    MeanConfig,
    ObjectiveConfig,
    PlainObjectiveConfig,
    PlateauScheduleConfig,
    QFedAvgConfig,
    RobustConfig,
    RunConfig,
    ScaffoldConfig,
    VariateConfig,
)
from fed_server.config_privacy import LocalPrivacyConfig, SitePrivacyConfig
from fed_server.optim.base import ServerOptimizer
from fed_server.optim.dynamic import Dynamic
from fed_server.optim.registry import make_optimizer
from fed_server.optim.schedule import NO_PLATEAU, Plateau, rate_factor, update_plateau
from fed_server.rounds.cohort import ImportancePolicy, num_selected
from fed_server.rounds.importance import SiteReport
from fed_server.rounds.stop import StopRules
from fed_server.store.base import AssignmentKind, AssignmentRecord, Metrics


def training_plan(config: RunConfig, assignment: AssignmentRecord, plateau: Plateau, site: str) -> TrainingPlan:
    """The plan of an assignment for the site of that name. `plateau` is what a plateau schedule has seen before the assignment's
    round."""
    training, optimizer = config.training, config.training.optimizer
    work = training.local_work
    is_training = assignment.kind is AssignmentKind.TRAIN
    return TrainingPlan(
        epochs=work.epochs if isinstance(work, EpochsConfig) else None,
        steps=None if isinstance(work, EpochsConfig) else work.steps,
        batch_size=training.batch_size if is_training else config.evaluation.batch_size,
        optimizer=OptimizerPlan(
            kind=optimizer.kind,
            # What it was told once it is told again: a plateau may have fallen since, where rounds are buffered.
            learning_rate=assignment.learning_rate or learning_rate(config, assignment.round, plateau, site),
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            epoch_decay=optimizer.epoch_decay,
        ),
        seed=assignment.seed,
        time_budget_seconds=config.schedule.time_budget_seconds,
        overridable=training.overridable,
        num_threads=training.num_threads,
        objective=_objective(training.objective),
        measures=_measures(config) if is_training else (),
        privacy=config.privacy.plan() if isinstance(config.privacy, SitePrivacyConfig) else None,
    )


def _objective(config: ObjectiveConfig) -> ObjectivePlan:
    strength = 0.0 if isinstance(config, PlainObjectiveConfig | ScaffoldConfig) else config.strength
    return ObjectivePlan(config.kind, strength)


def _measures(config: RunConfig) -> tuple[str, ...]:
    weighting = loss_weighting(config, 1.0)
    return (weighting.metric,) if weighting is not None else ()


def loss_scale(config: RunConfig, reports: Mapping[str, SiteReport]) -> float:
    """The largest loss that a round reckons with where weights rise with losses: twice the largest of the last round that had any,
    and a fixed one before. 0 where weights do not."""
    if not isinstance(config.aggregation, QFedAvgConfig):
        return 0.0
    newest = max((report.round for report in reports.values()), default=0)
    losses = [r.loss for r in reports.values() if r.round == newest and r.loss is not None and isfinite(r.loss)]
    return min(max(2 * max(losses), _SMALLEST_SCALE), _LARGEST_SCALE) if losses else _FIRST_SCALE


def loss_weighting(config: RunConfig, scale: float) -> LossWeighting | None:
    """How weights go by a loss that the sites report; None where they do not. `scale` is the round's `loss_scale`."""
    aggregation = config.aggregation
    if isinstance(aggregation, QFedAvgConfig):
        return LossWeighting(RECEIVED_LOSS, scale, aggregation.fairness, run_grid_policy(config).max_weight)
    if not (isinstance(aggregation, MeanConfig) and aggregation.weighting == "inverse_loss"):
        return None
    return LossWeighting(
        VALIDATION_LOSS, aggregation.smallest_loss or _SMALLEST_LOSS, -1.0, run_grid_policy(config).max_weight
    )


def learning_rate(config: RunConfig, round: int, plateau: Plateau = NO_PLATEAU, site: str = "") -> float:
    """The clients' learning rate in a round, before what a site does within it: that of the site of this name, or of those that the
    config does not name. `plateau` as for `training_plan`."""
    training = config.training
    rate = training.learning_rate_by_site.get(site, training.optimizer.learning_rate)
    return rate * rate_factor(training.schedule, round, config.schedule.max_rounds, plateau)


def server_optimizer(config: RunConfig, round: int, num_updates: int = 1) -> ServerOptimizer:
    """The server's optimizer with the learning rate of a round that so many updates came to."""
    optimizer, objective = config.server_optimizer, config.training.objective
    if isinstance(objective, FedDynConfig):
        return Dynamic(num_updates / objective.population)
    return make_optimizer(optimizer, rate_factor(optimizer.schedule, round, config.schedule.max_rounds))


def population(config: RunConfig) -> int | None:
    """Sites that may take part over the run; None where any may."""
    objective = config.training.objective
    return objective.population if isinstance(objective, VariateConfig) else None


# How much smaller a site's learning rate may be than the run's where its work is divided by: a factor of 2^-10.
_LEAST_WORK = 2.0**-10


def least_work(config: RunConfig, round: int, plateau: Plateau) -> float:
    """The least work that an update of a round may say is behind it; 0 where none is asked for. One step is worth its learning
    rate."""
    if not isinstance(config.training.objective, ScaffoldConfig):
        return 0.0
    sites = ("", *config.training.learning_rate_by_site)
    return min(learning_rate(config, round, plateau, site) for site in sites) * _LEAST_WORK


def plateau_after(config: RunConfig, plateau: Plateau, round: int, metrics: Metrics) -> Plateau:
    """What a plateau schedule has seen after a round with these metrics; unchanged where the run has another schedule."""
    schedule, evaluation = config.training.schedule, config.evaluation
    if not isinstance(schedule, PlateauScheduleConfig):
        return plateau
    value = metrics.get(schedule.metric or evaluation.metric)
    return update_plateau(plateau, schedule, round, value, schedule.direction or evaluation.direction)


def uplink_encoding(config: RunConfig) -> EncodingConfig:
    """How the clients of a round encode their updates: as the config says, with an eye on how many there are."""
    if isinstance(config.uplink, AutoConfig):
        # Only a mean averages out what its updates lose.
        return config.uplink.for_cohort(1 if isinstance(config.aggregation, RobustConfig) else config.cohort.size)
    return config.uplink


def run_grid_policy(config: RunConfig) -> GridPolicy:
    """The grid policy of a run. Raises ConfigError where it would be too coarse."""
    reach = _noise_reach(config)
    if isinstance(config.rounds, BufferedConfig):
        return grid_policy(config.cohort.size, ONE, config.aggregation.bound, reach)
    limit = num_selected(config.cohort.size, config.cohort.over_selection)
    return grid_policy(limit, config.aggregation.max_weight, config.aggregation.bound, reach)


def _noise_reach(config: RunConfig) -> float:
    """What no value of an honest update exceeds where the sites add noise to it: its chance to is below 2^-75."""
    privacy = config.privacy
    return (
        privacy.clipping_norm * (1 + 10 * privacy.noise_multiplier) if isinstance(privacy, LocalPrivacyConfig) else 0.0
    )


# The losses that a round reckons with where they are not known yet, and what it reckons with at least and at most.
_FIRST_SCALE = 16.0
_SMALLEST_SCALE = 1e-6
_LARGEST_SCALE = 1e30

# The loss below which none counts more by "inverse_loss", where the config does not say.
_SMALLEST_LOSS = 0.01

# Part of the chances that a draw by importance deals out whatever the losses are, where the config does not say.
_EQUAL_PART = 0.2


def importance_policy(config: RunConfig, reports: Mapping[str, SiteReport]) -> ImportancePolicy | None:
    """What a draw by importance goes by; None where the run draws otherwise. `reports` is what sites said with their last
    updates."""
    if config.cohort.selection != "importance":
        return None
    return ImportancePolicy(
        reports=reports,
        equal_part=config.cohort.equal_part or _EQUAL_PART,
        importance=config.aggregation.importance,
        by_examples=config.aggregation.weighting == "examples",
        max_weight=run_grid_policy(config).max_weight,
    )


def stop_rules(config: RunConfig) -> StopRules:
    """The stop rules of a run."""
    return StopRules(
        max_rounds=config.schedule.max_rounds,
        metric=config.evaluation.metric,
        direction=config.evaluation.direction,
        target=config.stop.target,
        patience=config.stop.patience,
        max_seconds=config.stop.max_seconds,
    )
