"""Bytes to accuracy: federated averaging on MNIST with the real coordinator and the real client code, all bytes counted.

    python -m benchmarks.bytes_to_accuracy [--rows auto ...] [--model 2nn] [--split iid] [--participation 0.1] [--epochs 5]
                                           [--seeds 0 1 2] [--rounds 40]
    python -m benchmarks.bytes_to_accuracy --quick
    python -m benchmarks.bytes_to_accuracy --tune

100 sites, E = 5, B = 10; the network with two hidden layers, or the one with convolutions (examples/mnist). The coordinator is a
fed-server process that evaluates every version on the 10,000 test images; the sites share a process (benchmarks/simulated_sites.py)
and talk to it over loopback. Rows of one seed have the same split, cohorts, first model and order of the data. Bytes are the
coordinator's own count of bulk traffic, whatever it was needed for; the bytes of the sockets, control messages included, stand
beside it. Each run is merged into benchmarks/results/bytes_to_accuracy.json when it ends; what was never run is listed as "not
run".

Data: DIR of --data (default: FEDSTREAM_DATA, else ../shared/data beside the repository) holds `mnist` with the four IDX files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.federation import NUM_SITES, WORKLOADS, Federation, train
from benchmarks.records import Interval, commit, kept_in, run_apart

ROOT: Final = Path(__file__).parent.parent
RESULT: Final = Path(__file__).parent / "results" / "bytes_to_accuracy.json"
IMAGE: Final = ROOT / "docs" / "images" / "bytes_to_accuracy.png"
SITES_WORKLOADS: Final = WORKLOADS | {"2nn": f"{Path(__file__).parent / 'two_layers.py'}:WrittenOutTwoNN"}
"""The sites' may differ in the speed of a step."""

GRID: Final = (0.05, 0.1, 0.2)
LEARNING_RATES: Final = {"2nn": 0.2, "cnn": 0.1}
"""2nn: the best of the grid for `raw`, seed 0, on held-out training images (--tune), looked for with the split iid alone. cnn: the
middle of the grid, nothing looked for."""
TARGETS: Final = {
    ("2nn", "iid"): (0.97,),
    ("2nn", "shards"): (0.9, 0.97),
    ("cnn", "iid"): (0.99,),
    ("cnn", "shards"): (0.99,),
}
ROUNDS: Final = {("2nn", "iid"): 40, ("2nn", "shards"): 100, ("cnn", "iid"): 35, ("cnn", "shards"): 100}
"""By model and split, at 10 % a round."""
NUM_FINAL: Final = 10
NUM_SEEDS: Final = 3

# What a row says in its run config; nothing where the default is meant.
ROWS: Final[dict[str, str]] = {
    "raw": '[uplink]\nkind = "raw"\n[downlink]\nkind = "raw"\n',
    "cast float16": '[uplink]\nkind = "cast"\nto = "float16"\n',
    "uniform 8": '[uplink]\nkind = "uniform"\nbits = 8\n',
    "uniform 4": '[uplink]\nkind = "uniform"\nbits = 4\n',
    "fsq": '[uplink]\nkind = "fsq"\n',
    "lrq": '[uplink]\nkind = "lrq"\n',
    "auto": "",
    "sign": '[uplink]\nkind = "sign"\n',
    "topk 5 %": '[uplink]\nkind = "topk"\n',
    "eden 2": '[uplink]\nkind = "eden"\nbits = 2\n',
}
MAIN_ROWS: Final = ("raw", "auto")

Key: TypeAlias = tuple[str, str, float, int, str, int]
"""Model, split, participation, epochs, row and seed."""
Setting: TypeAlias = tuple[str, str, float, int]
"""The first four of them."""


