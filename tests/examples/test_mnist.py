from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fed_client.training.loop import train
from fed_core.batches import evaluate
from fed_core.errors import ConfigError
from fed_core.plan import OptimizerPlan, TrainingPlan
from fed_core.workload import Site, Workload, initial_model, load_workload
from fed_server.config import parse_run_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "mnist"
CPU = torch.device("cpu")


def data_folder() -> Path | None:
    """MNIST in $FEDSTREAM_DATA, or in a folder shared/data beside the checkout or in it."""
    given = os.environ.get("FEDSTREAM_DATA")
    for root in [Path(given)] if given else [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]:
        if (root / "mnist" / "train-images-idx3-ubyte.gz").exists():
            return root / "mnist"
    return None


@pytest.fixture(scope="module")
def mnist() -> Path:
    folder = data_folder()
    if folder is None:
        pytest.skip("no MNIST: set FEDSTREAM_DATA to a folder that holds mnist/train-images-idx3-ubyte.gz and so on")
    return folder


@pytest.fixture(scope="module")
def module() -> ModuleType:
    import sys

    return sys.modules[type(load("CNN")).__module__]


def load(name: str) -> Workload:
    return load_workload(f"{FOLDER / 'workload.py'}:{name}")


def write_idx(path: Path, array: Any) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """120 images in the real format: every pixel is the image's number, so that images can be told apart."""
    images = np.broadcast_to(np.arange(120)[:, None, None], (120, 28, 28))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(120) % 10)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images[:30])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(30) % 10)
    np.savez(tmp_path / "writers.npz", train_writer=np.arange(120, dtype=np.int16) // 6 * 10)
    return tmp_path


def site_data(folder: Path, **options: object) -> tuple[list[int], list[int]]:
    """Numbers of the images that a site trains and evaluates on."""
    site = Site(data=folder, options={name: str(value) for name, value in options.items()})
    workload = load("CNN")
    parts = [workload.train_data(site), workload.evaluation_data(site)]
    return tuple((part[0][:, 0, 0, 0] * 255).round().int().tolist() if part else [] for part in parts)  # type: ignore[index, return-value]


@pytest.mark.parametrize(("name", "num_parameters"), [("CNN", 1_663_370), ("TwoNN", 199_210)])
def test_the_models_have_the_papers_size(name: str, num_parameters: int) -> None:
    model = initial_model(load(name), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("split", ["iid", "shards", "dirichlet", "writers"])
@pytest.mark.parametrize("num_sites", [1, 4, 7])
def test_every_image_is_at_one_site(small: Path, split: str, num_sites: int) -> None:
    parts = [site_data(small, split=split, site=site, num_sites=num_sites) for site in range(num_sites)]
    assert sorted(number for part in parts for side in part for number in side) == list(range(120))
    assert all(len(held_out) < len(training) for training, held_out in parts)


def test_writers_stay_together(small: Path) -> None:
    for site in range(4):
        training, held_out = site_data(small, split="writers", site=site, num_sites=4)
        own = sorted(training + held_out)
        assert own == sorted(
            number for writer in {number // 6 for number in own} for number in range(writer * 6, writer * 6 + 6)
        )
    assert sorted(sum(site_data(small, writer=30), [])) == list(range(18, 24))  # noqa: RUF017


def test_shards_have_few_digits(small: Path) -> None:
    for site in range(10):
        digits = {number % 10 for side in site_data(small, split="shards", site=site, num_sites=10) for number in side}
        assert len(digits) <= 2


def test_a_site_of_one_label_has_one_digit_and_all_sites_have_everything(small: Path) -> None:
    parts = [site_data(small, split="label", site=site, num_sites=20, held_out=0)[0] for site in range(20)]
    assert [{number % 10 for number in part} for part in parts] == [{site % 10} for site in range(20)]
    assert sorted(number for part in parts for number in part) == list(range(120))


def test_the_mix_of_digits_is_as_even_as_asked(small: Path) -> None:
    def largest_share(alpha: float) -> float:
        shares = []
        for site in range(6):
            digits = [
                n % 10 for n in site_data(small, split="dirichlet", site=site, num_sites=6, alpha=alpha, held_out=0)[0]
            ]
            assert len(digits) == 20
            shares.append(max(digits.count(digit) for digit in range(10)) / 20)
        return sum(shares) / 6

    assert largest_share(1000.0) < 0.35 < largest_share(0.05)


def test_nothing_held_out_means_no_evaluation(small: Path) -> None:
    training, held_out = site_data(small, num_sites=4, held_out=0)
    assert (len(training), held_out) == (30, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"site": 4, "num_sites": 4}, "option site is 4"),
        ({"split": "random"}, "expected one of iid, shards, label, dirichlet, writers"),
        ({"split": "label", "num_sites": 7}, "expected a multiple of 10"),
        ({"split": "dirichlet", "alpha": 0}, "option alpha is 0"),
        ({"writer": 31}, "nobody has the number 31"),
        ({"split": "writers", "num_sites": 21}, "there are 20 writers"),
        ({"held_out": 1}, "held_out"),
        ({"sites": 4}, "no such option"),
    ],
)
def test_options_that_make_no_sense_are_refused(small: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        site_data(small, **options)


def test_missing_and_damaged_files_are_named(small: Path, module: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"no nothing or nothing\.gz"):
        module.read_idx(small, "nothing")
    path = small / "t10k-images-idx3-ubyte"
    for content in (path.read_bytes()[:-1], b"", b"\x89PNG\r\n", b"\0\0\x08\x04\0\0"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a whole IDX file"):
            module.read_idx(small, path.name)
    (small / "writers.npz").unlink()
    with pytest.raises(ConfigError, match="says who wrote each digit"):
        site_data(small, split="writers")
    with pytest.raises(ConfigError, match="--evaluation-data"):
        load("CNN").coordinator_data(None)


@pytest.mark.parametrize(("name", "file"), [("CNN", "run-cnn.toml"), ("TwoNN", "run-2nn.toml")])
def test_the_run_configs_are_valid(name: str, file: str) -> None:
    config = parse_run_config((FOLDER / file).read_text())
    workload = load(name)
    assert (config.workload, config.workload_version) == (workload.name, workload.version)


def test_the_real_files_are_read(mnist: Path, module: ModuleType) -> None:
    images, labels = module.load(mnist, "train")
    assert images.shape == (60_000, 28, 28)
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = load("CNN").coordinator_data(mnist)
    assert isinstance(test, tuple)
    assert test[0].shape == (10_000, 1, 28, 28)
    assert test[0].max() == 1


def test_a_writer_has_few_images(mnist: Path) -> None:
    training = load("TwoNN").train_data(Site(data=mnist, options={"writer": "2154"}))
    assert isinstance(training, tuple)
    assert 19 <= len(training[0]) <= 131


def test_one_site_learns_real_digits(mnist: Path) -> None:
    workload = load("TwoNN")
    model = initial_model(workload, 0)
    data = workload.train_data(Site(data=mnist, options={"num_sites": "30"}))
    plan = TrainingPlan(batch_size=10, optimizer=OptimizerPlan("sgd", 0.1), seed=0, epochs=2)
    train(workload, model, data, plan, CPU)
    test = workload.coordinator_data(mnist)
    assert test is not None
    assert evaluate(workload, model, test, 1000, CPU)[1]["accuracy"] > 0.8
