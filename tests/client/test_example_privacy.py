"""DP-SGD at a site: each example is clipped by itself, batches are coins, every step has noise, and what cannot be is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from fed_client.training.example_privacy import ExampleNoise
from fed_client.training.jobs import kind_of
from fed_client.training.loop import train
from fed_client.training.refusal import CannotDoError
from fed_core.plan import ObjectivePlan, OptimizerPlan, PrivacyPlan
from fed_core.privacy.clipping import max_squared_steps, step_exponent
from fed_core.privacy.noise import NoiseStream
from fed_core.workload import Site, Workload
from tests.client.site_jobs import EXAMPLES, Jobs, plan

KEY = bytes(range(32))
BATCH = 8  # a power of two, by which steps of the grid are divided exactly
Loss = Callable[[Tensor, Tensor], Tensor]


def guarded(
    model: nn.Module, privacy: PrivacyPlan = EXAMPLES, key: bytes | None = KEY, batch_size: int = BATCH
) -> tuple[ExampleNoise, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return ExampleNoise(model, optimizer, privacy, batch_size, NoiseStream(key) if key else None), optimizer


def gradient(
    model: nn.Module, examples: tuple[Tensor, Tensor] | None, privacy: PrivacyPlan = EXAMPLES, loss: Loss | None = None
) -> Tensor:
    """What the optimizer steps along, times the batch size; of no examples, it is the noise."""
    guard, optimizer = guarded(model, privacy)
    try:
        if examples is None:
            guard.empty_batch()
        else:
            features, labels = examples
            optimizer.zero_grad()
            with guard.batch(len(features)):
                (loss or functional.mse_loss)(model(features), labels).backward()
                optimizer.step()
        parts = [p.grad.reshape(-1) for p in model.parameters() if p.requires_grad and p.grad is not None]
        return torch.cat(parts) * BATCH
    finally:
        guard.close()


def clipped_sum(model: nn.Module, examples: tuple[Tensor, Tensor], privacy: PrivacyPlan = EXAMPLES) -> Tensor:
    """The same without the noise, which the same key brings again."""
    return gradient(model, examples, privacy) - gradient(model, None, privacy)


def by_loop(model: nn.Module, examples: tuple[Tensor, Tensor], norm: float, loss: Loss) -> Tensor:
    """Example by example, as the paper says it."""
    total = torch.zeros(())
    for feature, label in zip(*examples, strict=True):
        model.zero_grad()
        loss(model(feature[None]), label[None]).backward()
        one = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        total = total + one * min(1.0, norm / float(one.norm()))
    model.zero_grad()
    return total


class Small(nn.Module):
    """Convolution, group norm, and a linear layer whose weights are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.convolution(x)))
        x = self.linear(self.linear(x.flatten(1)))
        logits: Tensor = self.head(x)
        return logits


class Words(nn.Module):
    """An embedding, and layers with a time dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(self.norm(self.embedding(x))).mean(1))


class Bare(nn.Module):
    """A parameter that is in no layer, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.linear = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(x.flatten(1) * self.scale))


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    scale = torch.logspace(-2, 2, count)[:, None, None, None]
    return torch.randn(count, 1, 4, 4, generator=generator) * scale, torch.randint(3, (count,), generator=generator)


