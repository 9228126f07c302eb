"""Rounds without training: what the coordinator costs, beside the floors measured in the same run.

    python -m benchmarks.echo_rounds [--quick] [--only 10M:8 ...] [--systems raw "uniform 8" ...] [--rounds 6]

A model of P float32 parameters in ten tensors of uneven size goes to N client processes; each answers with a constant update and
its own example count, really encoded every round; the coordinator stores, verifies and folds them and commits the weighted mean.
Light clients keep their model and their update in memory instead of cache and spool. Everything runs on loopback. Seconds are
the median between two commits, the first round left out. `raw` sends float32 both ways, `uniform 8` 8 bits both ways, `raw, adam`
float32 with a server optimizer that keeps two more models, `raw, private` float32 of clients that are all asked, with central
differential privacy: every update is cut, and the sum gets noise. 200 clients are threads of eight processes. The event loop's lag
is the coordinator's own figure (fed_server/telemetry.py): the end of the bucket in which the 99th percentile lies.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.records import run_apart

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "echo_rounds.png"
SIZES = {"0.1M": 100_000, "1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}
CLIENTS = (2, 8, 32)
MOST = 320_000_000
CROWD = "1M:200"
"""What shows that memory does not grow with the clients; floors are not measured there."""
CASES = (*(f"{size}:{count}" for size in SIZES for count in CLIENTS if SIZES[size] * count <= MOST), CROWD)
QUICK = ("0.1M:8", "10M:8")
MAX_PROCESSES = 32
"""Clients beyond so many share eight processes."""
SYSTEMS = {
    "raw": '[uplink]\nkind = "raw"\n[downlink]\nkind = "raw"\n',
    "uniform 8": '[uplink]\nkind = "uniform"\nbits = 8\n[downlink]\nkind = "delta"\nencoding = { kind = "uniform", bits = 8 }\n',
}
SYSTEMS["raw, adam"] = SYSTEMS["raw"] + '[server_optimizer]\nkind = "adam"\n'
SYSTEMS["raw, private"] = (
    SYSTEMS["raw"]
    + '[aggregation]\nkind = "mean"\nweighting = "uniform"\n[privacy]\nkind = "central"\nsampling_rate = 1.0\n'
    'noise_multiplier = 4.0\ndelta = 1e-3\nclipping = { kind = "fixed", norm = 1.0 }\n'
)
ONLY_AT = {"raw, adam": ("10M:8",), "raw, private": ("10M:8",)}
"""Systems that are measured in these cases alone."""
# Shares of the model that its ten tensors take, in thousandths: a few large ones, many small ones.
SHARES = (400, 250, 150, 100, 50, 25, 15, 6, 3, 1)


@dataclass
class Row:
    """One system on one size."""

    size: str
    num_clients: int
    system: str
    seconds: float | None = None
    peak_rss_mib: float | None = None
    cpu_seconds_per_round: float | None = None
    wire_mib_per_round: float | None = None
    lag_p99_seconds: float | None = None
    ratio_to_floor_a: float | None = None
    ratio_to_floor_b: float | None = None


def tensor_sizes(num_parameters: int) -> list[int]:
    """Ten uneven sizes that add up."""
    sizes = [num_parameters * share // 1000 for share in SHARES]
    return [sizes[0] + num_parameters - sum(sizes), *sizes[1:]]


def loopback_bytes() -> int:
    """Bytes that the loopback device has carried."""
    counters = psutil.net_io_counters(pernic=True).get("lo")
    return counters.bytes_sent if counters else 0


class Watched:
    """A child process whose peak memory and processor time are read before it ends."""

    def __init__(self, command: list[str], **options: Any) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "ERROR"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def peak_rss_mib(self) -> float:
        """Its high-water mark."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def end(self) -> None:
        """SIGTERM, then wait."""
        self.process.terminate()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def clients(count: int, target: Callable[..., None], *args: Any) -> Iterator[list[Any]]:
    """Client processes, forked before any channel exists so that they share the interpreter's memory."""
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=target, args=(index, *args), daemon=True) for index in range(count)]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.join(5)
            if process.is_alive():
                process.kill()


