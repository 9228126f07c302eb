"""A run with central differential privacy: what its driver does otherwise. The sum is in `aggregation.private`, the account in
`privacy.ledger`.

The order of a round, each step durable before the next begins:

    cohort drawn and ledger charged     one transaction
    noise drawn, updates added          in memory; a crash draws anew over the same updates, and charges nothing more
    noisy sum written                   from here on nothing is drawn any more: whatever is left is made of this file
    version committed                   the file goes

Who is asked is decided by coins of the operating system, whether clients are there or not; there is no goal and no quorum, who is
late or absent counts as zero, and an empty round is released like any other. What the clients say besides their updates is not
kept.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fed_core.errors import FedstreamError
from fed_core.failpoints import failpoint
from fed_core.privacy.accounting import Spend, check_delta, epsilon, epsilon_without_sampling
from fed_core.privacy.mechanism import Mechanism
from fed_core.specs import TensorSpec
from fed_server.aggregation.base import Aggregator
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.private import (
    PrivateNoise,
    PrivateSum,
    ReleasedSum,
    next_clipping_norm,
    released_specs,
)
from fed_server.config import RunConfig
from fed_server.config_privacy import CentralPrivacyConfig, FixedClippingConfig
from fed_server.privacy.ledger import Outlook, affordable_rounds, charge, claim_after, outlook, spends_of
from fed_server.privacy.mechanisms import first_norm, mechanism_of, pays_for_run
from fed_server.rounds.cohort import Turns
from fed_server.rounds.decide import Decision, decide_private
from fed_server.rounds.policy import learning_rate
from fed_server.rounds.run import LiveRun
from fed_server.rounds.surroundings import Facilities, Surroundings
from fed_server.store.base import (
    AssignmentKind,
    AssignmentRecord,
    LedgerRecord,
    Metrics,
    ModelRecord,
    RosterRecord,
    RoundRecord,
    RoundState,
    RunRecord,
    RunState,
    Transaction,
)

logger = logging.getLogger(__name__)

# Coins fall by so many random bits.
_COIN_BITS = 64


class PrivateRun(LiveRun):
    """A round is a cohort drawn by coins, and a sum that is released with noise, whoever comes."""

    def __init__(
        self, facilities: Facilities, surroundings: Surroundings, record: RunRecord, config: RunConfig
    ) -> None:
        super().__init__(facilities, surroundings, record, config)
        assert isinstance(config.privacy, CentralPrivacyConfig)
        self._privacy = config.privacy
        self._roster: RosterRecord | None = None
        self._charges: list[LedgerRecord] = []
        self._next_norm = first_norm(config.privacy)
        self._ahead: asyncio.Task[None] | None = None

    # What others read

    @property
    def wants_clients(self) -> bool:
        """Whether the roster is still to be filled; later cohorts ask whomever the coins name."""
        return self._roster is None and super().wants_clients

    @property
    def keeps_metrics(self) -> bool:
        """Never: losses come of the sites' data, and nothing has put noise on them."""
        return False

    def excludes(self, name: str) -> str:
        """See `LiveRun.excludes`."""
        if self._roster is None or name in self._roster.units:
            return ""
        return "its roster was frozen before its first round, and this site is not on it; it can take part in runs that begin later"

    # The roster

    async def load(self) -> None:
        """See `LiveRun.load`."""

        def read(tx: Transaction) -> tuple[RosterRecord | None, list[RoundRecord], list[LedgerRecord]]:
            for taken in tx.participations(self.run_id):
                self.turns[self._surroundings.name_of(taken.client_id)] = Turns(taken.last_round, taken.num_selected)
            return tx.roster(self.run_id), tx.rounds(self.run_id, newest=1), tx.charges(self.run_id)

        self._roster, rounds, self._charges = await self._facilities.workers.store(read)
        for last in rounds:
            self._next_norm = last.next_clipping_norm or last.clipping_norm
        await super().load()

    async def _freeze(self) -> bool:
        """Makes the roster of the first cohort.size eligible clients; False where there are too few."""
        selection = self._surroundings.select(self)
        self._surroundings.keep_none(self)
        if not selection.cohort:
            self._say(selection.reason)
            return False
        owners = {name: owner for owner, names in self._privacy.units.items() for name in names}
        roster = RosterRecord(
            run_id=self.run_id,
            population=self._privacy.population,
            created_time=self._facilities.clock.now(),
            units={name: owners.get(name, name) for name in selection.cohort},
        )
        async with self._moving:
            if self.record.state is RunState.ACTIVE:
                await self._facilities.workers.store(lambda tx: tx.put(roster))
                self._roster = roster
        logger.info("roster frozen", extra={"run": self.record.name, "clients": len(roster.units)})
        return True

    @property
    def _members(self) -> dict[str, list[str]]:
        """The clients of every unit, by its name."""
        assert self._roster is not None
        members: dict[str, list[str]] = {}
        for name, unit in self._roster.units.items():
            members.setdefault(unit, []).append(name)
        return members

    @property
    def _expected_units(self) -> float:
        return self._privacy.sampling_rate * len(self._members)

    # Rounds

    async def _open(self, number: int, base: ModelRecord, max_abs: Mapping[str, float]) -> float:
        if self._surroundings.is_draining:
            self._say("the coordinator is stopping")
            return 0.5
        if self._roster is None and not await self._freeze():
            return 0.5
        assert self._roster is not None
        drawn = self._draw_units(number)
        cohort = [name for name, unit in sorted(self._roster.units.items()) if unit in drawn]
        async with self._surroundings.ledger_lock:
            charged = await self._charged()
            entry = await self._facilities.workers.compute(self._charge, charged, number, cohort)
            limit = self._privacy.max_epsilon
            if entry is not None and limit is not None and entry.population_epsilon > limit:
                await self._end_with_budget(entry, limit)
                return 0
            await self._tick()
            timeout = await self._open_charged(number, base, cohort, entry)
        if entry is not None:
            self._ahead = asyncio.create_task(self._look_ahead([*charged, entry], number + 1))
        return timeout

    async def _look_ahead(self, charged: Sequence[LedgerRecord], number: int) -> None:
        """Has the accountant at work on the next round while this one trains; it remembers what is the same."""
        with suppress(FedstreamError):
            await self._facilities.workers.compute(self._charge, charged, number, ())

    def _draw_units(self, number: int) -> set[str]:
        """Who is asked: each unit by a coin of its own, whether it is there or not."""
        return {unit for unit in self._members if falls(self._privacy.sampling_rate)}

    async def _charged(self) -> list[LedgerRecord]:
        return await self._facilities.workers.store(lambda tx: tx.charges_of_population(self._privacy.population))

    def _charge(self, charged: Sequence[LedgerRecord], number: int, cohort: Iterable[str]) -> LedgerRecord | None:
        """What a round costs, None where it is paid for; takes as long as the accountant does."""
        mechanism = self._mechanism(self._next_norm)
        asked = Counter({name: turns.num_times for name, turns in self.turns.items()}) + Counter(cohort)
        return charge(
            charged,
            mechanism,
            run_id=self.run_id,
            round=number,
            population=self._privacy.population,
            delta=self._privacy.delta,
            failure=self._noise(number, self._next_norm).failure(self._num_reals),
            most_participations=max(asked.values(), default=0),
            now=self._facilities.clock.now(),
        )

    async def _open_charged(
        self, number: int, base: ModelRecord, cohort: list[str], entry: LedgerRecord | None
    ) -> float:
        now, reason = self._facilities.clock.now(), self._how_drawn
        opened = RoundRecord(
            run_id=self.run_id,
            round=number,
            state=RoundState.TRAINING,
            reason=reason,
            base_version=base.version,
            created_time=now,
            clipping_norm=self._next_norm,
            phase_seconds={RoundState.SELECTING: self._waited_seconds},
        )
        ids = self._surroundings.client_ids(cohort)
        assignments = [
            self._new_assignment(number, ids[name], name, AssignmentKind.TRAIN, base.version) for name in cohort
        ]
        async with self._moving:
            record = replace(self.record, round=number, reason=reason)
            if not await self._write(record, opened, assignments, charges=[entry] if entry else []):
                return 0
            failpoint("ledger-charged")
            self.assignments = {a.assignment_id: a for a in assignments}
            self._note_selected(assignments)
            self._charges += [entry] if entry else []
            self._waited_seconds = 0.0
            self._begin_folding()
        logger.info(
            "round opened",
            extra={
                "run": self.record.name,
                "round": number,
                "learning_rate": learning_rate(self.config, number, self._plateau),
                "clipping_norm": opened.clipping_norm,
                "epsilon": self._charges[-1].epsilon,
            },
        )
        self._surroundings.assignments_changed(assignments)
        return 0

    async def _end_with_budget(self, entry: LedgerRecord, limit: float) -> None:
        """Before anything of the round is charged or drawn."""
        spent = self._charges[-1].population_epsilon if self._charges else 0.0
        reason = (
            f"privacy budget: round {entry.round} would bring population {entry.population!r} to epsilon "
            f"{entry.population_epsilon:.4g} at delta {entry.delta:g}, and privacy.max_epsilon is {limit:g}; it stands at "
            f"{spent:.4g}"
        )
        await self._finish(RunState.FINISHED if self.record.model_version > 0 else RunState.FAILED, reason)

    async def _decide(self) -> Decision:
        return decide_private(self._view(AssignmentKind.TRAIN, self.config.schedule.deadline_seconds))

    def _is_filling(self) -> bool:
        return super()._is_filling() and not self._released_path.exists()

    @property
    def _released_path(self) -> Path:
        assert self.round is not None
        return self._facilities.files.released_path(self.run_id, self.round.round)

    async def _aggregate_and_commit(self) -> None:
        assert self.round is not None
        workers, path = self._facilities.workers, self._released_path
        if not await workers.disk(path.exists):
            await self._release(path)
        released = await workers.disk(ReleasedSum, path, self._expected_units)
        with released:
            self._next_norm = self._norm_after(released)
            await self._make_and_commit(released)
        self._surroundings.garbage_left()

    async def _release(self, path: Path) -> None:
        """Makes the noisy sum durable. Until it is, a crash or a full disk begins anew with other noise; afterwards nothing
        does."""
        aggregate, files = await self._folding.finished(), self._facilities.files
        for assignment, reason in self._folding.lost:
            await self._set_aside(assignment, reason)
        assert isinstance(aggregate, PrivateSum), "a private sum can always be released"
        part = files.temporary(path)
        try:
            with files.disk_errors("writing the noisy sum of a round"):
                await self._facilities.workers.compute(aggregate.release, part)
                failpoint("before-released")
                async with self._surroundings.files_lock:
                    await self._facilities.workers.disk(files.publish, part, path)
        finally:
            part.unlink(missing_ok=True)
        failpoint("after-released")

    def _norm_after(self, released: ReleasedSum) -> float:
        assert self.round is not None
        clipping = self._privacy.clipping
        if isinstance(clipping, FixedClippingConfig):
            return clipping.norm
        norm = self.round.clipping_norm
        return next_clipping_norm(norm, released.uncut_part, clipping.quantile, clipping.learning_rate)

    def _begin_folding(self) -> None:
        # The noise takes as long as several updates, and the clients have only just been asked.
        self._folding.begin(self._new_aggregate, early=_draw_noise)

    def _new_aggregate(self) -> Aggregator:
        assert self.round is not None and self._roster is not None
        norm, members, units = self.round.clipping_norm, self._members, self._roster.units
        norms = {
            a.assignment_id: norm / len(members[units[self._surroundings.name_of(a.client_id)]])
            for a in self.assignments.values()
            if a.kind is AssignmentKind.TRAIN
        }
        noise = self._noise(self.round.round, norm)
        return PrivateSum(self._released_specs, noise, norms, norm, self._sum_memory)

    @property
    def _how_drawn(self) -> str:
        return f"drawn by coins at {self._privacy.sampling_rate:g} from a roster of {self.config.cohort.size}"

    def _noise(self, number: int, norm: float) -> PrivateNoise:
        """What goes on the sum of a round."""
        return noise_of(self._mechanism(norm))

    def _mechanism(self, norm: float) -> Mechanism:
        return mechanism_of(self.config, self._privacy, norm, len(self._members), self._num_reals)

    @property
    def _released_specs(self) -> list[TensorSpec]:
        rules = merge_rules(self.specs, [(m.pattern, m.rule) for m in self.config.aggregation.merge])
        return released_specs(self.specs, rules)

    @property
    def _num_reals(self) -> int:
        return sum(spec.num_elements * spec.reals_per_element for spec in self._released_specs)

    # What is said of it

    def _as_kept(self, assignment: AssignmentRecord, **told: Any) -> AssignmentRecord:
        kept = {name: value for name, value in told.items() if name not in _NOT_KEPT}
        return super()._as_kept(assignment, **kept)

    def _training_metrics(self) -> Metrics:
        assert self.round is not None
        return {"privacy.epsilon": self._charges[-1].epsilon, "privacy.clipping_norm": self.round.clipping_norm}

    @property
    def _version_notes(self) -> Mapping[str, str]:
        return {"privacy": claim_after(self._charges, self._charges[-1].round)}

    def _round_outcome(self) -> dict[str, Any]:
        return {"next_clipping_norm": self._next_norm}


