"""The noise of a site on its own update: its norm is bounded to the last bit, and what leaves has been through it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from fed_client.training.leaving import Update
from fed_client.training.local_privacy import protect, released_names
from fed_client.training.residual import RESIDUAL, has_residual
from fed_core.plan import OptimizerPlan, PrivacyPlan
from fed_core.privacy.clipping import max_squared_steps, step_exponent
from fed_core.privacy.noise import NoiseStream
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter, tensors_digest
from fed_core.specs import TensorSpec
from tests.client.site_jobs import LOCAL, Jobs, plan

KEY = bytes(range(32))
NAN, INF = math.nan, math.inf


def update_of(*vectors: Sequence[float] | Tensor, dtype: torch.dtype = torch.float64) -> Update:
    tensors = [torch.as_tensor(vector, dtype=dtype) for vector in vectors]
    name = str(dtype).removeprefix("torch.")
    return [(TensorSpec(f"t{i}", tuple(tensor.shape), name), tensor) for i, tensor in enumerate(tensors)]


def protected(update: Update, privacy: PrivacyPlan, key: bytes | None = KEY) -> Tensor:
    """All tensors of the update, protected, as one vector; the update itself stays."""
    copy = [(spec, tensor.clone()) for spec, tensor in update]
    protect(copy, [spec.name for spec, _ in copy], privacy, NoiseStream(key) if key else None)
    return torch.cat([tensor.reshape(-1) for _, tensor in copy])


def steps_of(vector: Tensor, privacy: PrivacyPlan) -> list[int]:
    """A vector on the grid in whole steps."""
    steps = vector * 2.0 ** -step_exponent(privacy.noise_multiplier * privacy.clipping_norm)
    assert torch.equal(steps, steps.trunc())
    return [int(value) for value in steps.tolist()]


def clipped(update: Update, privacy: PrivacyPlan) -> list[int]:
    """What the noise was added to: float64 holds sums of steps exactly, and the same key gives the same noise."""
    nothing = [(spec, torch.zeros_like(tensor)) for spec, tensor in update]
    return steps_of(protected(update, privacy) - protected(nothing, privacy), privacy)


def squared(values: Sequence[int]) -> int:
    return sum(value * value for value in values)


ORDINARY = st.floats(-4, 4)
ANY = st.one_of(
    ORDINARY,
    st.floats(),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e300, -1.7e308, INF, -INF, NAN]),
)
PLANS = st.builds(
    PrivacyPlan,
    st.just("local"),
    clipping_norm=st.sampled_from([1.0, 0.1, 1e6, 1e-6, 0.7391]),
    noise_multiplier=st.sampled_from([0.01, 1.0, 0.3, 1e4]),
    delta=st.just(1e-3),
)


@settings(max_examples=60, deadline=None)
@given(st.data(), PLANS)
def test_between_any_two_updates_lie_at_most_two_norms_before_the_noise(data: Any, privacy: PrivacyPlan) -> None:
    """The declared sensitivity, in whole numbers and without a tolerance."""
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    values = data.draw(st.sampled_from([ORDINARY, ANY]))
    one, other = (
        clipped(update_of(*(data.draw(st.lists(values, min_size=n, max_size=n)) for n in sizes)), privacy)
        for _ in range(2)
    )
    bound = max_squared_steps(privacy.clipping_norm, step_exponent(privacy.noise_multiplier * privacy.clipping_norm))
    assert squared(one) <= bound
    assert squared(other) <= bound
    assert squared([a - b for a, b in zip(one, other, strict=True)]) <= 4 * bound


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.floats(0.9, 1.1), st.integers(0, 40))
def test_at_the_bound_and_around_it_as_well(values: list[float], factor: float, seed: int) -> None:
    vector = torch.tensor(values, dtype=torch.float64) + torch.randn(
        len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    vector *= LOCAL.clipping_norm * factor / vector.norm()
    exponent = step_exponent(LOCAL.noise_multiplier * LOCAL.clipping_norm)
    bound = max_squared_steps(LOCAL.clipping_norm, exponent)
    found = clipped(update_of(vector), LOCAL)
    assert squared(found) <= bound
    assert squared(found) > bound * min(1.0, factor**2) * 0.999


def test_within_the_norm_an_update_loses_less_than_a_step_and_beyond_it_keeps_its_direction() -> None:
    short = torch.tensor([0.3, -0.4, 1e-9, 0.0], dtype=torch.float64)
    scale = 2.0 ** -step_exponent(LOCAL.noise_multiplier * LOCAL.clipping_norm)
    assert clipped(update_of(short), LOCAL) == [math.trunc(value * scale) for value in short.tolist()]
    long = torch.tensor(clipped(update_of(short * 1e8), LOCAL), dtype=torch.float64) / scale
    assert long.norm() == pytest.approx(1.0, abs=1e-4)
    assert torch.allclose(long, short / short.norm(), atol=1e-4)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e200])
def test_what_has_no_norm_counts_as_zero_and_says_so_to_nobody(value: float) -> None:
    """Sent like any other, with the noise of any other: a failure would say that the data led there."""
    assert not any(clipped(update_of([0.5, value], [0.25]), LOCAL))


def test_all_tensors_share_one_norm() -> None:
    found = clipped(update_of([3.0], [4.0]), LOCAL)
    assert [value / math.sqrt(squared(found)) for value in found] == pytest.approx([0.6, 0.8], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_other_types_get_the_same_noise_rounded_to_them(dtype: torch.dtype) -> None:
    real = protected(update_of(torch.zeros(1000 * (2 if dtype.is_complex else 1))), LOCAL)
    found = protected(update_of(torch.zeros(1000, dtype=dtype), dtype=dtype), LOCAL)
    reals = torch.view_as_real(found).reshape(-1) if dtype.is_complex else found
    assert torch.equal(reals, real.to(reals.dtype))


def test_values_beyond_what_a_type_holds_become_its_largest() -> None:
    loud = PrivacyPlan("local", 1e6, 1.0, 1e-3)
    found = protected(update_of(torch.zeros(100), dtype=torch.float16), loud)
    assert found.isfinite().all()
    assert found.abs().max() == torch.finfo(torch.float16).max


def test_the_noise_has_the_declared_variance_and_is_normal() -> None:
    privacy = PrivacyPlan("local", clipping_norm=0.7, noise_multiplier=3.0, delta=1e-3)
    sigma, count = 2.1, 2**20
    for vector, mean in ((torch.zeros(count), 0.0), (torch.full((count,), 1.0), 0.7 / math.sqrt(count))):
        found = (protected(update_of(vector), privacy).numpy() - mean) / sigma
        assert abs(found.mean()) < 5 / math.sqrt(count)
        assert abs(found.var() - 1) < 5 * math.sqrt(2 / count)
        assert stats.kstest(found, "norm").pvalue > 1e-3
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / math.sqrt(count)


def test_no_two_draws_share_their_noise_whatever_the_seed() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(protected(update_of(torch.zeros(1000)), LOCAL, key=None))
    # On a grid of 2^16 steps to the standard deviation two numbers may well be the same.
    assert (drawn[0] == drawn[1]).sum() < 5
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.2


def test_only_what_takes_a_gradient_is_released() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model.append(model[2])
    assert released_names(model) == {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias"}


# As the trainer does it

TASK = """
import torch
from torch import nn
from fed_core.workload import Workload

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 40)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))
    def forward(self, x):
        self.num_seen += len(x)
        return self.last(self.norm(self.frozen(x)))

