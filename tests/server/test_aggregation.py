"""The exact mean against slow oracles in rationals, and its laws."""

from __future__ import annotations

import random
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.errors import ConfigError
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec
from fed_core.tensors import dtype_name
from fed_server.aggregation.exact import TILE, ExactSum, SumMemory
from fed_server.aggregation.grid import GridPolicy, bounds_of, grid_policy, make_grid
from fed_server.aggregation.mean import WeightedMean
from fed_server.aggregation.merge_rules import merge_rules
from fedstream.v1 import common_pb2

finite = st.floats(-0.5, 0.5, width=32)


def oracle(updates: list[tuple[list[float], int]], exponent: int) -> list[Fraction]:
    """The sum in whole steps, in rationals: each product rounded once, half to even, as IEEE does."""
    step = Fraction(2) ** exponent
    sums = [Fraction(0)] * len(updates[0][0])
    for values, weight in updates:
        for i, value in enumerate(values):
            sums[i] += round(Fraction(value) * weight / step) * step
    return sums


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.tuples(st.lists(finite, min_size=n, max_size=n), st.integers(1, 2**20)), min_size=1, max_size=6
        )
    ),
    st.randoms(),
)
def test_the_sum_is_the_rational_one_on_the_grid_in_any_order(
    updates: list[tuple[list[float], int]], shuffler: random.Random
) -> None:
    policy = GridPolicy(cohort_limit=8, max_weight=2**20)
    spec = TensorSpec("w", (len(updates[0][0]),), "float32", "parameter")
    exponent = make_grid([spec], {"w": 0.0}, policy)["w"]
    expected = oracle(updates, exponent)
    shuffler.shuffle(updates)
    total, split = ExactSum(len(expected), exponent), ExactSum(len(expected), exponent)
    for i, (values, weight) in enumerate(updates):
        total.add(0, torch.tensor(values), weight)
        part = ExactSum(len(expected), exponent)
        part.add(0, torch.tensor(values), weight)
        split.merge(part)
        if i == 0:  # what is taken out again leaves no trace
            total.add(0, torch.tensor(values), -weight)
            total.add(0, torch.tensor(values), weight)
    assert [Fraction(x) for x in total.mean(0, len(expected), 1).tolist()] == expected
    assert torch.equal(total.mean(0, len(expected), 7), split.mean(0, len(expected), 7))


def test_sums_at_the_bound_with_full_weights_stay_exact() -> None:
    policy = GridPolicy(cohort_limit=100, max_weight=2**20)
    spec = TensorSpec("w", (1,), "float32", "parameter")
    grid = make_grid([spec], {"w": 3.0}, policy)
    bound = bounds_of(grid, policy)["w"]
    assert bound == 32.0
    total = ExactSum(1, grid["w"])
    for _ in range(100):
        total.add(0, torch.tensor([bound]), 2**20)
    assert total.mean(0, 1, 100 * 2**20).item() == bound


def test_tiles_do_not_matter() -> None:
    values = torch.randn(TILE * 2 + 17, generator=torch.Generator().manual_seed(1)) / 16
    whole, parts = ExactSum(len(values), -40), ExactSum(len(values), -40)
    whole.add(0, values, 3)
    for first in range(0, len(values), 1000):
        parts.add(first, values[first : first + 1000], 3)
    assert torch.equal(whole.mean(0, len(values), 3), parts.mean(0, len(values), 3))


def test_a_sum_in_memory_that_another_used_begins_at_zero_and_takes_it_from_nobody() -> None:
    memory = SumMemory()
    first = ExactSum(1000, -40, memory=memory)
    first.add(0, torch.ones(1000), 1)
    address = first.steps.data_ptr()
    del first
    second, third = ExactSum(1000, -40, memory=memory), ExactSum(1000, -40, memory=memory)
    assert second.steps.data_ptr() == address != third.steps.data_ptr()
    assert not second.steps.any()
    assert not third.steps.any()


def test_a_policy_that_is_too_coarse_is_refused_with_the_largest_weight_that_is_not() -> None:
    with pytest.raises(ConfigError, match="expected at most 134217"):
        grid_policy(1000, 2**20, None)
    assert grid_policy(1000, None, None).max_weight == 134217
    assert grid_policy(10, None, None).max_weight == 2**20
    assert grid_policy(1000, None, None).resolution <= 2.0**-26


def payload(path: Path, tensors: dict[str, Tensor], specs: list[TensorSpec]) -> Path:
    with path.open("wb+") as file:
        write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id="",
            round=0,
            model_version=0,
            base_digest=b"",
            update=None,
            tensors=[(spec, tensors[spec.name]) for spec in specs],
        )
    return path


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [
        TensorSpec(name, tuple(t.shape), dtype_name(t.dtype), "buffer" if name.startswith("b") else "parameter")
        for name, t in tensors.items()
    ]


