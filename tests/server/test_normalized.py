"""Normalized averaging: updates that stand for different amounts of work."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.light_client import LightClient, constant, encode_update
from fed_core.errors import UpdateRefusedError
from fed_core.specs import TensorSpec
from fedstream.v1 import common_pb2, runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import weights

WIDE = '\n[aggregation]\nkind = "mean"\nbound = 64.0\n'
FEDNOVA = f'\n[training.objective]\nkind = "fednova"\n{WIDE}'


def send(client: LightClient, value: float, num_examples: int, normalizer: float) -> common_pb2.ObjectivePlan:
    """An update of one value that was divided; the objective that was asked for."""
    assignment = client.next_assignment()
    manifest, _ = client.model(assignment)

    def make(spec: TensorSpec) -> object:
        return constant(value if spec.role == "parameter" else 0.5)(spec)

    update = encode_update(assignment, manifest.specs, make, num_examples, normalizer=normalizer)  # type: ignore[arg-type]
    client.upload(assignment.assignment_id, update)
    return assignment.plan.objective


async def test_what_updates_have_in_common_is_scaled_by_their_mean_work(house: House) -> None:
    await off_loop(house.operator.submit, config(size=2, extra=FEDNOVA))
    a, b = [await off_loop(house.client, name) for name in ("a", "b")]
    asked, _ = await asyncio.gather(off_loop(send, a, 1.0, 1, 2.0), off_loop(send, b, 3.0, 3, 6.0))
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    assert asked.kind == common_pb2.OBJECTIVE_KIND_FEDNOVA
    # The mean of what was sent is (1 * 1 + 3 * 3) / 4, the mean work (1 * 2 + 3 * 6) / 4.
    assert await off_loop(weights, house, 1) == 2.5 * 5.0


async def test_equal_work_gives_federated_averaging(house: House) -> None:
    """Divided by a power of two, so that nothing is rounded."""
    clients = [await off_loop(house.client, name) for name in ("a", "b")]
    made = []
    for name, extra, share in (("nova", FEDNOVA, 4.0), ("plain", WIDE, 0.0)):
        await off_loop(house.operator.submit, config(name, size=2, extra=extra))
        updates = [
            (client, value / (share or 1.0), 1 + i)
            for i, (client, value) in enumerate(zip(clients, (0.25, 3.5), strict=True))
        ]
        await asyncio.gather(*(off_loop(send, *update, share) for update in updates))
        await off_loop(house.operator.wait, name)
        made.append(await off_loop(weights, house, 1, name))
    assert made[0] == made[1]


@pytest.mark.parametrize(("extra", "normalizer"), [(FEDNOVA, 0.0), ("", 2.0)])
async def test_an_update_that_is_divided_or_not_against_the_plan_is_refused(
    house: House, extra: str, normalizer: float
) -> None:
    await off_loop(house.operator.submit, config(size=1, extra=extra))
    client = await off_loop(house.client, "a")
    with pytest.raises(UpdateRefusedError, match=r"normalizer = .* install the coordinator's version"):
        await off_loop(send, client, 0.25, 1, normalizer)
