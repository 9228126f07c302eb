"""What error feedback does to coarse codecs: federated averaging on MNIST in one process, with the real codecs.

    python -m benchmarks.feedback [--only sign ...] [--ways none ef ...] [--rounds 40] [--seeds 0 1] [--data DIR]

100 clients of whom 10 take part in a round, two digits each, E = 1, B = 10, the network with two hidden layers (examples/mnist);
and 10 clients who all take part in every round. No coordinator, no downlink codec: what is measured is what the clients' updates u
make of the model, sent in four ways. C is what a codec makes of a tensor and the receiver decodes again.

    none    C(u)
    ef      C(u + e), the residual e = (u + e) - C(u + e) stays at the client (fed_client/training/residual.py)
    ef21    C(u - g), and g += C(u - g) at both ends, of which the coordinator averages the cohort's: Richtarik, Sokolov and
            Fatkhullin 2021, https://arxiv.org/abs/2106.05203, where all clients take part; the coordinator remembers every client
    cafe    C(u - a) + a, with a the last round's aggregate, which every client can know: Ortega et al. 2024,
            https://arxiv.org/abs/2412.04538; nobody remembers anything

Bits are those of the whole payload file. Rows of one seed have the same clients, cohorts, first model and order of the data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.two_layers import WrittenOutTwoNN
from benchmarks.updates import MnistSites, default_data
from benchmarks.vectors import Vector, accuracy, flat, load_flat, send
from examples.mnist.workload import Examples
from fed_client.training.loop import train
from fed_core.codecs.registry import EncodingConfig, encoding_from_json
from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_core.specs import TensorSpec
from fed_core.tensors import model_specs
from fed_core.workload import initial_model

RESULTS: Final = Path(__file__).parent / "results" / "feedback.json"
ENCODINGS: Final[dict[str, dict[str, Any]]] = {
    "raw": {"kind": "raw"},
    "sign": {"kind": "sign"},
    "topk 1 %": {"kind": "topk", "fraction": 0.01},
    "uniform 2": {"kind": "uniform", "bits": 2},
    "lrq 0.5": {"kind": "lrq", "target_error": 0.5, "max_tensor_error": 0.9},
    "auto": {"kind": "auto"},
}
WAYS: Final = ("none", "ef", "ef21", "cafe")
POPULATIONS: Final = {"10 of 100": 100, "10 of 10": 10}
COHORT: Final = 10
LEARNING_RATE: Final = 0.1
NUM_LAST: Final = 5


@dataclass(frozen=True)
class Row:
    """One run: accuracy is that of the last rounds' versions on the test images and their mean, error that of what was encoded."""

    clients: str
    encoding: str
    way: str
    seed: int
    rounds: int
    bits: float
    error: float
    accuracy: float
    accuracies: list[float]


class Wire:
    """What a codec makes of updates."""

    def __init__(self, specs: Sequence[TensorSpec], encoding: EncodingConfig) -> None:
        self._specs, self._encoding = list(specs), encoding
        self.num_bytes = self.num_sent = 0
        self.errors: list[float] = []

    def send(self, values: Vector, seed: int) -> Vector:
        """What arrives of it."""
        arrived, written = send(self._specs, values, self._encoding, seed)
        self.num_bytes += written.total_bytes
        self.num_sent += 1
        self.errors.append(written.fidelity.error)
        return arrived


class Feedback:
    """A way to send updates; `mean` is what the coordinator makes of a round's."""

    def __init__(self, way: str, wire: Wire, length: int) -> None:
        self._way, self._wire = way, wire
        self._remembered: dict[int, Vector] = defaultdict(lambda: torch.zeros(length))
        self._aggregate = torch.zeros(length)

    def mean(self, updates: dict[int, Vector], round: int) -> Vector:
        """The mean of the updates by client, as it arrives."""
        arrived = [self._arrives(client, update, 1000 * round + client) for client, update in updates.items()]
        self._aggregate = torch.stack(arrived).mean(0)
        return self._aggregate

    def _arrives(self, client: int, update: Vector, seed: int) -> Vector:
        remembered = self._remembered[client]
        match self._way:
            case "ef":
                total = update + remembered
                arrived = self._wire.send(total, seed)
                self._remembered[client] = total - arrived
                return arrived
            case "ef21":
                remembered += self._wire.send(update - remembered, seed)
                return remembered.clone()
            case "cafe":
                return self._wire.send(update - self._aggregate, seed) + self._aggregate
            case _:
                return self._wire.send(update, seed)


