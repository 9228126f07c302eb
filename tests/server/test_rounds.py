"""Rounds over real gRPC: what clients send, what the coordinator makes of it."""

from __future__ import annotations

import asyncio

import torch

from benchmarks.light_client import LightClient, constant, encode_update
from fed_core.safetensors_tiles import SafetensorsReader
from fedstream.v1 import runs_pb2
from tests.server.conftest import House, config, off_loop


def answer(client: LightClient, value: float, num_examples: int) -> None:
    assignment = client.next_assignment()
    manifest, _ = client.model(assignment)
    client.upload(assignment.assignment_id, encode_update(assignment, manifest.specs, constant(value), num_examples))


async def test_a_round_commits_the_mean_weighted_by_examples(house: House) -> None:
    await off_loop(house.operator.submit, config(size=2))
    a, b = [await off_loop(house.client, name) for name in ("a", "b")]
    await asyncio.gather(off_loop(answer, a, 1.0 / 8, 1), off_loop(answer, b, 0.5, 3))
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    assert run.reason == "all 1 rounds done"
    path = house.app.settings.data_dir / "models" / run.run_id / "1.safetensors"
    with SafetensorsReader(path) as reader:
        assert torch.equal(reader.tensor("w"), torch.full((10,), (1 / 8 + 3 * 0.5) / 4))
