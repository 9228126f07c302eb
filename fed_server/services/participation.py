"""Participation: a site's side of the rounds."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from fed_core.errors import ConflictError, InvalidError, UnauthenticatedError
from fed_server.clock import Clock
from fed_server.rounds.coordinator import Coordinator
from fed_server.rounds.policy import uplink_encoding
from fed_server.rounds.workers import Workers
from fed_server.services.convert import (
    ASSIGNMENT_KINDS,
    broadcast_to_proto,
    metrics_from_proto,
    phase_name,
    timestamp,
)
from fed_server.services.identity import caller, hash_secret, new_secret
from fed_server.store.base import AssignmentKind, AssignmentRecord, ClientRecord, Transaction
from fedstream.v1 import common_pb2, participation_pb2, participation_pb2_grpc

MAX_WAIT_SECONDS = 60.0
MAX_HELD = 1024
MAX_MODELS = 64
MAX_TRACEBACK = 32 * 1024
MAX_MESSAGE = 2048
_NAME = re.compile(r"[a-zA-Z0-9._-]{1,64}")
_LABEL = re.compile(r"[a-zA-Z0-9._-]{1,63}")
_REQUEST_ID = re.compile(r"[a-zA-Z0-9-]{16,64}")


class ParticipationService(participation_pb2_grpc.ParticipationServicer):
    """Reads the request, asks the coordinator, writes the answer."""

    def __init__(
        self, coordinator: Coordinator, workers: Workers, clock: Clock, join_token_hash: str, lease_seconds: float
    ) -> None:
        self._coordinator = coordinator
        self._workers = workers
        self._clock = clock
        self._join_token_hash = join_token_hash
        self._lease_seconds = lease_seconds

    async def Enroll(self, request: participation_pb2.EnrollRequest, context: Any) -> participation_pb2.EnrollResponse:
        """See the proto."""
        if hash_secret(request.join_token) != self._join_token_hash:
            raise UnauthenticatedError("this is not the join token; fed-server prints it (fed-server join-token)")
        if not _NAME.fullmatch(request.name):
            raise InvalidError(f"name {request.name[:80]!r}: expected 1 to 64 characters of [a-zA-Z0-9._-]")
        if not _REQUEST_ID.fullmatch(request.request_id):
            raise InvalidError("request_id: expected 16 to 64 characters of [a-zA-Z0-9-]")
        secret, now = new_secret(), self._clock.now()

        def enroll(tx: Transaction) -> ClientRecord:
            known, holder = tx.client_by_enroll_request(request.request_id), tx.client_by_name(request.name)
            if (known is not None and known.has_authenticated) or (holder is not None and holder != known):
                raise ConflictError(
                    f"a site named {request.name!r} is enrolled already; choose another --name, or use that site's state directory"
                )
            client_id = known.client_id if known is not None else hash_secret(secret)[:16]
            client = ClientRecord(
                client_id=client_id,
                name=request.name,
                secret_hash=hash_secret(secret),
                enroll_request_id=request.request_id,
                enrolled_time=now,
            )
            tx.put(client)
            return client

        client = await self._workers.store(enroll)
        self._coordinator.remember_client(client)
        return participation_pb2.EnrollResponse(client_id=client.client_id, secret=secret, server_time=timestamp(now))

    async def PollAssignment(
        self, request: participation_pb2.PollAssignmentRequest, context: Any
    ) -> participation_pb2.PollAssignmentResponse:
        """See the proto."""
        if not 0 <= request.wait_seconds <= MAX_WAIT_SECONDS:
            raise InvalidError(f"wait_seconds {request.wait_seconds}: expected 0 to {MAX_WAIT_SECONDS:g}")
        if len(request.held) > MAX_HELD or len(request.workloads) > 64 or len(request.labels) > 32:
            raise InvalidError("expected at most 1024 held assignments, 64 workloads and 32 labels")
        for key, value in request.labels.items():
            if not (_LABEL.fullmatch(key) and _LABEL.fullmatch(value)):
                raise InvalidError(
                    f"label {key[:63]!r}: expected keys and values of 1 to 63 characters of [a-zA-Z0-9._-]"
                )
        for offer in request.workloads:
            if not 1 <= len(offer.name) <= 100 or len(offer.version) > 100:
                raise InvalidError(
                    f"workload {offer.name[:100]!r}: expected a name of 1 to 100 characters, a version of up to 100"
                )
        if len(request.model_digests) > MAX_MODELS or len(request.divergences) > MAX_MODELS:
            raise InvalidError(f"expected at most {MAX_MODELS} model_digests and as many divergences")
        skew = 0.0
        if request.HasField("client_time"):
            skew = request.client_time.ToNanoseconds() / 1e9 - self._clock.now()
        desired = await self._coordinator.poll(
            caller(),
            {held.assignment_id: phase_name(held.phase) for held in request.held},
            request.wait_seconds,
            labels=dict(request.labels),
            workloads={offer.name: offer.version for offer in request.workloads},
            software_version=request.software_version[:100],
            clock_skew_seconds=skew,
            divergences=[(d.assignment_id, d.version, d.digest.hex()) for d in request.divergences],
        )
        held_models = {digest.hex() for digest in request.model_digests}
        return participation_pb2.PollAssignmentResponse(
            assignments=[await self._assignment(assignment, held_models) for assignment in desired.assignments],
            dropped=[
                participation_pb2.DroppedAssignment(assignment_id=assignment_id, reason=reason)
                for assignment_id, reason in desired.dropped
            ],
            lease_seconds=self._lease_seconds,
            server_time=timestamp(self._clock.now()),
            idle_reason=desired.idle_reason,
        )

    async def _assignment(
        self, assignment: AssignmentRecord, held_models: Collection[str]
    ) -> participation_pb2.Assignment:
        run = self._coordinator.run_of(assignment)
        model = run.models[assignment.model_version]
        # As it is now: this poll itself may have told of a divergence.
        current = run.assignments.get(assignment.assignment_id, assignment)
        way = await run.broadcasts.way_to(model.version, held_models, has_diverged=current.has_diverged)
        variate = await run.variate_for(assignment)
        return participation_pb2.Assignment(
            assignment_id=assignment.assignment_id,
            run_id=assignment.run_id,
            round=assignment.round,
            kind=ASSIGNMENT_KINDS[assignment.kind],
            workload=common_pb2.WorkloadOffer(name=run.config.workload, version=run.config.workload_version),
            fingerprint=bytes.fromhex(run.record.fingerprint),
            model=participation_pb2.ModelRef(
                digest=bytes.fromhex(model.payload_digest),
                version=model.version,
                payloads=[broadcast_to_proto(step) for step in way],
            ),
            plan=run.plan(assignment).to_proto(),
            deadline_seconds=max(0.0, run.seconds_left(assignment)),
            uplink=uplink_encoding(run.config).model_dump_json() if assignment.kind is AssignmentKind.TRAIN else "",
            variate=broadcast_to_proto(variate) if variate is not None else None,
        )

    async def ReportProgress(
        self, request: participation_pb2.ReportProgressRequest, context: Any
    ) -> participation_pb2.ReportProgressResponse:
        """See the proto."""
        reason = self._coordinator.report_progress(
            caller(),
            request.assignment_id,
            phase_name(request.phase),
            max(0, request.done),
            max(0, request.total),
            metrics_from_proto(request.metrics),
        )
        return participation_pb2.ReportProgressResponse(should_stop=bool(reason), reason=reason)

    async def ReportFailure(
        self, request: participation_pb2.ReportFailureRequest, context: Any
    ) -> participation_pb2.ReportFailureResponse:
        """See the proto."""
        if request.kind == participation_pb2.FAILURE_KIND_UNSPECIFIED:
            raise InvalidError("kind: expected what went wrong, one of FailureKind")
        kind = "FAILURE"
        if request.kind in participation_pb2.FailureKind.values():
            kind = participation_pb2.FailureKind.Name(request.kind).removeprefix("FAILURE_KIND_")
        await self._coordinator.report_failure(
            caller(),
            request.assignment_id,
            f"{kind}: {request.message[:MAX_MESSAGE]}",
            request.traceback[-MAX_TRACEBACK:],
        )
        return participation_pb2.ReportFailureResponse()

    async def ReportEvaluation(
        self, request: participation_pb2.ReportEvaluationRequest, context: Any
    ) -> participation_pb2.ReportEvaluationResponse:
        """See the proto."""
        if request.num_examples < 0:
            raise InvalidError(f"num_examples {request.num_examples}: expected at least 0")
        await self._coordinator.report_evaluation(
            caller(), request.assignment_id, request.num_examples, metrics_from_proto(request.metrics)
        )
        return participation_pb2.ReportEvaluationResponse()