def sentences(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(11, (count, 7), generator=generator), torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize(
    ("make", "examples"),
    [(Small, images(12)), (Words, sentences(12)), (Bare, images(12))],
    ids=["convolution", "embedding", "bare"],
)
@pytest.mark.parametrize("norm", [0.05, 1.0, 100.0])
def test_each_example_is_clipped_by_itself_as_a_plain_loop_does(
    make: Callable[[], nn.Module], examples: tuple[Tensor, Tensor], norm: float
) -> None:
    torch.manual_seed(3)
    model = make().double()
    examples = tuple(each.double() if each.is_floating_point() else each for each in examples)  # type: ignore[assignment]
    privacy = PrivacyPlan("examples", norm, 0.01, 1e-3)
    expected = by_loop(model, examples, norm, functional.cross_entropy)
    noisy = gradient(model, examples, privacy, functional.cross_entropy)
    found = noisy - gradient(model, None, privacy)
    # Rounding toward zero takes less than a step of each example's coordinate, clipping a millionth of the norm.
    assert torch.allclose(found, expected, rtol=1e-5, atol=12 * (0.01 * norm * 2**-16 + norm * 2**-20))
    assert not torch.allclose(noisy, expected, rtol=1e-5, atol=12 * (0.01 * norm * 2**-16 + norm * 2**-20))


ANY = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 1e-300, 1e30, 1e200, -1e300, math.inf, -math.inf, math.nan]))
EXAMPLE = st.lists(ANY, min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(EXAMPLE, max_size=4), EXAMPLE)
def test_one_more_example_moves_the_sum_by_at_most_the_norm(
    batch: Sequence[Sequence[float]], one: Sequence[float]
) -> None:
    """The declared sensitivity, in whole steps and without a tolerance, whatever the values; nobody else's part changes with it."""
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.zero_()

    def total(rows: Sequence[Sequence[float]]) -> Tensor:
        if not rows:
            return gradient(model, None) - gradient(model, None)
        table = torch.tensor(rows, dtype=torch.float64)
        return clipped_sum(model, (table[:, :3], table[:, 3:]))

    exponent = step_exponent(EXAMPLES.noise_multiplier * EXAMPLES.clipping_norm)
    steps = (total([*batch, one]) - total(batch)) * 2.0**-exponent
    assert torch.equal(steps, steps.trunc())
    assert sum(int(value) ** 2 for value in steps.tolist()) <= max_squared_steps(EXAMPLES.clipping_norm, exponent)
    if not all(map(math.isfinite, one)):
        assert not steps.any()


def test_an_example_without_a_gradient_does_not_end_the_training() -> None:
    features = torch.tensor([[1.0], [math.nan], [math.inf], [0.5]])
    outcome = train(
        Line(), nn.Linear(1, 1), (features, torch.ones(4, 1)), plan(EXAMPLES, batch_size=4), torch.device("cpu")
    )
    assert outcome.num_steps == 2
    assert outcome.num_examples == 4


