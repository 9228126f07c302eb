"""One federation for all tests of this folder that a worker runs: its trainer processes take seconds to import torch, so they are
shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedstream.v1 import runs_pb2
from tests.faults.processes import Coordinator, Federation, Site


@pytest.fixture(scope="session")
def shared_federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("faults")
    coordinator = Coordinator(folder / "coordinator")
    sites = [Site(f"site-{letter}", folder / letter, coordinator, seed) for seed, letter in enumerate("abc")]
    federation = Federation(coordinator, sites)
    try:
        yield federation
    finally:
        federation.stop()


@pytest.fixture
def federation(shared_federation: Federation) -> Federation:
    """A coordinator and three sites; whatever a test did to them, the next one finds them healthy and idle."""
    shared_federation.start()
    return shared_federation


@pytest.fixture(scope="session")
def undisturbed(shared_federation: Federation) -> runs_pb2.GetReportResponse:
    """The report of a run of three rounds that nothing happened to."""
    shared_federation.start()
    shared_federation.submit("undisturbed", rounds=3, evaluation="clients")
    return shared_federation.finished("undisturbed")
