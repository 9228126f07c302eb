"""What the privacy benchmark does in one process is what the coordinator and its clients do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import privacy
from fed_core.workload import initial_model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return initial_model(privacy.EdgesNet(), 0)


@pytest.mark.parametrize("mechanism", ["fixed", "adaptive", "tree", "inverse", "buffered"])
def test_a_round_is_what_the_coordinator_releases(mechanism: str, model: torch.nn.Module) -> None:
    privacy.check_round(model, mechanism)


@pytest.mark.parametrize("mechanism", ["fixed", "adaptive", "tree", "inverse"])
def test_declared_is_what_the_coordinator_declares(mechanism: str) -> None:
    privacy.check_declared(mechanism)


def test_devices_send_what_clients_send(model: torch.nn.Module) -> None:
    privacy.check_local(model)


def test_writers_train_together_as_each_would_alone(model: torch.nn.Module) -> None:
    privacy.check_training(model)


def unclipped(update: torch.Tensor, bound: float, exponent: int) -> tuple[torch.Tensor, bool]:
    return (update.double() * 2.0**-exponent).trunc(), False


def test_updates_that_are_not_cut_are_found(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "clipped_steps", unclipped)
    with pytest.raises(AssertionError, match="fixed: not what the coordinator releases"):
        privacy.check_round(model, "fixed")
    with pytest.raises(AssertionError, match="local"):
        privacy.check_local(model)


def test_noise_that_is_not_taken_back_is_found(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum without what earlier rounds drew."""
    honest: Callable[..., Any] = privacy.noisy_sum

    def forgetful(updates: torch.Tensor, noise: Any, norm: float) -> Any:
        return honest(updates, replace(noise, drawn_again=()), norm)

    monkeypatch.setattr(privacy, "noisy_sum", forgetful)
    with pytest.raises(AssertionError, match="inverse: not what the coordinator releases"):
        privacy.check_round(model, "inverse")
    privacy.check_round(model, "fixed")


def test_other_noise_on_bits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "default_bit_sigma", lambda noise, rate, population: 3.0)
    with pytest.raises(AssertionError, match="adaptive"):
        privacy.check_declared("adaptive")


def test_other_steps_are_found(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "BATCH_SIZE", 16)
    honest: Callable[..., torch.Tensor] = privacy.train_together
    privacy.check_training(model)
    monkeypatch.setattr(privacy, "train_together", lambda *given: honest(*given[:-1], given[-1] * 1.001))
    with pytest.raises(AssertionError, match="training together"):
        privacy.check_training(model)


@pytest.mark.parametrize("mechanism", ["adaptive", "local"])
def test_a_run_spends_what_it_was_asked_to(mechanism: str) -> None:
    generator = torch.Generator().manual_seed(0)
    of_each = [(torch.randn(4, 392, generator=generator), torch.arange(4)) for _ in range(40)]
    writers = privacy.padded(of_each, of_each[0])
    row = privacy.run(writers, mechanism, 8.0, 0, privacy.Setting())
    assert 7.99 < row.spent <= 8.0001
    assert row.sigma > 0
    assert 0 <= row.accuracy <= 1


@pytest.mark.parametrize("mechanism", ["fixed", "tree", "inverse", "buffered"])
def test_noise_adds_up_to_what_the_table_says(mechanism: str) -> None:
    """Rounds without updates: the sum of all releases so far."""
    norm, num_parameters = 0.3, 500
    declared = privacy.declared(mechanism, 8.0, norm, privacy.NUM_WRITERS, num_parameters)
    nothing = torch.zeros(0, num_parameters)
    released = [
        privacy.noisy_sum(nothing, privacy.noise_of(mechanism, declared, 0, round), norm)[0]
        for round in range(privacy.NUM_ROUNDS)
    ]
    found = float(torch.stack(released).cumsum(0).square().mean().sqrt()) / norm
    assert found == pytest.approx(privacy.accumulated_noise(mechanism, declared.noise_multiplier), rel=0.08)


def test_the_search_follows_what_is_better_and_keeps_to_its_budget() -> None:
    asked = []

    def measure(setting: privacy.Setting) -> float:
        asked.append(setting)
        return -abs(setting.gain - 0.5) - abs(setting.learning_rate - 0.2)

    assert privacy.search(measure, list(privacy.GRID), 10).gain == 0.5
    assert len(asked) == len(set(asked)) == 10
    asked.clear()
    privacy.search(measure, list(privacy.GRID), 3)
    assert len(asked) == 3


def test_the_aim_is_on_the_mechanism_that_was_better_on_writers_held_out() -> None:
    def row(mechanism: str, accuracy: float) -> dict[str, Any]:
        epsilon = 0.0 if mechanism == "none" else 8.0
        return vars(privacy.Row(mechanism, epsilon, 0, {}, 1.0, 1.0, 8.0, accuracy, accuracy, 0.5, 1.0, 1.0, "a"))

    content = {
        "tuning": [
            {"mechanism": "fixed", "epsilon": 8.0, "accuracy": 0.95},
            {"mechanism": "adaptive", "epsilon": 8.0, "accuracy": 0.94},
        ],
        "rows": [row("none", 0.98), row("fixed", 0.96), row("adaptive", 0.97)],
    }
    first, second = privacy.aims(content)
    assert "(fixed) at epsilon 8" in first["what"]
    assert first["value"] == pytest.approx(2.0)
    assert second["value"] is None
