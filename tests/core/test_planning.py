"""One step for all tensors of an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fed_core.codecs.auto import AutoConfig
from fed_core.codecs.base import Analysis, Cost, TensorPlan, TileSource
from fed_core.codecs.fsq import FsqConfig, StepTooFineError
from fed_core.codecs.lrq import LrqConfig
from fed_core.codecs.planning import LAMBDA, SMALL_COORDINATES, Aim, plan_tensors, solve_rising
from fed_core.codecs.registry import codec_named
from fed_core.specs import BUFFER, TensorSpec
from tests.core.coding import decode, encode, normal, source_of, spec_of

CONFIGS = [AutoConfig(), LrqConfig(), FsqConfig()]
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=[config.kind for config in CONFIGS])


def low_rank(rows: int, cols: int, rank: int, *, seed: int) -> Tensor:
    left, right = normal((rows, rank), scale=1.0, seed=seed), normal((rank, cols), scale=1.0, seed=seed + 1)
    return left**3 * 0.7 ** torch.arange(float(rank)) @ right**3 * 1e-4 + normal((rows, cols), scale=1e-4, seed=seed)


def update() -> dict[str, Tensor]:
    """A small network's: layers of different energy and structure, biases, and one layer that hardly moves."""
    return {
        "conv.weight": low_rank(24, 36, 6, seed=1).view(24, 4, 3, 3),
        "conv.bias": normal((24,), scale=1e-3, seed=2),
        "dense.weight": low_rank(120, 160, 8, seed=3),
        "dense.bias": normal((120,), scale=1e-3, seed=4),
        "full.weight": normal((80, 90), scale=2e-3, seed=5),
        "long": normal((5000,), scale=1e-3, seed=6),
        "faint.weight": normal((64, 80), scale=1e-6, seed=7),
    }


class Planned:
    """Tensors planned, encoded and decoded."""

    def __init__(self, config: AutoConfig | FsqConfig | LrqConfig, tensors: dict[str, Tensor], seed: int = 0) -> None:
        specs = [spec_of(tensor, name) for name, tensor in tensors.items()]
        sources = [source_of(tensor) for tensor in tensors.values()]
        self.tensors = tensors
        self.plans = config.plan(list(zip(specs, sources, strict=True)), seed=seed)
        bodies = [encode(plan, tensor) for plan, tensor in zip(self.plans, tensors.values(), strict=True)]
        self.codecs = {name: plan.codec for name, plan in zip(tensors, self.plans, strict=True)}
        self.estimates = {
            spec.name: decode(codec_named(plan.codec), spec, plan.head, of_tensor)
            for spec, plan, of_tensor in zip(specs, self.plans, bodies, strict=True)
        }
        self.bits = {
            name: 8 * (len(plan.head or b"") + sum(len(body.data) for body in of_tensor))
            for name, plan, of_tensor in zip(tensors, self.plans, bodies, strict=True)
        }

    def error(self, *names: str) -> float:
        """|x - x'|^2 / |x|^2 of some tensors, or all."""
        names = names or tuple(self.tensors)
        errors = sum(float((self.tensors[name] - self.estimates[name]).double().square().sum()) for name in names)
        return errors / sum(float(self.tensors[name].double().square().sum()) for name in names)

    @property
    def bits_per_parameter(self) -> float:
        return sum(self.bits.values()) / sum(tensor.numel() for tensor in self.tensors.values())


@EVERY_CONFIG
@pytest.mark.parametrize("target_error", [0.3, 0.05, 1e-3])
def test_the_error_is_just_below_the_target(config: AutoConfig, target_error: float) -> None:
    planned = Planned(config.model_copy(update={"target_error": target_error}), update())
    assert 0.9 * target_error <= planned.error() <= 1.03 * target_error


@EVERY_CONFIG
def test_less_error_takes_more_bits(config: AutoConfig) -> None:
    rates = [
        Planned(config.model_copy(update={"target_error": error}), update()).bits_per_parameter
        for error in (0.2, 0.05, 0.01)
    ]
    assert rates == sorted(rates)
    assert len(set(rates)) == 3


@pytest.mark.parametrize("limit", [3.0, 0.5])
def test_a_limit_on_bits_is_kept_and_used(limit: float) -> None:
    tensors = {name: tensor for name, tensor in update().items() if name != "faint.weight"}
    config = AutoConfig(target_error=1e-4, max_bits_per_parameter=limit, max_tensor_error=0.99)
    planned = Planned(config, tensors)
    assert 0.93 * limit <= planned.bits_per_parameter <= 1.02 * limit
    assert planned.error() > 1e-4


def test_a_limit_on_bits_that_is_not_reached_changes_nothing() -> None:
    free, limited = (
        Planned(AutoConfig(target_error=0.1, max_bits_per_parameter=limit), update()).plans for limit in (None, 20.0)
    )
    assert [plan.head for plan in free] == [plan.head for plan in limited]


