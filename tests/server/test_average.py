"""The moving average of a run's versions: its rule, its file, and who gets to see it."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import torch
from torch import Tensor

from benchmarks.light_client import LightClient, encode_update
from fed_core.errors import ConfigError, DiskFullError, NotFoundError
from fed_core.rpc_status import from_rpc_error
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_server.optim.average import blend, decay_at
from fed_server.store.blobs import DataDirectory
from fedstream.v1 import runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import back_in, open_house, until

ROUNDS = 5
AVERAGE = "[average]\ndecay = 0.25\n"
MODEL = {
    "w": torch.linspace(-1, 1, 2**16 + 100),
    "wave": torch.view_as_complex(torch.linspace(-1, 1, 40).reshape(20, 2)),
    "wide": torch.linspace(-1, 1, 20).double(),
    "count": torch.tensor(0),
    "b.mean": torch.linspace(0, 1, 30),
    "b.empty": torch.zeros(0),
}


def change(spec: TensorSpec, number: int) -> Tensor:
    if spec.dtype == "int64":
        return torch.tensor(number)
    values = torch.full(spec.shape, 2.0**-number * (-1) ** number, dtype=torch.float64)
    return values.to(MODEL[spec.name].dtype)


def work(client: LightClient, num_rounds: int = 1) -> None:
    for _ in range(num_rounds):
        assignment = client.next_assignment()
        manifest, _ = client.model(assignment)
        update = encode_update(assignment, manifest.specs, lambda spec, a=assignment: change(spec, a.round))
        client.upload(assignment.assignment_id, update)


def stored(path: Path) -> dict[str, Tensor]:
    with SafetensorsReader(path) as reader:
        return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


def names(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / "models").glob("*/*"))


def average_of(versions: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """By the definition, rounded to each tensor's type after every version, as the file is."""
    average = dict(versions[0])
    for number, version in enumerate(versions[1:], start=1):
        share = min(decay, (1 + number) / (10 + number))
        for name, values in version.items():
            if values.dtype == torch.int64:
                average[name] = values
                continue
            kind = torch.complex128 if values.is_complex() else torch.float64
            average[name] = (share * average[name].to(kind) + (1 - share) * values.to(kind)).to(values.dtype)
    return average


def test_the_decay_rises_to_what_was_asked_for() -> None:
    assert [decay_at(0.25, version) for version in range(1, 5)] == [2 / 11, 0.25, 0.25, 0.25]
    assert decay_at(0.999, 90) == 0.91


def test_an_average_of_equal_versions_is_the_version() -> None:
    values = torch.linspace(-1, 1, 100).double()
    assert blend(values.clone(), values.clone(), 0.75).tolist() == pytest.approx(values.tolist(), rel=1e-15)


@pytest.mark.parametrize("downlink", ["", '[uplink]\nkind = "raw"\n'], ids=["raw", "lattice"])
async def test_the_average_is_that_of_the_versions_and_survives_restarts(tmp_path: Path, downlink: str) -> None:
    """Of v, which the clients have, and not of the master weights."""
    toml = config(size=1, max_rounds=ROUNDS, extra=f"{downlink}{AVERAGE}[keep]\nversions = 99\n", is_exact=not downlink)
    credential = ""
    for life, num_rounds in enumerate((2, 1, ROUNDS - 3)):
        async with open_house(tmp_path) as house:
            if life == 0:
                await off_loop(house.operator.submit, toml, MODEL)
                client = LightClient(house.app.address)
                credential = await off_loop(client.enroll, house.app.tokens.join, "a")
            else:
                client = back_in(house, credential)
            done = (await off_loop(house.operator.run)).model_version + num_rounds
            await off_loop(work, client, num_rounds)
            await until(lambda house=house, done=done: house.operator.run().model_version >= done)
            client.close()
    [folder] = (tmp_path / "models").iterdir()
    versions = [stored(folder / f"{number}.safetensors") for number in range(ROUNDS + 1)]
    assert not versions[-1]["w"].equal(versions[-2]["w"])
    for number in range(1, ROUNDS + 1):
        found, expected = stored(folder / f"{number}.average.safetensors"), average_of(versions[: number + 1], 0.25)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].equal(tensor), (number, name)


async def test_an_average_is_kept_as_long_as_its_version(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, max_rounds=4, extra=f"{AVERAGE}[keep]\nversions = 2\n"), MODEL)
    client = await off_loop(house.client, "a")
    await off_loop(work, client, 4)
    await off_loop(house.operator.wait)
    data_dir = house.app.settings.data_dir
    kept = ["3.average.safetensors", "3.safetensors", "4.average.safetensors", "4.safetensors"]
    await until(lambda: names(data_dir) == kept)


