"""A model that DP-SGD can train: little of it, and no layer that mixes examples.

--option data_seed=0    another site, other data
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_core.workload import Site, Workload

NUM_EXAMPLES, NUM_FEATURES = 200, 8


class Small(Workload):
    """The workload."""

    name = "small"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def train_data(self, site: Site) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(site.integer("data_seed", 0))
        features = torch.randn(NUM_EXAMPLES, NUM_FEATURES, generator=generator)
        return features, (features[:, 0] > features[:, 1]).long()

    def evaluation_data(self, site: Site) -> None:
        return None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, labels = batch
        return functional.cross_entropy(model(features), labels)
