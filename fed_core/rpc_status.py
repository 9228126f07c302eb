"""The one table between the error tree and gRPC status codes, read in both directions.

An error travels as a status code, its message, and a `google.rpc.ErrorInfo` whose reason is the class's `reason` and whose
metadata is its `details`. A peer that knows the reason gets the same class back; one that does not (an older version, a proxy)
gets the class that stands first for the status code.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from fed_core.errors import (
    BusyError,
    ConfigError,
    ConflictError,
    CorruptError,
    DiskFullError,
    FedstreamError,
    InternalError,
    InvalidError,
    NoLongerNeededError,
    NotFiniteError,
    NotFoundError,
    OffsetError,
    PayloadError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    UpdateRefusedError,
    WrongPhaseError,
)

ERROR_DOMAIN = "fedstream"

# The message travels twice, once encoded, in trailing metadata of which a peer takes 8 KiB: a longer one would lose the status too.
MAX_MESSAGE = 2000

# Where several classes share a code, the first is what a bare code is read as.
STATUS_OF_ERROR: dict[type[FedstreamError], grpc.StatusCode] = {
    InvalidError: grpc.StatusCode.INVALID_ARGUMENT,
    PayloadError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFiniteError: grpc.StatusCode.INVALID_ARGUMENT,
    UpdateRefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    NoLongerNeededError: grpc.StatusCode.ABORTED,
    WrongPhaseError: grpc.StatusCode.FAILED_PRECONDITION,
    OffsetError: grpc.StatusCode.OUT_OF_RANGE,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DiskFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    CorruptError: grpc.StatusCode.DATA_LOSS,
    InternalError: grpc.StatusCode.INTERNAL,
}

_ERROR_OF_REASON: dict[str, type[FedstreamError]] = {error.reason: error for error in STATUS_OF_ERROR}
_ERROR_OF_STATUS: dict[grpc.StatusCode, type[FedstreamError]] = {
    code: error for error, code in reversed(STATUS_OF_ERROR.items())
} | {
    # What gRPC itself says where no handler of ours spoke.
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
}


def status_of(error: FedstreamError) -> grpc.StatusCode:
    """Status code of an error: its own row of the table, or that of its nearest ancestor."""
    for cls in type(error).__mro__:
        if cls in STATUS_OF_ERROR:
            return STATUS_OF_ERROR[cls]
    return grpc.StatusCode.INTERNAL


def to_status(error: FedstreamError) -> grpc.Status:
    """What a server aborts a call with, for `context.abort_with_status`."""
    message = str(error)
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE - 4]} ..."
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.details)
    packed = any_pb2.Any()
    packed.Pack(info)
    code: int = status_of(error).value[0]
    return rpc_status.to_status(status_pb2.Status(code=code, message=message, details=[packed]))


def from_rpc_error(error: grpc.RpcError) -> FedstreamError:
    """The error that a sync call's `grpc.RpcError` stands for; never raises."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    message = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
    try:
        status = rpc_status.from_call(error) if isinstance(error, grpc.Call) else None
    except ValueError:  # details that contradict the code: trust the code
        status = None
    details: Iterable[any_pb2.Any] = status.details if status is not None else ()
    for packed in details:
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == ERROR_DOMAIN and info.reason in _ERROR_OF_REASON:
            return _rebuild(_ERROR_OF_REASON[info.reason], message, dict(info.metadata))
    return _rebuild(_ERROR_OF_STATUS.get(code, InternalError), message, {"status": code.name})


def _rebuild(cls: type[FedstreamError], message: str, details: dict[str, str]) -> FedstreamError:
    rebuilt = cls(message)
    # A peer's details are only read through typed properties; one that lacks a number keeps our default.
    rebuilt.details.update(details)
    return rebuilt


__all__ = [
    "ERROR_DOMAIN",
    "STATUS_OF_ERROR",
    "from_rpc_error",
    "status_of",
    "to_status",
]
