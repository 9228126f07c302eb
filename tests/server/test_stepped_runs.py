"""Runs whose server optimizer or schedule remembers: a restart changes no bit, and no file outlives its use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.light_client import LightClient, encode_update
from fed_core.errors import DiskFullError
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_server.config import parse_run_config
from fed_server.rounds.policy import server_optimizer
from fed_server.store.blobs import DataDirectory
from fedstream.v1 import common_pb2, participation_pb2, runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import back_in, open_house, until

ROUNDS = 4
MODEL = {
    "w": torch.linspace(-1, 1, 600).reshape(20, 30),
    "long": torch.linspace(-1, 1, 2**16 + 100),
    "count": torch.tensor(0),
    "b.mean": torch.linspace(0, 1, 30),
}
LATTICE = '\n[uplink]\nkind = "raw"\n[downlink]\nkind = "lattice"\nstep = 1.0\n'
DELTA = '\n[uplink]\nkind = "raw"\n[downlink]\nkind = "delta"\n'


def text(kind: str, extra: str = "", *, downlink: str = "") -> str:
    """A run of one site."""
    optimizer = f'[server_optimizer]\nkind = "{kind}"\nschedule = {{ kind = "exponential", factor = 0.5 }}\n'
    return config(size=1, max_rounds=ROUNDS, extra=f"{downlink}\n{optimizer}{extra}", is_exact=not downlink)


def change(spec: TensorSpec, number: int) -> Tensor:
    """A site's update of a round, in binary fractions that a sum keeps."""
    if spec.dtype == "int64":
        return torch.tensor(number)
    values = torch.sin(torch.arange(spec.num_elements, dtype=torch.float64) + number) / 8
    return (values * 2**12).round().div(2**12).reshape(spec.shape).float()


def train(client: LightClient, loss: float = 1.0) -> participation_pb2.Assignment:
    assignment = client.next_assignment()
    manifest, _ = client.model(assignment)
    update = encode_update(
        assignment, manifest.specs, lambda spec: change(spec, assignment.round), metrics={"loss": loss}
    )
    client.upload(assignment.assignment_id, update)
    return assignment


def kept(house: House, folder: str) -> list[str]:
    return sorted(path.name for path in (house.app.settings.data_dir / folder).glob("*/*.safetensors"))


async def played(
    data_dir: Path, config_toml: str, restart_after: Sequence[int] = (), losses: Sequence[float] = (1.0,) * ROUNDS
) -> tuple[list[str], list[float], list[list[str]]]:
    """A whole run: digests of its versions, the clients' learning rates, and the state files after every round. The coordinator is
    stopped and started again after some of the rounds."""
    rates: list[float] = []
    states: list[list[str]] = []
    lives = [*restart_after, ROUNDS]
    credential = ""
    for life, last in enumerate(lives):
        async with open_house(data_dir) as house:
            if life == 0:
                await off_loop(house.operator.submit, config_toml, MODEL)
                client = LightClient(house.app.address)
                credential = await off_loop(client.enroll, house.app.tokens.join, "a")
            else:
                client = back_in(house, credential)
            while len(rates) < last:
                assignment = await off_loop(train, client, losses[len(rates)])
                rates.append(assignment.plan.optimizer.learning_rate)
                version = len(rates)
                await until(lambda house=house, version=version: house.operator.run().model_version >= version)
                if version < ROUNDS:
                    name = [f"{version}.optimizer.safetensors"]
                    await until(lambda house=house: len([n for n in kept(house, "masters") if "optimizer" in n]) < 2)
                    states.append([n for n in kept(house, "masters") if "optimizer" in n])
                    assert states[-1] in ([], name)
            client.close()
            if last == ROUNDS:
                run = await off_loop(house.operator.wait)
                assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
                await until(lambda house=house: kept(house, "masters") == [])
                report = await off_loop(house.operator.report)
    return [model.digest.hex() for model in report.models], rates, states


@pytest.mark.parametrize(
    ("kind", "downlink"),
    [
        ("sgd", LATTICE),
        ("momentum", ""),
        ("momentum", DELTA),
        ("adagrad", LATTICE),
        ("adam", ""),
        ("adam", LATTICE),
        ("yogi", DELTA),
    ],
    ids=["sgd-lattice", "momentum-raw", "momentum-delta", "adagrad-lattice", "adam-raw", "adam-lattice", "yogi-delta"],
)
async def test_a_restarted_run_comes_to_the_same_bits(tmp_path: Path, kind: str, downlink: str) -> None:
    toml = text(kind, downlink=downlink)
    expected = await played(tmp_path / "well", toml)
    found = await played(tmp_path / "restarted", toml, restart_after=[1, 3])
    assert found == expected
    digests, _, states = expected
    assert len(set(digests)) == ROUNDS + 1
    assert all(bool(names) == (kind != "sgd") for names in states)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
