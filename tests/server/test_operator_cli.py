"""fedctl against a real coordinator: what it prints, where, and with which exit code."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
import trustme
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.main import get_command

from benchmarks.light_client import LightClient, constant, encode_update
from fed_core.errors import CorruptError, UnavailableError
from fed_core.workload import initial_model, load_workload
from fed_server.app import App
from fed_server.cli import operator, render
from fed_server.cli.connection import Connection, Coordinator
from fed_server.cli.download import download, model_request
from fed_server.cli.exit_codes import EXIT_CODES
from fed_server.cli.watch import watch
from fed_server.config import parse_run_config
from fed_server.settings import ServerSettings
from fedstream.v1 import common_pb2, runs_pb2, runs_pb2_grpc, transfer_pb2
from tests.server.conftest import House, config, off_loop

DOCS = Path(__file__).parents[2] / "docs" / "fedctl.md"

WORKLOAD = """
from torch import nn
from fed_core.workload import Workload

class Echo(Workload):
    name = "echo"
    version = "1"
    def model(self):
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    def train_data(self, site):
        raise NotImplementedError
    def loss(self, model, batch):
        raise NotImplementedError
"""


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Fedctl:
    """Runs commands in this process, beside the coordinator's event loop."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._capsys = capsys
        self.folder = folder
        self.data_dir = folder / "data"
        self.workload = folder / "echo.py"
        self.workload.write_text(WORKLOAD)

    def config(self, text: str) -> str:
        """A config file."""
        path = self.folder / "run.toml"
        path.write_text(text)
        return str(path)

    def run(self, *arguments: str | Path) -> Answer:
        """One command; blocks."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            operator.main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        assert isinstance(exit.value.code, int)
        return Answer(exit.value.code, out, err)

    async def __call__(self, *arguments: str | Path) -> Answer:
        return await off_loop(self.run, "--data-dir", self.data_dir, *arguments)

    async def submit(self, text: str, *arguments: str | Path) -> Answer:
        """`run submit` with the workload, unless told otherwise."""
        return await self("run", "submit", self.config(text), *(arguments or ("--workload", self.workload)))


@pytest.fixture
def fedctl(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fedctl:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for variable in ("FEDSTREAM_DATA_DIR", "FED_SERVER_DATA_DIR", "FEDCTL_OPERATOR_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    return Fedctl(capsys, tmp_path)


def work(client: LightClient, num_rounds: int = 1) -> None:
    """Answers assignments with an update that moves every tensor by an eighth."""
    for _ in range(num_rounds):
        assignment = client.next_assignment()
        manifest, _ = client.model(assignment)
        client.upload(assignment.assignment_id, encode_update(assignment, manifest.specs, constant(0.125), 10))


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


async def run_to_its_end(house: House, fedctl: Fedctl, num_rounds: int = 2) -> None:
    """A run of the name "test" with two clients."""
    assert (await fedctl.submit(config(max_rounds=num_rounds))).code == 0
    clients = [await off_loop(house.client, name) for name in ("oslo", "bergen")]
    await asyncio.gather(*(off_loop(work, client, num_rounds) for client in clients))
    await off_loop(house.operator.wait)


# Submitting


async def test_submit_prints_the_id_and_the_run_begins_from_the_workload_under_its_seed(
    house: House, fedctl: Fedctl
) -> None:
    answer = await fedctl.submit(config())
    assert answer.code == 0, answer.err
    run_id = answer.out.strip()
    assert run_id == (await off_loop(house.operator.run)).run_id
    assert "submitted run test (28 elements); it begins when 2 clients are there" in answer.err
    downloaded = await fedctl("model", "download", "test", "v0.safetensors", "--version", "0")
    assert (downloaded.code, downloaded.out) == (0, "v0.safetensors\n")
    expected = initial_model(load_workload(str(fedctl.workload)), seed=7).state_dict()
    tensors = load_file("v0.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


async def test_a_foreign_file_begins_the_same_run_as_its_workload(house: House, fedctl: Fedctl) -> None:
    """The safetensors library keeps neither the order of tensors nor which of them are buffers; the workload knows."""
    model = initial_model(load_workload(str(fedctl.workload)), seed=7)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, "foreign.safetensors")
    assert (await fedctl.submit(config("a"))).code == 0
    answer = await fedctl.submit(
        config("b"), "--workload", str(fedctl.workload), "--init", "foreign.safetensors", "--json"
    )
    assert json.loads(answer.out)["run"]["name"] == "b"
    a, b = [await off_loop(house.operator.report, name) for name in ("a", "b")]
    assert a.models[0].digest == b.models[0].digest
    # And a file that the coordinator wrote begins the same run without the workload.
    assert (await fedctl("model", "download", "a", "own.safetensors", "--version", "0")).code == 0
    assert (await fedctl.submit(config("c"), "--init", "own.safetensors")).code == 0
    assert (await off_loop(house.operator.report, "c")).models[0].digest == a.models[0].digest


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"0.weight": torch.zeros(3, 4)}, "does not fit the workload's model"),
        ({"0.weight": torch.full((3, 4), torch.nan)}, "0.weight"),
        ({}, "holds no tensors"),
    ],
)
async def test_a_file_that_cannot_begin_the_run_is_refused_by_name(
    house: House, fedctl: Fedctl, tensors: dict[str, torch.Tensor], expected: str
) -> None:
    save_file(tensors, "init.safetensors")
    source = () if "nan" in str(tensors) else ("--workload", fedctl.workload)
    answer = await fedctl.submit(config(), "--init", "init.safetensors", *source)
    assert (answer.code, answer.out) == (65, "")
    assert expected in answer.err


async def test_a_file_that_is_no_safetensors_file_is_refused(house: House, fedctl: Fedctl) -> None:
    (fedctl.folder / "x.safetensors").write_bytes(b"not a model")
    answer = await fedctl.submit(config(), "--init", "x.safetensors")
    assert answer.code == 65
    assert "--init: x.safetensors is not a usable safetensors file" in answer.err


@pytest.mark.parametrize(
    ("text", "workload", "expected"),
    [
        (config().replace('"echo"', '"other"'), WORKLOAD, "the config names 'other', and "),
        (config().replace("seed", 'workload_version = "2"\nseed'), WORKLOAD, "asks for '2', and "),
        (config(), WORKLOAD.replace("nn.Linear(4, 3)", "1 / 0"), "failed: ZeroDivisionError: division by zero"),
        (config(), WORKLOAD.replace("def train_data", "def other"), "must still define train_data"),
    ],
)
async def test_a_workload_that_does_not_fit_is_explained(
    house: House, fedctl: Fedctl, text: str, workload: str, expected: str
) -> None:
    path = fedctl.folder / "w.py"
    path.write_text(workload)
    answer = await fedctl.submit(text, "--workload", path)
    assert answer.code == 65
    assert expected in answer.err.replace("\n", "")


async def test_a_name_that_is_taken_is_refused_and_another_may_be_given(house: House, fedctl: Fedctl) -> None:
    assert (await fedctl.submit(config())).code == 0
    answer = await fedctl.submit(config())
    assert (answer.code, answer.out) == (65, "")
    assert "test" in answer.err
    answer = await fedctl.submit(config(), "--workload", fedctl.workload, "--name", "test-2")
    assert answer.code == 0
    run = await off_loop(house.operator.run, "test-2")
    assert parse_run_config(run.config_toml).cohort == parse_run_config(config()).cohort


async def test_a_wrong_config_never_reaches_the_coordinator(house: House, fedctl: Fedctl) -> None:
    answer = await fedctl.submit(config(extra="[cohrt]\nsize = 1"))
    assert (answer.code, answer.out) == (65, "")
    assert "run.toml: 1 problem in the run config\n  cohrt: there is no such key; did you mean 'cohort'?" in answer.err
    assert (await fedctl("run", "submit", "missing.toml", "--workload", "x")).code == 65
    assert (await fedctl("run", "submit", fedctl.config(config()))).code == 2
    assert json.loads((await fedctl("run", "list", "--json")).out) == {"runs": []}


# Reading


async def test_lists_and_reports_tell_what_happened(house: House, fedctl: Fedctl) -> None:
    assert "No runs yet" in (await fedctl("run", "list")).out
    assert "No client has enrolled yet" in (await fedctl("client", "list")).out
    await run_to_its_end(house, fedctl)
    assert re.search(r"test +● finished +2/2 .*all 2 rounds done", (await fedctl("run", "list")).out)
    assert re.search(r"bergen +● yes +\d s ago +0 +echo 1", (await fedctl("client", "list")).out)
    shown = (await fedctl("run", "show", "test")).out
    assert "round 2 of 2" in shown
    assert re.search(r"✓ +bergen +received +━+ +100 +10 ex\.", shown)
    report = (await fedctl("run", "report", "test")).out
    assert re.search(r"1 +committed +1 +.*2/2", report)
    assert re.search(r"^oslo +2 +10 ", report, re.MULTILINE)
    assert "ended  all 2 rounds done" in report
    models = (await fedctl("model", "list", "test")).out
    assert len(models.strip().splitlines()) == 2 + 3
    assert re.search(r"^version +2 *$", (await fedctl("model", "best", "test")).out, re.MULTILINE)


PRIVATE = """
[aggregation]
kind = "mean"
weighting = "uniform"
merge = [{ pattern = "1.*_*", rule = "keep" }]
[privacy]
kind = "central"
sampling_rate = 1.0
noise_multiplier = 2.0
delta = 0.01
max_epsilon = 9.0
clipping = { kind = "fixed", norm = 1.0 }
"""


async def test_a_private_run_tells_what_it_has_spent(house: House, fedctl: Fedctl) -> None:
    answer = await fedctl.submit(config(quorum=2, max_rounds=2, extra=PRIVATE))
    assert answer.code == 0, answer.err
    assert "differential privacy for whole clients: all 2 rounds come to epsilon" in answer.out + answer.err
    before = (await fedctl("privacy", "show", "test")).out
    assert "the roster is not frozen yet" in before
    assert "Nothing that depends on the data has been released." in before
    clients = [await off_loop(house.client, name) for name in ("oslo", "bergen")]
    await asyncio.gather(*(off_loop(work, client, 2) for client in clients))
    await off_loop(house.operator.wait)
    shown = (await fedctl("privacy", "show", "test")).out
    assert "Population 'default': 2 units on the roster, delta 0.01" in shown
    assert re.search(r"^ *2 +1\.\d+ +1\.\d+ +1\.\d+ +1\.\d+ +1 +2 +yes", shown, re.MULTILINE), shown
    assert "Budget of the population: epsilon 9, of which 1." in shown
    assert "Nothing more will be charged." in shown
    assert "adding or removing one of them" in shown
    assert json.loads((await fedctl("privacy", "show", "test", "--json")).out)["population"] == "default"
    for told in (("run", "report"), ("model", "list"), ("model", "best")):
        assert "0.01)-differential privacy over 2 releases" in (await fedctl(*told, "test")).out
    (await fedctl.submit(config("plain")))
    refused = await fedctl("privacy", "show", "plain")
    assert refused.code != 0
    assert "promises no differential privacy" in refused.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("run", "list"), runs_pb2.ListRunsResponse),
        (("run", "show", "test"), runs_pb2.GetRunResponse),
        (("run", "report", "test"), runs_pb2.GetReportResponse),
        (("client", "list"), runs_pb2.ListClientsResponse),
        (("model", "list", "test"), runs_pb2.ListModelsResponse),
        (("model", "best", "test"), runs_pb2.ModelVersion),
    ],
)
async def test_json_has_the_names_of_the_contract_and_every_field(
    house: House,
    fedctl: Fedctl,
    command: tuple[str, ...],
    message: Callable[[], runs_pb2.GetRunResponse],
) -> None:
    await run_to_its_end(house, fedctl, 1)
    answer = await fedctl(*command, "--json")
    fields = {field.name for field in message().DESCRIPTOR.fields if not field.has_presence}
    assert answer.code == 0
    assert fields <= json.loads(answer.out).keys()
    assert answer.err == ""


async def test_what_does_not_exist_is_named(house: House, fedctl: Fedctl) -> None:
    assert (await fedctl.submit(config())).code == 0
    answer = await fedctl("run", "show", "tset")
    assert (answer.code, answer.out) == (65, "")
    assert "tset" in answer.err
    answer = await fedctl("model", "download", "test", "--version", "9")
    assert answer.code == 65
    assert "version 9" in answer.err
    assert (await fedctl("model", "download", "test", "--version", "latest")).code == 78


# Watching and cancelling


async def test_watch_prints_a_line_per_change_and_ends_with_the_run(house: House, fedctl: Fedctl) -> None:
    assert (await fedctl.submit(config(max_rounds=2))).code == 0
    watching = asyncio.create_task(fedctl("run", "watch", "test"))
    clients = [await off_loop(house.client, name) for name in ("a", "b")]
    await asyncio.gather(*(off_loop(work, client, 2) for client in clients))
    answer = await watching
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert any(re.match(r"round 1 committed: version 1, .*2/2 updates, .* down, .* up", line) for line in lines), lines
    assert any(line.startswith("round 2 committed") for line in lines)
    assert lines[-1] == "run test finished: all 2 rounds done"
    assert len(lines) == len(set(lines))
    # A finished run is told at once, on a terminal too, and as JSON.
    again = await fedctl("run", "watch", "test", "--json")
    assert json.loads(again.out.splitlines()[-1])["run"]["state"] == "RUN_STATE_FINISHED"
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=40, color_system=None)
    assert await off_loop(watch, Connection(data_dir=fedctl.data_dir), "test", console=console, talk=lambda text: None)
    assert "● finished  round 2 of 2" in screen.getvalue()


async def test_a_cancelled_run_ends_the_watching_with_1(house: House, fedctl: Fedctl) -> None:
    submitting = asyncio.create_task(fedctl.submit(config(), "--workload", fedctl.workload, "--watch"))
    await off_loop(until, lambda: house.operator.call("ListRuns", runs_pb2.ListRunsRequest()).runs)
    await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run="test"))
    answer = await submitting
    assert answer.code == 1
    assert answer.out.splitlines()[-1].startswith("run test cancelled")


async def test_cancel_ends_a_run_and_says_what_stays(house: House, fedctl: Fedctl) -> None:
    assert (await fedctl.submit(config())).code == 0
    answer = await fedctl("run", "cancel", "test", "--yes")
    assert (answer.code, answer.out) == (0, "")
    assert "run test is cancelled; its versions up to 0 stay" in answer.err
    assert (await fedctl("run", "cancel", "test", "--yes")).code == 0
    assert "● cancelled" in (await fedctl("run", "list")).out


async def test_watching_outlives_a_restart_of_the_coordinator(tmp_path: Path, fedctl: Fedctl) -> None:
    settings = ServerSettings(data_dir=tmp_path / "data", listen="127.0.0.1:0", drain_seconds=0.2, lease_seconds=5)
    async with App(settings) as app:
        assert (await fedctl.submit(config(size=1))).code == 0
        watching = asyncio.create_task(fedctl("run", "watch", "test"))
        client = LightClient(app.address)
        credential = await off_loop(client.enroll, app.tokens.join, "a")
        await off_loop(client.next_assignment)
        client.close()
        await asyncio.sleep(1)  # a watcher that came after the stop would be told that nobody is there
    assert not watching.done()
    async with App(settings) as app:
        client = LightClient(app.address)
        client.use(credential)
        await off_loop(work, client)
        client.close()
        answer = await watching
    assert answer.code == 0, answer.err
    assert "trying again in" in answer.err
    assert answer.out.splitlines()[-1] == "run test finished: all 1 rounds done"


async def test_ctrl_c_ends_the_watching_and_not_the_run(house: House, fedctl: Fedctl) -> None:
    assert (await fedctl.submit(config())).code == 0
    # A job in the background ignores SIGINT, and so do its children, unless they say otherwise.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"{heeding}; from fed_server.cli.operator import main; main()"),
        *("--data-dir", str(fedctl.data_dir), "run", "watch", "test"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        assert (await process.stdout.readline()).startswith(b"round 1 selecting")
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 130
    assert b"stopped watching; the run goes on" in err
    assert (await off_loop(house.operator.run)).state == runs_pb2.RUN_STATE_ACTIVE


# Downloading


async def test_an_average_is_named_as_what_it_is(house: House, fedctl: Fedctl) -> None:
    assert (await fedctl.submit(config(size=1, extra="[average]\ndecay = 0.5\n"))).code == 0
    answer = await fedctl("model", "download", "test", "--average", "--version", "0")
    assert answer.code != 0
    assert "average.decay" in answer.err
    await off_loop(work, await off_loop(house.client, "turku"))
    await off_loop(house.operator.wait)
    answer = await fedctl("model", "download", "test", "--average", "--version", "newest")
    assert (answer.code, answer.out) == (0, "test-v1-average.safetensors\n")
    assert (fedctl.folder / "test-v1-average.safetensors").exists()


async def test_a_file_is_replaced_only_by_force(house: House, fedctl: Fedctl) -> None:
    assert (await fedctl.submit(config())).code == 0
    answer = await fedctl("model", "download", "test")
    assert (answer.code, answer.out) == (0, "test-v0.safetensors\n")
    path = fedctl.folder / "test-v0.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"precious")
    answer = await fedctl("model", "download", "test")
    assert answer.code == 65
    assert "--force" in answer.err
    assert path.read_bytes() == b"precious"
    assert (await fedctl("model", "download", "test", "--force")).code == 0
    assert path.read_bytes() == content
    assert not list(fedctl.folder.glob("*.part"))
    assert (await fedctl("model", "download", "test", "no/such/folder/x")).code == 74


class BrokenRuns(runs_pb2_grpc.RunsServicer):
    """What our own coordinator never does: sends too little, sends it in the wrong place, or falls silent."""

    def __init__(self, offsets: list[int], silence: threading.Event | None = None) -> None:
        self._offsets = offsets
        self._silence = silence

    def DownloadModel(
        self, request: runs_pb2.DownloadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[runs_pb2.DownloadModelResponse]:
        model = runs_pb2.ModelVersion(version=1, file_bytes=30)
        yield runs_pb2.DownloadModelResponse(header=runs_pb2.DownloadModelHeader(model=model))
        for offset in self._offsets:
            yield runs_pb2.DownloadModelResponse(chunk=transfer_pb2.Chunk(offset=offset, data=bytes(10)))
        if self._silence is not None:
            self._silence.wait(20)


@pytest.mark.parametrize(
    ("offsets", "silence", "error", "message"),
    [
        ([0, 10], None, CorruptError, "ended after 20 of 30 bytes"),
        ([0, 20], None, CorruptError, "sent bytes from 20 where 10 come next"),
        ([0], threading.Event(), UnavailableError, "nothing moved for 1 s"),
    ],
)
def test_a_download_that_goes_wrong_leaves_no_file(
    tmp_path: Path, offsets: list[int], silence: threading.Event | None, error: type[Exception], message: str
) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    runs_pb2_grpc.add_RunsServicer_to_server(BrokenRuns(offsets, silence), server)
    server.add_insecure_port(f"unix:{tmp_path}/fed-server.sock")
    server.start()
    try:
        with (
            Coordinator(Connection(data_dir=tmp_path), stall_seconds=1) as coordinator,
            pytest.raises(error, match=message),
        ):
            download(
                coordinator,
                model_request("x", "best"),
                tmp_path / "x",
                force=False,
                console=Console(file=io.StringIO()),
            )
    finally:
        if silence is not None:
            silence.set()
        server.stop(None).wait()
    assert not list(tmp_path.glob("x*"))


# Connections


async def test_without_a_coordinator_it_says_how_to_start_one(fedctl: Fedctl) -> None:
    answer = await fedctl("run", "list")
    assert (answer.code, answer.out) == (69, "")
    assert f"no coordinator runs on data directory {fedctl.data_dir}" in answer.err
    assert f"fed-server run --data-dir {fedctl.data_dir}" in answer.err
    fedctl.data_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(fedctl.data_dir / "fed-server.sock"))
    answer = await fedctl("run", "list")
    assert answer.code == 69
    assert f"no coordinator answers on data directory {fedctl.data_dir}: connection refused" in answer.err


async def test_over_tcp_it_takes_the_operator_token(
    house: House, fedctl: Fedctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ("--server", house.app.address)
    answer = await off_loop(fedctl.run, "run", "list", *server)
    assert answer.code == 77
    assert "--operator-token-file" in answer.err
    assert (await off_loop(fedctl.run, "run", "list", *server, "--operator-token", "wrong")).code == 77
    token_file = fedctl.data_dir / "operator-token"
    for place in (("run", "list", *server, "--json"), (*server, "run", "list", "--json")):
        answer = await off_loop(fedctl.run, *place, "--operator-token-file", token_file)
        assert (answer.code, json.loads(answer.out)) == (0, {"runs": []}), answer.err
    monkeypatch.setenv("FEDCTL_OPERATOR_TOKEN", token_file.read_text().strip())
    assert (await off_loop(fedctl.run, "run", "list", *server)).code == 0


async def test_over_tls_it_trusts_the_given_authority_only(
    tmp_path: Path, fedctl: Fedctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, other = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    settings = ServerSettings(
        data_dir=tmp_path / "data", listen="127.0.0.1:0", tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem"
    )
    async with App(settings) as app:
        monkeypatch.setenv("FEDCTL_OPERATOR_TOKEN", app.tokens.operator)
        command = ("run", "list", "--json", "--server", app.address, "--tls-ca")
        assert (await off_loop(fedctl.run, *command, tmp_path / "ca.pem")).code == 0
        answer = await off_loop(fedctl.run, *command, tmp_path / "other.pem")
        assert answer.code == 69
        assert "--tls-ca" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--server", "example.org"),
        ("--server", "https://example.org:1"),
        ("--server", "example.org:1", "--operator-token-file", "missing"),
        ("--server", "example.org:1", "--operator-token", "x", "--tls-ca", "missing"),
        ("--server", "example.org:1", "--operator-token", "x", "--tls-ca", "run.toml", "--insecure"),
    ],
)
def test_a_wrong_setting_of_fedctl_itself_is_78(fedctl: Fedctl, arguments: tuple[str, ...]) -> None:
    answer = fedctl.run("run", "list", *arguments)
    assert (answer.code, answer.out) == (78, "")
    assert arguments[-2].startswith("--") or "--" in answer.err


async def test_the_data_directory_comes_from_the_environment_unless_given(
    house: House, fedctl: Fedctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSTREAM_DATA_DIR", str(fedctl.data_dir))
    assert (await off_loop(fedctl.run, "run", "list")).code == 0
    assert (await off_loop(fedctl.run, "--data-dir", "elsewhere", "run", "list")).code == 69
    assert (
        await off_loop(fedctl.run, "--data-dir", "elsewhere", "run", "list", "--data-dir", fedctl.data_dir)
    ).code == 0


# Configs and help


def test_config_commands_need_no_coordinator(fedctl: Fedctl) -> None:
    example = fedctl.run("config", "example")
    assert example.code == 0
    checked = fedctl.run("config", "check", fedctl.config(example.out))
    assert (checked.code, checked.err) == (0, f"{fedctl.folder}/run.toml is a valid run config\n")
    assert parse_run_config(checked.out) == parse_run_config(example.out)
    as_json = fedctl.run("config", "check", fedctl.folder / "run.toml", "--json")
    assert json.loads(as_json.out)["cohort"]["size"] == tomllib.loads(example.out)["cohort"]["size"]
    assert json.loads(fedctl.run("config", "schema").out)["properties"]["cohort"]
    assert fedctl.run("config", "check", fedctl.config("x = 1")).code == 65


def test_help_loads_neither_torch_nor_grpc() -> None:
    code = (
        "import sys\nfrom fed_server.cli.operator import main\ntry: main(['run', 'submit', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'grpc', 'fed_server.config'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_and_option_explains_itself() -> None:
    def walk(command: object, path: str) -> Iterator[str]:
        if not getattr(command, "help", None):
            yield path
        for parameter in command.params:  # type: ignore[attr-defined]
            if not getattr(parameter, "help", None):
                yield f"{path} {parameter.name}"
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{path} {name}")

    assert list(walk(get_command(operator.app), "fedctl")) == []


def test_exit_codes_are_in_the_help_and_in_the_documentation(fedctl: Fedctl) -> None:
    shown = re.sub(r"\s+", " ", fedctl.run("--help").out)
    documented = DOCS.read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in shown
        assert f"| {code} | {meaning} |" in documented


# Tables


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_the_screen_and_cut_no_number(width: int) -> None:
    now = time.time()
    run, rounds = _run(), [_round(number) for number in range(1, 30)]
    view = render.WatchView().updated(runs_pb2.WatchRunResponse(run=run, rounds=rounds), now)
    sites = [_site("a" * 30, 10**6, 10**6, 10**6), _site("b", 0, 0, 0)]
    report = runs_pb2.GetReportResponse(
        run=run, rounds=rounds, downlink=_traffic(1e12), uplink=_traffic(1e11), sites=sites
    )
    models = [runs_pb2.ModelVersion(version=n, metrics=rounds[0].metrics, is_available=True) for n in range(3)]
    for shown in (
        render.watch_screen(view, now, width, 50),
        render.report(report, width),
        render.models_table(models, now, width),
        render.runs_table([run] * 3, now, width),
    ):
        lines = _lines(shown, width)
        assert max(map(len, lines)) <= width
        assert not [line for line in lines if re.search(r"\d…", line)]


def test_the_screen_shows_the_last_rounds_and_what_each_client_does() -> None:
    now = time.time()
    round = _round(29, runs_pb2.ROUND_STATE_TRAINING)
    round.deadline_seconds = 100
    view = render.WatchView().updated(
        runs_pb2.WatchRunResponse(run=_run(), rounds=[*map(_round, range(1, 29)), round]), now
    )
    lines = _lines(render.watch_screen(view, now + 2, 100, 60), 100)
    assert [line.split()[0] for line in lines if re.match(r" +\d+ +(committed|training)", line)] == [
        str(number) for number in range(18, 30)
    ]
    text = "\n".join(lines)
    assert "Round 29  training" in text
    assert "98 s to the deadline" in text
    assert re.search(r"● +hamburg +training +━+╸? +27 +123/450 steps +5\.2 s +0\.3321", text)
    assert re.search(r"○ +oslo +silent +━+╸? +50 +3\.33/6\.65 MB", text)
    assert re.search(r"✓ +bergen +received +━+ +100 +450 ex\.", text)
    assert "✗ zurich: WORKLOAD: ValueError: bad label" in text
    assert "Traceback" not in text


def _site(name: str, num_selected: int, num_counted: int, last_round: int) -> runs_pb2.SiteParticipation:
    return runs_pb2.SiteParticipation(
        client_name=name, num_selected=num_selected, num_counted=num_counted, last_round=last_round
    )


def test_who_took_part_how_often_is_in_the_report_and_those_left_out_come_first_on_the_run() -> None:
    sites = [_site("a", 3, 3, 9), _site("b", 4, 1, 8), _site("new", 0, 0, 0)]
    report = _lines(render.report(runs_pb2.GetReportResponse(run=_run(), sites=sites), 100), 100)
    text = "\n".join(report)
    assert "Who took part  (evenness 0.53)" in text  # 4^2 / (3 (9 + 1))
    assert [line.split() for line in report if re.match(r"(a|b|new|total) ", line)] == [
        ["a", "3", "3", "75.0", "%", "9"],
        ["b", "4", "1", "25.0", "%", "8"],
        ["new", "0", "0", "0.0", "%", "never"],
        ["total", "7", "4"],
    ]
    many = [_site(f"site-{number:02}", number, number, 1) for number in range(30)][::-1]
    shown = _lines(render.run_details(runs_pb2.GetRunResponse(run=_run(), sites=many), time.time(), 100), 100)
    names = [line.split()[0] for line in shown if line.startswith("site-")]
    assert names == [f"site-{number:02}" for number in range(render.WATCHED_CLIENTS)]
    assert f"and {30 - render.WATCHED_CLIENTS} more" in "\n".join(shown)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_how_late_updates_were_is_shown_where_rounds_are_buffered(width: int) -> None:
    rounds = [_round(number, runs_pb2.ROUND_STATE_TRAINING) for number in (8, 9)]
    rounds[0].metrics.extend(_metrics(**{"staleness.mean": 1.25, "staleness.max": 12}))
    for round in rounds:
        round.base_version = round.round - 1
        for client in round.clients:
            client.model_version = round.base_version
    rounds[1].clients[0].staleness = 12
    rounds[1].clients[1].model_version = 5
    report = _lines(render.report(runs_pb2.GetReportResponse(run=_run(), rounds=rounds), width), width)
    view = render.WatchView().updated(runs_pb2.WatchRunResponse(run=_run(), rounds=rounds), 0)
    watched = _lines(render.watch_screen(view, 0, width, 60), width)
    for lines in (report, watched):
        assert max(map(len, lines)) <= width
        assert not [line for line in lines if re.search(r"\d…", line)]
        assert [line for line in lines if re.search(r"^ *round .* late ", line)]
        assert [line for line in lines if re.search(r"^ *8 .* 1\.2/12 ", line)]
    assert [line for line in watched if re.search(r"✓ +bergen +received, 12 late +━", line)]
    assert [line for line in watched if re.search(r"● +hamburg +training, 3 late +━", line)]
    assert [line for line in watched if re.search(r"○ +oslo +silent +━", line)]
    assert "1.2/12 versions late" in render.round_line(rounds[0], "accuracy")
    plain = _lines(render.report(runs_pb2.GetReportResponse(run=_run(), rounds=[_round(1)]), width), width)
    assert not [line for line in plain if " late" in line]


@pytest.mark.parametrize("width", [80, 100])
def test_rates_are_in_the_report_where_sites_have_their_own(width: int) -> None:
    round = _round(1)
    sites = [_site(client.client_name, 1, 1, 1) for client in round.clients]

    def lines() -> list[str]:
        return _lines(render.report(runs_pb2.GetReportResponse(run=_run(), rounds=[round], sites=sites), width), width)

    for client in round.clients:
        client.learning_rate = 0.1
    assert not [line for line in lines() if re.match(r"client .* rate$", line)]
    round.clients[0].learning_rate = 0.0125
    assert [line for line in lines() if re.match(r"client .* rate$", line)]
    assert [line for line in lines() if re.match(r"bergen .* 0\.0125$", line)]
    assert [line for line in lines() if re.match(r"oslo .* 0\.1$", line)]


def test_a_round_without_its_clients_keeps_those_that_are_known() -> None:
    view = render.WatchView().updated(runs_pb2.WatchRunResponse(run=_run(), rounds=[_round(1)]), 0)
    bare = _round(1)
    del bare.clients[:]
    view = view.updated(runs_pb2.WatchRunResponse(run=_run(), rounds=[bare]), 0)
    assert len(view.rounds[1].clients) == 4


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (render.format_bytes(0), "0 B"),
        (render.format_bytes(999), "999 B"),
        (render.format_bytes(6_653_480), "6.65 MB"),
        (render.format_bytes(999_700), "1.00 MB"),
        (render.format_bytes(123_456_789_000_000_000), "123457 TB"),
        (render.format_seconds(0.02), "20 ms"),
        (render.format_seconds(9.96), "10 s"),
        (render.format_seconds(187), "3:07"),
        (render.format_seconds(8049), "2:14:09"),
        (render.format_metric(0.91234), "0.9123"),
        (render.format_metric(1e-9), "1.000e-09"),
        (render.format_metric(float("nan")), "nan"),
    ],
)
def test_numbers_are_short(shown: str, expected: str) -> None:
    assert shown == expected


def _lines(shown: object, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(shown)
    return out.getvalue().splitlines()


def _metrics(**values: float) -> list[common_pb2.Metric]:
    return [common_pb2.Metric(name=name, value=value) for name, value in values.items()]


def _run() -> runs_pb2.Run:
    return runs_pb2.Run(
        run_id="r1",
        name="a-run-with-quite-a-long-name",
        state=runs_pb2.RUN_STATE_ACTIVE,
        reason="1 of 3 updates; waits for hamburg (training 27 %), oslo (uploading 50 %) and others",
        round=29,
        max_rounds=100,
        model_version=28,
        best_version=28,
        metrics=_metrics(accuracy=0.9, loss=0.1),
    )


def _traffic(raw_bytes: float) -> runs_pb2.Traffic:
    return runs_pb2.Traffic(raw_bytes=int(raw_bytes), payload_bytes=int(raw_bytes), wire_bytes=int(raw_bytes))


def _round(number: int, state: runs_pb2.RoundState.ValueType = runs_pb2.ROUND_STATE_COMMITTED) -> runs_pb2.Round:
    train, opened = common_pb2.ASSIGNMENT_KIND_TRAIN, runs_pb2.ASSIGNMENT_STATE_OPEN
    clients = [
        runs_pb2.RoundClient(
            client_name="bergen", assignment_kind=train, state=runs_pb2.ASSIGNMENT_STATE_RECEIVED, num_examples=450,
            is_alive=True, downlink=_traffic(6653480), uplink=_traffic(6653480), training_seconds=12.3,
        ),
        runs_pb2.RoundClient(
            client_name="hamburg", assignment_kind=train, state=opened, phase=common_pb2.WORK_PHASE_TRAINING, done=123, total=450,
            eta_seconds=7.2, metrics=_metrics(loss=0.3321), is_alive=True,
        ),
        runs_pb2.RoundClient(
            client_name="oslo", assignment_kind=train, state=opened, phase=common_pb2.WORK_PHASE_UPLOADING, done=3326740,
            total=6653480, eta_seconds=-1,
        ),
        runs_pb2.RoundClient(
            client_name="zurich", assignment_kind=train, state=runs_pb2.ASSIGNMENT_STATE_FAILED, is_alive=True,
            reason="WORKLOAD: ValueError: bad label\nTraceback (most recent call last): ...",
        ),
    ]  # fmt: skip
    return runs_pb2.Round(
        round=number, state=state, reason="3 of 3 updates", goal=3, quorum=2, model_version=number, clients=clients,
        metrics=_metrics(accuracy=0.9, loss=0.25), downlink=_traffic(2.2e11), uplink=_traffic(1.1e11), deadline_seconds=-1,
        seconds=[runs_pb2.PhaseSeconds(phase=name, seconds=123.4) for name in ("selecting", "training", "aggregating")],
    )  # fmt: skip
