"""Leases and progress, by the monotonic clock that they are given."""

from __future__ import annotations

from fed_server.rounds.membership import Membership, Progress

OFFER = {"echo": "1"}


def test_a_client_is_alive_for_a_lease_after_its_last_call() -> None:
    members = Membership(lease_seconds=30, started=0)
    assert not members.is_alive("a", 1)
    assert members.silent_seconds("a", 7) == 7  # never heard of: since the start
    members.announce("a", 10, {}, OFFER)
    assert members.is_alive("a", 40)
    assert not members.is_alive("a", 40.5)
    members.renew("a", 40)
    assert members.is_alive("a", 70)
    assert members.silent_seconds("a", 52) == 12
    presence = members.presence("a")
    assert presence is not None
    assert presence.workloads == OFFER  # a progress report does not repeat the offer


def test_news_is_a_newcomer_a_return_or_another_offer() -> None:
    members = Membership(lease_seconds=30, started=0)
    assert members.announce("a", 0, {}, OFFER)
    assert not members.announce("a", 30, {}, OFFER)
    assert members.announce("a", 31, {"region": "north"}, OFFER)
    assert members.announce("a", 32, {"region": "north"}, {"echo": "2"})
    assert members.announce("a", 63, {"region": "north"}, {"echo": "2"})


def test_the_time_left_follows_the_pace_of_the_phase() -> None:
    members = Membership(lease_seconds=30, started=0)
    members.report("x", 100, "training", 50, 200)
    assert first(members).eta_seconds() == -1  # one report has no pace
    members.report("x", 110, "training", 100, 200)
    assert first(members).eta_seconds() == 20
    members.report("x", 120, "uploading", 0, 10)
    assert first(members).eta_seconds() == -1  # another phase begins anew
    members.report("x", 121, "uploading", 5, 0)
    assert first(members).eta_seconds() == -1  # the total is unknown


def test_metrics_stay_until_others_come_and_go_with_the_assignment() -> None:
    members = Membership(lease_seconds=30, started=0)
    members.report("x", 0, "training", 1, 9, {"loss": 0.5})
    members.report("x", 1, "training", 2, 9)
    assert first(members).metrics == {"loss": 0.5}
    members.forget("x")
    members.forget("x")
    assert members.progress("x") is None


def first(members: Membership) -> Progress:
    """The progress of assignment "x", which there is."""
    progress = members.progress("x")
    assert progress is not None
    return progress
