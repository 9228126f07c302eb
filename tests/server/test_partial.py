"""Partial aggregates: any tree gives the same bits, and what cannot be part of the mean is refused whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.errors import FedstreamError, PayloadError, UpdateRefusedError
from fed_core.payload.assemble import assemble_model
from fed_core.payload.manifest import PartialInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_server.aggregation.grid import GridPolicy, make_grid
from fed_server.aggregation.mean import WeightedMean
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.partial import Origin, merge_partial, partial_specs, write_partial
from fedstream.v1 import common_pb2
from tests.server.test_aggregation import payload, some_update, specs_of

ORIGIN = Origin("run-1", 4, 3, bytes(range(32)))
POLICY = GridPolicy(cohort_limit=8, max_weight=2**20)
SPECS = specs_of(some_update(1))
WEIGHTS = {1: 10, 2: 3, 3: 700, 4: 1, 5: 2**20, 6: 7, 7: 99, 8: 12345}


def empty_mean(max_abs: float = 0.0) -> WeightedMean:
    grid = make_grid(SPECS, {spec.name: max_abs for spec in SPECS}, POLICY)
    return WeightedMean(SPECS, grid, merge_rules(SPECS, []))


def values(mean: WeightedMean) -> list[Tensor | None]:
    return [mean.report(spec, 0, spec.num_elements) for spec in SPECS]


def same(one: WeightedMean, other: WeightedMean) -> bool:
    return (one.num_updates, one.total_weight) == (other.num_updates, other.total_weight) and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(values(one), values(other), strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("updates")
    for seed in WEIGHTS:
        payload(made / str(seed), some_update(seed), SPECS)
    return made


def fold(mean: WeightedMean, folder: Path, seed: int) -> None:
    with PayloadReader(folder / str(seed)) as reader:
        mean.add(reader, WEIGHTS[seed])


def written(mean: WeightedMean, path: Path, origin: Origin = ORIGIN) -> Path:
    with path.open("wb+") as file:
        write_partial(file, mean, origin)
    return path


def merged(mean: WeightedMean, path: Path, origin: Origin = ORIGIN, policy: GridPolicy = POLICY) -> None:
    with PayloadReader(path) as reader:
        merge_partial(mean, reader, origin, policy)


def grow(seeds: list[int], folder: Path, draw: random.Random) -> WeightedMean:
    """The mean of these updates by a random tree: some folded here, the rest below, every branch through a file or in memory."""
    mean = empty_mean()
    here, below = seeds, []
    if len(seeds) != 1:
        cut = draw.randint(0, len(seeds))
        here, below = seeds[:cut], seeds[cut:]
    while below:
        size = draw.randint(1, len(below)) if here or len(below) == 1 else draw.randint(1, len(below) - 1)
        branch, below = grow(below[:size], folder, draw), below[size:]
        if draw.random() < 0.5:
            mean.merge(branch)
        else:
            merged(mean, written(branch, folder / "branch"))
        if draw.random() < 0.3:  # written down, and taken up by another coordinator
            path = written(mean, folder / "resumed")
            mean = empty_mean()
            merged(mean, path)
    for seed in here:
        fold(mean, folder, seed)
    return mean


@settings(max_examples=25, deadline=None)
@given(st.permutations(list(WEIGHTS)), st.randoms(use_true_random=False))
def test_any_tree_gives_the_same_bits(folder: Path, order: list[int], draw: random.Random) -> None:
    straight = empty_mean()
    for seed in WEIGHTS:
        fold(straight, folder, seed)
    assert same(grow(order, folder, draw), straight)


def test_a_partial_aggregate_of_nothing_changes_nothing(folder: Path) -> None:
    mean, path = empty_mean(), written(empty_mean(), folder / "nothing")
    merged(mean, path)
    assert not mean.can_report()
    fold(mean, folder, 1)
    before = empty_mean()
    fold(before, folder, 1)
    merged(mean, path)
    assert same(mean, before)


def test_counters_may_be_negative(tmp_path: Path) -> None:
    specs = specs_of({"b_count": torch.tensor([-5, 3])})
    means = [WeightedMean(specs, {}, merge_rules(specs, [])) for _ in range(3)]
    for mean, numbers in zip(means[:2], ([-5, 3], [-9, 4]), strict=True):
        with PayloadReader(payload(tmp_path / str(numbers[0]), {"b_count": torch.tensor(numbers)}, specs)) as reader:
            mean.add(reader, 1)
    for mean in means[:2]:
        merged(means[2], written(mean, tmp_path / "part"))
    result = means[2].report(specs[0], 0, 2)
    assert result is not None
    assert result.tolist() == [-5, 4]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(ORIGIN, run_id="run-2"), "of run 'run-1', expected 'run-2'"),
        (replace(ORIGIN, round=5), "of round 4, expected 5"),
        (replace(ORIGIN, model_version=2), "of model version 3, expected 2"),
        (replace(ORIGIN, base_digest=bytes(32)), "of base digest '0001"),
    ],
)
def test_another_round_or_version_is_refused(folder: Path, other: Origin, says: str) -> None:
    mean = empty_mean()
    fold(mean, folder, 1)
    with pytest.raises(UpdateRefusedError, match=says):
        merged(empty_mean(), written(mean, folder / "foreign"), other)


def test_another_grid_is_refused(folder: Path) -> None:
    coarse = empty_mean(max_abs=1e6)
    fold(coarse, folder, 1)
    with pytest.raises(UpdateRefusedError, match="another grid"):
        merged(empty_mean(), written(coarse, folder / "coarse"))


def test_an_update_is_no_partial_aggregate(folder: Path) -> None:
    with pytest.raises(UpdateRefusedError, match="expected a partial aggregate, got a PAYLOAD_KIND_MODEL"):
        merged(empty_mean(), folder / "1")


def test_weights_beyond_exact_sums_are_refused_and_change_nothing(folder: Path) -> None:
    mean, heavy, before = empty_mean(), empty_mean(), empty_mean()
    for each in (mean, before):
        fold(each, folder, 2)
    for _ in range(8):
        fold(heavy, folder, 5)
    path = written(heavy, folder / "heavy")
    merged(empty_mean(), path)
    with pytest.raises(UpdateRefusedError, match=r"8,388,608 on top of 3 is beyond the 8,388,608 .* raise cohort.size"):
        merged(mean, path)
    assert same(mean, before)


def forged(path: Path, change: Callable[[dict[str, Tensor]], object], info: PartialInfo | None = None) -> Path:
    mean = empty_mean()
    specs = partial_specs(mean)
    tensors = {
        spec.name: torch.zeros(spec.shape, dtype=torch.int64 if spec.name == "b_count" else torch.float64)
        for spec in specs
    }
    change(tensors)
    exponents = tuple(mean.sums[spec.name].exponent if spec.name in mean.sums else 0 for spec in specs)
    with path.open("wb+") as file:
        write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_PARTIAL,
            run_id=ORIGIN.run_id,
            round=ORIGIN.round,
            model_version=ORIGIN.model_version,
            base_digest=ORIGIN.base_digest,
            update=None,
            tensors=[(spec, tensors[spec.name]) for spec in specs],
            partial=info or PartialInfo(1, 3, exponents),
        )
    return path


@pytest.mark.parametrize("bad", [0.5, float("nan"), float("inf"), -float("inf"), 2.0**53, 3 * 2.0**29 + 1])
def test_sums_that_no_update_makes_are_refused_before_anything_is_added(tmp_path: Path, bad: float) -> None:
    mean = empty_mean()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["w"][0] = 7
        tensors["b_mean"][2] = bad

    with pytest.raises(PayloadError, match="'b_mean' of the partial aggregate holds what no updates of total weight 3"):
        merged(mean, forged(tmp_path / "forged", change))
    assert not bool(mean.sums["w"].steps.any())
    assert mean.num_updates == 0


def test_the_largest_sum_that_its_weight_allows_is_taken(tmp_path: Path) -> None:
    mean = empty_mean()
    merged(mean, forged(tmp_path / "full", lambda tensors: tensors["w"].fill_(3 * 2.0**29)))
    tile = mean.report(SPECS[0], 0, 1)
    assert tile is not None
    assert tile.item() == 2.0 ** (mean.sums["w"].exponent + 29)


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (PartialInfo(2, 1, (0,) * 7), "2 updates of total weight 1"),
        (PartialInfo(-1, 1, (0,) * 7), "-1 updates"),
        (PartialInfo(1, 2**50, (0,) * 7), "expected 0 to"),
        (PartialInfo(1, 1, (5000,) * 7), "exponent 5000"),
        (PartialInfo(1, 1, (0,)), "1 exponents for 7 tensors"),
    ],
)
def test_what_a_partial_aggregate_says_of_itself_is_checked(tmp_path: Path, info: PartialInfo, says: str) -> None:
    with pytest.raises(PayloadError, match=says):
        forged(tmp_path / "forged", lambda tensors: None, info)


def test_a_partial_aggregate_is_no_step_to_a_model(folder: Path) -> None:
    path = written(empty_mean(), folder / "step")
    with PayloadReader(path) as reader, (folder / "out").open("wb+") as out, pytest.raises(FedstreamError):
        assemble_model(None, [reader], out)
