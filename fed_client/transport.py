"""The calls that the daemon makes, over one channel: errors of our own tree, credentials, deadlines, and bulk without copies.

Sync stubs, used from several threads: an aio client loses the status of a server that ends an upload early. Unary calls have
deadlines. Transfers have none, for a site may need a day for its upload; a watchdog breaks one off that moves no byte.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fed_client.settings import Settings
from fed_client.state import Identity
from fed_client.stop import Stop
from fed_core.errors import CorruptError, FedstreamError, UnavailableError
from fed_core.failpoints import failpoint
from fed_core.grpc_options import client_options
from fed_core.payload.frames import CHUNK_BYTES, pack_chunk, parse_frame, plan_chunks
from fed_core.payload.manifest import Manifest
from fed_core.rpc_status import from_rpc_error
from fedstream.v1 import common_pb2, participation_pb2, participation_pb2_grpc, transfer_pb2, transfer_pb2_grpc

UNARY_SECONDS = 15.0
# A chunk is seen to move only when all of it has: on a slow line small ones keep the watchdog from taking patience for death.
MIN_CHUNK_BYTES = 64 * 2**10
FIRST_CHUNK_BYTES = 256 * 2**10
_SLOW_CHUNK_SECONDS = 2.0
_FAST_CHUNK_SECONDS = 0.25
# The coordinator flushes an update to disk before it answers; the slowest disk that we wait for writes this fast.
_FLUSH_BYTES_PER_SECOND = 10 * 2**20
# How long an upload that was dropped after its last byte still waits for its receipt.
_LATE_RECEIPT_SECONDS = 3.0

Progress = Callable[[int, int], None]


class SpoolReadError(Exception):
    """The spooled file could not be read as it was written."""


class Transport:
    """One channel to the coordinator. Thread-safe; `close` ends every call in flight with UnavailableError."""

    def __init__(self, settings: Settings, identity: Identity | None = None) -> None:
        """Opens no connection yet: the first call does."""
        self._stall_seconds = settings.stall_seconds
        self._authorization = f"Bearer {identity.client_id}.{identity.secret}" if identity else None
        self._channel = open_channel(settings)
        self._closed = threading.Event()
        self._participation = participation_pb2_grpc.ParticipationStub(self._channel)
        self._transfer = transfer_pb2_grpc.TransferStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        # Without serializers gRPC passes our own bytes through: chunks are packed and parsed without protobuf's copies.
        self._upload: grpc.StreamUnaryMultiCallable[bytes, transfer_pb2.UploadResponse] = self._channel.stream_unary(
            "/fedstream.v1.Transfer/Upload",
            request_serializer=None,
            response_deserializer=transfer_pb2.UploadResponse.FromString,
        )
        self._download: grpc.UnaryStreamMultiCallable[transfer_pb2.DownloadRequest, bytes] = self._channel.unary_stream(
            "/fedstream.v1.Transfer/Download",
            request_serializer=transfer_pb2.DownloadRequest.SerializeToString,
            response_deserializer=None,
        )

    def close(self) -> None:
        """Ends every call in flight; later ones raise UnavailableError."""
        self._closed.set()
        self._channel.close()

    # -- Participation ------------------------------------------------------------------------------------------------

    def enroll(self, request_id: str, join_token: str, name: str) -> participation_pb2.EnrollResponse:
        """Exchanges the join token for an identity; the one call without credentials."""
        request = participation_pb2.EnrollRequest(request_id=request_id, join_token=join_token, name=name)
        with self._named_errors():
            return self._participation.Enroll(request, timeout=UNARY_SECONDS, metadata=self._metadata(anonymous=True))

    def poll(
        self, request: participation_pb2.PollAssignmentRequest, stop: Stop | None = None
    ) -> participation_pb2.PollAssignmentResponse:
        """Asks what to do and waits for the answer as long as the request says, and a little longer for a slow line. `stop` ends
        the wait with StoppedError."""
        request.client_time.CopyFrom(now())
        stop = stop or Stop()
        with self._named_errors():
            call = self._participation.PollAssignment.future(
                request, timeout=request.wait_seconds + 10, metadata=self._metadata()
            )
        try:
            with stop.interrupting(call.cancel), self._named_errors():
                answer: participation_pb2.PollAssignmentResponse = call.result()
                return answer
        except FedstreamError:
            stop.check()
            raise
        finally:
            call.cancel()

    def report_progress(
        self, request: participation_pb2.ReportProgressRequest
    ) -> participation_pb2.ReportProgressResponse:
        """Says how far an assignment is; the answer may say stop."""
        with self._named_errors():
            return self._participation.ReportProgress(request, timeout=UNARY_SECONDS, metadata=self._metadata())

    def report_failure(self, request: participation_pb2.ReportFailureRequest) -> None:
        """Gives up an assignment."""
        with self._named_errors():
            self._participation.ReportFailure(request, timeout=UNARY_SECONDS, metadata=self._metadata())

    def report_evaluation(self, request: participation_pb2.ReportEvaluationRequest) -> None:
        """Delivers the result of an evaluation; durable there when it returns."""
        with self._named_errors():
            self._participation.ReportEvaluation(request, timeout=UNARY_SECONDS, metadata=self._metadata())

    def is_serving(self) -> bool:
        """What the standard health service says of the whole server."""
        with self._named_errors():
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=UNARY_SECONDS)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    # -- Transfer -----------------------------------------------------------------------------------------------------

    def get_upload(self, assignment_id: str, digest: bytes) -> transfer_pb2.GetUploadResponse:
        """Where an upload stands."""
        request = transfer_pb2.GetUploadRequest(assignment_id=assignment_id, digest=digest)
        with self._named_errors():
            return self._transfer.GetUpload(request, timeout=UNARY_SECONDS, metadata=self._metadata())

    def upload(
        self,
        assignment_id: str,
        path: Path,
        manifest: Manifest,
        offset: int,
        stop: Stop,
        on_progress: Progress,
        patience: float = 1.0,
    ) -> transfer_pb2.Receipt:
        """Sends the payload file that begins with `manifest` from an offset on and returns the receipt.

        `on_progress(bytes handed over, total)` is called after each chunk, from another thread. Once everything is sent, `stop`
        leaves a moment for the receipt: the coordinator drops an assignment because it has just received it. `patience`
        stretches the watchdog. Raises the coordinator's error, UnavailableError after a stall, StoppedError, or SpoolReadError
        where the file is not what was spooled.
        """
        payload = common_pb2.PayloadRef(digest=manifest.digest, total_bytes=manifest.total_bytes, kind=manifest.kind)
        header = transfer_pb2.UploadRequest(
            header=transfer_pb2.UploadHeader(assignment_id=assignment_id, payload=payload, offset=offset)
        )
        source = _Source(header.SerializeToString(), path, manifest, offset, on_progress)
        with self._named_errors():
            call = self._upload.future(iter(source), metadata=self._metadata())
        source.begin(call)

        dropped_at: float | None = None

        def interrupt() -> None:
            nonlocal dropped_at
            dropped_at = time.monotonic()
            if not source.is_sent:
                call.cancel()

        def allowance() -> float:
            if dropped_at is not None:
                return dropped_at + _LATE_RECEIPT_SECONDS - source.moved_at
            flushing = manifest.total_bytes / _FLUSH_BYTES_PER_SECOND if source.is_sent else 0.0
            return self._stall_seconds * patience + flushing

        watchdog = Watchdog(call.cancel, lambda: source.moved_at, allowance)
        try:
            with watchdog, stop.interrupting(interrupt), self._named_errors():
                answer: transfer_pb2.UploadResponse = call.result()
                return answer.receipt
        except FedstreamError as error:
            if source.error is not None:
                raise SpoolReadError(f"{path}: {source.error}") from source.error
            stop.check()
            watchdog.explain(error)
            raise
        finally:
            call.cancel()

    def download(
        self, assignment_id: str, digest: bytes, offset: int, stop: Stop, patience: float = 1.0
    ) -> Generator[memoryview, None, None]:
        """The bytes of a payload from an offset on, in order. Raises the coordinator's error, UnavailableError after a stall,
        StoppedError, or CorruptError for chunks that do not follow on."""
        request = transfer_pb2.DownloadRequest(assignment_id=assignment_id, digest=digest, offset=offset)
        with self._named_errors():
            call = self._download(request, metadata=self._metadata())
        moved_at = time.monotonic()
        watchdog = Watchdog(call.cancel, lambda: moved_at, lambda: self._stall_seconds * patience)
        try:
            with watchdog, stop.interrupting(call.cancel), self._named_errors():
                position = offset
                for frame in call:
                    moved_at = time.monotonic()
                    chunk = parse_frame(frame)
                    if chunk is None:
                        continue  # the header repeats what the assignment said
                    if chunk[0] != position:
                        raise CorruptError(f"a chunk begins at byte {chunk[0]}, expected {position}", offset=position)
                    yield chunk[1]
                    position += len(chunk[1])
                    moved_at = time.monotonic()  # what the reader of the chunks did is no stall of the line
        except FedstreamError as error:
            stop.check()
            watchdog.explain(error)
            raise
        finally:
            call.cancel()

    # -- shared -------------------------------------------------------------------------------------------------------

    def _metadata(self, *, anonymous: bool = False) -> tuple[tuple[str, str], ...]:
        request_id = ("x-request-id", uuid.uuid4().hex[:16])
        if self._authorization is None or anonymous:
            return (request_id,)
        return request_id, ("authorization", self._authorization)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except grpc.FutureCancelledError as error:
            raise UnavailableError("the transfer was broken off") from error
        except ValueError as error:  # what gRPC raises on a closed channel
            if not self._closed.is_set():
                raise
            raise UnavailableError("the channel is closed") from error


class _Source:
    """What an upload sends: the header, then, when it is its turn, the file in chunks. Iterated by a thread of gRPC's, which takes
    a chunk when the one before has gone into the line's window: taking is moving."""

    def __init__(self, header: bytes, path: Path, manifest: Manifest, offset: int, on_progress: Progress) -> None:
        self._header = header
        self._path = path
        self._manifest = manifest
        self._offset = offset
        self._on_progress = on_progress
        self.moved_at = time.monotonic()
        self.is_sent = offset == manifest.total_bytes
        self.error: Exception | None = None
        self._call: SimpleQueue[grpc.Call] = SimpleQueue()

    def begin(self, call: grpc.Call) -> None:
        """Says which call this is the source of, for it is asked before it can know."""
        self._call.put(call)

    def __iter__(self) -> Iterator[bytes]:
        yield self._header
        self._call.get().initial_metadata()  # comes when it is our turn, or with the end of the call
        self.moved_at = time.monotonic()
        try:
            yield from self._chunks()
        except (OSError, EOFError) as error:
            self.error = error
            raise  # gRPC cancels the call

    def _chunks(self) -> Iterator[bytes]:
        total = self._manifest.total_bytes
        chunk_bytes = FIRST_CHUNK_BYTES
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._offset)
            # Chunks that end where segments do spare the coordinator a copy; on a slow line they are cut smaller.
            for start, length in plan_chunks(self._manifest, self._offset):
                position, end = start, start + length
                while position < end:
                    num_bytes = file.readinto(buffer[: min(chunk_bytes, end - position)])
                    if not num_bytes:
                        raise EOFError(f"ends at byte {position}, expected {total}")
                    began = time.monotonic()
                    yield pack_chunk(position, buffer[:num_bytes])
                    position += num_bytes
                    self.moved_at = time.monotonic()
                    self.is_sent = position == total
                    self._on_progress(position, total)
                    failpoint("client-mid-upload")
                    chunk_bytes = next_chunk_bytes(chunk_bytes, self.moved_at - began)


