"""Starting, stopping and stalling: signals, locks, ports and addresses."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fedstream.v1 import runs_pb2
from tests.faults.processes import BIN, Coordinator, Federation, digests, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200), pytest.mark.xdist_group("faults")]


def test_asked_to_stop_both_sides_end_at_once_and_go_on_after_a_restart(
    federation: Federation, undisturbed: runs_pb2.GetReportResponse
) -> None:
    coordinator, site = federation.coordinator, federation.sites[1]
    site.trouble("sleep 1")
    federation.submit("stopped", rounds=2)
    federation.until_training("stopped", site)
    site.stop(signal.SIGTERM)
    coordinator.stop(signal.SIGINT)
    site.trouble(None)
    site.start()
    coordinator.start()
    report = federation.finished("stopped")

    assert digests(report) == digests(undisturbed)[:3]


def test_a_killed_daemon_leaves_no_trainer_behind(federation: Federation) -> None:
    site = federation.sites[1]
    until(lambda: len(site.remains()) == 2, "the daemon has a trainer")
    site.kill()

    assert site.remains() == []


def test_a_daemon_that_hangs_is_missed_by_name_and_its_late_work_is_dropped(federation: Federation) -> None:
    site = federation.sites[2]
    site.trouble("sleep 0.5")
    federation.submit("stalled", quorum=2)
    federation.until_training("stalled", site)
    site.process.send_signal(signal.SIGSTOP)
    site.trouble(None)
    report = federation.finished("stalled")
    site.process.send_signal(signal.SIGCONT)

    assert report.models[1].num_updates == 2
    assert "2 of 3 updates, and the rest is gone: site-c (not heard of for" in report.rounds[0].reason
    until(lambda: site.events("dropped", run=report.run.run_id), "the late work is dropped")
    until(lambda: not site.spooled(), "the spool is empty")
    federation.submit("stall-is-over")
    assert federation.finished("stall-is-over").models[1].num_updates == 3


def test_a_second_daemon_on_the_same_state_directory_is_refused(federation: Federation) -> None:
    site = federation.sites[1]
    lock, pid = site.state / "lock", str(site.process.pid)
    until(lambda: lock.exists() and lock.read_text().strip() == pid, "the first one holds the lock")
    second = subprocess.run(site.command(), capture_output=True, text=True, timeout=60, check=False)

    assert second.returncode == 75
    assert f"another fed-client (process {pid}) runs on {site.state}" in second.stderr


def test_a_second_coordinator_is_refused_its_data_directory_and_its_port(
    federation: Federation, tmp_path: Path
) -> None:
    first = federation.coordinator
    same_data = Coordinator(tmp_path / "same-data")
    same_data.data = first.data
    same_port = Coordinator(tmp_path / "same-port", listen=first.address)
    seconds = [same_data, same_port]
    for each in seconds:
        each.spawn(str(BIN / "fed-server"), "run", "--data-dir", str(each.data), "--listen", each.address)
    for each in seconds:
        until(lambda each=each: not each.is_running, f"{each.folder.name} is refused")

    assert [each.process.returncode for each in seconds] == [69, 78]
    assert f"in use by process {first.process.pid}" in same_data.tail()
    assert "the port is in use" in same_port.tail()
    assert first.operator.call("ListRuns", runs_pb2.ListRunsRequest()) is not None


def test_a_wrong_address_is_explained(federation: Federation, tmp_path: Path) -> None:
    with_wait = ["--wait", "0.5", "--server", "127.0.0.1:9", "--join-token", "x", "--state-dir", str(tmp_path / "s")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FED")}
    enroll = subprocess.run(
        [str(BIN / "fed-client"), "enroll", *with_wait],
        capture_output=True, text=True, timeout=60, check=False, env=environment,
    )  # fmt: skip

    assert enroll.returncode == 69
    assert "127.0.0.1:9 does not answer" in enroll.stderr
    assert "fed-client doctor" in enroll.stderr