@dataclass(frozen=True)
class Case:
    """One run to be measured."""

    row: str
    split: str
    participation: float
    seed: int
    rounds: int
    learning_rate: float
    is_tuning: bool = False
    model: str = "2nn"
    epochs: int = 5

    @property
    def key(self) -> Key:
        """What it is a repetition of where it is the same."""
        return self.model, self.split, self.participation, self.epochs, self.row, self.seed

    def config(self) -> str:
        """The run's TOML."""
        size = round(NUM_SITES * self.participation)
        return (
            f'name = "bench"\nworkload = "mnist-{self.model}"\nseed = {self.seed}\n'
            f"[cohort]\nsize = {size}\nquorum = {size}\nmin_clients = {NUM_SITES}\n"
            f"[schedule]\nmax_rounds = {self.rounds}\ndeadline_seconds = 3600\n"
            f'[training]\nbatch_size = 10\nlocal_work = {{ kind = "epochs", epochs = {self.epochs} }}\n'
            f'[training.optimizer]\nkind = "sgd"\nlearning_rate = {self.learning_rate}\n'
            f'[evaluation]\nat = "coordinator"\nbatch_size = 1000\n{ROWS[self.row]}'
        )


@dataclass
class Run:
    """What came of a case. Bytes are those of bulk messages (Traffic.wire_bytes), by round where they are lists."""

    row: str
    split: str
    participation: float
    seed: int
    rounds: int
    learning_rate: float
    num_parameters: int
    num_updates: list[int]
    accuracy: list[float]
    up_bytes: list[int]
    down_bytes: list[int]
    up_payload_bytes: int
    down_payload_bytes: int
    raw_bytes: int
    socket_up_bytes: int | None
    socket_down_bytes: int | None
    error: float
    gain: float
    fetches: dict[str, int]
    num_diverged: int
    num_failed: int
    warnings: dict[str, int]
    seconds_per_round: float
    job_seconds: dict[str, float]
    config: str
    commit: str = ""
    model: str = "2nn"
    epochs: int = 5

    @property
    def key(self) -> Key:
        """As that of its case."""
        return self.model, self.split, self.participation, self.epochs, self.row, self.seed

    def bits(self, num_bytes: float, first: int = 0) -> float:
        """Bits per folded update and parameter."""
        return 8 * num_bytes / (sum(self.num_updates[first:]) * self.num_parameters)

    def total(self, first: int = 0) -> float:
        """Bits both ways, of the rounds from `first` (counted from 0) on."""
        return self.bits(sum(self.up_bytes[first:]) + sum(self.down_bytes[first:]), first)

    def rounds_to(self, target: float) -> int | None:
        """The first round that committed a version as accurate as that."""
        return next((i + 1 for i, value in enumerate(self.accuracy) if value >= target), None)

    def bytes_to(self, target: float) -> int | None:
        """Bytes both ways up to and with that round."""
        rounds = self.rounds_to(target)
        return None if rounds is None else sum(self.up_bytes[:rounds]) + sum(self.down_bytes[:rounds])

    @property
    def final_accuracy(self) -> float:
        """Mean of the last ten rounds."""
        return statistics.fmean(self.accuracy[-NUM_FINAL:])


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(case: Case, source: Path, folder: Path) -> Run:
    """One run from version 0 to its last round, with a coordinator and sites of its own."""
    federation = Federation(
        case.model, SITES_WORKLOADS[case.model], case.seed, {"split": case.split}, is_tuning=case.is_tuning
    )
    trained = train(case.config(), federation, source, folder, str(case.key))
    report, (up, down) = trained.report, trained.sockets
    versions = [model for model in report.models if model.version > 0]
    clients = [client for each in report.rounds for client in each.clients]
    fidelities = [client.fidelity for client in clients if client.HasField("fidelity")]
    return Run(
        row=case.row,
        split=case.split,
        participation=case.participation,
        seed=case.seed,
        rounds=case.rounds,
        learning_rate=case.learning_rate,
        num_parameters=report.run.num_parameters,
        num_updates=[model.num_updates for model in versions],
        accuracy=trained.accuracy,
        up_bytes=[each.uplink.wire_bytes for each in report.rounds],
        down_bytes=[each.downlink.wire_bytes for each in report.rounds],
        up_payload_bytes=report.uplink.payload_bytes,
        down_payload_bytes=report.downlink.payload_bytes,
        raw_bytes=report.uplink.raw_bytes + report.downlink.raw_bytes,
        socket_up_bytes=up,
        socket_down_bytes=down,
        error=statistics.fmean(each.error for each in fidelities),
        gain=statistics.fmean(each.gain for each in fidelities),
        fetches={str(number): count for number, count in sorted(trained.journal.fetches.items())},
        num_diverged=sum(client.has_diverged for client in clients),
        num_failed=sum(client.reason != "" for client in clients),
        warnings=dict(trained.journal.warnings),
        seconds_per_round=round(trained.seconds / len(versions), 2),
        job_seconds={job: round(seconds, 2) for job, seconds in sorted(trained.job_seconds.items())},
        config=case.config(),
        commit=commit(),
        model=case.model,
        epochs=case.epochs,
    )


