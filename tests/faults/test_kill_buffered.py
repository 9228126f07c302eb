"""kill -9 of the coordinator while clients train at their own pace: the journal and the files give the same versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from benchmarks.light_client import LightClient, encode_update
from fed_core.errors import FedstreamError, UnavailableError
from fed_core.specs import TensorSpec
from fedstream.v1 import participation_pb2, runs_pb2
from tests.faults.processes import Coordinator, Federation, digests, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("faults")]

T = TypeVar("T")
CONFIG = """
name = "{name}"
workload = "echo"
seed = 7
[cohort]
size = 2
min_clients = 3
labels = {{ play = "{name}" }}
[schedule]
max_rounds = 5
[rounds]
kind = "buffered"
concurrency = 3
[aggregation]
kind = "mean"
weighting = "uniform"
[server_optimizer]
kind = "adam"
[average]
decay = 0.5
[evaluation]
at = "none"
[uplink]
kind = "raw"
[keep]
versions = 1
"""
MODEL = {
    "w": torch.linspace(-1, 1, 2000).reshape(40, 50),
    "b.mean": torch.linspace(0, 1, 30),
    "count": torch.tensor(0),
}
# Who delivers, one after the other, each what it began when it had delivered last; and so how late each update of a version is.
PLAY = ("a", "b", "a", "b", "b", "a", "c", "a", "b", "c")
STALENESS = [
    [("a", 0), ("b", 0)],
    [("a", 1), ("b", 0)],
    [("a", 1), ("b", 0)],
    [("a", 0), ("c", 3)],
    [("b", 2), ("c", 1)],
]
# In the order in which the play comes to them.
POINTS = ("update-published:2", "mid-fold:2", "before-commit", "update-durable:2", "after-commit")


class Play:
    """Three clients that deliver in a fixed order, whatever becomes of the coordinator."""

    def __init__(self, coordinator: Coordinator, name: str, points: list[str]) -> None:
        self.name = name
        self.points = points
        self._coordinator = coordinator
        self._credentials: dict[str, str] = {}
        self._given: dict[str, participation_pb2.Assignment] = {}

    def run(self) -> runs_pb2.GetReportResponse:
        """The whole play; the report when the run is over."""
        coordinator = self._coordinator
        coordinator.operator.submit(CONFIG.format(name=self.name), MODEL)
        token = (coordinator.data / "join-token").read_text().strip()
        for site in "abc":
            client = LightClient(coordinator.address)
            self._credentials[site] = client.enroll(token, f"{self.name}-{site}")
            client.poll(wait_seconds=0, labels={"play": self.name})
            client.close()
        coordinator.stop()
        self._restart()
        for site in "abc":
            self._call(site, lambda client: client.poll(wait_seconds=0, labels={"play": self.name}))
        for site in "abc":
            self._take_up(site)
        for number, site in enumerate(PLAY):
            self._deliver(site)
            if number < len(PLAY) - 1:
                self._take_up(site)
        until(self._is_over, f"{self.name} is over")
        return coordinator.operator.report(self.name)

    def _restart(self) -> None:
        self._coordinator.start(fail_at=self.points.pop(0) if self.points else None)

    def _call(self, site: str, work: Callable[[LightClient], T]) -> T:
        """What a client does until it has done it."""
        done: list[T] = []

        def is_done() -> bool:
            if not self._coordinator.is_running:
                self._coordinator.wait_killed()
                self._restart()
            client = LightClient(self._coordinator.address)
            client.use(self._credentials[site])
            try:
                done.append(work(client))
            except UnavailableError:
                pass
            finally:
                client.close()
            return bool(done)

        until(is_done, f"{site} of {self.name} is served")
        return done[0]

    def _take_up(self, site: str) -> None:
        before = self._given.get(site)
        held = before.assignment_id if before is not None else ""

        def work(client: LightClient) -> participation_pb2.Assignment:
            for assignment in client.poll(wait_seconds=2, labels={"play": self.name}).assignments:
                if assignment.assignment_id != held:
                    return assignment
            raise UnavailableError("not yet")

        self._given[site] = self._call(site, work)

    def _deliver(self, site: str) -> None:
        assignment = self._given[site]

        def values(spec: TensorSpec) -> Tensor:
            if spec.dtype == "int64":
                return torch.tensor(assignment.model.version + 1)
            made = torch.arange(spec.num_elements, dtype=torch.float64) + ord(site) + 7 * assignment.model.version
            return (torch.sin(made) / 8).reshape(spec.shape).float()

        specs = tuple(
            TensorSpec(
                name, tuple(t.shape), str(t.dtype).removeprefix("torch."), "buffer" if name[0] == "b" else "parameter"
            )
            for name, t in MODEL.items()
        )
        update = encode_update(assignment, specs, values)
        self._call(site, lambda client: client.upload(assignment.assignment_id, update, retry=False))

    def _is_over(self) -> bool:
        if not self._coordinator.is_running:
            self._coordinator.wait_killed()
            self._restart()
        try:
            return self._coordinator.operator.run(self.name).state != runs_pb2.RUN_STATE_ACTIVE
        except FedstreamError:
            return False


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path / "coordinator")
    coordinator.start()
    yield coordinator
    coordinator.disconnect()
    assert not coordinator.sweep()


def journal(report: runs_pb2.GetReportResponse) -> list[list[tuple[str, int]]]:
    return [
        [
            (client.client_name[-1], client.staleness)
            for client in round.clients
            if client.state == runs_pb2.ASSIGNMENT_STATE_RECEIVED
        ]
        for round in report.rounds
    ]


def test_a_site_that_is_killed_in_mid_upload_holds_up_nobody_and_counts_when_it_is_back(federation: Federation) -> None:
    """With all that is remembered on both sides: residuals of coarse codes at the sites, versions as deltas on a lattice."""
    slow = federation.sites[2]
    slow.kill()
    slow.start(fail_at="client-mid-upload")
    encodings = {"uplink": '{ kind = "uniform", bits = 4, feedback = true }', "downlink": '{ kind = "lattice" }'}
    mean = '{ kind = "mean", weighting = "uniform" }'
    federation.submit("late", size=2, rounds=999, concurrency=3, aggregation=mean, **encodings)
    slow.wait_killed()
    version = federation.report("late").run.model_version
    until(lambda: federation.report("late").run.model_version >= version + 2, "the others go on")
    slow.start()

    def late() -> list[runs_pb2.RoundClient]:
        updates = [client for round in federation.report("late").rounds for client in round.clients]
        mine = [client for client in updates if client.client_name == slow.name]
        return [client for client in mine if client.state == runs_pb2.ASSIGNMENT_STATE_RECEIVED]

    first = until(late, "its update counts")[0]
    assert first.staleness >= 2
    until(lambda: len(late()) > 1, "it is asked again")
    assert late()[1].model_version > first.model_version + 2, "with what is the newest"
    run_id = federation.run_id("late")
    federation.coordinator.operator.call("CancelRun", runs_pb2.CancelRunRequest(run="late"))
    assert len(slow.events("trained", run=run_id, assignment=first.assignment_id)) == 1, "trained once"
    for site in federation.sites:
        assert site.events("DIVERGED") == []


def test_killed_at_every_point_the_buffers_make_the_same_versions(coordinator: Coordinator) -> None:
    expected = Play(coordinator, "well", []).run()
    assert journal(expected) == STALENESS
    coordinator.stop()
    coordinator.start()
    play = Play(coordinator, "killed", list(POINTS))
    report = play.run()

    assert play.points == []
    assert coordinator.fail_at is None, "every point was come to"
    assert report.run.state == runs_pb2.RUN_STATE_FINISHED, report.run.reason
    assert journal(report) == STALENESS
    assert digests(report) == digests(expected)
    assert len(set(digests(report))) == 6
    for folder in ("models", "masters", "updates", "uploads"):
        place = coordinator.data / folder / (report.run.run_id if folder in ("models", "masters") else "")
        kept = ["5.safetensors"] if folder == "models" else []
        until(
            lambda place=place, kept=kept: sorted(p.name for p in place.glob("*") if "average" not in p.name) == kept,
            f"{folder} holds what is kept",
        )