def test_each_example_is_in_a_batch_by_a_coin_of_its_own() -> None:
    guard, _ = guarded(nn.Linear(1, 1))
    num_examples, rate, num_steps = 400, 0.02, 2000
    batches = list(guard.batches(num_examples, rate, num_steps, 4))
    assert [epoch for epoch, _ in batches] == [step // 500 for step in range(num_steps)]
    sizes = torch.tensor([len(indices) for _, indices in batches])
    times = torch.bincount(torch.cat([indices for _, indices in batches]), minlength=num_examples)
    for counts, trials in ((sizes, num_examples), (times, num_steps)):
        coins = stats.binom(trials, rate)
        edges = [0, *(int(coins.ppf(part)) for part in (0.1, 0.25, 0.5, 0.75, 0.9)), trials + 1]
        chances = [coins.cdf(high - 1) - coins.cdf(low - 1) for low, high in pairwise(edges)]
        seen = torch.histogram(counts.double(), torch.tensor(edges).double() - 0.5).hist
        assert stats.chisquare(seen.numpy(), [chance * len(counts) for chance in chances]).pvalue > 1e-3
    assert all(len(indices.unique()) == len(indices) for _, indices in batches)


def test_where_a_batch_holds_everything_everything_is_in_it() -> None:
    guard, _ = guarded(nn.Linear(1, 1))
    assert all(len(indices) == 30 for _, indices in guard.batches(30, 1.0, 20, 1))


def test_a_batch_that_no_example_is_in_is_a_step_of_noise_of_the_declared_size() -> None:
    privacy = PrivacyPlan("examples", clipping_norm=0.7, noise_multiplier=3.0, delta=1e-3)
    model = nn.Linear(1000, 200)
    guard, optimizer = guarded(model, privacy)
    optimizer.param_groups[0]["lr"] = 1.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    guard.empty_batch()
    moved = torch.cat([(a - b).reshape(-1) for a, b in zip(model.parameters(), before, strict=True)]).detach().double()
    sigma = 3.0 * 0.7 / BATCH
    assert float(moved.var() / sigma**2) == pytest.approx(1, abs=5 * math.sqrt(2 / len(moved)))
    assert stats.kstest(moved.numpy() / sigma, "norm").pvalue > 1e-3


# As the training goes


class Line(Workload):
    name = "line"

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model or nn.Linear(1, 1)
        self.sizes: list[int] = []

    def model(self) -> nn.Module:
        return self._model

    def train_data(self, site: Site) -> Any:
        return torch.ones(40, 1), torch.ones(40, 1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def training_step(self, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
        self.sizes.append(len(batch[0]))
        return super().training_step(model, batch, optimizer)


def trained(workload: Workload, privacy: PrivacyPlan | None = EXAMPLES, **changes: Any) -> Any:
    data = workload.train_data(Site("north", None, {}))
    return train(workload, workload.model(), data, plan(privacy, **changes), torch.device("cpu"))


def test_a_training_steps_as_often_as_planned_whether_anybody_is_in_the_batch_or_not() -> None:
    workload = Line()
    outcome = trained(workload, batch_size=1, steps=60)  # q = 1/40: some 22 of 60 batches are empty
    assert outcome.num_steps == 60
    assert 10 < len(workload.sizes) < 58
    assert outcome.num_examples <= 40


def test_two_trainings_under_one_seed_are_not_the_same() -> None:
    models = [nn.Linear(1, 1) for _ in range(2)]
    for model in models:
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        trained(Line(model))
    assert models[0].weight != models[1].weight


def test_what_the_objective_adds_is_not_clipped_for_it_depends_on_no_example() -> None:
    model = nn.Linear(1, 1)
    before = model.weight.item()
    corrections = {"weight": torch.full((1, 1), 5.0), "bias": torch.zeros(1)}
    quiet = PrivacyPlan("examples", 1e-4, 0.01, 1e-3)
    made = plan(quiet, steps=1, objective=ObjectivePlan("feddyn", 0.1))
    workload = Line(model)
    train(workload, model, workload.train_data(Site("a", None, {})), made, torch.device("cpu"), corrections=corrections)
    assert abs(model.weight.item() - before) == pytest.approx(0.1 * 5.0, rel=1e-2)


def test_the_workloads_own_clipping_of_the_mean_has_no_effect() -> None:
    class Clipping(Line):
        def training_step(self, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(model, batch)
            loss.backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.zero_()
            optimizer.step()
            return loss

    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    trained(Clipping(model), PrivacyPlan("examples", 1.0, 0.01, 1e-3), batch_size=40, steps=1)
    # 40 examples of one gradient, (-2, -2), cut to length 1, their mean, and a step of 0.1.
    assert model.weight.item() == pytest.approx(0.1 / math.sqrt(2), rel=1e-2)


# What cannot be


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.recurrent(x)[0])


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)), r"1 \(BatchNorm1d\): use GroupNorm or LayerNorm"),
        (nn.BatchNorm1d(1), r"the model \(BatchNorm1d\): use GroupNorm"),
        (nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1)), r"0 \(BatchNorm1d\): use GroupNorm"),
        (
            nn.Sequential(nn.InstanceNorm1d(1, affine=True, track_running_stats=True)),
            r"0 \(InstanceNorm1d\): use the same layer with track_running_stats=False",
        ),
        (Recurrent(nn.LSTM), r"recurrent \(LSTM\): use opacus.layers.DPLSTM"),
        (Recurrent(nn.GRU), r"recurrent \(GRU\): use opacus.layers.DPGRU"),
        (nn.MultiheadAttention(2, 1), r"the model \(MultiheadAttention\): use opacus.layers.DPMultiheadAttention"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_mixes_examples_is_refused_by_name_with_what_would_work(model: nn.Module, named: str) -> None:
    with pytest.raises(CannotDoError, match=f"DP-SGD cannot train layers of this model: {named}") as refused:
        guarded(model)
    assert kind_of(refused.value) == "REFUSED_BY_SITE"


def test_what_is_said_to_work_instead_works() -> None:
    from opacus.layers import DPLSTM  # type: ignore[attr-defined]

    class Dp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = DPLSTM(1, 3, batch_first=True)
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.recurrent(x[:, :, None])[0][:, -1]))

    model = Dp()
    outcome = trained(Line(model), steps=3)
    assert outcome.num_steps == 3
    frozen = nn.Sequential(nn.BatchNorm1d(1).requires_grad_(False), nn.Linear(1, 1))
    frozen[0].eval()
    guarded(frozen)[0].close()


