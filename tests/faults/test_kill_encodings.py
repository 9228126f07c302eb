"""kill -9 of both sides with encodings of every sort, in both directions: what is made again is made to the same bits.

FEDSTREAM_ALL_ENCODINGS=1 takes all of them, as nightly runs do; what differs between the others is no file, order or state.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest

from fed_core.codecs.registry import CODECS_OF
from fedstream.v1 import runs_pb2
from tests.faults.processes import Federation, digests, losses, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("encodings")]


class Case(NamedTuple):
    """A run's encodings and where its coordinator is killed; its site always is in training, and so encodes its update anew."""

    uplink: str
    downlink: str
    points: tuple[str, ...]
    site_point: str


# Fine enough for updates of several chunks.
FINE = "target_error = 1e-4"
SCAFFOLD = '{ kind = "scaffold", population = 1 }'
FEDDYN = '{ kind = "feddyn", strength = 0.1, population = 1 }'
CASES = {
    "raw": Case('{ kind = "raw" }', '{ kind = "raw" }', ("mid-upload:3", "before-commit"), "client-mid-upload:5"),
    "cast": Case('{ kind = "cast" }', '{ kind = "delta" }', ("mid-fold", "after-commit"), "client-spooled"),
    "uniform": Case(
        '{ kind = "uniform", bits = 4, block = 64, rounding = "stochastic" }',
        '{ kind = "delta", encoding = { kind = "uniform", rounding = "stochastic" } }',
        ("mid-upload:2", "before-commit"),
        "client-mid-assemble",
    ),
    "mask": Case('{ kind = "mask" }', '{ kind = "lattice" }', ("mid-upload:3", "mid-fold:2"), "client-mid-upload:4"),
    "fsq": Case(f'{{ kind = "fsq", {FINE} }}', '{ kind = "raw" }', ("mid-upload:2", "mid-fold:3"), "client-spooled"),
    "lrq": Case(
        f'{{ kind = "lrq", {FINE} }}',
        '{ kind = "lattice", step = 1.0 }',
        ("mid-fold", "after-commit"),
        "client-assembled",
    ),
    "sign": Case('{ kind = "sign" }', '{ kind = "lattice" }', ("mid-fold", "before-commit"), "client-spooled"),
    "ternary": Case(
        '{ kind = "ternary", fraction = 0.3 }',
        '{ kind = "lattice" }',
        ("update-durable", "after-commit"),
        "client-assembled",
    ),
    "topk": Case(
        '{ kind = "topk", fraction = 0.5, values = { kind = "raw" } }',
        '{ kind = "delta", encoding = { kind = "topk" } }',
        ("mid-upload:2", "mid-fold:2"),
        "client-mid-assemble",
    ),
    "randomk": Case(
        '{ kind = "randomk", fraction = 0.5, values = { kind = "raw" } }',
        '{ kind = "lattice" }',
        ("mid-upload:2", "before-commit"),
        "client-mid-upload:2",
    ),
    "eden": Case(
        '{ kind = "eden", bits = 4 }', '{ kind = "lattice" }', ("mid-fold:2", "before-commit"), "client-spooled"
    ),
    "ectcq": Case(
        f'{{ kind = "ectcq", {FINE} }}',
        '{ kind = "delta", encoding = { kind = "ectcq" } }',
        ("mid-upload:2", "after-commit"),
        "client-assembled",
    ),
    "powersgd": Case(
        '{ kind = "powersgd", rank = 8 }', '{ kind = "lattice" }', ("update-durable", "mid-fold"), "client-mid-download"
    ),
    "auto": Case(
        f'{{ kind = "auto", {FINE} }}', '{ kind = "delta" }', ("update-durable", "before-commit"), "client-mid-download"
    ),
}
# One of each sort: as it is, rounded at random, with a residual, with random numbers of its own, with a long search, mixed.
SORTS = ("raw", "uniform", "topk", "eden", "ectcq", "auto")


def test_every_encoding_is_among_them() -> None:
    assert set(CASES) == set(CODECS_OF)


