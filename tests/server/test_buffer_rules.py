"""Which buffer an update falls into, when one is full, and who is asked next: rules that look at values only."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_server.config import BufferedConfig
from fed_server.rounds.buffered import (
    BufferView,
    Opening,
    Place,
    decide_buffer,
    first_opening,
    place_of,
    select_next,
    staleness_metrics,
    staleness_notice,
    too_stale,
    widest,
)
from fed_server.rounds.cohort import Candidates, Selection, Turns
from fed_server.rounds.decide import Member, Verdict
from fed_server.store.base import AssignmentState, RoundRecord, RoundState

ROUND = RoundRecord(
    run_id="r", round=5, state=RoundState.TRAINING, reason="", base_version=4, created_time=0.0, goal=2, quorum=2
)


# Places


@pytest.mark.parametrize(
    ("round", "opening"),
    [
        (ROUND, Opening(5, 4)),
        (replace(ROUND, state=RoundState.AGGREGATING), Opening(6, 5)),
        (replace(ROUND, state=RoundState.EVALUATING, model_version=5), Opening(6, 5)),
        (None, Opening(6, 5)),
    ],
    ids=["open", "version-is-made", "version-is-evaluated", "between"],
)
def test_an_update_falls_into_the_buffer_that_is_open_or_the_next_one(
    round: RoundRecord | None, opening: Opening
) -> None:
    is_committed = round is None or round.state is RoundState.EVALUATING
    assert first_opening(round, 6, 5 if is_committed else 4) == opening


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=30), st.integers(0, 3))
def test_every_buffer_takes_just_as_many_as_it_needs(size: int, began_with: list[int], already_in: int) -> None:
    opening = Opening(11, 10)
    num_in = {11: min(already_in, size)}
    places = []
    for model_version in began_with:
        place = place_of(model_version, opening, num_in, size)
        assert place.position == num_in.get(place.buffer, 0) < size
        assert place.staleness == 10 + (place.buffer - 11) - model_version
        num_in[place.buffer] = num_in.get(place.buffer, 0) + 1
        places.append(place)
    assert [p.buffer for p in places] == sorted(p.buffer for p in places)
    assert len({(p.buffer, p.position) for p in places}) == len(places)
    assert all(count == size for buffer, count in num_in.items() if buffer < max(num_in))


def test_what_is_too_late_is_told_so_by_name() -> None:
    assert too_stale(3, 3) == ""
    assert too_stale(4, 3) == "4 versions were committed since, more than rounds.max_staleness = 3"
    assert place_of(7, Opening(8, 7), {}, 1) == Place(8, 0, 0)


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(-50, 0)),
    st.dictionaries(st.sampled_from("abc"), st.integers(-50, 0)),
)
def test_a_grid_never_becomes_finer(grid: dict[str, int], before: dict[str, int]) -> None:
    wider = widest(grid, before)
    assert wider.keys() == grid.keys()
    assert all(wider[name] in (grid[name], before.get(name)) for name in grid)
    assert all(wider[name] >= grid[name] and wider[name] >= before.get(name, -99) for name in grid)


def test_staleness_is_reported_by_its_mean_and_its_most() -> None:
    assert staleness_metrics([0, 1, 5]) == {"staleness.mean": 2.0, "staleness.max": 5.0}
    assert staleness_metrics([]) == {}
    assert staleness_notice(BufferedConfig(concurrency=1, max_staleness=2)) == (
        "an update that is 0, 1, 2 versions late counts 1, 0.707, 0.577; one that is more than 2 late is refused"
    )


# Decisions


def member(
    name: str, state: AssignmentState = AssignmentState.OPEN, *, is_alive: bool = True, reason: str = ""
) -> Member:
    return Member(name, state, is_alive=is_alive, silent_seconds=40.0, reason=reason)


FAILED = [member("c", AssignmentState.FAILED, reason="no disk")]
NOBODY = Selection((), "every client is at work or has failed", is_exhausted=True)
VIEW = BufferView(
    goal=3, quorum=2, staleness=[0, 2], at_work=[member("a")], failed=[], asking=Selection((), "enough are at work")
)


def decided(**changes: object) -> tuple[Verdict, str]:
    decision = decide_buffer(replace(VIEW, **changes))  # type: ignore[arg-type]
    return decision.verdict, decision.reason


def test_a_buffer_waits_until_it_is_full() -> None:
    assert decided() == (Verdict.WAIT, "2 of 3 updates; waiting for a")
    assert decided(staleness=[0, 2, 4]) == (
        Verdict.CLOSE,
        "buffer full: 3 of 3 updates; staleness 2 on average, 4 at most",
    )


def test_a_buffer_waits_for_the_silent_as_long_as_they_have_time() -> None:
    silent = [member("a", is_alive=False)]
    assert decided(at_work=silent, asking=NOBODY) == (
        Verdict.WAIT,
        "2 of 3 updates; waiting for a (not heard of for 40 s)",
    )


def test_a_buffer_waits_for_clients_that_are_elsewhere() -> None:
    asking = Selection((), "waiting for b, at work for another run", waits_for_busy=True)
    assert decided(at_work=[], asking=asking) == (
        Verdict.WAIT,
        "2 of 3 updates; waiting for b, at work for another run",
    )


def test_with_nobody_left_to_ask_a_quorum_is_enough_and_less_fails_by_name() -> None:
    assert decided(at_work=[], asking=NOBODY, failed=FAILED) == (
        Verdict.CLOSE,
        "nobody left to ask: 2 of 3 updates, failed: c (no disk)",
    )
    assert decided(at_work=[], asking=NOBODY, failed=FAILED, staleness=[1]) == (
        Verdict.FAIL,
        "nobody left to ask: 1 of 3 updates, failed: c (no disk)",
    )


# Who is next


def asked_next(candidates: Candidates, **changes: object) -> Selection:
    given = {
        "seed": 7, "round": 3, "count": 1, "min_clients": 2, "is_settling": False, "selection": "random", "turns": {},
        "at_work": ["x"], "asked": {}, "failed": [],
    }  # fmt: skip
    return select_next(candidates, **(given | changes))  # type: ignore[arg-type]


ABC = Candidates(frozenset("abc"))


def test_who_was_asked_least_in_this_round_is_next() -> None:
    assert asked_next(ABC, asked={"a": 1, "b": 1}).cohort == ("c",)
    assert set(asked_next(ABC, asked={"a": 2, "b": 1}, count=2).cohort) == {"b", "c"}
    assert set(asked_next(ABC, asked={"a": 2}, count=9).cohort) == {"a", "b", "c"}
    assert asked_next(ABC, asked={"a": 1, "b": 1}).reason == "asked c"


def test_the_draw_follows_from_seed_and_round() -> None:
    assert asked_next(ABC) == asked_next(ABC)
    assert len({asked_next(ABC, round=round).cohort for round in range(20)}) == 3


def test_round_robin_asks_who_was_asked_longest_ago() -> None:
    turns = {"a": Turns(2, 1), "b": Turns(1, 1), "c": Turns(2, 1)}
    assert asked_next(ABC, selection="round_robin", turns=turns).cohort == ("b",)


def test_nobody_is_asked_who_is_busy_owed_to_another_run_or_has_failed_for_this_buffer() -> None:
    candidates = Candidates(frozenset("abcd"), busy=frozenset("a"), reserved=frozenset("b"))
    assert asked_next(candidates, failed=["c"], count=9).cohort == ("d",)
    waiting = asked_next(candidates, failed=["c", "d"])
    assert (waiting.cohort, waiting.reason, waiting.waits_for_busy) == (
        (),
        "waiting for a, b, at work for another run",
        True,
    )


def test_the_first_buffer_waits_for_enough_clients_and_later_ones_only_when_nobody_is_at_work() -> None:
    alone = Candidates(frozenset("a"), unlike=(("z", "has no workload"),))
    assert asked_next(alone).cohort == ("a",)
    assert "waiting for 2 clients" in asked_next(alone, at_work=[]).reason
    assert "; z has no workload" in asked_next(alone, at_work=[]).reason
    settling = asked_next(replace(ABC, expected=frozenset("d")), at_work=[], is_settling=True)
    assert settling.reason == "waiting for d to call again after the coordinator's start"
    assert not settling.is_exhausted


def test_only_where_all_have_failed_is_there_nobody_left() -> None:
    assert asked_next(ABC, at_work=[], failed="abc").is_exhausted
    assert not asked_next(ABC, at_work=["a"], failed="bc", round=1).is_exhausted
    assert not asked_next(Candidates(frozenset()), at_work=[], failed="abc").is_exhausted
    assert not asked_next(replace(ABC, busy=frozenset("a")), at_work=[], failed="bc").is_exhausted
