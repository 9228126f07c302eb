from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fed_client.training.loop import train
from fed_core.batches import evaluate
from fed_core.errors import ConfigError
from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_core.workload import Site, Workload, initial_model, load_workload
from fed_server.config import parse_run_config

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install scikit-learn")

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Workload:
    return load_workload(str(FOLDER / "workload.py"))


def data_of(workload: Workload, site: int, **options: object) -> list[tuple[Tensor, ...]]:
    at = Site(f"site-{site}", options={"site": str(site)} | {name: str(value) for name, value in options.items()})
    held_out = workload.evaluation_data(at)
    training = workload.train_data(at)
    assert isinstance(training, tuple)
    assert isinstance(held_out, tuple)
    return [training, held_out]


def images(data: tuple[Tensor, ...]) -> list[bytes]:
    return [image.numpy().tobytes() for image in data[0]]


@pytest.mark.parametrize("num_sites", [1, 3, 7])
def test_every_image_is_at_one_place(digits: Workload, num_sites: int) -> None:
    parts = [part for site in range(num_sites) for part in data_of(digits, site, num_sites=num_sites)]
    test = digits.coordinator_data(None)
    assert isinstance(test, tuple)
    everything = [image for part in [*parts, test] for image in images(part)]
    assert len(everything) == 1797
    assert len(set(everything)) == len(set(images(load_all()))), "no site may hold another's image"


def load_all() -> tuple[Tensor]:
    from sklearn.datasets import load_digits

    return (torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16,)


def test_a_smaller_alpha_skews_more(digits: Workload) -> None:
    def skew(alpha: float) -> float:
        counts = [np.bincount(data_of(digits, site, alpha=alpha)[0][1].numpy(), minlength=10) for site in range(3)]
        return float(np.std([count / count.sum() for count in counts]))

    assert skew(0.1) > 2 * skew(100)


def test_a_site_sees_the_same_data_every_time(digits: Workload) -> None:
    first, again = data_of(digits, 1)[0], data_of(digits, 1)[0]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0][:50], data_of(digits, 1, partition_seed=1)[0][0][:50])


@pytest.mark.parametrize("options", [{"site": 3}, {"alpha": 0}, {"partition_seed": -1}, {"sites": 4}, {"alpha": "big"}])
def test_options_that_make_no_sense_are_refused(digits: Workload, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        digits.train_data(Site(options={name: str(value) for name, value in options.items()}))


def test_the_run_config_is_valid() -> None:
    config = parse_run_config((FOLDER / "run.toml").read_text())
    assert config.workload == "digits"


def test_together_the_sites_learn_what_none_learns_alone(digits: Workload) -> None:
    config = parse_run_config((FOLDER / "run.toml").read_text())
    rounds, optimizer = 5, config.training.optimizer
    sites = [data_of(digits, site)[0] for site in range(3)]
    total = sum(len(data[0]) for data in sites)
    test = digits.coordinator_data(None)
    assert test is not None

    def trained(values: dict[str, Tensor], data: tuple[Tensor, ...], epochs: int, seed: int) -> dict[str, Tensor]:
        model = initial_model(digits, 0)
        model.load_state_dict(values)
        sgd = OptimizerPlan("sgd", optimizer.learning_rate, momentum=optimizer.momentum)
        plan = TrainingPlan(batch_size=config.training.batch_size, optimizer=sgd, seed=seed, epochs=epochs)
        train(digits, model, data, plan, CPU)
        return model.state_dict()

    def accuracy(values: dict[str, Tensor]) -> float:
        model = initial_model(digits, 0)
        model.load_state_dict(values)
        return evaluate(digits, model, test, 256, CPU)[1]["accuracy"]

    initial = initial_model(digits, config.seed).state_dict()
    values = initial
    for round in range(rounds):
        local = [(len(data[0]) / total, trained(values, data, 2, 10 * round + i)) for i, data in enumerate(sites)]
        values = {name: sum((share * each[name] for share, each in local), torch.tensor(0.0)) for name in values}
    together = accuracy(values)
    alone = max(accuracy(trained(initial, data, 2 * rounds, 1)) for data in sites)
    assert together > 0.93
    assert together > alone + 0.02
