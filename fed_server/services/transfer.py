"""Transfer: payload files between sites and coordinator. Moves bytes and knows nothing of tensors."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fed_core.errors import (
    BusyError,
    CorruptError,
    InvalidError,
    NoLongerNeededError,
    NotFoundError,
    OffsetError,
    UnavailableError,
)
from fed_core.failpoints import failpoint
from fed_core.payload.frames import pack_chunk, parse_frame, plan_chunks
from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import Manifest, parse_manifest, parse_preamble
from fed_server.rounds.coordinator import Coordinator
from fed_server.rounds.workers import Workers
from fed_server.services.convert import broadcast_to_proto, timestamp
from fed_server.services.identity import caller
from fed_server.services.uploads import Upload, accepted_offset, largest_upload
from fed_server.store.base import AssignmentKind, AssignmentRecord, AssignmentState
from fed_server.store.blobs import DataDirectory
from fed_server.telemetry import Telemetry
from fedstream.v1 import transfer_pb2

# A transfer waits so long for its turn at the server before it is sent away to come again.
QUEUE_SECONDS = 20.0
RETRY_WINDOW_SECONDS = 2.0

# A stream on which nothing moves for so long is given up: the peer resumes.
STALL_SECONDS = 90.0

_MAX_MANIFESTS = 8

# What gRPC puts before every message on the connection.
_FRAMING_BYTES = 5


class FrameCache:
    """The last few frames that were sent: a cohort fetches the same payload at about the same time, so most are read and packed
    once for all. Memory: `max_frames` MiB."""

    def __init__(self, workers: Workers, max_frames: int = 8) -> None:
        self._workers = workers
        self._max_frames = max_frames
        self._frames: OrderedDict[tuple[str, int, int], asyncio.Task[bytes]] = OrderedDict()

    async def get(self, digest: str, file: int, offset: int, length: int) -> bytes:
        """The frame of the payload's bytes from `offset` on; `file` is open for reading, as long as this takes."""
        key = (digest, offset, length)
        task = self._frames.get(key)
        if task is None:
            # Through a file of its own: whoever asked first may hang up and close his while others wait for the frame.
            own = os.dup(file)
            task = asyncio.create_task(self._workers.disk(_read_frame, own, offset, length))
            self._frames[key] = task
            if len(self._frames) > self._max_frames:
                self._frames.popitem(last=False)
        try:
            return await asyncio.shield(task)
        except (OSError, asyncio.CancelledError):
            if task.done():
                self._frames.pop(key, None)  # a failed read is not to be remembered
            raise


