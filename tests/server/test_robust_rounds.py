"""Rounds with robust rules over real gRPC: bad sites, restarts, rounds that cannot be combined."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.light_client import LightClient, encode_update
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fedstream.v1 import runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import MovableClock, answer, back_in, member, open_house, weights

NAMES = ["a", "b", "c", "d", "e"]


def robust(kind: str, extra: str = "", **more: object) -> str:
    rule = f'[aggregation]\nkind = "{kind}"\nnum_byzantine = 1\n{extra}'
    return config(size=5, quorum=5, extra=rule, **more)  # type: ignore[arg-type]


async def clients_of(house: House) -> list[LightClient]:
    return [await off_loop(house.client, name) for name in NAMES]


@pytest.mark.parametrize("kind", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median"])
async def test_a_round_withstands_a_bad_site(house: House, kind: str) -> None:
    response = await off_loop(house.operator.submit, robust(kind))
    assert f"{kind} withstands 1 bad updates a round" in response.notices[0]
    values = (0.25, 0.25, -0.5, 0.25, 0.25)
    await asyncio.gather(
        *(
            off_loop(answer, client, value, 1_000_000 if value < 0 else 1)
            for client, value in zip(await clients_of(house), values, strict=True)
        )
    )
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    assert await off_loop(weights, house, 1) == pytest.approx(0.25, abs=1e-5 if kind == "geometric_median" else 0)
    assert (await off_loop(member, house, "c")).weight == 1


def some_values(seed: int) -> Tensor:
    return torch.randn(10, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2) / 8


def send(client: LightClient, seed: int) -> None:
    assignment = client.next_assignment()
    manifest, _ = client.model(assignment)
    values = {"w": some_values(seed)}
    client.upload(
        assignment.assignment_id, encode_update(assignment, manifest.specs, lambda spec: values[spec.name], 1)
    )


def version(house: House, number: int) -> Tensor:
    run_id = house.operator.run().run_id
    with SafetensorsReader(house.app.settings.data_dir / "models" / run_id / f"{number}.safetensors") as reader:
        return reader.tensor("w").clone()


@pytest.mark.parametrize("kind", ["trimmed_mean", "geometric_median", "centered_clipping"])
async def test_a_start_in_the_middle_of_a_round_changes_no_bit(tmp_path: Path, kind: str) -> None:
    async with open_house(tmp_path / "once") as house:
        await off_loop(house.operator.submit, robust(kind))
        await asyncio.gather(*(off_loop(send, client, seed) for seed, client in enumerate(await clients_of(house))))
        await off_loop(house.operator.wait)
        expected = await off_loop(version, house, 1)
    async with open_house(tmp_path / "twice", MovableClock()) as house:
        await off_loop(house.operator.submit, robust(kind))
        clients = [LightClient(house.app.address) for _ in NAMES]
        credentials = [
            await off_loop(client.enroll, house.app.tokens.join, name)
            for client, name in zip(clients, NAMES, strict=True)
        ]
        await asyncio.gather(*(off_loop(client.poll, (), 0.0) for client in clients))
        for seed in (4, 1):
            await off_loop(send, clients[seed], seed)
    async with open_house(tmp_path / "twice") as house:
        assert not list((tmp_path / "twice").rglob(".stack.*"))
        for seed in (3, 0, 2):
            await off_loop(send, back_in(house, credentials[seed]), seed)
        await off_loop(house.operator.wait)
        assert torch.equal(await off_loop(version, house, 1), expected)


def send_filled(client: LightClient, spec: TensorSpec, value: float) -> None:
    assignment = client.next_assignment()
    update = torch.full(spec.shape, value, dtype=torch.float64)
    client.upload(assignment.assignment_id, encode_update(assignment, (spec,), lambda _: update, 1))


async def test_a_round_that_cannot_be_combined_fails_with_the_reason_and_harms_no_other(house: House) -> None:
    """The squares of these updates are beyond float64."""
    spec = TensorSpec("w", (3,), "float64")
    await off_loop(
        house.operator.submit,
        robust("krum", max_rounds=2),
        {"w": torch.full((3,), 1e160, dtype=torch.float64)},
        "",
        [spec],
    )
    clients = await clients_of(house)
    for size in (1e160, 1e10):
        await asyncio.gather(
            *(off_loop(send_filled, client, spec, size * (1 + number)) for number, client in enumerate(clients))
        )
        if size == 1e160:
            await off_loop(house.operator.wait, "test", lambda run: "round 1 failed" in run.reason or run.round > 1)
    report = await off_loop(house.operator.report)
    assert report.rounds[0].state == runs_pb2.ROUND_STATE_FAILED
    assert "too large for distances between them" in report.rounds[0].reason
    await off_loop(house.operator.wait)
    assert (await off_loop(house.operator.report)).rounds[1].state == runs_pb2.ROUND_STATE_COMMITTED


async def test_importance_multiplies_the_weight_of_the_sites_that_it_names(house: House) -> None:
    extra = '[aggregation]\nkind = "mean"\nimportance = { a = 3 }\n'
    await off_loop(house.operator.submit, config(size=2, quorum=2, extra=extra))
    a, b = [await off_loop(house.client, name) for name in ("a", "b")]
    await asyncio.gather(off_loop(answer, a, 0.5, 2), off_loop(answer, b, 0.25, 2))
    await off_loop(house.operator.wait)
    assert await off_loop(weights, house, 1) == (3 * 2 * 0.5 + 2 * 0.25) / 8
    assert [(await off_loop(member, house, name)).weight for name in ("a", "b")] == [6, 2]
