"""What Prometheus is told, by real rounds."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.light_client import LightClient
from fed_core.errors import ConfigError
from fed_server.app import App
from fed_server.settings import ServerSettings
from tests.server.conftest import config, off_loop
from tests.server.houses import answer, open_house


def figures(address: str) -> dict[tuple[str, str], float]:
    """Values by name and the value of the first label."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        text = page.read().decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_round_is_counted_and_the_event_loop_watched(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data", metrics_listen="127.0.0.1:0") as house:
        before = await off_loop(figures, house.app.metrics_address)
        assert before["fedstream_updates_total", ""] == 0
        client = LightClient(house.app.address)
        await off_loop(client.enroll, house.app.tokens.join, "one")
        await off_loop(house.operator.submit, config(size=1, max_rounds=1))
        await off_loop(answer, client)
        after = await off_loop(figures, house.app.metrics_address)
    assert after["fedstream_updates_total", ""] == 1
    assert after["fedstream_bulk_bytes_total", "uplink"] > 100
    assert after["fedstream_bulk_bytes_total", "downlink"] > 100
    assert after["fedstream_event_loop_lag_seconds_count", ""] > before["fedstream_event_loop_lag_seconds_count", ""]
    assert after["process_resident_memory_bytes", ""] > 2**20


async def test_an_address_that_is_taken_is_named_with_the_cure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"--metrics-listen {listen}: .*in use"):
            async with App(ServerSettings(data_dir=tmp_path / "data", listen="127.0.0.1:0", metrics_listen=listen)):
                pass
    async with open_house(tmp_path / "data"):
        pass  # the failed start left nothing behind


def test_an_address_without_a_port_is_refused() -> None:
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        ServerSettings(metrics_listen="localhost")
