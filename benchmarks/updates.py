"""Updates as real clients make them, for benchmarks of codecs, cached under benchmarks/.updates.

    python -m benchmarks.updates [--data DIR]

Federated averaging without compression, with the project's own workloads and training loop: 10 sites a round, E = 5 unless the name
says otherwise, B = 10. In three rounds (1 early, 6 middle, 15 late) the updates are kept: of 10 sites, and in the middle of the
2NN's runs of all 100. Where a model is slow to train, the rounds between those have half the sites and one epoch. Nothing but the
seed decides what comes out, on one machine.

DIR (default: FEDSTREAM_DATA, else ../shared/data beside the repository) holds `mnist` with the four IDX files, and `shakespeare`
with tinyshakespeare.txt and speakers.npz (who says what; `examples/mnist/README.md` says how MNIST is divided).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from examples.mnist.workload import CNN, NUM_CLASSES, Examples, Mnist, TwoNN, examples, load, own_indices
from fed_client.training.loop import train
from fed_core.batches import evaluate
from fed_core.errors import ConfigError
from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_core.tensors import check_finite, difference, load_tensors, model_tensors
from fed_core.workload import Site, Workload, initial_model

CACHE: Final = Path(__file__).parent / ".updates"
STAGES: Final = {"early": 1, "middle": 6, "late": 15}
CPU: Final = torch.device("cpu")
_CONTEXT: Final = 64
_NUM_TEST: Final = 2000


class MissingDataError(Exception):
    """The data set is not where it was looked for; the text says where, and the cure."""


class ConvOnly(Mnist):
    """Four 3 x 3 convolutions with group normalization, the mean over the image, 10 classes: 241,834 parameters."""

    name = "bench-conv-only"

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, NUM_CLASSES))


class NextCharacter(nn.Module):
    """A causal transformer over characters: 3 layers, 96 channels, 4 heads."""

    def __init__(self, num_characters: int = 65) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_characters, 96)
        self.position = nn.Parameter(0.02 * torch.randn(_CONTEXT, 96))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(96, 4, 384, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, num_characters)
        self.register_buffer("mask", torch.ones(_CONTEXT, _CONTEXT).triu(1).bool(), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters (N, 64) to logits (N, 64, 65)."""
        hidden = self.embedding(characters) + self.position
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Characters(Workload):
    """The next character of a role's lines in Tiny Shakespeare."""

    name = "bench-characters"

    def model(self) -> nn.Module:
        return NextCharacter()

    def train_data(self, site: Site) -> Examples:
        raise NotImplementedError("the benchmark divides the text itself")

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        characters, following = batch
        return functional.cross_entropy(model(characters).flatten(0, 1), following.flatten())

    def metrics(self, model: nn.Module, batch: Examples) -> dict[str, Tensor]:
        characters, following = batch
        return {"accuracy": (model(characters).argmax(-1) == following).float().mean()}


class Sites:
    """What every site trains on, and what the model is judged by."""

    count: int
    test: Examples

    def examples_of(self, site: int) -> Examples:
        """The training examples of one site."""
        raise NotImplementedError


class MnistSites(Sites):
    """60,000 images among 100 sites, as examples/mnist divides them."""

    count = 100

    def __init__(self, data: Path, split: str) -> None:
        self._folder, self._split = data / "mnist", split
        self._images, self._labels = load(self._folder, "train")
        images, labels = load(self._folder, "t10k")
        self.test = examples(images[:_NUM_TEST], labels[:_NUM_TEST])

    def examples_of(self, site: int) -> Examples:
        options = {"split": self._split, "site": str(site), "num_sites": str(self.count)}
        own = own_indices(Site(data=self._folder, options=options), self._labels)
        return examples(self._images[own], self._labels[own])


class Roles(Sites):
    """Every role of at least 2,000 characters is a site; the roles after those in length are the test."""

    def __init__(self, data: Path) -> None:
        text = (data / "shakespeare" / "tinyshakespeare.txt").read_text("ascii")
        codes = {character: code for code, character in enumerate(sorted(set(text)))}
        characters = torch.tensor([codes[character] for character in text])
        with np.load(data / "shakespeare" / "speakers.npz", allow_pickle=False) as archive:
            lines: dict[int, list[Tensor]] = {}
            for role, begin, end in zip(
                *(archive[f"utterance_{key}"] for key in ("speaker", "start", "end")), strict=True
            ):
                lines.setdefault(int(role), []).append(characters[begin:end])
        roles = sorted((torch.cat(spoken) for spoken in lines.values()), key=len, reverse=True)
        self.count = sum(len(role) >= 2000 for role in roles)
        self._roles = roles
        self.test = self._windows(torch.cat(roles[self.count : self.count + 40]))

    def examples_of(self, site: int) -> Examples:
        return self._windows(self._roles[site])

    @staticmethod
    def _windows(characters: Tensor) -> Examples:
        """Windows of 64 characters side by side, and the characters that follow each of them."""
        num_windows = (len(characters) - 1) // _CONTEXT
        length = num_windows * _CONTEXT
        return characters[:length].view(num_windows, _CONTEXT), characters[1 : length + 1].view(num_windows, _CONTEXT)