# What an update says of the data behind it.
_NOT_KEPT = frozenset({"num_examples", "num_steps", "is_partial", "training_seconds", "metrics", "error", "gain"})


def falls(rate: float) -> bool:
    """A coin that shows heads with probability `rate`, rounded down to a multiple of 2^-64, by the operating system's
    randomness."""
    return secrets.randbits(_COIN_BITS) < int(rate * 2**_COIN_BITS)


def _draw_noise(aggregate: Aggregator) -> None:
    assert isinstance(aggregate, PrivateSum), "a private round adds up nothing else"
    aggregate.draw()


def noise_of(mechanism: Mechanism) -> PrivateNoise:
    """What is drawn for it."""
    return PrivateNoise(mechanism.update_sigma, mechanism.bit_sigma or 0.0)


def project(
    config: RunConfig,
    privacy: CentralPrivacyConfig,
    charged: Sequence[LedgerRecord],
    of_population: Sequence[LedgerRecord],
    num_left: int,
    num_parameters: int,
) -> Outlook:
    """Where a run stands that has so many rounds to go; every bound of an adaptive norm costs the same."""
    mechanism = _first_mechanism(config, privacy, num_parameters)
    if pays_for_run(privacy):
        num_left = 0 if charged else min(num_left, 1)
    return outlook(charged, of_population, mechanism, num_left, privacy.delta, privacy.max_epsilon)


