"""A client over real gRPC without training, spool or cache: what benchmarks and tests of the coordinator drive it with."""

from __future__ import annotations

import mmap
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import torch
from torch import Tensor

from fed_core.codecs.registry import encoding_from_json
from fed_core.errors import BusyError, CorruptError, NoLongerNeededError, PayloadError, UnavailableError
from fed_core.grpc_options import client_options
from fed_core.payload.assemble import assemble_model
from fed_core.payload.frames import CHUNK_BYTES, pack_chunk, parse_frame, plan_chunks
from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import Manifest, UpdateInfo, parse_manifest, parse_preamble
from fed_core.payload.reader import PayloadReader
from fed_core.payload.verify import SegmentVerifier
from fed_core.payload.writer import write_payload
from fed_core.rpc_status import from_rpc_error
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype
from fedstream.v1 import common_pb2, participation_pb2, participation_pb2_grpc, transfer_pb2

MakeTensor = Callable[[TensorSpec], Tensor]


@dataclass(frozen=True)
class Update:
    """An encoded update in memory."""

    digest: bytes
    data: bytes | mmap.mmap

    def chunks(self, offset: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the chunks to send: segments, as the daemon cuts them; plain ones where the bytes are damaged."""
        try:
            preamble = parse_preamble(self.data[:PREAMBLE_BYTES])
            manifest = parse_manifest(preamble, self.data[PREAMBLE_BYTES : PREAMBLE_BYTES + preamble.manifest_bytes])
        except (CorruptError, PayloadError):
            return iter([(start, CHUNK_BYTES) for start in range(offset, len(self.data), CHUNK_BYTES)])
        return plan_chunks(manifest, offset)


class MemoryFile:
    """A file that lives in memory only, with a path for those who want one. Written again, it keeps its pages."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("payload"), "wb+", buffering=0)
        self.path = f"/proc/self/fd/{self.file.fileno()}"
        self._view: mmap.mmap | None = None

    def view(self) -> mmap.mmap:
        """Its bytes, without a copy; the same mapping as long as the length stays."""
        if self._view is None or len(self._view) != os.fstat(self.file.fileno()).st_size:
            self._view = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._view

    def rewind(self) -> None:
        """Begins to write it anew."""
        self.file.seek(0)

    def cut(self, num_bytes: int) -> None:
        """Ends it after what was written: what was there before may have been longer."""
        self.file.truncate(num_bytes)

    def reader(self) -> PayloadReader:
        """The payload that lies in it."""
        return PayloadReader(Path(self.path))

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class LightClient:
    """One enrolled client. Raises our errors, never gRPC's."""

    def __init__(self, address: str, workload: str = "echo") -> None:
        self.channel = grpc.insecure_channel(address, client_options())
        self.workload = workload
        self.client_id = ""
        self._metadata: tuple[tuple[str, str], ...] = ()
        self._stub = participation_pb2_grpc.ParticipationStub(self.channel)
        service = "/fedstream.v1.Transfer/"
        self._download = self.channel.unary_stream(
            service + "Download", transfer_pb2.DownloadRequest.SerializeToString, None
        )
        self._upload = self.channel.stream_unary(service + "Upload", None, transfer_pb2.UploadResponse.FromString)
        self._get_upload = self.channel.unary_unary(
            service + "GetUpload",
            transfer_pb2.GetUploadRequest.SerializeToString,
            transfer_pb2.GetUploadResponse.FromString,
        )

    def close(self) -> None:
        """Ends the connection."""
        self.channel.close()

    def enroll(self, join_token: str, name: str, request_id: str = "") -> str:
        """Becomes a client; returns the credential."""
        request = participation_pb2.EnrollRequest(
            request_id=request_id or uuid.uuid4().hex, join_token=join_token, name=name
        )
        answer = self.call(self._stub.Enroll, request)
        self.client_id = answer.client_id
        return self.use(f"{answer.client_id}.{answer.secret}")

    def use(self, credential: str) -> str:
        """Calls as the client with this credential from now on."""
        self.client_id = credential.partition(".")[0]
        self._metadata = (("authorization", f"Bearer {credential}"),)
        return credential

    def call(self, method: Any, request: Any, timeout: float = 60.0) -> Any:
        """One unary call."""
        try:
            return method(request, timeout=timeout, metadata=self._metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def poll(
        self, held: tuple[str, ...] = (), wait_seconds: float = 20.0, **changes: Any
    ) -> participation_pb2.PollAssignmentResponse:
        """The desired set."""
        request = participation_pb2.PollAssignmentRequest(
            held=[participation_pb2.HeldAssignment(assignment_id=a) for a in held],
            wait_seconds=wait_seconds,
            workloads=[common_pb2.WorkloadOffer(name=self.workload, version="1")],
            **changes,
        )
        return self.call(self._stub.PollAssignment, request, timeout=wait_seconds + 30)

    def next_assignment(self, seconds: float = 30.0) -> participation_pb2.Assignment:
        """Polls until there is one."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = self.poll(wait_seconds=min(20.0, max(0.0, end - time.monotonic())))
            if answer.assignments:
                return answer.assignments[0]
        raise TimeoutError("no assignment")

    def report_progress(self, assignment_id: str, **fields: Any) -> participation_pb2.ReportProgressResponse:
        """Tells how far the work is."""
        request = participation_pb2.ReportProgressRequest(assignment_id=assignment_id, **fields)
        return self.call(self._stub.ReportProgress, request)

    def report_failure(self, assignment_id: str, **fields: Any) -> None:
        """Gives up."""
        self.call(
            self._stub.ReportFailure,
            participation_pb2.ReportFailureRequest(assignment_id=assignment_id, **fields),
        )

    def report_evaluation(self, assignment_id: str, num_examples: int, **metrics: float) -> None:
        """Delivers an evaluation."""
        listed = [common_pb2.Metric(name=name, value=value) for name, value in metrics.items()]
        request = participation_pb2.ReportEvaluationRequest(
            assignment_id=assignment_id, num_examples=num_examples, metrics=listed
        )
        self.call(self._stub.ReportEvaluation, request)

    def fetch(self, assignment_id: str, payload: common_pb2.PayloadRef, into: MemoryFile) -> Manifest:
        """Fetches one payload and verifies it on the way."""
        into.rewind()
        verifier = SegmentVerifier(payload.digest, payload.total_bytes)
        request = transfer_pb2.DownloadRequest(assignment_id=assignment_id, digest=payload.digest, offset=0)
        try:
            for frame in self._download(request, metadata=self._metadata):
                chunk = parse_frame(frame)
                if chunk is not None:
                    verifier.feed(chunk[1])
                    into.file.write(chunk[1])
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        manifest = verifier.finish()
        into.cut(manifest.total_bytes)
        return manifest

    def download(
        self, assignment: participation_pb2.Assignment, into: MemoryFile, base: MemoryFile | None = None
    ) -> Manifest:
        """The assignment's model as its payload in the raw codec, made of `base` and the payloads that the assignment names where
        it is not one of them. `base` holds the raw payload of a model that the poll named in `model_digests`."""
        model = assignment.model
        if [payload.digest for payload in model.payloads] == [model.digest]:
            return self.fetch(assignment.assignment_id, model.payloads[0], into)
        with ExitStack() as opened:
            steps = []
            for payload in model.payloads:
                memory = opened.enter_context(MemoryFile())
                self.fetch(assignment.assignment_id, payload, memory)
                steps.append(opened.enter_context(memory.reader()))
            first = opened.enter_context(base.reader()) if base is not None else None
            into.rewind()
            written = assemble_model(first, steps, into.file)
            into.cut(written.total_bytes)
        assert written.digest == model.digest, "the payloads lead to another model than the assignment's"
        with into.reader() as reader:
            return reader.manifest

    def model(
        self, assignment: participation_pb2.Assignment, base: MemoryFile | None = None
    ) -> tuple[Manifest, dict[str, Tensor]]:
        """The assignment's model, decoded."""
        with MemoryFile() as memory:
            manifest = self.download(assignment, memory, base)
            with memory.reader() as reader:
                return manifest, reader.tensors()

    def get_upload(self, assignment_id: str, digest: bytes) -> transfer_pb2.GetUploadResponse:
        """Where an upload stands."""
        return self.call(self._get_upload, transfer_pb2.GetUploadRequest(assignment_id=assignment_id, digest=digest))

    def upload(
        self,
        assignment_id: str,
        update: Update,
        *,
        offset: int = 0,
        until: int | None = None,
        total_bytes: int | None = None,
        retry: bool = True,
    ) -> transfer_pb2.Receipt:
        """Sends an update from an offset; `until` breaks off there. Waits its turn where the coordinator is busy."""
        header = transfer_pb2.UploadHeader(
            assignment_id=assignment_id,
            payload=common_pb2.PayloadRef(
                digest=update.digest,
                total_bytes=len(update.data) if total_bytes is None else total_bytes,
                kind=common_pb2.PAYLOAD_KIND_UPDATE,
            ),
            offset=offset,
        )

        def frames(calls: SimpleQueue[grpc.Call]) -> Iterator[bytes]:
            yield transfer_pb2.UploadRequest(header=header).SerializeToString()
            calls.get().initial_metadata()  # when it is our turn
            view, end = memoryview(update.data), len(update.data) if until is None else until
            for start, length in update.chunks(offset):
                if start < end:
                    yield pack_chunk(start, view[start : min(end, start + length)])

        while True:
            try:
                calls: SimpleQueue[grpc.Call] = SimpleQueue()
                call = self._upload.future(frames(calls), metadata=self._metadata, timeout=300)
                calls.put(call)
                return call.result().receipt
            except grpc.RpcError as error:
                ours = from_rpc_error(error)
                if not (retry and isinstance(ours, BusyError | UnavailableError)):
                    raise ours from None
                time.sleep(0.1)


def encode_update(
    assignment: participation_pb2.Assignment,
    specs: tuple[TensorSpec, ...],
    make_tensor: MakeTensor,
    num_examples: int = 1,
    into: MemoryFile | None = None,
    **changes: Any,
) -> Update:
    """An update for an assignment, encoded as it asks; `changes` replace fields of its manifest's header or UpdateInfo. With `into`
    its bytes live there, until something else is written to it."""
    info = UpdateInfo(assignment_id=assignment.assignment_id, num_examples=num_examples, metrics={"loss": 0.0})
    of_info = {key: changes.pop(key) for key in list(changes) if hasattr(info, key)}
    header: dict[str, Any] = {
        "kind": common_pb2.PAYLOAD_KIND_UPDATE,
        "run_id": assignment.run_id,
        "round": assignment.round,
        "model_version": assignment.model.version,
        "base_digest": assignment.model.digest,
    } | changes
    with nullcontext(into) if into is not None else MemoryFile() as memory:
        memory.rewind()
        written = write_payload(
            memory.file,
            update=replace(info, **of_info),
            tensors=[(spec, make_tensor(spec)) for spec in specs],
            encoding=encoding_from_json(assignment.uplink) if assignment.uplink else None,
            seed=assignment.plan.seed,
            **header,
        )
        memory.cut(written.total_bytes)
        if into is not None:
            return Update(written.digest, into.view())
        memory.file.seek(0)
        return Update(written.digest, memory.file.read())


def constant(value: float) -> MakeTensor:
    """Tensors filled with one value; counters are left at zero."""

    def make(spec: TensorSpec) -> Tensor:
        dtype = torch_dtype(spec.dtype)
        return torch.full(spec.shape, value if dtype.is_floating_point else 0, dtype=dtype)

    return make


def echo_rounds(client: LightClient, value: float, num_examples: int) -> int:
    """Answers every assignment with a constant update until the run is over; returns how many.

    The tensors stay, the update is encoded anew every time. What an echo costs is not to hide what the coordinator costs: it
    verifies every payload that it is sent, says that it holds the model to which they lead, and does not make it.
    """
    done = 0
    model_digest = b""
    specs: tuple[TensorSpec, ...] = ()
    tensors: dict[str, Tensor] = {}
    payload_file, update_file = MemoryFile(), MemoryFile()

    def tensor_of(spec: TensorSpec) -> Tensor:
        if spec.name not in tensors:
            tensors[spec.name] = constant(value)(spec)
        return tensors[spec.name]

    while True:
        try:
            answer = client.poll(model_digests=[model_digest] if model_digest else [])
        except UnavailableError:
            return done
        if not answer.assignments:
            if "no active run" in answer.idle_reason:
                return done
            continue
        assignment = answer.assignments[0]
        for payload in assignment.model.payloads:
            specs = client.fetch(assignment.assignment_id, payload, payload_file).specs
        model_digest = assignment.model.digest
        update = encode_update(assignment, specs, tensor_of, num_examples, into=update_file)
        try:
            client.upload(assignment.assignment_id, update)
            done += 1
        except NoLongerNeededError:
            continue
