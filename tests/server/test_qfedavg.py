"""q-FedAvg: the paper's step, its laws, and what it does to a run."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.light_client import LightClient, MemoryFile, constant, encode_update
from fed_core.errors import ConfigError, UpdateRefusedError
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec
from fed_server.aggregation.base import AggregatorSetting
from fed_server.aggregation.grid import GridPolicy, make_grid
from fed_server.aggregation.loss_weight import RECEIVED_LOSS, LossWeighting
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.registry import new_aggregator
from fed_server.config import QFedAvgConfig, parse_run_config
from fed_server.rounds.importance import SiteReport
from fed_server.rounds.policy import loss_scale
from fedstream.v1 import common_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import back_in, member, open_house, until, weights
from tests.server.training_sites import MODEL, SITES, TrainingSite, examples, play, version

SPECS = [
    TensorSpec("v", (3,), "float32"),
    TensorSpec("w", (4, 5), "float32"),
    TensorSpec("b", (2,), "float32", "buffer"),
]
MAX_WEIGHT = 2**20

Sent = tuple[float, dict[str, Tensor]]
"""A site's loss and its update."""


def combined(sent: list[Sent], fairness: float, lipschitz: float, scale: float) -> dict[str, Tensor]:
    """What the aggregator makes of it."""
    grid = make_grid(SPECS, {}, GridPolicy(cohort_limit=8, max_weight=MAX_WEIGHT))
    weighting = LossWeighting(RECEIVED_LOSS, scale, fairness, MAX_WEIGHT)
    setting = AggregatorSetting(SPECS, grid, merge_rules(SPECS, []), Path("/nowhere"), loss_weighting=weighting)
    aggregator = new_aggregator(setting, QFedAvgConfig(fairness=fairness, lipschitz=lipschitz))
    for loss, update in sent:
        info = UpdateInfo(assignment_id="a", num_examples=1, metrics={RECEIVED_LOSS: loss})
        with MemoryFile() as memory:
            write_payload(
                memory.file, kind=common_pb2.PAYLOAD_KIND_UPDATE, run_id="r", round=1, model_version=0, base_digest=bytes(32),
                update=info, tensors=[(spec, update[spec.name]) for spec in SPECS],
            )  # fmt: skip
            with memory.reader() as reader:
                aggregator.add(reader, weighting.weight_of(info))
    assert aggregator.can_report()
    aggregator.prepare()
    made = {spec.name: aggregator.report(spec, 0, spec.num_elements) for spec in SPECS}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def algorithm_2(sent: list[Sent], q: float, lipschitz: float) -> dict[str, Tensor]:
    """The step that the paper takes, in its own words: w is 0, w_k is the update."""
    deltas, norms = [], []
    for loss, update in sent:
        gradient = {name: lipschitz * -update[name].double() for name in ("v", "w")}  # L (w - w_k)
        squared = sum(float(part.square().sum()) for part in gradient.values())
        deltas.append({name: loss**q * part for name, part in gradient.items()})
        norms.append(q * loss ** (q - 1) * squared + lipschitz * loss**q)
    return {name: -sum(delta[name] for delta in deltas) / sum(norms) for name in ("v", "w")}  # type: ignore[misc]


def some_sent(seed: int, losses: list[float]) -> list[Sent]:
    generator = torch.Generator().manual_seed(seed)
    return [(loss, {s.name: torch.randn(s.shape, generator=generator).clamp(-3, 3) for s in SPECS}) for loss in losses]


@given(
    st.integers(0, 2**31),
    st.lists(st.floats(0.05, 4.0), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0]),
    st.floats(0.01, 100.0),
)
@settings(max_examples=60, deadline=None)
def test_the_step_is_that_of_algorithm_2(seed: int, losses: list[float], q: float, lipschitz: float) -> None:
    sent = some_sent(seed, losses)
    made = combined(sent, q, lipschitz, 2 * max(losses))
    for name, expected in algorithm_2(sent, q, lipschitz).items():
        # Weights are whole numbers up to 2^20, so the last digits of small ones are missing.
        tolerance = 1e-4 if q <= 2 else 0.01
        torch.testing.assert_close(made[name], expected.reshape(-1), rtol=tolerance, atol=tolerance)


