"""kill -9 of a site that protects its data by itself: one charge for each update, and one update for each charge."""

from __future__ import annotations

import json

import pytest

from fed_client.privacy import Charge, PrivacyLedger
from fedstream.v1 import common_pb2, runs_pb2
from tests.faults.processes import Federation, Site, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("site-privacy")]


def local(population: str, max_epsilon: float = 1e6) -> str:
    return (
        '{ kind = "local", clipping_norm = 1.0, noise_multiplier = 4.0, delta = 0.01, '
        f'population = "{population}", max_epsilon = {max_epsilon} }}'
    )


# In coarse pieces, so that an upload can be cut in the middle.
UNIFORM = {"aggregation": '{ kind = "mean", weighting = "uniform" }', "uplink": '{ kind = "cast" }'}


def restart(site: Site, fail_at: str) -> None:
    """Starts it again, to die there."""
    until(lambda: site.events("nothing to do"), "the site is there")
    site.stop()
    site.start(fail_at=fail_at)


def charges(site: Site, population: str) -> list[Charge]:
    found = PrivacyLedger(site.state / "privacy.json").charges()
    return [charge for charge in found if charge.population == population]


def spooled_digest(site: Site) -> str:
    [record] = (site.state / "spool").glob("*.json")
    digest: str = json.loads(record.read_text())["digest"]
    return digest


def test_killed_at_every_step_a_site_pays_once_for_the_one_update_that_leaves(federation: Federation) -> None:
    site, name = federation.sites[2], "site-killed"
    restart(site, "client-assembled")
    federation.submit(name, privacy=local(name), **UNIFORM)
    site.wait_killed()
    assert charges(site, name) == [], "nothing was read yet"

    site.start(fail_at="client-charged")
    site.wait_killed()
    [charged] = charges(site, name)
    assert charged.update == ""
    assert not site.spooled(), "charged, and nothing made of it"

    site.start(fail_at="client-spooled")
    site.wait_killed()
    assert charges(site, name) == [charged], "the training is paid for; what it made has not left"

    site.start(fail_at="client-sending")
    site.wait_killed()
    [sending] = charges(site, name)
    assert sending.update == spooled_digest(site)
    [member] = [c for c in federation.report(name).rounds[0].clients if c.client_name == site.name]
    assert member.uplink.wire_bytes == 0, "put down before the first byte of it leaves"

    site.start(fail_at="client-mid-upload")
    site.wait_killed()
    assert charges(site, name) == [sending]
    assert spooled_digest(site) == sending.update

    site.start()
    report = federation.finished(name)
    assert report.models[1].num_updates == 3
    assert charges(site, name) == [sending]
    [uploaded] = site.events("uploaded", run=report.run.run_id)
    assert uploaded["assignment"] == sending.assignment_id
    for other in federation.sites[:2]:
        assert len(charges(other, name)) == 1


def test_killed_at_the_charge_a_site_still_stops_at_its_budget(federation: Federation) -> None:
    """One round is paid for, and a crash between charge and update does not make it two, or none."""
    site, name = federation.sites[2], "site-budget"
    restart(site, "client-charged")
    # Noise of two sensitivities a round: epsilon 1.0 for one, 1.5 for two.
    federation.submit(name, rounds=3, privacy=local(name, 1.25), **UNIFORM)
    site.wait_killed()
    site.start()
    report = federation.over(name)
    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    assert report.run.model_version == 1
    assert "above the run's limit of epsilon 1.25" in report.run.reason
    assert len(charges(site, name)) == 1


def test_where_the_update_is_lost_after_it_may_have_left_no_other_one_follows(federation: Federation) -> None:
    site, name = federation.sites[2], "site-lost"
    restart(site, "client-mid-upload")
    federation.submit(name, privacy=local(name), **UNIFORM)
    site.wait_killed()
    [sending] = charges(site, name)
    for path in (site.state / "spool").iterdir():
        path.unlink()
    site.start()
    report = federation.over(name)
    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    assert f"an update of assignment {sending.assignment_id} may have left this site before" in report.run.reason
    assert charges(site, name) == [sending]
    assert len(site.events("trained", run=report.run.run_id)) == 1


def test_with_an_account_that_cannot_be_read_a_site_does_nothing(federation: Federation) -> None:
    site, name = federation.sites[2], "site-damaged"
    path = site.state / "privacy.json"
    until(lambda: site.events("nothing to do"), "the site is there")
    site.stop()
    whole = path.read_bytes() if path.exists() else None
    path.write_bytes(b'{"digest": "')
    try:
        site.start()
        federation.submit(name, privacy=local(name), **UNIFORM)
        report = federation.over(name)
        assert report.run.state == runs_pb2.RUN_STATE_FAILED
        assert "what was spent is not known, so nothing more is; restore it from a backup" in report.run.reason
        assert not site.events("trained", run=report.run.run_id)
        assert path.read_bytes() == b'{"digest": "'
    finally:
        site.stop()
        path.unlink()
        if whole is not None:
            path.write_bytes(whole)


def test_a_model_that_mixes_examples_fails_the_run_by_name_with_the_cure(federation: Federation) -> None:
    privacy = '{ kind = "examples", clipping_norm = 1.0, noise_multiplier = 1.0, delta = 0.001, population = "mixed" }'
    federation.submit("mixed", site=federation.sites[0], privacy=privacy, **UNIFORM)
    report = federation.over("mixed")
    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    assert "norm (BatchNorm1d): use GroupNorm or LayerNorm, which do not mix examples" in report.run.reason


def test_while_it_trains_a_site_says_that_and_no_more(federation: Federation) -> None:
    """Steps would tell how much data there is, and losses what is in it."""
    seen = {}
    for name, privacy in (("said", ""), ("unsaid", local("unsaid"))):
        for site in federation.sites:
            site.trouble("sleep 0.5")
        federation.submit(name, privacy=privacy, **UNIFORM)
        training = []
        while federation.report(name).run.state == runs_pb2.RUN_STATE_ACTIVE:
            now = federation.assignment(name, federation.sites[0])
            if now is not None and now.phase == common_pb2.WORK_PHASE_TRAINING:
                training.append((now.done, now.total))
        assert training
        seen[name] = max(training)
        report = federation.finished(name)
        # All of them say so of their data: 64 examples, 4 steps.
        member = next(client for client in report.rounds[0].clients)
        assert (member.num_examples, member.num_steps) == ((64, 4) if name == "said" else (1, 0))
    assert seen["said"][1] == 4
    assert seen["unsaid"] == (0, 0)
