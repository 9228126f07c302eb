"""Poisoned cohorts: what attackers make of a model under each robust rule.

    python -m benchmarks.poisoned [--rules median ...] [--attacks sign_flip ...] [--splits iid ...] [--rounds 30] [--seed 0]

MNIST, 20 sites of 3,000 images who all take part, 4 of them bad, E = 1, B = 50, learning rate 0.1, the network with two hidden
layers (examples/mnist), in one process with the coordinator's own aggregators. The bad sites know all honest updates of the round,
mu their mean, s their standard deviation by coordinate:

    sign_flip    what they trained, turned round and four times as large
    scaling      noise, ten times as long as the honest updates
    label_flip   trained on 9 - digit, and three times as large
    alie         mu - z s, z as large as goes unseen (a little is enough: Baruch et al. 2019, https://arxiv.org/abs/1902.06156)
    ipm          -5 mu (inner product manipulation: Xie et al. 2019, https://arxiv.org/abs/1903.03936)
    min_max      mu - g s, g the largest that is nowhere further from an honest update than those are from each other (Shejwalkar
                 and Houmansadr 2021, NDSS, min-max with the standard deviation)

`iid` sites are equal random parts, `dirichlet` sites have mixes of digits from a Dirichlet distribution with alpha 0.5. Accuracy is
the mean of the last five versions on the 10,000 test images. An attack counts where it costs the plain mean at least 20 points; a
rule is then to stay within 3 points of itself unattacked (iid). Runs are merged into benchmarks/results/poisoned.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.robust import write_update
from benchmarks.two_layers import SteppedTwoNN
from benchmarks.updates import default_data
from benchmarks.vectors import accuracy, flat, load_flat, parts
from examples.mnist.workload import Examples, examples, load, own_indices
from fed_client.training.loop import train
from fed_core.payload.reader import PayloadReader
from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_core.specs import TensorSpec
from fed_core.tensors import model_specs
from fed_core.workload import Site, initial_model
from fed_server.aggregation.base import AggregatorSetting
from fed_server.aggregation.grid import GridPolicy, make_grid
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.registry import new_aggregator
from fed_server.config import RunConfig, union_members

RESULTS: Final = Path(__file__).parent / "results" / "poisoned.json"
NUM_SITES: Final = 20
NUM_BAD: Final = 4
NUM_LAST: Final = 5
COSTLY: Final = 0.2
ALLOWED: Final = 3.0
SPLITS: Final = {"iid": {"split": "iid"}, "dirichlet": {"split": "dirichlet", "alpha": "0.5"}}
RULES: Final[dict[str, dict[str, Any]]] = {
    "mean": {"kind": "mean"},
    **{
        kind: {"kind": kind, "num_byzantine": NUM_BAD}
        for kind in ("median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "norm_bounding",
                     "centered_clipping")
    },
    "median, nearest": {"kind": "median", "num_byzantine": NUM_BAD, "mixing": "nearest"},
    "multi_krum, nearest": {"kind": "multi_krum", "num_byzantine": NUM_BAD, "mixing": "nearest"},
}  # fmt: skip

Updates = Tensor
"""One update a row, float32."""


@dataclass(frozen=True)
class Row:
    """One run."""

    split: str
    rule: str
    attack: str
    seed: int
    rounds: int
    accuracy: float
    accuracies: list[float]


def _little(honest: Updates, own: Updates, generator: torch.Generator) -> Updates:
    num_needed = NUM_SITES // 2 + 1 - NUM_BAD
    z = NormalDist().inv_cdf((NUM_SITES - NUM_BAD - num_needed) / (NUM_SITES - NUM_BAD))
    return (honest.mean(0) - z * honest.std(0)).expand(NUM_BAD, -1)


def _min_max(honest: Updates, own: Updates, generator: torch.Generator) -> Updates:
    center, direction = honest.mean(0), -honest.std(0)
    farthest = float(torch.cdist(honest, honest).max())
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        if float((honest - (center + middle * direction)).norm(dim=1).max()) <= farthest:
            low = middle
        else:
            high = middle
    return (center + low * direction).expand(NUM_BAD, -1)


def _scaling(honest: Updates, own: Updates, generator: torch.Generator) -> Updates:
    noise = torch.randn(own.shape, generator=generator)
    return noise / noise.norm(dim=1, keepdim=True) * 10 * honest.norm(dim=1).mean()


Attack = Callable[[Updates, Updates, torch.Generator], Updates]
ATTACKS: Final[dict[str, Attack]] = {
    "none": lambda honest, own, generator: own,
    "sign_flip": lambda honest, own, generator: -4 * own,
    "scaling": _scaling,
    "label_flip": lambda honest, own, generator: 3 * own,
    "alie": _little,
    "ipm": lambda honest, own, generator: (-5 * honest.mean(0)).expand(NUM_BAD, -1),
    "min_max": _min_max,
}
"""From the honest updates and what the bad sites trained themselves to what they send."""


class Federation:
    """The sites' data, the model and the test images."""

    def __init__(self, data: Path, split: str) -> None:
        images, labels = load(data / "mnist", "train")
        self.test = examples(*load(data / "mnist", "t10k"))
        self.workload = SteppedTwoNN()
        self._parts: list[Examples] = []
        for site in range(NUM_SITES):
            options = {"site": str(site), "num_sites": str(NUM_SITES), **SPLITS[split]}
            own = own_indices(Site(data=data / "mnist", options=options), labels)
            self._parts.append(examples(images[own], labels[own]))

    def update(self, model: nn.Module, start: Tensor, site: int, seed: int, *, flipped: bool) -> Tensor:
        """What a round of training changes."""
        load_flat(model, start)
        images, labels = self._parts[site]
        plan = TrainingPlan(batch_size=50, optimizer=OptimizerPlan("sgd", 0.1), seed=seed, epochs=1)
        train(self.workload, model, (images, 9 - labels if flipped else labels), plan, torch.device("cpu"))
        return flat(model) - start

    def accuracy(self, model: nn.Module, values: Tensor) -> float:
        """On the test images."""
        load_flat(model, values)
        return accuracy(model, self.test)


