"""Making a version: master weights as they are, the version as every client has it, and nothing lost between the two for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fed_core.codecs.lattice import lattice_exponent
from fed_core.codecs.registry import encoding_from_json
from fed_core.errors import NotFiniteError
from fed_core.payload.reader import PayloadReader
from fed_core.safetensors_tiles import tensors_digest
from fed_core.tensors import apply_difference
from fed_server.aggregation.exact import TILE
from fed_server.config import DeltaDownlinkConfig, DownlinkConfig, LatticeDownlinkConfig, RawDownlinkConfig
from tests.server.lineage import RUN, Lineage, walk

Weights = dict[str, Tensor]
Open = Callable[..., Lineage]

LATTICE = LatticeDownlinkConfig()
DOWNLINKS: dict[str, DownlinkConfig] = {
    "lattice": LATTICE,
    "narrow": LatticeDownlinkConfig(step=1.0),
    "fine": LatticeDownlinkConfig(finest_step=0.0, step=1.0, first_error=1e-4),
    "auto": DeltaDownlinkConfig(),
    "uniform": DeltaDownlinkConfig(encoding=encoding_from_json('{"kind": "uniform", "bits": 3, "block": 64}')),
    "stochastic": DeltaDownlinkConfig(
        encoding=encoding_from_json('{"kind": "uniform", "bits": 4, "rounding": "stochastic"}')
    ),
    "cast": DeltaDownlinkConfig(encoding=encoding_from_json('{"kind": "cast"}')),
}
EVERY_DOWNLINK = pytest.mark.parametrize("downlink", DOWNLINKS.values(), ids=DOWNLINKS.keys())


def model(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(60, 50, generator=generator),
        "long": torch.randn(TILE + 1000, 2, generator=generator) / 10,
        "bias": torch.randn(50, generator=generator),
        "half": torch.randn(20, 10, generator=generator).half(),
        "brain": torch.randn(20, 10, generator=generator).bfloat16(),
        "double": torch.randn(11, 7, generator=generator).double(),
        "empty": torch.zeros(0, 4),
        "b.mean": torch.randn(50, generator=generator),
        "b.count": torch.tensor(3),
    }


@pytest.fixture
def open_lineage(tmp_path: Path) -> Iterator[Open]:
    opened: list[Lineage] = []

    def open_(downlink: DownlinkConfig = LATTICE, folder: str = "data", **options: bool) -> Lineage:
        opened.append(Lineage(tmp_path / folder, downlink, **options))
        return opened[-1]

    yield open_
    for lineage in opened:
        lineage.close()


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


# Files and records


@EVERY_DOWNLINK
def test_the_master_weights_are_kept_to_the_bit(open_lineage: Open, downlink: DownlinkConfig) -> None:
    lineage, weights = open_lineage(downlink), model()
    lineage.first(weights)
    assert same(lineage.masters(0), weights)
    moved = walk(weights, 1)
    lineage.step(moved)
    assert same(lineage.masters(1), moved)


@EVERY_DOWNLINK
def test_the_version_is_the_one_before_plus_what_the_payload_says(open_lineage: Open, downlink: DownlinkConfig) -> None:
    lineage, weights = open_lineage(downlink), model()
    lineage.first(weights)
    made = lineage.step(walk(weights, 1))
    before, after = lineage.values(0), lineage.values(1)
    with PayloadReader(lineage.files.payload_path(made.payload.digest.hex())) as delta:
        for name, change in delta.tensors(verify=True).items():
            is_raw = delta.entry(name).codec == "raw"
            assert (change if is_raw else apply_difference(before[name], change)).equal(after[name]), name
        assert delta.manifest.base_digest.hex() == lineage.models[0].payload_digest
        assert delta.manifest.model_digest.hex() == made.identity
    path = lineage.files.model_path(RUN, 1)
    assert made.digest == tensors_digest(path).hex()
    assert made.file_bytes == path.stat().st_size
    assert made.max_abs == {n: float(t.abs().max()) for n, t in after.items() if t.is_floating_point() and t.numel()}


@EVERY_DOWNLINK
def test_buffers_counters_and_short_types_lose_nothing(open_lineage: Open, downlink: DownlinkConfig) -> None:
    lineage, weights = open_lineage(downlink), model()
    lineage.first(weights)
    for seed in (1, 2, 3):
        weights = walk(weights, seed)
        lineage.step(weights)
        values = lineage.values(seed)
        assert values["b.count"].equal(weights["b.count"])
        if isinstance(downlink, LatticeDownlinkConfig):
            for name in ("b.mean", "half", "brain"):
                assert values[name].equal(weights[name]), name


@EVERY_DOWNLINK
def test_made_again_a_version_has_the_same_bits(open_lineage: Open, downlink: DownlinkConfig) -> None:
    made = []
    for folder in ("one", "two"):
        lineage, weights = open_lineage(downlink, folder), model()
        made.append([lineage.first(weights), *(lineage.step(walk(weights, seed)) for seed in (1, 2))])
    assert made[0] == made[1]


def test_a_raw_version_is_the_weights_themselves(open_lineage: Open) -> None:
    lineage, weights = open_lineage(RawDownlinkConfig()), model()
    first = lineage.first(weights)
    assert same(lineage.values(0), weights)
    assert first.identity == first.payload.digest.hex()
    assert (first.error, first.gain) == (None, None)
    assert not lineage.files.master_path(RUN, 0).exists()


@pytest.mark.parametrize("downlink", [LATTICE, DeltaDownlinkConfig(), RawDownlinkConfig()])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_makes_no_version(open_lineage: Open, downlink: DownlinkConfig, bad: float) -> None:
    lineage, weights = open_lineage(downlink), model()
    lineage.first(weights)
    broken = walk(weights, 1)
    broken["long"][-1, -1] = bad
    with pytest.raises(NotFiniteError, match="tensor 'long' of version 1 holds NaN or infinity"):
        lineage.step(broken)
    assert lineage.newest == 0


# What was left out


@EVERY_DOWNLINK
def test_error_and_gain_say_what_the_delta_left_out_of_the_round(open_lineage: Open, downlink: DownlinkConfig) -> None:
    lineage, weights = open_lineage(downlink), model()
    lineage.first(weights)
    for seed in (1, 2):
        before, moved = lineage.values(seed - 1), walk(weights, seed)
        made = lineage.step(moved)
        after = lineage.values(seed)
        with PayloadReader(lineage.files.payload_path(made.payload.digest.hex())) as delta:
            lossy = [e.spec.name for e in delta.manifest.tensors if e.codec != "raw"]
        wanted = {name: moved[name].double() - before[name].double() for name in lossy}
        got = {name: after[name].double() - before[name].double() for name in lossy}
        left = sum(squares(wanted[name] - got[name]) for name in lossy)
        changed = sum(
            squares(moved[n].double() - weights[n].double())
            for n in moved
            if moved[n].is_floating_point() and n[0:2] != "b."
        )
        product = sum(float((wanted[name] * got[name]).sum()) for name in lossy)
        assert made.error == pytest.approx(left / changed, rel=1e-3, abs=1e-12)
        assert made.gain == pytest.approx(product / sum(squares(change) for change in wanted.values()), rel=1e-3)
        weights = moved


@pytest.mark.parametrize("step", [1.0, 8.0])
def test_what_a_lattice_leaves_out_is_less_than_its_steps(open_lineage: Open, step: float) -> None:
    lineage, weights = open_lineage(LatticeDownlinkConfig(step=step)), model()
    lineage.first(weights)
    for seed in (1, 2, 3):
        before, weights = lineage.values(seed - 1), walk(weights, seed, 0.02)
        lineage.step(weights)
        after = lineage.values(seed)
        for name in ("w", "long", "bias"):
            spec = next(spec for spec in lineage.specs if spec.name == name)
            delta = (after[name] - before[name]).reshape(-1)
            exponent = lattice_exponent(spec, lambda first, count, d=delta: d[first : first + count] + 0.0)
            assert exponent is not None
            assert (weights[name] - after[name]).abs().max() <= 2.0**exponent


def test_small_changes_are_carried_until_they_have_grown_to_a_step(open_lineage: Open) -> None:
    """Each round moves the weights by a thousandth of the finest step; without the carry no version would ever differ."""
    lineage = open_lineage(LatticeDownlinkConfig(finest_step=2.0**-4))
    weights = {"w": torch.where(torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0)}
    lineage.first(weights)
    start, step = lineage.values(0)["w"], 2.0**-4
    num_rounds = 60
    drift = torch.linspace(0, 3 * step, 1600).view(40, 40) / num_rounds
    num_changed = 0
    for number in range(1, num_rounds + 1):
        weights = {"w": weights["w"] + drift}
        lineage.step(weights)
        values = lineage.values(number)["w"]
        assert (values - weights["w"]).abs().max() <= step + 1e-6
        num_changed += not values.equal(lineage.values(number - 1)["w"])
    assert num_changed > 10
    moved = lineage.values(num_rounds)["w"] - start
    assert moved[drift > step / num_rounds].all(), "what drifted by more than a step has moved"
    assert float((moved - drift * num_rounds).mean()) == pytest.approx(0, abs=step / 20), "there is no bias"


@EVERY_DOWNLINK
def test_after_many_rounds_nothing_is_lost(open_lineage: Open, downlink: DownlinkConfig) -> None:
    """The error does not grow with the rounds: what one delta leaves out, a later one holds."""
    lineage, weights = open_lineage(downlink), {"w": model()["w"], "bias": model()["bias"]}
    lineage.first(weights)
    errors = []
    for seed in range(1, 31):
        weights = walk(weights, seed, 0.01)
        lineage.step(weights)
        errors.append(sum(squares(lineage.values(seed)[name] - weights[name]) for name in weights))
    assert max(errors[15:]) < 3 * max(errors[:15])


@EVERY_DOWNLINK
def test_descent_on_a_quadratic_reaches_its_minimum(open_lineage: Open, downlink: DownlinkConfig) -> None:
    """Clients step from the version that they have, the coordinator adds their steps to the master weights."""
    target = {"w": model(1)["w"], "bias": model(1)["bias"]}
    weights = {"w": model(2)["w"], "bias": model(2)["bias"]}
    lineage = open_lineage(downlink)
    lineage.first(weights)
    for number in range(40):
        seen = lineage.values(number)
        weights = {name: weights[name] - 0.3 * (seen[name] - target[name]) for name in weights}
        lineage.step(weights)
    for name, tensor in lineage.values(40).items():
        distance = (squares(tensor - target[name]) / squares(target[name])) ** 0.5
        # A lattice comes as near as its finest step, a sixteenth, allows; the others as near as one likes.
        coarse = isinstance(downlink, LatticeDownlinkConfig) and downlink.finest_step > 0
        assert distance < (0.08 if coarse else 1e-3), name
