"""What the daemon tells the coordinator besides updates: progress, which may be lost, and verdicts, which may not.

Both have a thread of their own, so that work never waits for the line.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from fed_client.backoff import Backoff
from fed_client.transport import Transport
from fed_client.work import Held
from fed_core.errors import (
    FedstreamError,
    InvalidError,
    NoLongerNeededError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    WrongPhaseError,
)
from fedstream.v1 import common_pb2, participation_pb2

MIN_PROGRESS_SECONDS = 1.0
# A training that has nothing new to say still renews its lease.
HEARTBEAT_SECONDS = 10.0
# What the contract takes; more is cut here rather than refused there.
MAX_MESSAGE_BYTES = 2 * 2**10
MAX_TRACEBACK_BYTES = 32 * 2**10
MAX_PROGRESS_METRICS = 16

Fatal = Callable[[FedstreamError], None]
OnStop = Callable[[str, str], None]


@dataclass
class _Progress:
    phase: common_pb2.WorkPhase.ValueType
    done: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_new: bool = True
    sent_at: float = float("-inf")


class ProgressReporter:
    """Sends the latest progress of each assignment, at most once a second; a failed report is replaced by the next."""

    def __init__(self, transport: Transport, on_stop: OnStop, fatal: Fatal) -> None:
        """`on_stop(assignment id, reason)` is called where the coordinator wants the work no longer."""
        self._transport = transport
        self._on_stop = on_stop
        self._fatal = fatal
        self._changed = threading.Condition()
        self._latest: dict[str, _Progress] = {}
        self._is_closed = False

    def update(
        self,
        assignment_id: str,
        phase: common_pb2.WorkPhase.ValueType,
        done: int = 0,
        total: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Notes how far an assignment is. Never blocks."""
        with self._changed:
            progress = self._latest.setdefault(assignment_id, _Progress(phase))
            progress.phase, progress.done, progress.total, progress.is_new = phase, done, total, True
            progress.metrics = metrics or {}
            self._changed.notify()

    def forget(self, assignment_id: str) -> None:
        """Nothing more to say about an assignment."""
        with self._changed:
            self._latest.pop(assignment_id, None)

    def snapshot(self) -> dict[str, tuple[common_pb2.WorkPhase.ValueType, int, int]]:
        """Phase, done and total of every assignment, for `fed-client status`."""
        with self._changed:
            return {key: (each.phase, each.done, each.total) for key, each in self._latest.items()}

    def close(self) -> None:
        """Ends `run`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def run(self) -> None:
        """The thread: sends until closed."""
        while True:
            request = self._next()
            if request is None:
                return
            try:
                answer = self._transport.report_progress(request)
            except UnauthenticatedError as error:
                self._fatal(error)
                return
            except (NotFoundError, PermissionDeniedError) as error:
                self._on_stop(request.assignment_id, f"the coordinator does not know it: {error}")
            except FedstreamError as error:
                structlog.get_logger().debug(
                    "progress not delivered", assignment=request.assignment_id, error=str(error)
                )
            else:
                if answer.should_stop:
                    self._on_stop(request.assignment_id, answer.reason or "no longer wanted")

    def _next(self) -> participation_pb2.ReportProgressRequest | None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                wait = HEARTBEAT_SECONDS
                for assignment_id, progress in self._latest.items():
                    due_in = progress.sent_at + (MIN_PROGRESS_SECONDS if progress.is_new else HEARTBEAT_SECONDS) - now
                    if due_in <= 0:
                        progress.is_new, progress.sent_at = False, now
                        return participation_pb2.ReportProgressRequest(
                            assignment_id=assignment_id,
                            phase=progress.phase,
                            done=progress.done,
                            total=progress.total,
                            metrics=to_metrics(dict(list(progress.metrics.items())[:MAX_PROGRESS_METRICS])),
                        )
                    wait = min(wait, due_in)
                self._changed.wait(wait)
            return None


Verdict = participation_pb2.ReportFailureRequest | participation_pb2.ReportEvaluationRequest
"""The last word on an assignment: a failure, or the result of an evaluation."""


class Outbox:
    """Delivers verdicts until each has an answer. The assignment is held until then, so that no poll brings it back."""

    def __init__(self, transport: Transport, on_done: Callable[[Held], None], fatal: Fatal) -> None:
        self._transport = transport
        self._on_done = on_done
        self._fatal = fatal
        self._pending: deque[tuple[Held, Verdict]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, held: Held, verdict: Verdict) -> None:
        """Takes a verdict; the caller hands the assignment over with it."""
        with self._changed:
            self._pending.append((held, verdict))
            self._changed.notify()

    def close(self) -> None:
        """Ends `run`. What was not delivered is found out again after the next start."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def run(self) -> None:
        """The thread: delivers until closed."""
        backoff = Backoff()
        while True:
            with self._changed:
                while not self._pending and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                held, verdict = self._pending[0]
            try:
                is_answered = self._deliver(held, verdict)
            except UnauthenticatedError as error:
                self._fatal(error)
                return
            if is_answered:
                backoff.reset()
                with self._changed:
                    self._pending.popleft()
                self._on_done(held)
            else:
                with self._changed:
                    if not self._is_closed:
                        self._changed.wait(backoff.next_seconds())

    def _deliver(self, held: Held, verdict: Verdict) -> bool:
        """Whether there is an answer, of whatever kind."""
        log: Any = structlog.get_logger().bind(**held.log_fields)
        try:
            if isinstance(verdict, participation_pb2.ReportFailureRequest):
                self._transport.report_failure(verdict)
                log.info("failure reported", kind=failure_name(verdict.kind))
            else:
                self._transport.report_evaluation(verdict)
                log.info("evaluation delivered", num_examples=verdict.num_examples)
        except (NoLongerNeededError, NotFoundError, PermissionDeniedError, WrongPhaseError, InvalidError) as error:
            log.info("dropped", reason=str(error))
        except UnauthenticatedError:
            raise
        except FedstreamError as error:
            log.warning("report not delivered, trying again", error=str(error))
            return False
        return True


