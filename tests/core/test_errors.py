"""Every error of the tree crosses a real gRPC server and comes out as itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from fed_core import errors
from fed_core.errors import (
    BusyError,
    CorruptError,
    FedstreamError,
    InternalError,
    InvalidError,
    OffsetError,
    UnavailableError,
)
from fed_core.rpc_status import STATUS_OF_ERROR, from_rpc_error, status_of, to_status

EVERY_ERROR = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, FedstreamError) and cls is not FedstreamError
]


class Raising(grpc.GenericRpcHandler):
    """A server whose only method aborts with what `error` is at the time."""

    def __init__(self) -> None:
        self.error: FedstreamError | grpc.StatusCode = InternalError("")

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            if isinstance(self.error, FedstreamError):
                context.abort_with_status(to_status(self.error))
            else:
                context.abort(self.error, "plain words")
            raise AssertionError("abort returned")

        return grpc.unary_unary_rpc_method_handler(handle)


@pytest.fixture(scope="module")
def raising() -> Raising:
    return Raising()


@pytest.fixture(scope="module")
def call(raising: Raising) -> Iterator[grpc.UnaryUnaryMultiCallable]:
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[raising])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_unary("/test/Raise")
    server.stop(None).wait()


def cross(
    call: grpc.UnaryUnaryMultiCallable, raising: Raising, error: FedstreamError | grpc.StatusCode
) -> FedstreamError:
    raising.error = error
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=30)
    return from_rpc_error(caught.value)


def test_every_error_has_a_row_and_a_reason_of_its_own() -> None:
    assert set(EVERY_ERROR) == set(STATUS_OF_ERROR)
    assert len({cls.reason for cls in EVERY_ERROR}) == len(EVERY_ERROR)


@pytest.mark.parametrize("cls", STATUS_OF_ERROR)
def test_an_error_arrives_as_itself(
    cls: type[FedstreamError], call: grpc.UnaryUnaryMultiCallable, raising: Raising
) -> None:
    sent = cls("tensor 'größe' is 3; expected 4; send 4", tensor="größe", count=3)
    received = cross(call, raising, sent)
    assert type(received) is cls
    assert str(received) == str(sent)
    assert received.details == sent.details


def test_numbers_arrive_as_numbers(call: grpc.UnaryUnaryMultiCallable, raising: Raising) -> None:
    offset = cross(call, raising, OffsetError("another", offset=2**40))
    assert isinstance(offset, OffsetError)
    assert offset.offset == 2**40
    corrupt = cross(call, raising, CorruptError("rotten", offset=44))
    assert isinstance(corrupt, CorruptError)
    assert corrupt.offset == 44
    busy = cross(call, raising, BusyError("full", retry_after_seconds=2.5))
    assert isinstance(busy, BusyError)
    assert busy.retry_after_seconds == 2.5


@pytest.mark.parametrize("code", sorted(set(STATUS_OF_ERROR.values()), key=lambda code: code.name))
def test_a_bare_status_is_read_as_the_first_error_of_its_code(
    code: grpc.StatusCode, call: grpc.UnaryUnaryMultiCallable, raising: Raising
) -> None:
    received = cross(call, raising, code)
    assert type(received) is next(cls for cls, status in STATUS_OF_ERROR.items() if status is code)
    assert str(received) == "plain words"


def test_a_status_that_is_nobodys_is_an_internal_error(call: grpc.UnaryUnaryMultiCallable, raising: Raising) -> None:
    received = cross(call, raising, grpc.StatusCode.UNKNOWN)
    assert type(received) is InternalError
    assert received.details == {"status": "UNKNOWN"}


def test_a_subclass_without_a_row_travels_as_its_ancestor(call: grpc.UnaryUnaryMultiCallable, raising: Raising) -> None:
    class VeryInvalidError(InvalidError):
        reason = "VERY_INVALID"

    assert status_of(VeryInvalidError("x")) is grpc.StatusCode.INVALID_ARGUMENT
    assert type(cross(call, raising, VeryInvalidError("x"))) is InvalidError


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test/Raise")(b"", timeout=10)
    assert type(from_rpc_error(caught.value)) is UnavailableError
