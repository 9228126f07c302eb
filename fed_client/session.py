"""The daemon's standing with its coordinator: the enrolment, and the poll that brings work and takes it away."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from fed_client.backoff import Backoff
from fed_client.cache import ModelCache
from fed_client.question import Question
from fed_client.reports import Fatal
from fed_client.settings import Settings
from fed_client.state import Identity, StateDirectory, checked_id
from fed_client.stop import Stop, StoppedError
from fed_client.transport import Transport
from fed_client.work import Held, WorkTable
from fed_core.errors import (
    BusyError,
    ConflictError,
    FedstreamError,
    InternalError,
    InvalidError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from fedstream.v1 import common_pb2, participation_pb2

# An answer that comes at once and changes nothing is a difference that we cannot resolve; asking on would be a hot loop.
_IDLE_ANSWER_SECONDS = 1.0
# Until the coordinator has said how long it really is.
_FIRST_LEASE_SECONDS = 20.0
SKEW_SECONDS = 60.0

OnRefused = Callable[[Held, str], None]


def software_version() -> str:
    """Version of the installed package; empty in a bare checkout."""
    try:
        return importlib.metadata.version("fedstream")
    except importlib.metadata.PackageNotFoundError:
        return ""


def enroll(settings: Settings, state: StateDirectory, stop: Stop, *, give_up_after: float | None = None) -> Identity:
    """The site's identity: the stored one, or one got for the join token, tried until the coordinator answers.

    Raises UnauthenticatedError (token missing or unknown), ConflictError (the name is taken), UnavailableError after
    `give_up_after` seconds, ConfigError.
    """
    identity = state.identity()
    if identity is not None:
        if identity.server != settings.server:
            structlog.get_logger().info(
                "identity was made elsewhere", enrolled_at=identity.server, server=settings.server
            )
        return identity
    token = settings.read_join_token()
    if token is None:
        raise UnauthenticatedError(
            f"this site has no identity yet in {state.root}: give the join token that fed-server printed, with --join-token, "
            "--join-token-file or FED_CLIENT_JOIN_TOKEN"
        )
    request_id = state.enrollment_request_id()
    transport = Transport(settings)
    backoff = Backoff()
    began = time.monotonic()
    try:
        with stop.interrupting(transport.close):
            while True:
                try:
                    answer = transport.enroll(request_id, token, settings.name)
                    break
                except (UnavailableError, BusyError, InternalError) as error:
                    stop.check()
                    if give_up_after is not None and time.monotonic() - began >= give_up_after:
                        raise UnavailableError(
                            f"{settings.server} does not answer: {error}; try fed-client doctor"
                        ) from error
                    if backoff.attempts in (1, 10):
                        structlog.get_logger().warning(
                            "coordinator not reachable, trying on",
                            server=settings.server,
                            error=str(error),
                            cure="fed-client doctor",
                        )
                    stop.wait(backoff.next_seconds())
                except UnauthenticatedError as error:
                    raise UnauthenticatedError(
                        f"the join token was refused: {error}; ask for the one that fed-server printed"
                    ) from error
                except ConflictError as error:
                    raise ConflictError(
                        f"{error}. If this is the same site, restore its identity.json to {state.root}; else choose another --name"
                    ) from error
    finally:
        transport.close()
    identity = Identity(answer.client_id, answer.secret, settings.name, settings.server)
    state.store_identity(identity)
    structlog.get_logger().info(
        "enrolled", client=identity.client_id, name=identity.name, server=settings.server, state_dir=str(state.root)
    )
    return identity


class PollLoop:
    """Asks for work and applies the answer: the full desired set. Level-triggered: a lost or repeated answer is harmless."""

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        table: WorkTable,
        cache: ModelCache,
        question: Question,
        *,
        on_dropped: Callable[[str, str], None],
        on_refused: OnRefused,
        fatal: Fatal,
    ) -> None:
        """`on_dropped(assignment id, reason)` ends what is no longer wanted; `on_refused` reports what this site cannot do."""
        self._settings = settings
        self._transport = transport
        self._table = table
        self._cache = cache
        self._question = question
        self._on_dropped = on_dropped
        self._on_refused = on_refused
        self._fatal = fatal
        self._stop = Stop()
        self._lease_seconds = _FIRST_LEASE_SECONDS
        self._idle_reason: str | None = None
        self._said_skew = False
        self.last: dict[str, Any] = {}
        """What `fed-client status` shows of the last answer."""

    def close(self) -> None:
        """Ends `run`; the caller closes the transport, and with it the poll in flight."""
        self._stop.set("the daemon stops")

    def run(self, workloads: Mapping[str, str]) -> None:
        """The thread: polls until closed. `workloads` maps the names offered to their versions."""
        log = structlog.get_logger()
        backoff = Backoff()
        while not self._stop.is_set:
            # In this order: whoever has news puts it into cache and question before the table, and then has us ask anew.
            asking, divergences = self._question.begin()
            held = self._table.held()
            waiting = {each.assignment_id for each in held if each.is_waiting}
            began = time.monotonic()
            try:
                answer = self._transport.poll(self._request(held, workloads, divergences, bool(waiting)), asking)
            except StoppedError:
                continue
            except (UnauthenticatedError, PermissionDeniedError) as error:
                self._fatal(error)
                return
            except FedstreamError as error:
                if self._stop.is_set:
                    return
                self.last["error"] = str(error)
                seconds = (
                    backoff.within(error.retry_after_seconds)
                    if isinstance(error, BusyError)
                    else backoff.next_seconds()
                )
                if backoff.attempts in (2, 10):
                    log.warning("coordinator not available, trying on", server=self._settings.server, error=str(error))
                self._stop.sleep(seconds)
                continue
            if backoff.attempts >= 2:
                log.info("coordinator is back")
            backoff.reset()
            self._question.answered(divergences)
            self._note(answer)
            if not self._apply(answer, held, waiting, workloads) and time.monotonic() - began < _IDLE_ANSWER_SECONDS:
                self._stop.sleep(backoff.within(2 * _IDLE_ANSWER_SECONDS))

    def _request(
        self,
        held: list[Held],
        workloads: Mapping[str, str],
        divergences: Sequence[participation_pb2.Divergence],
        is_waiting: bool,
    ) -> participation_pb2.PollAssignmentRequest:
        # A poll renews the lease when it arrives, so it must not wait for as long as the lease lasts.
        seconds = 0.0 if is_waiting else min(self._settings.poll_seconds, max(self._lease_seconds / 2, 1.0))
        request = poll_request(held, seconds, workloads, self._settings.labels)
        request.model_digests.extend(self._cache.digests())
        request.divergences.extend(divergences)
        return request

    def _note(self, answer: participation_pb2.PollAssignmentResponse) -> None:
        log = structlog.get_logger()
        self._lease_seconds = answer.lease_seconds or self._lease_seconds
        skew = time.time() - answer.server_time.ToMicroseconds() / 1e6 if answer.HasField("server_time") else 0.0
        self.last = {
            "polled_time": time.time(),
            "clock_skew_seconds": round(skew, 3),
            "lease_seconds": answer.lease_seconds,
            "idle_reason": answer.idle_reason,
        }
        if abs(skew) > SKEW_SECONDS and not self._said_skew:
            self._said_skew = True
            log.warning(
                "this site's clock differs from the coordinator's; set both by NTP", skew_seconds=round(skew, 1)
            )
        if answer.idle_reason and answer.idle_reason != self._idle_reason and not answer.assignments:
            log.info("nothing to do", reason=answer.idle_reason)
        self._idle_reason = answer.idle_reason if not answer.assignments else None

    def _apply(
        self,
        answer: participation_pb2.PollAssignmentResponse,
        asked_with: list[Held],
        waiting: set[str],
        workloads: Mapping[str, str],
    ) -> bool:
        """Makes what is held what is desired; whether that changed anything."""
        changed = False
        for assignment in answer.assignments:
            held = Held(assignment)
            problem = _problem(assignment, workloads)
            if problem:
                held.is_in_hand = True  # the outbox's
            if not self._table.add(held):
                changed |= self._table.refresh(assignment, ends_wait=assignment.assignment_id in waiting)
                continue
            changed = True
            if problem:
                self._on_refused(held, problem)
        desired = {assignment.assignment_id for assignment in answer.assignments}
        reasons = {dropped.assignment_id: dropped.reason for dropped in answer.dropped}
        # Only what the question named: the answer knows nothing of what was taken in since.
        for held in asked_with:
            if held.assignment_id not in desired:
                changed = True
                self._on_dropped(held.assignment_id, reasons.get(held.assignment_id) or "no longer wanted")
        return changed


def poll_request(
    held: list[Held], wait_seconds: float, workloads: Mapping[str, str], labels: Mapping[str, str]
) -> participation_pb2.PollAssignmentRequest:
    """The question: what is held, what is offered."""
    return participation_pb2.PollAssignmentRequest(
        held=[participation_pb2.HeldAssignment(assignment_id=each.assignment_id, phase=each.phase) for each in held],
        wait_seconds=wait_seconds,
        workloads=[common_pb2.WorkloadOffer(name=name, version=version) for name, version in workloads.items()],
        labels=labels,
        software_version=software_version(),
    )


def _problem(assignment: participation_pb2.Assignment, workloads: Mapping[str, str]) -> str:
    """Why this site cannot do an assignment; empty where it can."""
    if assignment.kind not in (common_pb2.ASSIGNMENT_KIND_TRAIN, common_pb2.ASSIGNMENT_KIND_EVALUATE):
        return f"assignments of kind {assignment.kind} are unknown to this version of fed-client; update it"
    try:
        checked_id(assignment.assignment_id)
        checked_id(assignment.run_id, "run id")
    except InvalidError as error:
        return str(error)
    if assignment.workload.name not in workloads:
        return (
            f"workload {assignment.workload.name!r} is not offered here; offered are {', '.join(workloads) or 'none'}"
        )
    offered, wanted = workloads[assignment.workload.name], assignment.workload.version
    if wanted and wanted != offered:
        return f"the run asks for {assignment.workload.name!r} in version {wanted!r}; installed here is version {offered!r}"
    return ""
