"""kill -9 of a daemon: what it trained is not trained again, what it sent is not sent again, and without it the round goes on."""

from __future__ import annotations

import pytest

from fedstream.v1 import runs_pb2
from tests.faults.processes import Federation, digests, losses, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("faults")]

MIB = 2**20


def test_killed_at_every_step_a_client_goes_on_where_it_was(
    federation: Federation, undisturbed: runs_pb2.GetReportResponse
) -> None:
    site = federation.sites[2]
    site.stop()
    site.start(fail_at="client-mid-download")
    federation.submit("client-killed")
    site.wait_killed()
    site.start(fail_at="client-mid-assemble")
    site.wait_killed()
    site.start(fail_at="client-assembled")
    site.wait_killed()
    site.trouble("sleep 0.5")
    site.start()
    federation.until_training("client-killed", site)
    site.kill()
    site.trouble(None)
    site.start(fail_at="client-spooled")
    site.wait_killed()
    run_id = federation.run_id("client-killed")
    taken = len(site.events("assignment taken", run=run_id))
    site.start(fail_at="client-mid-upload")
    site.wait_killed()
    site.start()
    report = federation.finished("client-killed")

    assert digests(report) == digests(undisturbed)[:2]
    assert report.models[1].num_updates == 3
    assert taken == 5
    assert len(site.events("assignment taken", run=run_id)) == taken, "neither restart trained again"
    downlink = member(report, site.name).downlink
    assert downlink.wire_bytes < 3 * downlink.payload_bytes, "nor fetched again what had arrived"


def test_without_a_killed_client_the_round_closes_by_quorum_and_names_it(federation: Federation) -> None:
    site = federation.sites[2]
    until(lambda: site.events("nothing to do"), "the site is there")
    idle = len(site.events("nothing to do"))
    site.stop()
    site.start(fail_at="client-mid-upload")
    until(lambda: len(site.events("nothing to do")) > idle, "the site is back")  # or the round would do without it
    federation.submit("client-gone", quorum=2)
    site.wait_killed()
    report = federation.finished("client-gone")

    assert report.models[1].num_updates == 2
    assert f"missing: {site.name}" in report.rounds[0].reason or f"gone: {site.name}" in report.rounds[0].reason
    assert len(site.spooled()) == 1
    site.start()
    until(lambda: site.events("dropped", run=report.run.run_id), "the late update is dropped")
    until(lambda: not site.spooled(), "the spool is empty")
    federation.submit("client-back")
    assert federation.finished("client-back").models[1].num_updates == 3


def test_both_killed_in_mid_upload_go_on_from_the_last_verified_segment(federation: Federation) -> None:
    coordinator, site = federation.coordinator, federation.sites[2]
    coarse = {"uplink": '{ kind = "cast" }'}  # several chunks, which the default would send as one
    federation.submit("both-well", **coarse)
    expected = federation.finished("both-well")
    site.stop()
    site.start(fail_at="client-mid-upload:6")
    federation.submit("both-killed", **coarse)
    site.wait_killed()
    [spooled] = site.spooled()
    until(lambda: _received(federation, "both-killed") == 2, "the others deliver")
    coordinator.kill()
    arrived = (coordinator.data / "uploads" / f"{spooled.stem}.part").stat().st_size
    coordinator.start()
    site.start()
    report = federation.finished("both-killed")

    assert digests(report) == digests(expected)
    assert losses(report) == losses(expected)
    assert arrived > MIB
    # The counter died with the coordinator: it shows what came after.
    uplink = member(report, site.name).uplink
    assert uplink.wire_bytes < uplink.payload_bytes - arrived + 2 * MIB
    assert not site.events("trained", run=report.run.run_id)[1:]


def test_a_spool_that_rotted_is_reported_and_not_retried_for_ever(federation: Federation) -> None:
    site = federation.sites[2]
    site.stop()
    site.start(fail_at="client-mid-upload")
    federation.submit("rot")
    site.wait_killed()
    [spooled] = site.spooled()
    with spooled.open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    site.start()
    report = federation.over("rot")

    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    assert "SPOOL_CORRUPT: the spooled update no longer verifies" in report.run.reason
    assert site.name in report.run.reason
    assert until(lambda: not site.spooled(), "the spool is empty")


def member(report: runs_pb2.GetReportResponse, name: str) -> runs_pb2.RoundClient:
    [client] = [client for client in report.rounds[0].clients if client.client_name == name]
    return client


def _received(federation: Federation, run: str) -> int:
    return sum(
        client.state == runs_pb2.ASSIGNMENT_STATE_RECEIVED for client in federation.report(run).rounds[0].clients
    )
