"""MNIST, with the two models of McMahan et al. 2017 (arXiv:1602.05629): `workload.py:CNN` and `workload.py:TwoNN`.

`--data DIR` (and `--evaluation-data DIR` at the coordinator) holds the four IDX files under their usual names, with or without .gz.

    --option split=iid         iid (default); shards: every site has two digits (the paper's non-IID split); label: every site has
                               one digit; dirichlet: every site has its own mix of digits; writers: every site has some of the
                               people who wrote the digits, which needs DIR/writers.npz
    --option alpha=0.1         how even the digits of a site are with split=dirichlet: 0.1 very uneven, 100 nearly IID
    --option site=0            which part is this site's, from 0
    --option num_sites=100     into how many parts the 60,000 training images are divided
    --option writer=2154       instead: one writer of writers.npz, by number
    --option partition_seed=0  another division
    --option held_out=0.1      share of its images on which a site evaluates instead of training
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_core.errors import ConfigError
from fed_core.workload import Site, Workload

Array: TypeAlias = np.ndarray[Any, Any]
Examples: TypeAlias = tuple[Tensor, Tensor]

NUM_CLASSES = 10
SPLITS = ("iid", "shards", "label", "dirichlet", "writers")


def read_idx(folder: Path, name: str) -> Array:
    """The unsigned bytes of an IDX file, `name` or `name`.gz. Raises ConfigError where it is missing or is something else."""
    for path, open_file in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.exists():
            with open_file(path, "rb") as file:
                content: bytes = file.read()
            break
    else:
        raise ConfigError(f"there is no {name} or {name}.gz in {folder}; give the folder of the four MNIST files")
    begin = 4 + 4 * content[3] if len(content) > 3 else 4
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4))
    if content[:3] != b"\0\0\x08" or len(content) != begin + math.prod(shape):
        raise ConfigError(f"{path} is not a whole IDX file of unsigned bytes; fetch it again")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def load(folder: Path, part: str) -> tuple[Array, Array]:
    """Images (N, 28, 28) and labels (N), both uint8, of "train" or "t10k"."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"{folder}: {part} has images {images.shape} and labels {labels.shape}; they do not belong together"
        )
    return images, labels


def examples(images: Array, labels: Array) -> Examples:
    """Images (N, 1, 28, 28) in 0..1 and labels (N)."""
    return torch.tensor(images).unsqueeze(1).float() / 255, torch.tensor(labels).long()