def aggregate(specs: Sequence[TensorSpec], updates: Updates, rule: str, folder: Path) -> Tensor:
    """What the coordinator's aggregator makes of the updates."""
    config: Any = union_members(RunConfig.model_fields["aggregation"])[RULES[rule]["kind"]].model_validate(RULES[rule])
    grid = make_grid(specs, {spec.name: 64.0 for spec in specs}, GridPolicy(NUM_SITES, 1))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        aggregator = new_aggregator(AggregatorSetting(specs, grid, merge_rules(specs, []), Path(scratch)), config)
        for number, update in enumerate(updates):
            path = Path(scratch) / f"{number}.update"
            write_update(path, zip(specs, parts(specs, update).values(), strict=True))
            with PayloadReader(path) as reader:
                aggregator.add(reader, 1)
        aggregator.prepare()
        found = [aggregator.report(spec, 0, spec.num_elements) for spec in specs]
    return torch.cat([part for part in found if part is not None]).float()


def run(federation: Federation, split: str, rule: str, attack: str, seed: int, num_rounds: int, folder: Path) -> Row:
    """One row."""
    model = initial_model(federation.workload, seed)
    specs, weights = model_specs(model), flat(model)
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for round in range(1, num_rounds + 1):
        trained = torch.stack(
            [
                federation.update(
                    model, weights, site, 10**6 * seed + 1000 * round + site,
                    flipped=attack == "label_flip" and site < NUM_BAD,
                )
                for site in range(NUM_SITES)
            ]
        )  # fmt: skip
        sent = torch.cat([ATTACKS[attack](trained[NUM_BAD:], trained[:NUM_BAD], generator), trained[NUM_BAD:]])
        weights = weights + aggregate(specs, sent, rule, folder)
        if not weights.isfinite().all():  # a model that left the numbers guesses
            accuracies = [0.1] * NUM_LAST
            break
        if round > num_rounds - NUM_LAST:
            accuracies.append(federation.accuracy(model, weights))
    return Row(
        split, rule, attack, seed, num_rounds, statistics.mean(accuracies), [round_(value) for value in accuracies]
    )


def round_(value: float) -> float:
    """Four digits: the test set has ten thousand images."""
    return round(value, 4)


def summarize(rows: Sequence[Row]) -> tuple[list[Table], list[dict[str, Any]]]:
    """A table for each split, accuracies in percent, and the aims."""
    found = {(row.split, row.rule, row.attack): row.accuracy for row in rows}
    tables, aims = [], []
    for split in SPLITS:
        table = Table("rule", *ATTACKS, title=f"{split}: accuracy, %")
        for rule in RULES:
            cells = (found.get((split, rule, attack)) for attack in ATTACKS)
            table.add_row(rule, *("not run" if cell is None else f"{100 * cell:.1f}" for cell in cells))
        tables.append(table)
    costly = [
        attack
        for attack in ATTACKS
        if found.get(("iid", "mean", "none"), 0.0) - found.get(("iid", "mean", attack), math.inf) >= COSTLY
    ]
    for rule in RULES:
        lost = [
            100 * (found["iid", rule, "none"] - found["iid", rule, attack])
            for attack in costly
            if ("iid", rule, attack) in found and ("iid", rule, "none") in found
        ]
        if rule != "mean" and lost:
            what = f"{rule}, iid: points lost to the worst of {', '.join(costly)}"
            aims.append({"what": what, "value": max(lost), "aim": ALLOWED, "direction": "max", "unit": "points"})
    return tables, aims


def _kept() -> Iterator[Row]:
    if RESULTS.exists():
        yield from (Row(**fields) for fields in json.loads(RESULTS.read_text())["rows"])


def main() -> None:
    """Runs what is asked for, row by row, keeps every row, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="*", choices=list(RULES), default=list(RULES))
    parser.add_argument("--attacks", nargs="*", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--splits", nargs="*", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=None, help="folder that holds mnist")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to keep files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, kept = Console(width=160), {(row.split, row.rule, row.attack): row for row in _kept()}
    for split in arguments.splits:
        federation = Federation(arguments.data or default_data(), split)
        for rule in arguments.rules:
            for attack in arguments.attacks:
                began = time.monotonic()
                row = run(federation, split, rule, attack, arguments.seed, arguments.rounds, arguments.folder)
                kept[split, rule, attack] = row
                print(
                    f"{split}, {rule}, {attack}: {100 * row.accuracy:.2f} %, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
                tables, aims = summarize(list(kept.values()))
                result = {"benchmark": "poisoned", "rows": [asdict(each) for each in kept.values()], "aims": aims}
                RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    tables, aims = summarize(list(kept.values()))
    for table in tables:
        console.print(table)
    for aim in aims:
        console.print(f"{aim['what']}: {aim['value']:.2f} (aim: at most {aim['aim']:g})")


if __name__ == "__main__":
    main()