class Task(Workload):
    name = "task"
    def model(self):
        return Net()
    def train_data(self, site):
        return torch.randn(24, 6), torch.randn(24, 40)
    def evaluation_data(self, site):
        return None
    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()
    def training_step(self, model, batch, optimizer):
        loss = super().training_step(model, batch, optimizer)
        with torch.no_grad():
            if optimizer.param_groups[0]["lr"] == 0.5:  # what code that goes astray does
                model.frozen.weight.add_(1.0)
                model.last.weight[0, 0] = float("nan")
        return loss
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("local"), TASK)


RELEASED = {"norm.weight", "norm.bias", "last.weight", "last.bias"}


def test_the_trainer_sends_noise_on_what_it_trained_and_the_rest_as_it_came(jobs: Jobs) -> None:
    _, info, sent = jobs.train(plan(LOCAL))
    _, _, plain = jobs.train(plan(None))
    assert plain["norm.running_mean"].any()
    assert plain["num_seen"] == 16
    for name, tensor in sent.items():
        if name in RELEASED:
            # sigma is 0.5, and what two steps change is next to nothing.
            assert 0.1 < (tensor - plain[name]).square().mean().sqrt() < 2, name
        else:
            assert not tensor.any(), name
    assert (info.num_examples, info.custom_weight, info.metrics) == (1, 1, {})
    assert (info.num_steps, info.training_seconds, info.work, info.normalizer) == (0, 0.0, 0.0, 0.0)
    assert not info.is_partial