@dataclass(frozen=True)
class Scenario:
    """A run to take updates from."""

    name: str
    workload: type[Workload]
    sites: Callable[[Path], Sites]
    learning_rate: float
    epochs: int = 5
    is_slow: bool = False
    middle_sites: int = 10
    seed: int = 0

    def num_kept(self, stage: str) -> int:
        """How many sites' updates are kept at a stage."""
        return self.middle_sites if stage == "middle" else 10


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("cnn-shards", CNN, lambda data: MnistSites(data, "shards"), 0.05, is_slow=True),
        Scenario("cnn-iid", CNN, lambda data: MnistSites(data, "iid"), 0.1, is_slow=True),
        Scenario("2nn-shards", TwoNN, lambda data: MnistSites(data, "shards"), 0.05, middle_sites=100),
        Scenario("2nn-iid", TwoNN, lambda data: MnistSites(data, "iid"), 0.1, middle_sites=100),
        Scenario("conv-iid", ConvOnly, lambda data: MnistSites(data, "iid"), 0.1, is_slow=True),
        Scenario("conv-iid-one-epoch", ConvOnly, lambda data: MnistSites(data, "iid"), 0.1, epochs=1, is_slow=True),
        Scenario("transformer", Characters, Roles, 0.3, is_slow=True),
    )
}


@dataclass(frozen=True)
class Updates:
    """The updates of one stage of a scenario, on disk: the tensors of all clients under one name, stacked."""

    path: Path
    num_clients: int
    info: Mapping[str, Any]

    def client(self, index: int) -> dict[str, Tensor]:
        """One client's update, in the model's order."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_slice(name)[index] for name in self.info["tensors"]}


def default_data() -> Path:
    """Where the data sets are looked for unless somebody says otherwise."""
    return Path(os.environ.get("FEDSTREAM_DATA") or Path(__file__).parents[2] / "shared" / "data")


def updates_of(scenario: Scenario, stage: str, data: Path, on_message: Callable[[str], None] = print) -> Updates:
    """Reads a stage's updates, having made all stages of the scenario where they are not there. Raises MissingDataError."""
    path = CACHE / f"{scenario.name}-{stage}.safetensors"
    if not path.exists():
        on_message(f"{scenario.name}: training, once; the updates are kept in {CACHE}")
        _make(scenario, data, on_message)
    with safe_open(path, "pt") as file:
        info = json.loads(file.metadata()["info"])
    return Updates(path, info["num_clients"], info)


def _make(scenario: Scenario, data: Path, on_message: Callable[[str], None]) -> None:
    """Runs the rounds up to the last stage and writes the updates of every stage."""
    try:
        sites = scenario.sites(data)
    except (OSError, ConfigError) as error:
        raise MissingDataError(f"{error}; --data or FEDSTREAM_DATA names the folder above it") from error
    CACHE.mkdir(exist_ok=True)
    workload = scenario.workload()
    model = initial_model(workload, scenario.seed)
    rng = np.random.default_rng(scenario.seed)
    stage_of = {round: stage for stage, round in STAGES.items()}
    for round in range(1, max(STAGES.values()) + 1):
        stage = stage_of.get(round)
        is_short = scenario.is_slow and stage is None
        num_clients = scenario.num_kept(stage) if stage else 5 if is_short else 10
        chosen = rng.choice(sites.count, num_clients, replace=False)
        began = time.process_time()
        answers = [
            _train(
                scenario,
                model,
                sites.examples_of(int(site)),
                seed=1000 * round + int(site),
                epochs=1 if is_short else scenario.epochs,
            )
            for site in chosen
        ]
        if stage:
            accuracy = evaluate(workload, model, sites.test, 500, CPU)[1]["accuracy"]
            info = {
                "round": round,
                "num_clients": num_clients,
                "accuracy_before": accuracy,
                "tensors": list(answers[0][1]),
            }
            on_message(
                f"{scenario.name}: {stage}, accuracy {accuracy:.3f}, {time.process_time() - began:.0f} s of processor time"
            )
            _write(CACHE / f"{scenario.name}-{stage}.safetensors", [update for _, update in answers], info)
        _fold(model, answers[:10])


def _train(
    scenario: Scenario, model: nn.Module, data: Examples, *, seed: int, epochs: int
) -> tuple[int, dict[str, Tensor]]:
    """Weight and update of one client."""
    workload = scenario.workload()
    local = initial_model(workload, 0)
    load_tensors(local, model_tensors(model))
    plan = TrainingPlan(10, OptimizerPlan("sgd", scenario.learning_rate), seed, epochs=epochs)
    outcome = train(workload, local, data, plan, CPU)
    received = model_tensors(model)
    update = {name: difference(tensor, received[name]) for name, tensor in model_tensors(local).items()}
    for name, tensor in update.items():
        check_finite(name, tensor)
    return outcome.num_examples, update


def _fold(model: nn.Module, answers: list[tuple[int, dict[str, Tensor]]]) -> None:
    """Moves the model by the mean of the updates, weighted by examples."""
    total = sum(weight for weight, _ in answers)
    for name, tensor in model_tensors(model).items():
        tensor.add_(functools.reduce(torch.add, (update[name] * (weight / total) for weight, update in answers)))


def _write(path: Path, updates: list[dict[str, Tensor]], info: Mapping[str, Any]) -> None:
    stacked = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    temporary = path.with_suffix(".tmp")
    save_file(stacked, temporary, metadata={"info": json.dumps(info)})
    temporary.replace(path)


def main() -> None:
    """Makes all updates that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder of the data sets")
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:
        for stage in STAGES:
            updates_of(SCENARIOS[name], stage, arguments.data)


if __name__ == "__main__":
    main()
