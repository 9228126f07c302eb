"""The account of a population: what a round would cost, and whether its budget allows it. Pure: records in, a record out.

A round is charged before its noise is drawn, in the transaction that fixes its cohort, and never taken back: whatever becomes of
the round, nobody can say that less was released.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fed_core.privacy.accounting import Epsilon, Spend, claim, epsilon, epsilon_without_sampling
from fed_core.privacy.mechanism import Mechanism
from fed_server.store.base import LedgerRecord


def spends_of(records: Iterable[LedgerRecord]) -> list[Spend]:
    """What was charged, equal mechanisms counted together, in the order in which they first came."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record.mechanism] = counts.get(record.mechanism, 0) + 1
    return [Spend(Mechanism.from_json(json.loads(text)), count) for text, count in counts.items()]


def charge(
    charged: Sequence[LedgerRecord],
    mechanism: Mechanism,
    *,
    run_id: str,
    round: int,
    population: str,
    delta: float,
    failure: float,
    most_participations: int,
    now: float,
) -> LedgerRecord:
    """The record of one more round. `charged` is all that the population was charged before; `failure` how far at most the round's
    noise is from what the mechanism says (total variation distance); `most_participations` how often any one client was drawn in
    the run, this round included. Takes as long as the accountant does."""
    record = LedgerRecord(
        run_id=run_id,
        round=round,
        population=population,
        created_time=now,
        mechanism=json.dumps(mechanism.to_json(), sort_keys=True),
        delta=delta,
        failure=failure,
        epsilon=0.0,
        epsilon_rdp=0.0,
        epsilon_of_cohort=0.0,
        population_epsilon=0.0,
    )
    everything = [*charged, record]
    mine = [each for each in everything if each.run_id == run_id]
    distance = sum(each.failure for each in mine)
    of_run = epsilon(spends_of(mine), delta, distance=distance)
    of_population = of_run
    if len(mine) != len(everything):
        of_population = epsilon(spends_of(everything), delta, distance=sum(each.failure for each in everything))
    of_cohort = epsilon_without_sampling(spends_of(mine), most_participations, delta, distance=distance)
    return replace(
        record,
        epsilon=of_run.reported,
        epsilon_rdp=of_run.rdp,
        epsilon_of_cohort=of_cohort.reported,
        population_epsilon=of_population.reported,
    )


def claim_after(charged: Sequence[LedgerRecord], round: int) -> str:
    """What a run had spent when a round was over, in words. `charged` are the run's records, the first round first."""
    until = [record for record in charged if record.round <= round]
    if not until:
        return NOTHING_RELEASED
    last = until[-1]
    spent = Epsilon(last.epsilon, last.epsilon_rdp)
    return claim(spends_of(until), spent, last.delta, sum(record.failure for record in until))


NOTHING_RELEASED: Final = claim([], Epsilon(0.0, 0.0), 0.5)
"""What is said before the first round."""


@dataclass(frozen=True)
class Outlook:
    """What a run will have spent if it goes on to its last round, and how many further rounds its budget pays for."""

    epsilon: float
    rounds: int


def outlook(
    charged: Sequence[LedgerRecord],
    of_population: Sequence[LedgerRecord],
    mechanism: Mechanism,
    num_left: int,
    delta: float,
    max_epsilon: float | None,
) -> Outlook:
    """Where a run stands that was charged `charged`, with `num_left` rounds like `mechanism` to go. Takes as long as the accountant
    does."""
    distance = sum(each.failure for each in charged)
    whole = epsilon([*spends_of(charged), Spend(mechanism, num_left)], delta, distance=distance).reported
    if max_epsilon is None:
        return Outlook(whole, num_left)
    return Outlook(whole, affordable_rounds(spends_of(of_population), mechanism, num_left, delta, max_epsilon))


def affordable_rounds(
    before: Sequence[Spend], mechanism: Mechanism, num_rounds: int, delta: float, max_epsilon: float
) -> int:
    """How many of `num_rounds` further rounds keep the account within `max_epsilon` at `delta`: a bisection, each step of which
    takes as long as the accountant does."""
    return bisect_right(
        range(1, num_rounds + 1),
        max_epsilon,
        key=lambda count: epsilon([*before, Spend(mechanism, count)], delta).reported,
    )
