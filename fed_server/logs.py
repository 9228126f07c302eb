"""One log line per event, with its fields: pretty on a terminal, JSON elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sys

import structlog


def _is_news(record: logging.LogRecord) -> bool:
    """Not the calls that a client hung up, or that ended with the server: gRPC logs each as an error with a traceback."""
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


def configure_logs(level: str, format: str) -> None:
    """Sets up structlog over the standard library's logging, on stderr. Tracebacks carry no local variables: they may hold
    secrets."""
    is_pretty = format == "pretty" or (format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if is_pretty else "iso", utc=not is_pretty),
    ]
    renderers: list[structlog.typing.Processor]
    if is_pretty:
        renderers = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback, pad_event_to=24)]
    else:
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        renderers = [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    handler.addFilter(_is_news)
    for noisy in ("asyncio", "alembic", "grpc", "sqlalchemy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