class Clients:
    """Who trains on what, and how good a model is."""

    def __init__(self, data: Path) -> None:
        self._sites = MnistSites(data, "shards")
        self._examples: dict[int, Examples] = {}
        self.workload = WrittenOutTwoNN()

    def update(self, model: nn.Module, start: Vector, client: int, seed: int) -> Vector:
        """What one epoch changes of the model that begins as `start`."""
        if client not in self._examples:
            self._examples[client] = self._sites.examples_of(client)
        load_flat(model, start)
        plan = TrainingPlan(batch_size=10, optimizer=OptimizerPlan("sgd", LEARNING_RATE), seed=seed, epochs=1)
        train(self.workload, model, self._examples[client], plan, torch.device("cpu"))
        return flat(model) - start

    def accuracy(self, model: nn.Module, values: Vector) -> float:
        """On the test images."""
        load_flat(model, values)
        return accuracy(model, self._sites.test)


def run(clients: Clients, population: str, encoding: str, way: str, seed: int, num_rounds: int) -> Row:
    """One row."""
    model = initial_model(clients.workload, seed)
    weights = flat(model)
    wire = Wire(model_specs(model), encoding_from_json(json.dumps(ENCODINGS[encoding])))
    feedback = Feedback(way, wire, len(weights))
    rng = np.random.default_rng(seed)
    accuracies = []
    for round in range(1, num_rounds + 1):
        cohort = rng.permutation(POPULATIONS[population])[:COHORT]
        updates = {
            int(client): clients.update(model, weights, int(client), 10**6 * seed + 1000 * round + int(client))
            for client in cohort
        }
        weights = weights + feedback.mean(updates, round)
        if round > num_rounds - NUM_LAST:
            accuracies.append(clients.accuracy(model, weights))
    return Row(
        clients=population,
        encoding=encoding,
        way=way,
        seed=seed,
        rounds=num_rounds,
        bits=8 * wire.num_bytes / wire.num_sent / len(weights),
        error=statistics.mean(wire.errors),
        accuracy=statistics.mean(accuracies),
        accuracies=[round_to(value) for value in accuracies],
    )


def round_to(value: float) -> float:
    """Four digits: the test set has ten thousand images."""
    return round(value, 4)


def show(rows: Sequence[Row]) -> None:
    """A line per clients and encoding: bits, and the accuracy that each way came to, by seed."""
    table = Table("clients", "encoding", "b/p", *WAYS, box=None)
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.clients, row.encoding].append(row)
    for (population, encoding), found in groups.items():
        bits = sorted({f"{row.bits:.3g}" for row in found if row.way in ("none", "ef")}, key=float)
        cells = [
            ", ".join(f"{100 * row.accuracy:.1f}" for row in sorted(found, key=lambda r: r.seed) if row.way == way)
            for way in WAYS
        ]
        table.add_row(population, encoding, " ".join(dict.fromkeys((bits[0], bits[-1]))) if bits else "", *cells)
    Console().print(table)


def _kept() -> dict[tuple[str, str, str, int, int], Row]:
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return {_key(row): row for row in (Row(**fields) for fields in rows)}


def _key(row: Row) -> tuple[str, str, str, int, int]:
    return row.clients, row.encoding, row.way, row.seed, row.rounds


def main() -> None:
    """Runs what is asked for, row by row, and keeps every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--clients", nargs="+", choices=POPULATIONS, default=list(POPULATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--data", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clients = Clients(arguments.data or default_data())
    kept = _kept()
    for seed in arguments.seeds:
        for population in arguments.clients:
            for encoding in arguments.only:
                for way in arguments.ways if encoding != "raw" else ["none"]:
                    began = time.monotonic()
                    row = run(clients, population, encoding, way, seed, arguments.rounds)
                    kept[_key(row)] = row
                    RESULTS.write_text(
                        json.dumps(
                            {"benchmark": "feedback", "rows": [asdict(each) for each in kept.values()], "aims": []},
                            indent=1,
                        )
                        + "\n"
                    )
                    print(
                        f"{population}, {encoding}, {way}, seed {seed}: {row.bits:.3g} b/p, {100 * row.accuracy:.2f} %, "
                        f"{time.monotonic() - began:.0f} s",
                        flush=True,
                    )
    show(list(kept.values()))


if __name__ == "__main__":
    main()