async def test_versions_are_those_of_the_optimizer_by_itself(tmp_path: Path, kind: str) -> None:
    toml = text(kind, "[keep]\nversions = 99\n")
    await played(tmp_path, toml, restart_after=[2])
    run = parse_run_config(toml)
    [folder] = (tmp_path / "models").iterdir()
    expected = {name: tensor.clone() for name, tensor in MODEL.items()}
    initial = server_optimizer(run, 1).initial
    states = {
        name: [torch.full((expected[name].numel(),), value, dtype=torch.float64) for value in initial.values()]
        for name in ("w", "long")
    }
    for number in range(1, ROUNDS + 1):
        optimizer = server_optimizer(run, number)
        for name in ("w", "long"):
            spec = TensorSpec(name, tuple(MODEL[name].shape), "float32")
            state, moved = optimizer.step(
                tuple(t.double() for t in states[name]),
                expected[name].reshape(-1).double(),
                change(spec, number).reshape(-1).double(),
            )
            states[name] = [t.float() for t in state]
            expected[name] = moved.float().reshape(spec.shape)
        expected["b.mean"] = expected["b.mean"] + change(TensorSpec("b.mean", (30,), "float32"), number)
        expected["count"] = torch.tensor(number)
        with SafetensorsReader(folder / f"{number}.safetensors") as reader:
            for name, tensor in expected.items():
                assert reader.tensor(name).equal(tensor), (number, name)


async def test_a_plateau_is_remembered_by_a_restart(tmp_path: Path) -> None:
    schedule = (
        '[training.schedule]\nkind = "plateau"\nmetric = "train.loss"\ndirection = "min"\npatience = 1\nfactor = 0.5\n'
    )
    losses = [1.0, 1.5, 0.5, 0.75]
    _, expected, _ = await played(tmp_path / "well", text("sgd", schedule), losses=losses)
    assert expected == [0.1, 0.1, 0.05, 0.05]
    _, found, _ = await played(tmp_path / "restarted", text("sgd", schedule), restart_after=[1, 2, 3], losses=losses)
    assert found == expected


async def test_a_plateau_of_evaluations_falls_when_they_are_over(house: House) -> None:
    schedule = '[training.schedule]\nkind = "plateau"\npatience = 1\nfactor = 0.5\n'
    await off_loop(house.operator.submit, config(size=1, max_rounds=3, at="clients", extra=schedule), MODEL)
    client = await off_loop(house.client, "a")
    rates = []
    for accuracy in (0.5, 0.25, 0.75):
        assignment = await off_loop(train, client)
        rates.append(assignment.plan.optimizer.learning_rate)
        evaluation = await off_loop(client.next_assignment)
        assert evaluation.kind == common_pb2.ASSIGNMENT_KIND_EVALUATE
        await off_loop(client.report_evaluation, evaluation.assignment_id, 10, accuracy=accuracy)
    assert rates == [0.1, 0.1, 0.05]
    await off_loop(house.operator.wait)
    reasons = [round.reason for round in (await off_loop(house.operator.report)).rounds]
    assert [reason.endswith("; no gain on 0.5, so the learning rate falls to 0.05") for reason in reasons] == [
        False,
        True,
        False,
    ]


async def test_the_disk_must_hold_what_the_optimizer_keeps(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of two float32 a parameter, besides what every run needs."""
    model_bytes = sum(tensor.nbytes for tensor in MODEL.values())
    enough = model_bytes * (3 + 6 + 1)
    num_parameters = MODEL["w"].numel() + MODEL["long"].numel()
    free = enough + 2 * 2 * 4 * num_parameters
    monkeypatch.setattr(DataDirectory, "free_bytes", lambda self: free - 1)
    with pytest.raises(DiskFullError, match="needs"):
        await off_loop(house.operator.submit, text("adam"), MODEL)
    monkeypatch.setattr(DataDirectory, "free_bytes", lambda self: free)
    await off_loop(house.operator.submit, text("adam"), MODEL)


async def test_a_step_out_of_range_fails_the_run_by_name(house: House) -> None:
    extra = f'[aggregation]\nkind = "mean"\nbound = {2.0**64}\nmax_weight = 1\n'
    await off_loop(house.operator.submit, text("adagrad", extra), {"w": torch.zeros(4)})
    client = await off_loop(house.client, "a")
    assignment = await off_loop(client.next_assignment)
    manifest, _ = await off_loop(client.model, assignment)
    huge = encode_update(assignment, manifest.specs, lambda spec: torch.full(spec.shape, 2.0**64))
    await off_loop(client.upload, assignment.assignment_id, huge)
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FAILED
    assert run.reason == "the server optimizer's v of tensor 'w' holds NaN or leaves the range of float32"
