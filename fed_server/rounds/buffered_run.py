"""A run whose rounds are buffers: what its driver does otherwise. The rules are in `buffered`."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from fed_core.errors import NoLongerNeededError
from fed_core.payload.reader import PayloadReader
from fed_core.safetensors_tiles import SafetensorsReader
from fed_server.aggregation.grid import make_grid
from fed_server.aggregation.rebased import RebasedUpdate
from fed_server.aggregation.staleness import ONE, staleness_weights
from fed_server.config import BufferedConfig, RunConfig
from fed_server.rounds.buffered import (
    BufferView,
    Place,
    decide_buffer,
    first_opening,
    place_of,
    select_next,
    staleness_metrics,
    too_stale,
    widest,
)
from fed_server.rounds.cohort import Candidates, Selection
from fed_server.rounds.decide import Decision, Verdict
from fed_server.rounds.run import LiveRun
from fed_server.rounds.surroundings import Facilities, Surroundings
from fed_server.store.base import (
    AssignmentKind,
    AssignmentRecord,
    AssignmentState,
    Metrics,
    ModelRecord,
    RoundRecord,
    RoundState,
    RunRecord,
    RunState,
)

logger = logging.getLogger(__name__)


class BufferedRun(LiveRun):
    """A round is a buffer. It opens with nobody asked; clients are asked all the time, each with the newest version, and their
    assignments live from round to round."""

    def __init__(
        self, facilities: Facilities, surroundings: Surroundings, record: RunRecord, config: RunConfig
    ) -> None:
        super().__init__(facilities, surroundings, record, config)
        assert isinstance(config.rounds, BufferedConfig)
        self._rounds = config.rounds
        self._weights = staleness_weights(config.rounds.staleness, config.rounds.max_staleness)

    # What others read

    @property
    def wants_clients(self) -> bool:
        """Whether too few are at work."""
        return self.record.state is RunState.ACTIVE and self._num_wanted() > 0

    def deadline_seconds(self) -> float:
        """A buffer has no deadline: -1."""
        return -1.0

    def seconds_left(self, assignment: AssignmentRecord) -> float:
        """See `LiveRun.seconds_left`."""
        return self.config.schedule.deadline_seconds - (self.record.elapsed_seconds - assignment.asked_seconds)

    def choose_next(self, candidates: Candidates, *, is_settling: bool) -> Selection:
        """Whom to ask now so that enough are at work."""
        number, cohort, name_of = self.record.round, self.config.cohort, self._surroundings.name_of
        return select_next(
            candidates,
            seed=self.config.seed,
            round=number,
            count=self._num_wanted(),
            min_clients=cohort.min_clients,
            is_settling=is_settling,
            selection=cohort.selection,
            turns=self.turns,
            at_work={name_of(a.client_id) for a in self.open_assignments()},
            asked=self._times_asked(number),
            failed={name_of(a.client_id) for a in self._failed_in(number)},
        )

    # Buffers

    async def _open(self, number: int, base: ModelRecord, max_abs: Mapping[str, float]) -> float:
        opened = RoundRecord(
            run_id=self.run_id,
            round=number,
            state=RoundState.TRAINING,
            reason="the buffer is open",
            base_version=base.version,
            created_time=self._facilities.clock.now(),
            goal=self.config.cohort.size,
            quorum=self.config.cohort.quorum,
            grid=widest(make_grid(self.specs, max_abs, self._grid_policy), self._grid),
        )
        await self._tick()
        async with self._moving:
            if not await self._write(replace(self.record, round=number, reason=opened.reason), opened):
                return 0
            self._waited_seconds = 0.0
            self._grid = opened.grid
            self._begin_folding()
            for update in self._received(AssignmentKind.TRAIN):  # those that came while the last version was made
                self._folding.put(update)
        logger.info("buffer opened", extra={"run": self.record.name, "round": number, "base_version": base.version})
        return 0

    async def _decide(self) -> Decision:
        await self._drop_late()
        asking = await self._ask_clients()
        if self.round is None:
            return Decision(Verdict.WAIT, self.reason)  # the run was cancelled meanwhile
        return decide_buffer(
            BufferView(
                goal=self.round.goal,
                quorum=self.round.quorum,
                staleness=[a.staleness for a in self._received(AssignmentKind.TRAIN)],
                at_work=[self._member(a) for a in self.open_assignments()],
                failed=[self._member(a) for a in self._failed_in(self.round.round)],
                asking=asking,
            )
        )

    def _called_off(self, round: RoundRecord) -> list[AssignmentRecord]:
        """Only what can count no more: the next buffer's updates are added to the version that is about to be made."""
        if round.state is RoundState.FAILED:
            return []
        dropped = []
        for assignment in self.open_assignments():
            if late := too_stale(round.base_version + 1 - assignment.model_version, self._rounds.max_staleness):
                dropped += self._dropped(late, [assignment])
        return dropped

    async def _evaluate(self, decision: Decision) -> None:
        """Evaluates while clients are asked to train from the version that is evaluated."""
        evaluation = asyncio.create_task(self._finish_evaluation(decision))
        evaluation.add_done_callback(lambda _: self.changed.notify())
        try:
            while not evaluation.done():
                seen = self.changed.count
                await self._drop_late()
                await self._ask_clients()
                if not evaluation.done():
                    await self.changed.wait(seen, 1.0)
        finally:
            evaluation.cancel()
        await evaluation

    async def _finish(self, state: RunState, reason: str) -> None:
        await super()._finish(state, reason)
        await self._retire_versions()  # nobody works on old ones any longer

    # Who is at work

    async def _drop_late(self) -> None:
        """Gives up those who are over their deadline."""
        limit = self.config.schedule.deadline_seconds
        async with self._moving:
            late = [a for a in self.open_assignments() if self.seconds_left(a) <= 0]
            dropped = self._dropped(f"no update within the deadline of {limit:g} s", late)
            if dropped:
                await self._write(self.record, None, dropped)
        self._surroundings.assignments_changed(dropped)

    async def _ask_clients(self) -> Selection:
        """Has enough clients at work, those who are asked now with the newest version."""
        if self._num_wanted() <= 0:
            return Selection((), "enough clients are at work")
        selection = self._surroundings.select(self)
        if not selection.cohort:
            return selection
        ids = self._surroundings.client_ids(selection.cohort)
        async with self._moving:
            if self.round is None:  # the run was cancelled meanwhile
                return selection
            number, version = self.round.round, self.record.model_version
            asked = self._times_asked(number)
            assignments = [
                self._new_assignment(number, ids[name], name, AssignmentKind.TRAIN, version, asked.get(name, 0))
                for name in selection.cohort
            ]
            if not await self._write(self.record, None, assignments):
                return selection
            self.assignments |= {a.assignment_id: a for a in assignments}
            self._note_selected(assignments)
        self._surroundings.assignments_changed(assignments)
        return selection

    def _num_wanted(self) -> int:
        """How many more clients should be at work. None where a version is about to be made: they would begin with an old one."""
        if self.round is None or self.round.state is RoundState.AGGREGATING:
            return 0
        if self.round.state is RoundState.TRAINING and len(self._received(AssignmentKind.TRAIN)) >= self.round.goal:
            return 0
        return self._rounds.concurrency - sum(self._member(a).is_alive for a in self.open_assignments())

    def _times_asked(self, number: int) -> dict[str, int]:
        return Counter(self._surroundings.name_of(a.client_id) for a in self.assignments.values() if a.round == number)

    def _failed_in(self, number: int) -> list[AssignmentRecord]:
        failed = (AssignmentState.FAILED, AssignmentState.DROPPED)
        return [a for a in self.assignments.values() if a.state in failed and a.outcome_round == number]

    # Updates

    def _place(self, assignment: AssignmentRecord) -> Place:
        num_in = Counter(a.buffer for a in self.assignments.values() if a.state is AssignmentState.RECEIVED)
        place = place_of(
            assignment.model_version,
            first_opening(self.round, self.next_round, self.record.model_version),
            num_in,
            self.config.cohort.size,
        )
        if late := too_stale(place.staleness, self._rounds.max_staleness):
            raise NoLongerNeededError(late)
        return place

    def _weight(self, weight: int, place: Place) -> int:
        return self._weights[place.staleness]

    @property
    def _present_buffer(self) -> int:
        return self.record.round

    @property
    def _divisor(self) -> int | None:
        return self.config.cohort.size * ONE

    def _begin_folding(self) -> None:
        self._folding.begin(self._new_aggregate, self._open_rebased)

    @contextmanager
    def _open_rebased(self, update: AssignmentRecord) -> Iterator[PayloadReader]:
        """An update as one of the version that the open buffer is added to."""
        assert self.round is not None
        files, newest = self._facilities.files, self.round.base_version
        path = files.update_path(update.assignment_id)
        if update.model_version == newest:
            with PayloadReader(path) as reader:
                yield reader
            return
        with (
            SafetensorsReader(files.model_path(self.run_id, update.model_version)) as began_with,
            SafetensorsReader(files.model_path(self.run_id, newest)) as added_to,
            RebasedUpdate(path, began_with, added_to) as reader,
        ):
            yield reader

    def _training_metrics(self) -> Metrics:
        staleness = [a.staleness for a in self._received(AssignmentKind.TRAIN)]
        return super()._training_metrics() | staleness_metrics(staleness)