def measure_apart(case: Case, source: Path, folder: str | None) -> Run:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data = ["--data", str(source.parent)]
        return Run(**run_apart("benchmarks.bytes_to_accuracy", *data, "--case", json.dumps(asdict(case)), scratch))


# -- what others would send --------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """The wire of another framework, computed from its format for this model: bits per parameter, one way."""

    name: str
    bits: float
    how: str


def peers() -> list[Peer]:
    """Both ways alike, and no message around the values."""
    shapes = [(200, 784), (200,), (200, 200), (200,), (10, 200), (10,)]
    num_parameters = sum(math.prod(shape) for shape in shapes)
    blocks = {length: sum(math.ceil(math.prod(shape) / length) for shape in shapes) for length in (64, 4096)}
    return [
        Peer("float32, what most send", 32.0, "4 bytes a value"),
        Peer("NVFlare fp16", 16.0, "2 bytes a value"),
        Peer("NVFlare blockwise8", 8 + 32 * blocks[4096] / num_parameters, "a byte a value, a float32 per 4096"),
        Peer("NVFlare nf4", 4 + 32 * blocks[64] / num_parameters, "4 bits a value, a float32 per 64"),
        Peer("OpenFL STC 10 %", _stc_bits(shapes, 0.1), "gzip of float32 0, 1, 2; its class's default share"),
        Peer("OpenFL STC 1 %", _stc_bits(shapes, 0.01), "gzip of float32 0, 1, 2"),
    ]


def _stc_bits(shapes: Sequence[tuple[int, ...]], share: float) -> float:
    """The largest values of each tensor as one of two signs, the rest zero, in float32 through gzip, as OpenFL's STCPipeline writes
    them; where these values lie is drawn."""
    rng = np.random.default_rng(0)
    num_bytes = 0
    for shape in shapes:
        length = math.prod(shape)
        values = np.ones(length, np.float32)
        chosen = rng.permutation(length)[: math.ceil(length * share)]
        values[chosen] = rng.integers(0, 2, len(chosen)) * 2
        num_bytes += len(gzip.compress(values.tobytes(), mtime=0))
    return 8 * num_bytes / sum(math.prod(shape) for shape in shapes)


# -- what it comes to --------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """A row of the table: means over its seeds."""

    row: str
    model: str
    split: str
    participation: float
    epochs: int
    seeds: list[int]
    status: str = "not run"
    rounds: int | None = None
    up_bits: float | None = None
    down_bits: float | None = None
    total_bits: float | None = None
    total_bits_after_first: float | None = None
    socket_bits: float | None = None
    final_accuracy: float | None = None
    rounds_to: dict[str, float | None] = field(default_factory=dict)
    bytes_to: dict[str, float | None] = field(default_factory=dict)
    accuracy_difference: Interval | None = None
    rounds_ratio: dict[str, Interval | None] = field(default_factory=dict)
    error: float | None = None
    gain: float | None = None


