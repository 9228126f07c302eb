from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fed_core.workload
from fed_core.batches import batch_of, choose_device, evaluate, num_examples, reproducible, seeds_of, to_device
from fed_core.errors import ConfigError, InvalidError
from fed_core.plan import OptimizerPlan
from fed_core.workload import Data, Site, Workload, initial_model, load_workload

CPU = torch.device("cpu")

SOURCE = """
import torch
from fed_core.workload import Workload
from neighbour import WIDTH

class {name}(Workload):
    name = "{name}"
    def model(self): return torch.nn.Linear(WIDTH, 1)
    def train_data(self, site): return (torch.ones(3, WIDTH), torch.zeros(3, 1))
    def loss(self, model, batch): return (model(batch[0]) - batch[1]).square().mean()
"""


class Regression(Workload):
    name = "regression"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))

    def train_data(self, site: Site) -> Data:
        return torch.ones(3, 2), torch.zeros(3, 1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[..., Path]:
    def write(*names: str) -> Path:
        (tmp_path / "neighbour.py").write_text("WIDTH = 2\n")
        path = tmp_path / "task.py"
        path.write_text("".join(SOURCE.format(name=name) for name in names))
        return path

    return write


@pytest.fixture(autouse=True)
def _forget_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("task", "neighbour"):
        sys.modules.pop(name, None)


def test_the_module_does_not_import_torch() -> None:
    command = "import sys, fed_core.workload, fed_core.plan, fed_core.child_process; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_a_file_with_one_workload_needs_no_class_name(write_file: Callable[..., Path]) -> None:
    assert load_workload(str(write_file("Only"))).name == "Only"


def test_a_class_is_picked_by_name(write_file: Callable[..., Path]) -> None:
    assert load_workload(f"{write_file('One', 'Two')}:Two").name == "Two"


def test_a_file_with_two_workloads_asks_which(write_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"One, Two; say which: .*task\.py:One"):
        load_workload(str(write_file("One", "Two")))


def test_an_unknown_class_lists_what_there_is(write_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="no workload class Three; it has One, Two"):
        load_workload(f"{write_file('One', 'Two')}:Three")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_workload(str(tmp_path / "missing.py"))


def test_a_name_that_is_not_installed_says_so() -> None:
    with pytest.raises(ConfigError, match="no installed workload is called 'nothing'"):
        load_workload("nothing")


def test_an_installed_workload_is_found_by_its_name(
    write_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_file("Installed").parent)
    entry = EntryPoint("mine", "task:Installed", "fedstream.workloads")
    monkeypatch.setattr(fed_core.workload, "entry_points", lambda group: [entry] if group == entry.group else [])
    assert load_workload("mine").name == "Installed"


def test_a_class_that_lacks_a_method_names_it(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text("from fed_core.workload import Workload\nclass Half(Workload):\n    name = 'half'\n")
    with pytest.raises(ConfigError, match=r"Half in .* must still define loss, model, train_data"):
        load_workload(str(path))


def test_a_class_without_a_name_says_what_to_write(write_file: Callable[..., Path]) -> None:
    path = write_file("Unnamed")
    path.write_text(path.read_text().replace('    name = "Unnamed"\n', ""))
    with pytest.raises(ConfigError, match=r"Unnamed\.name is None"):
        load_workload(str(path))


def test_what_a_file_raises_passes_through_and_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise ZeroDivisionError\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_workload(str(path))


def test_the_initial_model_depends_on_the_seed_only_and_disturbs_nobody() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = initial_model(Regression(), 1)
    assert torch.equal(torch.rand(3), expected)
    again, other = initial_model(Regression(), 1), initial_model(Regression(), 2)
    assert torch.equal(first[0].weight, again[0].weight)  # type: ignore[index]
    assert not torch.equal(first[0].weight, other[0].weight)  # type: ignore[index]


def test_a_model_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Regression, "model", lambda self: {"weights": 1})
    with pytest.raises(ConfigError, match=r"Regression.model\(\) returned dict"):
        initial_model(Regression(), 0)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_the_default_optimizer_takes_its_constants_from_the_plan(kind: str) -> None:
    model = initial_model(Regression(), 0)
    frozen = next(model.parameters()).requires_grad_(False)
    plan = OptimizerPlan(kind, 0.25, momentum=0.5 if kind == "sgd" else 0.0, weight_decay=0.125)
    optimizer = Regression().optimizer(model, plan)
    assert type(optimizer).__name__.lower() == kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group.get("momentum", 0.0)) == (0.25, 0.125, plan.momentum)
    assert all(parameter is not frozen for parameter in group["params"])