class TransferService:
    """Bulk in and out, at most `max_concurrent_transfers` streams at once."""

    def __init__(
        self,
        coordinator: Coordinator,
        workers: Workers,
        files: DataDirectory,
        telemetry: Telemetry,
        max_concurrent_transfers: int,
    ) -> None:
        self._coordinator = coordinator
        self._workers = workers
        self._files = files
        self._slots = asyncio.Semaphore(max_concurrent_transfers)
        self._frames = FrameCache(workers)
        # Of the last few payloads that were sent.
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._num_updates = telemetry.updates
        self._uplink_bytes = telemetry.bulk_bytes.labels("uplink")
        self._downlink_bytes = telemetry.bulk_bytes.labels("downlink")
        # Streams by assignment, the newest last: an older one is a connection that the client has given up.
        self._streams: dict[str, list[asyncio.Task[Any]]] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """The service with its bulk messages left as bytes: chunks are written and read without protobuf."""
        return grpc.method_handlers_generic_handler(
            "fedstream.v1.Transfer",
            {
                "Download": grpc.unary_stream_rpc_method_handler(
                    self.download, transfer_pb2.DownloadRequest.FromString, None
                ),
                "GetUpload": grpc.unary_unary_rpc_method_handler(
                    self.get_upload,
                    transfer_pb2.GetUploadRequest.FromString,
                    transfer_pb2.GetUploadResponse.SerializeToString,
                ),
                "Upload": grpc.stream_unary_rpc_method_handler(
                    self.upload, None, transfer_pb2.UploadResponse.SerializeToString
                ),
            },
        )

    async def download(self, request: transfer_pb2.DownloadRequest, context: Any) -> None:
        """See the proto."""
        assignment = self._coordinator.assignment(caller(), request.assignment_id)
        run = self._coordinator.run_of(assignment)
        payload = run.broadcasts.find(request.digest.hex())
        if payload is None:
            raise NotFoundError("this payload is no longer kept, or was never part of the run; poll again")
        if not 0 <= request.offset <= payload.num_bytes:
            raise OffsetError(f"offset {request.offset} of a payload of {payload.num_bytes} bytes", offset=0)
        async with self._slot():
            try:
                path, known = self._files.payload_path(payload.digest), self._manifests.get(payload.digest)
                file, manifest = await self._workers.disk(_open_payload, path, known)
            except FileNotFoundError:
                await run.broadcasts.lose(payload)
                raise NotFoundError("the payload is no longer kept; poll again") from None
            self._manifests[payload.digest] = manifest
            if len(self._manifests) > _MAX_MANIFESTS:
                self._manifests.popitem(last=False)
            try:
                run.count_download(assignment.assignment_id, payload.digest, payload.num_bytes)
                header = transfer_pb2.DownloadHeader(payload=broadcast_to_proto(payload))
                first = transfer_pb2.DownloadResponse(header=header).SerializeToString()
                await context.write(first)
                run.count_traffic(assignment.assignment_id, downlink_wire_bytes=len(first) + _FRAMING_BYTES)
                # They end with segments where they can, so that the receiver seldom joins two to check one.
                for offset, length in plan_chunks(manifest, request.offset):
                    frame = await self._frames.get(payload.digest, file, offset, length)
                    async with asyncio.timeout(STALL_SECONDS):
                        await context.write(frame)
                    run.count_traffic(assignment.assignment_id, downlink_wire_bytes=len(frame) + _FRAMING_BYTES)
                    self._downlink_bytes.inc(len(frame) + _FRAMING_BYTES)
                    failpoint("mid-download")
            except TimeoutError:
                raise UnavailableError(f"no byte was taken for {STALL_SECONDS:g} s; resume the download") from None
            finally:
                os.close(file)

    async def get_upload(self, request: transfer_pb2.GetUploadRequest, context: Any) -> transfer_pb2.GetUploadResponse:
        """See the proto."""
        assignment = await self._find(request.assignment_id)
        if assignment.state is AssignmentState.RECEIVED:
            receipt = _receipt(assignment)
            return transfer_pb2.GetUploadResponse(accepted_offset=assignment.uplink_payload_bytes, receipt=receipt)
        if assignment.state is not AssignmentState.OPEN:
            raise NoLongerNeededError(assignment.reason)
        run = self._coordinator.run_of(assignment)
        offset = await self._workers.disk(
            accepted_offset,
            self._files.upload_path(assignment.assignment_id),
            self._files.update_path(assignment.assignment_id),
            request.digest,
            largest_upload(run.record.model_bytes),
        )
        return transfer_pb2.GetUploadResponse(accepted_offset=offset)

    async def upload(self, requests: AsyncIterator[bytes], context: Any) -> transfer_pb2.UploadResponse:
        """See the proto."""
        header = await _read_header(requests)
        assignment = await self._find(header.assignment_id)
        if assignment.kind is not AssignmentKind.TRAIN:
            raise InvalidError("this assignment asks for an evaluation, not for an update")
        if assignment.state is AssignmentState.RECEIVED:
            return transfer_pb2.UploadResponse(receipt=_receipt(assignment))
        if assignment.state is not AssignmentState.OPEN:
            raise NoLongerNeededError(assignment.reason)
        run = self._coordinator.run_of(assignment)
        async with self._alone(assignment.assignment_id), self._slot():
            upload = Upload(
                self._files,
                run.expected(assignment),
                header.payload.digest,
                header.payload.total_bytes,
                largest_upload(run.record.model_bytes),
            )
            # The client has waited for this: chunks that came before would fill gRPC's buffers, a MiB for everyone who waits.
            await context.send_initial_metadata(())
            is_at_rest = False
            try:
                await self._workers.disk(upload.open, header.offset)
                await self._take_chunks(requests, upload, assignment)
                # Found even if its round, or its run, ended while the bytes came.
                current = await self._find(assignment.assignment_id)
                if current.state is AssignmentState.OPEN:
                    manifest = await self._workers.disk(upload.finish)
                    is_at_rest = True
                    current = await run.receive_update(
                        assignment.assignment_id, manifest=manifest, weight=upload.checker.weight
                    )
                    self._num_updates.inc()
                elif current.state is not AssignmentState.RECEIVED:
                    raise NoLongerNeededError(current.reason)
            except (OffsetError, CorruptError):
                raise
            except InvalidError:
                await self._workers.disk(upload.discard)
                raise
            finally:
                if not is_at_rest:
                    await self._workers.disk(upload.close)
        failpoint("update-durable")
        return transfer_pb2.UploadResponse(receipt=_receipt(current))

    async def _take_chunks(self, requests: AsyncIterator[bytes], upload: Upload, assignment: AssignmentRecord) -> None:
        run = self._coordinator.run_of(assignment)
        while True:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    frame = await anext(requests, None)
            except TimeoutError:
                raise UnavailableError(f"no byte came for {STALL_SECONDS:g} s; resume the upload") from None
            if frame is None:
                return
            chunk = parse_frame(frame)
            if chunk is None:
                raise InvalidError("expected a chunk: the header comes first and once")
            await self._workers.disk(upload.write, *chunk)
            run.count_traffic(assignment.assignment_id, uplink_wire_bytes=len(frame) + _FRAMING_BYTES)
            self._uplink_bytes.inc(len(frame) + _FRAMING_BYTES)
            failpoint("mid-upload")

    async def _find(self, assignment_id: str) -> AssignmentRecord:
        """The caller's assignment, open or long over. Raises NotFoundError."""
        try:
            return self._coordinator.assignment(caller(), assignment_id)
        except NotFoundError:
            return await self._coordinator.finished_assignment(caller(), assignment_id)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._slots.acquire()
        except TimeoutError:
            raise BusyError("all transfers are taken; come again", retry_after_seconds=RETRY_WINDOW_SECONDS) from None
        try:
            yield
        finally:
            self._slots.release()

    @asynccontextmanager
    async def _alone(self, assignment_id: str) -> AsyncIterator[None]:
        """Ends older streams for the same assignment first."""
        task = asyncio.current_task()
        assert task is not None
        streams = self._streams.setdefault(assignment_id, [])
        older = list(streams)
        streams.append(task)
        try:
            for stream in older:
                if not stream.cancelling():
                    stream.cancel()
            if older:
                await asyncio.wait(older, timeout=STALL_SECONDS)
            yield
        except asyncio.CancelledError:
            if streams[-1] is task:
                raise
            # Not its client's doing: unanswered, one that still listens would wait for ever.
            task.uncancel()
            raise UnavailableError("a newer stream for this assignment took over") from None
        finally:
            streams.remove(task)
            if not streams:
                del self._streams[assignment_id]