async def test_a_run_without_one_keeps_none(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1), MODEL)
    await off_loop(work, await off_loop(house.client, "a"))
    await off_loop(house.operator.wait)
    assert names(house.app.settings.data_dir) == ["0.safetensors", "1.safetensors"]
    with pytest.raises(NotFoundError, match=r"no average at version 1 of run test.*average\.decay"):
        await off_loop(downloaded, house, newest=True, average=True)


def downloaded(house: House, **which: bool | int) -> tuple[runs_pb2.ModelVersion, bytes]:
    try:
        messages = list(
            house.operator.stub.DownloadModel(runs_pb2.DownloadModelRequest(run="test", **which), timeout=30)
        )
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    return messages[0].header.model, b"".join(message.chunk.data for message in messages[1:])


async def test_the_average_is_downloaded_in_place_of_its_version(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, max_rounds=2, extra=AVERAGE), MODEL)
    await off_loop(work, await off_loop(house.client, "a"), 2)
    await off_loop(house.operator.wait)
    [folder] = (house.app.settings.data_dir / "models").iterdir()
    for version in (1, 2):
        header, data = await off_loop(downloaded, house, version=version, average=True)
        assert (header.version, header.file_bytes) == (version, len(data))
        assert data == (folder / f"{version}.average.safetensors").read_bytes()
    header, data = await off_loop(downloaded, house, newest=True)
    assert data == (folder / "2.safetensors").read_bytes()
    with pytest.raises(NotFoundError, match="no average at version 0"):
        await off_loop(downloaded, house, version=0, average=True)


TASK = """
import torch
from fed_core.workload import Workload

class Echo(Workload):
    name = "echo"

    def model(self):
        return torch.nn.Linear(3, 1, bias=False)

    def train_data(self, site):
        raise AssertionError("no business of the coordinator")

    def coordinator_data(self, path):
        return torch.ones(4, 3), torch.ones(4, 1)

    def loss(self, model, batch):
        return model(batch[0]).mean()

    def metrics(self, model, batch):
        return {"accuracy": model.weight[0, 0]}
"""


@pytest.mark.xdist_group("evaluation")
async def test_the_coordinator_measures_the_average_beside_the_version(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    evaluation = '[evaluation]\nat = "both"\nmetric = "average.accuracy"\ndirection = "min"\n'
    toml = config(size=1, max_rounds=2, extra=AVERAGE).replace('[evaluation]\nat = "none"\n', evaluation)
    async with open_house(tmp_path / "data", workloads=[str(tmp_path / "task.py")]) as house:
        await off_loop(house.operator.submit, toml, {"weight": torch.zeros(1, 3)})
        client = await off_loop(house.client, "a")
        for number in (1, 2):
            assignment = await off_loop(client.next_assignment)
            manifest, _ = await off_loop(client.model, assignment)
            value = torch.full((1, 3), 2.0**-number * (-1) ** number)
            update = encode_update(assignment, manifest.specs, lambda spec, value=value: value)
            await off_loop(client.upload, assignment.assignment_id, update)
            evaluate = await off_loop(client.next_assignment)
            await off_loop(client.report_evaluation, evaluate.assignment_id, 1, accuracy=0.75)
        await off_loop(house.operator.wait)
        report = await off_loop(house.operator.report)
    measured = [{metric.name: metric.value for metric in model.metrics} for model in report.models[1:]]
    assert [metrics["accuracy"] for metrics in measured] == [0.75, 0.75]
    assert [metrics["coordinator.accuracy"] for metrics in measured] == [-0.5, -0.25]
    first = (1 - 2 / 11) * -0.5
    averages = [metrics["average.accuracy"] for metrics in measured]
    assert averages == pytest.approx([first, 0.25 * first + 0.75 * -0.25], rel=1e-6)
    assert [model.version for model in report.models if model.is_best] == [1], "by the average"


async def test_half_precision_is_too_coarse_for_an_average(house: House) -> None:
    with pytest.raises(ConfigError, match=r"average\.decay: tensor 'h' is float16, which is too coarse"):
        await off_loop(house.operator.submit, config(extra=AVERAGE), {"w": torch.zeros(3), "h": torch.zeros(3).half()})


async def test_the_disk_must_hold_the_averages(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    model_bytes = sum(tensor.nbytes for tensor in MODEL.values())
    free = model_bytes * (3 + 6 + 1 + 3 + 2)
    monkeypatch.setattr(DataDirectory, "free_bytes", lambda self: free - 1)
    with pytest.raises(DiskFullError, match="needs"):
        await off_loop(house.operator.submit, config(size=1, extra=AVERAGE), MODEL)
    monkeypatch.setattr(DataDirectory, "free_bytes", lambda self: free)
    await off_loop(house.operator.submit, config(size=1, extra=AVERAGE), MODEL)