@EVERY_CONFIG
@pytest.mark.parametrize("max_tensor_error", [0.5, 0.2])
def test_no_tensor_loses_more_than_its_share(config: AutoConfig, max_tensor_error: float) -> None:
    change = {"target_error": 0.3, "max_tensor_error": max_tensor_error}
    planned = Planned(config.model_copy(update=change), update())
    for name in planned.tensors:
        assert planned.error(name) <= 1.05 * max_tensor_error
    assert planned.error("faint.weight") > 0.8 * max_tensor_error


@EVERY_CONFIG
def test_small_vectors_are_kept_well_in_a_few_bits(config: AutoConfig) -> None:
    planned = Planned(config.model_copy(update={"target_error": 0.1}), update())
    for name in ("conv.bias", "dense.bias"):
        assert planned.codecs[name] == "uniform"
        assert planned.error(name) <= 0.1 / 4
        assert planned.bits[name] <= 7 * planned.tensors[name].numel() + 32


@EVERY_CONFIG
def test_a_single_value_takes_no_more_than_it_does_raw(config: AutoConfig) -> None:
    planned = Planned(config, {"scale": torch.tensor([1.5]), "weight": update()["full.weight"]})
    assert planned.bits["scale"] <= 32


@pytest.mark.parametrize("target_error", [0.2, 0.01])
def test_auto_is_never_worse_than_a_family_alone(target_error: float) -> None:
    auto, *alone = (
        Planned(config.model_copy(update={"target_error": target_error}), update()).bits_per_parameter
        for config in CONFIGS
    )
    assert auto <= 1.03 * min(alone)


def test_each_tensor_gets_the_codec_that_suits_it() -> None:
    codecs = Planned(AutoConfig(target_error=0.1), update()).codecs
    assert codecs == {
        "conv.weight": "lrq",
        "conv.bias": "uniform",
        "dense.weight": "lrq",
        "dense.bias": "uniform",
        "full.weight": "fsq",
        "long": "fsq",
        "faint.weight": "fsq",
    }


@EVERY_CONFIG
def test_buffers_and_what_is_no_float_are_raw(config: AutoConfig) -> None:
    matrix = low_rank(80, 90, 3, seed=0)
    tensors = [
        (TensorSpec("running_mean", (80, 90), "float32", BUFFER), matrix),
        (TensorSpec("counter", (80, 90), "int64"), torch.arange(7200)),
        (TensorSpec("empty", (0, 90), "float32"), matrix[:0]),
        (TensorSpec("weight", (80, 90), "float32"), matrix),
    ]
    plans = config.plan([(spec, source_of(tensor)) for spec, tensor in tensors], seed=0)
    assert [plan.codec == "raw" for plan in plans] == [True, True, True, False]


@EVERY_CONFIG
def test_what_float32_cannot_hold_is_raw(config: AutoConfig) -> None:
    beyond = torch.full((60, 70), 1e200, dtype=torch.float64)
    planned = Planned(config, {"beyond": beyond, "weight": update()["full.weight"]})
    assert planned.codecs["beyond"] == "raw"
    assert planned.error("weight") <= 0.06


@EVERY_CONFIG
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_of_zeros(config: AutoConfig, dtype: str) -> None:
    zeros = {name: torch.zeros_like(tensor).to(getattr(torch, dtype)) for name, tensor in update().items()}
    planned = Planned(config, zeros)
    assert not any(estimate.any() for estimate in planned.estimates.values())
    assert planned.bits_per_parameter < 0.1


@EVERY_CONFIG
def test_an_error_that_no_step_reaches_is_met_by_raw(config: AutoConfig) -> None:
    planned = Planned(config.model_copy(update={"target_error": 1e-15}), update())
    assert planned.error() <= 1e-15
    assert planned.codecs["full.weight"] == "raw"


@EVERY_CONFIG
def test_the_seed_decides_and_nothing_else(config: AutoConfig) -> None:
    heads = [[plan.head for plan in Planned(config, update(), seed=seed).plans] for seed in (5, 5)]
    assert heads[0] == heads[1]


class Curve:
    """An ideal coder of Gaussian values: what reverse water-filling is the theory of."""

    def __init__(self, num_coordinates: int, variance: float, finest: float = 0.0) -> None:
        self.num_coordinates, self.variance, self.finest = num_coordinates, variance, finest
        self.planned_at: float | None = None

    def cost(self, step: float) -> Cost:
        if step < self.finest:
            raise StepTooFineError("too fine")
        error = min(step**2 / 12, self.variance)
        return Cost(self.num_coordinates * 0.5 * math.log2(self.variance / error), self.num_coordinates * error)

    def plan(self, step: float) -> TensorPlan:
        self.planned_at = step
        return TensorPlan("fsq", b"\0", 2**18, lambda first, tile: b"\0")


