"""Robust rules over many updates: seconds and memory of one round at the coordinator.

    python -m benchmarks.robust [--cases cnn:200 10M:32] [--kinds median krum ...] [--folder DIR]

Every update is a payload file in the raw codec, float32, with values of its own. Each rule runs in a process of its own: `add` is
what a round spends while updates still arrive, `prepare` and `report` what it takes after the last one. Memory is the peak over
what the process held before it made the aggregator, with all libraries loaded; the model itself lies on disk and is read tile by
tile."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec
from fed_server.aggregation.base import AggregatorSetting
from fed_server.aggregation.exact import TILE
from fed_server.aggregation.geometry import inner_products
from fed_server.aggregation.grid import GridPolicy, make_grid
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.registry import AGGREGATORS, new_aggregator
from fed_server.config import RunConfig, union_members
from fedstream.v1 import common_pb2

RESULTS: Final = Path(__file__).parent / "results" / "robust.json"
MIB: Final = 2**20
MEMORY_AIM: Final = 256.0
# The robust rules, and the mean beside them.
KINDS: Final = [kind for kind in AGGREGATORS if kind != "qfedavg"]
CASES: Final = ("cnn:200", "10M:32")
AIMED_CASE: Final = "cnn:200"
AIMED: Final = ("median", "multi_krum", "geometric_median")
SIZES: Final[dict[str, list[tuple[int, ...]]]] = {
    # The network of McMahan et al. 2017: 1,663,370 parameters.
    "cnn": [(32, 1, 5, 5), (32,), (64, 32, 5, 5), (64,), (512, 3136), (512,), (10, 512), (10,)],
    "10M": [(1000, 1000)] * 10,
}


@dataclass
class Row:
    """One rule. Seconds of wall clock and of CPU, and MiB."""

    kind: str
    num_clients: int
    num_parameters: int
    add_seconds: float
    prepare_seconds: float
    report_seconds: float
    cpu_seconds: float
    memory_mib: float


def specs_of(size: str) -> list[TensorSpec]:
    """The tensors of a model."""
    return [TensorSpec(f"layer.{i}", shape, "float32") for i, shape in enumerate(SIZES[size])]


def write_update(path: Path, tensors: Iterable[tuple[TensorSpec, Tensor]]) -> None:
    """An update for aggregators, float32 as it is."""
    with path.open("wb+") as file:
        write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id="",
            round=0,
            model_version=0,
            base_digest=b"",
            update=None,
            tensors=tensors,
        )


def drawn(specs: Sequence[TensorSpec], seed: int) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Values that no other seed has."""
    generator = torch.Generator().manual_seed(seed)
    for spec in specs:
        yield spec, torch.randn(spec.shape, generator=generator) / 100


def peak_bytes() -> int:
    """The most that this process ever held. (getrusage would also count the process that started it.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(kind: str, size: str, num_clients: int, folder: Path) -> Row:
    """One round of one rule in this process."""
    torch.set_num_threads(1)
    specs = specs_of(size)
    fields = {"kind": kind} if kind == "mean" else {"kind": kind, "num_byzantine": num_clients // 5}
    config: Any = union_members(RunConfig.model_fields["aggregation"])[kind].model_validate(fields)
    setting = AggregatorSetting(specs, make_grid(specs, {}, GridPolicy(num_clients, 1)), merge_rules(specs, []), folder)
    inner_products([torch.ones(2, 2)], 2)  # loads what multiplies matrices
    before = psutil.Process().memory_info().rss
    cpu, began = time.process_time(), time.perf_counter()
    aggregator = new_aggregator(setting, config)
    for path in sorted(folder.glob("*.update")):
        with PayloadReader(path) as reader:
            aggregator.add(reader, 1)
    added = time.perf_counter()
    aggregator.prepare()
    prepared = time.perf_counter()
    for spec in specs:
        for first in range(0, spec.num_elements, TILE):
            aggregator.report(spec, first, min(TILE, spec.num_elements - first))
    reported = time.perf_counter()
    return Row(
        kind,
        aggregator.num_updates,
        sum(spec.num_elements for spec in specs),
        added - began,
        prepared - added,
        reported - prepared,
        time.process_time() - cpu,
        (peak_bytes() - before) / MIB,
    )


def measure_apart(kind: str, size: str, num_clients: int, folder: Path) -> Row:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.robust", "--case", kind, size, str(num_clients), str(folder)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[Row]) -> Table:
    """What people read of one case."""
    made = Table(title=f"{rows[0].num_clients} updates of {rows[0].num_parameters:,} parameters, one thread")
    for heading in ("rule", "add s", "prepare s", "report s", "CPU s", "memory MiB"):
        made.add_column(heading, justify="left" if heading == "rule" else "right")
    for row in rows:
        numbers = (row.add_seconds, row.prepare_seconds, row.report_seconds, row.cpu_seconds)
        made.add_row(row.kind, *(f"{number:.1f}" for number in numbers), f"{row.memory_mib:.0f}")
    return made


def main() -> None:
    """Measures, prints the tables, writes benchmarks/results/robust.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), metavar="SIZE:N", help="model and number of updates")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="default: all")
    parser.add_argument("--folder", default=None, help="where to keep files; default: the temporary directory")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        kind, size, count, folder = arguments.case
        print(json.dumps(asdict(measure(kind, size, int(count), Path(folder)))))
        return
    console, rows, aims = Console(width=120), [], []
    load = os.getloadavg()[0]
    for case in arguments.cases:
        size, count = case.split(":")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            with console.status(f"{case}: writing updates"):
                for seed in range(int(count)):
                    write_update(Path(folder) / f"{seed}.update", drawn(specs_of(size), seed))
            measured = []
            for kind in arguments.kinds:
                with console.status(f"{case}: {kind}"):
                    measured.append(measure_apart(kind, size, int(count), Path(folder)))
        console.print(table(measured))
        rows += measured
        if case == AIMED_CASE:
            aims = [
                {
                    "what": f"{row.kind}, {case}: memory",
                    "value": row.memory_mib,
                    "aim": MEMORY_AIM,
                    "direction": "max",
                    "unit": "MiB",
                }
                for row in measured
                if row.kind in AIMED
            ]
    for aim in aims:
        console.print(f"{aim['what']}: {aim['value']:.0f} {aim['unit']} (aim: at most {aim['aim']:g})")
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"benchmark": "robust", "load_before": load, "rows": [asdict(row) for row in rows], "aims": aims}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
