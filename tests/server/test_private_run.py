"""Central differential privacy over real gRPC: who is asked, what is released, what it costs, and what is kept."""

from __future__ import annotations

import asyncio
import json
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.light_client import LightClient, constant, encode_update
from fed_core.errors import ConfigError
from fed_core.privacy.accounting import Spend, epsilon, rounded_up
from fed_core.privacy.mechanism import central_poisson, default_bit_sigma
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import BUFFER, TensorSpec
from fed_server.config import RunConfig, parse_run_config
from fed_server.config_privacy import FEATURES
from fed_server.rounds import private_run
from fedstream.v1 import common_pb2, runs_pb2
from tests.server.conftest import EXACT, House, off_loop
from tests.server.houses import MovableClock, answer, open_house

CONFIG = """
name = "{name}"
workload = "echo"
seed = 7
[cohort]
size = {size}
[schedule]
max_rounds = {max_rounds}
deadline_seconds = {deadline}
[aggregation]
kind = "mean"
weighting = "uniform"
[evaluation]
at = "none"
[privacy]
kind = "central"
sampling_rate = {rate}
noise_multiplier = {noise}
delta = 0.01
{more}
[privacy.clipping]
{clipping}
"""


def config(
    name: str = "test",
    size: int = 2,
    max_rounds: int = 1,
    deadline: float = 60,
    rate: float = 1.0,
    noise: float = 0.01,
    more: str = "",
    clipping: str = 'kind = "fixed"\nnorm = 1.0',
) -> str:
    return (
        CONFIG.format(
            name=name,
            size=size,
            max_rounds=max_rounds,
            deadline=deadline,
            rate=rate,
            noise=noise,
            more=more,
            clipping=clipping,
        )
        + EXACT
    )


def values(house: House, version: int, run: str = "test") -> torch.Tensor:
    run_id = house.operator.run(run).run_id
    with SafetensorsReader(house.app.settings.data_dir / "models" / run_id / f"{version}.safetensors") as reader:
        return reader.tensor("w")


async def privacy(house: House, run: str = "test") -> runs_pb2.GetPrivacyResponse:
    return await off_loop(house.operator.call, "GetPrivacy", runs_pb2.GetPrivacyRequest(run=run))


async def clients_of(house: House, *names: str) -> list[LightClient]:
    """New clients that have called once, and so are there."""
    clients = [await off_loop(house.client, name) for name in names]
    for client in clients:
        await off_loop(client.poll, wait_seconds=0.0)
    return clients


async def test_a_round_releases_the_clipped_sum_over_the_expected_cohort(house: House) -> None:
    """Two of ten coordinates' updates within the bound and beyond it; the noise is a hundredth of the norm."""
    await off_loop(house.operator.submit, config())
    a, b = await clients_of(house, "a", "b")
    # |a| = 0.5 is kept, |b| = 10 is cut to 1.
    await asyncio.gather(off_loop(answer, a, 0.5 / 10**0.5), off_loop(answer, b, 10 / 10**0.5))
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    change = await off_loop(values, house, 1)
    assert change == pytest.approx(torch.full((10,), (0.5 + 1) / 10**0.5 / 2), abs=6 * 0.01 / 2)
    # Noise on every coordinate, and not the same.
    assert len(set(change.tolist())) == 10


async def test_who_is_absent_counts_as_zero_and_the_divisor_stays(house: House, tmp_path: Path) -> None:
    clock = MovableClock()
    async with open_house(tmp_path / "other", clock) as house:
        await off_loop(house.operator.submit, config(deadline=300))
        a, _ = await clients_of(house, "a", "b")
        await off_loop(answer, a, 0.5 / 10**0.5)
        await asyncio.sleep(0.2)
        assert (await off_loop(house.operator.run)).state == runs_pb2.RUN_STATE_ACTIVE
        clock.advance(301)
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
        assert await off_loop(values, house, 1) == pytest.approx(torch.full((10,), 0.25 / 10**0.5), abs=6 * 0.01 / 2)