def test_site_options_are_read_with_their_errors(tmp_path: Path) -> None:
    site = Site("here", tmp_path, {"count": "3", "share": "0.5", "on": "true", "word": "x"})
    assert (site.integer("count"), site.number("share"), site.flag("on"), site.integer("absent", 4)) == (
        3,
        0.5,
        True,
        4,
    )
    assert site.data_path() == tmp_path
    for read, message in (
        (lambda: site.integer("word"), "option word is 'x'; expected an integer"),
        (lambda: site.number("absent"), "option absent is missing"),
        (lambda: site.flag("word"), "expected true or false"),
        (lambda: site.allow_options("counts", "share", "on", "word"), "did you mean counts"),
        (lambda: Site().data_path(), "--data PATH"),
        (lambda: Site(data=tmp_path / "gone").data_path(), "there is no"),
    ):
        with pytest.raises(ConfigError, match=message):
            read()


def test_the_order_of_an_evaluation_is_fixed_and_the_mean_is_over_examples() -> None:
    workload, model = Regression(), nn.Linear(2, 1)
    x, y = torch.randn(7, 2), torch.randn(7, 1)
    total, metrics = evaluate(workload, model, (x, y), 3, CPU)
    assert total == 7
    assert metrics["loss"] == pytest.approx(float((model(x) - y).square().mean().detach()), rel=1e-6)
    seen: list[tuple[int, int]] = []
    assert evaluate(workload, model, TensorDataset(x, y), 3, CPU, lambda *at: seen.append(at)) == (total, metrics)
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_an_evaluation_uses_evaluation_mode_and_puts_the_model_back() -> None:
    model = initial_model(Regression(), 0).train()
    data = (torch.randn(5, 2), torch.zeros(5, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(Regression(), model, data, 2, CPU) == evaluate(Regression(), model, data, 2, CPU)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_no_examples_have_no_metrics() -> None:
    assert evaluate(Regression(), nn.Linear(2, 1), (torch.ones(0, 2), torch.ones(0, 1)), 4, CPU) == (0, {})


@pytest.mark.parametrize("name", ["Accuracy", "top 1", "", "a" * 101])
def test_a_metric_whose_name_cannot_travel_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Regression, "metrics", lambda self, model, batch: {name: 1.0})
    with pytest.raises(InvalidError, match="metric"):
        evaluate(Regression(), nn.Linear(2, 1), (torch.ones(1, 2), torch.ones(1, 1)), 4, CPU)


@pytest.mark.parametrize("data", [(torch.ones(2), torch.ones(3)), (), (torch.tensor(1.0),), ([1], [2]), iter([1])])
def test_data_of_another_form_is_refused(data: Any) -> None:
    with pytest.raises(InvalidError):
        num_examples(data)


def test_a_dataset_is_collated_and_tensors_are_cut() -> None:
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    indices = torch.tensor([2, 0])
    for data in ((x, y), TensorDataset(x, y)):
        batch = batch_of(Regression(), data, indices, CPU)
        assert torch.equal(batch[0], x[indices])
        assert torch.equal(batch[1], y[indices])


def test_everything_in_a_batch_goes_to_the_device() -> None:
    pair = namedtuple("pair", "x y")
    meta = torch.device("meta")
    moved = to_device({"a": [torch.ones(1)], "b": pair(torch.ones(1), "text"), "c": (1, None)}, meta)
    assert moved["a"][0].device == moved["b"].x.device == meta
    assert moved["b"].y == "text"
    assert moved["c"] == (1, None)


def test_the_same_seed_gives_the_same_numbers_and_threads_are_put_back() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    draws = []
    for _ in range(2):
        with reproducible(3, 2):
            assert torch.get_num_threads() == 2
            draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[1]
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert len({*seeds_of(3, 2), *seeds_of(4, 2)}) == 4


def test_a_device_that_is_not_there_is_explained() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="device 'tpu' is not available"):
        choose_device("tpu")