def _echo_clients(process: int, num_processes: int, num_clients: int, address: str, join_token: str) -> None:
    from benchmarks.light_client import LightClient, echo_rounds

    def echo(index: int) -> None:
        client = LightClient(address)
        client.enroll(join_token, f"client-{index:03d}")
        echo_rounds(client, 2.0**-10 * (index % 32 + 1), num_examples=index + 1)
        client.close()

    torch.set_num_threads(1)
    mine = [threading.Thread(target=echo, args=(index,)) for index in range(process, num_clients, num_processes)]
    for thread in mine:
        thread.start()
    for thread in mine:
        thread.join()


def lag_p99(metrics_url: str) -> float:
    """Seconds within which the event loop woke up in 99 of 100 cases since the coordinator started; infinity beyond the last
    bucket."""
    with urllib.request.urlopen(metrics_url, timeout=30) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    samples = next(each.samples for each in families if each.name == "fedstream_event_loop_lag_seconds")
    count = next(sample.value for sample in samples if sample.name.endswith("_count"))
    return min(
        float(sample.labels["le"])
        for sample in samples
        if sample.name.endswith("_bucket") and sample.value >= 0.99 * count
    )


def _floor_client(index: int, address: str, num_parameters: int, rounds: int) -> None:
    from benchmarks.floor import floor_client

    floor_client(address, num_parameters, rounds)


def measure_floor(kind: str, size: str, num_clients: int, rounds: int, folder: str) -> Row:
    """Floor (a) or (b)."""
    num_parameters = SIZES[size]
    server = Watched(
        ["benchmarks.floor", kind, "--parameters", str(num_parameters), "--clients", str(num_clients),
         "--rounds", str(rounds), "--folder", folder]
    )  # fmt: skip
    address = f"127.0.0.1:{server.line()}"
    with clients(num_clients, _floor_client, address, num_parameters, rounds):
        before = loopback_bytes()
        seconds = [float(s) for s in server.line().split()]
        wire = (loopback_bytes() - before) / rounds
    row = Row(size, num_clients, f"floor ({kind})", statistics.median(seconds[1:]), server.peak_rss_mib())
    row.cpu_seconds_per_round = server.cpu_seconds() / rounds
    row.wire_mib_per_round = wire / 2**20
    server.end()
    return row


def measure_fedstream(name: str, size: str, num_clients: int, rounds: int, folder: str) -> Row:
    """The coordinator as a real process, from submission to the last commit."""
    from benchmarks.light_operator import Operator
    from fedstream.v1 import runs_pb2

    data = Path(folder) / f"data-{name.replace(' ', '-').replace(',', '')}-{size}-{num_clients}"
    server = Watched(
        ["fed_server.cli.server", "run", "--data-dir", str(data), "--listen", "127.0.0.1:0", "--drain-seconds", "0",
         "--log-level", "warning", "--metrics-listen", "127.0.0.1:0"]
    )  # fmt: skip
    address = server.line().split(" on ")[1].split()[0]
    metrics_url = next(line.split()[1] for line in iter(server.line, "") if line.startswith("metrics"))
    join_token = (data / "join-token").read_text().strip()
    config = (
        f'name = "echo"\nworkload = "echo"\n[cohort]\nsize = {num_clients}\n[schedule]\nmax_rounds = {rounds}\n'
        f'[evaluation]\nat = "none"\n[keep]\nversions = 1\n{SYSTEMS[name]}'
    )
    tensors = {f"w{i}": torch.zeros(n) for i, n in enumerate(tensor_sizes(SIZES[size]))}
    num_processes = num_clients if num_clients <= MAX_PROCESSES else 8
    with clients(num_processes, _echo_clients, num_processes, num_clients, address, join_token):
        operator = Operator(f"unix:{data / 'fed-server.sock'}")
        operator.submit(config, tensors)
        cpu_before, wire_before = server.cpu_seconds(), loopback_bytes()
        run = operator.wait("echo", timeout=1800)
        assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
        wire = (loopback_bytes() - wire_before) / rounds
        report = operator.report("echo")
        times = [m.created_time.ToNanoseconds() / 1e9 for m in report.models]
        seconds = [b - a for a, b in pairwise(times[1:])]
        row = Row(size, num_clients, f"fedstream {name}", statistics.median(seconds), server.peak_rss_mib())
        row.cpu_seconds_per_round = (server.cpu_seconds() - cpu_before) / rounds
        row.wire_mib_per_round = wire / 2**20
        row.lag_p99_seconds = lag_p99(metrics_url)
        operator.channel.close()
        server.end()
    return row