def plan_curves(curves: Sequence[Curve], aim: Aim) -> list[float | None]:
    """The steps at which curves are planned; their tensors are constants of the same energy."""
    remaining = list(curves)
    tensors = [
        (
            TensorSpec("w", (curve.num_coordinates,), "float32"),
            source_of(torch.full((curve.num_coordinates,), curve.variance**0.5)),
        )
        for curve in curves
    ]

    def analyze(spec: TensorSpec, source: TileSource) -> Iterator[Analysis]:
        yield remaining.pop(0)

    plan_tensors(tensors, analyze, aim, seed=0)
    return [curve.planned_at for curve in curves]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(SMALL_COORDINATES + 1, 20_000), st.floats(1e-6, 1e6)), min_size=1, max_size=5),
    st.floats(1e-4, 0.9),
)
def test_water_is_filled_to_one_level(layers: list[tuple[int, float]], target_error: float) -> None:
    curves = [Curve(count, variance) for count, variance in layers]
    steps = plan_curves(curves, Aim(target_error, max_tensor_error=0.999))
    costs = [curve.cost(step) for curve, step in zip(curves, steps, strict=True) if step is not None]
    energy = sum(curve.num_coordinates * curve.variance for curve in curves)
    assert len(costs) == len(curves)
    assert sum(cost.squared_error for cost in costs) <= target_error * energy * (1 + 1e-6)
    assert sum(cost.squared_error for cost in costs) >= 0.92 * target_error * energy
    level = max(step for step in steps if step is not None)
    for curve, step in zip(curves, steps, strict=True):
        # Under the common level, or where the limit of each tensor binds.
        assert step == level or step**2 / 12 == pytest.approx(0.975 * curve.variance, rel=0.04)


def test_lambda_is_the_slope_of_the_curve() -> None:
    curve, step = Curve(1, 1.0), 0.3
    finer, coarser = curve.cost(step * 0.999), curve.cost(step * 1.001)
    slope = (coarser.squared_error - finer.squared_error) / (finer.bits - coarser.bits)
    assert slope == pytest.approx(LAMBDA * step**2, rel=1e-3)


def test_a_codec_that_cannot_go_so_fine_gives_way_to_raw() -> None:
    assert plan_curves([Curve(5000, 1.0, finest=0.5)], Aim(1e-6)) == [None]


class Overshooting(Curve):
    """Matched where next to nothing is left: any error at all at a coarse step, an ideal one at finer ones."""

    def cost(self, step: float) -> Cost:
        ideal = super().cost(step)
        if ideal.squared_error < 0.6 * self.num_coordinates * self.variance:
            return ideal
        return Cost(ideal.bits, 1e9 * ideal.squared_error)


def test_a_code_that_overshot_at_a_coarse_step_is_looked_at_again_at_finer_ones() -> None:
    """The second tensor drags the common step down from where the first one's code is of no use."""
    curves = [Overshooting(5000, 1.0), Curve(20_000, 1.0)]
    assert all(step is not None for step in plan_curves(curves, Aim(0.36)))


RISING: dict[str, Callable[[float], float]] = {
    "square": lambda x: x * x,
    "root": math.sqrt,
    "saturating": lambda x: min(x, 10.0),
    "flat then steep": lambda x: 1e-9 * x + max(0.0, x - 3.0) ** 4,
    "steps": lambda x: float(math.floor(x * 4) / 4),
    "zero first": lambda x: max(0.0, x - 5.0),
}


@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize("start", [1e-6, 0.1, 3.7, 1e6])
@pytest.mark.parametrize("limit", [0.3, 1.0, 7.0])
def test_a_rising_function_is_solved(name: str, start: float, limit: float) -> None:
    calls = 0

    def counted(argument: float) -> float:
        nonlocal calls
        calls += 1
        return RISING[name](argument)

    found = solve_rising(counted, limit, start)
    assert RISING[name](found) <= limit
    assert RISING[name](found) >= 0.98 * limit or RISING[name](found * 1.011) > limit
    assert calls <= 40


def test_a_function_that_never_reaches_the_limit_ends_the_search() -> None:
    assert solve_rising(lambda argument: 1.0, 2.0, 1.0) >= 2.0**10
    assert solve_rising(lambda argument: 3.0, 2.0, 1.0) <= 2.0**-40


@EVERY_CONFIG
@pytest.mark.parametrize(
    "change",
    [
        {"target_error": 0.0},
        {"target_error": 1.0},
        {"target_error": "0.1"},
        {"max_tensor_error": 0.0},
        {"coder": "zip"},
        {"level": 3},
    ],
)
def test_a_config_refuses_what_makes_no_sense(config: AutoConfig, change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        type(config).model_validate(change)


def test_every_field_is_described() -> None:
    for config in CONFIGS:
        for name, field in type(config).model_fields.items():
            assert field.description, name