def next_chunk_bytes(chunk_bytes: int, seconds: float) -> int:
    """Size of the next chunk, given how long the last one took: from 64 KiB to 1 MiB."""
    if seconds > _SLOW_CHUNK_SECONDS:
        return max(chunk_bytes // 2, MIN_CHUNK_BYTES)
    if seconds < _FAST_CHUNK_SECONDS:
        return min(chunk_bytes * 2, CHUNK_BYTES)
    return chunk_bytes


class Watchdog:
    """Cancels a transfer that moves no byte. A context manager around the wait for the transfer."""

    def __init__(
        self, cancel: Callable[[], Any], moved_at: Callable[[], float], allowance: Callable[[], float]
    ) -> None:
        self._cancel = cancel
        self._moved_at = moved_at
        self._allowance = allowance
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.stalled_seconds = 0.0

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while True:
            idle = time.monotonic() - self._moved_at()
            allowed = self._allowance()
            if idle >= allowed:
                self.stalled_seconds = idle
                self._cancel()
                return
            if self._done.wait(min(allowed - idle, 1.0)):
                return

    def explain(self, error: FedstreamError) -> None:
        """Raises what a cancelled call means where it was this watchdog that cancelled it."""
        if self.stalled_seconds:
            raise StalledError(f"no byte moved for {self.stalled_seconds:.0f} s; broken off, to be resumed") from error


class StalledError(UnavailableError):
    """A transfer that moved no byte for too long; the connection may be fine, so it is resumed like after any break."""


def open_channel(settings: Settings) -> grpc.Channel:
    """A channel as the settings ask for it: plaintext on the loopback or with `insecure`, else TLS."""
    host, port = settings.address
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options: list[tuple[str, Any]] = list(client_options())
    if not settings.uses_tls:
        return grpc.insecure_channel(target, options=options)
    if settings.tls_server_name is not None:
        options.append(("grpc.ssl_target_name_override", settings.tls_server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(settings.tls_ca),
        private_key=_read(settings.tls_key),
        certificate_chain=_read(settings.tls_cert),
    )
    return grpc.secure_channel(target, credentials, options=options)


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def now() -> Timestamp:
    """This site's clock."""
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp
