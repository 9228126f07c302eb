"""Coordinators that a test starts, stops and starts again on one data directory, with a clock that it moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.light_client import LightClient, constant, encode_update
from benchmarks.light_operator import Operator
from fed_core.safetensors_tiles import SafetensorsReader
from fed_server.app import App
from fed_server.settings import ServerSettings
from fedstream.v1 import participation_pb2, runs_pb2
from tests.server.conftest import House, off_loop


class MovableClock:
    """The machine's clocks, which a test puts forward instead of sleeping."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def now(self) -> float:
        """See `Clock.now`."""
        return time.time() + self._ahead

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic() + self._ahead

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self._ahead += seconds


@asynccontextmanager
async def open_house(data_dir: Path, clock: MovableClock | None = None, **settings: Any) -> AsyncIterator[House]:
    """A coordinator on a data directory, new or left by an earlier one."""
    chosen: dict[str, Any] = {"listen": "127.0.0.1:0", "drain_seconds": 0.2, "lease_seconds": 5} | settings
    async with App(ServerSettings(data_dir=data_dir, **chosen), clock) as app:
        operator = Operator(f"unix:{app.socket_path}")
        try:
            yield House(app, operator)
        finally:
            operator.channel.close()


def back_in(house: House, credential: str) -> LightClient:
    """A client of an earlier life of the coordinator."""
    client = LightClient(house.app.address)
    client.use(credential)
    return client


async def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Waits until the condition, looked at without blocking the loop, is true; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = await off_loop(condition)
        if value:
            return value
        await asyncio.sleep(0.02)
    raise AssertionError("the condition did not come true")


def answer(
    client: LightClient,
    value: float = 0.25,
    num_examples: int = 1,
    assignment: participation_pb2.Assignment | None = None,
) -> participation_pb2.Assignment:
    """Does a training assignment, the next one where none is given: an update filled with one value."""
    assignment = assignment or client.next_assignment()
    manifest, _ = client.model(assignment)
    client.upload(assignment.assignment_id, encode_update(assignment, manifest.specs, constant(value), num_examples))
    return assignment


def member(house: House, name: str, run: str = "test", round: int = 1) -> runs_pb2.RoundClient:
    """A client's part in a round, as the report has it."""
    found = next(r for r in house.operator.report(run).rounds if r.round == round)
    return next(c for c in found.clients if c.client_name == name)


def weights(house: House, version: int, run: str = "test") -> float:
    """The value that a version's tensor "w" is filled with; fails where it is not one value."""
    run_id = house.operator.run(run).run_id
    with SafetensorsReader(house.app.settings.data_dir / "models" / run_id / f"{version}.safetensors") as reader:
        values = reader.tensor("w").unique().tolist()
    assert len(values) == 1, values
    return values[0]