def test_the_same_plan_never_leads_to_the_same_update(jobs: Jobs) -> None:
    """The coordinator knows the plan's seed; noise that followed it could be taken off again."""
    one, other = jobs.train(plan(LOCAL))[2], jobs.train(plan(LOCAL))[2]
    assert all((one[name] - other[name]).square().mean().sqrt() > 0.1 for name in RELEASED)


def test_an_update_that_went_astray_leaves_as_noise(jobs: Jobs) -> None:
    """NaN in one tensor makes the whole update count as zero; frozen tensors that code changed stay at home."""
    _, _, sent = jobs.train(plan(LOCAL, optimizer=OptimizerPlan("sgd", 0.5)))
    noise = torch.cat([sent[name].double().reshape(-1) for name in sorted(RELEASED)])
    assert noise.isfinite().all()
    assert stats.kstest(noise.numpy() / 0.5, "norm").pvalue > 1e-6
    assert not sent["frozen.weight"].any()


def test_data_that_is_not_what_was_accounted_for_is_not_trained_on(jobs: Jobs) -> None:
    with pytest.raises(Exception, match="the site's data changed while it was accounted for") as refused:
        jobs.train(plan(LOCAL), num_accounted=23)
    assert not any(number in str(refused.value) for number in ("23", "24"))


def test_the_residual_is_added_before_the_noise_and_the_next_one_sees_noise_alone(jobs: Jobs) -> None:
    """A residual of a thousand norms leaves no more than one behind, and what is left is the noisy vector less what was decoded,
    so all of it is post-processing."""
    specs = [spec for spec in jobs.specs if has_residual(spec)]
    path = jobs.folder / "a0.residual"
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, specs)
        for spec in specs:
            writer.write_tile(spec.name, 0, torch.full((spec.num_elements,), 1000.0 if spec.name in RELEASED else 0.0))
        writer.finish()
    quiet = PrivacyPlan("local", clipping_norm=1.0, noise_multiplier=0.01, delta=1e-3)
    coarse = json.dumps({"kind": "uniform", "bits": 2, "feedback": True})
    residual = {RESIDUAL: (str(path), tensors_digest(path).hex())}
    for carried in ({}, residual):
        answer, _, sent = jobs.train(plan(quiet), coarse, carried=carried, carry_to=str(jobs.folder / "a1"))
        assert answer["not_carried"] == []
        with SafetensorsReader(jobs.folder / "a1.residual") as reader:
            noisy = torch.cat([(reader.tensor(name) + sent[name]).double().reshape(-1) for name in sorted(RELEASED)])
        assert float(noisy.norm()) < 1 + 0.01 * (math.sqrt(len(noisy)) + 5)
    # All coordinates alike, at norm 1: what came of the residual, cut like the rest.
    assert noisy.mean() == pytest.approx(1 / math.sqrt(len(noisy)), rel=0.1)
