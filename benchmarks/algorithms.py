"""Algorithms beside federated averaging: MNIST with the real coordinator and the real client code, paired by seeds.

    python -m benchmarks.algorithms [--splits dirichlet ...] [--rows fedavg scaffold ...] [--seeds 0 1 2 3 4] [--rounds 50]
    python -m benchmarks.algorithms --tune [--splits ...] [--rows ...]
    python -m benchmarks.algorithms --show

100 sites, 10 a round, E = 5, B = 50, the network with two hidden layers (examples/mnist), float32 both ways, every version
evaluated on the 10,000 test images. The splits:

    dirichlet   mixes of digits from a Dirichlet distribution with alpha 0.1
    shards      two digits a site
    uneven      dirichlet, and site k trains 1 + k mod 10 epochs
    stragglers  dirichlet, and every fifth site takes 3 s longer than its work, the others 0.3 s: rounds are compared by the clock;
                `fedbuff` makes a version of 5 updates while 10 sites work, twice as many versions of the same work

Every row has the same tuning budget, three trials with seed 100 on 5,000 training images that nobody trains on (--tune): `fedavg`
chooses the sites' learning rate, the others one figure of their own at that rate. Rows of one seed have the same split, cohorts
(but for `fedbuff`), first model and order of the data. A gain is said only where the 95 % interval of the paired difference of the
final accuracies (mean of the last ten versions) excludes zero. Each run is merged into benchmarks/results/algorithms.json.

Data: DIR of --data (default: FEDSTREAM_DATA, else ../shared/data beside the repository) holds `mnist` with the four IDX files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.federation import NUM_SITES, Federation, train
from benchmarks.records import Interval, commit, kept_in, run_apart

ROOT: Final = Path(__file__).parent.parent
RESULT: Final = Path(__file__).parent / "results" / "algorithms.json"
SITES_WORKLOAD: Final = f"{Path(__file__).parent / 'two_layers.py'}:SteppedTwoNN"
SPLITS: Final = {
    "dirichlet": {"split": "dirichlet", "alpha": "0.1"},
    "shards": {"split": "shards"},
    "uneven": {"split": "dirichlet", "alpha": "0.1"},
    "stragglers": {"split": "dirichlet", "alpha": "0.1"},
}
NUM_FINAL: Final = 10
TUNING_SEED: Final = 100
TARGETS: Final = (0.8, 0.9)


@dataclass(frozen=True)
class Row:
    """An algorithm: what its run config says, with {value} where the figure goes that is chosen, and what is tried for it."""

    config: str
    tried: tuple[float, ...]
    is_rate: bool = False
    """Whether the figure is the sites' learning rate."""
    is_buffered: bool = False


ROWS: Final = {
    "fedavg": Row("", (0.03, 0.1, 0.3), is_rate=True),
    "fedprox": Row('[training.objective]\nkind = "fedprox"\nstrength = {value}\n', (0.001, 0.01, 0.1)),
    "scaffold": Row(
        f'[training.objective]\nkind = "scaffold"\npopulation = {NUM_SITES}\n', (0.03, 0.1, 0.3), is_rate=True
    ),
    "feddyn": Row(
        f'[training.objective]\nkind = "feddyn"\npopulation = {NUM_SITES}\nstrength = {{value}}\n', (0.01, 0.03, 0.1)
    ),
    "fednova": Row('[training.objective]\nkind = "fednova"\n', (0.03, 0.1, 0.3), is_rate=True),
    "fedavgm": Row('[server_optimizer]\nkind = "momentum"\nmomentum = {value}\n', (0.5, 0.7, 0.9)),
    "fedadam": Row('[server_optimizer]\nkind = "adam"\nlearning_rate = {value}\n', (0.001, 0.003, 0.01)),
    "fedbuff": Row(
        '[aggregation]\nkind = "mean"\nweighting = "uniform"\n', (0.03, 0.1, 0.3), is_rate=True, is_buffered=True
    ),
}
DEFAULT_ROWS: Final = {
    "dirichlet": ("fedavg", "fedprox", "scaffold", "feddyn", "fedavgm", "fedadam"),
    "shards": ("fedavg", "fedprox", "scaffold", "feddyn", "fedavgm", "fedadam"),
    "uneven": ("fedavg", "fednova"),
    "stragglers": ("fedavg", "fedbuff"),
}


