"""What the same training reaches without federation: at each site alone, and on all data in one place.

The very loop that the daemons run, from the same initial model, with as many epochs as the rounds ask for and a fresh optimizer
every round. A site alone sees what it sees in the federation; pooled, one model sees what all sites see together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from fed_client.training.loop import train
from fed_core.batches import evaluate
from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_core.tensors import load_tensors
from fed_core.workload import Site, Workload, initial_model
from fed_server.config import EpochsConfig, RunConfig
from fed_server.rounds.cohort import client_seed
from fed_server.rounds.policy import learning_rate

if TYPE_CHECKING:
    from torch import Tensor

POOLED = "pooled"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """Accuracy of one baseline on the public test set after a round; round 0 is the untrained model."""

    name: str
    round: int
    accuracy: float


def baselines(workload: Workload, config: RunConfig, sites: Mapping[str, Site]) -> Iterator[Measured]:
    """Trains every site alone and then the pooled data, and yields the accuracy after every round."""
    data = {name: workload.train_data(site) for name, site in sites.items()}
    pooled = tuple(torch.cat(parts) for parts in zip(*data.values(), strict=True))
    for name, examples in {**data, POOLED: pooled}.items():
        model = initial_model(workload, config.seed)
        yield Measured(name, 0, test_accuracy(workload, config, model))
        for round in range(1, config.schedule.max_rounds + 1):
            train(workload, model, examples, _plan(config, round, name), CPU)
            yield Measured(name, round, test_accuracy(workload, config, model))


def test_accuracy(workload: Workload, config: RunConfig, model: torch.nn.Module) -> float:
    """Accuracy on the coordinator's public test set."""
    data = workload.coordinator_data(None)
    assert data is not None
    return evaluate(workload, model, data, config.evaluation.batch_size, CPU)[1]["accuracy"]


def file_accuracy(workload: Workload, config: RunConfig, path: Path) -> float:
    """Accuracy of a safetensors file that was downloaded from the coordinator."""
    model = workload.model()
    load_tensors(model, load_file(path))
    return test_accuracy(workload, config, model)


def class_counts(workload: Workload, sites: Mapping[str, Site], num_classes: int) -> dict[str, list[int]]:
    """How many training images of each digit a site has."""

    def counts(site: Site) -> list[int]:
        labels: Tensor = workload.train_data(site)[1]
        return torch.bincount(labels, minlength=num_classes).tolist()

    return {name: counts(site) for name, site in sites.items()}


def _plan(config: RunConfig, round: int, name: str) -> TrainingPlan:
    training, optimizer = config.training, config.training.optimizer
    assert isinstance(training.local_work, EpochsConfig)
    return TrainingPlan(
        batch_size=training.batch_size,
        optimizer=OptimizerPlan(
            kind=optimizer.kind,
            learning_rate=learning_rate(config, round),
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            epoch_decay=optimizer.epoch_decay,
        ),
        seed=client_seed(config.seed, round, name),
        epochs=training.local_work.epochs,
    )