def some_update(seed: int) -> dict[str, Tensor]:
    random_numbers = torch.Generator().manual_seed(seed)
    weight = torch.randn(300, 7, generator=random_numbers).clamp(-3, 3) / 8
    return {
        "w": weight,
        "w16": weight[:5].half(),
        "wc": torch.view_as_complex(weight[:4, :2].contiguous()),
        "scalar": weight[0, 0].clone(),
        "empty": torch.empty(0, 3),
        "b_mean": weight[0] * 100,
        "b_count": torch.tensor(seed * 10),
        "b_flag": torch.tensor([True, False]),
    }


def mean_of(tmp_path: Path, weights: dict[int, int], order: list[int]) -> dict[str, Tensor | None]:
    specs = specs_of(some_update(1))
    grid = make_grid(specs, {}, GridPolicy(cohort_limit=8, max_weight=2**20))
    mean = WeightedMean(specs, grid, merge_rules(specs, []))
    assert not mean.can_report()
    for seed in order:
        with PayloadReader(payload(tmp_path / str(seed), some_update(seed), specs)) as reader:
            mean.add(reader, weights[seed])
    assert mean.can_report()
    return {spec.name: mean.report(spec, 0, spec.num_elements) for spec in specs}


def test_the_mean_of_every_kind_of_tensor(tmp_path: Path) -> None:
    weights = {1: 10, 2: 3, 3: 700}
    result = mean_of(tmp_path, weights, [1, 2, 3])
    updates = {seed: some_update(seed) for seed in weights}
    for name in ("w", "w16", "wc", "scalar", "b_mean"):
        stacked = torch.stack(
            [torch.view_as_real(u[name]) if u[name].is_complex() else u[name] for u in updates.values()]
        ).double()
        expected = torch.einsum("n,n...->...", torch.tensor(list(weights.values())).double(), stacked) / 713
        got = result[name]
        assert got is not None
        torch.testing.assert_close(got, expected.reshape(-1), rtol=0, atol=1e-8)
    assert result["b_count"] is not None
    assert result["b_count"].tolist() == [30]
    assert result["b_flag"] is None


@settings(max_examples=6, deadline=None)
@given(st.permutations([1, 2, 3, 4]))
def test_arrival_order_changes_no_bit(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    weights = {1: 10, 2: 3, 3: 700, 4: 1}
    reference = mean_of(tmp_path_factory.mktemp("a"), weights, [1, 2, 3, 4])
    shuffled = mean_of(tmp_path_factory.mktemp("b"), weights, order)
    for name, value in reference.items():
        other = shuffled[name]
        assert (value is None) == (other is None)
        if value is not None and other is not None:
            assert torch.equal(value, other), name


def test_partial_means_merge_to_the_same_bits(tmp_path: Path) -> None:
    specs = specs_of(some_update(1))
    grid = make_grid(specs, {}, GridPolicy(cohort_limit=8, max_weight=2**20))
    rules = merge_rules(specs, [])
    whole, left, right = (WeightedMean(specs, grid, rules) for _ in range(3))
    for seed in (1, 2, 3, 4):
        path = payload(tmp_path / str(seed), some_update(seed), specs)
        for mean in (whole, left if seed % 2 else right):
            with PayloadReader(path) as reader:
                mean.add(reader, seed)
    left.merge(right)
    for spec in specs:
        a, b = whole.report(spec, 0, spec.num_elements), left.report(spec, 0, spec.num_elements)
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_merge_rules_are_chosen_by_pattern_and_checked_against_the_dtype() -> None:
    specs = specs_of(some_update(1))
    rules = merge_rules(specs, [("b_mean", "keep"), ("b_*", "keep")])
    assert rules["b_mean"] == rules["b_count"] == "keep"
    assert rules["w"] == "mean"
    with pytest.raises(ConfigError, match="matches no tensor"):
        merge_rules(specs, [("head.*", "keep")])
    with pytest.raises(ConfigError, match="'b_count' is int64"):
        merge_rules(specs, [("b_count", "mean")])


def test_a_payload_in_memory_reads_like_a_file() -> None:
    specs = specs_of({"w": torch.ones(3)})
    buffer = BytesIO()
    written = write_payload(
        buffer, kind=common_pb2.PAYLOAD_KIND_MODEL, run_id="", round=0, model_version=0, base_digest=b"", update=None,
        tensors=[(specs[0], torch.ones(3))],
    )  # fmt: skip
    assert written.total_bytes == len(buffer.getvalue())
