"""The assignments that the daemon holds, and who may touch each of them.

    QUEUED -> DOWNLOADING -> TRAINING -> SPOOLED -> UPLOADING -> finished
       ^          |       -> EVALUATING ----------------------> finished
       +----------+  the way to the model was lost: waits for a newer poll answer

An assignment is in the hands of at most one thread: the worker from QUEUED to SPOOLED, the uploader from SPOOLED on, the outbox
while a failure or an evaluation is being delivered. Whoever drops it only sets its `stop`; the thread that has it in hand cleans
up. An id that was finished or dropped is never begun again: a poll answer may have been written before its receipt.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from fed_client.spool import SpooledUpdate
from fed_client.stop import Stop
from fedstream.v1 import common_pb2, participation_pb2

_REMEMBERED = 4096
_NOT_BEGUN = (common_pb2.WORK_PHASE_QUEUED, common_pb2.WORK_PHASE_DOWNLOADING)


@dataclass
class Held:
    """An assignment at this site. What changes of it changes under the table's lock only, `assignment` too."""

    assignment: participation_pb2.Assignment
    phase: common_pb2.WorkPhase.ValueType = common_pb2.WORK_PHASE_QUEUED
    spooled: SpooledUpdate | None = None
    is_in_hand: bool = False
    # Nobody takes it before a poll that is asked from now on has been answered.
    is_waiting: bool = False
    # How often the way to its model was lost.
    num_lost: int = 0
    stop: Stop = field(default_factory=Stop)
    # Whether the site is to protect its data by itself, and so says no more of its work than it must; whoever asked for it once
    # cannot take it back.
    protects_data: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.protects_data = self.assignment.plan.HasField("privacy")

    @property
    def assignment_id(self) -> str:
        """Its id."""
        return self.assignment.assignment_id

    @property
    def log_fields(self) -> dict[str, Any]:
        """What every line of the log about it says."""
        return {"run": self.assignment.run_id, "round": self.assignment.round, "assignment": self.assignment_id}


class WorkTable:
    """Thread-safe; its lock guards dictionaries only."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._is_closed = False

    def add(self, held: Held) -> bool:
        """Takes an assignment in; False where it is held, or was finished or dropped before."""
        with self._changed:
            if self._is_closed or held.assignment_id in self._held or held.assignment_id in self._finished:
                return False
            self._held[held.assignment_id] = held
            self._changed.notify_all()
            return True

    def held(self) -> list[Held]:
        """Everything held and not dropped, the oldest first."""
        with self._changed:
            return [held for held in self._held.values() if not held.stop.is_set]

    def take(self, phase: common_pb2.WorkPhase.ValueType) -> Held | None:
        """Waits for an assignment that is in this phase and in nobody's hands, and puts it in the caller's. None once closed."""
        with self._changed:
            while not self._is_closed:
                for held in self._held.values():
                    if held.phase == phase and not (held.is_in_hand or held.is_waiting or held.stop.is_set):
                        held.is_in_hand = True
                        return held
                self._changed.wait()
            return None

    def move(self, held: Held, phase: common_pb2.WorkPhase.ValueType) -> None:
        """Notes what is being done; the caller has it in hand."""
        with self._changed:
            held.phase = phase

    def release(self, held: Held, phase: common_pb2.WorkPhase.ValueType, spooled: SpooledUpdate | None = None) -> None:
        """Puts it down for whoever takes that phase. Where it was dropped, raises StoppedError and leaves it in hand."""
        with self._changed:
            held.stop.check()
            held.phase = phase
            held.spooled = spooled or held.spooled
            held.is_in_hand = False
            self._changed.notify_all()

    def wait_for_answer(self, held: Held) -> None:
        """Puts it down, back in the queue, until `refresh` brings a newer answer. Where it was dropped, raises StoppedError and
        leaves it in hand."""
        with self._changed:
            held.stop.check()
            held.phase, held.is_in_hand, held.is_waiting = common_pb2.WORK_PHASE_QUEUED, False, True
            held.num_lost += 1

    def refresh(self, assignment: participation_pb2.Assignment, *, ends_wait: bool) -> bool:
        """Takes over what a poll answer says of an assignment that is held, unless its model is in use already; whether that
        changed anything. One that waits is touched only with `ends_wait`: the question came after it had begun to wait."""
        with self._changed:
            held = self._held.get(assignment.assignment_id)
            if held is None or held.stop.is_set or held.phase not in _NOT_BEGUN or (held.is_waiting and not ends_wait):
                return False
            before = held.assignment
            has_changed = held.is_waiting or (before.model, before.variate) != (assignment.model, assignment.variate)
            held.assignment, held.is_waiting = assignment, False
            held.protects_data |= assignment.plan.HasField("privacy")
            self._changed.notify_all()
            return has_changed

    def finish(self, held: Held) -> None:
        """Forgets it, and remembers that it is done."""
        with self._changed:
            self._held.pop(held.assignment_id, None)
            self._remember(held.assignment_id)
            self._changed.notify_all()

    def drop(self, assignment_id: str, reason: str) -> Held | None:
        """Nobody wants it any longer. Returns it where the caller must clean up because it was in nobody's hands; where it is
        in someone's, tells that thread to stop."""
        with self._changed:
            held = self._held.get(assignment_id)
            if held is None or held.stop.is_set:
                return None
            is_in_hand = held.is_in_hand
            self._remember(assignment_id)
            if not is_in_hand:
                del self._held[assignment_id]
            # Marked under the lock, so that it cannot be put down in between; called outside, for an interrupt may take its time.
            interrupts = held.stop.mark(reason)
        for interrupt in interrupts:
            interrupt()
        return None if is_in_hand else held

    def close(self, reason: str) -> None:
        """The daemon stops: wakes those who wait, interrupts those who work. Nothing is forgotten."""
        with self._changed:
            self._is_closed = True
            held = list(self._held.values())
            self._changed.notify_all()
        for each in held:
            each.stop.set(reason)

    @property
    def is_closed(self) -> bool:
        """Whether the daemon is stopping."""
        return self._is_closed

    def _remember(self, assignment_id: str) -> None:
        self._finished[assignment_id] = None
        if len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)
