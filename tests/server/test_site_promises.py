"""Where each site protects its data by itself: what the coordinator says of it, at submit, with every version and on request."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest
import torch

from fed_core.plan import PrivacyPlan
from fed_core.privacy.accounting import Spend, epsilon, rounded_up
from fed_core.privacy.mechanism import local
from fed_core.safetensors_tiles import SafetensorsReader
from fed_server.privacy.promises import sites_claim, sites_notices
from fedstream.v1 import runs_pb2
from tests.server.conftest import House, off_loop
from tests.server.houses import answer

LOCAL_PLAN = PrivacyPlan("local", 1.0, 4.0, 0.001, max_epsilon=3.0, population="wards")


def test_the_claim_of_local_runs_says_what_the_sites_promise_and_that_they_keep_the_account() -> None:
    words = sites_claim(LOCAL_PLAN, 5, 100)
    expected = epsilon([Spend(local(1.0, 4.0), 5)], 0.001)
    assert f"({rounded_up(expected.reported, 4):g}, 0.001)-differential privacy over 5 releases" in words
    assert f"One update costs epsilon {rounded_up(epsilon([Spend(local(1.0, 4.0), 1)], 0.001).reported, 4):g}." in words
    for part in (
        "towards everybody, the coordinator included",
        "differ by replacing one",
        "sensitivity 2",
        "A site refuses what would bring it above epsilon 3 on population 'wards'",
        "keeps its own account: `fed-client privacy`",
    ):
        assert part in words


def test_the_claim_of_runs_by_examples_gives_no_epsilon_that_only_the_sites_know() -> None:
    words = sites_claim(replace(LOCAL_PLAN, kind="examples", max_epsilon=None), 5, 100)
    for part in ("DP-SGD", "adding or removing one example of one site", "delta 0.001", "which only the site knows"):
        assert part in words
    assert "refuses" not in words
    assert not re.search(r"epsilon \d", words)


def test_a_delta_that_is_large_for_the_sites_is_warned_of() -> None:
    assert "privacy.delta: a delta of 0.001 is large" in sites_notices(LOCAL_PLAN, 500, 5, 100)[-1]
    assert len(sites_notices(LOCAL_PLAN, 50, 5, 100)) == 2


CONFIG = """
name = "test"
workload = "echo"
seed = 7
cohort.size = 2
schedule.max_rounds = 2
aggregation = {{ kind = "mean", weighting = "uniform" }}
evaluation.at = "none"
uplink.kind = "raw"
downlink.kind = "raw"
[privacy]
kind = "{mode}"
clipping_norm = 1.0
noise_multiplier = 40.0
delta = 0.01
max_epsilon = 3.0
"""


@pytest.mark.parametrize("mode", ["local", "examples"])
async def test_what_the_sites_promise_is_said_at_submit_with_every_version_and_on_request(
    house: House, mode: str
) -> None:
    created = await off_loop(house.operator.submit, CONFIG.format(mode=mode))
    promised = " ".join(created.notices)
    assert ("local differential privacy for whole sites" if mode == "local" else "for single examples") in promised
    assert "each site keeps its own account" in promised

    # Noise of 40 norms reaches far beyond what the bound of a model of zeros leaves room for.
    value = 300.0 if mode == "local" else 1.0
    clients = [await off_loop(house.client, name) for name in ("oslo", "bergen")]
    for _ in range(2):
        await asyncio.gather(*(off_loop(answer, client, value) for client in clients))
    run = await off_loop(house.operator.wait)
    assert (run.state, run.model_version) == (runs_pb2.RUN_STATE_FINISHED, 2), run.reason

    plan = PrivacyPlan(mode, 1.0, 40.0, 0.01, 3.0)
    models = (await off_loop(house.operator.call, "ListModels", runs_pb2.ListModelsRequest(run="test"))).models
    assert [model.privacy for model in models] == ["", *(sites_claim(plan, count, 2 * 10) for count in (1, 2))]
    path = house.app.settings.data_dir / "models" / run.run_id / "2.safetensors"
    with SafetensorsReader(path) as reader:
        assert reader.metadata["privacy"] == models[2].privacy
        assert torch.equal(reader.tensor("w"), torch.full((10,), 2 * value))
    account = await off_loop(house.operator.call, "GetPrivacy", runs_pb2.GetPrivacyRequest(run="test"))
    assert account.is_kept_by_sites
    assert (account.claim, account.delta, account.max_epsilon) == (models[2].privacy, 0.01, 3.0)
    assert not account.charges
