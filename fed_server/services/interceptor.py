"""Around every call: request id, authentication, the error table, one log line."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog

from fed_core.errors import FedstreamError, InternalError
from fed_core.rpc_status import to_status
from fed_server.services.identity import Authenticator

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_REQUEST_ID_PATTERN = re.compile(r"[a-zA-Z0-9-]{1,64}")


class Gate(grpc.aio.ServerInterceptor):
    """The one interceptor. Nothing else raises into gRPC: an exception that escaped would travel to the peer with its text."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of one call."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        service, _, method = handler_call_details.method.strip("/").partition("/")

        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Any) -> None:
                async def run() -> None:
                    result = inner(request, context)
                    if inspect.isasyncgen(result):
                        await _write_all(result, context)
                    else:
                        await result

                await self._guard(service, method, context, run)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)

        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def unary(request: Any, context: Any) -> Any:
            return await self._guard(service, method, context, lambda: inner(request, context))

        make_unary = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make_unary(unary, handler.request_deserializer, handler.response_serializer)

    async def _guard(self, service: str, method: str, context: Any, call: Callable[[], Awaitable[Any]]) -> Any:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        given = metadata.get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID_PATTERN.fullmatch(given) else uuid.uuid4().hex
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        with structlog.contextvars.bound_contextvars(request_id=request_id, method=method):
            try:
                self._authenticator.check(service, method, metadata, context.peer())
                return await call()
            except FedstreamError as error:
                logger.info("call refused", extra={"error": error.reason, "message_text": str(error)})
                await _abort(context, error, request_id)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception:
                logger.exception("call failed")
                hidden = InternalError(
                    f"internal error {request_id}; the coordinator's log has the rest", id=request_id
                )
                await _abort(context, hidden, request_id)


async def _write_all(responses: AsyncIterator[Any], context: Any) -> None:
    async for response in responses:
        await context.write(response)


async def _abort(context: Any, error: FedstreamError, request_id: str) -> None:
    status = to_status(error)
    await context.abort(
        status.code, status.details, trailing_metadata=((REQUEST_ID, request_id), *(status.trailing_metadata or ()))
    )