def _open_payload(path: Path, known: Manifest | None) -> tuple[int, Manifest]:
    """The open file, and its manifest, which is read unless it is known."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if known is not None:
            return file, known
        preamble = parse_preamble(os.pread(file, PREAMBLE_BYTES, 0))
        return file, parse_manifest(preamble, os.pread(file, preamble.manifest_bytes, PREAMBLE_BYTES))
    except BaseException:
        os.close(file)
        raise


def _read_frame(file: int, offset: int, length: int) -> bytes:
    try:
        return pack_chunk(offset, os.pread(file, length, offset))
    finally:
        os.close(file)


async def _read_header(requests: AsyncIterator[bytes]) -> transfer_pb2.UploadHeader:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            first = await anext(requests, None)
    except TimeoutError:
        raise UnavailableError("the stream's header did not come") from None
    try:
        message = transfer_pb2.UploadRequest.FromString(first or b"")
    except DecodeError:
        raise InvalidError("the first message of an upload is not one") from None
    if message.WhichOneof("part") != "header":
        raise InvalidError("expected a header as the first message of an upload")
    if len(message.header.payload.digest) != 32 or message.header.payload.total_bytes < 1 or message.header.offset < 0:
        raise InvalidError(
            "the header of an upload needs a digest of 32 bytes, its total bytes and an offset of at least 0"
        )
    return message.header


def _receipt(assignment: AssignmentRecord) -> transfer_pb2.Receipt:
    return transfer_pb2.Receipt(
        assignment_id=assignment.assignment_id,
        digest=bytes.fromhex(assignment.digest),
        received_time=timestamp(assignment.received_time),
    )
