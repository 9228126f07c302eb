"""The daemon as a process: killed, stopped, refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
import trustme

from fed_client.settings import load_settings
from fed_core.errors import ConfigError, CorruptError, NoLongerNeededError, UnauthenticatedError, UpdateRefusedError
from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import parse_manifest, parse_preamble
from fed_core.payload.verify import verify_file
from fedstream.v1 import common_pb2, participation_pb2
from tests.client.lineage import Lineage

if TYPE_CHECKING:
    from torch import Tensor

    from tests.client.conftest import FakeCoordinator

# A model of 2 MiB, so that transfers have a middle.
WORKLOAD = """
    import os, time
    import torch
    from torch import nn
    from fed_core.workload import Workload

    class Toy(Workload):
        name = "toy"

        def __init__(self):
            self.seconds = 0.0

        def model(self):
            return nn.Linear(2**19, 1, bias=False)

        def train_data(self, site):
            site.allow_options("seconds", "exit", "spread")
            self.seconds = site.number("seconds", 0.0)
            self.exits = site.flag("exit")
            print("data was read")
            spread = site.number("spread", 0.0)
            return torch.linspace(-spread, spread, 2**21).reshape(4, 2**19), torch.ones(4, 1)

        def evaluation_data(self, site):
            return torch.zeros(3, 2**19), torch.ones(3, 1)

        def loss(self, model, batch):
            if self.exits:
                os._exit(3)
            time.sleep(self.seconds)
            x, y = batch
            return ((model(x) - y) ** 2).mean()
