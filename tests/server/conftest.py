"""A real coordinator in process, on ephemeral ports, with light clients over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.light_client import LightClient
from benchmarks.light_operator import Operator
from fed_server.app import App
from fed_server.settings import ServerSettings

CONFIG = """
name = "{name}"
workload = "echo"
seed = 7
[cohort]
size = {size}
quorum = {quorum}
[schedule]
max_rounds = {max_rounds}
deadline_seconds = {deadline}
[evaluation]
at = "{at}"
"""
# Updates and versions as they are, for tests that look at their values.
EXACT = """
[uplink]
kind = "raw"
[downlink]
kind = "raw"
"""


def config(
    name: str = "test",
    size: int = 2,
    quorum: int = 1,
    max_rounds: int = 1,
    deadline: float = 60,
    at: str = "none",
    extra: str = "",
    *,
    is_exact: bool = True,
) -> str:
    """A run config; with `is_exact` off it compresses as runs do by default."""
    text = CONFIG.format(name=name, size=size, quorum=quorum, max_rounds=max_rounds, deadline=deadline, at=at)
    return text + (EXACT if is_exact else "") + extra


@dataclass
class House:
    """A coordinator with what tests need of it."""

    app: App
    operator: Operator

    def client(self, name: str, workload: str = "echo") -> LightClient:
        """A newly enrolled client."""
        client = LightClient(self.app.address, workload)
        client.enroll(self.app.tokens.join, name)
        return client


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    settings = ServerSettings(data_dir=tmp_path / "data", listen="127.0.0.1:0", drain_seconds=0.2, lease_seconds=5)
    async with App(settings) as app:
        operator = Operator(f"unix:{app.socket_path}")
        yield House(app, operator)
        operator.channel.close()


async def off_loop(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a blocking client beside the coordinator's event loop."""
    return await asyncio.to_thread(work, *args, **kwargs)
