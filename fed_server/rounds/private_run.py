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

import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fed_core.failpoints import failpoint
from fed_core.privacy.accounting import Spend, check_delta, epsilon, epsilon_without_sampling
from fed_core.privacy.mechanism import Mechanism, central_adaptive, central_poisson, default_bit_sigma
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
from fed_server.privacy.ledger import Outlook, affordable_rounds, charge, claims, outlook, spends_of
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
        drawn = {unit for unit in self._members if falls(self._privacy.sampling_rate)}
        assert self._roster is not None
        cohort = [name for name, unit in sorted(self._roster.units.items()) if unit in drawn]
        async with self._surroundings.ledger_lock:
            entry = await self._facilities.workers.compute(self._charge, await self._charged(), number, cohort)
            limit = self._privacy.max_epsilon
            if limit is not None and entry.population_epsilon > limit:
                await self._end_with_budget(entry, limit)
                return 0
            await self._tick()
            return await self._open_charged(number, base, cohort, entry)

    async def _charged(self) -> list[LedgerRecord]:
        return await self._facilities.workers.store(lambda tx: tx.charges_of_population(self._privacy.population))

    def _charge(self, charged: Sequence[LedgerRecord], number: int, cohort: Iterable[str]) -> LedgerRecord:
        """What a round costs; takes as long as the accountant does."""
        mechanism = self._mechanism(self._next_norm)
        asked = Counter({name: turns.num_times for name, turns in self.turns.items()}) + Counter(cohort)
        return charge(
            charged,
            mechanism,
            run_id=self.run_id,
            round=number,
            population=self._privacy.population,
            delta=self._privacy.delta,
            failure=noise_of(mechanism).failure(self._num_reals),
            most_participations=max(asked.values(), default=0),
            now=self._facilities.clock.now(),
        )

    async def _open_charged(self, number: int, base: ModelRecord, cohort: list[str], entry: LedgerRecord) -> float:
        now, size = self._facilities.clock.now(), self.config.cohort.size
        reason = f"drawn by coins at {self._privacy.sampling_rate:g} from a roster of {size}"
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
            if not await self._write(record, opened, assignments, charges=[entry]):
                return 0
            failpoint("ledger-charged")
            self.assignments = {a.assignment_id: a for a in assignments}
            self._note_selected(assignments)
            self._charges.append(entry)
            self._waited_seconds = 0.0
            self._begin_folding()
        logger.info(
            "round opened",
            extra={
                "run": self.record.name,
                "round": number,
                "learning_rate": learning_rate(self.config, number, self._plateau),
                "clipping_norm": opened.clipping_norm,
                "epsilon": entry.epsilon,
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

    def _new_aggregate(self) -> Aggregator:
        assert self.round is not None and self._roster is not None
        norm, members, units = self.round.clipping_norm, self._members, self._roster.units
        norms = {
            a.assignment_id: norm / len(members[units[self._surroundings.name_of(a.client_id)]])
            for a in self.assignments.values()
            if a.kind is AssignmentKind.TRAIN
        }
        return PrivateSum(self._released_specs, noise_of(self._mechanism(norm)), norms, norm, self._sum_memory)

    def _mechanism(self, norm: float) -> Mechanism:
        return mechanism_of(self._privacy, norm, len(self._members))

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
        return {"privacy": claims(self._charges)[self._charges[-1].round]}

    def _round_outcome(self) -> dict[str, Any]:
        return {"next_clipping_norm": self._next_norm}


# What an update says of the data behind it.
_NOT_KEPT = frozenset({"num_examples", "num_steps", "is_partial", "training_seconds", "metrics", "error", "gain"})


def falls(rate: float) -> bool:
    """A coin that shows heads with probability `rate`, rounded down to a multiple of 2^-64, by the operating system's
    randomness."""
    return secrets.randbits(_COIN_BITS) < int(rate * 2**_COIN_BITS)


def first_norm(privacy: CentralPrivacyConfig) -> float:
    """What the updates of the first round are cut to."""
    clipping = privacy.clipping
    return clipping.norm if isinstance(clipping, FixedClippingConfig) else clipping.initial_norm


def mechanism_of(privacy: CentralPrivacyConfig, norm: float, num_units: int) -> Mechanism:
    """What a round declares whose updates are cut to `norm`. Raises ConfigError where an adaptive bound leaves nothing of the
    noise."""
    if isinstance(privacy.clipping, FixedClippingConfig):
        return central_poisson(norm, privacy.noise_multiplier, privacy.sampling_rate)
    bit_sigma = default_bit_sigma(privacy.noise_multiplier, privacy.sampling_rate, num_units)
    return central_adaptive(norm, privacy.noise_multiplier, bit_sigma, privacy.sampling_rate)


def noise_of(mechanism: Mechanism) -> PrivateNoise:
    """What is drawn for it."""
    return PrivateNoise(mechanism.update_sigma, mechanism.bit_sigma or 0.0)


def project(
    config: RunConfig,
    privacy: CentralPrivacyConfig,
    charged: Sequence[LedgerRecord],
    of_population: Sequence[LedgerRecord],
    num_left: int,
) -> Outlook:
    """Where a run stands that has so many rounds to go; every bound of an adaptive norm costs the same."""
    mechanism = mechanism_of(privacy, first_norm(privacy), privacy.fewest_units(config.cohort.size))
    return outlook(charged, of_population, mechanism, num_left, privacy.delta, privacy.max_epsilon)


def privacy_notices(config: RunConfig, privacy: CentralPrivacyConfig, charged: Sequence[LedgerRecord]) -> list[str]:
    """What to tell whoever submits a run: what it will have cost, and for whom that holds. Takes as long as the accountant does."""
    num_units, num_rounds = privacy.fewest_units(config.cohort.size), config.schedule.max_rounds
    mechanism = mechanism_of(privacy, first_norm(privacy), num_units)
    run = Spend(mechanism, num_rounds)
    whole = epsilon([run], privacy.delta).reported
    seen = epsilon_without_sampling([run], num_rounds, privacy.delta).reported
    notices = [
        f"differential privacy for whole clients: all {num_rounds} rounds come to epsilon {whole:.4g} at delta "
        f"{privacy.delta:g} for whoever sees released models only, and to at most {seen:.4g} for whoever sees the cohorts as well"
    ]
    if charged:
        before = spends_of(charged)
        total = epsilon([*before, run], privacy.delta).reported
        notices.append(
            f"population {privacy.population!r} has spent epsilon {epsilon(before, privacy.delta).reported:.4g} before; with this "
            f"run {total:.4g}"
        )
    if privacy.max_epsilon is not None:
        affordable = affordable_rounds(spends_of(charged), mechanism, num_rounds, privacy.delta, privacy.max_epsilon)
        if affordable < num_rounds:
            notices.append(
                f"privacy.max_epsilon = {privacy.max_epsilon:g} pays for {affordable} of {num_rounds} rounds: the run will end "
                "there"
            )
    if warning := check_delta(privacy.delta, num_units):
        notices.append(f"privacy.delta: {warning}")
    return notices
