"""Server optimizers: the papers' rules, against slow oracles, and what they keep from one version to the next."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_core.errors import InvalidError, NotFiniteError
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_core.tensors import dtype_name
from fed_server.config import ServerAdamConfig, ServerOptimizerConfig, parse_run_config
from fed_server.optim import state
from fed_server.optim.adaptive import Adagrad, Adam, Yogi
from fed_server.optim.base import ServerOptimizer
from fed_server.optim.momentum import Momentum
from fed_server.optim.registry import OPTIMIZERS, make_optimizer
from fed_server.optim.sgd import Sgd
from fed_server.optim.state import Steps, open_steps, state_specs
from fed_server.rounds.version import next_tile

CONFIG = """
name = "test"
workload = "echo"
cohort.size = 1
schedule.max_rounds = 10
[server_optimizer]
kind = "{kind}"
"""


def default(kind: str) -> ServerOptimizer:
    """The optimizer of a run that says no more than its kind."""
    return make_optimizer(parse_run_config(CONFIG.format(kind=kind)).server_optimizer)


# Other constants than the defaults, and every branch.
OTHERS: dict[str, ServerOptimizer] = {
    "sgd": Sgd(0.5),
    "momentum": Momentum(0.25, momentum=0.5),
    "adagrad": Adagrad(learning_rate=0.5, beta1=0.75, tau=0.125),
    "adam": Adam(learning_rate=0.5, beta1=0.0, beta2=0.5, tau=0.25),
    "yogi": Yogi(learning_rate=0.25, beta1=0.5, beta2=0.75, tau=0.5),
}
ALL = {**{kind: default(kind) for kind in OPTIMIZERS}, **{f"{kind}-other": made for kind, made in OTHERS.items()}}
# Easy to follow by hand.
ADAM = Adam(learning_rate=1.0, beta1=0.5, beta2=0.75, tau=1.0)
YOGI = Yogi(learning_rate=1.0, beta1=0.5, beta2=0.75, tau=1.0)
FAR = Yogi(learning_rate=1.0, beta1=0.0, beta2=0.75, tau=3.0)
EVERY = pytest.mark.parametrize("optimizer", ALL.values(), ids=ALL.keys())

# The papers, coordinate by coordinate in Python's floats: state by letter, weight, delta -> weight; the state is changed.
Oracle = Callable[[dict[str, float], float, float, Any], float]


def _sgd(state: dict[str, float], w: float, delta: float, o: Any) -> float:
    return w + o.learning_rate * delta


def _momentum(state: dict[str, float], w: float, delta: float, o: Any) -> float:
    state["m"] = o.momentum * state["m"] + delta
    return w + o.learning_rate * state["m"]


def _adaptive(next_v: Callable[[float, float, Any], float]) -> Oracle:
    def step(state: dict[str, float], w: float, delta: float, o: Any) -> float:
        m = o.beta1 * state.get("m", 0.0) + (1 - o.beta1) * delta
        if o.beta1:
            state["m"] = m
        state["v"] = next_v(state["v"], delta, o)
        return w + o.learning_rate * m / (math.sqrt(state["v"]) + o.tau)

    return step


def _sign(x: float) -> float:
    return (x > 0) - (x < 0)


ORACLES: Mapping[type, Oracle] = {
    Sgd: _sgd,
    Momentum: _momentum,
    Adagrad: _adaptive(lambda v, delta, o: v + delta * delta),
    Adam: _adaptive(lambda v, delta, o: o.beta2 * v + (1 - o.beta2) * (delta * delta)),
    Yogi: _adaptive(lambda v, delta, o: v - (1 - o.beta2) * (delta * delta) * _sign(v - delta * delta)),
}


def fresh(optimizer: ServerOptimizer, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.full((count,), value, dtype=torch.float64) for value in optimizer.initial.values())


def doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The rules


def test_every_kind_has_an_optimizer_whose_fields_are_its_options() -> None:
    kinds = {table.model_fields["kind"].default for table in ServerOptimizerConfig.__args__[0].__args__}  # type: ignore[attr-defined]
    assert set(OPTIMIZERS) == kinds
    for kind in kinds:
        config = parse_run_config(CONFIG.format(kind=kind)).server_optimizer
        made = make_optimizer(config, 0.5)
        assert vars(made) == config.model_dump(exclude={"kind", "schedule"}) | {
            "learning_rate": config.learning_rate / 2
        }
        assert vars(OPTIMIZERS[kind]()) == config.model_dump(exclude={"kind", "schedule"}), "one set of defaults"


@EVERY
@settings(max_examples=30)
@given(
    weights=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5),
    deltas=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=5), min_size=1, max_size=4),
)
def test_steps_are_those_of_the_paper(
    optimizer: ServerOptimizer, weights: list[float], deltas: list[list[float]]
) -> None:
    oracle = ORACLES[type(optimizer)]
    states = [dict(optimizer.initial) for _ in weights]
    expected = list(weights)
    state, moved = fresh(optimizer, len(weights)), doubles(weights)
    for delta in deltas:
        expected = [oracle(s, w, d, optimizer) for s, w, d in zip(states, expected, delta[: len(weights)], strict=True)]
        state, moved = optimizer.step(state, moved, doubles(delta[: len(weights)]))
        assert moved.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        for name, kept in zip(optimizer.initial, state, strict=True):
            assert kept.tolist() == pytest.approx([s[name] for s in states], rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        # Deltas of 1 and then -2 from w = 10.
        (Sgd(0.5), [10 + 0.5, 10.5 - 1.0]),
        (Momentum(1.0, 0.5), [10 + 1.0, 11 + (0.5 - 2.0)]),
        (Adagrad(learning_rate=1.0, tau=0.5), [10 + 1 / (math.sqrt(0.25 + 1) + 0.5), None]),
        (Adagrad(learning_rate=1.0, tau=math.sqrt(3.0)), [10 + 1 / (2 + math.sqrt(3.0)), None]),
        (ADAM, [10 + 0.5 / (1 + 1), 10.25 + (0.25 - 1) / (math.sqrt(0.75 + 0.25 * 4) + 1)]),
        (YOGI, [10 + 0.5 / (1 + 1), 10.25 + (0.25 - 1) / (math.sqrt(1 + 0.25 * 4) + 1)]),
        # v = 9 over delta^2 = 1 and 4: yogi takes a quarter of those off, whatever v is.
        (FAR, [10 + 1 / (math.sqrt(8.75) + 3), None]),
    ],
    ids=str,
)
def test_the_first_steps_by_hand(optimizer: ServerOptimizer, expected: list[float | None]) -> None:
    state, weights = fresh(optimizer, 1), doubles([10.0])
    for delta, value in zip([1.0, -2.0], expected, strict=True):
        state, weights = optimizer.step(state, weights, doubles([delta]))
        if value is not None:
            assert weights.item() == pytest.approx(value, rel=1e-14)


def test_the_adaptive_ones_begin_at_tau_squared_and_correct_no_bias() -> None:
    assert Adam().initial == {"m": 0.0, "v": 1e-6}
    assert Adagrad().initial == {"v": 1e-6}, "without momentum none is kept"
    _, moved = Adam().step(fresh(Adam(), 1), doubles([0.0]), doubles([1.0]))
    corrected = 0.01 * 1.0 / (1.0 + 1e-3)
    assert moved.item() == pytest.approx(corrected, rel=0.01), (
        "sqrt(1 - beta2) = 1 - beta1: they cancel at the defaults"
    )
    other = Adam(beta2=0.999)
    _, moved = other.step(fresh(other, 1), doubles([0.0]), doubles([1.0]))
    assert moved.item() == pytest.approx(0.01 * 0.1 / (math.sqrt(0.001) + 1e-3), rel=1e-3)


@EVERY
def test_no_update_from_rest_moves_nothing(optimizer: ServerOptimizer) -> None:
    state, weights = fresh(optimizer, 3), doubles([1.0, -2.0, 1e-300])
    for _ in range(3):
        state, moved = optimizer.step(state, weights.clone(), torch.zeros(3, dtype=torch.float64))
        assert moved.equal(weights)


@EVERY
def test_momentum_outlives_its_update_and_the_others_stand(optimizer: ServerOptimizer) -> None:
    state, weights = optimizer.step(fresh(optimizer, 1), doubles([0.0]), doubles([1.0]))
    _, after = optimizer.step(state, weights.clone(), doubles([0.0]))
    assert (after > weights).item() == ("m" in optimizer.initial)


@EVERY
def test_descent_on_a_quadratic_reaches_its_minimum(optimizer: ServerOptimizer) -> None:
    """Clients step towards the target by a tenth; the adaptive ones need a smaller rate in the end than at first."""
    target, scale = doubles([3.0, -1.0, 0.5]), doubles([1.0, 0.1, 0.3])
    weights = torch.zeros(3, dtype=torch.float64)
    state = fresh(optimizer, 3)
    for _ in range(4000):
        state, weights = optimizer.step(state, weights, 0.1 * scale * (target - weights))
    assert (weights - target).abs().max() < 0.02


# No bit depends on how a tensor is cut


def random_tiles(seed: int, count: int, optimizer: ServerOptimizer) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2 + len(optimizer.initial))]
    weights, delta, *state = draws
    if "v" in optimizer.initial:
        state[-1] = state[-1].square()
    return tuple(state), weights, delta


def copied(tensors: Sequence[Tensor], first: int, end: int) -> tuple[Tensor, ...]:
    return tuple(tensor[first:end].clone() for tensor in tensors)


@EVERY
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 1000), max_size=6), seed=st.integers(0, 99), reverse=st.booleans())
def test_tiles_and_their_order_change_no_bit(
    optimizer: ServerOptimizer, cuts: list[int], seed: int, reverse: bool
) -> None:
    state, weights, delta = random_tiles(seed, 1000, optimizer)
    whole_state, whole = optimizer.step(copied(state, 0, 1000), weights.clone(), delta.clone())
    ends = sorted({0, *cuts, 1000})
    spans = list(pairwise(ends))
    for first, end in reversed(spans) if reverse else spans:
        tile_state, tile = optimizer.step(
            copied(state, first, end), weights[first:end].clone(), delta[first:end].clone()
        )
        assert tile.equal(whole[first:end])
        assert all(a.equal(b[first:end]) for a, b in zip(tile_state, whole_state, strict=True))


def test_other_instructions_of_the_same_machine_give_the_same_bits() -> None:
    """torch's plain code on one thread, and its vector code on several."""
    code = (
        "import hashlib; from tests.server.test_optim import ALL, random_tiles\n"
        "for name, o in ALL.items():\n"
        "    state, moved = o.step(*random_tiles(1, 100_003, o))\n"
        "    print(name, *(hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for t in (*state, moved)))"
    )
    outputs = set()
    for changes in ({"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "3"}):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path]), **changes}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == len(ALL)


# What is kept

MODEL = {
    "w": torch.linspace(-1, 1, 700).reshape(7, 100),
    "half": torch.linspace(-1, 1, 33).half(),
    "wide": torch.linspace(-1, 1, 20).double(),
    "wave": torch.view_as_complex(torch.linspace(-1, 1, 40).reshape(20, 2)),
    "deep": torch.view_as_complex(torch.linspace(-1, 1, 40).double().reshape(20, 2)),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(0.5),
    "alone": torch.ones(9),
    "count": torch.tensor(3),
    "b.mean": torch.linspace(0, 1, 7),
    "b.count": torch.tensor(3),
}
SPECS = tuple(
    TensorSpec(name, tuple(t.shape), dtype_name(t.dtype), "buffer" if name.startswith("b.") else "parameter")
    for name, t in MODEL.items()
)


class Aggregate:
    """The same change everywhere, times a number; nothing was merged for "alone"."""

    num_updates = total_weight = 1

    def __init__(self, value: float) -> None:
        self.value = value

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        if spec.name == "alone":
            return None
        if not spec.dtype.startswith(("float", "complex")):
            return torch.full((count,), 9)
        per_element = 2 if spec.dtype.startswith("complex") else 1
        span = torch.arange(first * per_element, (first + count) * per_element, dtype=torch.float64)
        return torch.sin(span + self.value) * self.value


class Base:
    """A model as a file would give it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read_tile(self, name: str, first: int, count: int) -> Tensor:
        return self.tensors[name].reshape(-1)[first : first + count].clone()


def advance(
    optimizer: ServerOptimizer,
    tensors: Mapping[str, Tensor],
    value: float,
    before: Path | None,
    after: Path,
    tile: int = 64,
) -> dict[str, Tensor]:
    """The next weights, made as a run makes them, `tile` elements at a time."""
    moved = {}
    with open_steps(optimizer, SPECS, before, after, {"version": "1"}) as steps:
        tile_of = next_tile(Base(tensors), Aggregate(value), steps)  # type: ignore[arg-type]
        for spec in SPECS:
            tiles = [
                tile_of(spec, first, min(tile, spec.num_elements - first))
                for first in range(0, spec.num_elements, tile)
            ]
            flat = torch.cat(tiles) if tiles else tensors[spec.name].reshape(-1)
            moved[spec.name] = flat.reshape(spec.shape)
    return moved


def kept(path: Path) -> dict[str, Tensor]:
    with SafetensorsReader(path) as reader:
        return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


@EVERY
def test_the_file_holds_the_state_of_every_floating_parameter(optimizer: ServerOptimizer, tmp_path: Path) -> None:
    path = tmp_path / "1"
    advance(optimizer, MODEL, 0.5, None, path)
    if not optimizer.initial:
        assert not path.exists()
        assert state_specs(optimizer, SPECS) == []
        return
    tensors = kept(path)
    rows = len(optimizer.initial)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "w": ((rows, 700), torch.float32),
        "half": ((rows, 33), torch.float32),
        "wide": ((rows, 20), torch.float64),
        "wave": ((rows, 40), torch.float32),
        "deep": ((rows, 40), torch.float64),
        "empty": ((rows, 0), torch.float32),
        "scalar": ((rows, 1), torch.float32),
        "alone": ((rows, 9), torch.float32),
    }
    assert sum(spec.num_bytes for spec in state_specs(optimizer, SPECS)) == sum(t.nbytes for t in tensors.values())
    for row, (name, value) in enumerate(optimizer.initial.items()):
        assert (tensors["alone"][row] == torch.tensor(value, dtype=torch.float32)).all(), f"{name} of what took no part"
    with SafetensorsReader(path) as reader:
        assert reader.metadata == {"version": "1", "rows": " ".join(optimizer.initial)}


@EVERY
def test_parameters_are_stepped_and_nothing_else(optimizer: ServerOptimizer, tmp_path: Path) -> None:
    moved = advance(optimizer, MODEL, 0.5, None, tmp_path / "1")
    change = Aggregate(0.5)
    for spec in SPECS:
        before, after, delta = MODEL[spec.name], moved[spec.name], change.report(spec, 0, spec.num_elements)
        if delta is None:
            assert after.equal(before)
        elif spec.name in ("count", "b.count"):
            assert after.item() == 9
        elif spec.role == "buffer":
            assert after.equal((before.double() + delta).to(before.dtype))
        else:
            reals = torch.view_as_real(before).reshape(-1) if before.is_complex() else before.reshape(-1)
            _, stepped = optimizer.step(fresh(optimizer, len(delta)), reals.double(), delta)
            flat = torch.view_as_real(after).reshape(-1) if after.is_complex() else after.reshape(-1)
            assert flat.equal(stepped.to(flat.dtype)), spec.name


@EVERY
def test_three_rounds_are_the_same_bits_in_any_tiles(
    optimizer: ServerOptimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are asked for, and as they are worked on."""
    results = []
    for tile, step in ((7, 2**16), (64, 5), (10_000, 2**16), (10_000, 5)):
        monkeypatch.setattr(state, "_TILE", step)
        tensors, before = dict(MODEL), None
        for number in range(3):
            after = tmp_path / f"{tile}-{step}-{number}"
            tensors = advance(optimizer, tensors, 0.5 - number, before, after, tile)
            before = after if optimizer.initial else None
        results.append((tensors, kept(before) if before else {}))
    for tensors, left in results[1:]:
        assert all(tensors[name].equal(results[0][0][name]) for name in tensors)
        assert all(left[name].equal(results[0][1][name]) for name in left)


def test_the_state_of_a_round_is_that_of_the_oracle_rounded_once(tmp_path: Path) -> None:
    optimizer = Adam(tau=0.5)
    first = advance(optimizer, MODEL, 0.5, None, tmp_path / "1")
    advance(optimizer, first, -1.5, tmp_path / "1", tmp_path / "2")
    m = np.zeros(700, dtype=np.float32)
    v = np.full(700, 0.25, dtype=np.float32)
    for value in (0.5, -1.5):
        delta = np.sin(np.arange(700.0) + value) * value
        m = (np.float64(0.9) * m + (1.0 - 0.9) * delta).astype(np.float32)
        v = (np.float64(0.99) * v + (1.0 - 0.99) * (delta * delta)).astype(np.float32)
    assert kept(tmp_path / "2")["w"][0].numpy() == pytest.approx(m, rel=1e-6, abs=1e-9)
    assert kept(tmp_path / "2")["w"][1].numpy() == pytest.approx(v, rel=1e-6)


def test_a_state_out_of_range_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        NotFiniteError, match="the server optimizer's v of tensor 'w' holds NaN or leaves the range of float32"
    ):
        advance(Adam(), MODEL, 1e25, None, tmp_path / "1")


def test_a_tile_that_is_given_twice_or_not_at_all_is_an_error(tmp_path: Path) -> None:
    spec, zeros = SPECS[0], torch.zeros(700, dtype=torch.float64)
    with open_steps(Momentum(), [spec], None, tmp_path / "1", {}) as steps:
        steps.step(spec, 0, zeros.clone(), zeros.clone())
        with pytest.raises(InvalidError, match="written before"):
            steps.step(spec, 64, zeros[:64].clone(), zeros[:64].clone())
    with (
        pytest.raises(InvalidError, match="element 600 was not written"),
        open_steps(Momentum(), [spec], None, tmp_path / "2", {}) as steps,
    ):
        steps.stay(spec, 0, 600)


def test_an_optimizer_without_a_state_needs_no_file() -> None:
    weights, delta = doubles([1.0, 2.0]), doubles([0.5, -1.0])
    assert Steps(Sgd(2.0), SPECS).step(SPECS[0], 0, weights, delta).tolist() == [2.0, 0.0]


def test_the_defaults_of_the_paper() -> None:
    config = ServerAdamConfig()
    assert (config.beta1, config.beta2, config.tau) == (0.9, 0.99, 1e-3)
