"""Who takes part in a round, and with which seeds: pure functions of the run's seed.

Draws go by the sites' names, not by their ids: a run repeated on a new coordinator with the same sites gives the same cohorts and,
where the data is the same, the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil, log
from typing import NamedTuple

from blake3 import blake3

from fed_server.rounds.importance import Correction, SiteReport, chances_of, correction_of, shares_of, systematic


def _hash(*parts: object) -> int:
    return int.from_bytes(blake3("\0".join(map(str, parts)).encode()).digest()[:8], "big")


def draw(seed: int, round: int, names: Collection[str], count: int) -> list[str]:
    """`count` of the names (all where there are fewer), chosen by a hash of (seed, round); in the order of names."""
    ranked = sorted(names, key=lambda name: (_hash("cohort", seed, round, name), name))
    return sorted(ranked[:count])


class Turns(NamedTuple):
    """For which round a site was last asked to train, 0 for none, and how often in all."""

    last_round: int = 0
    num_times: int = 0


def next_in_turn(seed: int, names: Collection[str], count: int, turns: Mapping[str, Turns]) -> list[str]:
    """`count` of the names (all where there are fewer), those first that were asked longest ago or never, and of these
    those that were asked less often; in the order of names. Of equals, those first that come first in an order that hangs on the
    seed alone."""
    ranked = sorted(names, key=lambda name: (*turns.get(name, Turns()), _hash("turn", seed, name), name))
    return sorted(ranked[:count])


def draw_by_staleness(
    seed: int, round: int, names: Collection[str], count: int, turns: Mapping[str, Turns]
) -> list[str]:
    """`count` of the names (all where there are fewer), one after the other, each time with chances in proportion to the rounds
    since a site was last asked (since the run began for one that never was); in the order of names.

    After Yang et al. 2020 (https://arxiv.org/abs/1910.14648), who prefer sites by the age of their last update; without their radio
    channel the oldest first would be `next_in_turn`, so age is a chance here, not an order: cohorts mix, and nobody foresees them.
    Drawn by keys log(u) / age, the largest first (Efraimidis and Spirakis 2006, algorithm A), with u in (0, 1) from a hash."""

    def key(name: str) -> tuple[float, str]:
        age = max(1, round - turns.get(name, Turns()).last_round)
        return log((_hash("staleness", seed, round, name) + 0.5) * 2.0**-64) / age, name

    return sorted(sorted(names, key=key, reverse=True)[:count])


@dataclass(frozen=True)
class ImportancePolicy:
    """What a draw by importance goes by: what sites last reported, by name; the part of the chances that is dealt out by share
    alone; what the operator multiplies shares by; whether shares go by examples; and the largest weight that sums take."""

    reports: Mapping[str, SiteReport]
    equal_part: float
    importance: Mapping[str, int]
    by_examples: bool
    max_weight: int


def draw_by_importance(
    seed: int, round: int, names: Collection[str], count: int, policy: ImportancePolicy
) -> tuple[list[str], Correction]:
    """`count` of the names (all where there are fewer), in the order of names, and how their updates count; see `importance`."""
    order = sorted(names, key=lambda name: (_hash("importance", seed, round, name), name))
    shares = shares_of(order, policy.reports, policy.importance, by_examples=policy.by_examples)
    chances = chances_of(shares, policy.reports, min(count, len(order)), policy.equal_part)
    start = _hash("start", seed, round) * chances.total >> 64
    drawn = systematic([name for name in order if name in chances.sizes], chances, start)
    cohort = sorted([*chances.certain, *drawn])
    return cohort, correction_of(cohort, shares, chances, policy.max_weight)


def client_seed(seed: int, round: int, name: str, turn: int = 0) -> int:
    """Seed of everything random at a site in a round, 0 to 2**63 - 1; `turn` counts how often it was asked before in that round."""
    return _hash("client", seed, round, name, *([turn] if turn else [])) >> 1


def broadcast_seed(seed: int, version: int) -> int:
    """Seed of what is random in the encoding of a version, 0 to 2**63 - 1."""
    return _hash("broadcast", seed, version) >> 1


def num_selected(size: int, over_selection: float) -> int:
    """Clients to select so that about `size` come through."""
    return ceil(size * over_selection)


@dataclass(frozen=True)
class Candidates:
    """The population as one run sees it. `alive` have the workload, match the labels and called within the lease; of these `busy`
    train for some run, and `reserved` are owed to a run whose turn comes earlier. `unlike` are alive but do not match, name to
    reason; `expected` matched before the coordinator's last stop and have not called since."""

    alive: frozenset[str]
    busy: frozenset[str] = frozenset()
    reserved: frozenset[str] = frozenset()
    expected: frozenset[str] = frozenset()
    unlike: tuple[tuple[str, str], ...] = ()


def within_population(candidates: Candidates, members: Collection[str], limit: int) -> Candidates:
    """Those of the candidates that a run of at most `limit` sites may ask: its `members`, who have sent an update, and as many
    others as there is room for, the first by name."""
    newcomers = sorted(candidates.alive - set(members))
    left_out = frozenset(newcomers[max(0, limit - len(members)) :])
    why = f"is not of the run's population, which is {limit} sites"
    return replace(
        candidates,
        alive=candidates.alive - left_out,
        unlike=(*candidates.unlike, *((name, why) for name in sorted(left_out))),
    )


@dataclass(frozen=True)
class Selection:
    """A cohort, or none and what is waited for. `waits_for_busy`: enough clients are there, but at work elsewhere. `correction`:
    how the updates of a cohort that was drawn by importance count. `is_exhausted`: none of those who are there is to be asked
    again for this round."""

    cohort: tuple[str, ...]
    reason: str
    waits_for_busy: bool = False
    correction: Correction | None = None
    is_exhausted: bool = False


def lack_of_clients(candidates: Candidates, *, min_clients: int, is_settling: bool) -> str:
    """Why nobody is asked yet, or an empty string. Right after a start (`is_settling`) the clients that were there before are
    waited for."""
    alive = candidates.alive
    if is_settling and candidates.expected:
        return f"waiting for {some(candidates.expected)} to call again after the coordinator's start"
    if len(alive) >= min_clients:
        return ""
    unlike = "".join(f"; {name} {why}" for name, why in candidates.unlike[:3])
    here = f"{len(alive)} alive ({some(alive)})" if alive else "none alive"
    return f"waiting for {min_clients} clients with the workload and labels of the run: {here}{unlike}"


def select(
    candidates: Candidates,
    *,
    seed: int,
    round: int,
    size: int,
    over_selection: float,
    min_clients: int,
    is_settling: bool,
    selection: str = "random",
    turns: Mapping[str, Turns] | None = None,
    importance: ImportancePolicy | None = None,
) -> Selection:
    """The cohort of a round, or the reason why it cannot be chosen yet.

    Right after a start (`is_settling`) the clients that were there before are waited for, so that a restart does not shrink the
    cohort. `selection` is "random", by seed and round alone; "round_robin" or "staleness", by `turns` as in `next_in_turn` and
    `draw_by_staleness`; or "importance", by a policy as in `draw_by_importance`.
    """
    if lack := lack_of_clients(candidates, min_clients=min_clients, is_settling=is_settling):
        return Selection((), lack)
    alive = candidates.alive
    free = alive - candidates.busy - candidates.reserved
    needed = min(size, len(alive))
    if len(free) < needed:
        taken = alive - free
        return Selection(
            (), f"waiting for {needed} free clients: {some(taken)} at work for another run", waits_for_busy=True
        )
    count = num_selected(size, over_selection)
    correction = None
    match selection:
        case "round_robin":
            cohort = next_in_turn(seed, free, count, turns or {})
        case "staleness":
            cohort = draw_by_staleness(seed, round, free, count, turns or {})
        case "importance":
            assert importance is not None, "a draw by importance needs its policy"
            cohort, correction = draw_by_importance(seed, round, free, count, importance)
        case _:
            cohort = draw(seed, round, free, count)
    return Selection(tuple(cohort), f"selected {len(cohort)} of {len(alive)} clients", correction=correction)


def some(names: Collection[str], most: int = 5) -> str:
    """A few of the names, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
