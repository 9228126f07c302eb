"""A coordinator that does wrong on command.

The real one runs in tests of the whole; it cannot be made to send damaged chunks, hang in mid-stream or lose an answer. This one
speaks the same contract over real gRPC through the generated classes, so it also holds the hand-made frames to them.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fed_client.settings import Settings, load_settings
from fed_client.state import Identity
from fed_client.transport import Transport
from fed_core.errors import FedstreamError, NotFoundError, UnauthenticatedError
from fed_core.grpc_options import server_options
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.writer import write_payload
from fed_core.rpc_status import to_status
from fed_core.specs import TensorSpec
from fedstream.v1 import (
    common_pb2,
    participation_pb2,
    participation_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)

CHUNK = 2**18


@dataclass
class FakeCoordinator(participation_pb2_grpc.ParticipationServicer, transfer_pb2_grpc.TransferServicer):
    """Its fields are its script and its record."""

    address: str = ""
    # Method name -> what the next calls do instead of their work: raise an error, or run something first.
    faults: dict[str, deque[FedstreamError | Callable[[Any], None]]] = field(default_factory=lambda: defaultdict(deque))
    calls: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    desired: list[participation_pb2.Assignment] = field(default_factory=list)
    # Seen by the answer to a question, before it is written: a coordinator that chooses by what the client holds.
    on_poll: Callable[[participation_pb2.PollAssignmentRequest], None] = lambda request: None
    # What the client was last told of the models.
    told: dict[str, participation_pb2.ModelRef] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    should_stop: dict[str, str] = field(default_factory=dict)
    payloads: dict[bytes, bytes] = field(default_factory=dict)
    received: dict[str, bytearray] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    receipts: dict[str, transfer_pb2.Receipt] = field(default_factory=dict)
    # After so many bytes of a stream, once each: what happens there.
    upload_faults: deque[tuple[int, FedstreamError | Callable[[Any], None]]] = field(default_factory=deque)
    download_faults: deque[tuple[int, FedstreamError | Callable[[Any], None]]] = field(default_factory=deque)
    # Positions of bytes that are flipped on the way down, so many times each.
    flips: dict[int, int] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    # Uploads wait until it is set.
    turn: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.turn.set()

    def _enter(self, method: str, request: Any, context: Any) -> None:
        self.calls[method].append(request)
        if method != "Enroll":
            metadata = dict(context.invocation_metadata())
            if metadata.get("authorization") != "Bearer c1.s1":
                _fail(context, UnauthenticatedError("unknown client or secret"))
        if self.faults[method]:
            _act(self.faults[method].popleft(), context)

    def Enroll(self, request: Any, context: Any) -> Any:
        self._enter("Enroll", request, context)
        if request.join_token != "join":
            _fail(context, UnauthenticatedError("unknown join token"))
        return participation_pb2.EnrollResponse(client_id="c1", secret="s1")

    def PollAssignment(self, request: Any, context: Any) -> Any:
        self._enter("PollAssignment", request, context)
        self.on_poll(request)
        held = {each.assignment_id for each in request.held}

        def differs() -> bool:
            if any(self.told.get(each.assignment_id, each.model) != each.model for each in self.desired):
                return True
            return {each.assignment_id for each in self.desired} != held

        with self.changed:
            self.changed.wait_for(differs, timeout=request.wait_seconds)
            self.told = {each.assignment_id: each.model for each in self.desired}
            wanted = {each.assignment_id for each in self.desired}
            dropped = [
                participation_pb2.DroppedAssignment(assignment_id=each, reason=self.dropped.get(each, "not wanted"))
                for each in held - wanted
            ]
            answer = participation_pb2.PollAssignmentResponse(
                assignments=self.desired, dropped=dropped, lease_seconds=30
            )
            answer.server_time.GetCurrentTime()
            return answer

    def ReportProgress(self, request: Any, context: Any) -> Any:
        self._enter("ReportProgress", request, context)
        reason = self.should_stop.get(request.assignment_id, "")
        return participation_pb2.ReportProgressResponse(should_stop=bool(reason), reason=reason)

    def ReportFailure(self, request: Any, context: Any) -> Any:
        self._enter("ReportFailure", request, context)
        self.want(*(each for each in self.desired if each.assignment_id != request.assignment_id))
        return participation_pb2.ReportFailureResponse()

    def ReportEvaluation(self, request: Any, context: Any) -> Any:
        self._enter("ReportEvaluation", request, context)
        self.want(*(each for each in self.desired if each.assignment_id != request.assignment_id))
        return participation_pb2.ReportEvaluationResponse()

    def Download(self, request: Any, context: Any) -> Iterator[Any]:
        self._enter("Download", request, context)
        self.offsets.append(request.offset)
        if request.digest not in self.payloads:
            _fail(context, NotFoundError("the payload is no longer kept; poll again"))
        data = self.payloads[request.digest]
        payload = common_pb2.PayloadRef(digest=request.digest, total_bytes=len(data))
        yield transfer_pb2.DownloadResponse(header=transfer_pb2.DownloadHeader(payload=payload))
        for start in range(request.offset, len(data), CHUNK):
            while self.download_faults and start - request.offset >= self.download_faults[0][0]:
                _act(self.download_faults.popleft()[1], context)
            piece = bytearray(data[start : start + CHUNK])
            for position, times in list(self.flips.items()):
                if times and start <= position < start + len(piece):
                    piece[position - start] ^= 0xFF
                    self.flips[position] -= 1
            yield transfer_pb2.DownloadResponse(chunk=transfer_pb2.Chunk(offset=start, data=bytes(piece)))

    def GetUpload(self, request: Any, context: Any) -> Any:
        self._enter("GetUpload", request, context)
        return transfer_pb2.GetUploadResponse(
            accepted_offset=len(self.received.get(request.assignment_id, b"")),
            receipt=self.receipts.get(request.assignment_id),
        )

    def Upload(self, requests: Iterator[Any], context: Any) -> Any:
        header = next(requests).header
        self._enter("Upload", header, context)
        self.turn.wait()
        context.send_initial_metadata(())
        self.offsets.append(header.offset)
        received = self.received.setdefault(header.assignment_id, bytearray())
        assert header.offset == len(received)
        num_received = 0
        for request in requests:
            assert request.chunk.offset == len(received)
            received += request.chunk.data
            num_received += len(request.chunk.data)
            while self.upload_faults and num_received >= self.upload_faults[0][0]:
                _act(self.upload_faults.popleft()[1], context)
        if len(received) != header.payload.total_bytes:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the stream broke")
        receipt = transfer_pb2.Receipt(assignment_id=header.assignment_id, digest=header.payload.digest)
        self.receipts[header.assignment_id] = receipt
        self.want(*(each for each in self.desired if each.assignment_id != header.assignment_id))
        return transfer_pb2.UploadResponse(receipt=receipt)

    def want(self, *assignments: participation_pb2.Assignment) -> None:
        """Changes what the client should do."""
        with self.changed:
            self.desired = list(assignments)
            self.changed.notify_all()


def _act(fault: FedstreamError | Callable[[Any], None], context: Any) -> None:
    if isinstance(fault, FedstreamError):
        _fail(context, fault)
    else:
        fault(context)


def _fail(context: Any, error: FedstreamError) -> None:
    context.abort_with_status(to_status(error))


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator()
    server = grpc.server(ThreadPoolExecutor(16), options=server_options())
    participation_pb2_grpc.add_ParticipationServicer_to_server(fake, server)
    transfer_pb2_grpc.add_TransferServicer_to_server(fake, server)
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield fake
    server.stop(grace=None).wait()


@pytest.fixture
def identity(coordinator: FakeCoordinator) -> Identity:
    return Identity("c1", "s1", "site", coordinator.address)


@pytest.fixture
def settings(coordinator: FakeCoordinator, tmp_path: Path) -> Settings:
    return load_settings(
        {
            "server": coordinator.address,
            "state_dir": tmp_path / "state",
            "name": "site",
            "join_token": "join",
            "stall_seconds": 2.0,
        }
    )


@pytest.fixture
def transport(settings: Settings, identity: Identity) -> Iterator[Transport]:
    transport = Transport(settings, identity)
    yield transport
    transport.close()


@pytest.fixture
def make_payload() -> Callable[..., tuple[bytes, int]]:
    """Writes a model, or with an assignment id its update, of so many float32 values; returns digest and length."""

    def make(path: Path, num_values: int = 2**20, assignment_id: str | None = None) -> tuple[bytes, int]:
        values = torch.arange(num_values, dtype=torch.float32)
        is_update = assignment_id is not None
        with path.open("w+b") as file:
            written = write_payload(
                file,
                kind=common_pb2.PAYLOAD_KIND_UPDATE if is_update else common_pb2.PAYLOAD_KIND_MODEL,
                run_id="r1",
                round=1 if is_update else 0,
                model_version=0,
                base_digest=b"b" * 32 if is_update else b"",
                update=UpdateInfo(assignment_id, num_examples=3) if assignment_id is not None else None,
                tensors=[(TensorSpec("w", (num_values,), "float32", "parameter"), values)],
            )
        return written.digest, written.total_bytes

    return make
