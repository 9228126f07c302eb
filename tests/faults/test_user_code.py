"""Workloads that misbehave: the coordinator learns what happened, the daemon lives and takes the next round."""

from __future__ import annotations

import pytest

from fedstream.v1 import runs_pb2
from tests.faults.processes import Federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200), pytest.mark.xdist_group("faults")]


def test_code_that_raises_is_a_failure_with_its_traceback(federation: Federation) -> None:
    site = federation.sites[0]
    site.trouble("raise")
    federation.submit("raises", site=site)
    report = federation.over("raises")

    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    [client] = report.rounds[0].clients
    sentence, _, traceback = client.reason.partition("\n")
    assert sentence == "WORKLOAD: RuntimeError: the scanner of ward 7 sent no images"
    assert "workload.py" in traceback
    assert "in training_step" in traceback
    _works_again(federation, "after-raise")


def test_code_that_ends_the_process_is_a_failure_with_its_exit_status(federation: Federation) -> None:
    site = federation.sites[0]
    site.trouble("exit")
    federation.submit("exits", site=site)
    report = federation.over("exits")

    [client] = report.rounds[0].clients
    assert client.reason.startswith("TRAINER_DIED: ")
    assert "exited with status 3" in client.reason
    _works_again(federation, "after-exit")


def test_code_that_eats_its_time_sends_what_it_has_at_the_time_budget(federation: Federation) -> None:
    site = federation.sites[0]
    site.trouble("sleep 0.3")
    federation.submit("slow", site=site, steps=100, budget=1)
    report = federation.finished("slow")

    [client] = report.rounds[0].clients
    assert client.is_partial
    assert 1 <= client.num_steps <= 4
    assert client.num_examples == 16 * client.num_steps
    assert report.models[1].num_updates == 1


def test_code_that_hangs_misses_the_deadline_by_name_and_is_ended(federation: Federation) -> None:
    site, others = federation.sites[0], federation.sites[1:]
    site.trouble("hang")
    federation.submit("hangs", quorum=2, deadline=12)
    report = federation.finished("hangs")

    assert report.models[1].num_updates == len(others)
    assert report.rounds[0].reason.startswith("2 of 3 updates at the deadline of 12 s; missing: site-a (training")
    _works_again(federation, "after-hang")


def _works_again(federation: Federation, name: str) -> None:
    site = federation.sites[0]
    assert site.is_running
    site.trouble(None)
    federation.submit(name, site=site)
    assert federation.finished(name).models[1].num_updates == 1
