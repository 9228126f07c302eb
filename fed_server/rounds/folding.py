"""Folding durable updates into the open round's aggregate, one after the other, while others still upload."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from fed_core.errors import DiskFullError, FedstreamError
from fed_core.payload.reader import PayloadReader
from fed_core.payload.verify import verify_file
from fed_server.aggregation.base import Aggregator
from fed_server.rounds.workers import Workers
from fed_server.store.base import AssignmentRecord
from fed_server.store.blobs import DataDirectory

logger = logging.getLogger(__name__)

MakeAggregate = Callable[[], Aggregator]
OpenUpdate = Callable[[AssignmentRecord], AbstractContextManager[PayloadReader]]


class Folding:
    """The aggregate of one run's open round and the queue before it. The aggregate is model-sized and the only thing here that
    is; it is made anew from the stored updates after a crash, to the same bits."""

    def __init__(self, workers: Workers, files: DataDirectory, name_of: Callable[[str], str]) -> None:
        self._workers = workers
        self._files = files
        self._name_of = name_of
        # Each with the number of the opening it belongs to: one that still waits when its round ends is no part of the next.
        # None stands for what is done before the first update comes.
        self._queue: asyncio.Queue[tuple[int, AssignmentRecord | None]] = asyncio.Queue()
        self._opening = 0
        self._make: MakeAggregate | None = None
        self._open: OpenUpdate = self._open_as_it_is
        self._early: Callable[[Aggregator], None] | None = None
        self._aggregate: Aggregator | None = None
        self._folded: list[AssignmentRecord] = []
        # Those that there was no disk for, with what was said then.
        self._waiting: list[AssignmentRecord] = []
        self._disk_full: DiskFullError | None = None
        self.lost: list[tuple[AssignmentRecord, str]] = []
        """Updates that were stored and cannot be read any more, each with a sentence that says why."""

    def begin(
        self,
        make: MakeAggregate,
        open_update: OpenUpdate | None = None,
        early: Callable[[Aggregator], None] | None = None,
    ) -> None:
        """Opens a round; `make` makes an empty aggregate, and `open_update` opens an update that is to be folded, where that is not
        simply its file. `early` is done with the aggregate while the clients still train, on one of the threads for tensors."""
        self._opening += 1
        self._open, self._early = open_update or self._open_as_it_is, early
        self._make, self._aggregate, self._folded, self.lost, self._waiting = make, make(), [], [], []
        if early is not None:
            self._queue.put_nowait((self._opening, None))

    def end(self) -> None:
        """Closes the round; what still waits in the queue is passed over."""
        self._opening += 1
        self._make, self._aggregate, self._folded, self.lost, self._waiting = None, None, [], [], []

    def put(self, update: AssignmentRecord) -> None:
        """Queues a durable update."""
        self._queue.put_nowait((self._opening, update))

    async def finished(self) -> Aggregator | None:
        """The aggregate of everything that was put; None where no update could be folded. Raises DiskFullError where an aggregator
        that keeps its updates on disk has no room for one; another call tries again."""
        waiting, self._waiting = self._waiting, []
        for update in waiting:
            self.put(update)
        await self._queue.join()
        if self._waiting and self._disk_full is not None:
            raise self._disk_full
        return self._aggregate if self._aggregate is not None and self._aggregate.can_report() else None

    async def run(self) -> None:
        """Folds until cancelled."""
        while True:
            opening, update = await self._queue.get()
            try:
                if opening != self._opening or self._aggregate is None:
                    continue
                if update is not None:
                    await self._fold_one(opening, update, self._aggregate)
                elif self._early is not None:
                    await self._workers.compute(self._early, self._aggregate)
            finally:
                self._queue.task_done()

    async def _fold_one(self, opening: int, update: AssignmentRecord, aggregate: Aggregator) -> None:
        try:
            await self._workers.compute(self._fold, update, aggregate)
            if opening == self._opening:
                self._folded.append(update)
        except DiskFullError as error:
            # No fault of the update's, and the aggregate is as it was.
            if opening == self._opening:
                self._waiting.append(update)
                self._disk_full = error
        except (FedstreamError, OSError) as error:
            # Verified when it came, unreadable now: the disk lost it. Part of it may be in the sums, so they begin anew.
            reason = f"the coordinator's copy of this update cannot be read: {error}"
            logger.error("stored update lost", extra={"client": self._name_of(update.client_id), "reason": reason})
            if opening == self._opening and self._make is not None:
                self.lost.append((update, reason))
                self._aggregate, again, self._folded = self._make(), self._folded, []
                for earlier in again:
                    self._queue.put_nowait((opening, earlier))

    def _fold(self, update: AssignmentRecord, aggregate: Aggregator) -> None:
        with (
            self._open(update) as reader,
            self._files.disk_errors("keeping the updates of a round side by side"),
        ):
            aggregate.add(reader, update.weight)

    def _open_as_it_is(self, update: AssignmentRecord) -> PayloadReader:
        return PayloadReader(self._files.update_path(update.assignment_id))

    async def damage(self, update: AssignmentRecord) -> str:
        """What is wrong with a stored update, empty where it verifies. For updates of before a start: the disk may have lost what
        it had promised."""
        path = self._files.update_path(update.assignment_id)
        try:
            await self._workers.disk(verify_file, path, bytes.fromhex(update.digest))
        except (FedstreamError, OSError) as error:
            return f"the coordinator's copy of this update is damaged: {error}"
        return ""
