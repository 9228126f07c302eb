"""What the federation of these tests trains: tiny work, a model of several megabytes, and trouble on demand.

--option data_seed=0    another site, other data
--option trouble=FILE   what that file says at the beginning of a step happens in that step: raise, exit, hang, or sleep SECONDS
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_core.workload import Site, Workload

NUM_EXAMPLES, BATCH_SIZE = 64, 16
NUM_FEATURES, NUM_HIDDEN, NUM_CLASSES = 1024, 2048, 4


class Net(nn.Module):
    """2.1 million parameters, nine segments of 1 MiB; running statistics, two counters, and randomness in the training."""

    num_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(NUM_FEATURES, NUM_HIDDEN)
        self.norm = nn.BatchNorm1d(NUM_HIDDEN)
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(NUM_HIDDEN, NUM_CLASSES)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """(B, 1024) -> (B, 4)."""
        if self.training:
            self.num_seen += len(features)
        logits: Tensor = self.output(self.dropout(functional.relu(self.norm(self.hidden(features)))))
        return logits


class Faults(Workload):
    """The workload."""

    name = "faults"

    def __init__(self) -> None:
        self._trouble: Path | None = None

    def model(self) -> nn.Module:
        return Net()

    def train_data(self, site: Site) -> tuple[Tensor, Tensor]:
        if "trouble" in site.options:
            self._trouble = Path(site.options["trouble"])
        return self._examples(site.integer("data_seed", 0))

    def evaluation_data(self, site: Site) -> tuple[Tensor, Tensor]:
        return self._examples(1000 + site.integer("data_seed", 0))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, labels = batch
        return functional.cross_entropy(model(features), labels)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        features, labels = batch
        return {"accuracy": (model(features).argmax(1) == labels).float().mean()}

    def training_step(self, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        if self._trouble is not None and self._trouble.exists():
            self._make(self._trouble.read_text())
        return super().training_step(model, batch, optimizer)

    @staticmethod
    def _make(trouble: str) -> None:
        match trouble.split():
            case ["raise"]:
                raise RuntimeError("the scanner of ward 7 sent no images")
            case ["exit"]:
                os._exit(3)
            case ["hang"]:
                threading.Event().wait()
            case ["sleep", seconds]:
                time.sleep(float(seconds))

    @staticmethod
    def _examples(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(NUM_EXAMPLES, NUM_FEATURES, generator=generator)
        return features, features[:, :NUM_CLASSES].argmax(1)
