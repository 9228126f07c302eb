"""Central privacy with noise that is correlated between rounds, over real gRPC: who is asked, and what versions carry."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from benchmarks.light_client import LightClient
from fed_core.errors import ConfigError
from fed_core.privacy.accounting import Spend, epsilon
from fed_core.privacy.correlated import Factorization
from fed_core.privacy.mechanism import Correlation, correlated
from fed_core.privacy.tree import BinaryTree
from fed_server.config import parse_run_config
from fed_server.config_privacy import CentralPrivacyConfig
from fed_server.privacy.mechanisms import factorization_of
from fed_server.rounds.private_run import privacy_notices
from fedstream.v1 import runs_pb2
from tests.server.conftest import House, off_loop
from tests.server.houses import answer, back_in, open_house, until
from tests.server.test_private_run import clients_of, config, privacy, values

TREE = 'correlation = {{ kind = "tree", max_participations = {most}, min_separation = {apart} }}'
BANDED = 'correlation = {{ kind = "banded_inverse", bands = 3, max_participations = {most}, min_separation = {apart} }}'
ROUNDS = 5


def answer_all(client: LightClient, value: float) -> None:
    while True:
        answer(client, value)


async def finished(house: House, clients: list[LightClient], value: float = 0.0) -> runs_pb2.Run:
    """The run that these clients work for until it is over."""
    working = [asyncio.create_task(off_loop(answer_all, client, value)) for client in clients]
    run = await off_loop(house.operator.wait)
    for client in clients:
        client.close()
    await asyncio.gather(*working, return_exceptions=True)
    return run


def factorization(text: str) -> Factorization:
    parsed = parse_run_config(text)
    assert isinstance(parsed.privacy, CentralPrivacyConfig)
    return factorization_of(parsed, parsed.privacy)


@pytest.mark.parametrize("kind", [TREE, BANDED], ids=["tree", "banded_inverse"])
async def test_prefixes_carry_the_noise_of_the_factorization(house: House, kind: str) -> None:
    """Updates are zero: what a version has moved since the first is the noise of a prefix."""
    size = 30_000
    text = (
        config(max_rounds=ROUNDS, size=2, noise=0.5, more=kind.format(most=ROUNDS, apart=1)) + "[keep]\nversions = 9\n"
    )
    await off_loop(house.operator.submit, text, {"w": torch.zeros(size)})
    run = await finished(house, await clients_of(house, "a", "b"))
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    (charge,) = (await privacy(house)).charges
    first = await off_loop(values, house, 0)
    parts = factorization(text)
    for version in range(1, ROUNDS + 1):
        moved = (await off_loop(values, house, version) - first).double() * 2
        expected = charge.sigma * parts.prefix_variance(version - 1) ** 0.5
        assert float(moved.std()) == pytest.approx(expected, rel=0.03)
    # Together they carry less than independent noise of the same size would.
    assert parts.prefix_variance(ROUNDS - 1) < ROUNDS


async def test_the_whole_run_is_charged_when_it_begins(house: House) -> None:
    text = config(max_rounds=ROUNDS, size=2, noise=2.0, more=TREE.format(most=2, apart=2))
    await off_loop(house.operator.submit, text)
    run = await finished(house, await clients_of(house, "a", "b"))
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason
    spent = await privacy(house)
    sensitivity = BinaryTree(ROUNDS).sensitivity(2, 2)
    mechanism = correlated(1.0, 2.0, sensitivity, Correlation("tree", ROUNDS, 2, 2))
    assert [charge.round for charge in spent.charges] == [1]
    assert spent.charges[0].epsilon == pytest.approx(epsilon([Spend(mechanism)], 0.01).reported)
    assert spent.charges[0].epsilon_of_cohort == spent.charges[0].epsilon
    assert spent.charges[0].sensitivity == pytest.approx(sensitivity)
    assert "a client contributes to at most 2" in spent.claim
    models = (await off_loop(house.operator.report)).models
    assert {model.privacy for model in models[1:]} == {spent.claim}


async def test_a_budget_that_the_run_would_break_keeps_it_from_beginning(house: House) -> None:
    text = config(max_rounds=ROUNDS, size=2, noise=0.5, more=TREE.format(most=2, apart=2) + "\nmax_epsilon = 1.0")
    submitted = await off_loop(house.operator.submit, text)
    assert any("none of the rounds, which are paid for at once" in notice for notice in submitted.notices)
    await clients_of(house, "a", "b")
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FAILED
    assert "privacy budget" in run.reason
    assert not (await privacy(house)).charges


async def test_nobody_is_asked_too_often_or_too_soon_and_restarts_forget_nothing(tmp_path: Path) -> None:
    text = config(max_rounds=6, size=3, rate=0.4, noise=2.0, more=TREE.format(most=2, apart=3))
    asked: list[list[str]] = []
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, text)
        credentials = []
        clients = []
        for name in "abc":
            client = LightClient(house.app.address)
            credentials.append(await off_loop(client.enroll, house.app.tokens.join, name))
            await off_loop(client.poll, wait_seconds=0.0)
            clients.append(client)
        working = [asyncio.create_task(off_loop(answer_all, client, 0.1)) for client in clients]
        run_id = (await off_loop(house.operator.run)).run_id
        await until(lambda: house.operator.run().model_version >= 2)
        for client in clients:
            client.close()
        await asyncio.gather(*working, return_exceptions=True)
        key = house.app.settings.data_dir / "secrets" / f"{run_id}.key"
        assert len(key.read_bytes()) == 32
        assert key.stat().st_mode & 0o077 == 0
    async with open_house(tmp_path / "data") as house:
        assert (
            await finished(house, [back_in(house, credential) for credential in credentials], 0.1)
        ).model_version == 6
        report = await off_loop(house.operator.report)
        asked = [[client.client_name for client in round.clients] for round in report.rounds]
        await until(lambda: not key.exists())
    assert [len(names) for names in asked] == [1] * 6
    for name in "abc":
        rounds = [number for number, names in enumerate(asked, 1) if name in names]
        assert len(rounds) == 2
        assert rounds[1] - rounds[0] >= 3


async def test_a_run_whose_key_is_gone_says_so_and_ends(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, config(max_rounds=6, size=1, more=TREE.format(most=6, apart=1)))
        client = LightClient(house.app.address)
        credential = await off_loop(client.enroll, house.app.tokens.join, "a")
        await off_loop(answer, client)
        await until(lambda: house.operator.run().model_version == 1)
    (key,) = (tmp_path / "data" / "secrets").glob("*.key")
    key.unlink()
    async with open_house(tmp_path / "data") as house:
        working = asyncio.create_task(off_loop(answer, back_in(house, credential)))
        run = await off_loop(house.operator.wait)
        assert run.state == runs_pb2.RUN_STATE_FAILED
        assert "the key of run test's noise is gone" in run.reason
        await asyncio.gather(working, return_exceptions=True)


def test_an_adaptive_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'privacy\.clipping\.kind: expected "fixed" with correlation.kind = "tree"'):
        parse_run_config(config(clipping='kind = "adaptive"', more=TREE.format(most=2, apart=2)))


def test_a_model_too_large_for_weighted_noise_is_refused_with_the_cure() -> None:
    parsed = parse_run_config(config(max_rounds=2000, noise=4.0, more=BANDED.format(most=2, apart=2)))
    assert isinstance(parsed.privacy, CentralPrivacyConfig)
    with pytest.raises(ConfigError, match='take kind = "tree"'):
        privacy_notices(parsed, parsed.privacy, [], 10**9)
