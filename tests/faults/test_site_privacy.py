"""Sites that protect their data by themselves, as real processes: what they charge, say and refuse."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fed_client.privacy import DISTANCE_PER_NUMBER, Charge, PrivacyLedger
from fed_core.privacy.accounting import Spend, epsilon, rounded_up
from fed_core.privacy.mechanism import example_poisson, local
from fed_core.tensors import model_specs, model_tensors
from fed_core.workload import initial_model, load_workload
from fedstream.v1 import runs_pb2
from tests.faults.processes import BIN, SEED, Coordinator, Federation, Site
from tests.faults.small import NUM_EXAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("site-privacy")]

SMALL = Path(__file__).with_name("small.py")
MODEL = initial_model(load_workload(str(SMALL)), SEED)
NUM_NUMBERS = 2 * sum(parameter.numel() for parameter in MODEL.parameters())
DELTA = 0.001
LIMIT = 0.3  # of site-c


class SmallSite(Site):
    """A site that offers the small workload."""

    def command(self, *options: str) -> list[str]:
        command = super().command(*options)
        command[command.index("--workload") + 1] = str(SMALL)
        return command


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator and three sites, the last of which allows little."""
    folder = tmp_path_factory.mktemp("privacy")
    coordinator = Coordinator(folder / "coordinator")
    options = (("--label", "ward=ab"), ("--label", "ward=ab"), ("--max-epsilon", str(LIMIT), "--require-privacy"))
    made = [
        SmallSite(f"site-{letter}", folder / letter, coordinator, seed, *options[seed])
        for seed, letter in enumerate("abc")
    ]
    federation = Federation(coordinator, made)
    try:
        federation.start()
        yield federation
    finally:
        federation.stop()


def submit(federation: Federation, name: str, privacy: str, rounds: int, site: str = "") -> list[str]:
    """A run over sites a and b, or one site; what the operator is told."""
    label = f'site = "{site}"' if site else 'ward = "ab"'
    size = 1 if site else 2
    answer = federation.coordinator.operator.submit(
        f"""
        name = "{name}"
        workload = "small"
        seed = {SEED}
        aggregation = {{ kind = "mean", weighting = "uniform" }}
        evaluation.at = "none"
        privacy = {privacy}
        [cohort]
        size = {size}
        quorum = {size}
        labels = {{ {label} }}
        [schedule]
        max_rounds = {rounds}
        max_failed_rounds = 1
        [training]
        batch_size = 20
        local_work = {{ kind = "epochs", epochs = 1 }}
        optimizer = {{ kind = "sgd", learning_rate = 0.1 }}
        """,
        model_tensors(MODEL),
        specs=model_specs(MODEL),
    )
    return list(answer.notices)


def charges(site: Site) -> list[Charge]:
    return PrivacyLedger(site.state / "privacy.json").charges()


def fed_client(site: Site, *options: str) -> str:
    command = [str(BIN / "fed-client"), "privacy", "--state-dir", str(site.state), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def cost(mechanism: Any, count: int) -> float:
    return epsilon([Spend(mechanism, count)], DELTA, distance=count * NUM_NUMBERS * DISTANCE_PER_NUMBER).reported


LOCAL = local(1.0, 8.0)


def test_a_local_run_ends_where_its_sites_have_spent_what_they_may(sites: Federation) -> None:
    budget = (cost(LOCAL, 2) + cost(LOCAL, 3)) / 2
    notices = submit(
        sites,
        "local",
        f'{{ kind = "local", clipping_norm = 1.0, noise_multiplier = 8.0, delta = {DELTA}, max_epsilon = {budget}, '
        'population = "wards" }',
        rounds=5,
    )
    assert any(f"one update costs a site epsilon {cost(LOCAL, 1):.4g}" in notice for notice in notices)
    report = sites.over("local")

    assert report.run.model_version == 2
    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    assert "privacy budget: this would bring what this site spent on population 'wards'" in report.run.reason
    assert "submit a run with more noise or a higher privacy.max_epsilon" in report.run.reason
    assert all(model.num_updates == 2 for model in report.models[1:])
    members = [client for round in report.rounds for client in round.clients]
    assert not any(client.num_steps or client.num_examples > 1 for client in members), (
        "nothing says how much data there is"
    )
    assert report.models[2].privacy.startswith("Local differential privacy for each site")

    for each in map(charges, sites.sites[:2]):
        assert [(charge.round, charge.population, charge.mechanism) for charge in each] == [
            (1, "wards", LOCAL),
            (2, "wards", LOCAL),
        ]
        assert [charge.epsilon for charge in each] == [cost(LOCAL, 1), cost(LOCAL, 2)]
        assert all(len(charge.update) == 64 for charge in each)


def test_a_run_by_examples_is_charged_at_the_site_which_shows_its_account(sites: Federation) -> None:
    [site, *_] = sites.sites
    notices = submit(
        sites,
        "examples",
        f'{{ kind = "examples", clipping_norm = 1.0, noise_multiplier = 1.0, delta = {DELTA}, population = "patients" }}',
        rounds=2,
        site=site.name,
    )
    assert any("differential privacy for single examples" in notice for notice in notices)
    report = sites.finished("examples")
    assert report.run.model_version == 2
    assert "only the site knows" in report.models[2].privacy
    assert not re.search(r"epsilon \d", report.models[2].privacy)

    mechanism = example_poisson(1.0, 1.0, 20 / NUM_EXAMPLES)
    mine = [charge for charge in charges(site) if charge.population == "patients"]
    assert [(charge.mechanism, charge.count, charge.num_examples) for charge in mine] == [
        (mechanism, 10, NUM_EXAMPLES)
    ] * 2
    assert [charge.epsilon for charge in mine] == [cost(mechanism, 10), cost(mechanism, 20)]

    account = json.loads(fed_client(site, "--json"))[-1]
    assert (account["population"], account["unit"], account["num_charged"], account["delta"]) == (
        "patients",
        "example",
        2,
        DELTA,
    )
    assert account["epsilon"] == cost(mechanism, 20)
    shown = fed_client(site)
    assert re.search(rf"patients .* examples .* 2 .* {rounded_up(cost(mechanism, 20), 4):g} .* 0.001 ", shown), shown
    assert f"patients: ({rounded_up(cost(mechanism, 20), 4):g}, 0.001)-differential privacy over 20 releases" in shown
    assert "adding or removing one" in shown


def test_a_site_refuses_what_its_administrator_does_not_allow(sites: Federation) -> None:
    site = sites.sites[2]
    before = len(charges(site))
    submit(
        sites,
        "too-much",
        f'{{ kind = "local", clipping_norm = 1.0, noise_multiplier = 2.0, delta = {DELTA}, population = "third" }}',
        rounds=1,
        site=site.name,
    )
    report = sites.over("too-much")
    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    assert report.run.model_version == 0
    assert (
        f"above the site's own limit of epsilon {LIMIT:g} at delta {DELTA:g}; ask its administrator"
        in report.run.reason
    )
    assert len(charges(site)) == before
    assert not site.spooled()


def test_a_site_that_asks_for_privacy_takes_part_in_no_run_without(sites: Federation) -> None:
    site = sites.sites[2]
    submit(sites, "bare", '{ kind = "none" }', rounds=1, site=site.name)
    report = sites.over("bare")
    assert report.run.state == runs_pb2.RUN_STATE_FAILED
    assert "takes part only in runs that have it protect its data by itself" in report.run.reason
    assert not site.events("trained", run=report.run.run_id)
