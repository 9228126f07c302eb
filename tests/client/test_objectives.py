"""What is added to a workload's loss, and the work that an update stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fed_client.training.loop import TrainOutcome, train
from fed_core.errors import InvalidError
from fed_core.plan import ObjectivePlan, OptimizerPlan, SiteOverrides, TrainingPlan, apply_overrides
from fed_core.workload import Data, Site, Workload, initial_model

CPU = torch.device("cpu")
DATA = (torch.arange(12.0).reshape(12, 1) / 12, torch.arange(12.0).reshape(12, 1) / 4 + 1)
MU = 0.7


class Line(Workload):
    name = "line"
    steps_per_batch = 1

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def train_data(self, site: Site) -> Data:
        return DATA

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    def training_step(self, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
        for _ in range(self.steps_per_batch):
            loss = super().training_step(model, batch, optimizer)
        return loss


class Twice(Line):
    steps_per_batch = 2


class ByHand(Line):
    """Steps without the optimizer."""

    def training_step(self, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
        loss = self.loss(model, batch)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad * 0.1)
        return loss


class Nesterov(Line):
    def optimizer(self, model: nn.Module, plan: OptimizerPlan) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def plan(objective: ObjectivePlan, momentum: float = 0.0, **changes: Any) -> TrainingPlan:
    optimizer = OptimizerPlan("sgd", 0.1, momentum=momentum, epoch_decay=changes.pop("epoch_decay", 1.0))
    return TrainingPlan(
        **{"batch_size": 4, "optimizer": optimizer, "seed": 1, "epochs": 2, "objective": objective} | changes
    )


def trained(plan: TrainingPlan, workload: Workload | None = None) -> tuple[TrainOutcome, list[Tensor], list[Tensor]]:
    """The outcome, and the parameters before and after."""
    workload = workload or Line()
    model = initial_model(workload, 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    outcome = train(workload, model, DATA, plan, CPU)
    return outcome, before, [parameter.detach() for parameter in model.parameters()]


def test_fedprox_descends_the_loss_and_the_squared_distance() -> None:
    _, before, after = trained(plan(ObjectivePlan("fedprox", MU)))
    # The same with autograd, the term written into the loss.
    workload = Line()
    model = initial_model(workload, 0)
    received = [parameter.detach().clone() for parameter in model.parameters()]

    class WithTerm(Line):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            away = sum((p - r).square().sum() for p, r in zip(model.parameters(), received, strict=True))
            return super().loss(model, batch) + MU / 2 * away

    _, _, wanted = trained(plan(ObjectivePlan()), WithTerm())
    for got, expected in zip(after, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    _, _, plain = trained(plan(ObjectivePlan()))

    def moved(end: list[Tensor]) -> float:
        return sum(float((e - b).square().sum()) for e, b in zip(end, before, strict=True))

    assert moved(after) < moved(plain)


def test_no_strength_is_the_plain_objective_to_the_bit() -> None:
    plain, prox, nova = (trained(plan(ObjectivePlan(kind)))[2] for kind in ("plain", "fedprox", "fednova"))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, prox, nova, strict=True))


@pytest.mark.parametrize(("momentum", "epoch_decay"), [(0.0, 1.0), (0.9, 1.0), (0.5, 0.1)])
@pytest.mark.parametrize("workload", [Line(), Twice()], ids=["one step", "two steps"])
def test_the_normalizer_is_the_sum_of_what_gradients_weigh_in_the_update(
    momentum: float, epoch_decay: float, workload: Line
) -> None:
    """With a loss of gradient 1 everywhere, the update is minus the normalizer."""

    class Slope(type(workload)):  # type: ignore[misc]
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return sum((p.sum() for p in model.parameters()), torch.zeros(()))

    outcome, before, after = trained(plan(ObjectivePlan("fednova"), momentum, epoch_decay=epoch_decay), Slope())
    assert outcome.normalizer > 0
    for got, start in zip(after, before, strict=True):
        torch.testing.assert_close(got - start, torch.full_like(got, -outcome.normalizer), rtol=1e-5, atol=1e-6)


def test_only_fednova_divides() -> None:
    assert trained(plan(ObjectivePlan()))[0].normalizer == 0
    assert trained(plan(ObjectivePlan("fedprox", 0.1)))[0].normalizer == 0
    assert trained(plan(ObjectivePlan("fednova"), steps=3, epochs=None))[0].normalizer == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["fedprox", "fednova", "feddyn", "scaffold"])
def test_a_workload_that_steps_by_itself_is_told(kind: str) -> None:
    with pytest.raises(InvalidError, match=r"did not call optimizer.step\(\)"):
        trained(plan(ObjectivePlan(kind, 0.0 if kind == "scaffold" else 0.1)), ByHand())
    trained(plan(ObjectivePlan()), ByHand())


def test_scaffold_says_the_work_and_divides_by_nothing() -> None:
    settings: dict[str, Any] = {"momentum": 0.9, "epoch_decay": 0.5}
    nova, scaffold = (trained(plan(ObjectivePlan(kind), **settings))[0] for kind in ("fednova", "scaffold"))
    assert nova.normalizer == scaffold.work > 0
    assert nova.work == scaffold.normalizer == 0


@pytest.mark.parametrize("kind", ["fednova", "scaffold"])
def test_work_needs_sgd_of_which_it_can_be_told(kind: str) -> None:
    with pytest.raises(InvalidError, match=f"objective '{kind}' needs torch.optim.SGD without nesterov"):
        trained(plan(ObjectivePlan(kind)), Nesterov())
    with pytest.raises(InvalidError, match=f"objective is {kind}"):
        plan(ObjectivePlan(kind), optimizer=OptimizerPlan("adam", 0.1))


@pytest.mark.parametrize("kind", ["fednova", "scaffold"])
def test_a_site_cannot_take_adam_where_the_work_behind_updates_counts(kind: str) -> None:
    ours, refused = apply_overrides(
        plan(ObjectivePlan(kind), overridable=("optimizer", "batch_size")),
        SiteOverrides(optimizer="adam", batch_size=2),
    )
    assert (ours.optimizer.kind, ours.batch_size) == ("sgd", 2)
    assert refused == [
        f"optimizer = adam is ignored: this run goes by the work behind updates ({kind}), which needs sgd"
    ]
