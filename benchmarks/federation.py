"""One run of federated training on MNIST with the real coordinator and the real client code: what benchmarks of accuracy share."""

from __future__ import annotations

import gzip
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import torch

NUM_SITES: Final = 100
"""Unless a federation says otherwise."""
NUM_HELD_OUT: Final = 5000
_WORKLOADS: Final = Path(__file__).parent.parent / "examples" / "mnist" / "workload.py"
WORKLOADS: Final = {"2nn": f"{_WORKLOADS}:TwoNN", "cnn": f"{_WORKLOADS}:CNN"}
"""What the coordinator evaluates with."""

_FILES: Final = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Federation:
    """Who trains what: `options` of the data, the same for all sites but for their number, which is added; the workload that sites
    train with, which may differ from the coordinator's in the speed of a step; what sites override, and how long each one takes
    besides its work, by its number."""

    model: str
    sites_workload: str
    seed: int
    options: Mapping[str, str]
    is_tuning: bool = False
    num_sites: int = NUM_SITES
    overrides: Sequence[Mapping[str, Any]] = ()
    seconds: Sequence[float] = ()


@dataclass
class Trained:
    """What came of it: the coordinator's report, the address that it served, seconds in all, and what the sites' logs counted."""

    report: Any
    address: str
    seconds: float
    journal: Any
    job_seconds: dict[str, float] = field(default_factory=dict)
    sockets: tuple[int | None, int | None] = (None, None)

    @property
    def accuracy(self) -> list[float]:
        """Of the versions from 1 on, on the test images."""
        return [
            round(next(metric.value for metric in model.metrics if metric.name == "accuracy"), 6)
            for model in self.report.models
            if model.version > 0
        ]

    @property
    def committed_seconds(self) -> list[float]:
        """When these versions were made, from version 0 on."""
        times = [model.created_time.ToNanoseconds() / 1e9 for model in self.report.models]
        return [round(time - times[0], 3) for time in times[1:]]


def prepare_data(source: Path, folder: Path, *, is_tuning: bool) -> None:
    """The four files unpacked, for a hundred sites read them; with `is_tuning` the last 5,000 training images stand in for the
    test images and are trained on no longer."""
    folder.mkdir()
    for name in _FILES:
        packed = source / f"{name}.gz"
        (folder / name).write_bytes(
            gzip.decompress(packed.read_bytes()) if packed.exists() else (source / name).read_bytes()
        )
    if not is_tuning:
        return
    for kind in ("images-idx3", "labels-idx1"):
        content = (folder / f"train-{kind}-ubyte").read_bytes()
        begin = 4 + 4 * content[3]
        count = int.from_bytes(content[4:8], "big")
        cut = begin + (len(content) - begin) // count * (count - NUM_HELD_OUT)
        for part, number, body in (
            ("train", count - NUM_HELD_OUT, content[begin:cut]),
            ("t10k", NUM_HELD_OUT, content[cut:]),
        ):
            header = content[:4] + number.to_bytes(4, "big") + content[8:begin]
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + body)


def socket_bytes(port: int) -> tuple[int | None, int | None]:
    """Bytes that this machine's connections to a port have sent to it and got from it, HTTP/2 and control messages included; None
    where `ss` (iproute2) is missing."""
    if shutil.which("ss") is None:
        return None, None
    listed = subprocess.run(
        ["ss", "--tcp", "--info", "--no-header", "--oneline", "state", "established", f"dport = :{port}"],
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip

    def total(word: str) -> int:
        return sum(int(number) for number in re.findall(rf"\b{word}:(\d+)", listed))

    return total("bytes_acked"), total("bytes_received")


def train(config: str, federation: Federation, source: Path, folder: Path, label: str) -> Trained:
    """One run from version 0 to its end, with a coordinator process and sites of its own; `folder` is empty. Progress
    goes to stderr. Raises RuntimeError where the run did not finish."""
    from benchmarks.echo_rounds import Watched
    from benchmarks.light_operator import Operator
    from benchmarks.simulated_sites import JOB_SECONDS, Journal, simulated_sites
    from examples.mnist.workload import CNN, TwoNN
    from fed_core.tensors import model_specs, model_tensors
    from fed_core.workload import initial_model
    from fedstream.v1 import runs_pb2

    torch.set_num_threads(1)
    data = folder / "data"
    prepare_data(source, data, is_tuning=federation.is_tuning)
    server = Watched(
        ["fed_server.cli.server", "run", "--data-dir", str(folder / "server"), "--listen", "127.0.0.1:0",
         "--drain-seconds", "0", "--log-level", "warning", "--lease-seconds", "600",
         "--workload", WORKLOADS[federation.model], "--evaluation-data", str(data)]
    )  # fmt: skip
    try:
        address = server.line().split(" on ")[1].split()[0]
        join_token = (folder / "server" / "join-token").read_text().strip()
        operator = Operator(f"unix:{folder / 'server' / 'fed-server.sock'}")
        model = initial_model({"2nn": TwoNN, "cnn": CNN}[federation.model](), federation.seed)
        operator.submit(config, model_tensors(model), specs=model_specs(model))
        options = [
            {
                "site": str(site),
                "num_sites": str(federation.num_sites),
                "partition_seed": str(federation.seed),
                "held_out": "0",
            }
            | dict(federation.options)
            for site in range(federation.num_sites)
        ]
        journal = Journal()
        journal.configure()
        began = time.perf_counter()
        with simulated_sites(
            address, join_token, folder / "sites", workload=federation.sites_workload, data=data, options=options,
            overrides=federation.overrides, seconds=federation.seconds,
        ):  # fmt: skip
            rounds_done = 0

            def is_over(run: runs_pb2.Run) -> bool:
                nonlocal rounds_done
                if run.round > rounds_done and run.metrics:
                    rounds_done = run.round
                    accuracy = next((m.value for m in run.metrics if m.name == "accuracy"), math.nan)
                    print(f"{label} round {run.round}, before it {accuracy:.4f}", file=sys.stderr, flush=True)
                return False

            ended = operator.wait("bench", is_over, timeout=24 * 3600)
            seconds = time.perf_counter() - began
            sockets = socket_bytes(int(address.rpartition(":")[2]))
            report = operator.report("bench")
        operator.channel.close()
    finally:
        server.end()
    if ended.state != runs_pb2.RUN_STATE_FINISHED:
        raise RuntimeError(f"{label}: {ended.reason}")
    return Trained(report, address, seconds, journal, dict(JOB_SECONDS), sockets)
