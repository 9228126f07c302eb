"""Rounds whose cohort was drawn by importance: what updates count is fixed when the round opens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.light_client import LightClient, constant, encode_update
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_server.rounds.cohort import ImportancePolicy, draw_by_importance
from fed_server.rounds.importance import SiteReport
from fed_server.store.base import RoundRecord
from fed_server.store.blobs import DataDirectory
from fed_server.store.sql import SqlStore
from fedstream.v1 import participation_pb2
from tests.server.conftest import config, off_loop
from tests.server.houses import back_in, open_house, until

NAMES = ("a", "b", "c", "d")
LOSS = {"a": 0.5, "b": 1.0, "c": 2.0, "d": 8.0}
EXAMPLES = {"a": 10, "b": 40, "c": 20, "d": 30}
VALUE = {"a": 0.5, "b": -0.25, "c": 0.125, "d": 1.0}
ROUNDS = 5
MODEL = {"w": torch.zeros(10), "b.mean": torch.zeros(3)}


def text(weighting: str) -> str:
    """Two of four sites a round."""
    extra = f'[aggregation]\nkind = "mean"\nweighting = "{weighting}"\nbound = 64.0\n[keep]\nversions = 9\n'
    chosen = '[cohort]\nselection = "importance"\nmin_clients = 4\n'
    return config(size=2, max_rounds=ROUNDS, extra=extra).replace("[cohort]\n", chosen)


def send(client: LightClient, name: str, work: participation_pb2.Assignment) -> None:
    manifest, _ = client.model(work)

    def make(spec: TensorSpec) -> object:
        return constant(VALUE[name] if spec.role == "parameter" else 0.5)(spec)

    update = encode_update(work, manifest.specs, make, EXAMPLES[name], metrics={"loss": LOSS[name]})  # type: ignore[arg-type]
    client.upload(work.assignment_id, update)


def rounds_of(data_dir: Path) -> list[RoundRecord]:
    """What the store holds of a coordinator that has stopped."""
    store = SqlStore(f"sqlite:///{DataDirectory(data_dir).database_path}")
    with store.transaction() as tx:
        [run] = tx.runs()
        rounds = tx.rounds(run.run_id)
    store.close()
    return rounds


async def played(
    data_dir: Path, config_toml: str, stop_in: tuple[int, ...] = ()
) -> tuple[list[str], list[RoundRecord], list[dict[str, int]]]:
    """A whole run: digests of its versions, its rounds, and what updates counted in each. In the rounds `stop_in` the coordinator
    is stopped after the first update and started again."""
    secrets: dict[str, str] = {}
    number = 1
    while True:
        async with open_house(data_dir) as house:
            if not secrets:
                await off_loop(house.operator.submit, config_toml, MODEL)
            clients: dict[str, LightClient] = {}
            for name in NAMES:
                if name in secrets:
                    clients[name] = back_in(house, secrets[name])
                else:
                    clients[name] = LightClient(house.app.address)
                    secrets[name] = await off_loop(clients[name].enroll, house.app.tokens.join, name)
                await off_loop(clients[name].poll, wait_seconds=0)
            is_stopped = False
            while number <= ROUNDS and not is_stopped:
                await until(lambda number=number: house.operator.run().round == number)
                cohort = [
                    (name, work[0])
                    for name in NAMES
                    if (work := (await off_loop(clients[name].poll, wait_seconds=0)).assignments)
                ]
                for name, work in cohort:
                    await off_loop(send, clients[name], name, work)
                    if number in stop_in:
                        stop_in = tuple(n for n in stop_in if n != number)
                        is_stopped = True
                        break
                else:
                    number += 1
            for client in clients.values():
                client.close()
            if number > ROUNDS:
                await off_loop(house.operator.wait)
                report = await off_loop(house.operator.report)
                weights = [{c.client_name: c.weight for c in r.clients} for r in report.rounds]
                break
    return [model.digest.hex() for model in report.models], rounds_of(data_dir), weights


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
async def test_a_round_counts_what_its_draw_said_and_a_restart_changes_no_bit(tmp_path: Path, weighting: str) -> None:
    digests, rounds, weights = await played(tmp_path / "well", text(weighting))
    reports: dict[str, SiteReport] = {}
    for round, counted in zip(rounds, weights, strict=True):
        policy = ImportancePolicy(reports, 0.2, {}, weighting == "examples", 2**20)
        cohort, correction = draw_by_importance(7, round.round, NAMES, 2, policy)
        assert round.weights == counted == correction.weights
        assert round.weight_unit == correction.unit
        assert round.chances == correction.chances
        reports |= {name: SiteReport(round.round, LOSS[name], EXAMPLES[name]) for name in cohort}
    assert len({frozenset(counted.items()) for counted in weights}) > 2
    again = await played(tmp_path / "stopped", text(weighting), stop_in=(1, 3))
    assert again[0] == digests
    assert again[2] == weights


async def test_parameters_are_divided_by_what_weights_are_on_average(tmp_path: Path) -> None:
    _, rounds, _ = await played(tmp_path, text("uniform"))
    w = running = 0.0
    for round in rounds:
        with SafetensorsReader(tmp_path / "models" / round.run_id / f"{round.round}.safetensors") as reader:
            made = {name: set(reader.tensor(name).flatten().tolist()) for name in MODEL}
        w += sum(weight * VALUE[name] for name, weight in round.weights.items()) / (2 * round.weight_unit)
        running += 0.5
        assert list(made["w"]) == [pytest.approx(w, abs=1e-6)]
        assert made["b.mean"] == {running}, "buffers are plain means"
    assert any(sum(round.weights.values()) != 2 * round.weight_unit for round in rounds)
