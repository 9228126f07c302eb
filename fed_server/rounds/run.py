"""One active run: its driver, which carries out what `decide` decides. Buffered rounds differ from it in `buffered_run`.

Every move is one transaction, made before anything of it is visible. Moves of one run never overlap (`_moving`); what takes long
(folding, making a version, evaluating) happens between moves. The driver holds nothing that the store and the spooled updates
cannot rebuild: after a crash it goes on from the state of the last transaction.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fed_core.codecs.registry import CODECS_OF
from fed_core.errors import DiskFullError, FedstreamError, InvalidError, NoLongerNeededError
from fed_core.failpoints import failpoint
from fed_core.payload.manifest import Manifest
from fed_core.plan import TrainingPlan
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec, variate_specs
from fed_server.aggregation.base import Aggregator, AggregatorSetting
from fed_server.aggregation.corrected import Corrected
from fed_server.aggregation.exact import SumMemory
from fed_server.aggregation.grid import GridPolicy, bounds_of, make_grid
from fed_server.aggregation.loss_weight import RECEIVED_LOSS
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.normalized import Normalized
from fed_server.aggregation.registry import new_aggregator
from fed_server.aggregation.validate import Expected
from fed_server.aggregation.variate import WithVariate, variate_grid
from fed_server.config import (
    FedNovaConfig,
    LatticeDownlinkConfig,
    QFedAvgConfig,
    RunConfig,
    ScaffoldConfig,
)
from fed_server.config_privacy import SitePrivacyConfig
from fed_server.optim.schedule import Plateau
from fed_server.privacy.promises import sites_claim
from fed_server.rounds.broadcast import VARIATE, WHOLE, Broadcasts
from fed_server.rounds.buffered import OWN_ROUND, Place
from fed_server.rounds.cohort import Turns, client_seed
from fed_server.rounds.decide import Decision, Member, RoundView, Verdict, decide, decide_evaluation
from fed_server.rounds.folding import Folding
from fed_server.rounds.importance import SiteReport
from fed_server.rounds.making import NextVersion, is_averaged, sends_deltas
from fed_server.rounds.metrics import mean_metrics
from fed_server.rounds.policy import (
    learning_rate,
    least_work,
    loss_scale,
    loss_weighting,
    plateau_after,
    population,
    run_grid_policy,
    stop_rules,
    training_plan,
)
from fed_server.rounds.signal import Signal
from fed_server.rounds.stop import Best, stop_reason, update_best
from fed_server.rounds.surroundings import Facilities, Surroundings
from fed_server.rounds.version import (
    largest_values,
)
from fed_server.store.base import (
    AssignmentKind,
    AssignmentRecord,
    AssignmentState,
    BroadcastRecord,
    LedgerRecord,
    Metrics,
    ModelRecord,
    RoundRecord,
    RoundState,
    RunRecord,
    RunState,
    Transaction,
)

logger = logging.getLogger(__name__)

# Uptime is written down at least this often, so that a crash forgives a deadline at most so much.
_SAVE_UPTIME_SECONDS = 5.0

# How often a run that waits for disk space looks again.
_DISK_FULL_SECONDS = 2.0


class LiveRun:
    """A run that is not over. The driver is `drive`; the services call the rest."""

    def __init__(
        self, facilities: Facilities, surroundings: Surroundings, record: RunRecord, config: RunConfig
    ) -> None:
        self._facilities = facilities
        self._surroundings = surroundings
        self.record = record
        self.config = config
        self.changed = Signal()
        self.reason = record.reason
        self.round: RoundRecord | None = None
        self.assignments: dict[str, AssignmentRecord] = {}
        self.models: dict[int, ModelRecord] = {}
        self.specs: tuple[TensorSpec, ...] = ()
        self.last_turn = 0
        self.turns: dict[str, Turns] = {}
        """When each site was asked to train, by name."""
        self.members: set[str] = set()
        """Who has sent an update, by name; kept where the population is limited."""
        self.reports: dict[str, SiteReport] = {}
        """What each site said with its last update, by name."""
        self._grid_policy: GridPolicy = run_grid_policy(config)
        # That of the newest round.
        self._grid: dict[str, int] = {}
        self._max_abs: tuple[int, dict[str, float]] | None = None
        self._sum_memory = SumMemory()
        self._moving = asyncio.Lock()
        self._last_tick = facilities.clock.monotonic()
        self._unsaved_seconds = 0.0
        self._waited_seconds = 0.0
        self._folding = Folding(facilities.workers, facilities.files, surroundings.name_of)
        self.broadcasts = Broadcasts(
            facilities,
            surroundings,
            record.run_id,
            self.models,
            is_lattice=isinstance(config.downlink, LatticeDownlinkConfig),
        )
        # What each open assignment has begun to fetch, so that a resumed transfer is counted once.
        self._fetched: set[tuple[str, str]] = set()

    # What others read

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.record.run_id

    @property
    def wants_clients(self) -> bool:
        """Whether the run would ask clients to train now."""
        return self.record.state is RunState.ACTIVE and self.round is None

    @property
    def keeps_metrics(self) -> bool:
        """Whether what clients measure on their data is taken note of."""
        return True

    def excludes(self, name: str) -> str:
        """Why a site is never asked, whatever it offers; empty where it may be."""
        return ""

    @property
    def next_round(self) -> int:
        """Number of the round that would open next."""
        return self.record.round + 1

    def open_assignments(self) -> list[AssignmentRecord]:
        """Those that clients should be working on."""
        return [a for a in self.assignments.values() if a.state is AssignmentState.OPEN]

    def of_this_round(self) -> list[AssignmentRecord]:
        """Those of the round that is going on: open ones, and those whose outcome is part of it."""
        number = self.round.round if self.round is not None else 0
        return [a for a in self.assignments.values() if a.state is AssignmentState.OPEN or a.outcome_round == number]

    def seconds_left(self, assignment: AssignmentRecord) -> float:
        """Seconds until the assignment is no longer waited for; -1 where there is no deadline."""
        return self.deadline_seconds()

    def deadline_seconds(self) -> float:
        """Seconds left of the round's present phase; -1 where there is no deadline."""
        if self.round is None:
            return -1.0
        phase = self.round.state
        limit = {
            RoundState.TRAINING: self.config.schedule.deadline_seconds,
            RoundState.EVALUATING: self.config.evaluation.deadline_seconds,
        }.get(phase, 0.0)
        return limit - self.round.phase_seconds.get(phase, 0.0) if limit > 0 else -1.0

    def plan(self, assignment: AssignmentRecord) -> TrainingPlan:
        """What the assignment's client is told to do."""
        return training_plan(self.config, assignment, self._plateau, self._surroundings.name_of(assignment.client_id))

    def expected(self, assignment: AssignmentRecord) -> Expected:
        """What the assignment's update must be. Raises NoLongerNeededError where it does not count any more."""
        self._place(assignment)
        # An update may come between rounds only where none has any of these.
        weights, scale = (self.round.weights, self.round.loss_scale) if self.round is not None else ({}, 0.0)
        return Expected(
            assignment_id=assignment.assignment_id,
            run_id=self.run_id,
            round=assignment.round,
            model_version=assignment.model_version,
            base_digest=bytes.fromhex(self.models[assignment.model_version].payload_digest),
            specs=self.specs,
            bounds=bounds_of(self._grid, self._grid_policy),
            codecs=CODECS_OF[self.config.uplink.kind],
            weighting=self.config.aggregation.weighting,
            max_weight=self._grid_policy.max_weight,
            importance=self.config.aggregation.importance.get(self._surroundings.name_of(assignment.client_id), 1),
            is_normalized=self._is_normalized,
            least_work=least_work(self.config, assignment.round, self._plateau),
            fixed_weight=weights.get(self._surroundings.name_of(assignment.client_id)),
            loss_weighting=loss_weighting(self.config, scale),
        )

    @property
    def _has_variate(self) -> bool:
        return isinstance(self.config.training.objective, ScaffoldConfig)

    @property
    def _least_work(self) -> float:
        assert self.round is not None
        return least_work(self.config, self.round.round, self._plateau)

    async def variate_for(self, assignment: AssignmentRecord) -> BroadcastRecord | None:
        """The common variate that goes with an assignment; None where there is none, or it is zero."""
        is_wanted = self._has_variate and assignment.kind is AssignmentKind.TRAIN
        return await self.broadcasts.variate(assignment.model_version) if is_wanted else None

    @property
    def _is_normalized(self) -> bool:
        return isinstance(self.config.training.objective, FedNovaConfig)

    @property
    def _plateau(self) -> Plateau:
        record = self.record
        return Plateau(record.plateau_factor, record.plateau_best, record.plateau_num_without_gain)

    # The driver

    async def load(self) -> None:
        """Reads what is unfinished; called once before `drive`."""

        def read(tx: Transaction) -> None:
            self.models |= {model.version: model for model in tx.models(self.run_id)}
            for record in tx.broadcasts(self.run_id):
                self.broadcasts.remember(record)
            first = 1
            for last in tx.rounds(self.run_id, newest=1):
                is_over = last.state in (RoundState.COMMITTED, RoundState.FAILED)
                self.round = None if is_over else last
                self._grid = last.grid
                first = last.round + is_over
            self.assignments = {a.assignment_id: a for a in tx.unsettled_assignments(self.run_id, first)}
            if population(self.config) is not None:
                self._note_members(tx.assignments(self.run_id))
            if self.config.cohort.selection != "random":
                self.turns = {
                    self._surroundings.name_of(p.client_id): Turns(p.last_round, p.num_selected)
                    for p in tx.participations(self.run_id)
                }
            if self.config.cohort.selection == "importance" or isinstance(self.config.aggregation, QFedAvgConfig):
                for assignment in tx.assignments(self.run_id):
                    self._note_report(assignment)

        await self._facilities.workers.store(read)
        path = self._facilities.files.model_path(self.run_id, self.record.model_version)

        def read_specs() -> tuple[TensorSpec, ...]:
            with SafetensorsReader(path) as reader:
                return tuple(reader.specs)

        self.specs = await self._facilities.workers.disk(read_specs)
        is_filling = self._is_filling()
        if is_filling:
            self._begin_folding()
        of_round = self._received(AssignmentKind.TRAIN)
        # Besides those of the round, some of a later buffer may have come.
        for assignment in [a for a in self.assignments.values() if a.state is AssignmentState.RECEIVED]:
            if assignment.kind is not AssignmentKind.TRAIN or (assignment in of_round and not is_filling):
                continue
            if damage := await self._folding.damage(assignment):
                await self._set_aside(assignment, damage)
            elif assignment in of_round:
                self._folding.put(assignment)

    def _is_filling(self) -> bool:
        """Whether the updates of the open round are still to be folded."""
        return self.round is not None and self.round.state in (RoundState.TRAINING, RoundState.AGGREGATING)

    def _note_selected(self, assignments: Iterable[AssignmentRecord]) -> None:
        for assignment in assignments:
            name = self._surroundings.name_of(assignment.client_id)
            self.turns[name] = Turns(assignment.round, self.turns.get(name, Turns()).num_times + 1)

    def _note_members(self, assignments: Iterable[AssignmentRecord]) -> None:
        self.members |= {
            self._surroundings.name_of(a.client_id)
            for a in assignments
            if a.kind is AssignmentKind.TRAIN and a.state is AssignmentState.RECEIVED
        }

    def _note_report(self, assignment: AssignmentRecord) -> None:
        if assignment.kind is AssignmentKind.TRAIN and assignment.state is AssignmentState.RECEIVED:
            name = self._surroundings.name_of(assignment.client_id)
            if name not in self.reports or self.reports[name].round <= assignment.round:
                metric = RECEIVED_LOSS if isinstance(self.config.aggregation, QFedAvgConfig) else "loss"
                loss = assignment.metrics.get(metric)
                self.reports[name] = SiteReport(assignment.round, loss, assignment.num_examples)

    async def _set_aside(self, assignment: AssignmentRecord, reason: str) -> None:
        """An acknowledged update that the disk lost: it no longer counts, by name."""
        name = self._surroundings.name_of(assignment.client_id)
        logger.error("stored update lost", extra={"run": self.record.name, "client": name, "reason": reason})
        failed = replace(assignment, state=AssignmentState.FAILED, reason=reason)
        await self._facilities.workers.store(lambda tx: tx.put(failed))
        self.assignments[assignment.assignment_id] = failed

    async def drive(self) -> None:
        """Goes on until the run is over. A fault of the coordinator itself fails the run and says so; it never takes the service
        with it."""
        async with asyncio.TaskGroup() as tasks:
            folding = tasks.create_task(self._folding.run())
            try:
                while self.record.state is RunState.ACTIVE:
                    try:
                        seen = self.changed.count
                        timeout = await self._step()
                        if timeout > 0:
                            await self.changed.wait(seen, timeout)
                        await self._tick()
                    except DiskFullError as error:
                        # Nothing was half-done: the same step is tried again until there is space.
                        self._say(str(error))
                        await self.changed.wait(self.changed.count, _DISK_FULL_SECONDS)
            except FedstreamError as error:
                await self._fail_run(str(error))
            except Exception as error:
                logger.exception("run failed by an internal error", extra={"run": self.record.name})
                await self._fail_run(f"internal error at the coordinator: {type(error).__name__}; its log has the rest")
            finally:
                folding.cancel()

    async def _step(self) -> float:
        """Does what is next; seconds until it should be looked at again, 0 for at once."""
        if self.round is None:
            return await self._open_round()
        match self.round.state:
            case RoundState.TRAINING:
                decision = await self._decide()
                self._say(decision.reason)
                if decision.verdict is Verdict.WAIT:
                    return self._patience()
                if decision.verdict is Verdict.FAIL:
                    await self._fail_round(decision)
                else:
                    await self._close(decision)
                return 0
            case RoundState.AGGREGATING:
                await self._aggregate_and_commit()
                return 0
            case RoundState.EVALUATING:
                decision = decide_evaluation(
                    self._view(AssignmentKind.EVALUATE, self.config.evaluation.deadline_seconds)
                )
                self._say(decision.reason or "evaluating at the coordinator")
                if decision.verdict is Verdict.WAIT:
                    return self._patience()
                await self._evaluate(decision)
                return 0
            case _:
                raise AssertionError(f"a finished round ({self.round.state}) is not driven")

    async def _decide(self) -> Decision:
        """Whether a round that takes updates goes on, closes or fails."""
        return decide(self._view(AssignmentKind.TRAIN, self.config.schedule.deadline_seconds))

    def _patience(self) -> float:
        left = self.deadline_seconds()
        return min(1.0, left) if left > 0 else 1.0

    def _view(self, kind: AssignmentKind, deadline_seconds: float) -> RoundView:
        assert self.round is not None
        return RoundView(
            elapsed_seconds=self.round.phase_seconds.get(self.round.state, 0.0),
            deadline_seconds=deadline_seconds,
            goal=self.round.goal,
            quorum=self.round.quorum,
            members=[self._member(a) for a in self.assignments.values() if a.kind is kind],
        )

    def _member(self, assignment: AssignmentRecord) -> Member:
        membership, now = self._facilities.membership, self._facilities.clock.monotonic()
        progress = membership.progress(assignment.assignment_id)
        return Member(
            name=self._surroundings.name_of(assignment.client_id),
            state=assignment.state,
            is_alive=membership.is_alive(assignment.client_id, now) or self._is_fresh(now),
            silent_seconds=membership.silent_seconds(assignment.client_id, now),
            doing=_doing(progress.phase, progress.done, progress.total) if progress else "",
            reason=assignment.reason,
        )

    def _is_fresh(self, now: float) -> bool:
        """Just started: nobody has had the time to call yet."""
        membership = self._facilities.membership
        return now - membership.started <= membership.lease_seconds

    def _say(self, reason: str) -> None:
        if reason != self.reason:
            self.reason = reason
            self.changed.notify()

    async def _tick(self) -> None:
        """Counts uptime towards deadlines; a stopped coordinator costs nobody a deadline."""
        now = self._facilities.clock.monotonic()
        passed, self._last_tick = now - self._last_tick, now
        self.record = replace(self.record, elapsed_seconds=self.record.elapsed_seconds + passed)
        if self.round is None:
            self._waited_seconds += passed
        else:
            seconds = dict(self.round.phase_seconds)
            seconds[self.round.state] = seconds.get(self.round.state, 0.0) + passed
            self.round = replace(self.round, phase_seconds=seconds)
        self._unsaved_seconds += passed
        if self._unsaved_seconds >= _SAVE_UPTIME_SECONDS:
            async with self._moving:
                run, round = self.record, self.round

                def write(tx: Transaction) -> None:
                    tx.put(run)
                    if round is not None:
                        tx.put(round)

                await self._facilities.workers.store(write)
            self._unsaved_seconds = 0.0

    # Moves

    async def _open_round(self) -> float:
        rules = stop_rules(self.config)
        best = Best(self.record.best_version, self.record.best_metric, self.record.num_without_gain)
        over = stop_reason(rules, round=self.record.round, elapsed_seconds=self.record.elapsed_seconds, best=best)
        if over is None and self.record.num_failed_rounds >= self.config.schedule.max_failed_rounds:
            # The run's end could not be written when its last round failed: the disk was full, or the process died.
            await self._finish(
                RunState.FAILED, f"{self.record.num_failed_rounds} rounds in a row failed; {self.record.reason}"
            )
            return 0
        if over is not None:
            made_something = self.record.model_version > 0
            await self._finish(RunState.FINISHED if made_something else RunState.FAILED, over)
            return 0
        number, base = self.next_round, self.models[self.record.model_version]
        if self._max_abs is None or self._max_abs[0] != base.version:
            path = self._facilities.files.model_path(self.run_id, base.version)
            self._max_abs = (base.version, await self._facilities.workers.compute(largest_values, path))
        return await self._open(number, base, self._max_abs[1])

    async def _open(self, number: int, base: ModelRecord, max_abs: Mapping[str, float]) -> float:
        """Opens a round from a version with these largest values; seconds until it should be tried again, 0 where it is open."""
        selection = self._surroundings.select(self)
        if not selection.cohort:
            self._say(selection.reason)
            return 0.5
        cohort_config = self.config.cohort
        goal = min(cohort_config.size, len(selection.cohort))
        now = self._facilities.clock.now()
        await self._tick()
        correction = selection.correction
        opened = RoundRecord(
            run_id=self.run_id,
            round=number,
            state=RoundState.TRAINING,
            reason=selection.reason,
            base_version=base.version,
            created_time=now,
            goal=goal,
            quorum=min(cohort_config.quorum, goal),
            grid=make_grid(self.specs, max_abs, self._grid_policy),
            weights=dict(correction.weights) if correction else {},
            weight_unit=correction.unit if correction else 0,
            chances=dict(correction.chances) if correction else {},
            loss_scale=loss_scale(self.config, self.reports),
            phase_seconds={RoundState.SELECTING: self._waited_seconds},
        )
        ids = self._surroundings.client_ids(selection.cohort)
        assignments = [
            self._new_assignment(number, ids[name], name, AssignmentKind.TRAIN, base.version)
            for name in selection.cohort
        ]
        async with self._moving:
            record = replace(self.record, round=number, reason=selection.reason)
            if not await self._write(record, opened, assignments):
                return 0
            self.assignments = {a.assignment_id: a for a in assignments}
            self._note_selected(assignments)
            self._waited_seconds = 0.0
            self._grid = opened.grid
            self._begin_folding()
        logger.info(
            "round opened",
            extra={
                "run": self.record.name,
                "round": number,
                "cohort": list(selection.cohort),
                "learning_rate": learning_rate(self.config, number, self._plateau),
                "reason": selection.reason,
            },
        )
        self._surroundings.assignments_changed(assignments)
        return 0

    def _new_assignment(
        self, number: int, client_id: str, name: str, kind: AssignmentKind, version: int, turn: int = 0
    ) -> AssignmentRecord:
        return AssignmentRecord(
            assignment_id=self._facilities.new_id(),
            run_id=self.run_id,
            round=number,
            client_id=client_id,
            kind=kind,
            state=AssignmentState.OPEN,
            model_version=version,
            created_time=self._facilities.clock.now(),
            seed=client_seed(self.config.seed, number, name, turn),
            learning_rate=(
                learning_rate(self.config, number, self._plateau, name) if kind is AssignmentKind.TRAIN else 0.0
            ),
            turn=turn,
            asked_seconds=self.record.elapsed_seconds,
        )

    async def _close(self, decision: Decision) -> None:
        """Stops taking updates."""
        async with self._moving:
            if self.round is None:  # the run was cancelled meanwhile
                return
            closed = replace(self.round, state=RoundState.AGGREGATING, reason=decision.reason)
            dropped = self._called_off(closed)
            await self._write(self.record, closed, dropped)
        self._surroundings.assignments_changed(dropped)

    def _called_off(self, round: RoundRecord) -> list[AssignmentRecord]:
        """Work that nobody needs any more now that the round is closed or has failed, dropped."""
        how = "failed" if round.state is RoundState.FAILED else "closed"
        return self._dropped(f"round {round.round} {how}: {round.reason}")

    async def _fail_round(self, decision: Decision) -> None:
        async with self._moving:
            if self.round is None:  # the run was cancelled meanwhile
                return
            failed = replace(self.round, state=RoundState.FAILED, reason=decision.reason)
            dropped = self._called_off(failed)
            num_failed = self.record.num_failed_rounds + 1
            record = replace(
                self.record, num_failed_rounds=num_failed, reason=f"round {failed.round} failed: {decision.reason}"
            )
            await self._write(record, failed, dropped)
            self._end_round()
        self._surroundings.garbage_left()
        logger.warning("round failed", extra={"run": record.name, "round": failed.round, "reason": decision.reason})
        self._surroundings.assignments_changed(dropped)
        if num_failed >= self.config.schedule.max_failed_rounds:
            await self._finish(RunState.FAILED, f"{num_failed} rounds in a row failed; the last: {decision.reason}")

    async def _aggregate_and_commit(self) -> None:
        assert self.round is not None
        aggregate, round = await self._folding.finished(), self.round
        for assignment, reason in self._folding.lost:
            await self._set_aside(assignment, reason)
        if aggregate is None or aggregate.num_updates < round.quorum:
            lost = "; ".join(reason for _, reason in self._folding.lost)
            await self._fail_round(
                Decision(Verdict.FAIL, f"fewer updates than the quorum of {round.quorum} are left: {lost}")
            )
            return
        try:
            await self._facilities.workers.compute(aggregate.prepare)
        except InvalidError as error:
            await self._fail_round(Decision(Verdict.FAIL, str(error)))
            return
        await self._make_and_commit(aggregate)

    async def _make_and_commit(self, aggregate: Aggregator) -> None:
        """Makes the next version of all that there is of the round."""
        assert self.round is not None
        files, round, workers = self._facilities.files, self.round, self._facilities.workers
        version = self.record.model_version + 1
        making = NextVersion(files, self.config, self.specs, self.models[round.base_version], version)
        is_delta = sends_deltas(self.config)
        try:
            with files.disk_errors(f"making version {version}"):
                made = await workers.compute(lambda: making.write_version(aggregate, round.round, self._version_notes))
                if is_averaged(self.config):
                    await workers.compute(making.write_average)
                if isinstance(aggregate, WithVariate):
                    sent = await self.broadcasts.variate(round.base_version)
                    await workers.compute(making.write_variate, aggregate, sent)
            model = ModelRecord(
                run_id=self.run_id,
                version=version,
                round=round.round,
                parent_version=round.base_version,
                digest=made.digest,
                payload_digest=made.identity,
                payload_bytes=made.identity_bytes,
                file_bytes=made.file_bytes,
                created_time=self._facilities.clock.now(),
                num_updates=aggregate.num_updates,
                num_examples=sum(a.num_examples for a in self._received(AssignmentKind.TRAIN)),
                error=made.error,
                gain=made.gain,
                codecs=made.payload.codecs if is_delta else {},
            )
            broadcast = BroadcastRecord(
                run_id=self.run_id,
                version=version,
                base_version=round.base_version if is_delta else WHOLE,
                digest=made.payload.digest.hex(),
                num_bytes=made.payload.total_bytes,
                created_time=model.created_time,
            )
            self._max_abs = (version, made.max_abs)
            await self._tick()
            async with self._moving, self._surroundings.files_lock:
                if self.record.state is not RunState.ACTIVE:
                    return
                await asyncio.gather(*(workers.disk(files.publish, part, path) for part, path in making.written))
                failpoint("before-commit")
                evaluators, committed = await self._commit(model, broadcast)
        finally:
            making.discard()
        logger.info(
            "version committed",
            extra={"run": self.record.name, "round": round.round, "version": version, "updates": model.num_updates}
            | committed.metrics,
        )
        self._surroundings.assignments_changed(evaluators)
        if committed.state is RoundState.COMMITTED:
            await self._retire_versions()

    @property
    def _version_notes(self) -> Mapping[str, str]:
        """What a version's file says of itself besides its number. Takes as long as an accountant does."""
        privacy = self.config.privacy
        if self.round is None or not isinstance(privacy, SitePrivacyConfig):
            return {}
        return {"privacy": sites_claim(privacy.plan(), self.round.round, 2 * self.record.num_parameters)}

    async def _commit(
        self, model: ModelRecord, broadcast: BroadcastRecord
    ) -> tuple[list[AssignmentRecord], RoundRecord]:
        """The transaction that makes the version; its files are durable."""
        assert self.round is not None
        evaluators = self._new_evaluations(self.round, model.version)
        is_last_phase = not evaluators and not self._evaluates_here(model.version)
        committed = replace(
            self.round,
            state=RoundState.COMMITTED if is_last_phase else RoundState.EVALUATING,
            model_version=model.version,
            metrics=self._training_metrics(),
            **self._round_outcome(),
        )
        record = replace(self.record, model_version=model.version, num_failed_rounds=0, reason=committed.reason)
        if is_last_phase:
            record, committed = self._measured(record, committed)
        await self._write(record, committed, evaluators, [model], [broadcast])
        self._folding.end()
        self.assignments |= {a.assignment_id: a for a in evaluators}
        self.models[model.version] = model
        self.broadcasts.remember(broadcast)
        failpoint("after-commit")
        if is_last_phase:
            self._end_round()
        return evaluators, committed

    def _round_outcome(self) -> dict[str, Any]:
        """What else a committed round's record says."""
        return {}

    def _measured(self, record: RunRecord, round: RoundRecord) -> tuple[RunRecord, RoundRecord]:
        """Both after a round that has all its metrics, as a plateau schedule sees it; that the learning rate falls is in the
        round's reason."""
        plateau = plateau_after(self.config, self._plateau, round.round, round.metrics)
        if plateau.factor < record.plateau_factor:
            rate = learning_rate(self.config, round.round + 1, plateau)
            note = f"no gain on {plateau.best}, so the learning rate falls to {rate:g}"
            round = replace(round, reason=f"{round.reason}; {note}")
            logger.info(
                "learning rate falls",
                extra={"run": record.name, "round": round.round, "learning_rate": rate, "best": plateau.best},
            )
        after = replace(
            record,
            plateau_factor=plateau.factor,
            plateau_best=plateau.best,
            plateau_num_without_gain=plateau.num_without_gain,
        )
        return after, round

    def _new_evaluations(self, round: RoundRecord, version: int) -> list[AssignmentRecord]:
        """Evaluation assignments for those of the round's cohort who are there."""
        if self.config.evaluation.at not in ("clients", "both") or not self._is_evaluated(version):
            return []
        now, membership = self._facilities.clock.monotonic(), self._facilities.membership
        return [
            self._new_assignment(
                round.round, a.client_id, self._surroundings.name_of(a.client_id), AssignmentKind.EVALUATE, version
            )
            for a in self.assignments.values()
            if a.kind is AssignmentKind.TRAIN and (membership.is_alive(a.client_id, now) or self._is_fresh(now))
        ]

    def _is_evaluated(self, version: int) -> bool:
        is_last = self.record.round >= self.config.schedule.max_rounds
        return version % self.config.evaluation.every == 0 or is_last

    def _evaluates_here(self, version: int) -> bool:
        return self.config.evaluation.at in ("coordinator", "both") and self._is_evaluated(version)

    async def _evaluate(self, decision: Decision) -> None:
        await self._finish_evaluation(decision)

    async def _finish_evaluation(self, decision: Decision) -> None:
        assert self.round is not None and self.round.model_version is not None
        version, metrics = self.round.model_version, dict(self.round.metrics)
        measured = self._evaluation_metrics()
        notes = [decision.reason]
        if self._evaluates_here(version):
            files = self._facilities.files
            here, note = await self._evaluate_here(files.model_path(self.run_id, version))
            prefix = "coordinator." if self.config.evaluation.at == "both" else ""
            measured |= {prefix + name: value for name, value in here.items()}
            notes.append(note)
            if is_averaged(self.config) and not note:
                here, note = await self._evaluate_here(files.average_path(self.run_id, version))
                measured |= {f"average.{name}": value for name, value in here.items()}
                notes.append(note)
        await self._tick()
        async with self._moving:
            if self.record.state is not RunState.ACTIVE:
                return
            rules = stop_rules(self.config)
            best = Best(self.record.best_version, self.record.best_metric, self.record.num_without_gain)
            best = update_best(best, rules, version, measured)
            finished = replace(
                self.round,
                state=RoundState.COMMITTED,
                metrics=metrics | measured,
                reason="; ".join([self.round.reason, *filter(None, notes)]),
            )
            model = replace(self.models[version], metrics=measured)
            record = replace(
                self.record, best_version=best.version, best_metric=best.metric, num_without_gain=best.num_without_gain
            )
            record, finished = self._measured(record, finished)
            evaluating = [a for a in self.open_assignments() if a.kind is AssignmentKind.EVALUATE]
            dropped = self._dropped(f"evaluation of version {version} is over: {decision.reason}", evaluating)
            await self._write(record, finished, dropped, [model])
            self.models[version] = model
            self._end_round()
        logger.info(
            "version evaluated", extra={"run": record.name, "round": finished.round, "version": version} | measured
        )
        self._surroundings.assignments_changed(dropped)
        await self._retire_versions()

    async def _evaluate_here(self, path: Path) -> tuple[Metrics, str]:
        evaluator = self._facilities.evaluators.get(self.config.workload)
        if evaluator is None:
            return {}, (
                f"not evaluated at the coordinator: it has no workload {self.config.workload!r}; start fed-server with --workload"
            )
        try:
            _, metrics = await asyncio.to_thread(evaluator.evaluate, path, self.config.evaluation.batch_size)
        except FedstreamError as error:
            logger.warning(
                "evaluation at the coordinator failed", extra={"run": self.record.name, "reason": str(error)}
            )
            return {}, f"evaluation at the coordinator failed: {error}"
        return metrics, ""

    async def _retire_versions(self) -> None:
        """Deletes the files of versions beyond the last `keep.versions`, the best one and those that work is based on, and payloads
        that lead nowhere any more."""
        # Clients of buffered rounds are at work on older versions, and their updates are folded as changes of these.
        unfolded = (AssignmentState.OPEN, AssignmentState.RECEIVED) if self.record.state is RunState.ACTIVE else ()
        in_use = {a.model_version for a in self.assignments.values() if a.state in unfolded}
        keep = {*sorted(self.models)[-self.config.keep.versions :], self.record.model_version, *in_use}
        if self.record.best_metric is not None:
            keep.add(self.record.best_version)
        retired = [
            replace(model, is_available=False)
            for model in self.models.values()
            if model.is_available and model.version not in keep
        ]
        retired_broadcasts = self.broadcasts.retire(self.record.model_version, in_use)
        if retired or retired_broadcasts:

            def write(tx: Transaction) -> None:
                for model in retired:
                    tx.put(model)
                for broadcast in retired_broadcasts:
                    tx.put(broadcast)

            await self._facilities.workers.store(write)
            self.models |= {model.version: model for model in retired}
            for broadcast in retired_broadcasts:
                self.broadcasts.remember(broadcast)
        self._surroundings.garbage_left()

    async def _finish(self, state: RunState, reason: str) -> None:
        async with self._moving:
            if self.record.state is not RunState.ACTIVE:
                return
            dropped = self._dropped(reason)
            round = replace(self.round, state=RoundState.FAILED, reason=reason) if self.round is not None else None
            record = replace(self.record, state=state, reason=reason, finished_time=self._facilities.clock.now())
            await self._write(record, round, dropped)
            self.reason = reason
            if round is not None:
                self._end_round()
        logger.info("run ended", extra={"run": self.record.name, "state": state.value, "reason": reason})
        self._surroundings.assignments_changed(dropped)
        self.changed.notify()

    async def _fail_run(self, reason: str) -> None:
        try:
            await self._finish(RunState.FAILED, reason)
        except FedstreamError:
            # The store itself is in trouble (a full disk): say so in memory; the next start tries again.
            logger.exception("could not record that the run failed", extra={"run": self.record.name})
            self.record = replace(self.record, state=RunState.FAILED, reason=reason)
            self.reason = reason
            self.changed.notify()

    async def cancel(self, reason: str) -> None:
        """Ends the run on an operator's word."""
        await self._finish(RunState.CANCELLED, reason)

    # What clients report

    async def receive_update(self, assignment_id: str, *, manifest: Manifest, weight: int) -> AssignmentRecord:
        """Records an update whose file is already durable: the moment from which it counts. The first wins; a repeat gets the
        first record. Raises NoLongerNeededError where the round takes no more."""
        async with self._moving:
            assignment = self.assignments.get(assignment_id)
            if assignment is None:
                raise NoLongerNeededError("the round of this assignment is over")
            if assignment.state is AssignmentState.RECEIVED:
                return assignment
            if assignment.state is not AssignmentState.OPEN:
                raise NoLongerNeededError(assignment.reason)
            place = self._place(assignment)
            update = manifest.update
            assert update is not None
            received = self._as_kept(
                assignment,
                state=AssignmentState.RECEIVED,
                received_time=self._facilities.clock.now(),
                digest=manifest.digest.hex(),
                num_examples=update.num_examples,
                weight=self._weight(weight, place),
                num_steps=update.num_steps,
                is_partial=update.is_partial,
                training_seconds=update.training_seconds,
                metrics=dict(update.metrics),
                uplink_payload_bytes=manifest.total_bytes,
                uplink_raw_bytes=manifest.raw_bytes,
                error=update.error,
                gain=update.gain,
                codecs=manifest.codecs,
                buffer=place.buffer,
                position=place.position,
                staleness=place.staleness,
            )
            failpoint("update-published")
            await self._write(self.record, None, [received])
            self._note_members([received])
            if self.round is not None and received.outcome_round == self.round.round:
                self._folding.put(received)
            self._note_report(received)
        self._surroundings.assignments_changed([received])
        return received

    async def receive_evaluation(self, assignment_id: str, num_examples: int, metrics: Metrics) -> None:
        """Records an evaluation; a repeat changes nothing. Raises NoLongerNeededError where it is over."""
        async with self._moving:
            assignment = self.assignments.get(assignment_id)
            if assignment is None or assignment.state not in (AssignmentState.OPEN, AssignmentState.RECEIVED):
                raise NoLongerNeededError("the evaluation is over")
            if assignment.state is AssignmentState.RECEIVED:
                return
            received = replace(
                assignment,
                state=AssignmentState.RECEIVED,
                received_time=self._facilities.clock.now(),
                num_examples=num_examples,
                metrics=metrics,
            )
            await self._write(self.record, None, [received])
        self._surroundings.assignments_changed([received])

    async def receive_failure(self, assignment_id: str, reason: str, traceback: str) -> None:
        """Records that a client gave up; a repeat, or a word that comes too late, changes nothing."""
        async with self._moving:
            assignment = self.assignments.get(assignment_id)
            if assignment is None or assignment.state is not AssignmentState.OPEN:
                return
            failed = replace(
                assignment,
                state=AssignmentState.FAILED,
                reason=reason,
                traceback=traceback,
                buffer=self._present_buffer,
            )
            await self._write(self.record, None, [failed])
        logger.warning(
            "client failed",
            extra={
                "run": self.record.name,
                "round": failed.round,
                "client": self._surroundings.name_of(failed.client_id),
                "reason": reason,
            },
        )
        self._surroundings.assignments_changed([failed])

    async def receive_divergence(self, assignment_id: str, version: int, digest: str) -> None:
        """A delta did not give a client the version that it should have: an arithmetic that is not ours, or a damaged file. It has
        discarded its model and will be sent a whole one."""
        async with self._moving:
            assignment = self.assignments.get(assignment_id)
            if assignment is None:
                return
            diverged = replace(assignment, has_diverged=True)
            await self._write(self.record, None, [diverged])
        logger.warning(
            "DIVERGED: a client made another model of the deltas, and will be sent a whole one",
            extra={
                "run": self.record.name,
                "client": self._surroundings.name_of(assignment.client_id),
                "version": version,
                "digest": digest[:16],
            },
        )

    def count_download(self, assignment_id: str, digest: str, num_bytes: int) -> None:
        """Counts a payload that an assignment begins to fetch, once."""
        if (assignment_id, digest) in self._fetched or assignment_id not in self.assignments:
            return
        self._fetched.add((assignment_id, digest))
        payload = self.broadcasts.find(digest)
        if payload is not None and payload.base_version == VARIATE:
            raw_bytes = sum(spec.num_bytes for spec in variate_specs(self.specs))
        else:  # sites fetch the variate last
            is_first = self.assignments[assignment_id].downlink_payload_bytes == 0
            raw_bytes = self.record.model_bytes if is_first else 0
        self.count_traffic(assignment_id, downlink_payload_bytes=num_bytes, downlink_raw_bytes=raw_bytes)

    def count_traffic(self, assignment_id: str, **more: int) -> None:
        """Adds to an assignment's byte counters (`downlink_wire_bytes` ...). Written down with its next move, so a crash in between
        may forget some; they are never counted twice."""
        assignment = self.assignments.get(assignment_id)
        if assignment is not None:
            self.assignments[assignment_id] = replace(
                assignment, **{name: getattr(assignment, name) + count for name, count in more.items()}
            )

    # Within a move

    async def _write(
        self,
        record: RunRecord,
        round: RoundRecord | None,
        assignments: Iterable[AssignmentRecord] = (),
        models: Iterable[ModelRecord] = (),
        broadcasts: Iterable[BroadcastRecord] = (),
        charges: Iterable[LedgerRecord] = (),
    ) -> bool:
        """One transaction, then the same in memory. False where the run has ended in the meantime and nothing was written."""
        if self.record.state is not RunState.ACTIVE:
            return False
        changed, is_record_new = list(assignments), record is not self.record
        # What has been counted of the others' traffic goes along with a round's own moves.
        ids = {assignment.assignment_id for assignment in changed}
        traffic = [a for a in self.assignments.values() if a.assignment_id not in ids] if round is not None else []

        def write(tx: Transaction) -> None:
            if is_record_new:
                tx.put(record)
            if round is not None:
                tx.put(round)
            for model in models:
                tx.put(model)
            for broadcast in broadcasts:
                tx.put(broadcast)
            for charge in charges:
                tx.put(charge)
            for assignment in (*changed, *traffic):
                tx.put(assignment)

        await self._facilities.workers.store(write)
        self.record = replace(record, elapsed_seconds=self.record.elapsed_seconds)
        if round is not None:
            self.round = round
        for assignment in changed:
            if assignment.assignment_id in self.assignments:
                self.assignments[assignment.assignment_id] = assignment
        self.changed.notify()
        return True

    def _place(self, assignment: AssignmentRecord) -> Place:
        """Where the assignment's update counts. Raises NoLongerNeededError where it does not."""
        if self.round is None or self.round.round != assignment.round or self.round.state is not RoundState.TRAINING:
            raise NoLongerNeededError(f"round {assignment.round} of run {self.record.name} takes no more updates")
        return OWN_ROUND

    def _weight(self, weight: int, place: Place) -> int:
        """What an update counts that has this weight by itself."""
        return weight

    def _as_kept(self, assignment: AssignmentRecord, **told: Any) -> AssignmentRecord:
        """The record of an update, with what was told of it."""
        return replace(assignment, **told)

    @property
    def _present_buffer(self) -> int:
        """In whose time work comes to nothing now, as its record has it."""
        return OWN_ROUND.buffer

    def _dropped(self, reason: str, which: Iterable[AssignmentRecord] | None = None) -> list[AssignmentRecord]:
        """All that are open, or some of them, as they are when they are dropped."""
        return [
            replace(a, state=AssignmentState.DROPPED, reason=reason, buffer=self._present_buffer)
            for a in (self.open_assignments() if which is None else which)
        ]

    def _end_round(self) -> None:
        assert self.round is not None
        number = self.round.round
        stays = {
            a.assignment_id: a
            for a in self.assignments.values()
            if a.state is AssignmentState.OPEN or a.outcome_round > number
        }
        for assignment_id in self.assignments.keys() - stays.keys():
            self._facilities.membership.forget(assignment_id)
        self._folding.end()
        self._fetched = {(assignment_id, digest) for assignment_id, digest in self._fetched if assignment_id in stays}
        self.round, self.assignments = None, stays

    def _begin_folding(self) -> None:
        self._folding.begin(self._new_aggregate)

    @property
    def _divisor(self) -> int | None:
        """What a mean's sum is divided by, where that is not the sum of weights."""
        return None

    def _new_aggregate(self) -> Aggregator:
        assert self.round is not None
        aggregation = self.config.aggregation
        rules = merge_rules(self.specs, [(m.pattern, m.rule) for m in aggregation.merge])
        scratch_folder = self._facilities.files.scratch_folder
        setting = AggregatorSetting(
            self.specs,
            self.round.grid,
            rules,
            scratch_folder,
            self._sum_memory,
            loss_weighting=loss_weighting(self.config, self.round.loss_scale),
            divisor=self._divisor,
            learning_rate=self.config.training.optimizer.learning_rate,
        )
        aggregator = new_aggregator(setting, aggregation)
        if self.round.weight_unit:
            return Corrected(aggregator, self.round.weight_unit)
        if self._has_variate:
            return WithVariate(aggregator, setting, variate_grid(self.round.grid, self._grid_policy, self._least_work))
        return Normalized(aggregator) if self._is_normalized else aggregator

    # Metrics

    def _training_metrics(self) -> Metrics:
        received = self._received(AssignmentKind.TRAIN)
        return {f"train.{name}": value for name, value in mean_metrics(received).items()}

    def _evaluation_metrics(self) -> Metrics:
        return mean_metrics(self._received(AssignmentKind.EVALUATE))

    def _received(self, kind: AssignmentKind) -> list[AssignmentRecord]:
        """What is part of the round."""
        number = self.round.round if self.round is not None else 0
        received = [
            a
            for a in self.assignments.values()
            if a.kind is kind and a.state is AssignmentState.RECEIVED and a.outcome_round == number
        ]
        return sorted(received, key=lambda a: self._surroundings.name_of(a.client_id))


def _doing(phase: str, done: int, total: int) -> str:
    return f"{phase} {100 * done // total} %" if total > 0 else phase
