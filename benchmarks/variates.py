"""What SCAFFOLD is worth when updates lose something: MNIST in one process, with the real training loop and the real codecs.

    python -m benchmarks.variates [--encodings auto sign ...] [--seeds 0 1 2 3 4] [--rounds 20] [--data DIR] [--show]

20 sites with two digits each, 10 of them in a round, E = 1, B = 10, learning rate 0.05, the network with two hidden layers
(examples/mnist). `plain` is federated averaging, `scaffold` the same with variates, which are told from what the encoding decodes
to; the common variate travels in 8 bits (fed_server/rounds/variate.py). Encodings that want error feedback have it. No coordinator
and no other downlink codec. Rows of one seed have the same sites, cohorts, first model and order of the data; accuracy is the mean
of the last three versions' on the test images."""

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

from benchmarks.records import Interval
from benchmarks.two_layers import SteppedTwoNN
from benchmarks.updates import MnistSites, default_data
from benchmarks.vectors import Vector, accuracy, flat, load_flat, parts, send
from examples.mnist.workload import Examples
from fed_client.training.loop import train
from fed_core.codecs.registry import encoding_from_json
from fed_core.plan import ObjectivePlan, OptimizerPlan, TrainingPlan
from fed_core.tensors import model_specs
from fed_core.workload import initial_model
from fed_server.rounds.variate import ENCODING

RESULTS: Final = Path(__file__).parent / "results" / "variates.json"
ENCODINGS: Final[dict[str, dict[str, Any]]] = {
    "raw": {"kind": "raw"},
    "auto": {"kind": "auto"},
    "uniform 4": {"kind": "uniform", "bits": 4, "block": 128},
    "sign": {"kind": "sign"},
    "topk 1 %": {"kind": "topk", "fraction": 0.01},
}
OBJECTIVES: Final = ("plain", "scaffold")
NUM_SITES: Final = 20
COHORT: Final = 10
LEARNING_RATE: Final = 0.05
NUM_LAST: Final = 3


@dataclass(frozen=True)
class Row:
    """One run; bits are those of the updates' payload files, a parameter, and error that of what was encoded."""

    objective: str
    encoding: str
    seed: int
    rounds: int
    bits: float
    error: float
    accuracy: float


class Sites:
    """Who trains on what, and what they carry."""

    def __init__(self, data: Path) -> None:
        self._mnist = MnistSites(data, "shards")
        self._examples: dict[int, Examples] = {}
        self.workload = SteppedTwoNN()

    def examples(self, site: int) -> Examples:
        """Those of a site, split once."""
        if site not in self._examples:
            self._examples[site] = self._mnist.examples_of(site)
        return self._examples[site]

    def accuracy(self, model: nn.Module) -> float:
        """On the test images."""
        return accuracy(model, self._mnist.test)


def run(sites: Sites, objective: str, encoding: str, seed: int, num_rounds: int) -> Row:
    """One row. The letters are those of fed_client/training/variates.py."""
    config = encoding_from_json(json.dumps(ENCODINGS[encoding]))
    model = initial_model(sites.workload, seed)
    specs, weights = model_specs(model), flat(model)
    c = torch.zeros_like(weights)
    h: dict[int, Vector] = defaultdict(lambda: torch.zeros_like(weights))
    residuals: dict[int, Vector] = defaultdict(lambda: torch.zeros_like(weights))
    rng = np.random.default_rng(seed)
    accuracies, bits, errors = [], [], []
    for number in range(1, num_rounds + 1):
        sent = send(specs, c, ENCODING, number)[0] if c.any() else c
        updates, gained = torch.zeros_like(weights), torch.zeros_like(weights)
        for site in map(int, rng.permutation(NUM_SITES)[:COHORT]):
            load_flat(model, weights)
            plan = TrainingPlan(
                batch_size=10,
                optimizer=OptimizerPlan("sgd", LEARNING_RATE),
                seed=10**6 * seed + 1000 * number + site,
                epochs=1,
                objective=ObjectivePlan(objective),
            )
            outcome = train(
                sites.workload,
                model,
                sites.examples(site),
                plan,
                torch.device("cpu"),
                corrections=parts(specs, sent - h[site]) if objective == "scaffold" else None,
            )
            update = flat(model) - weights
            if config.wants_feedback:
                update = update + residuals[site]
            arrived, written = send(specs, update, config, plan.seed)
            residuals[site] = update - arrived
            updates += arrived
            if objective == "scaffold":
                change = -sent - arrived / outcome.work
                h[site] = h[site] + change
                gained += change
            bits.append(8 * written.total_bytes / len(weights))
            errors.append(written.fidelity.error)
        weights = weights + updates / COHORT
        c = c + gained / NUM_SITES
        if number > num_rounds - NUM_LAST:
            load_flat(model, weights)
            accuracies.append(sites.accuracy(model))
    return Row(
        objective,
        encoding,
        seed,
        num_rounds,
        round(statistics.mean(bits), 4),
        round(statistics.mean(errors), 4),
        round(statistics.mean(accuracies), 4),
    )


def show(rows: Sequence[Row]) -> None:
    """A line an encoding: what each objective came to, and the paired difference."""
    table = Table("encoding", "rounds", "b/p plain", "b/p scaffold", *OBJECTIVES, "difference, 95 %", "seeds", box=None)
    found: dict[tuple[str, int], dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row.encoding, row.rounds][row.objective][row.seed] = row
    for (encoding, rounds), by_objective in found.items():
        both = sorted(set(by_objective["plain"]) & set(by_objective["scaffold"]))
        plain, scaffold = ([by_objective[objective][seed] for seed in both] for objective in OBJECTIVES)
        interval = Interval.of([100 * (b.accuracy - a.accuracy) for a, b in zip(plain, scaffold, strict=True)])
        if interval is None:
            continue
        span = f"{interval.low:+.1f} to {interval.high:+.1f}" if interval.low is not None else "one seed"
        table.add_row(
            encoding,
            str(rounds),
            *(f"{statistics.mean(row.bits for row in each):.3g}" for each in (plain, scaffold)),
            *(f"{100 * statistics.mean(row.accuracy for row in each):.1f}" for each in (plain, scaffold)),
            f"{interval.mean:+.1f} ({span})",
            str(len(both)),
        )
    Console().print(table)


def _kept() -> dict[tuple[str, str, int, int], Row]:
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    found = [Row(**fields) for fields in rows]
    return {(row.objective, row.encoding, row.seed, row.rounds): row for row in found}


def _keep(row: Row) -> None:
    kept = _kept() | {(row.objective, row.encoding, row.seed, row.rounds): row}
    document = {"benchmark": "variates", "rows": [asdict(each) for each in kept.values()], "aims": []}
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(RESULTS)


def main() -> None:
    """Runs what is asked for, row by row, and keeps every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--show", action="store_true", help="only show what was measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not arguments.show:
        sites = Sites(arguments.data or default_data())
        for seed in arguments.seeds:
            for encoding in arguments.encodings:
                for objective in OBJECTIVES:
                    began = time.monotonic()
                    row = run(sites, objective, encoding, seed, arguments.rounds)
                    _keep(row)
                    print(f"{row}, {time.monotonic() - began:.0f} s", flush=True)
    show(list(_kept().values()))


if __name__ == "__main__":
    main()