@dataclass(frozen=True)
class Case:
    """One run to be measured: `value` is the row's own figure, `rate` the sites' learning rate."""

    split: str
    row: str
    seed: int
    rounds: int
    rate: float
    value: float
    is_tuning: bool = False

    def config(self) -> str:
        """The run's TOML."""
        row = ROWS[self.row]
        overridable = '["local_work"]' if self.split == "uneven" else "[]"
        mode = '[rounds]\nkind = "buffered"\nconcurrency = 10\n' if row.is_buffered else ""
        size, rounds = (5, 2 * self.rounds) if row.is_buffered else (10, self.rounds)
        return (
            f'name = "bench"\nworkload = "mnist-2nn"\nseed = {self.seed}\n'
            f"[cohort]\nsize = {size}\nmin_clients = {NUM_SITES}\n"
            f"[schedule]\nmax_rounds = {rounds}\ndeadline_seconds = 3600\n{mode}"
            f'[training]\nbatch_size = 50\nlocal_work = {{ kind = "epochs", epochs = 5 }}\noverridable = {overridable}\n'
            f'[training.optimizer]\nkind = "sgd"\nlearning_rate = {self.rate}\n'
            f'[uplink]\nkind = "raw"\n[downlink]\nkind = "raw"\n[evaluation]\nat = "coordinator"\nbatch_size = 1000\n'
            + row.config.format(value=self.value)
        )

    def federation(self) -> Federation:
        """Who trains."""
        return Federation(
            "2nn",
            SITES_WORKLOAD,
            self.seed,
            SPLITS[self.split],
            is_tuning=self.is_tuning,
            overrides=[{"epochs": 1 + site % 10} for site in range(NUM_SITES)] if self.split == "uneven" else (),
            seconds=[3.0 if site % 5 == 0 else 0.3 for site in range(NUM_SITES)] if self.split == "stragglers" else (),
        )


@dataclass
class Run:
    """What came of a case: accuracies of the versions from 1 on, and when they were made."""

    case: dict[str, Any]
    accuracy: list[float]
    committed_seconds: list[float]
    commit: str

    @property
    def final_accuracy(self) -> float:
        """Mean of the last ten versions."""
        return statistics.fmean(self.accuracy[-NUM_FINAL:])

    def first(self, target: float) -> int | None:
        """The first version as accurate as that."""
        return next((i + 1 for i, value in enumerate(self.accuracy) if value >= target), None)


def measure(case: Case, source: Path, folder: Path) -> Run:
    """One run, with a coordinator and sites of its own."""
    trained = train(case.config(), case.federation(), source, folder, f"{case.split} {case.row} {case.seed}")
    return Run(asdict(case), trained.accuracy, trained.committed_seconds, commit())


def measure_apart(case: Case, source: Path, folder: str | None) -> Run:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data = ["--data", str(source.parent)]
        return Run(**run_apart("benchmarks.algorithms", *data, "--case", json.dumps(asdict(case)), scratch))