async def test_an_empty_round_is_released_like_any_other(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_run, "falls", lambda rate: False)
    await off_loop(house.operator.submit, config(max_rounds=2, noise=1.0))
    await clients_of(house, "a", "b")
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    first, second = await off_loop(values, house, 1), await off_loop(values, house, 2)
    assert len(set(first.tolist())) == 10
    assert not torch.equal(first, second)
    assert len((await privacy(house)).charges) == 2


async def test_the_ledger_says_what_the_accountant_says(house: House) -> None:
    await off_loop(house.operator.submit, config(max_rounds=3, noise=2.0, rate=0.75))
    clients = await clients_of(house, "a", "b")
    working = [asyncio.create_task(off_loop(_answer_all, client)) for client in clients]
    run = await off_loop(house.operator.wait)
    for client in clients:
        client.close()
    await asyncio.gather(*working, return_exceptions=True)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    spent = await privacy(house)
    assert [each.round for each in spent.charges] == [1, 2, 3]
    mechanism = central_poisson(1.0, 2.0, 0.75)
    for count, entry in enumerate(spent.charges, 1):
        assert entry.epsilon == pytest.approx(epsilon([Spend(mechanism, count)], 0.01).pld, rel=1e-6)
        assert entry.epsilon_rdp >= entry.epsilon
        assert entry.population_epsilon == entry.epsilon
        assert 0 < entry.failure < 1e-12
        assert (entry.sensitivity, entry.sigma, entry.is_released) == (1.0, 2.0, True)
    report = await off_loop(house.operator.report)
    assert [_metric(round, "privacy.epsilon") for round in report.rounds] == [each.epsilon for each in spent.charges]
    last = spent.charges[-1].epsilon
    assert spent.claim.startswith(f"({rounded_up(last, 4):.4g}, 0.01)-differential privacy over 3 releases")
    assert "adding or removing one" in spent.claim
    assert "independent coin at 0.75" in spent.claim
    assert [model.privacy.split("-")[0] for model in report.models] == [
        "",
        *(f"({rounded_up(e.epsilon, 4):.4g}, 0.01)" for e in spent.charges),
    ]
    with SafetensorsReader(house.app.settings.data_dir / "models" / run.run_id / "3.safetensors") as reader:
        assert reader.metadata["privacy"] == spent.claim
    assert (spent.delta, spent.population, spent.num_units, spent.projected_epsilon) == (0.01, "default", 2, last)


def _metric(round: runs_pb2.Round, name: str) -> float:
    return next(metric.value for metric in round.metrics if metric.name == name)


def _answer_all(client: LightClient, value: float = 0.25) -> None:
    while True:
        answer(client, value)


@pytest.mark.parametrize("clipping", ['kind = "fixed"\nnorm = 0.5', 'kind = "adaptive"\ninitial_norm = 0.5'])
async def test_what_is_released_of_nothing_has_the_noise_that_is_charged(house: House, clipping: str) -> None:
    """The whole way from config to account, from outside: updates are zero, so that whatever moves the model is noise."""
    rounds, rate, noise = 3, 0.5, 1.5
    model = {"w": torch.zeros(20_000)}
    text = config(max_rounds=rounds, rate=rate, noise=noise, size=4, clipping=clipping)
    await off_loop(house.operator.submit, text + "[keep]\nversions = 9\n", model)
    clients = await clients_of(house, "a", "b", "c", "d")
    working = [asyncio.create_task(off_loop(_answer_all, client, 0.0)) for client in clients]
    run = await off_loop(house.operator.wait)
    for client in clients:
        client.close()
    await asyncio.gather(*working, return_exceptions=True)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    charges = (await privacy(house)).charges
    versions = [await off_loop(values, house, version) for version in range(rounds + 1)]
    measured = []
    for before, after, charge in zip(versions, versions[1:], charges, strict=False):
        sigma = float((after - before).double().std()) * rate * 4
        assert sigma == pytest.approx(charge.sigma, rel=0.03)
        # The bits cost their part: together they are worth the noise multiplier.
        bit_sigma = default_bit_sigma(noise, rate, 4)
        joint = sigma if "fixed" in clipping else 1 / (sigma**-2 + (2 * bit_sigma * charge.sensitivity) ** -2) ** 0.5
        measured.append(joint / charge.sensitivity)
    # Noise of different rounds has nothing in common.
    first, second = (versions[1] - versions[0]).double(), (versions[2] - versions[1]).double()
    assert abs(float(torch.dot(first, second) / first.norm() / second.norm())) < 5 / 20_000**0.5
    spends = [Spend(central_poisson(1.0, multiplier, rate), 1) for multiplier in measured]
    assert charges[-1].epsilon == pytest.approx(epsilon(spends, 0.01).reported, rel=0.05)
    asked = [len(round.clients) for round in (await off_loop(house.operator.report)).rounds]
    assert len(asked) == rounds
    assert max(asked) <= 4


