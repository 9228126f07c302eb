"""Robust rules against slow oracles, their laws, and attacks on them."""

from __future__ import annotations

import itertools
import os
import random
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.codecs.base import Encoding
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.lrq import LrqConfig
from fed_core.codecs.raw import RawConfig
from fed_core.errors import InvalidError, NotFiniteError
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec
from fed_server.aggregation import stack as stack_module
from fed_server.aggregation.base import Aggregator, AggregatorSetting
from fed_server.aggregation.bulyan import choose, mean_near_median
from fed_server.aggregation.clipping import clip
from fed_server.aggregation.geometric_median import weiszfeld
from fed_server.aggregation.geometry import combine, distances_to, inner_products, squared_distances
from fed_server.aggregation.grid import GridPolicy, make_grid
from fed_server.aggregation.krum import krum_scores
from fed_server.aggregation.median import coordinate_median
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.mixing import mix, mix_products, neighbours
from fed_server.aggregation.registry import AGGREGATORS, new_aggregator
from fed_server.aggregation.trimmed_mean import trimmed_mean
from fed_server.config import (
    AggregationConfig,
    GeometricMedianConfig,
    KrumConfig,
    MedianConfig,
    MultiKrumConfig,
    RobustConfig,
    RunConfig,
    TrimmedMeanConfig,
    parse_run_config,
    union_members,
)
from fedstream.v1 import common_pb2
from tests.server.test_aggregation import payload, some_update, specs_of

# The first products of a process load libraries, which takes longer than any deadline.
calm = settings(deadline=None, max_examples=25)

ROBUST = [
    kind
    for kind, config in union_members(RunConfig.model_fields["aggregation"]).items()
    if issubclass(config, RobustConfig)
]

values = st.floats(-4, 4, width=32)
blocks = st.tuples(st.integers(1, 9), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
)


def config_of(kind: str, num_byzantine: int = 1, **more: object) -> RobustConfig:
    config = union_members(RunConfig.model_fields["aggregation"])[kind].model_validate(
        {"kind": kind, "num_byzantine": num_byzantine} | more
    )
    assert isinstance(config, RobustConfig)
    return config


def test_every_kind_of_config_has_an_aggregator() -> None:
    assert set(AGGREGATORS) == set(union_members(RunConfig.model_fields["aggregation"]))


# The maths of one block


@calm
@given(blocks)
def test_the_median_is_that_of_the_statisticians(rows: list[list[float]]) -> None:
    expected = [statistics.median(column) for column in zip(*rows, strict=True)]
    assert coordinate_median(torch.tensor(rows)).tolist() == expected
    assert coordinate_median(torch.tensor(rows, dtype=torch.float64)).tolist() == expected