def own_indices(site: Site, labels: Array) -> Array:
    """Which training images are this site's, shuffled. The parts of all sites are disjoint and cover everything."""
    rng = np.random.default_rng(site.integer("partition_seed", 0))
    if "writer" in site.options:
        writer = site.integer("writer")
        indices = np.flatnonzero(_writers(site) == writer)
        if len(indices) == 0:
            raise ConfigError(f"option writer: nobody has the number {writer}; writers.npz lists them in train_writer")
        return rng.permutation(indices)
    index, num_sites = site.integer("site", 0), site.integer("num_sites", 100)
    split = site.options.get("split", "iid")
    if split not in SPLITS:
        raise ConfigError(f"option split is {split!r}; expected one of {', '.join(SPLITS)}")
    if not 0 <= index < num_sites:
        raise ConfigError(f"option site is {index}; expected 0 to num_sites - 1 = {num_sites - 1}")
    if split == "iid":
        return np.array_split(rng.permutation(len(labels)), num_sites)[index]
    if split == "shards":
        shards = np.array_split(np.argsort(labels, kind="stable"), 2 * num_sites)
        mine = np.array_split(rng.permutation(2 * num_sites), num_sites)[index]
        return rng.permutation(np.concatenate([shards[shard] for shard in mine]))
    if split == "label":
        if num_sites % NUM_CLASSES:
            raise ConfigError(f"option num_sites is {num_sites}; expected a multiple of {NUM_CLASSES} with split=label")
        digit, part = index % NUM_CLASSES, index // NUM_CLASSES
        return np.array_split(rng.permutation(np.flatnonzero(labels == digit)), num_sites // NUM_CLASSES)[part]
    if split == "dirichlet":
        alpha = site.number("alpha", 0.1)
        if not 0 < alpha < math.inf:
            raise ConfigError(f"option alpha is {alpha}; expected a number above 0")
        return _mixed(rng, labels, num_sites, alpha)[index]
    writers = _writers(site)
    people = np.unique(writers)
    if num_sites > len(people):
        raise ConfigError(f"option num_sites is {num_sites}; there are {len(people)} writers")
    return rng.permutation(np.flatnonzero(np.isin(writers, rng.permutation(people)[index::num_sites])))


def _mixed(rng: np.random.Generator, labels: Array, num_sites: int, alpha: float) -> list[Array]:
    """Parts of equal size whose mixes of digits are drawn from a Dirichlet distribution, as in Hsu, Qi and Brown 2019
    (arXiv:1909.06335); where a digit has run out, a site takes more of its others."""
    left = [list(rng.permutation(np.flatnonzero(labels == digit))) for digit in range(NUM_CLASSES)]
    parts = []
    for size in (len(part) for part in np.array_split(labels, num_sites)):
        mix = rng.dirichlet([alpha] * NUM_CLASSES)
        mine: list[int] = []
        while len(mine) < size:
            there = np.array([bool(each) for each in left])
            # A digit with no share at all is taken only where nothing else is left.
            shares = np.where(there, np.maximum(mix, 1e-12), 0.0)
            for digit, count in enumerate(rng.multinomial(size - len(mine), shares / shares.sum())):
                mine += left[digit][:count]
                del left[digit][:count]
        parts.append(rng.permutation(np.array(mine)))
    return parts


def _writers(site: Site) -> Array:
    path = site.data_path() / "writers.npz"
    if not path.exists():
        raise ConfigError(f"there is no {path}; it says who wrote each digit: use split=iid or split=shards without it")
    with np.load(path, allow_pickle=False) as archive:
        writers: Array = archive["train_writer"]
    return writers


class Mnist(Workload):
    """What the two have in common: data, loss and metrics."""

    def train_data(self, site: Site) -> Examples:
        return self._split(site)[0]

    def evaluation_data(self, site: Site) -> Examples | None:
        return self._split(site)[1]

    def coordinator_data(self, path: Path | None) -> Examples:
        if path is None:
            raise ConfigError("the MNIST test set is read from files; start fed-server with --evaluation-data DIR")
        return examples(*load(path, "t10k"))

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def metrics(self, model: nn.Module, batch: Examples) -> dict[str, Tensor]:
        images, labels = batch
        logits = model(images)
        return {
            "loss": functional.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }

    def _split(self, site: Site) -> tuple[Examples, Examples | None]:
        """The site's own training and evaluation examples."""
        site.allow_options("split", "alpha", "site", "num_sites", "writer", "partition_seed", "held_out")
        held_out = site.number("held_out", 0.1)
        if not 0 <= held_out < 1:
            raise ConfigError(f"option held_out is {held_out}; expected 0 up to but not including 1")
        images, labels = load(site.data_path(), "train")
        own = own_indices(site, labels)
        cut = len(own) - int(len(own) * held_out)
        train, rest = own[:cut], own[cut:]
        return examples(images[train], labels[train]), examples(images[rest], labels[rest]) if len(rest) else None


class CNN(Mnist):
    """Two 5 x 5 convolutions (32 and 64 channels, each with 2 x 2 max pooling), 512 units, 10 classes: 1,663,370 parameters."""

    name = "mnist-cnn"

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(7 * 7 * 64, 512),
            nn.ReLU(),
            nn.Linear(512, NUM_CLASSES),
        )


class TwoNN(Mnist):
    """Two hidden layers of 200 units, 10 classes: 199,210 parameters."""

    name = "mnist-2nn"

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 200),
            nn.ReLU(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, NUM_CLASSES),
        )