def failure(
    held: Held, kind: participation_pb2.FailureKind.ValueType, message: str, traceback: str = ""
) -> participation_pb2.ReportFailureRequest:
    """Gives an assignment up; cut to what the contract takes."""
    return participation_pb2.ReportFailureRequest(
        assignment_id=held.assignment_id,
        kind=kind,
        message=message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore"),
        # The end of a traceback says what happened.
        traceback=traceback.encode()[-MAX_TRACEBACK_BYTES:].decode(errors="ignore"),
    )


def evaluation(
    held: Held, num_examples: int, metrics: Mapping[str, float]
) -> participation_pb2.ReportEvaluationRequest:
    """Delivers the result of an evaluation."""
    return participation_pb2.ReportEvaluationRequest(
        assignment_id=held.assignment_id, num_examples=num_examples, metrics=to_metrics(metrics)
    )


def to_metrics(metrics: Mapping[str, float]) -> list[common_pb2.Metric]:
    """Metrics as the contract has them."""
    return [common_pb2.Metric(name=name, value=value) for name, value in metrics.items()]


def failure_name(kind: participation_pb2.FailureKind.ValueType) -> str:
    """`WORKLOAD` for FAILURE_KIND_WORKLOAD."""
    return participation_pb2.FailureKind.Name(kind).removeprefix("FAILURE_KIND_")


def failure_kind(name: str) -> participation_pb2.FailureKind.ValueType:
    """FAILURE_KIND_WORKLOAD for `WORKLOAD`, and for any name that is none."""
    try:
        return participation_pb2.FailureKind.Value(f"FAILURE_KIND_{name}")
    except ValueError:
        return participation_pb2.FAILURE_KIND_WORKLOAD
