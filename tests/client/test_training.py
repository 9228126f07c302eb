from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fed_client.training.loop import TrainOutcome, train
from fed_core.errors import InvalidError
from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_core.workload import Data, Site, Workload, initial_model

CPU = torch.device("cpu")
X = torch.arange(10.0).reshape(10, 1) / 10
Y = 3 * X + 1


class Line(Workload):
    name = "line"

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.rates: list[float] = []

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 1))

    def train_data(self, site: Site) -> Data:
        return X, Y

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    def training_step(self, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
        self.seen.append(batch[0].flatten().tolist())
        self.rates.append(optimizer.param_groups[0]["lr"])
        return super().training_step(model, batch, optimizer)


def plan(**changes: Any) -> TrainingPlan:
    work = {} if "steps" in changes else {"epochs": 2}
    return TrainingPlan(**{"batch_size": 4, "optimizer": OptimizerPlan("sgd", 0.1), "seed": 1, **work, **changes})


def trained(plan: TrainingPlan, data: Data = (X, Y), clock: Any = None) -> tuple[TrainOutcome, Line, dict[str, Tensor]]:
    workload = Line()
    model = initial_model(workload, 0)
    outcome = train(workload, model, data, plan, CPU, **({"clock": clock} if clock else {}))
    return outcome, workload, model.state_dict()


def is_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    outcome, workload, _ = trained(plan())
    assert [len(batch) for batch in workload.seen] == [4, 4, 2] * 2
    first, second = ([x for batch in workload.seen[at : at + 3] for x in batch] for at in (0, 3))
    assert sorted(first) == sorted(second) == X.flatten().tolist()
    assert first != second
    assert (outcome.num_steps, outcome.num_examples, outcome.is_partial) == (6, 10, False)


def test_steps_cycle_through_the_data() -> None:
    outcome, workload, _ = trained(plan(steps=4))
    assert [len(batch) for batch in workload.seen] == [4, 4, 2, 4]
    assert (outcome.num_steps, outcome.num_examples) == (4, 10)


def test_fewer_steps_than_an_epoch_count_the_examples_seen() -> None:
    assert trained(plan(steps=2))[0].num_examples == 8


def test_the_same_plan_gives_the_same_bits_whatever_happened_before() -> None:
    _, _, first = trained(plan())
    torch.rand(17)
    _, _, again = trained(plan(), TensorDataset(X, Y))
    assert is_equal(first, again)
    assert not is_equal(first, trained(plan(seed=2))[2])


def test_the_order_of_the_data_does_not_depend_on_what_the_model_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    _, with_dropout, _ = trained(plan())
    monkeypatch.setattr(Line, "model", lambda self: nn.Linear(1, 1))
    _, without, _ = trained(plan())
    assert with_dropout.seen == without.seen


def test_one_full_batch_step_is_the_step_of_the_optimizer() -> None:
    workload = Line()
    model, twin = nn.Linear(1, 1), nn.Linear(1, 1)
    twin.load_state_dict(model.state_dict())
    train(workload, model, (X, Y), plan(steps=1, batch_size=10), CPU)
    loss = (twin(X) - Y).square().mean()
    (gradient,) = torch.autograd.grad(loss, twin.weight)
    torch.testing.assert_close(model.weight, twin.weight - 0.1 * gradient)


def test_the_learning_rate_decays_by_epoch() -> None:
    _, workload, _ = trained(plan(optimizer=OptimizerPlan("sgd", 0.1, epoch_decay=0.5)))
    assert workload.rates == [0.1] * 3 + [0.05] * 3


def test_the_time_budget_ends_the_training_after_the_step_in_progress() -> None:
    ticks: Iterator[int] = iter(range(100))
    outcome, _, _ = trained(plan(time_budget_seconds=2), clock=lambda: float(next(ticks)))
    assert (outcome.num_steps, outcome.is_partial) == (2, True)
    assert outcome.seconds == 3


def test_there_is_always_one_step() -> None:
    outcome, _, _ = trained(plan(time_budget_seconds=1e-9))
    assert (outcome.num_steps, outcome.is_partial) == (1, True)


def test_a_budget_that_ends_with_the_last_step_is_no_partial_result() -> None:
    ticks: Iterator[int] = iter(range(100))
    assert not trained(plan(steps=2, time_budget_seconds=2), clock=lambda: float(next(ticks)))[0].is_partial


def test_progress_tells_steps_and_the_running_loss() -> None:
    reports: list[tuple[int, int, float]] = []
    workload = Line()
    outcome = train(
        workload, initial_model(workload, 0), (X, Y), plan(), CPU, lambda at, of, m: reports.append((at, of, m["loss"]))
    )
    assert [report[:2] for report in reports] == [(step, 6) for step in range(1, 7)]
    assert reports[-1][2] == outcome.metrics["loss"]


def test_training_learns() -> None:
    few, many = trained(plan(epochs=1))[0], trained(plan(epochs=200))[0]
    assert many.metrics["loss"] < 0.3 * few.metrics["loss"]


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(InvalidError, match="no examples"):
        trained(plan(), (X[:0], Y[:0]))
    with pytest.raises(InvalidError, match="nothing to train"):
        train(Line(), nn.Linear(1, 1).requires_grad_(False), (X, Y), plan(), CPU)


def test_an_undetached_loss_is_taken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Line, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
        loss = self.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    monkeypatch.setattr(Line, "training_step", step)
    assert trained(plan())[0].num_steps == 6
