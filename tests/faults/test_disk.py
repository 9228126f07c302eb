"""Full disks, on file systems of a few megabytes: named at once, nothing lost, and over when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fed_core.errors import DiskFullError
from fedstream.v1 import runs_pb2
from tests.faults.processes import Coordinator, Federation, Site, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200), pytest.mark.xdist_group("faults")]

MIB = 2**20


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator and one site, each on a disk of its own that holds little more than what a run needs."""
    if os.geteuid() != 0:
        pytest.skip("small file systems need root")
    folder = tmp_path_factory.mktemp("disk")
    coordinator = Coordinator(folder / "coordinator")
    site = Site("site-a", folder / "site", coordinator, 0)
    federation = Federation(coordinator, [site])
    with _mounted(coordinator.data, 256 * MIB), _mounted(site.state, 48 * MIB):
        try:
            yield federation
        finally:
            federation.stop()


@pytest.fixture
def federation(cramped: Federation) -> Federation:
    cramped.start()
    return cramped


def test_a_run_that_the_coordinator_has_no_room_for_is_refused_at_once(federation: Federation) -> None:
    with _full(federation.coordinator.data, leave=40 * MIB), pytest.raises(DiskFullError, match=r"needs 84\.6 MB"):
        federation.submit("large")


@pytest.mark.parametrize("leave", [0, 4 * MIB], ids=["not a byte", "too little"])
def test_without_room_for_the_update_at_the_coordinator_it_waits_at_the_site(
    federation: Federation, leave: int
) -> None:
    coordinator, site = federation.coordinator, federation.sites[0]
    name = f"coordinator-full-{leave // MIB}"
    site.trouble("sleep 1")
    # Whole, or it would fit into what is left.
    federation.submit(name, rounds=2, uplink='{ kind = "raw" }')
    run_id = federation.run_id(name)
    federation.until_training(name, site)
    with _full(coordinator.data, leave):
        site.trouble(None)
        retries = until(
            lambda: site.events("coordinator not available, trying again", run=run_id), "the upload is refused"
        )
        assert f"free in {coordinator.data}: free some" in retries[0]["error"]
        assert federation.report(name).run.state == runs_pb2.RUN_STATE_ACTIVE
        assert len(site.spooled()) == 1
    report = federation.finished(name)

    assert [model.num_updates for model in report.models] == [0, 1, 1]
    assert [event["round"] for event in site.events("trained", run=run_id)] == [1, 2]


def test_without_room_for_the_next_version_the_coordinator_waits_and_says_so(federation: Federation) -> None:
    coordinator, site = federation.coordinator, federation.sites[0]
    site.trouble("sleep 1")
    federation.submit("no-version", rounds=2)
    federation.until_training("no-version", site)
    with _full(coordinator.data, leave=12 * MIB):
        site.trouble(None)
        until(lambda: "no space left" in federation.report("no-version").run.reason, "the run says what it waits for")
        assert site.spooled() == [], "the update is acknowledged"
    report = federation.finished("no-version")

    assert [model.num_updates for model in report.models] == [0, 1, 1]
    assert [event["round"] for event in site.events("trained", run=report.run.run_id)] == [1, 2]


@pytest.mark.parametrize("leave", [4 * MIB, 12 * MIB], ids=["for the model", "for the update"])
def test_a_full_disk_at_a_site_is_reported_by_it(federation: Federation, leave: int) -> None:
    site = federation.sites[0]
    name = f"site-full-{leave // MIB}"
    with _full(site.state, leave=leave):
        federation.submit(name, uplink='{ kind = "raw" }')
        report = federation.over(name)
        assert "failed: site-a (DISK_FULL: " in report.run.reason
        assert str(site.state) in report.run.reason
        assert site.spooled() == []
        assert site.is_running
    federation.submit(f"{name}-over")
    assert federation.finished(f"{name}-over").models[1].num_updates == 1


@contextmanager
def _mounted(folder: Path, num_bytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=0700", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"small file systems cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _full(folder: Path, leave: int) -> Iterator[None]:
    """Leaves so many bytes free."""
    ballast = folder / "lost+found"  # a name that no directory of ours minds
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - leave, 1))
    try:
        yield
    finally:
        ballast.unlink()