def _first_mechanism(config: RunConfig, privacy: CentralPrivacyConfig, num_parameters: int) -> Mechanism:
    num_units = privacy.fewest_units(config.cohort.size)
    return mechanism_of(config, privacy, first_norm(privacy), num_units, num_parameters)


def privacy_notices(
    config: RunConfig, privacy: CentralPrivacyConfig, charged: Sequence[LedgerRecord], num_parameters: int
) -> list[str]:
    """What to tell whoever submits a run: what it will have cost, and for whom that holds. Takes as long as the accountant does."""
    num_rounds = config.schedule.max_rounds
    num_events = 1 if pays_for_run(privacy) else num_rounds
    mechanism = _first_mechanism(config, privacy, num_parameters)
    run = Spend(mechanism, num_events)
    whole = epsilon([run], privacy.delta).reported
    seen = epsilon_without_sampling([run], num_events, privacy.delta).reported
    whom = f"whoever sees released models only, and to at most {seen:.4g} for whoever sees the cohorts as well"
    if seen == whole:
        whom = "whoever sees the released models, and the cohorts as well"
    notices = [
        f"differential privacy for whole clients: all {num_rounds} rounds come to epsilon {whole:.4g} at delta {privacy.delta:g} "
        f"for {whom}"
    ]
    if charged:
        before = spends_of(charged)
        total = epsilon([*before, run], privacy.delta).reported
        notices.append(
            f"population {privacy.population!r} has spent epsilon {epsilon(before, privacy.delta).reported:.4g} before; with this "
            f"run {total:.4g}"
        )
    if privacy.max_epsilon is not None:
        affordable = affordable_rounds(spends_of(charged), mechanism, num_events, privacy.delta, privacy.max_epsilon)
        if affordable < num_events:
            rounds = (
                f"{affordable} of {num_rounds} rounds"
                if num_events > 1
                else "none of the rounds, which are paid for at once"
            )
            notices.append(f"privacy.max_epsilon = {privacy.max_epsilon:g} pays for {rounds}: the run will end there")
    if warning := check_delta(privacy.delta, privacy.fewest_units(config.cohort.size)):
        notices.append(f"privacy.delta: {warning}")
    return notices