@given(
    st.integers(0, 2**31),
    st.lists(st.floats(0, 9.0), min_size=2, max_size=6),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.randoms(),
)
@settings(max_examples=40, deadline=None)
def test_no_order_of_arrival_changes_a_bit(seed: int, losses: list[float], q: float, shuffler: random.Random) -> None:
    sent = some_sent(seed, losses)
    expected = combined(sent, q, 10.0, 8.0)
    shuffler.shuffle(sent)
    found = combined(sent, q, 10.0, 8.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_fairness_it_is_the_plain_mean() -> None:
    sent = some_sent(3, [0.5, 4.0, 1.0])
    made = combined(sent, 0.0, 10.0, 8.0)
    for name in ("v", "w", "b"):
        mean = torch.stack([update[name].double() for _, update in sent]).mean(0)
        torch.testing.assert_close(made[name], mean.reshape(-1), rtol=0, atol=1e-7)


def test_buffers_are_a_weighted_mean_and_no_step() -> None:
    sent = some_sent(3, [1.0, 3.0])
    expected = (sent[0][1]["b"].double() + 3 * sent[1][1]["b"].double()) / 4
    torch.testing.assert_close(combined(sent, 1.0, 10.0, 6.0)["b"], expected, rtol=0, atol=1e-5)


def test_no_update_and_no_loss_give_no_step_and_no_fault() -> None:
    nothing = {spec.name: torch.zeros(spec.shape) for spec in SPECS}
    for q in (0.0, 0.1, 1.0, 20.0):
        for loss in (0.0, 1e-300, 1e300):
            made = combined([(loss, nothing)], q, 10.0, 16.0)
            assert not any(part.any() for part in made.values())


def test_a_round_reckons_with_twice_the_largest_loss_of_the_last_one() -> None:
    run = parse_run_config(config(extra='[aggregation]\nkind = "qfedavg"\n'))
    reports = {
        "a": SiteReport(1, 90.0, 1),
        "b": SiteReport(3, 2.0, 1),
        "c": SiteReport(3, 5.0, 1),
        "d": SiteReport(3, None, 1),
    }
    assert loss_scale(run, {}) == 16.0
    assert loss_scale(run, reports) == 10.0
    assert loss_scale(run, {"a": SiteReport(1, float("inf"), 1)}) == 16.0
    assert loss_scale(run, {"a": SiteReport(1, 0.0, 1)}) == 1e-6
    assert loss_scale(run, {"a": SiteReport(1, 1.7e308, 1)}) == 1e30
    assert loss_scale(parse_run_config(config()), reports) == 0.0


def test_what_it_does_not_go_with_is_said_when_the_run_is_submitted() -> None:
    for extra, problem in (
        ('[training.objective]\nkind = "fednova"\n', r"training\.objective: fednova divides updates"),
        (
            '[training.optimizer]\nkind = "adam"\n',
            r"aggregation\.lipschitz: is missing: .* the optimizer is adam; write",
        ),
    ):
        with pytest.raises(ConfigError, match=problem):
            parse_run_config(config(extra=f'[aggregation]\nkind = "qfedavg"\n{extra}'))
    parse_run_config(
        config(extra='[aggregation]\nkind = "qfedavg"\nlipschitz = 9.0\n[training.optimizer]\nkind = "adam"\n')
    )


# Over the service

FAIR = '[aggregation]\nkind = "qfedavg"\nfairness = 2.0\nlipschitz = 0.5\nbound = 64.0\n[keep]\nversions = 9\n'
VALUE = {"a": 0.5, "b": -1.0}


def send(client: LightClient, name: str, loss: float | None) -> common_pb2.TrainingPlan:
    assignment = client.next_assignment()
    manifest, _ = client.model(assignment)
    metrics = {"loss": 1.0} | ({RECEIVED_LOSS: loss} if loss is not None else {})
    update = encode_update(assignment, manifest.specs, constant(VALUE[name]), metrics=metrics)
    client.upload(assignment.assignment_id, update)
    return assignment.plan


async def test_a_round_takes_the_papers_step_and_asks_for_the_loss_of_the_model_received(house: House) -> None:
    await off_loop(house.operator.submit, config(size=2, extra=FAIR))
    a, b = [await off_loop(house.client, name) for name in ("a", "b")]
    plan, _ = await asyncio.gather(off_loop(send, a, "a", 1.0), off_loop(send, b, "b", 3.0))
    await off_loop(house.operator.wait)
    assert list(plan.measures) == [common_pb2.MEASURE_RECEIVED_LOSS]
    assert [(await off_loop(member, house, name)).weight for name in ("a", "b")] == [2**20 // 256, 9 * 2**20 // 256]
    # "w" has ten elements: |u|^2 is 2.5 and 10.
    total = 1.0 + 9.0 + 2 * 0.5 * (1.0 * 2.5 + 3.0 * 10.0)
    assert await off_loop(weights, house, 1) == pytest.approx((1.0 * 0.5 - 9.0 * 1.0) / total, abs=1e-6)


async def test_an_update_that_does_not_say_its_loss_is_refused(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, extra=FAIR))
    client = await off_loop(house.client, "a")
    for loss in (None, float("nan"), -1.0):
        with pytest.raises(UpdateRefusedError, match="received_loss"):
            await off_loop(send, client, "a", loss)
    await off_loop(send, client, "a", 0.5)
    await off_loop(house.operator.wait)


async def test_a_restart_in_the_middle_of_a_round_changes_no_bit(tmp_path: Path) -> None:
    losses = {1: {"a": 2.0, "b": 0.75}, 2: {"a": 0.3, "b": 0.1}, 3: {"a": 0.2, "b": 0.15}}

    async def played(data_dir: Path, restarts: bool) -> list[str]:
        secrets: dict[str, str] = {}
        number, sent = 1, set[str]()
        while number <= 3:
            async with open_house(data_dir) as house:
                if not secrets:
                    await off_loop(house.operator.submit, config(size=2, max_rounds=3, extra=FAIR))
                clients = {}
                for name in ("a", "b"):
                    clients[name] = back_in(house, secrets[name]) if name in secrets else LightClient(house.app.address)
                    if name not in secrets:
                        secrets[name] = await off_loop(clients[name].enroll, house.app.tokens.join, name)
                    await off_loop(clients[name].poll, wait_seconds=0)
                while number <= 3:
                    await until(lambda house=house, number=number: house.operator.run().round == number)
                    name = next(name for name in ("a", "b") if name not in sent)
                    await off_loop(send, clients[name], name, losses[number][name])
                    sent.add(name)
                    if len(sent) == 2:
                        number, sent = number + 1, set()
                    elif restarts:
                        break
                for client in clients.values():
                    client.close()
                if number > 3:
                    await off_loop(house.operator.wait)
                    report = await off_loop(house.operator.report)
        return [model.digest.hex() for model in report.models]

    expected = await played(tmp_path / "well", restarts=False)
    assert len(set(expected)) == 4
    assert await played(tmp_path / "restarted", restarts=True) == expected


def site_loss(name: str, w: Tensor) -> float:
    x, y = examples(name)
    return float((x @ w - y).square().mean()) / 2


async def test_sites_that_train_report_the_loss_that_they_received_and_end_more_alike_than_by_the_mean(
    tmp_path: Path,
) -> None:
    rounds = 10
    training = (
        '[training]\nbatch_size = 4\nlocal_work = { kind = "steps", steps = 4 }\n'
        'optimizer = { kind = "sgd", learning_rate = 0.05 }\n'
    )
    ends: dict[str, list[float]] = {}
    async with open_house(tmp_path / "data") as house:
        with ExitStack() as opened:
            sites = [await off_loop(TrainingSite, house, name, tmp_path / name) for name in SITES]
            for site in sites:
                opened.callback(site.client.close)
            for name, aggregation in (
                ("mean", 'kind = "mean"\nweighting = "uniform"'),
                ("fair", 'kind = "qfedavg"\nfairness = 3.0\nlipschitz = 1.0'),
            ):
                extra = f"{training}[aggregation]\n{aggregation}\nbound = 64.0\n[keep]\nversions = 99\n"
                await off_loop(house.operator.submit, config(name, size=3, max_rounds=rounds, extra=extra), MODEL)
                await play(house, sites, range(1, rounds + 1), name)
                w = (await off_loop(version, house, rounds, name))["w"]
                ends[name] = [site_loss(site, w) for site in SITES]
            report = await off_loop(house.operator.report, "fair")
            for round in report.rounds[:3]:
                base = (await off_loop(version, house, round.base_version, "fair"))["w"]
                for client in round.clients:
                    said = {metric.name: metric.value for metric in client.metrics}[RECEIVED_LOSS]
                    assert said == pytest.approx(site_loss(client.client_name, base), rel=1e-5)
    assert max(ends["fair"]) < max(ends["mean"])
    assert max(ends["fair"]) - min(ends["fair"]) < max(ends["mean"]) - min(ends["mean"])
