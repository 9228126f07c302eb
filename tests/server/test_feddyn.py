"""FedDyn over the real service: the paper's algorithm to the digit, with sites that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fed_core.errors import ConfigError
from fed_core.plan import SiteOverrides
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_server.config import parse_run_config
from fed_server.optim.dynamic import Dynamic
from fed_server.optim.state import Steps
from fed_server.rounds.cohort import Candidates, within_population
from fed_server.rounds.policy import server_optimizer
from tests.server.conftest import House, config, off_loop
from tests.server.houses import answer, back_in, open_house, until
from tests.server.training_sites import MODEL, NUM_EXAMPLES, SITES, TrainingSite, examples, play, version

ALPHA, RATE, STEPS = 0.5, 0.125, 6
FEDDYN = f"""
[training]
local_work = {{ kind = "steps", steps = {STEPS} }}
batch_size = 64
objective = {{ kind = "feddyn", strength = {ALPHA}, population = 3 }}
optimizer = {{ kind = "sgd", learning_rate = {RATE} }}
overridable = ["learning_rate"]
[keep]
versions = 99
"""


def text(rounds: int, size: int = 2, weighting: str = "examples", extra: str = FEDDYN) -> str:
    aggregation = f'[aggregation]\nkind = "mean"\nweighting = "{weighting}"\nbound = 64.0\n'
    toml = config(size=size, quorum=size, max_rounds=rounds, extra=extra + aggregation)
    return toml.replace("[cohort]\n", '[cohort]\nselection = "round_robin"\nmin_clients = 3\n')


def oracle(cohorts: Sequence[set[str]], weights: Mapping[str, int], rates: Mapping[str, float]) -> list[Tensor]:
    """Algorithm 1 of the paper with its letters, in float64: theta after every round; the mean of a cohort goes by weight."""
    num_sites = len(SITES)
    theta = torch.zeros(5, dtype=torch.float64)
    h = torch.zeros_like(theta)
    local_gradients = {name: torch.zeros_like(theta) for name in SITES}
    versions = []
    for cohort in cohorts:
        trained = {}
        for name in sorted(cohort):
            x, y = (values.double() for values in examples(name))
            theta_k = theta.clone()
            for _ in range(STEPS):
                gradient = x.T @ (x @ theta_k - y) / len(y)
                theta_k = theta_k - rates[name] * (gradient - local_gradients[name] + ALPHA * (theta_k - theta))
            local_gradients[name] = local_gradients[name] - ALPHA * (theta_k - theta)
            trained[name] = theta_k
        total = sum(weights[name] for name in cohort)
        mean = sum((weights[name] * trained[name] for name in cohort), torch.zeros_like(theta)) / total
        h = h - ALPHA * len(cohort) / num_sites * (mean - theta)
        theta = mean - h / ALPHA
        versions.append(theta)
    return versions


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
async def test_versions_are_those_of_the_paper(house: House, tmp_path: Path, weighting: str) -> None:
    await off_loop(house.operator.submit, text(6, weighting=weighting), MODEL)
    overrides = {"c": SiteOverrides(learning_rate=RATE / 2)}
    sites = [await off_loop(TrainingSite, house, name, tmp_path / name, overrides.get(name)) for name in SITES]
    cohorts = await play(house, sites, range(1, 6))
    assert {len(cohort) for cohort in cohorts} == {2}
    assert set.union(*cohorts) == set(SITES)
    assert all(site.refused == [] for site in sites)

    rates = {"a": RATE, "b": RATE, "c": RATE / 2}
    expected = oracle(cohorts, NUM_EXAMPLES if weighting == "examples" else dict.fromkeys(SITES, 1), rates)
    for number, theta in enumerate(expected, start=1):
        made = await off_loop(version, house, number)
        torch.testing.assert_close(made["w"].double(), theta, rtol=1e-5, atol=1e-6)
        assert made["unused"].tolist() == [0, 0]
        assert made["b_seen"] == STEPS * number
    if weighting == "uniform":  # then the server's s is what the sites carry, over the population
        run_id = (await off_loop(house.operator.run)).run_id
        path = house.app.settings.data_dir / "masters" / run_id / "5.optimizer.safetensors"
        with SafetensorsReader(path) as reader:
            kept = reader.tensor("w").squeeze(0)
        carried = torch.stack([site.variate(run_id)["w"] for site in sites]).mean(0)
        torch.testing.assert_close(kept, -carried / ALPHA, rtol=1e-5, atol=1e-6)


def test_with_all_sites_the_paper_comes_to_rest_where_the_weighted_gradients_cancel() -> None:
    """Where the loss over all examples has its minimum, though every site by itself would go elsewhere."""
    features, targets = zip(*(examples(name) for name in SITES), strict=True)
    best = torch.linalg.lstsq(torch.cat(features).double(), torch.cat(targets).double().unsqueeze(1)).solution.squeeze(
        1
    )
    *_, end = oracle([set(SITES)] * 300, NUM_EXAMPLES, dict.fromkeys(SITES, RATE))
    torch.testing.assert_close(end, best, rtol=1e-3, atol=1e-3)


async def test_a_restart_between_rounds_changes_no_bit(tmp_path: Path) -> None:
    digests = []
    for name, restarts in (("well", ()), ("restarted", (1, 3))):
        lives = [
            range(first, last)
            for first, last in zip((1, *(r + 1 for r in restarts)), (*(r + 1 for r in restarts), 5), strict=True)
        ]
        sites: list[TrainingSite] = []
        for life, rounds in enumerate(lives):
            async with open_house(tmp_path / name) as house:
                if life == 0:
                    await off_loop(house.operator.submit, text(4, size=3), MODEL)
                    folder = tmp_path / name / "sites"
                    sites = [await off_loop(TrainingSite, house, site, folder / site) for site in SITES]
                else:
                    for site in sites:
                        site.come_back(house)
                await play(house, sites, rounds)
                if rounds.stop == 5:
                    await off_loop(house.operator.wait)
                    digests.append([model.digest for model in (await off_loop(house.operator.report)).models])
                for site in sites:
                    site.client.close()
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 5


async def test_who_comes_when_the_population_is_complete_is_not_asked(tmp_path: Path) -> None:
    """Earlier by name, later in coming; a restart does not forget it."""
    toml = text(3, extra=FEDDYN.replace("population = 3", "population = 2"))
    async with open_house(tmp_path / "data") as house:
        await off_loop(house.operator.submit, toml.replace("min_clients = 3", "min_clients = 2"))
        members = [await off_loop(house.client, name) for name in "yz"]
        await asyncio.gather(*(off_loop(answer, client) for client in members))
        await until(lambda: house.operator.run().model_version == 1)
        late = await off_loop(house.client, "a")
        assert not (await off_loop(late.poll, wait_seconds=0.5)).assignments
        await asyncio.gather(*(off_loop(answer, client) for client in members))
        await until(lambda: house.operator.run().model_version == 2)
        secrets = [dict(client._metadata)["authorization"].removeprefix("Bearer ") for client in (late, *members)]
        for client in (late, *members):
            client.close()
    async with open_house(tmp_path / "data") as house:
        late, *members = [await off_loop(back_in, house, secret) for secret in secrets]
        asked = await asyncio.gather(
            *(off_loop(answer, client) for client in members), off_loop(late.poll, wait_seconds=1)
        )
        assert not asked[-1].assignments
        await off_loop(house.operator.wait)
        for client in (late, *members):
            client.close()


def test_a_population_takes_newcomers_while_there_is_room() -> None:
    candidates = Candidates(frozenset("abcd"), unlike=(("x", "lacks the label"),))
    full = within_population(candidates, {"d", "gone"}, 2)
    assert full.alive == {"d"}
    assert [name for name, _ in full.unlike] == ["x", "a", "b", "c"]
    assert within_population(candidates, {"d"}, 3).alive == {"a", "b", "d"}
    assert within_population(candidates, set(), 4) == candidates


def test_the_first_steps_by_hand() -> None:
    optimizer = Dynamic(0.5)
    state, weights = (torch.zeros(2).double(),), torch.tensor([1.0, 2.0]).double()
    state, weights = optimizer.step(state, weights, torch.tensor([4.0, -2.0]).double())
    assert (state[0].tolist(), weights.tolist()) == ([2.0, -1.0], [7.0, -1.0])
    state, weights = optimizer.step(state, weights, torch.tensor([-4.0, 2.0]).double())
    assert (state[0].tolist(), weights.tolist()) == ([0.0, 0.0], [3.0, 1.0])


def test_the_server_counts_the_updates_that_came() -> None:
    run = parse_run_config(text(3))
    assert server_optimizer(run, 1, 2) == Dynamic(2 / 3)
    spec = TensorSpec("w", (3,), "float32")
    with pytest.raises(AssertionError, match="needs a file"):
        Steps(server_optimizer(run, 1, 2), [spec]).stay(spec, 0, 3)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (", population = 3", "", "training.objective.population: is missing; write population = 10 under"),
        ("population = 3", "population = 2", "training.objective.population: expected at least cohort.min_clients (3), got 2"),
        ("strength = 0.5", "strength = 0", "training.objective.strength: expected more than 0, at most 1000000, got 0"),
        ("[keep]", '[server_optimizer]\nkind = "adam"\n[keep]', "server_optimizer: feddyn has a rule of its own"),
        ("[keep]", '[server_optimizer]\nkind = "sgd"\nlearning_rate = 0.5\n[keep]', "server_optimizer: feddyn has a rule"),
        (
            "[keep]",
            '[server_optimizer]\nkind = "sgd"\nschedule = { kind = "cosine" }\n[keep]',
            "server_optimizer: feddyn has a rule of its own",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused_with_the_cure(before: str, after: str, expected: str) -> None:
    toml = text(3)
    assert before in toml
    with pytest.raises(ConfigError) as caught:
        parse_run_config(toml.replace(before, after))
    assert expected in str(caught.value)


def test_robust_rules_leave_out_what_it_sums_up() -> None:
    toml = config(size=3, quorum=3, extra=FEDDYN + '[aggregation]\nkind = "median"\nnum_byzantine = 1\n')
    with pytest.raises(
        ConfigError, match=r"aggregation\.kind: feddyn adds up what all sites send, and median is no mean"
    ):
        parse_run_config(toml)