SETTINGS: Final[dict[Setting, tuple[str, ...]]] = {
    ("2nn", "iid", 0.1, 5): tuple(ROWS),
    ("2nn", "iid", 1.0, 5): MAIN_ROWS,
    ("2nn", "shards", 0.1, 5): tuple(ROWS),
    ("2nn", "shards", 1.0, 5): MAIN_ROWS,
    ("cnn", "iid", 0.1, 5): MAIN_ROWS,
    ("cnn", "iid", 0.1, 1): MAIN_ROWS,
    ("cnn", "shards", 0.1, 5): MAIN_ROWS,
}
"""Model, split, participation and epochs, with the rows of each."""


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Every row of every setting, run or not."""
    found: dict[tuple[Setting, str], list[Run]] = defaultdict(list)
    for run in runs:
        found[run.key[:4], run.row].append(run)
    return [
        _summary(row, setting, found[setting, row], found[setting, "raw"])
        for setting, rows in SETTINGS.items()
        for row in rows
    ]


def _summary(row: str, setting: Setting, runs: Sequence[Run], raw: Sequence[Run]) -> Summary:
    model, split, participation, epochs = setting
    summary = Summary(row, model, split, participation, epochs, sorted(run.seed for run in runs))
    if not runs:
        return summary

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    summary.status, summary.rounds = "measured", min(run.rounds for run in runs)
    summary.up_bits = mean([run.bits(sum(run.up_bytes)) for run in runs])
    summary.down_bits = mean([run.bits(sum(run.down_bytes)) for run in runs])
    summary.total_bits = mean([run.total() for run in runs])
    summary.total_bits_after_first = mean([run.total(1) for run in runs])
    summary.socket_bits = mean(
        [
            run.bits(run.socket_up_bytes + run.socket_down_bytes)
            if run.socket_up_bytes is not None and run.socket_down_bytes is not None
            else None
            for run in runs
        ]
    )
    summary.final_accuracy = mean([run.final_accuracy for run in runs])
    summary.error, summary.gain = mean([run.error for run in runs]), mean([run.gain for run in runs])
    for target in TARGETS[model, split]:
        summary.rounds_to[f"{target:g}"] = mean([run.rounds_to(target) for run in runs])
        summary.bytes_to[f"{target:g}"] = mean([run.bytes_to(target) for run in runs])
    # Of equally many rounds, or a longer run would be compared with a shorter one's end.
    by_seed = {run.seed: run for run in raw}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed and by_seed[run.seed].rounds == run.rounds]
    if row != "raw":
        summary.accuracy_difference = Interval.of([a.final_accuracy - b.final_accuracy for a, b in pairs])
        for target in TARGETS[model, split]:
            ratios = [
                mine / theirs
                for a, b in pairs
                if (mine := a.rounds_to(target)) is not None and (theirs := b.rounds_to(target)) is not None
            ]
            summary.rounds_ratio[f"{target:g}"] = Interval.of(ratios) if len(ratios) == len(pairs) else None
    return summary


def aims(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """The figures that are aimed at, with what was measured (None where it was not)."""
    by_key = {(each.model, each.split, each.participation, each.epochs, each.row): each for each in summaries}
    few, all_ = by_key["2nn", "iid", 0.1, 5, "auto"], by_key["2nn", "iid", 1.0, 5, "auto"]
    of_cnn = by_key["cnn", "iid", 0.1, 5, "auto"]
    ratio, difference = few.rounds_ratio.get("0.97"), few.accuracy_difference
    listed = [
        ("full participation, after version 0: up + down", all_.total_bits_after_first, 0.75, "max", "b/p"),
        ("10 % a round, whole run, cold start included: up + down", few.total_bits, 4.5, "max", "b/p"),
        ("the same, stretch", few.total_bits, 2.0, "max", "b/p"),
        ("the same with convolutions", of_cnn.total_bits, 4.5, "max", "b/p"),
        ("rounds to 97 % over raw's, end of the 95 % interval", ratio.high if ratio else None, 1.1, "max", "ratio"),
        (
            "final accuracy minus raw's, end of the 95 % interval",
            100 * difference.low if difference and difference.low is not None else None,
            -0.3,
            "min",
            "points",
        ),
    ]
    return [{"what": w, "value": v, "aim": a, "direction": d, "unit": u} for w, v, a, d, u in listed]


def keep(run: Run | None) -> list[Summary]:
    """Merges a run into the JSON, in place of an earlier one of the same case; returns what all come to."""
    with kept_in(RESULT) as content:
        runs = [Run(**each) for each in content.get("runs", [])]
        if run is not None:
            runs = sorted([each for each in runs if each.key != run.key] + [run], key=_order)
        summaries = summarize(runs)
        content["learning_rates"] = LEARNING_RATES
        content["rows"] = [asdict(each) for each in summaries]
        content["peers"] = [asdict(each) for each in peers()]
        content["aims"] = aims(summaries)
        content["runs"] = content.pop("runs", [])  # the longest part comes last
        content["runs"] = [asdict(each) for each in runs]
    return summaries


def _order(run: Run) -> tuple[Setting, int, int]:
    return run.key[:4], list(ROWS).index(run.row), run.seed


def tables(summaries: Sequence[Summary]) -> Iterator[Table]:
    """One for each setting; what was not measured is written so."""
    for setting in SETTINGS:
        model, split, participation, epochs = setting
        rows = [each for each in summaries if (each.model, each.split, each.participation, each.epochs) == setting]
        targets = [f"{target:g}" for target in TARGETS[model, split]]
        title = f"{model}, {split}, {participation:.0%} a round, {epochs} epochs: bits per folded update and parameter"
        result = Table(title=title)
        result.add_column("row")
        for column in (
            "seeds",
            "rounds",
            "up",
            "down",
            "total",
            "after round 1",
            "sockets",
            *(f"{word} to {float(target):.0%}" for target in targets for word in ("rounds", "MB")),
            "final accuracy",
            "minus raw, points",
        ):
            result.add_column(column, justify="right")
        for each in rows:
            if each.status != "measured":
                result.add_row(each.row, "not run")
                continue
            result.add_row(
                each.row,
                str(len(each.seeds)),
                str(each.rounds),
                *(
                    _show(value, 3)
                    for value in (
                        each.up_bits,
                        each.down_bits,
                        each.total_bits,
                        each.total_bits_after_first,
                        each.socket_bits,
                    )
                ),
                *(
                    cell
                    for target in targets
                    for cell in (_show(each.rounds_to[target], 1), _show(each.bytes_to[target], 2, 1e-6))
                ),
                _show(each.final_accuracy, 4),
                _show_interval(each.accuracy_difference),
            )
        yield result


def _show(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "not reached" if value is None else f"{factor * value:.{digits}f}"


def _show_interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    text = f"{100 * interval.mean:+.2f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({100 * interval.low:+.2f} to {100 * interval.high:+.2f})"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes a PNG: accuracy against bytes both ways, each row's first seed, at 10 % a round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Okabe and Ito's colours, which people with colour blindness can tell apart.
    colors = dict(
        zip(
            ROWS,
            (
                "#000000",
                "#999999",
                "#56B4E9",
                "#0072B2",
                "#E69F00",
                "#009E73",
                "#D55E00",
                "#CC79A7",
                "#F0E442",
                "#555555",
            ),
            strict=True,
        )
    )
    runs = [run for run in runs if run.model == "2nn" and run.participation == 0.1]
    splits = [split for split in ("iid", "shards") if any(run.split == split for run in runs)]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, all_axes = pyplot.subplots(
            1, len(splits), figsize=(5.2 * len(splits), 4.2), layout="constrained", dpi=150, squeeze=False
        )
        for axes, split in zip(all_axes[0], splits, strict=True):
            drawn = [run for run in runs if run.split == split]
            for row in ROWS:
                run = min((each for each in drawn if each.row == row), key=lambda each: each.seed, default=None)
                if run is None:
                    continue
                megabytes = np.cumsum(np.array(run.up_bytes) + np.array(run.down_bytes)) / 1e6
                best = np.maximum.accumulate(run.accuracy)
                axes.plot(megabytes, 100 * best, color=colors[row], label=row, linewidth=2 if row == "auto" else 1.2)
            axes.set_xscale("log")
            axes.set_xlabel("MB on the line, both ways")
            axes.set_ylabel("best test accuracy so far, %")
            axes.set_ylim((90, 98) if split == "iid" else (60, 98))
            axes.set_title("equal random parts" if split == "iid" else "two shards a site", fontsize=10)
            axes.axhline(100 * TARGETS["2nn", split][0], color="#bbbbbb", linewidth=0.8, zorder=0)
            axes.legend(frameon=False, fontsize=8)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


# -- the command line --------------------------------------------------------------------------------------------------


def tune(split: str, rounds: int, source: Path, folder: str | None, console: Console) -> None:
    """`raw` with every learning rate of the grid, seed 0, measured on 5,000 training images that nobody trains on."""
    for rate in GRID:
        case = Case("raw", split, 0.1, 0, rounds, rate, is_tuning=True)
        run = measure_apart(case, source, folder)
        found = {
            "split": split,
            "learning_rate": rate,
            "rounds": rounds,
            "accuracy": run.final_accuracy,
            "rounds_to": {f"{target:g}": run.rounds_to(target) for target in TARGETS["2nn", split]},
        }
        console.print(found)
        with kept_in(RESULT) as content:
            others = [
                each
                for each in content.get("tuning", [])
                if (each["split"], each["learning_rate"]) != (found["split"], found["learning_rate"])
            ]
            content["tuning"] = [*others, found]


def main() -> None:
    """Measures, prints the tables, writes the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=None, help="default: all")
    parser.add_argument("--model", choices=list(WORKLOADS), default="2nn")
    parser.add_argument("--epochs", type=int, default=5, choices=(1, 5), help="of local training in a round")
    parser.add_argument("--split", choices=("iid", "shards"), default="iid")
    parser.add_argument("--participation", type=float, default=0.1, choices=(0.1, 1.0), help="share of sites a round")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(NUM_SEEDS)))
    parser.add_argument(
        "--rounds", type=int, default=None, help="default: 2nn iid 40, cnn iid 35, shards 100, all sites 12"
    )
    parser.add_argument("--quick", action="store_true", help="raw and auto, one seed, 5 rounds; nothing is kept")
    parser.add_argument("--tune", action="store_true", help="the learning rates, on held-out training images")
    parser.add_argument("--show", action="store_true", help="only the tables and the plot of what was measured")
    parser.add_argument("--data", type=Path, default=None, help="folder that holds mnist")
    parser.add_argument("--folder", default=None, help="where to keep files while measuring; default: temporary")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = arguments.data or Path(os.environ.get("FEDSTREAM_DATA", ROOT.parent / "shared" / "data"))
    source = data / "mnist"
    if arguments.case:
        run = measure(Case(**json.loads(arguments.case[0])), source, Path(arguments.case[1]))
        print(json.dumps(asdict(run)), flush=True)
        os._exit(0)  # a hundred channels take their time to unload
    console = Console(width=160)
    model, split, participation = arguments.model, arguments.split, arguments.participation
    setting = model, split, participation, arguments.epochs
    if setting not in SETTINGS:
        parser.error(f"there are no rows for {setting}; there are {', '.join(map(str, SETTINGS))}")
    default_rounds = 12 if participation == 1.0 else ROUNDS[model, split] * (5 if arguments.epochs == 1 else 3) // 3
    if arguments.tune:
        tune(split, arguments.rounds or 20, source, arguments.folder, console)
        return
    if not arguments.show:
        rounds = 5 if arguments.quick else arguments.rounds or default_rounds
        default_rows = MAIN_ROWS if arguments.quick else SETTINGS[setting]
        for seed in arguments.seeds[: 1 if arguments.quick else None]:
            for row in arguments.rows or default_rows:
                rate = LEARNING_RATES[model]
                case = Case(row, split, participation, seed, rounds, rate, model=model, epochs=arguments.epochs)
                run = measure_apart(case, source, arguments.folder)
                console.print(_line(run))
                if not arguments.quick:
                    keep(run)
    if arguments.quick:
        return
    for table in tables(keep(None)):
        console.print(table)
    with kept_in(RESULT) as content:
        runs = [Run(**each) for each in content.get("runs", [])]
        found = content.get("aims", [])
    if runs:
        draw(runs, IMAGE)
    for aim in found:
        value = "not measured" if aim["value"] is None else f"{aim['value']:.3f} {aim['unit']}"
        word = "most" if aim["direction"] == "max" else "least"
        console.print(f"{aim['what']}: {value} (aim: at {word} {aim['aim']:g})")


def _line(run: Run) -> str:
    target = TARGETS[run.model, run.split][0]
    return (
        f"{run.row}, {run.model}, {run.split}, {run.participation:.0%}, seed {run.seed}, {run.rounds} rounds: up "
        f"{run.bits(sum(run.up_bytes)):.3f}, down {run.bits(sum(run.down_bytes)):.3f}, total {run.total():.3f} b/p "
        f"(after round 1: {run.total(1):.3f}); {target:.0%} in {run.rounds_to(target)} rounds; final "
        f"{run.final_accuracy:.4f}; error {run.error:.3g}, gain {run.gain:.3f}; {run.seconds_per_round} s a round"
    )


if __name__ == "__main__":
    main()