@calm
@given(blocks, st.integers(0, 4))
def test_the_trimmed_mean_leaves_out_both_ends(rows: list[list[float]], num_trimmed: int) -> None:
    num_trimmed = min(num_trimmed, (len(rows) - 1) // 2)
    kept = [sorted(column)[num_trimmed : len(rows) - num_trimmed] for column in zip(*rows, strict=True)]
    assert trimmed_mean(torch.tensor(rows), num_trimmed).tolist() == pytest.approx(
        [statistics.fmean(column) for column in kept], abs=1e-12
    )


def test_the_median_of_the_largest_numbers_does_not_overflow() -> None:
    largest = torch.finfo(torch.float64).max
    assert coordinate_median(torch.full((2, 1), largest, dtype=torch.float64)).item() == largest


def test_the_trimmed_part_is_rounded_up_but_leaves_something() -> None:
    config = TrimmedMeanConfig(num_byzantine=1, trim=0.1)
    assert [config.num_trimmed(n) for n in (3, 10, 11, 30, 31)] == [1, 1, 2, 3, 4]
    assert TrimmedMeanConfig(num_byzantine=1, trim=0.49).num_trimmed(3) == 1
    assert TrimmedMeanConfig(num_byzantine=2).num_trimmed(100) == 2


@calm
@given(blocks)
def test_distances_are_those_of_the_vectors(rows: list[list[float]]) -> None:
    block = torch.tensor(rows, dtype=torch.float64)
    products = inner_products([block[:, :1], block[:, 1:]], len(block))
    torch.testing.assert_close(squared_distances(products), torch.cdist(block, block) ** 2, rtol=0, atol=1e-11)
    coefficients = torch.linspace(-1, 1, len(block), dtype=torch.float64)
    point = (coefficients[:, None] * block).sum(0)
    torch.testing.assert_close(distances_to(products, coefficients), (block - point).norm(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(combine(block, coefficients), point, rtol=0, atol=1e-12)


def oracle_scores(block: Tensor, num_byzantine: int) -> list[float]:
    scores = []
    for i, one in enumerate(block.tolist()):
        away = sorted(
            sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
            for j, other in enumerate(block.tolist())
            if i != j
        )
        scores.append(sum(away[: max(1, len(block) - num_byzantine - 2)]))
    return scores


def random_block(seed: int, num_updates: int, num_coordinates: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_updates, num_coordinates, generator=generator, dtype=torch.float64)


@calm
@given(st.integers(0, 2**31), st.integers(5, 12))
def test_krum_scores_are_those_of_the_paper(seed: int, num_updates: int) -> None:
    block = random_block(seed, num_updates)
    for num_byzantine in range(1, (num_updates - 3) // 2 + 1):
        scores = krum_scores(squared_distances(inner_products([block], num_updates)), num_byzantine)
        assert scores.tolist() == pytest.approx(oracle_scores(block, num_byzantine), rel=1e-9)


@calm
@given(st.integers(0, 2**31), st.integers(7, 12))
def test_bulyan_chooses_one_by_one_and_averages_around_the_median(seed: int, num_updates: int) -> None:
    block = random_block(seed, num_updates)
    left = list(range(num_updates))
    expected: list[int] = []
    for _ in range(num_updates - 2):
        scores = oracle_scores(block[left], 1)
        expected.append(left.pop(scores.index(min(scores))))
    # The last choice is among three, each with its nearest only: two of them have the same score but for rounding.
    chosen = choose(squared_distances(inner_products([block], num_updates)), 1)
    assert len(set(chosen) ^ set(expected)) <= 2
    rows = block[chosen]
    wanted = []
    for column in rows.T.tolist():
        median = statistics.median(column)
        nearest = sorted(column, key=lambda value: abs(value - median))[: num_updates - 4]
        wanted.append(statistics.fmean(nearest))
    assert mean_near_median(rows, num_updates - 4).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@calm
@given(st.integers(0, 2**31), st.integers(3, 9))
def test_no_point_nearby_is_nearer_to_all_than_the_geometric_median(seed: int, num_updates: int) -> None:
    block = random_block(seed, num_updates)
    coefficients = weiszfeld(inner_products([block], num_updates), 300, 1e-9)
    assert coefficients.sum().item() == pytest.approx(1)
    median = combine(block, coefficients)
    least = (block - median).norm(dim=1).sum()
    for direction in torch.cat([torch.eye(6), -torch.eye(6)]).double():
        assert (block - median - 1e-2 * direction).norm(dim=1).sum() > least - 1e-6


def test_the_geometric_median_of_numbers_on_a_line_is_their_median() -> None:
    block = torch.tensor([[1.0], [2.0], [3.0], [10.0], [1e6]], dtype=torch.float64)
    coefficients = weiszfeld(inner_products([block], 5), 10_000, 1e-9)
    assert combine(block, coefficients).item() == pytest.approx(3, abs=1e-3)


def test_updates_that_are_all_the_same_are_their_own_geometric_median() -> None:
    block = torch.ones(4, 3, dtype=torch.float64)
    assert combine(block, weiszfeld(inner_products([block], 4), 100, 1e-6)).tolist() == [1, 1, 1]


@calm
@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.1, 5), st.integers(1, 5))
def test_clipping_is_that_of_the_paper(seed: int, num_updates: int, radius: float, iterations: int) -> None:
    block = random_block(seed, num_updates)
    point = torch.zeros(6, dtype=torch.float64)
    for _ in range(iterations):
        away = block - point
        point = point + (away * (radius / away.norm(dim=1)).clamp(max=1)[:, None]).mean(0)
    got = combine(block, clip(inner_products([block], num_updates), radius, iterations))
    torch.testing.assert_close(got, point, rtol=0, atol=1e-6)


def test_updates_of_zeros_are_clipped_to_zero() -> None:
    block = torch.zeros(3, 2)
    assert combine(block, clip(inner_products([block], 3), None, 3)).tolist() == [0, 0]


@calm
@given(st.integers(0, 2**31), st.integers(4, 9))
def test_mixing_averages_the_nearest(seed: int, num_updates: int) -> None:
    block = random_block(seed, num_updates)
    products = inner_products([block], num_updates)
    chosen = neighbours(squared_distances(products), 1)
    mixed = mix(block, chosen, -40)
    for i, row in enumerate(mixed):
        nearest = (block - block[i]).norm(dim=1).argsort()[: num_updates - 1]
        torch.testing.assert_close(row, block[nearest].mean(0), rtol=0, atol=1e-11)
    torch.testing.assert_close(mix_products(products, chosen), inner_products([mixed], num_updates), rtol=0, atol=1e-9)


def test_no_rule_changes_the_block_that_it_reads() -> None:
    for dtype in (torch.float32, torch.float64):
        block = random_block(1, 7).to(dtype)
        before = block.clone()
        coordinate_median(block)
        trimmed_mean(block, 1)
        mean_near_median(block, 3)
        combine(block, torch.ones(7))
        mix(block, torch.ones(7, 7, dtype=torch.float64), -30)
        assert torch.equal(block, before)


def test_squares_beyond_float64_are_named() -> None:
    with pytest.raises(NotFiniteError, match="too large for distances"):
        inner_products([torch.full((2, 1), 1e200, dtype=torch.float64)], 2)


# The aggregator


class Desk:
    """A folder of updates and fresh aggregators over them."""

    def __init__(self, folder: Path, specs: Sequence[TensorSpec]) -> None:
        self.folder = folder
        self.specs = list(specs)
        self.grid = make_grid(specs, {}, GridPolicy(cohort_limit=32, max_weight=1))

    def new(self, config: AggregationConfig) -> Aggregator:
        rules = merge_rules(self.specs, [])
        return new_aggregator(AggregatorSetting(self.specs, self.grid, rules, self.folder), config)

    def result(self, config: AggregationConfig, paths: Sequence[Path], tile: int = 10**9) -> dict[str, Tensor | None]:
        aggregator = self.new(config)
        for path in paths:
            with PayloadReader(path) as reader:
                aggregator.add(reader, 1)
        aggregator.prepare()
        result: dict[str, Tensor | None] = {}
        for spec in self.specs:
            step = min(tile, max(1, spec.num_elements))
            tiles = [
                aggregator.report(spec, first, min(step, spec.num_elements - first))
                for first in range(0, max(1, spec.num_elements), step)
            ]
            kept = [each for each in tiles if each is not None]
            result[spec.name] = torch.cat(kept) if kept else None
        return result


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in ((one[name], other[name]) for name in one)
    )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, list[Path]]:
    folder = tmp_path_factory.mktemp("cohort")
    specs = specs_of(some_update(1))
    return Desk(folder, specs), [payload(folder / str(seed), some_update(seed), specs) for seed in range(11)]


