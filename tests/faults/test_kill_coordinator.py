"""kill -9 of the coordinator at every named point: the run goes on and comes to the same bits."""

from __future__ import annotations

import pytest

from fedstream.v1 import runs_pb2
from tests.faults.processes import TRAIN, Federation, digests, losses, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("faults")]

# In the order in which a round comes to them. With a number: that many times later, at another site or in the middle of a fold.
POINTS = (
    "mid-download:2",
    "mid-upload:2",
    "update-published",
    "update-durable",
    "mid-fold:3",
    "before-commit",
    "after-commit",
    "mid-download",  # now of deltas
    "mid-upload:2",
    "before-commit",
)


def test_killed_at_every_point_the_run_comes_to_the_same_bits(
    federation: Federation, undisturbed: runs_pb2.GetReportResponse
) -> None:
    report = federation.killed_at(POINTS, "killed", rounds=3, evaluation="clients")

    assert digests(report) == digests(undisturbed)
    assert losses(report) == losses(undisturbed)
    assert [model.num_updates for model in report.models] == [0, 3, 3, 3]
    assert [round.state for round in report.rounds] == [runs_pb2.ROUND_STATE_COMMITTED] * 3
    for round, expected in zip(report.rounds, undisturbed.rounds, strict=True):
        assert training_metrics(round) == training_metrics(expected)
        trained = [c for c in round.clients if c.assignment_kind == TRAIN]
        assert sorted(c.client_name for c in trained) == [site.name for site in federation.sites]
    for site in federation.sites:
        assert [e["round"] for e in site.events("trained", run=report.run.run_id)] == [1, 2, 3], "trained once a round"
        assert site.spooled() == []


@pytest.mark.parametrize("downlink", ['{ kind = "lattice" }', '{ kind = "raw" }'], ids=["lattice", "raw"])
def test_what_the_server_optimizer_keeps_is_committed_with_the_version(federation: Federation, downlink: str) -> None:
    """Killed between a version's files and its record, and right after it: no round is stepped twice, none is forgotten."""
    coordinator, site, name = federation.coordinator, federation.sites[0], downlink.split('"')[1]
    settings = {"rounds": 3, "site": site, "downlink": downlink, "server_optimizer": '{ kind = "adam" }'}
    federation.submit(f"adam-{name}-well", **settings)
    expected = federation.finished(f"adam-{name}-well")

    points = ["before-commit", "after-commit", "before-commit", "mid-fold:2"]
    report = federation.killed_at(points, f"adam-{name}-killed", **settings)

    assert digests(report) == digests(expected)
    assert losses(report) == losses(expected)
    masters = coordinator.data / "masters" / report.run.run_id
    until(lambda: not list(masters.glob("*")), "what a run that is over kept is deleted")


WEIGHTED = {
    "importance": {"size": 2, "selection": "importance", "aggregation": '{ kind = "mean", weighting = "uniform" }'},
    "fair": {"aggregation": '{ kind = "qfedavg", fairness = 2.0, lipschitz = 1.0 }'},
    "quality": {"aggregation": '{ kind = "mean", weighting = "inverse_loss" }'},
}


@pytest.mark.parametrize("kind", WEIGHTED)
def test_what_updates_count_is_as_durable_as_they_are(federation: Federation, kind: str) -> None:
    coordinator, settings = federation.coordinator, {"rounds": 3, "uplink": '{ kind = "raw" }'} | WEIGHTED[kind]
    federation.submit(f"{kind}-well", **settings)
    expected = federation.finished(f"{kind}-well")

    report = federation.killed_at(["update-durable", "mid-fold:2", "before-commit"], f"{kind}-killed", **settings)

    assert digests(report) == digests(expected)
    assert losses(report) == losses(expected)
    weights = [[(c.client_name, c.weight) for c in r.clients if c.assignment_kind == TRAIN] for r in report.rounds]
    assert weights == [
        [(c.client_name, c.weight) for c in r.clients if c.assignment_kind == TRAIN] for r in expected.rounds
    ]
    assert len({weight for round in weights for _, weight in round}) > 2
    masters = coordinator.data / "masters" / report.run.run_id
    until(lambda: not list(masters.glob("*")), "what a run that is over kept is deleted")


def training_metrics(round: runs_pb2.Round) -> dict[str, float]:
    """Without those of the evaluation, which takes whom it can get after a crash."""
    return {metric.name: metric.value for metric in round.metrics if metric.name.startswith("train.")}
