"""The local training of one round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fed_client.training.objectives import Objective
from fed_core.batches import batch_of, num_examples, reproducible, seeds_of
from fed_core.child_process import OnProgress
from fed_core.errors import InvalidError
from fed_core.plan import TrainingPlan
from fed_core.workload import Data, Workload


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """What the training came to. `num_examples` counts the different examples trained on; `metrics["loss"]` is the mean over all
    examples seen, each time at the parameters of that moment. `normalizer` is what the update is to be divided by; 0: by
    nothing. `work` is what it says is behind it; 0: nothing."""

    num_steps: int
    num_examples: int
    is_partial: bool
    metrics: Mapping[str, float]
    seconds: float
    normalizer: float = 0.0
    work: float = 0.0


def train(
    workload: Workload,
    model: nn.Module,
    data: Data,
    plan: TrainingPlan,
    device: torch.device,
    on_progress: OnProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
    corrections: Mapping[str, Tensor] | None = None,
) -> TrainOutcome:
    """Trains a model in place; it is on `device`.

    The same plan, data, model, device and machine give the same bits: everything random hangs on `plan.seed`, the order of the
    data on a generator of its own. The time budget ends the training after the step in progress, so there is always one step.
    `corrections` are added to the gradients of the parameters that they name, where the plan's objective has a variate.
    Raises InvalidError where there is nothing to train on.
    """
    num_available = num_examples(data)
    if num_available == 0:
        raise InvalidError("train_data has no examples; this site cannot train")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidError("the model has no parameter that takes a gradient; there is nothing to train")
    training_seed, order_seed = seeds_of(plan.seed, 2)
    total = plan.num_steps(num_available)
    num_steps = num_seen = 0
    loss_sum = 0.0
    is_over = False
    begin = clock()
    with reproducible(training_seed, plan.num_threads):
        model.train()
        optimizer = workload.optimizer(model, plan.optimizer)
        objective = Objective(plan.objective, model, optimizer, corrections)
        rates = [group["lr"] for group in optimizer.param_groups]
        for epoch, indices in _batches(num_available, plan.batch_size, order_seed):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * plan.optimizer.epoch_decay**epoch
            loss = workload.training_step(model, batch_of(workload, data, indices, device), optimizer)
            num_steps += 1
            num_seen += len(indices)
            loss_sum += float(loss.detach()) * len(indices)
            is_over = 0 < plan.time_budget_seconds <= clock() - begin
            if on_progress is not None:
                on_progress(num_steps, total, {"loss": loss_sum / num_seen})
            if is_over or num_steps == total:
                break
    return TrainOutcome(
        num_steps=num_steps,
        num_examples=min(num_seen, num_available),
        is_partial=num_steps < total,
        metrics={"loss": loss_sum / num_seen},
        seconds=clock() - begin,
        normalizer=objective.normalizer(),
        work=objective.work(),
    )


def _batches(num_available: int, batch_size: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (epoch from 0, indices of a batch) for ever: every epoch a new permutation, its last batch perhaps smaller."""
    generator = torch.Generator().manual_seed(seed)
    epoch = 0
    while True:
        for indices in torch.split(torch.randperm(num_available, generator=generator), batch_size):
            yield epoch, indices
        epoch += 1