@pytest.mark.parametrize("mixing", ["none", "nearest"])
@pytest.mark.parametrize("kind", ROBUST)
def test_neither_order_nor_tiles_change_a_bit(cohort: tuple[Desk, list[Path]], kind: str, mixing: str) -> None:
    desk, paths = cohort
    config = config_of(kind, 2, mixing=mixing)
    reference = desk.result(config, paths)
    for seed in (1, 2):
        shuffled = random.Random(seed).sample(paths, len(paths))
        assert same(desk.result(config, shuffled, tile=97), reference)


@pytest.mark.parametrize("kind", ["median", "geometric_median"])
def test_blocks_of_a_few_coordinates_give_the_same(
    cohort: tuple[Desk, list[Path]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, paths = cohort
    reference = desk.result(config_of(kind, 2), paths)
    monkeypatch.setattr(stack_module, "BLOCK_VALUES", 7)
    monkeypatch.setattr(stack_module, "_FEWEST_COORDINATES", 3)
    blocked = desk.result(config_of(kind, 2), paths)
    for name, value in reference.items():
        torch.testing.assert_close(blocked[name], value, rtol=1e-9, atol=1e-12)


def test_every_kind_of_tensor_has_its_median(cohort: tuple[Desk, list[Path]]) -> None:
    desk, paths = cohort
    result = desk.result(config_of("median", 2), paths)
    updates = [some_update(seed) for seed in range(11)]
    for name in ("w", "w16", "wc", "scalar", "b_mean"):
        stacked = torch.stack([torch.view_as_real(u[name]) if u[name].is_complex() else u[name] for u in updates])
        got = result[name]
        assert got is not None
        assert torch.equal(got, stacked.double().median(dim=0).values.reshape(-1)), name
    assert result["b_flag"] is None
    count = result["b_count"]
    assert count is not None
    assert count.tolist() == [80]  # 100 and 90 are what two bad sites may have said
    assert result["empty"] is not None


@pytest.mark.parametrize("kind", ROBUST)
def test_buffers_are_no_part_of_distances_and_become_medians(cohort: tuple[Desk, list[Path]], kind: str) -> None:
    desk, paths = cohort
    result = desk.result(config_of(kind, 2), paths)
    expected = torch.stack([some_update(seed)["b_mean"] for seed in range(11)]).double().median(dim=0).values
    assert result["b_mean"] is not None
    assert torch.equal(result["b_mean"], expected)


def written(path: Path, tensors: dict[str, Tensor], encoding: Encoding) -> Path:
    with path.open("wb+") as file:
        write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id="",
            round=0,
            model_version=0,
            base_digest=b"",
            update=None,
            tensors=[(spec, tensors[spec.name]) for spec in specs_of(tensors)],
            encoding=encoding,
            result_digest=None if isinstance(encoding, RawConfig) else lambda: bytes(32),
        )
    return path


def test_updates_in_different_encodings_lie_side_by_side(tmp_path: Path) -> None:
    """Bodies of raw, fsq and lrq begin at different coordinates of a tensor of more than one body each."""
    encodings: list[Encoding] = [RawConfig(), FsqConfig(), LrqConfig(), RawConfig(), RawConfig()]
    tensors = [{"w": torch.randn(1100, 1000, generator=torch.Generator().manual_seed(seed)) / 8} for seed in range(5)]
    paths = [
        written(tmp_path / str(i), update, encoding)
        for i, (update, encoding) in enumerate(zip(tensors, encodings, strict=True))
    ]
    decoded = []
    for path in paths:
        with PayloadReader(path) as reader:
            decoded.append(reader.tensor("w").reshape(-1))
    result = Desk(tmp_path, specs_of(tensors[0])).result(config_of("median"), paths)["w"]
    assert result is not None
    assert torch.equal(result, torch.stack(decoded).median(dim=0).values.double())


def test_too_few_updates_are_refused_with_the_cure(cohort: tuple[Desk, list[Path]]) -> None:
    desk, paths = cohort
    for kind, needed in (("median", 7), ("krum", 9), ("bulyan", 15)):
        with pytest.raises(
            InvalidError, match=rf"{kind} with num_byzantine = 3 needs .* = {needed} updates and got 5: raise"
        ):
            desk.result(config_of(kind, 3), paths[:5])
    with pytest.raises(InvalidError, match="got 0"):
        desk.new(config_of("median", 3)).prepare()


def test_nan_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    good = [{"v": torch.zeros(2), "w": torch.full((3,), float(seed))} for seed in range(3)]
    desk = Desk(tmp_path, specs_of(good[0]))
    bad = written(tmp_path / "bad", {"v": torch.ones(2), "w": torch.tensor([1.0, float("nan"), 0.0])}, RawConfig())
    aggregator = desk.new(config_of("median"))
    with PayloadReader(bad) as reader, pytest.raises(NotFiniteError, match="'w'"):
        aggregator.add(reader, 1)
    for seed, update in enumerate(good):
        with PayloadReader(written(tmp_path / str(seed), update, RawConfig())) as reader:
            aggregator.add(reader, 1)
    aggregator.prepare()
    assert aggregator.num_updates == 3
    tile = aggregator.report(desk.specs[1], 0, 3)
    assert tile is not None
    assert tile.tolist() == [1, 1, 1]


# Attacks: 20 sites, 4 of them bad, whose updates are as large as the bound allows.


def attacked(name: str, honest: Tensor) -> Tensor:
    """The four bad updates, by those of the sixteen honest ones."""
    mean, spread = honest.mean(0), honest.std(0)
    return {
        "sign flip": -10 * honest[:4],
        "scaling": 1000 * honest[:4],
        "one point far away": torch.full((4, honest.shape[1]), 3e4),
        "a little is enough": (mean - 1.0 * spread).expand(4, -1),
        "inner product": (-2 * mean).expand(4, -1),
    }[name].contiguous()


ATTACKS = ["sign flip", "scaling", "one point far away", "a little is enough", "inner product"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_bad_updates_move_no_rule_far(tmp_path: Path, attack: str) -> None:
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(2000, generator=generator)
    honest = direction + torch.randn(16, 2000, generator=generator)
    bad = attacked(attack, honest)
    paths = [
        written(tmp_path / str(i), {"w": row}, RawConfig()) for i, row in enumerate([*honest.unbind(), *bad.unbind()])
    ]
    mean = honest.mean(0).double()
    desk = Desk(tmp_path, specs_of({"w": direction}))
    away = {}
    for kind, mixing in itertools.product(ROBUST, ("none", "nearest")):
        result = desk.result(config_of(kind, 4, mixing=mixing), paths)["w"]
        assert result is not None
        away[kind, mixing] = float((result - mean).norm() / mean.norm())
    # One honest update is as far from the mean as the mean is long. Krum ends there at best, and so does Bulyan, which averages
    # n - 4 f = 4 values; norm bounding draws towards zero and keeps the bad ones' part.
    for (kind, mixing), error in away.items():
        most = 1.1 if kind in ("krum", "bulyan") and mixing == "none" else 0.6 if kind == "norm_bounding" else 0.45
        assert error < most, (kind, mixing, error)


def test_the_mean_would_be_lost(tmp_path: Path) -> None:
    honest = torch.randn(16, 50, generator=torch.Generator().manual_seed(3)) + 1
    bad = attacked("scaling", honest)
    assert float((torch.cat([honest, bad]).mean(0) - honest.mean(0)).norm()) > 100 * float(honest.mean(0).norm())


# At submission

RUN = 'name = "a"\nworkload = "b"\ncohort = { size = 20, quorum = 14 }\nschedule.max_rounds = 3\n'


def test_a_quorum_that_just_suffices_is_accepted() -> None:
    for kind, most in (("median", 6), ("krum", 5), ("multi_krum", 5), ("bulyan", 2), ("geometric_median", 6)):
        text = f'{RUN}aggregation = {{ kind = "{kind}", num_byzantine = %d }}\n'
        assert isinstance(parse_run_config(text % most).aggregation, RobustConfig)
        with pytest.raises(
            InvalidError, match=r"aggregation\.num_byzantine: .* raise the quorum, or lower num_byzantine"
        ):
            parse_run_config(text % (most + 1))


def test_configs_know_what_they_need() -> None:
    assert MedianConfig(num_byzantine=3).least_updates() == 7
    assert KrumConfig(num_byzantine=3).least_updates() == MultiKrumConfig(num_byzantine=3).least_updates() == 9
    assert GeometricMedianConfig(num_byzantine=3).weighting == "uniform"


@pytest.mark.parametrize("num_updates", [1, 11])
def test_no_block_is_larger_than_its_limit(
    cohort: tuple[Desk, list[Path]], num_updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds the memory of every rule, whatever the cohort and the tensor."""
    desk, paths = cohort
    monkeypatch.setattr(stack_module, "BLOCK_VALUES", 2**12)
    stack = stack_module.UpdateStack(desk.specs, desk.folder)
    for path in paths[:num_updates]:
        with PayloadReader(path) as reader:
            stack.add(reader)
    spec = desk.specs[0]
    blocks = list(stack.blocks(spec))
    assert len(blocks) > 1 or num_updates == 1
    assert all(block.numel() <= 2**12 for _, _, block in blocks)
    assert torch.equal(torch.cat([block for _, _, block in blocks], dim=1), stack.block(spec, 0, spec.num_elements))


def open_stacks(folder: Path) -> int:
    """Files of stacks that this process holds open."""
    links = []
    for each in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{each}"))
    return sum(link.startswith(str(folder / ".stack.")) for link in links)


def test_a_stack_that_nobody_needs_any_longer_leaves_no_file(tmp_path: Path) -> None:
    specs = specs_of({"w": torch.ones(3)})
    path = written(tmp_path / "update", {"w": torch.ones(3)}, RawConfig())
    stack = stack_module.UpdateStack(specs, tmp_path)
    assert open_stacks(tmp_path) == 0
    with PayloadReader(path) as reader:
        stack.add(reader)
    assert [each.name for each in tmp_path.iterdir()] == ["update"]
    assert open_stacks(tmp_path) == 1
    del stack
    assert open_stacks(tmp_path) == 0