"""


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(textwrap.dedent(WORKLOAD))
    return path


@pytest.fixture
def lineage(workload: Path, coordinator: FakeCoordinator) -> Lineage:
    from fed_core.tensors import model_specs, model_tensors
    from fed_core.workload import initial_model, load_workload

    model = initial_model(load_workload(str(workload)), seed=0)
    return Lineage(coordinator.payloads.__setitem__, model_specs(model), model_tensors(model))


@pytest.fixture
def assignment(lineage: Lineage) -> Callable[..., participation_pb2.Assignment]:
    from fed_core.specs import fingerprint

    whole = lineage.ref(0, lineage.raw(0))

    def make(
        assignment_id: str = "a1",
        kind: str = "TRAIN",
        steps: int = 2,
        model: participation_pb2.ModelRef = whole,
        uplink: str = '{"kind": "raw"}',
    ) -> participation_pb2.Assignment:
        return participation_pb2.Assignment(
            assignment_id=assignment_id,
            run_id="r1",
            round=1,
            kind=common_pb2.AssignmentKind.Value(f"ASSIGNMENT_KIND_{kind}"),
            workload=common_pb2.WorkloadOffer(name="toy", version="1"),
            fingerprint=fingerprint(lineage.specs),
            model=model,
            plan=common_pb2.TrainingPlan(
                steps=steps,
                batch_size=2,
                seed=1,
                num_threads=1,
                optimizer=common_pb2.OptimizerPlan(
                    kind=common_pb2.OPTIMIZER_KIND_SGD, learning_rate=0.1, epoch_decay=1.0
                ),
            ),
            uplink=uplink,
        )

    return make


@dataclass
class Site:
    """A fed-client in a process of its own."""

    arguments: list[str]
    state: Path
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *more: str, fail_at: str = "") -> subprocess.Popen[bytes]:
        environment = os.environ | ({"FEDSTREAM_FAIL_AT": fail_at} if fail_at else {})
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fed_client.cli", "run", *self.arguments, *more], stderr=log, env=environment
            )
        self.processes.append(process)
        return process

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it never came to be; the log:\n{self.log.read_text()}"
            time.sleep(0.02)

    def spool(self) -> list[str]:
        return sorted(path.name for path in (self.state / "spool").iterdir())

    def carried(self) -> list[str]:
        return sorted(path.name for path in (self.state / "carried" / "r1").iterdir())

    def cache(self) -> list[str]:
        return sorted(path.name for path in (self.state / "cache").iterdir())


@pytest.fixture
def site(coordinator: FakeCoordinator, workload: Path, tmp_path: Path) -> Iterator[Site]:
    state = tmp_path / "state"
    arguments = ["--server", coordinator.address, "--state-dir", str(state), "--name", "site", "--log-format", "json"]
    arguments += ["--workload", str(workload), "--join-token", "join"]
    site = Site(arguments, state, tmp_path / "log")
    yield site
    for process in site.processes:
        process.kill()
        process.wait()


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fed_client.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


# -- work --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_site_enrols_trains_evaluates_and_tells_what_it_did(
    coordinator: FakeCoordinator, site: Site, lineage: Lineage, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    coordinator.want(assignment("a1"), assignment("a2", kind="EVALUATE"))
    process = site.start()
    site.until(lambda: not coordinator.desired and site.events("evaluation delivered") and site.events("uploaded"))
    (site.state.parent / "update").write_bytes(coordinator.received["a1"])
    manifest = verify_file(site.state.parent / "update", coordinator.receipts["a1"].digest)
    assert manifest.update is not None
    assert (manifest.update.assignment_id, manifest.update.num_steps) == ("a1", 2)
    assert coordinator.calls["ReportEvaluation"][0].num_examples == 3
    phases = {call.phase for call in coordinator.calls["ReportProgress"]}
    assert common_pb2.WORK_PHASE_TRAINING in phases
    assert len(coordinator.calls["Download"]) == 1
    site.until(lambda: site.spool() == [])
    events = [
        event
        for event in ("enrolled", "workload offered", "assignment taken", "trained", "uploaded")
        if site.events(event)
    ]
    assert len(events) == 5
    # The daemon is small and starts fast because torch is the trainer's.
    assert not [path for path in psutil.Process(process.pid).memory_maps() if "torch" in path.path]

    status = json.loads(_run("status", "--state-dir", str(site.state), "--json").stdout)
    assert (status["pid"], status["name"], status["client_id"]) == (process.pid, "site", "c1")
    assert status["workloads"] == ["toy"]
    assert [each["bytes"] for each in status["cached"]] == [len(coordinator.payloads[lineage.digests[0]])]

    second = _run("run", *site.arguments)
    assert second.returncode == 75
    assert f"process {process.pid}" in second.stderr


@pytest.mark.slow
def test_a_stopped_daemon_ends_at_once_without_an_orphan_and_trains_again(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    coordinator.want(assignment("a1", steps=10_000))
    process = site.start("--option", "seconds=0.05")
    site.until(lambda: any(call.done > 2 for call in coordinator.calls["ReportProgress"]))
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert time.monotonic() - began < 3
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not coordinator.calls["ReportFailure"]

    coordinator.want(assignment("a1"))
    site.start()
    site.until(lambda: "a1" in coordinator.receipts)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["client-mid-download:2", "client-mid-upload:2"])
def test_a_daemon_killed_in_a_transfer_goes_on_where_it_was(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment], point: str
) -> None:
    coordinator.want(assignment())
    assert site.start(fail_at=point).wait(60) == -signal.SIGKILL
    site.start()
    site.until(lambda: "a1" in coordinator.receipts)
    assert coordinator.received["a1"][:8] == b"FEDSTRM1"
    assert len(site.events("trained")) == 1
    if "upload" in point:
        uploads = coordinator.calls["Upload"]
        assert uploads[1].offset > 0
        assert uploads[1].payload.digest == uploads[0].payload.digest
    else:
        assert coordinator.calls["Download"][1].offset > 0


@pytest.mark.slow
def test_an_update_in_the_spool_is_sent_after_a_kill_without_training_again(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    coordinator.want(assignment())
    assert site.start(fail_at="client-spooled").wait(60) == -signal.SIGKILL
    assert site.spool() == ["a1.json", "a1.update"]
    site.start()
    site.until(lambda: "a1" in coordinator.receipts and not site.spool())
    assert len(coordinator.calls["Download"]) == 1
    assert [event["assignment"] for event in site.events("found in the spool")] == ["a1"]
    site.until(lambda: coordinator.calls["PollAssignment"])
    assert len(site.events("assignment taken")) == 1


@pytest.mark.slow
def test_a_killed_daemon_leaves_no_trainer(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    coordinator.want(assignment(steps=10_000))
    process = site.start("--option", "seconds=0.05")
    site.until(lambda: any(call.done > 0 for call in coordinator.calls["ReportProgress"]))
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert children
    assert not alive


@pytest.mark.slow
def test_a_dropped_training_is_cancelled_and_the_next_one_done(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    coordinator.want(assignment("a1", steps=10_000))
    site.start("--option", "seconds=0.05")
    site.until(lambda: any(call.done > 0 for call in coordinator.calls["ReportProgress"]))
    coordinator.dropped["a1"] = "the deadline passed"
    coordinator.want(assignment("a2"))
    site.until(lambda: "a2" in coordinator.receipts)
    assert [event["reason"] for event in site.events("dropped")] == ["the deadline passed"]
    assert "a1" not in coordinator.received
    assert not coordinator.calls["ReportFailure"]


@pytest.mark.slow
def test_user_code_that_exits_is_a_reported_failure_and_the_daemon_lives(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    coordinator.want(assignment("a1"))
    process = site.start("--option", "exit=true")
    site.until(lambda: coordinator.calls["ReportFailure"])
    report = coordinator.calls["ReportFailure"][0]
    assert report.kind == participation_pb2.FAILURE_KIND_TRAINER_DIED
    assert "status 3" in report.message
    assert "data was read" in (site.state / "trainer.log").read_text()
    coordinator.want(assignment("a2", kind="EVALUATE"))
    site.until(lambda: len(coordinator.calls["ReportFailure"]) == 2)
    assert process.poll() is None


@pytest.mark.slow
def test_a_refused_a_late_and_a_rotten_update_are_each_forgotten_by_name(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    coordinator.upload_faults.append((1, UpdateRefusedError("tensor w: a value is over the bound")))
    coordinator.want(assignment("a1"))
    site.start()
    site.until(lambda: coordinator.calls["ReportFailure"])
    refused = coordinator.calls["ReportFailure"][0]
    assert refused.kind == participation_pb2.FAILURE_KIND_UPDATE_REFUSED
    assert "over the bound" in refused.message

    coordinator.upload_faults.append((1, NoLongerNeededError("the round closed with its goal reached")))
    coordinator.want(assignment("a2"))
    site.until(lambda: site.events("dropped"))
    assert site.events("dropped")[0]["reason"] == "the round closed with its goal reached"
    coordinator.want()

    def rot(context: Any) -> None:
        path = site.state / "spool" / "a3.update"
        data = bytearray(path.read_bytes())
        data[2**20] ^= 1
        path.write_bytes(data)
        coordinator.received["a3"].clear()
        coordinator.faults["Upload"].append(CorruptError("a digest differs", offset=2**20))
        coordinator.faults["Upload"].append(CorruptError("a digest differs", offset=2**20))
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    coordinator.upload_faults.append((2**20, rot))
    coordinator.want(assignment("a3"))
    site.until(lambda: len(coordinator.calls["ReportFailure"]) == 2)
    assert coordinator.calls["ReportFailure"][1].kind == participation_pb2.FAILURE_KIND_SPOOL_CORRUPT
    site.until(lambda: site.spool() == [])


@pytest.mark.slow
def test_a_full_disk_at_the_site_is_reported_and_the_daemon_lives(
    coordinator: FakeCoordinator, site: Site, assignment: Callable[..., participation_pb2.Assignment]
) -> None:
    site.state.mkdir()
    size = 3 * 2**20  # enough for the model, not for its update beside it
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", site.state], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        coordinator.want(assignment("a1"))
        process = site.start()
        site.until(lambda: coordinator.calls["ReportFailure"])
        assert coordinator.calls["ReportFailure"][0].kind == participation_pb2.FAILURE_KIND_DISK_FULL
        coordinator.want(assignment("a2", kind="EVALUATE"))
        site.until(lambda: coordinator.calls["ReportEvaluation"])
        process.terminate()
        assert process.wait(10) == 0
    finally:
        subprocess.run(["umount", site.state], check=True)


# -- models ------------------------------------------------------------------------------------------------------------

MakeAssignment = Callable[..., participation_pb2.Assignment]


def sent(coordinator: FakeCoordinator, assignment_id: str, folder: Path) -> Tensor:
    """What arrives of an update."""
    from fed_core.payload.reader import PayloadReader

    path = folder / f"{assignment_id}.received"
    path.write_bytes(coordinator.received[assignment_id])
    with PayloadReader(path) as reader:
        return reader.tensor("weight", verify=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_coarse_code_loses_is_sent_later_whoever_is_killed_in_between(
    coordinator: FakeCoordinator,
    site: Site,
    assignment: Callable[..., participation_pb2.Assignment],
    tmp_path: Path,
) -> None:
    from fed_core.safetensors_tiles import SafetensorsReader

    spread = ("--option", "spread=0.001")
    coarse = '{"kind": "uniform", "bits": 2, "block": 65536, "feedback": true}'
    coordinator.want(assignment("a0"))  # the same training, sent as it is
    site.start(*spread)
    site.until(lambda: site.events("uploaded"))
    assert not (site.state / "carried" / "r1").exists()
    site.processes[-1].kill()

    coordinator.want(assignment("a1", uplink=coarse))
    assert site.start(*spread, fail_at="client-carried").wait(60) == -signal.SIGKILL
    assert site.start(*spread, fail_at="client-before-promotion").wait(60) == -signal.SIGKILL
    assert "a1" in coordinator.receipts
    assert site.carried() == ["a1.json", "a1.residual"]
    assert site.start(*spread, fail_at="client-promoted").wait(60) == -signal.SIGKILL
    assert site.carried() == ["a1.residual", "promoted"]
    assert site.spool() == ["a1.json", "a1.update"]
    site.start(*spread)
    coordinator.want(assignment("a2", uplink=coarse))
    site.until(lambda: len(site.events("uploaded")) == 3)
    coordinator.upload_faults.append((1, NoLongerNeededError("the round closed")))
    coordinator.want(assignment("a3", uplink=coarse))
    site.until(lambda: site.events("dropped"))
    coordinator.want(assignment("a4", uplink=coarse))
    site.until(lambda: len(site.events("uploaded")) == 4)
    assert site.carried() == ["a4.residual", "promoted"]
    assert len(site.events("trained")) == 5

    trained = sent(coordinator, "a0", tmp_path)
    arrived = [sent(coordinator, name, tmp_path) for name in ("a1", "a2", "a4")]
    with SafetensorsReader(site.state / "carried" / "r1" / "a4.residual") as reader:
        left = reader.tensor("weight")
    scale = float(trained.abs().max())
    assert scale > 0
    assert float((arrived[0] - trained).abs().max()) > 0.05 * scale
    assert float((sum(arrived) + left - 3 * trained).abs().max()) < 1e-5 * scale

    status = json.loads(_run("status", "--state-dir", str(site.state), "--json").stdout)
    assert [(each["run"], each["bytes"] > 2**21) for each in status["carried"]] == [("r1", True)]
    assert "carried to later updates: runs: 1, 2,0" in _run("status", "--state-dir", str(site.state)).stdout


def base_of(coordinator: FakeCoordinator, assignment_id: str) -> bytes:
    """Identity of the model that an update is relative to."""
    data = coordinator.received[assignment_id]
    preamble = parse_preamble(data[:PREAMBLE_BYTES])
    return parse_manifest(preamble, data[PREAMBLE_BYTES : PREAMBLE_BYTES + preamble.manifest_bytes]).base_digest


@pytest.mark.slow
def test_a_second_round_costs_what_changed_and_the_log_says_what_is_sent(
    coordinator: FakeCoordinator, site: Site, lineage: Lineage, assignment: MakeAssignment
) -> None:
    coordinator.want(assignment("a1", uplink='{"kind": "uniform", "bits": 4}'))
    site.start()
    site.until(lambda: "a1" in coordinator.receipts)
    site.until(lambda: lineage.digests[0] in coordinator.calls["PollAssignment"][-1].model_digests)
    coordinator.want(assignment("a2", model=lineage.ref(1, lineage.step())))
    site.until(lambda: "a2" in coordinator.receipts)
    assert base_of(coordinator, "a2") == lineage.digests[1]
    assert len(coordinator.calls["Download"]) == 2
    site.until(lambda: coordinator.calls["PollAssignment"][-1].model_digests[0] == lineage.digests[1])
    assert sorted(site.cache()) == sorted(f"{digest.hex()}.payload" for digest in lineage.digests)

    taken, trained = site.events("assignment taken")[0], site.events("trained")[0]
    assert "encoded as uniform (bits 4)" in taken["sends"]
    assert trained["raw_bytes"] == 2**21
    assert trained["update_bytes"] == len(coordinator.received["a1"])
    assert 7 < trained["ratio"] <= 8
    assert 0 <= trained["error"] < 0.1
    assert 0.9 < trained["gain"] < 1.1
    assert trained["codecs"] == "uniform 1"
    assert site.events("trained")[1]["error"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("point", ["client-mid-download:1", "client-mid-assemble", "client-assembled"])
def test_a_daemon_killed_on_the_way_to_a_model_goes_on_where_it_was(
    coordinator: FakeCoordinator, site: Site, lineage: Lineage, assignment: MakeAssignment, point: str
) -> None:
    coordinator.want(assignment("a1"))
    process = site.start()
    site.until(lambda: "a1" in coordinator.receipts)
    process.terminate()
    process.wait(10)
    delta = lineage.step()
    coordinator.want(assignment("a2", model=lineage.ref(1, delta)))
    assert site.start(fail_at=point).wait(60) == -signal.SIGKILL
    polls = len(coordinator.calls["PollAssignment"])
    site.start()
    site.until(lambda: "a2" in coordinator.receipts)
    assert base_of(coordinator, "a2") == lineage.digests[1]
    downloads = [call for call in coordinator.calls["Download"] if call.digest == delta.digest]
    assert [call.offset for call in downloads] == ([0, 2**18] if "download" in point else [0])
    said = coordinator.calls["PollAssignment"][polls].model_digests
    assert lineage.digests[0] in said
    assert (lineage.digests[1] in said) == (point == "client-assembled")
    lineage.raw(1)
    made = site.state / "cache" / f"{lineage.digests[1].hex()}.payload"
    assert made.read_bytes() == coordinator.payloads[lineage.digests[1]]
    site.until(lambda: sorted(site.cache()) == sorted(f"{digest.hex()}.payload" for digest in lineage.digests))


@pytest.mark.slow
def test_a_divergence_is_told_once_and_cured_by_a_whole_model(
    coordinator: FakeCoordinator, site: Site, lineage: Lineage, assignment: MakeAssignment
) -> None:
    coordinator.want(assignment("a1"))
    site.start()
    site.until(lambda: "a1" in coordinator.receipts)
    lineage.step()
    liar = Lineage(coordinator.payloads.__setitem__, lineage.specs, lineage.versions[0])
    wrong = liar.step(result=lineage.digests[1], seed=1)
    answered: list[participation_pb2.PollAssignmentRequest] = []

    def cure(request: participation_pb2.PollAssignmentRequest) -> None:
        answered.append(request)
        if request.divergences:
            coordinator.want(assignment("a2", model=lineage.ref(1, lineage.raw(1))))

    coordinator.on_poll = cure
    coordinator.want(assignment("a2", model=lineage.ref(1, wrong)))
    site.until(lambda: "a2" in coordinator.receipts)
    assert base_of(coordinator, "a2") == lineage.digests[1]
    (told,) = [request for request in answered if request.divergences]
    assert list(told.divergences) == [
        participation_pb2.Divergence(assignment_id="a2", version=1, digest=liar.digests[1])
    ]
    assert (list(told.model_digests), told.wait_seconds) == ([], 0)
    assert [(held.assignment_id, held.phase) for held in told.held] == [("a2", common_pb2.WORK_PHASE_QUEUED)]
    assert not coordinator.calls["ReportFailure"]
    assert [event["diverged"] for event in site.events("the way to the model was lost, asking for another")] == [True]


@pytest.mark.slow
def test_a_cached_model_that_rots_in_use_is_fetched_anew(
    coordinator: FakeCoordinator, site: Site, lineage: Lineage, assignment: MakeAssignment
) -> None:
    coordinator.want(assignment("a1"))
    site.start()
    site.until(lambda: "a1" in coordinator.receipts)
    path = site.state / "cache" / f"{lineage.digests[0].hex()}.payload"
    data = bytearray(path.read_bytes())
    data[2**20] ^= 1
    path.write_bytes(data)

    def choose(request: participation_pb2.PollAssignmentRequest) -> None:
        if coordinator.desired:
            has_it = lineage.digests[0] in request.model_digests
            model = lineage.ref(0) if has_it else lineage.ref(0, lineage.raw(0))
            coordinator.want(assignment("a2", model=model))

    coordinator.on_poll = choose
    coordinator.want(assignment("a2", model=lineage.ref(0)))
    site.until(lambda: "a2" in coordinator.receipts)
    assert not coordinator.calls["ReportFailure"]
    assert len(coordinator.calls["Download"]) == 2
    assert not any(request.divergences for request in coordinator.calls["PollAssignment"])
    assert path.read_bytes() == coordinator.payloads[lineage.digests[0]]


@pytest.mark.slow
def test_a_model_that_cannot_be_had_is_reported_after_a_few_ways(
    coordinator: FakeCoordinator, site: Site, lineage: Lineage, assignment: MakeAssignment
) -> None:
    lost = assignment("a1")
    del coordinator.payloads[lineage.digests[0]]
    coordinator.want(lost)
    process = site.start()
    site.until(lambda: coordinator.calls["ReportFailure"])
    report = coordinator.calls["ReportFailure"][0]
    assert report.kind == participation_pb2.FAILURE_KIND_REFUSED_BY_SITE
    assert "version 0 cannot be had" in report.message
    assert "no longer kept" in report.message
    assert len(coordinator.calls["Download"]) == 4
    assert process.poll() is None
    lineage.raw(0)
    coordinator.want(assignment("a2"))
    site.until(lambda: "a2" in coordinator.receipts)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_identity_that_is_not_known_ends_with_77(coordinator: FakeCoordinator, site: Site) -> None:
    coordinator.faults["PollAssignment"].append(UnauthenticatedError("unknown client"))
    assert site.start().wait(60) == 77
    assert site.events("the daemon stops")[0]["error"] == "unknown client"


def test_enrolling_has_an_exit_code_for_each_end(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    at = ["--server", coordinator.address, "--state-dir", str(tmp_path / "state"), "--name", "site"]
    no_token = _run("enroll", *at)
    assert (no_token.returncode, "--join-token" in no_token.stderr) == (77, True)
    assert _run("enroll", *at, "--join-token", "wrong").returncode == 77
    nobody = _run("enroll", "--server", f"127.0.0.1:{_free_port()}", *at[2:], "--join-token", "join", "--wait", "0")
    assert (nobody.returncode, "fed-client doctor" in nobody.stderr) == (69, True)
    good = _run("enroll", *at, FED_CLIENT_JOIN_TOKEN="join")
    assert (good.returncode, "c1" in good.stdout) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        (["run"], {}, 78, "give --server"),
        (["run", "--server", "http://x/"], {}, 78, "HOST:PORT"),
        (["run", "--server", "x:1"], {}, 78, "--workload"),
        (["run", "--server", "x:1", "--label", "a"], {}, 78, "key=value"),
        (["run", "--server", "x:1", "--epochs", "1", "--steps", "1"], {}, 78, "give one"),
        (["run", "--server", "x:1", "--tls-ca", "/nowhere"], {}, 78, "cannot be read"),
        (["run", "--server", "x:1", "--config", "/nowhere"], {}, 78, "--config"),
        (["run"], {"FED_CLIENT_SERVR": "x:1"}, 78, "did you mean FED_CLIENT_SERVER?"),
        (["run", "--no-such-option"], {}, 2, "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_named_with_its_cure(
    arguments: list[str], environment: dict[str, str], code: int, words: str
) -> None:
    result = _run(*arguments, **environment)
    assert result.returncode == code
    assert words in result.stderr


def test_flags_come_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "client.toml"
    config.write_text(
        'server = "file:1"\nname = "file"\ndevice = "cpu"\n[labels]\nregion = "north"\n[overrides]\nepochs = 3\n'
    )
    monkeypatch.setenv("FED_CLIENT_NAME", "environment")
    monkeypatch.setenv("FED_CLIENT_DEVICE", "cuda")
    monkeypatch.setenv("FED_CLIENT_WORKLOAD", "digits,toy.py")
    monkeypatch.setenv("FED_CLIENT_OPTIONS", "a=1,b=2")
    settings = load_settings({"name": "flag", "options": {"b": "3"}}, config)
    assert (settings.name, settings.device, settings.server) == ("flag", "cuda", "file:1")
    assert settings.workload == ["digits", "toy.py"]
    assert settings.options == {"a": "1", "b": "3"}
    assert settings.labels == {"region": "north"}
    assert settings.overrides.epochs == 3
    config.write_text('server = "x:1"\n[overrides]\nepoch = 3\n')
    with pytest.raises(ConfigError, match="did you mean epochs"):
        load_settings({}, config)


@pytest.mark.parametrize(
    ("flags", "uses_tls"),
    [
        ({"server": "127.0.0.1:1"}, False),
        ({"server": "localhost:1"}, False),
        ({"server": "[::1]:1"}, False),
        ({"server": "fed.example.org:1"}, True),
        ({"server": "10.0.0.1:1"}, True),
        ({"server": "10.0.0.1:1", "insecure": True}, False),
        ({"server": "127.0.0.1:1", "tls_server_name": "fed.example.org"}, True),
    ],
)
def test_plaintext_leaves_the_machine_only_when_told_to(flags: dict[str, Any], uses_tls: bool) -> None:
    assert load_settings(flags).uses_tls is uses_tls


# -- doctor ------------------------------------------------------------------------------------------------------------


def _examine(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = _run("doctor", "--json", *arguments)
    return result.returncode, {check["name"]: check for check in json.loads(result.stdout)}


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong_with_a_good_site(coordinator: FakeCoordinator, site: Site) -> None:
    arguments = [each for each in site.arguments if each not in ("--log-format", "json")]
    assert _run("enroll", *arguments[:6], "--join-token", "join").returncode == 0
    code, checks = _examine(*arguments)
    assert code == 0, checks
    names = ["settings", "state", "address", "tls", "health", "identity", "clock", "workload", "data", "device"]
    assert list(checks) == names
    assert "4 training examples" in checks["data"]["text"]
    assert coordinator.calls["PollAssignment"][0].wait_seconds == 0


def test_the_doctor_says_the_cure(tmp_path: Path) -> None:
    code, checks = _examine(
        "--server", f"127.0.0.1:{_free_port()}", "--state-dir", str(tmp_path), "--workload", "nowhere.py"
    )
    assert code == 1
    assert "refuses connections" in checks["address"]["text"]
    assert "start fed-server" in checks["address"]["cure"]
    assert "nowhere.py" in checks["workload"]["text"]
    assert "health" not in checks


@pytest.mark.parametrize(
    ("serves", "asks", "words"),
    [
        ("good", ["--tls-ca", "CA"], "certificate is good for 'localhost'"),
        ("good", ["--tls-server-name", "localhost"], "give --tls-ca"),
        ("good", [], "speaks TLS"),
        ("other name", ["--tls-ca", "CA"], "--tls-server-name"),
        ("plaintext", ["--tls-ca", "CA"], "speaks plaintext"),
        ("wants a certificate", ["--tls-ca", "CA"], "asks for a certificate"),
    ],
    ids=["good", "unknown authority", "plaintext to TLS", "wrong name", "TLS to plaintext", "mutual"],
)
def test_the_doctor_explains_tls(tmp_path: Path, serves: str, asks: list[str], words: str) -> None:
    from fed_client.doctor import examine

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("other.example.org" if serves == "other name" else "localhost")
    with _grpc_server(authority, certificate, serves) as port:
        flags: dict[str, Any] = {"server": f"localhost:{port}", "state_dir": tmp_path / "state"}
        for option, value in zip(asks[::2], asks[1::2], strict=True):
            flags[option[2:].replace("-", "_")] = tmp_path / "ca.pem" if value == "CA" else value
        checks = {check.name: check for check in examine(lambda: load_settings(flags))}
    assert words in checks["tls"].text + checks["tls"].cure
    is_good = serves == "good" and asks == ["--tls-ca", "CA"]
    assert (checks["tls"].verdict == "ok") is is_good
    assert ("health" in checks and checks["health"].verdict == "ok") is is_good


class _grpc_server:
    """A gRPC server with the health service only."""

    def __init__(self, authority: trustme.CA, certificate: trustme.LeafCert, serves: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from grpc_health.v1 import health, health_pb2, health_pb2_grpc

        self._server = grpc.server(ThreadPoolExecutor(2))
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        if serves == "plaintext":
            self._port = self._server.add_insecure_port("localhost:0")
            return
        chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        wants = serves == "wants a certificate"
        credentials = grpc.ssl_server_credentials(
            [(certificate.private_key_pem.bytes(), chain)],
            root_certificates=authority.cert_pem.bytes() if wants else None,
            require_client_auth=wants,
        )
        self._port = self._server.add_secure_port("localhost:0", credentials)

    def __enter__(self) -> int:
        self._server.start()
        return self._port

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_help_teaches() -> None:
    result = _run("--help")
    assert result.returncode == 0
    for word in ("run", "enroll", "doctor", "status", "Exit codes"):
        assert word in result.stdout
