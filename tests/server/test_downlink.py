"""How versions are to be rounded: rules that look at nothing but a config and what a round has changed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.lattice import MAX_STEPS, LatticeEncoding
from fed_core.specs import BUFFER, TensorSpec
from fed_core.tensors import dtype_name
from fed_server.config import LatticeDownlinkConfig
from fed_server.rounds.downlink import first_error, first_lattice_for, lattice_for
from fed_server.rounds.version import ChangeMeter

DEFAULT = LatticeDownlinkConfig()
scales = st.floats(1e-30, 1e25, allow_nan=False)


def measured(after: dict[str, Tensor], before: dict[str, Tensor] | None = None) -> ChangeMeter:
    """What a round did that led from one to the other."""
    meter = ChangeMeter()
    for name, tensor in after.items():
        spec = TensorSpec(
            name, tuple(tensor.shape), dtype_name(tensor.dtype), BUFFER if name == "mean" else "parameter"
        )
        half = tensor.numel() // 2
        for part in (slice(0, half), slice(half, None)):  # tile by tile
            old = before[name].reshape(-1)[part] if before is not None else None
            meter.add(spec, tensor.reshape(-1)[part], old)
    return meter


def exponents(encoding: object) -> dict[str, int]:
    assert isinstance(encoding, LatticeEncoding)
    return dict(encoding.exponents)


def rms(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.double().square().mean()))


def test_what_is_measured_is_what_the_round_changed() -> None:
    before, after = {"w": torch.randn(7, 9)}, {"w": torch.randn(7, 9)}
    meter = measured(after, before)
    assert meter.energy["w"] == pytest.approx(float((after["w"].double() - before["w"].double()).square().sum()))
    assert meter.weights["w"] == pytest.approx(float(after["w"].double().square().sum()))
    assert meter.max_abs["w"] == float(after["w"].abs().max())
    assert measured(after).energy == measured(after).weights, "without a version before it all is change"


@given(scales, scales, st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.0, 2.0**-4, 0.5]))
def test_a_step_is_that_of_the_change_but_never_finer_than_the_finest(
    weight: float, change: float, step: float, finest: float
) -> None:
    before = {"w": torch.full((8, 6), weight)}
    after = {"w": before["w"] + change}
    config = LatticeDownlinkConfig(step=step, finest_step=finest)
    [exponent] = exponents(lattice_for(config, measured(after, before), seed=0)).values()
    wanted = max(step * rms(after["w"].double() - before["w"].double()), finest * rms(after["w"]))
    largest = float(after["w"].abs().max())
    assert largest <= MAX_STEPS * 2.0**exponent, "every value is exact in float32"
    if wanted > 2.0 * largest / MAX_STEPS:
        assert wanted / 2 < 2.0**exponent <= wanted * (1 + 1e-9), "rounded down to a power of two"


def test_a_change_that_is_small_beside_the_weights_gets_the_finest_step() -> None:
    before = {"w": torch.ones(50, 50)}
    assert exponents(lattice_for(DEFAULT, measured({"w": before["w"] + 1e-6}, before), seed=0)) == {"w": -4}
    assert exponents(lattice_for(DEFAULT, measured({"w": before["w"] + 1.0}, before), seed=0)) == {"w": 2}


@pytest.mark.parametrize("shape", [(64,), (1, 64), (64, 1), (1, 64, 1), ()])
def test_vectors_get_an_eighth_of_the_step(shape: tuple[int, ...]) -> None:
    def both(value: float) -> dict[str, Tensor]:
        return {"vector": torch.full(shape, value), "matrix": torch.full((8, 8), value)}

    for made in (
        lattice_for(DEFAULT, measured(both(1.5), both(1.0)), seed=0),
        first_lattice_for(0.01, measured(both(1.0))),
    ):
        found = exponents(made)
        assert found["vector"] == found["matrix"] - 3


def test_only_parameters_of_a_type_with_long_mantissas_have_a_lattice() -> None:
    tensors = {
        kind: torch.ones(4, 4).to(getattr(torch, kind)) for kind in ("float32", "float64", "float16", "bfloat16")
    }
    tensors |= {"count": torch.ones(4, 4, dtype=torch.int64), "mean": torch.ones(4, 4), "none": torch.ones(0, 4)}
    tensors |= {"wave": torch.ones(4, 4, dtype=torch.complex64)}
    for made in (lattice_for(DEFAULT, measured(tensors), seed=0), first_lattice_for(0.01, measured(tensors))):
        assert set(exponents(made)) == {"float32", "float64"}


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45, 1e30])
def test_weights_at_the_ends_of_the_type_have_a_lattice_that_holds_them(value: float) -> None:
    tensors = {"w": torch.full((4, 4), value)}
    for config in (DEFAULT, LatticeDownlinkConfig(finest_step=0.0)):
        for made in (
            lattice_for(config, measured(tensors, tensors), seed=0),
            first_lattice_for(1e-9, measured(tensors)),
        ):
            [exponent] = exponents(made).values()
            assert -126 <= exponent <= 100
            assert value <= 2.0**24 * 2.0**exponent


def test_a_tensor_that_did_not_change_still_has_the_resolution_of_its_weights() -> None:
    """What was left out of earlier versions is still to be sent."""
    tensors = {"w": torch.full((9, 9), 8.0)}
    assert exponents(lattice_for(DEFAULT, measured(tensors, tensors), seed=0)) == {"w": -1}


def test_thresholds_are_drawn_from_the_runs_seed_and_the_first_version_is_rounded_to_the_nearest() -> None:
    for seed in (0, 7):
        made = lattice_for(DEFAULT, measured({"w": torch.ones(2, 2)}), seed=seed)
        assert isinstance(made, LatticeEncoding)
        assert made.seed == seed
    first = first_lattice_for(0.01, measured({"w": torch.ones(2, 2)}))
    assert isinstance(first, LatticeEncoding)
    assert first.seed is None


@pytest.mark.parametrize("max_error", [0.03, 1e-4, 1e-6])
@pytest.mark.parametrize("kind", ["normal", "uniform", "sparse"])
def test_version_0_loses_no_more_than_it_may(max_error: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 100, generator=generator)
    tensor = {
        "normal": values,
        "uniform": torch.rand(400, 100, generator=generator) / 7,
        "sparse": torch.where(values > 2, values, 0.0),
    }[kind]
    [exponent] = exponents(first_lattice_for(max_error, measured({"w": tensor}))).values()
    rounded = (tensor.double() / 2.0**exponent).round() * 2.0**exponent
    error = float((rounded - tensor).square().sum() / tensor.double().square().sum())
    assert error <= max_error * 1.02
    if kind != "sparse":
        assert error > max_error / 5, "and is no finer than it need be"


def test_random_weights_may_lose_more_than_trained_ones() -> None:
    assert first_error(DEFAULT, False) == 0.03
    assert first_error(DEFAULT, True) == 1e-4
    for is_trained in (True, False):
        assert first_error(LatticeDownlinkConfig(first_error=0.25), is_trained) == 0.25
