"""From the run's config to what one client is told in one round."""

from __future__ import annotations

from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_server.config import EpochsConfig, RunConfig
from fed_server.store.base import AssignmentKind, AssignmentRecord


def training_plan(config: RunConfig, assignment: AssignmentRecord) -> TrainingPlan:
    """The plan of an assignment: the round's learning rate is learning_rate * round_decay**(round - 1)."""
    training, optimizer = config.training, config.training.optimizer
    work = training.local_work
    is_training = assignment.kind is AssignmentKind.TRAIN
    return TrainingPlan(
        epochs=work.epochs if isinstance(work, EpochsConfig) else None,
        steps=None if isinstance(work, EpochsConfig) else work.steps,
        batch_size=training.batch_size if is_training else config.evaluation.batch_size,
        optimizer=OptimizerPlan(
            kind=optimizer.kind,
            learning_rate=optimizer.learning_rate * optimizer.round_decay ** (assignment.round - 1),
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            epoch_decay=optimizer.epoch_decay,
        ),
        seed=assignment.seed,
        time_budget_seconds=config.schedule.time_budget_seconds,
        overridable=training.overridable,
        num_threads=training.num_threads,
    )