def chosen(split: str, row: str, tuning: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Learning rate of the sites and the row's own figure, as the trials chose them; None where they were not run."""
    mine = [each for each in tuning if (each["split"], each["row"]) == (split, row)]
    if len(mine) < len(ROWS[row].tried):
        return None
    best = max(mine, key=lambda each: each["accuracy"])
    return best["rate"], best["value"]


def tune(split: str, row: str, rounds: int, source: Path, folder: str | None, console: Console) -> None:
    """The row's three trials; `fedavg` of the split comes first, for others take its learning rate."""
    with kept_in(RESULT) as content:
        of_average = chosen(split, "fedavg", content.get("tuning", []))
    for value in ROWS[row].tried:
        if not ROWS[row].is_rate and of_average is None:
            raise SystemExit(f"--tune --splits {split} --rows fedavg comes first: {row} takes its learning rate")
        rate = value if ROWS[row].is_rate else of_average[0] if of_average else 0.0
        run = measure_apart(Case(split, row, TUNING_SEED, rounds, rate, value, is_tuning=True), source, folder)
        found = {"split": split, "row": row, "rate": rate, "value": value, "accuracy": round(run.final_accuracy, 5)}
        console.print(found)
        with kept_in(RESULT) as content:
            others = [e for e in content.get("tuning", []) if (e["split"], e["row"], e["value"]) != (split, row, value)]
            content["tuning"] = [*others, found]


def summarize(content: dict[str, Any]) -> list[dict[str, Any]]:
    """One row of the table for each split and algorithm, run or not."""
    runs = [Run(**each) for each in content.get("runs", [])]

    def of(split: str, row: str) -> dict[int, Run]:
        return {r.case["seed"]: r for r in runs if (r.case["split"], r.case["row"]) == (split, row)}

    rows = []
    for split, names in DEFAULT_ROWS.items():
        plain = of(split, "fedavg")
        for name in names:
            mine = of(split, name)
            pairs = [(mine[seed], plain[seed]) for seed in sorted(mine) if seed in plain]
            difference = (
                Interval.of([a.final_accuracy - b.final_accuracy for a, b in pairs]) if name != "fedavg" else None
            )
            rows.append(
                {
                    "split": split,
                    "row": name,
                    "seeds": sorted(mine),
                    "chosen": chosen(split, name, content.get("tuning", [])),
                    "final_accuracy": statistics.fmean(r.final_accuracy for r in mine.values()) if mine else None,
                    "rounds_to": {f"{t:g}": [r.first(t) for r in mine.values()] for t in TARGETS},
                    "seconds_to": {
                        f"{t:g}": [
                            r.committed_seconds[at - 1] if (at := r.first(t)) is not None else None
                            for r in mine.values()
                        ]
                        for t in TARGETS
                    },
                    "difference": asdict(difference) if difference else None,
                    "verdict": verdict(difference),
                }
            )
    return rows


def verdict(difference: Interval | None) -> str:
    """What may be said of a paired difference."""
    if difference is None or difference.low is None or difference.high is None:
        return ""
    return "gain" if difference.low > 0 else "loss" if difference.high < 0 else "no gain here"


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """One for each split."""
    for split in SPLITS:
        table = Table(title=split)
        for column in ("row", "seeds", "rate, own figure", "final accuracy", *(f"rounds to {t:.0%}" for t in TARGETS),
                       *(f"seconds to {t:.0%}" for t in TARGETS), "minus fedavg, points (95 %)", ""):  # fmt: skip
            table.add_column(column)
        for row in (each for each in rows if each["split"] == split):
            if not row["seeds"]:
                table.add_row(row["row"], "not run")
                continue
            difference = row["difference"]
            table.add_row(
                row["row"],
                str(len(row["seeds"])),
                " ".join(f"{value:g}" for value in row["chosen"] or ()),
                f"{row['final_accuracy']:.4f}",
                *(_median(row["rounds_to"][f"{t:g}"], 0) for t in TARGETS),
                *(_median(row["seconds_to"][f"{t:g}"], 1) for t in TARGETS),
                f"{100 * difference['mean']:+.2f} ({100 * difference['low']:+.2f} to {100 * difference['high']:+.2f})"
                if difference and difference["low"] is not None
                else "",
                row["verdict"],
            )
        yield table


def _median(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f}" if len(known) == len(values) else f"reached by {len(known)}"


def main() -> None:
    """Measures, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="*", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=None, help="default: those of the split")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tune", action="store_true", help="the trials, on held-out training images")
    parser.add_argument("--show", action="store_true", help="only the tables of what was measured")
    parser.add_argument("--data", type=Path, default=None, help="folder that holds mnist")
    parser.add_argument("--folder", default=None, help="where to keep files while measuring; default: temporary")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = (arguments.data or Path(os.environ.get("FEDSTREAM_DATA", ROOT.parent / "shared" / "data"))) / "mnist"
    if arguments.case:
        run = measure(Case(**json.loads(arguments.case[0])), source, Path(arguments.case[1]))
        print(json.dumps(asdict(run)), flush=True)
        os._exit(0)  # a hundred channels take their time to unload
    console = Console(width=160)
    for split in [] if arguments.show else arguments.splits:
        for row in [name for name in DEFAULT_ROWS[split] if arguments.rows is None or name in arguments.rows]:
            if arguments.tune:
                tune(split, row, arguments.rounds, source, arguments.folder, console)
                continue
            with kept_in(RESULT) as content:
                found = chosen(split, row, content.get("tuning", []))
            if found is None:
                raise SystemExit(f"{split} {row}: its figures are not chosen yet; run with --tune first")
            for seed in arguments.seeds:
                run = measure_apart(Case(split, row, seed, arguments.rounds, *found), source, arguments.folder)
                console.print(f"{split} {row} {seed}: {run.final_accuracy:.4f}")
                with kept_in(RESULT) as content:
                    key = ("split", "row", "seed")
                    others = [e for e in content.get("runs", []) if any(e["case"][k] != run.case[k] for k in key)]
                    content["runs"] = [*others, asdict(run)]
    with kept_in(RESULT) as content:
        content["rows"] = summarize(content)
        content["aims"] = []
        rows = content["rows"]
    for table in tables(rows):
        console.print(table)


if __name__ == "__main__":
    main()
