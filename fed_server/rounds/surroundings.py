"""What a run works with, and what it asks of the coordinator that it lives in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fed_server.clock import Clock
from fed_server.rounds.cohort import Selection
from fed_server.rounds.membership import Membership
from fed_server.rounds.workers import Workers
from fed_server.store.base import AssignmentRecord, Metrics
from fed_server.store.blobs import DataDirectory

if TYPE_CHECKING:
    from fed_server.rounds.run import LiveRun


class ModelEvaluator(Protocol):
    """Evaluates a model on data that the coordinator has."""

    def evaluate(self, model_path: Path, batch_size: int) -> tuple[int, Metrics]:
        """Number of examples and mean metrics of a model file (safetensors); blocks."""
        ...


@dataclass(frozen=True)
class Facilities:
    """What every run works with. `evaluators` are by workload name."""

    workers: Workers
    files: DataDirectory
    clock: Clock
    membership: Membership
    evaluators: Mapping[str, ModelEvaluator]
    new_id: Callable[[], str]


class Surroundings(Protocol):
    """The coordinator as a run sees it. `files_lock` is held from the publication of a file until the transaction that refers
    to it."""

    files_lock: asyncio.Lock
    ledger_lock: asyncio.Lock
    """Held from the reading of what a population spent until the transaction that charges it."""

    is_draining: bool
    """Whether no more work is to be begun."""

    def select(self, run: LiveRun) -> Selection:
        """The cohort of the run's next round, or whom a buffered run asks next, in turn with the other runs."""
        ...

    def keep_none(self, run: LiveRun) -> None:
        """Gives back what `select` promised the run."""
        ...

    def client_ids(self, names: Iterable[str]) -> dict[str, str]:
        """Ids of clients by name."""
        ...

    def name_of(self, client_id: str) -> str:
        """Name of a client."""
        ...

    def assignments_changed(self, assignments: Iterable[AssignmentRecord]) -> None:
        """Tells the pollers."""
        ...

    def garbage_left(self) -> None:
        """Says that there are files that nobody needs any longer; they are deleted in the background."""
        ...