def test_an_optimizer_of_another_kind_is_refused_by_name() -> None:
    class Own(torch.optim.SGD):
        pass

    class OwnLine(Line):
        def optimizer(self, model: nn.Module, plan: OptimizerPlan) -> torch.optim.Optimizer:
            return Own(model.parameters(), lr=0.1)

    with pytest.raises(CannotDoError, match=r"works with torch's SGD, Adam and AdamW; .* made Own"):
        trained(OwnLine())


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_other_optimizers_of_plans_work(kind: str) -> None:
    assert trained(Line(), optimizer=OptimizerPlan(kind, 0.1)).num_steps == 2


class Astray(Line):
    """Takes its steps in its own way."""

    def __init__(self, way: Callable[[Any, nn.Module, Any, Any], Tensor]) -> None:
        super().__init__()
        self._way = way

    def training_step(self, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
        optimizer.zero_grad()
        return self._way(self, model, batch, optimizer)


def twice(workload: Any, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
    loss: Tensor = workload.loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.step()
    return loss


def never(workload: Any, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
    loss: Tensor = workload.loss(model, batch)
    loss.backward()
    return loss


def backward_twice(workload: Any, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
    workload.loss(model, batch).backward()
    loss: Tensor = workload.loss(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def by_closure(workload: Any, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
    def closure() -> Tensor:
        loss: Tensor = workload.loss(model, batch)
        loss.backward()
        return loss

    return torch.as_tensor(optimizer.step(closure))


def all_as_one(workload: Any, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
    features, labels = batch
    loss = (model(features.T.mean(1, keepdim=True)) - labels.mean()).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def past_the_layers(workload: Any, model: nn.Module, batch: Any, optimizer: Any) -> Tensor:
    loss: Tensor = workload.loss(model, batch) + model.weight.square().sum()
    loss.backward()
    for parameter in model.parameters():
        parameter.grad_sample = None
    optimizer.step()
    return loss


@pytest.mark.parametrize(
    ("way", "named"),
    [
        (twice, r"called optimizer.step\(\) more than once"),
        (never, r"did not call optimizer.step\(\)"),
        (backward_twice, "went backward more than once"),
        (by_closure, r"without a closure"),
        (all_as_one, "does not see the examples along its first dimension"),
        (past_the_layers, "a gradient that Opacus does not know by example"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_training_step_that_no_account_covers_is_refused(way: Any, named: str) -> None:
    with pytest.raises(CannotDoError, match=named):
        trained(Astray(way), batch_size=40)


def test_an_update_by_examples_says_nothing_of_how_many_there_are(tmp_path_factory: pytest.TempPathFactory) -> None:
    jobs = Jobs(tmp_path_factory.mktemp("examples"), TASK)
    answer, info, sent = jobs.train(plan(EXAMPLES, batch_size=4, steps=3), num_accounted=24)
    assert answer["num_steps"] == 3
    assert (info.num_examples, info.custom_weight, info.num_steps, info.training_seconds) == (1, 1, 0, 0.0)
    assert info.metrics == {}
    assert sent["weight"].any()


TASK = """
import torch
from torch import nn
from fed_core.workload import Workload

class Task(Workload):
    name = "task"
    def model(self):
        return nn.Linear(6, 3)
    def train_data(self, site):
        return torch.randn(24, 6), torch.randn(24, 3)
    def evaluation_data(self, site):
        return None
    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()
"""
