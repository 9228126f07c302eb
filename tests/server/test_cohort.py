"""Who is chosen, and the sentence when nobody is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fed_server.rounds.cohort import (
    Candidates,
    Selection,
    Turns,
    client_seed,
    draw,
    draw_by_staleness,
    next_in_turn,
    num_selected,
    select,
)

NAMES = frozenset(f"site-{i}" for i in range(10))


def choose(candidates: Candidates, **changes: Any) -> Selection:
    policy: dict[str, Any] = {
        "seed": 1, "round": 1, "size": 3, "over_selection": 1.0, "min_clients": 3, "is_settling": False,
    }  # fmt: skip
    return select(candidates, **(policy | changes))


@given(st.integers(0, 2**63 - 1), st.integers(1, 10**6), st.integers(0, 12), st.permutations(sorted(NAMES)))
def test_a_draw_depends_on_seed_and_round_only(seed: int, round: int, count: int, order: list[str]) -> None:
    drawn = draw(seed, round, order, count)
    assert drawn == draw(seed, round, sorted(NAMES), count)
    assert len(set(drawn)) == min(count, 10)


def test_rounds_draw_different_cohorts_and_every_site_gets_its_share() -> None:
    times = dict.fromkeys(NAMES, 0)
    for round in range(1, 1001):
        for name in draw(7, round, NAMES, 3):
            times[name] += 1
    assert min(times.values()) > 240  # 300 expected, standard deviation 14
    assert max(times.values()) < 360


@given(st.integers(0, 2**63 - 1), st.integers(1, 10))
def test_in_turn_everybody_is_asked_as_often_as_any_other(seed: int, count: int) -> None:
    turns: dict[str, Turns] = {}
    times = dict.fromkeys(NAMES, 0)
    for round in range(1, 21):
        chosen = choose(
            Candidates(NAMES), seed=seed, round=round, size=count, selection="round_robin", turns=turns
        ).cohort
        assert len(chosen) == count
        for name in chosen:
            times[name] += 1
            turns[name] = Turns(round, times[name])
        assert max(times.values()) - min(times.values()) <= 1


def test_in_turn_a_newcomer_and_who_was_away_come_first_and_then_wait_like_all() -> None:
    last = {"site-0": Turns(9, 5), "site-1": Turns(8, 5), "site-2": Turns(3, 1)}
    assert next_in_turn(1, ["site-0", "site-1", "site-2", "new"], 2, last) == ["new", "site-2"]
    assert next_in_turn(
        1, ["site-0", "site-1", "site-2", "new"], 2, last | {"new": Turns(10, 1), "site-2": Turns(10, 2)}
    ) == [
        "site-0",
        "site-1",
    ]


def test_by_staleness_the_first_is_drawn_with_chances_in_proportion_to_the_rounds_since_it_was_asked() -> None:
    turns = {"a": Turns(4001, 1), "b": Turns(4000, 1), "c": Turns(3998, 1)}
    times = dict.fromkeys("abc", 0)
    for seed in range(4000):
        [name] = draw_by_staleness(seed, 4002, ["c", "a", "b"], 1, turns)
        times[name] += 1
    for name, age in (("a", 1), ("b", 2), ("c", 4)):
        assert abs(times[name] - 4000 * age / 7) < 4.5 * (4000 * age / 7 * (1 - age / 7)) ** 0.5


@given(st.integers(0, 2**63 - 1), st.integers(1, 12))
def test_by_staleness_nobody_waits_for_long_and_cohorts_are_not_always_the_same(seed: int, count: int) -> None:
    turns: dict[str, Turns] = {}
    waited = dict.fromkeys(NAMES, 0)
    cohorts = []
    for round in range(1, 41):
        chosen = choose(
            Candidates(NAMES), seed=seed, round=round, size=count, selection="staleness", turns=turns
        ).cohort
        assert list(chosen) == sorted(set(chosen))
        assert len(chosen) == min(count, len(NAMES))
        cohorts.append(chosen)
        for name in NAMES:
            waited[name] = 0 if name in chosen else waited[name] + 1
        turns |= {name: Turns(round, 0) for name in chosen}
        # Turns would come every 10 / count rounds.
        assert max(waited.values()) <= 60 / count
    # In turn, ten rounds would be as the ten before.
    assert count >= len(NAMES) or cohorts[20:30] != cohorts[30:40]


def test_seeds_of_clients_differ_by_run_round_and_name() -> None:
    seeds = {client_seed(s, r, n) for s in (1, 2) for r in (1, 2) for n in ("a", "b")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_over_selection_asks_for_more_than_the_goal() -> None:
    assert num_selected(3, 1.0) == 3
    assert num_selected(3, 1.3) == 4
    assert len(choose(Candidates(NAMES), over_selection=1.5).cohort) == 5


def test_too_few_clients_are_waited_for_by_name() -> None:
    waiting = choose(Candidates(frozenset({"a"}), unlike=(("b", "has no workload 'digits' (it has none)"),)))
    assert not waiting.cohort
    assert "1 alive (a)" in waiting.reason
    assert "b has no workload 'digits'" in waiting.reason


def test_busy_clients_are_skipped_and_waited_for() -> None:
    few = Candidates(frozenset("abcd"), busy=frozenset("ab"))
    waiting = choose(few)
    assert waiting.waits_for_busy
    assert "a, b at work for another run" in waiting.reason
    assert choose(replace(few, busy=frozenset("a"))).cohort == ("b", "c", "d")


def test_clients_that_another_run_waits_for_are_left_to_it() -> None:
    assert not choose(Candidates(frozenset("abc"), reserved=frozenset("abc"))).cohort


def test_after_a_start_those_who_were_there_before_are_waited_for() -> None:
    restarted = Candidates(frozenset("abc"), expected=frozenset("d"))
    assert "d to call again" in choose(restarted, is_settling=True).reason
    assert choose(restarted, is_settling=False).cohort
