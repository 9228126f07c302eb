"""What a coordinator tells of itself to Prometheus, at /metrics of an address of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import start_http_server

from fed_core.errors import ConfigError

# How often the event loop is asked to be on time.
_BEAT_SECONDS: Final = 0.02
_LAG_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)


class Telemetry:
    """The coordinator's figures. Counting costs less than a microsecond, whether or not anybody reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.event_loop_lag = Histogram(
            "fedstream_event_loop_lag_seconds",
            "How late the event loop woke up, asked fifty times a second: what calls and transfers wait beside their work.",
            buckets=_LAG_SECONDS,
            registry=self.registry,
        )
        self.bulk_bytes = Counter(
            "fedstream_bulk_bytes",
            "Bytes of bulk messages, framing included: uplink from the sites, downlink to them.",
            ["direction"],
            registry=self.registry,
        )
        self.updates = Counter(
            "fedstream_updates", "Updates that were made durable and count in a round.", registry=self.registry
        )

    async def watch_event_loop(self) -> None:
        """Measures the lag until cancelled."""
        while True:
            due = time.monotonic() + _BEAT_SECONDS
            await asyncio.sleep(_BEAT_SECONDS)
            self.event_loop_lag.observe(max(0.0, time.monotonic() - due))

    @contextmanager
    def served(self, listen: str) -> Iterator[str]:
        """Answers GET /metrics at HOST:PORT, in a thread of its own, while the block runs; gives the address with the port that was
        taken. Raises ConfigError where it cannot listen there."""
        host, _, port = listen.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise ConfigError(
                f"--metrics-listen {listen}: cannot listen there ({error.strerror}); the port is in use, or the address "
                "is not this machine's"
            ) from None
        try:
            yield f"{host}:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
