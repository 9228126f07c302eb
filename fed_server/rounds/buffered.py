"""Buffered asynchronous rounds: the rules (FedBuff, Nguyen et al. 2022, https://arxiv.org/abs/2106.06639, algorithm 1).

Clients train all the time, each from the version that was the newest when it was asked. A round is a buffer: an update falls into
the one that is open when it becomes durable, and when K = cohort.size are in it they make the next version, of

    (1 / K) sum of s(staleness) * update        s(t): see `aggregation.staleness`

as the server optimizer does it. Updates that come while that version is made fall into the buffer after it. What we do that the
paper leaves open: a client that failed is not asked again for the same buffer, one that is silent is replaced at once, and while it
is no more stale than it may be its work counts all the same when it comes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fed_server.aggregation.staleness import ONE, staleness_weights
from fed_server.config import BufferedConfig
from fed_server.rounds.cohort import (
    Candidates,
    Selection,
    Turns,
    draw,
    draw_by_staleness,
    lack_of_clients,
    next_in_turn,
    some,
)
from fed_server.rounds.decide import Decision, Member, Verdict, list_failures, list_missing
from fed_server.store.base import Metrics, RoundRecord, RoundState


@dataclass(frozen=True)
class Opening:
    """The first buffer that takes updates, and the version that its updates are added to, which may yet have to be made."""

    buffer: int
    base_version: int


def first_opening(round: RoundRecord | None, next_round: int, model_version: int) -> Opening:
    """`round` is the one that is going on, if there is one; `model_version` is the newest."""
    if round is None:
        return Opening(next_round, model_version)
    match round.state:
        case RoundState.TRAINING:
            return Opening(round.round, round.base_version)
        case RoundState.AGGREGATING:
            return Opening(round.round + 1, round.base_version + 1)
        case _:
            return Opening(round.round + 1, model_version)


@dataclass(frozen=True)
class Place:
    """Where an update falls, and how stale it is there."""

    buffer: int
    position: int
    staleness: int


OWN_ROUND = Place(0, 0, 0)
"""Where rounds are synchronous: in the round of the assignment, and in time."""


def place_of(model_version: int, opening: Opening, num_in: Mapping[int, int], size: int) -> Place:
    """The place of the next update that becomes durable, which began with `model_version`: in the first buffer that is not full.
    `num_in` counts the updates in each; every buffer before it will have made one version."""
    buffer = opening.buffer
    while num_in.get(buffer, 0) >= size:
        buffer += 1
    base_version = opening.base_version + buffer - opening.buffer
    return Place(buffer, num_in.get(buffer, 0), base_version - model_version)


def widest(grid: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """The grid of a buffer: no finer than the one before it. An update is checked against the bounds of the buffer that is open
    when it comes, and no buffer that it may fall into has narrower ones."""
    return {name: max(exponent, before.get(name, exponent)) for name, exponent in grid.items()}


def too_stale(staleness: int, max_staleness: int) -> str:
    """Why an update that is so late does not count, or an empty string."""
    if staleness <= max_staleness:
        return ""
    return f"{staleness} versions were committed since, more than rounds.max_staleness = {max_staleness}"


def staleness_notice(config: BufferedConfig) -> str:
    """What an operator should know of how updates are weighted."""
    shown = [t for t in (0, 1, 2, 5, 10, 20, 50, 100) if t <= config.max_staleness]
    weights = staleness_weights(config.staleness, config.max_staleness)
    counts = ", ".join(f"{weights[t] / ONE:.3g}" for t in shown)
    return (
        f"an update that is {', '.join(map(str, shown))} versions late counts {counts}; one that is more than "
        f"{config.max_staleness} late is refused"
    )


def staleness_metrics(staleness: Sequence[int]) -> Metrics:
    """How late the updates of a version were."""
    if not staleness:
        return {}
    return {"staleness.mean": sum(staleness) / len(staleness), "staleness.max": float(max(staleness))}


@dataclass(frozen=True)
class BufferView:
    """A buffer as it stands. `staleness` of each update in it; those `at_work`, for this or a later one; those who `failed` in its
    time. `asking`: who is asked now, or why nobody."""

    goal: int
    quorum: int
    staleness: Sequence[int]
    at_work: Sequence[Member]
    failed: Sequence[Member]
    asking: Selection


def decide_buffer(view: BufferView) -> Decision:
    """Whether a buffer waits for more updates, makes a version, or fails. It has no deadline: who is late is replaced."""
    count = f"{len(view.staleness)} of {view.goal} updates"
    if len(view.staleness) >= view.goal:
        metrics = staleness_metrics(view.staleness)
        late = f"staleness {metrics['staleness.mean']:.3g} on average, {metrics['staleness.max']:.0f} at most"
        return Decision(Verdict.CLOSE, f"buffer full: {count}; {late}")
    if view.at_work or not view.asking.is_exhausted:
        waits = f"waiting for {list_missing(view.at_work)}" if view.at_work else view.asking.reason
        return Decision(Verdict.WAIT, f"{count}; {waits}")
    verdict = Verdict.CLOSE if len(view.staleness) >= view.quorum else Verdict.FAIL
    return Decision(verdict, f"nobody left to ask: {count}, {list_failures(view.failed)}")


def select_next(
    candidates: Candidates,
    *,
    seed: int,
    round: int,
    count: int,
    min_clients: int,
    is_settling: bool,
    selection: str,
    turns: Mapping[str, Turns],
    at_work: Collection[str],
    asked: Mapping[str, int],
    failed: Collection[str],
) -> Selection:
    """Who is asked now so that `count` more are at work, or why nobody is.

    `at_work`: those who work for this run, silent or not; `asked`: how often each was asked in this round; `failed`: those whose
    work came to nothing in it. Those first that were asked least often in this round, and of these by `selection`, as for a cohort.
    """
    if not at_work and (lack := lack_of_clients(candidates, min_clients=min_clients, is_settling=is_settling)):
        return Selection((), lack)
    alive = candidates.alive
    willing = alive - set(failed)
    free = willing - candidates.busy - candidates.reserved
    if not free:
        elsewhere = willing - set(at_work)
        if elsewhere:
            return Selection((), f"waiting for {some(elsewhere)}, at work for another run", waits_for_busy=True)
        return Selection((), "every client is at work or has failed", is_exhausted=bool(alive) and not at_work)
    chosen: list[str] = []
    for times in sorted({asked.get(name, 0) for name in free}):
        like = [name for name in free if asked.get(name, 0) == times]
        missing = count - len(chosen)
        match selection:
            case "round_robin":
                chosen += next_in_turn(seed, like, missing, turns)
            case "staleness":
                chosen += draw_by_staleness(seed, round, like, missing, turns)
            case _:
                chosen += draw(seed, round, like, missing)
    return Selection(tuple(chosen), f"asked {some(chosen)}")
