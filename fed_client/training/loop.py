"""The local training of one round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fed_client.training.example_privacy import ExampleNoise
from fed_client.training.objectives import Objective
from fed_core.batches import batch_of, num_examples, reproducible, seeds_of
from fed_core.child_process import OnProgress
from fed_core.errors import InvalidError
from fed_core.plan import TrainingPlan
from fed_core.workload import Data, Workload


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """What the training came to. `num_examples` counts the different examples trained on; `metrics["loss"]` is the mean over all
    examples seen, each time at the parameters of that moment, missing where none was. `normalizer` is what the update is to be
    divided by; 0: by nothing. `work` is what it says is behind it; 0: nothing."""

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
    Where the plan asks for privacy by examples, batches and steps are those of `ExampleNoise`, and no two trainings are the same.
    Raises InvalidError where there is nothing to train on, CannotDoError where that privacy cannot be had.
    """
    num_available = num_examples(data)
    if num_available == 0:
        raise InvalidError("train_data has no examples; this site cannot train")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidError("the model has no parameter that takes a gradient; there is nothing to train")
    training_seed, order_seed = seeds_of(plan.seed, 2)
    total = plan.num_steps(num_available)
    num_steps = num_seen = 0
    loss_sum, metrics = 0.0, dict[str, float]()
    is_over = False
    begin = clock()
    with reproducible(training_seed, plan.num_threads):
        model.train()
        optimizer = workload.optimizer(model, plan.optimizer)
        guard = _guard(model, optimizer, plan)
        # After the guard's, at every step: what it adds depends on no example.
        objective = Objective(plan.objective, model, optimizer, corrections)
        rates = [group["lr"] for group in optimizer.param_groups]
        batches = _batches(num_available, plan.batch_size, order_seed)
        if guard is not None:
            batches = guard.batches(
                num_available, plan.sampling_rate(num_available), total, _num_epochs(plan, num_available)
            )
        for epoch, indices in batches:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * plan.optimizer.epoch_decay**epoch
            if len(indices):
                with guard.batch(len(indices)) if guard is not None else nullcontext():
                    loss = workload.training_step(model, batch_of(workload, data, indices, device), optimizer)
                loss_sum += float(loss.detach()) * len(indices)
            elif guard is not None:
                guard.empty_batch()
            num_steps += 1
            num_seen += len(indices)
            metrics = {"loss": loss_sum / num_seen} if num_seen else {}
            is_over = 0 < plan.time_budget_seconds <= clock() - begin
            if on_progress is not None:
                on_progress(num_steps, total, metrics)
            if is_over or num_steps == total:
                break
        if guard is not None:
            guard.close()
    return TrainOutcome(
        num_steps=num_steps,
        num_examples=min(num_seen, num_available),
        is_partial=num_steps < total,
        metrics=metrics,
        seconds=clock() - begin,
        normalizer=objective.normalizer(),
        work=objective.work(),
    )


def _guard(model: nn.Module, optimizer: Optimizer, plan: TrainingPlan) -> ExampleNoise | None:
    if plan.privacy is None or plan.privacy.kind != "examples":
        return None
    return ExampleNoise(model, optimizer, plan.privacy, plan.batch_size)


def _num_epochs(plan: TrainingPlan, num_examples: int) -> int:
    """Passes over the data that the plan's steps come to, rounded up."""
    return plan.epochs or ceil(plan.num_steps(num_examples) * plan.batch_size / num_examples)


def _batches(num_available: int, batch_size: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (epoch from 0, indices of a batch) for ever: every epoch a new permutation, its last batch perhaps smaller."""
    generator = torch.Generator().manual_seed(seed)
    epoch = 0
    while True:
        for indices in torch.split(torch.randperm(num_available, generator=generator), batch_size):
            yield epoch, indices
        epoch += 1