def measure(system: str, size: str, num_clients: int, rounds: int, folder: str) -> Row:
    """One row."""
    if system in SYSTEMS:
        return measure_fedstream(system, size, num_clients, rounds, folder)
    return measure_floor(system, size, num_clients, rounds, folder)


def measure_apart(system: str, size: str, num_clients: int, rounds: int, folder: str) -> Row:
    """One row in a process of its own: clients are forked, which no process that has used gRPC should do."""
    case = [system, size, str(num_clients), str(rounds), folder]
    return Row(**run_apart("benchmarks.echo_rounds", "--case", *case))


def table(rows: list[Row], title: str) -> Table:
    """What was measured; what was not is written so."""
    result = Table(title=title)
    for column in (
        "P",
        "N",
        "system",
        "s / round",
        "x floor (a)",
        "x floor (b)",
        "peak RSS MiB",
        "CPU s / round",
        "loopback MiB / round",
        "loop lag p99 ms",
    ):
        result.add_column(column, justify="left" if column == "system" else "right")

    def show(value: float | None, digits: int) -> str:
        return "not run" if value is None else f"{value:.{digits}f}"

    for row in rows:
        result.add_row(
            row.size,
            str(row.num_clients),
            row.system,
            show(row.seconds, 3),
            show(row.ratio_to_floor_a, 2),
            show(row.ratio_to_floor_b, 2),
            show(row.peak_rss_mib, 0),
            show(row.cpu_seconds_per_round, 2),
            show(row.wire_mib_per_round, 0),
            show(1000 * row.lag_p99_seconds, 0) if row.lag_p99_seconds is not None else "",
        )
    return result


