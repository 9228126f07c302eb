"""Every rule of the round, without a clock or a socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_server.rounds.decide import Member, RoundView, Verdict, decide, decide_evaluation
from fed_server.store.base import AssignmentState

OPEN, RECEIVED, FAILED = AssignmentState.OPEN, AssignmentState.RECEIVED, AssignmentState.FAILED


def view(*members: Member, elapsed: float = 0, deadline: float = 100, goal: int = 3, quorum: int = 2) -> RoundView:
    return RoundView(elapsed, deadline, goal, quorum, members)


def member(name: str, state: AssignmentState, *, is_alive: bool = True, reason: str = "") -> Member:
    return Member(name, state, is_alive, 0 if is_alive else 45, reason=reason)


def test_a_round_closes_when_its_goal_is_reached() -> None:
    decision = decide(view(*(member(n, RECEIVED) for n in "abc"), member("d", OPEN)))
    assert decision.verdict is Verdict.CLOSE
    assert decision.reason == "goal reached: 3 of 3 updates"


def test_a_round_waits_and_says_for_whom() -> None:
    decision = decide(view(member("a", RECEIVED), Member("b", OPEN, doing="training 40 %"), member("c", OPEN)))
    assert decision.verdict is Verdict.WAIT
    assert decision.reason == "1 of 3 updates; waiting for b (training 40 %), c"


def test_at_the_deadline_a_quorum_closes_the_round_and_the_missing_are_named() -> None:
    members = [member("a", RECEIVED), member("b", RECEIVED), member("c", OPEN, is_alive=False)]
    decision = decide(view(*members, elapsed=100, goal=3, quorum=2))
    assert decision.verdict is Verdict.CLOSE
    assert "c (not heard of for 45 s)" in decision.reason


def test_at_the_deadline_less_than_a_quorum_fails_the_round() -> None:
    decision = decide(view(member("a", RECEIVED), member("b", OPEN), member("c", OPEN), elapsed=100))
    assert decision.verdict is Verdict.FAIL
    assert decision.reason == "1 of 3 updates at the deadline of 100 s; missing: b, c"


def test_without_a_deadline_a_round_waits_for_ever() -> None:
    assert decide(view(member("a", OPEN), member("b", OPEN), elapsed=1e9, deadline=0)).verdict is Verdict.WAIT


def test_failures_that_put_the_quorum_out_of_reach_fail_the_round_at_once() -> None:
    members = [
        member("a", FAILED, reason="WORKLOAD: ZeroDivisionError"),
        member("b", FAILED, reason="x"),
        member("c", OPEN),
    ]
    decision = decide(view(*members))
    assert decision.verdict is Verdict.FAIL
    assert "a (WORKLOAD: ZeroDivisionError)" in decision.reason


def test_a_round_does_not_wait_for_clients_that_are_gone_once_it_has_a_quorum() -> None:
    members = [member("a", RECEIVED), member("b", RECEIVED), member("c", OPEN, is_alive=False)]
    assert decide(view(*members)).verdict is Verdict.CLOSE
    assert decide(view(members[0], members[2], member("d", OPEN, is_alive=False))).verdict is Verdict.WAIT


@given(
    st.lists(st.sampled_from([OPEN, RECEIVED, FAILED]), min_size=1, max_size=6),
    st.integers(1, 6),
    st.floats(0, 200),
    st.data(),
)
def test_a_round_that_closes_always_has_its_quorum(
    states: list[AssignmentState], goal: int, elapsed: float, data: st.DataObject
) -> None:
    quorum = data.draw(st.integers(1, goal))
    alive = data.draw(st.lists(st.booleans(), min_size=len(states), max_size=len(states)))
    members = [member(str(i), s, is_alive=a) for i, (s, a) in enumerate(zip(states, alive, strict=True))]
    decision = decide(view(*members, elapsed=elapsed, goal=goal, quorum=quorum))
    assert decision.reason
    if decision.verdict is Verdict.CLOSE:
        assert states.count(RECEIVED) >= quorum
    if elapsed >= 100:
        assert decision.verdict is not Verdict.WAIT


@pytest.mark.parametrize(("alive", "verdict"), [(True, Verdict.WAIT), (False, Verdict.CLOSE)])
def test_an_evaluation_waits_only_for_those_who_are_there(alive: bool, verdict: Verdict) -> None:
    assert decide_evaluation(view(member("a", RECEIVED), member("b", OPEN, is_alive=alive))).verdict is verdict
