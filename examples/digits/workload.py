"""Handwritten digits of 8 x 8 pixels (scikit-learn's load_digits, 1797 images), divided among sites that each see few classes.

--option site=0            which part is this site's, from 0
--option num_sites=3       into how many parts the data is divided
--option alpha=0.5         skew of the division: smaller means fewer classes at each site
--option partition_seed=0  another division
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_core.errors import ConfigError
from fed_core.workload import Site, Workload

NUM_CLASSES = 10
NUM_TEST = 397  # never at any site: the coordinator's public test set
SITE_TRAIN_SHARE = 0.8


def load() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in 0..1 and labels (1797), in one fixed random order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the digits come with scikit-learn; run: pip install scikit-learn") from error
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.images[order], dtype=torch.float32) / 16
    return images.unsqueeze(1), torch.tensor(digits.target[order])


def dirichlet_partition(
    labels: np.ndarray[Any, Any], num_sites: int, alpha: float, seed: int
) -> list[np.ndarray[Any, Any]]:
    """Indices of each site, shuffled: every class is divided in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019,
    arXiv:1909.06335, with the roles of sites and classes exchanged). The parts are disjoint and cover everything."""
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(num_sites)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet(np.full(num_sites, alpha)))[:-1] * len(members)).round().astype(int)
        for part, indices in zip(parts, np.split(members, cuts), strict=True):
            part.append(indices)
    return [rng.permutation(np.concatenate(part)) for part in parts]


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers: 38,282 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.output = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        features = functional.relu(self.conv1(images))
        features = functional.max_pool2d(functional.relu(self.conv2(features)), 2)
        logits: Tensor = self.output(functional.relu(self.hidden(features.flatten(1))))
        return logits


class Digits(Workload):
    """The workload."""

    name = "digits"
    version = "1"

    def model(self) -> nn.Module:
        return DigitsNet()

    def train_data(self, site: Site) -> tuple[Tensor, Tensor]:
        return self._split(site)[0]

    def evaluation_data(self, site: Site) -> tuple[Tensor, Tensor]:
        return self._split(site)[1]

    def coordinator_data(self, path: Path | None) -> tuple[Tensor, Tensor]:
        images, labels = load()
        return images[:NUM_TEST], labels[:NUM_TEST]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        logits = model(images)
        return {
            "loss": functional.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }

    def _split(self, site: Site) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The site's own training and evaluation examples."""
        site.allow_options("site", "num_sites", "alpha", "partition_seed")
        index, num_sites = site.integer("site", 0), site.integer("num_sites", 3)
        alpha, seed = site.number("alpha", 0.5), site.integer("partition_seed", 0)
        if not (0 <= index < num_sites and alpha > 0 and seed >= 0):
            raise ConfigError(
                f"expected 0 <= site < num_sites, alpha > 0, partition_seed >= 0; got {dict(site.options)}"
            )
        images, labels = load()
        images, labels = images[NUM_TEST:], labels[NUM_TEST:]
        own = torch.from_numpy(dirichlet_partition(labels.numpy(), num_sites, alpha, seed)[index])
        train, held_out = own[: int(len(own) * SITE_TRAIN_SHARE)], own[int(len(own) * SITE_TRAIN_SHARE) :]
        return (images[train], labels[train]), (images[held_out], labels[held_out])