def aims(rows: list[Row]) -> list[dict[str, Any]]:
    """The figures that are aimed at, with what was measured (None where it was not)."""
    found = {(row.size, row.num_clients, row.system): row for row in rows}

    def figure(size: str, count: int, system: str, attribute: str) -> float | None:
        row = found.get((size, count, system))
        return getattr(row, attribute) if row else None

    def share(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    listed = []
    for count in (8, 32):
        of_raw, of_uniform = (
            figure("10M", count, "fedstream raw", "ratio_to_floor_b"),
            figure("10M", count, "fedstream uniform 8", "ratio_to_floor_a"),
        )
        listed += [
            (f"raw 10M x {count}: seconds a round over floor (b)", of_raw, 1.3, "ratio"),
            (f"uniform 8 both ways 10M x {count}: seconds a round over floor (a)", of_uniform, 0.8, "ratio"),
        ]
    listed.append(("0.1M x 8: seconds a round", figure("0.1M", 8, "fedstream raw", "seconds"), 0.06, "s"))
    for count, name in ((8, "raw"), (32, "raw"), (8, "raw, adam"), (8, "uniform 8")):
        peak = figure("10M", count, f"fedstream {name}", "peak_rss_mib")
        allowed = 2.2 * 4 * SIZES["10M"] / 1e6 + 400
        in_megabytes = peak * 2**20 / 1e6 if peak else None
        listed.append((f"{name} 10M x {count}: peak RSS of the coordinator", in_megabytes, allowed, "MB"))
    growth = share(figure("1M", 200, "fedstream raw", "peak_rss_mib"), figure("1M", 8, "fedstream raw", "peak_rss_mib"))
    listed.append(("raw 1M: peak RSS with 200 clients over that with 8", growth, 1.05, "ratio"))
    lag = figure("10M", 32, "fedstream raw", "lag_p99_seconds")
    listed.append(("raw 10M x 32: event loop's lag, 99th percentile", 1000 * lag if lag else None, 20.0, "ms"))
    spent = share(
        figure("10M", 8, "fedstream raw", "cpu_seconds_per_round"),
        figure("10M", 8, "floor (b)", "cpu_seconds_per_round"),
    )
    listed.append(("raw 10M x 8: processor seconds a round over floor (b)", spent, 1.5, "ratio"))
    plain, private = (
        (
            figure("10M", 8, f"fedstream {name}", "seconds"),
            figure("10M", 8, f"fedstream {name}", "cpu_seconds_per_round"),
        )
        for name in ("raw", "raw, private")
    )
    added = (private[1] - plain[1]) / SIZES["10M"] * 1e9 if private[1] is not None and plain[1] is not None else None
    listed += [
        ("private 10M x 8: seconds a round over those of raw", share(private[0], plain[0]), 1.1, "ratio"),
        ("private 10M x 8: processor time added a round, by parameter", added, 40.0, "ns"),
    ]
    return [{"what": w, "value": v, "aim": a, "direction": "max", "unit": u} for w, v, a, u in listed]


def draw(rows: list[Row], path: Path) -> None:
    """Writes a PNG: seconds a round of every system, for each number of clients against the size of the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {
        "floor (a)": "#bbbbbb",
        "floor (b)": "#777777",
        "fedstream raw": "#0072B2",
        "fedstream uniform 8": "#D55E00",
    }
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, all_axes = pyplot.subplots(
            1, len(CLIENTS), figsize=(11, 3.8), layout="constrained", dpi=150, sharey=True
        )
        for axes, count in zip(all_axes, CLIENTS, strict=True):
            for system, color in colors.items():
                points = [
                    (SIZES[row.size], row.seconds)
                    for row in rows
                    if (row.num_clients, row.system) == (count, system) and row.seconds is not None
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, label=system, marker="o", markersize=4)
            axes.set(xscale="log", yscale="log", xlabel="parameters", title=f"{count} clients")
        all_axes[0].set_ylabel("seconds a round")
        all_axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path)
        pyplot.close(figure)


def main() -> None:
    """Measures, prints the table, writes benchmarks/results/echo_rounds.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only 0.1M and 10M with 8 clients")
    parser.add_argument("--only", nargs="*", default=None, metavar="P:N", help="only these, such as 10M:8")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS), help="default: all")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each, the first left out of the median")
    parser.add_argument(
        "--folder", default=None, help="where to keep files while measuring; default: the temporary directory"
    )
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        system, size, count, rounds, folder = arguments.case
        print(json.dumps(asdict(measure(system, size, int(count), int(rounds), folder))))
        return
    wanted = arguments.only or (QUICK if arguments.quick else CASES)
    console, rows = Console(width=150), []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for case in CASES:
            size, count = case.split(":")
            systems = [name for name in arguments.systems if case in ONLY_AT.get(name, CASES)]
            if case == CROWD:
                systems = systems[:1]
            elif arguments.quick:
                systems = [name for name in systems if name not in ONLY_AT]
            if case not in wanted:
                rows += [Row(size, int(count), f"fedstream {name}") for name in systems]
                continue
            rounds = arguments.rounds if SIZES[size] * int(count) <= MOST // 2 else min(4, arguments.rounds)
            with console.status(f"{size} x {count}"):
                began = time.perf_counter()
                floors = () if case == CROWD else ("a", "b")
                measured = [measure_apart(s, size, int(count), rounds, folder) for s in (*floors, *systems)]
            for row in measured:
                if floors and row.seconds is not None:
                    row.ratio_to_floor_a, row.ratio_to_floor_b = (
                        row.seconds / floor.seconds if floor.seconds else None for floor in measured[:2]
                    )
            rows += measured
            console.print(
                f"{case}: {time.perf_counter() - began:.0f} s; "
                + ", ".join(f"{row.system} {row.seconds:.3f} s a round" for row in measured)
            )
    console.print(table(rows, "Echo rounds (light clients: model and update in memory)"))
    found = aims(rows)
    for aim in found:
        value = "not run" if aim["value"] is None else f"{aim['value']:.3f} {aim['unit']}"
        console.print(f"{aim['what']}: {value} (aim: at most {aim['aim']:g})")
    if any(row.seconds is None for row in rows) or arguments.systems != list(SYSTEMS):
        console.print("[dim]not all of it was run, so the JSON and the plot stay as they are[/]")
        return
    RESULTS.mkdir(exist_ok=True)
    result = {"benchmark": "echo_rounds", "rows": [asdict(row) for row in rows], "aims": found}
    (RESULTS / "echo_rounds.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, IMAGE)


if __name__ == "__main__":
    main()
