from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fed_core.batches import evaluate
from fed_core.safetensors_tiles import SafetensorsWriter
from fed_core.tensors import model_specs, model_tensors
from fed_core.workload import initial_model, load_workload
from fed_server.evaluation.evaluator import EvaluationError, Evaluator

pytestmark = pytest.mark.xdist_group("evaluation")  # they share a process that takes seconds to start

TASK = """
import os
import torch
from fed_core.workload import Workload

class Task(Workload):
    name = "task"

    def model(self):
        return torch.nn.Linear(int(os.environ.get("WIDTH", 2)), 1)

    def train_data(self, site):
        raise AssertionError("no business of the coordinator")

    def coordinator_data(self, path):
        return None if path is None else (torch.load(path), torch.ones(5, 1))

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def metrics(self, model, batch):
        weight = model.weight[0, 0]
        if weight == 100:
            raise ValueError("no metric for this")
        if weight == 101:
            print("giving up")
            os._exit(3)
        return {"loss": self.loss(model, batch), "threads": torch.get_num_threads()}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "task.py").write_text(TASK)
    torch.save(torch.arange(10.0).reshape(5, 2), folder / "data.pt")
    return folder


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> Iterator[Evaluator]:
    with Evaluator(str(folder / "task.py"), folder / "data.pt", folder / "evaluator.log") as evaluator:
        yield evaluator


def model_file(folder: Path, model: torch.nn.Module) -> Path:
    path = folder / "model.safetensors"
    values = model_tensors(model)
    with path.open("wb+") as file:
        writer = SafetensorsWriter(file, model_specs(model), {})
        for name, tensor in values.items():
            writer.write_tile(name, 0, tensor.reshape(-1))
        writer.finish()
    return path


def linear(folder: Path, weight: float, width: int = 2) -> Path:
    model = torch.nn.Linear(width, 1)
    with torch.no_grad():
        model.weight.fill_(weight)
    return model_file(folder, model)


def test_the_name_is_the_workloads(evaluator: Evaluator) -> None:
    assert evaluator.describe() == "task"


def test_the_metrics_are_those_of_the_same_evaluation_here(evaluator: Evaluator, folder: Path, tmp_path: Path) -> None:
    workload = load_workload(str(folder / "task.py"))
    model = initial_model(workload, 9)
    data = workload.coordinator_data(folder / "data.pt")
    assert data is not None
    expected = evaluate(workload, model, data, 2, torch.device("cpu"))
    total, metrics = evaluator.evaluate(model_file(tmp_path, model), 2)
    assert (total, metrics["loss"]) == (5, expected[1]["loss"])
    assert metrics["threads"] == 1


def test_code_that_raises_is_named_and_the_process_lives(evaluator: Evaluator, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="ValueError: no metric for this") as caught:
        evaluator.evaluate(linear(tmp_path, 100), 2)
    assert "in metrics" in caught.value.traceback
    assert evaluator.evaluate(linear(tmp_path, 1), 2)[0] == 5


def test_code_that_dies_is_named_and_replaced(evaluator: Evaluator, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(EvaluationError, match="exited with status 3; its last line was: giving up"):
        evaluator.evaluate(linear(tmp_path, 101), 2)
    assert evaluator.evaluate(linear(tmp_path, 1), 2)[0] == 5
    assert "giving up" in (folder / "evaluator.log").read_text()


def test_another_model_is_explained(evaluator: Evaluator, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"'weight' has shape \(1, 2\), expected \(1, 3\)"):
        evaluator.evaluate(linear(tmp_path, 1, width=3), 2)


def test_a_coordinator_without_data_says_so(folder: Path) -> None:
    with (
        Evaluator(str(folder / "task.py"), None, None) as evaluator,
        pytest.raises(EvaluationError, match="has no coordinator_data"),
    ):
        evaluator.describe()
