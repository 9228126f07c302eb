"""The operator's side without a command line: what benchmarks and tests submit and watch runs with."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import grpc
import torch
from torch import Tensor

from fed_core.payload.writer import write_payload
from fed_core.rpc_status import from_rpc_error
from fed_core.specs import TensorSpec
from fed_core.tensors import dtype_name
from fedstream.v1 import common_pb2, runs_pb2, runs_pb2_grpc, transfer_pb2


def model_payload(tensors: Mapping[str, Tensor], specs: Sequence[TensorSpec] | None = None) -> tuple[bytes, bytes]:
    """Digest and bytes of a version 0. Without specs a name that begins with "b" is a buffer's."""
    specs = specs or [
        TensorSpec(name, tuple(t.shape), dtype_name(t.dtype), "buffer" if name.startswith("b") else "parameter")
        for name, t in tensors.items()
    ]
    file = BytesIO()
    written = write_payload(
        file, kind=common_pb2.PAYLOAD_KIND_MODEL, run_id="", round=0, model_version=0, base_digest=b"", update=None,
        tensors=[(spec, tensors[spec.name]) for spec in specs],
    )  # fmt: skip
    return written.digest, file.getvalue()


class Operator:
    """The operator's service over a channel, with our errors."""

    def __init__(self, target: str, token: str = "") -> None:
        self.channel = grpc.insecure_channel(target)
        self.stub = runs_pb2_grpc.RunsStub(self.channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def call(self, name: str, request: Any) -> Any:
        """One call of the operator's service."""
        try:
            return getattr(self.stub, name)(request, timeout=30, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def submit(
        self,
        text: str,
        tensors: Mapping[str, Tensor] | None = None,
        request_id: str = "",
        specs: Sequence[TensorSpec] | None = None,
    ) -> runs_pb2.CreateRunResponse:
        digest, data = model_payload({"w": torch.zeros(10)} if tensors is None else tensors, specs)

        def requests() -> Iterator[runs_pb2.CreateRunRequest]:
            ref = common_pb2.PayloadRef(digest=digest, total_bytes=len(data), kind=common_pb2.PAYLOAD_KIND_MODEL)
            yield runs_pb2.CreateRunRequest(
                header=runs_pb2.CreateRunHeader(request_id=request_id or uuid.uuid4().hex, config_toml=text, model=ref)
            )
            for offset in range(0, len(data), 2**20):
                chunk = transfer_pb2.Chunk(offset=offset, data=data[offset : offset + 2**20])
                yield runs_pb2.CreateRunRequest(chunk=chunk)

        return self.call("CreateRun", requests())

    def run(self, name: str = "test") -> runs_pb2.Run:
        return self.call("GetRun", runs_pb2.GetRunRequest(run=name)).run

    def report(self, name: str = "test") -> runs_pb2.GetReportResponse:
        return self.call("GetReport", runs_pb2.GetReportRequest(run=name))

    def wait(
        self, name: str = "test", until: Callable[[runs_pb2.Run], bool] | None = None, timeout: float = 60
    ) -> runs_pb2.Run:
        """Watches until the run is over, or `until` says so."""
        for message in self.stub.WatchRun(runs_pb2.WatchRunRequest(run=name), timeout=timeout, metadata=self._metadata):
            if message.run.state != runs_pb2.RUN_STATE_ACTIVE or (until is not None and until(message.run)):
                return message.run
        raise AssertionError("the watch ended before the run")
