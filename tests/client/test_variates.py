"""What a site carries to correct its gradients: read, written as the update is encoded, and never a reason not to train."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fed_client.training import leaving
from fed_client.training.loop import train
from fed_client.training.variates import VARIATE, NextVariate, read_corrections
from fed_core.plan import ObjectivePlan, OptimizerPlan, TrainingPlan
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import BUFFER, TensorSpec, variate_specs
from fed_core.tensors import torch_dtype
from fed_core.workload import Data, Site, Workload, initial_model

SPECS = [
    TensorSpec("w", (7, 3), "float32"),
    TensorSpec("half", (5,), "bfloat16"),
    TensorSpec("double", (4,), "float64"),
    TensorSpec("complex", (3,), "complex64"),
    TensorSpec("none", (0, 3), "float32"),
    TensorSpec("mean", (7,), "float32", BUFFER),
    TensorSpec("steps", (2,), "int64"),
]
CARRIED = {"w": "float32", "half": "float32", "double": "float64", "complex": "complex64", "none": "float32"}


def values(spec: TensorSpec, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch_dtype(spec.dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.full(spec.shape, seed, dtype=dtype)
    return torch.randn(spec.shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)


def step(path: Path, corrections: dict[str, Tensor], seed: int, factor: float = 0.5) -> NextVariate:
    """A round: what arrives of an update is told in two tiles a tensor."""
    with NextVariate(path, SPECS, corrections, factor) as following:
        for spec in SPECS:
            flat = values(spec, seed).reshape(-1)
            middle = len(flat) // 2
            for first, tile in ((0, flat[:middle]), (middle, flat[middle:])):
                if len(tile):
                    following.keep(spec, "raw", first, tile)
        following.left = following.finish()  # type: ignore[attr-defined]
    return following


def left(path: Path) -> dict[str, Tensor]:
    with SafetensorsReader(path) as reader:
        return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


def carried(path: Path, following: Any) -> tuple[str, str]:
    return str(path), following.left[VARIATE]


def test_parameters_of_floating_types_have_one_of_at_least_32_bits() -> None:
    assert {spec.name: spec.dtype for spec in variate_specs(SPECS)} == CARRIED


def test_it_adds_up_what_arrived(tmp_path: Path) -> None:
    """h' = h - 0.5 d, round by round; corrections are -h."""
    corrections, problem = read_corrections(SPECS, None)
    assert problem == ""
    assert not any(correction.any() for correction in corrections.values())
    total = {name: torch.zeros(()).to(torch_dtype(dtype)) for name, dtype in CARRIED.items()}
    for seed in range(1, 4):
        path = tmp_path / "run" / f"a{seed}.variate"
        following = step(path, corrections, seed)
        for spec in variate_specs(SPECS):
            of_model = next(each for each in SPECS if each.name == spec.name)
            total[spec.name] = total[spec.name] - 0.5 * values(of_model, seed).to(torch_dtype(spec.dtype))
        for name, tensor in left(path).items():
            torch.testing.assert_close(tensor, total[name], rtol=1e-6, atol=1e-6)
        corrections, problem = read_corrections(SPECS, carried(path, following))
        assert problem == ""
        assert all(torch.equal(correction, -left(path)[name]) for name, correction in corrections.items())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a1.variate", "a2.variate", "a3.variate"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "the variate cannot be read: .*No such file"),
        (lambda path: path.write_bytes(b"x"), "the variate cannot be read: .*not a usable safetensors"),
        (_flip, "the variate on this site's disk is damaged"),
    ],
    ids=["gone", "cut", "rotten"],
)
def test_a_variate_that_is_not_what_it_was_counts_as_none(
    tmp_path: Path, harm: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "a1.variate"
    following = step(path, read_corrections(SPECS, None)[0], 1)
    harm(path)
    corrections, problem = read_corrections(SPECS, carried(path, following))
    assert re.search(reason, problem)
    assert not any(correction.any() for correction in corrections.values())


def test_a_variate_of_another_model_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "a1.variate"
    following = step(path, read_corrections(SPECS, None)[0], 1)
    _, problem = read_corrections(SPECS[1:], carried(path, following))
    assert problem.startswith("the variate is another model's: ")


def test_a_full_disk_costs_the_variate_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(leaving.SafetensorsWriter, "write_tile", full)
    following: Any = step(tmp_path / "a1.variate", read_corrections(SPECS, None)[0], 1)
    assert following.left == {}
    assert following.problem == "the variate cannot be written: [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_variate_beyond_its_type_is_given_up(tmp_path: Path) -> None:
    following: Any = step(tmp_path / "a1.variate", read_corrections(SPECS, None)[0], 1, factor=1e39)
    assert following.left == {}
    assert "leaves the range of its type" in following.problem
    assert list(tmp_path.iterdir()) == []


# -- in the training ---------------------------------------------------------------------------------------------------


class Slopes(Workload):
    """Two parameters in the loss, one that is not, one that takes no gradient."""

    name = "slopes"

    def model(self) -> nn.Module:
        model = nn.Module()
        for name in ("a", "b", "unused"):
            model.register_parameter(name, nn.Parameter(torch.full((3,), 2.0)))
        model.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
        return model

    def train_data(self, site: Site) -> Data:
        return (torch.zeros(4),)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        slope: Tensor = model.a.sum() + 2 * model.b.sum()  # type: ignore[operator, union-attr]
        return slope

    def optimizer(self, model: nn.Module, plan: OptimizerPlan) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=plan.learning_rate)


def trained(corrections: dict[str, Tensor]) -> dict[str, Tensor]:
    plan = TrainingPlan(
        batch_size=4, optimizer=OptimizerPlan("sgd", 0.5), seed=1, steps=2, objective=ObjectivePlan("feddyn", 0.25)
    )
    model = initial_model(Slopes(), 0)
    train(Slopes(), model, (torch.zeros(4),), plan, torch.device("cpu"), corrections=corrections)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_every_step_is_corrected_and_pulled() -> None:
    after = trained({"a": torch.tensor([0.0, 1.0, -3.0]), "frozen": torch.ones(3), "unused": torch.zeros(3)})
    # Two steps of 0.5 on the slope g: x -> -g/2, then g + x/4.
    for name, slope in (("a", torch.tensor([1.0, 2.0, -2.0])), ("b", torch.full((3,), 2.0))):
        first = -0.5 * slope
        torch.testing.assert_close(after[name] - 2, first - 0.5 * (slope + 0.25 * first))
    assert after["frozen"].tolist() == [1, 1, 1]
    assert after["unused"].tolist() == [2, 2, 2]


def test_a_parameter_without_gradient_moves_by_its_correction() -> None:
    """Its loss has slope 0, and that is no reason to forget the rest."""
    after = trained({"unused": torch.tensor([0.0, 1.0, -1.0])})
    torch.testing.assert_close(after["unused"] - 2, torch.tensor([0.0, -0.9375, 0.9375]))