@pytest.mark.parametrize("kind", CASES if os.environ.get("FEDSTREAM_ALL_ENCODINGS") else SORTS)
def test_whatever_the_encoding_kills_do_not_change_a_bit(federation: Federation, kind: str) -> None:
    coordinator, site, case = federation.coordinator, federation.sites[0], CASES[kind]
    encodings = {"uplink": case.uplink, "downlink": case.downlink}
    federation.submit(f"{kind}-well", site=site, rounds=2, **encodings)
    expected = federation.finished(f"{kind}-well")

    site.trouble("sleep 0.5")
    federation.submit(f"{kind}-killed", site=site, rounds=2, **encodings)
    federation.until_training(f"{kind}-killed", site)
    site.kill()
    site.trouble(None)
    coordinator.kill()
    coordinator.start(fail_at=case.points[0])
    site.start(fail_at=case.site_point)
    federation.until_all_killed(site, case.points[1:], ())
    report = federation.finished(f"{kind}-killed")

    assert digests(report) == digests(expected)
    assert losses(report) == losses(expected)
    assert [model.num_updates for model in report.models] == [0, 1, 1]
    codecs = {codec for round in report.rounds for client in round.clients for codec in client.fidelity.tensors}
    assert codecs <= CODECS_OF[kind] | {"raw"}
    assert codecs & CODECS_OF[kind] or kind == "raw"
    assert report.rounds[0].state == runs_pb2.ROUND_STATE_COMMITTED


@pytest.mark.timeout(900)
def test_a_site_that_carries_something_over_is_killed_around_every_promotion(federation: Federation) -> None:
    """What its code lost, and its variate. The coordinator is killed too: after it has counted an update and before the receipt
    leaves, and before what it keeps of all updates is committed."""
    coordinator, site = federation.coordinator, federation.sites[0]
    coarse, variate = {"uplink": '{ kind = "uniform", bits = 2, feedback = true }'}, {"objective": FEDDYN}
    federation.submit("carried-well", site=site, rounds=4, **coarse, **variate)
    expected = federation.finished("carried-well", 200)
    federation.submit("carried-none", site=site, rounds=2, uplink='{ kind = "uniform", bits = 2 }', **variate)
    without = digests(federation.finished("carried-none", 200))
    assert [without[version] == digests(expected)[version] for version in range(3)] == [True, True, False]

    points = ["client-carried", "client-spooled", "client-before-promotion:2", "client-promoted:2", "client-promoted"]
    site.stop()
    coordinator.kill()
    coordinator.start(fail_at="update-durable:2")
    site.start(fail_at=points[0])
    federation.submit("carried-killed", site=site, rounds=4, **coarse, **variate)

    federation.until_all_killed(site, ["before-commit"], points[1:], 600)
    report = federation.finished("carried-killed", 200)
    assert digests(report) == digests(expected)
    assert losses(report) == losses(expected)
    carried = site.state / "carried" / report.run.run_id
    left = ["", ".residual", ".variate"]
    until(lambda: sorted(path.suffix for path in carried.iterdir()) == left, "what the kills left is swept")


@pytest.mark.timeout(900)
def test_what_all_sites_have_in_common_is_committed_with_the_version_and_sent_with_it(federation: Federation) -> None:
    """The sums of SCAFFOLD at the coordinator, the variate on its way, and the site's own."""
    coordinator, site = federation.coordinator, federation.sites[0]
    settings = {"site": site, "rounds": 4, "uplink": '{ kind = "raw" }', "objective": SCAFFOLD}
    federation.submit("scaffold-well", **settings)
    expected = federation.finished("scaffold-well", 200)

    # One download in a round: the third is that of the second round's variate.
    site.stop()
    coordinator.kill()
    coordinator.start(fail_at="before-commit:2")
    site.start(fail_at="client-mid-download:3")
    federation.submit("scaffold-killed", **settings)

    federation.until_all_killed(site, ["mid-fold:2"], ["client-promoted"], 600)
    report = federation.finished("scaffold-killed", 200)
    assert digests(report) == digests(expected)
    assert len(set(digests(report))) == 5
    masters = coordinator.data / "masters" / report.run.run_id
    until(lambda: not list(masters.glob("*")), "what a run that is over kept is deleted")
