"""One label per site: MNIST and Fashion-MNIST among ten sites, with the real coordinator and the real client code.

    python -m benchmarks.label_skew [--data-sets mnist fashion_mnist] [--rows ...] [--seeds 0 1 2] [--rounds 50]

Ten sites who all take part, 50 rounds, the network with two hidden layers (examples/mnist), float32 both ways, every version
evaluated on the 10,000 test images. Much local training makes each site's model say its own label, and their mean says little;
`fedavg, E = 10` shows that. What works is little local work and a server optimizer that makes much of it: one step of 500 images
and Adam at the coordinator (Reddi et al. 2021), whose steps do not depend on how long the updates are.

To compare with: the best of FedAvg, FedProx, SCAFFOLD and FedNova in NIID-Bench's setting (50 rounds, E = 10, SGD with momentum
0.9, a convolutional network), as rerun with Flower: 52.6 % and 32.7 %. Each run is merged into benchmarks/results/label_skew.json.

Data: DIR of --data (default: FEDSTREAM_DATA, else ../shared/data beside the repository) holds `mnist` and `fashion_mnist`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.federation import Federation, train
from benchmarks.records import commit, run_apart
from benchmarks.updates import default_data

RESULT: Final = Path(__file__).parent / "results" / "label_skew.json"
SITES_WORKLOAD: Final = f"{Path(__file__).parent / 'two_layers.py'}:SteppedTwoNN"
NUM_SITES: Final = 10
ROWS: Final = {
    "fedavg, E = 10": 'batch_size = 64\nlocal_work = { kind = "epochs", epochs = 10 }\n'
    'optimizer = { kind = "sgd", learning_rate = 0.01, momentum = 0.9 }\n',
    "one step, fedavgm": 'batch_size = 500\nlocal_work = { kind = "steps", steps = 1 }\n'
    'optimizer = { kind = "sgd", learning_rate = 0.1 }\n[server_optimizer]\nkind = "momentum"\nmomentum = 0.9\n',
    "one step, fedadam": 'batch_size = 500\nlocal_work = { kind = "steps", steps = 1 }\n'
    'optimizer = { kind = "sgd", learning_rate = 0.1 }\n[server_optimizer]\nkind = "adam"\nlearning_rate = 0.003\n'
    "tau = 1e-5\n",
}
AIMED: Final = "one step, fedadam"
AIMS: Final = {"mnist": 90.0, "fashion_mnist": 65.0}


@dataclass
class Run:
    """One run: accuracies of the versions from 1 on."""

    data_set: str
    row: str
    seed: int
    rounds: int
    accuracy: list[float]
    config: str
    commit: str


def config_of(row: str, seed: int, rounds: int) -> str:
    """The run's TOML."""
    return (
        f'name = "bench"\nworkload = "mnist-2nn"\nseed = {seed}\n'
        f"[cohort]\nsize = {NUM_SITES}\nquorum = {NUM_SITES}\nmin_clients = {NUM_SITES}\n"
        f"[schedule]\nmax_rounds = {rounds}\ndeadline_seconds = 3600\n"
        '[uplink]\nkind = "raw"\n[downlink]\nkind = "raw"\n[evaluation]\nat = "coordinator"\nbatch_size = 1000\n'
        f"[training]\n{ROWS[row]}"
    )


def measure(data_set: str, row: str, seed: int, rounds: int, data: Path, folder: Path) -> Run:
    """One run, with a coordinator and sites of its own."""
    federation = Federation("2nn", SITES_WORKLOAD, seed, {"split": "label"}, num_sites=NUM_SITES)
    config = config_of(row, seed, rounds)
    trained = train(config, federation, data / data_set, folder, f"{data_set}, {row}, {seed}")
    return Run(data_set, row, seed, rounds, trained.accuracy, config, commit())


def measure_apart(data_set: str, row: str, seed: int, rounds: int, data: Path) -> Run:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        case = [data_set, row, str(seed), str(rounds), scratch]
        return Run(**run_apart("benchmarks.label_skew", "--data", str(data), "--case", *case))


def aims(runs: list[Run]) -> list[dict[str, Any]]:
    """The figures that are aimed at: the mean over seeds of the last version's accuracy; None where it was not measured."""
    found = []
    for data_set, aim in AIMS.items():
        last = [100 * run.accuracy[-1] for run in runs if (run.data_set, run.row) == (data_set, AIMED)]
        what = f"{data_set}, one label per site, {AIMED}: accuracy after the last round"
        value = statistics.fmean(last) if last else None
        found.append({"what": what, "value": value, "aim": aim, "direction": "min", "unit": "%"})
    return found


def table(runs: list[Run]) -> Table:
    """Accuracy after the last round by seed, and the best of the run."""
    made = Table("data", "row", "last, %", "best, %", title="One label per site")
    for data_set in AIMS:
        for row in ROWS:
            mine = [run for run in runs if (run.data_set, run.row) == (data_set, row)]
            cells = (", ".join(f"{100 * pick(run.accuracy):.1f}" for run in mine) for pick in (lambda a: a[-1], max))
            made.add_row(data_set, row, *(cells if mine else ("not run", "")))
    return made


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", nargs="*", choices=list(AIMS), default=list(AIMS))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = arguments.data or default_data()
    if arguments.case:
        data_set, row, seed, rounds, folder = arguments.case
        print(json.dumps(asdict(measure(data_set, row, int(seed), int(rounds), data, Path(folder)))), flush=True)
        os._exit(0)
    kept = {}
    if RESULT.exists():
        kept = {(r["data_set"], r["row"], r["seed"]): Run(**r) for r in json.loads(RESULT.read_text())["rows"]}
    for data_set in arguments.data_sets:
        for row in arguments.rows:
            for seed in arguments.seeds:
                run = measure_apart(data_set, row, seed, arguments.rounds, data)
                kept[data_set, row, seed] = run
                print(f"{data_set}, {row}, seed {seed}: {100 * run.accuracy[-1]:.1f} %", flush=True)
                runs = [kept[key] for key in sorted(kept)]
                result = {"benchmark": "label_skew", "rows": [asdict(each) for each in runs], "aims": aims(runs)}
                RESULT.write_text(json.dumps(result, indent=1) + "\n")
    runs = [kept[key] for key in sorted(kept)]
    console = Console(width=120)
    console.print(table(runs))
    for aim in aims(runs):
        value = "not run" if aim["value"] is None else f"{aim['value']:.1f} %"
        console.print(f"{aim['what']}: {value} (aim: at least {aim['aim']:g} %)")


if __name__ == "__main__":
    main()