async def test_the_run_ends_before_the_round_that_would_overspend(house: House) -> None:
    one = epsilon([Spend(central_poisson(1.0, 2.0, 1.0), 1)], 0.01).reported
    two = epsilon([Spend(central_poisson(1.0, 2.0, 1.0), 2)], 0.01).reported
    submitted = await off_loop(
        house.operator.submit, config(max_rounds=5, noise=2.0, more=f"max_epsilon = {(one + two) / 2}")
    )
    assert any("pays for 1 of 5 rounds" in notice for notice in submitted.notices)
    a, b = await clients_of(house, "a", "b")
    await asyncio.gather(off_loop(answer, a), off_loop(answer, b))
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED
    assert "round 2 would bring population 'default' to epsilon" in run.reason
    assert len((await privacy(house)).charges) == 1
    assert run.model_version == 1


async def test_runs_that_share_a_population_share_its_budget(house: House) -> None:
    one = epsilon([Spend(central_poisson(1.0, 2.0, 1.0), 1)], 0.01).reported
    a, b = await clients_of(house, "a", "b")
    budget = f'population = "clinics"\nmax_epsilon = {one * 1.01}'
    await off_loop(house.operator.submit, config(noise=2.0, more=budget))
    await asyncio.gather(off_loop(answer, a), off_loop(answer, b))
    assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
    await off_loop(house.operator.submit, config("second", noise=2.0, more=budget))
    second = await off_loop(house.operator.wait, "second")
    assert second.state == runs_pb2.RUN_STATE_FAILED
    assert "would bring population 'clinics'" in second.reason
    # Others have a budget of their own.
    await off_loop(house.operator.submit, config("third", noise=2.0, more=f"max_epsilon = {one * 1.01}"))
    await asyncio.gather(off_loop(answer, a), off_loop(answer, b))
    assert (await off_loop(house.operator.wait, "third")).state == runs_pb2.RUN_STATE_FINISHED
    assert not (await privacy(house, "second")).charges


async def test_what_a_site_says_of_its_data_is_not_kept(house: House) -> None:
    await off_loop(house.operator.submit, config())
    a, b = await clients_of(house, "a", "b")

    def talk(client: LightClient) -> None:
        assignment = client.next_assignment()
        client.report_progress(assignment.assignment_id, metrics=[common_pb2.Metric(name="loss", value=0.5)])
        manifest, _ = client.model(assignment)
        update = encode_update(assignment, manifest.specs, constant(0.1), 77, metrics={"loss": 0.25})
        client.upload(assignment.assignment_id, update)

    await asyncio.gather(off_loop(talk, a), off_loop(talk, b))
    assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
    report = await off_loop(house.operator.report)
    (round,) = report.rounds
    assert {metric.name for metric in round.metrics} == {"privacy.epsilon", "privacy.clipping_norm"}
    for client in round.clients:
        assert not client.metrics
        assert (client.num_examples, client.num_steps, client.training_seconds) == (0, 0, 0)
    assert [(model.num_updates, model.num_examples) for model in report.models] == [(0, 0), (0, 0)]


async def test_the_roster_is_frozen_and_newcomers_are_told(house: House) -> None:
    await off_loop(house.operator.submit, config(max_rounds=2))
    a, b = await clients_of(house, "a", "b")
    await asyncio.gather(off_loop(answer, a), off_loop(answer, b))
    late = await off_loop(house.client, "late")
    assert (await privacy(house)).num_units == 2
    assert "its roster was frozen before its first round" in (await off_loop(late.poll, wait_seconds=0.0)).idle_reason
    await asyncio.gather(off_loop(answer, a), off_loop(answer, b))
    assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED


async def test_clients_of_one_owner_share_one_coin_and_one_norm(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    fallen: list[float] = []

    def note(rate: float) -> bool:
        fallen.append(rate)
        return True

    monkeypatch.setattr(private_run, "falls", note)
    await off_loop(house.operator.submit, config(size=3, more='units = { owner = ["a", "b"] }'))
    clients = await clients_of(house, "a", "b", "c")
    await asyncio.gather(*(off_loop(answer, client, 10.0) for client in clients))
    assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
    assert fallen == [1.0, 1.0]
    # a and b are cut to half a norm each, c to a whole one; two units are expected.
    assert await off_loop(values, house, 1) == pytest.approx(torch.full((10,), 2 / 10**0.5 / 2), abs=6 * 0.01 / 2)


async def test_an_adaptive_norm_follows_the_updates(house: House) -> None:
    clipping = 'kind = "adaptive"\ninitial_norm = 1.0\nquantile = 0.5\nlearning_rate = 1.0'
    await off_loop(house.operator.submit, config(size=2, max_rounds=4, noise=0.01, clipping=clipping))
    clients = await clients_of(house, "a", "b")
    for _ in range(4):
        await asyncio.gather(*(off_loop(answer, client, 100.0) for client in clients))
    assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
    report = await off_loop(house.operator.report)
    norms = [_metric(round, "privacy.clipping_norm") for round in report.rounds]
    assert norms[0] == 1.0
    # All are cut: the bound grows by e^0.5 a round, but for the noise on two bits.
    for before, after in pairwise(norms):
        assert after / before == pytest.approx(torch.e**0.5, rel=0.6)
    assert norms[-1] > 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"size": 100, "rate": 0.001}, "privacy.sampling_rate: expected at least 1 in a round on average"),
        ({"size": 100}, "privacy.delta: expected less than 1 / 100 units"),
        (
            {"more": 'units = { x = ["a"], y = ["a"] }'},
            "privacy.units: expected each client in one unit, got a in more",
        ),
    ],
)
def test_what_cannot_be_a_guarantee_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", "\\(")):
        parse_run_config(config(**more))


async def test_a_model_with_running_statistics_is_refused_with_the_cure(house: House) -> None:
    model = {"w": torch.zeros(4), "running_mean": torch.zeros(4)}
    specs = [TensorSpec("w", (4,), "float32"), TensorSpec("running_mean", (4,), "float32", BUFFER)]
    with pytest.raises(ConfigError, match=r"'running_mean' .* rule = \"keep\""):
        await off_loop(house.operator.submit, config(), model, "", specs)


AT_SITES = {"clipping_norm": 1.0, "noise_multiplier": 4.0, "delta": 0.001}


@pytest.mark.parametrize("mode", ["central", "local", "examples"])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_feature_is_allowed_or_refused_as_the_table_says(feature: Any, mode: Any) -> None:
    """The table is what decides: an example of each feature, in a private run and in a plain one."""
    document = tomllib.loads(config(size=50))
    if mode != "central":
        document["privacy"] = {"kind": mode, **AT_SITES}
    for name, table in tomllib.loads(feature.example).items():
        document[name] = {**document.get(name, {}), **table} if name in ("cohort", "schedule") else table
    plain = {name: table for name, table in document.items() if name != "privacy"}
    assert feature.is_used(_parsed(plain))
    verdict = feature.verdicts[mode]
    if verdict.is_allowed:
        assert feature.is_used(_parsed(document))
    else:
        with pytest.raises(ConfigError) as refused:
            _parsed(document)
        assert f"{verdict.field}: {verdict.text}" in str(refused.value)


def _parsed(document: dict[str, Any]) -> RunConfig:
    return parse_run_config("\n".join(f"{name} = {_value(value)}" for name, value in document.items()))


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_value(item)}" for name, item in value.items()) + " }"
    return json.dumps(value)
