"""kill -9 of a coordinator that gives a guarantee: every release is charged once, and nothing is drawn again for what is out."""

from __future__ import annotations

import pytest
import torch

from fed_core.privacy.accounting import Spend, epsilon
from fed_core.privacy.mechanism import central_poisson
from fed_core.safetensors_tiles import SafetensorsReader, tensors_digest
from fedstream.v1 import runs_pb2
from tests.faults.processes import Federation, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("encodings")]

# In the order of a round.
POINTS = (
    "ledger-charged",
    "update-durable",
    "noise-drawn",
    "mid-fold:2",
    "before-released",
    "after-released",
    "before-commit",
    "after-commit",
)
MECHANISM = central_poisson(1.0, 4.0, 1.0)
DELTA = 0.01
# What follows the sites' data and has no noise that fits it.
KEPT = ", ".join(f'{{ pattern = "{pattern}", rule = "keep" }}' for pattern in ("norm.running_*", "*num_*"))
EXACT = {
    "quorum": 2,
    "uplink": '{ kind = "raw" }',
    "downlink": '{ kind = "raw" }',
    "aggregation": f'{{ kind = "mean", weighting = "uniform", merge = [{KEPT}] }}',
}


def private(population: str, budget: float = 1e6) -> str:
    return (
        f'{{ kind = "central", sampling_rate = 1.0, noise_multiplier = 4.0, delta = {DELTA}, population = "{population}", '
        f'max_epsilon = {budget}, clipping = {{ kind = "fixed", norm = 1.0 }} }}'
    )


def spent(federation: Federation, name: str) -> runs_pb2.GetPrivacyResponse:
    request = runs_pb2.GetPrivacyRequest(run=name)
    answer: runs_pb2.GetPrivacyResponse = federation.coordinator.operator.call("GetPrivacy", request)
    return answer


def cost(rounds: int) -> float:
    return epsilon([Spend(MECHANISM, rounds)], DELTA).reported


def test_killed_at_every_step_a_run_charges_once_and_stops_at_its_budget(federation: Federation) -> None:
    budget = (cost(3) + cost(4)) / 2
    report = federation.killed_at(POINTS, "budget", rounds=9, privacy=private("budget", budget), **EXACT)

    assert "privacy budget: round 4 would bring population 'budget'" in report.run.reason
    assert report.run.model_version == 3
    account = spent(federation, "budget")
    assert [(each.round, each.is_released) for each in account.charges] == [(1, True), (2, True), (3, True)]
    assert [each.epsilon for each in account.charges] == pytest.approx([cost(1), cost(2), cost(3)])
    assert account.charges[-1].epsilon < budget < cost(4)
    assert len({model.digest for model in report.models}) == 4
    masters = federation.coordinator.data / "masters" / report.run.run_id
    until(lambda: not list(masters.glob("*")), "what a run that is over kept is deleted")


def test_from_the_moment_the_noisy_sum_is_durable_it_is_what_is_released(federation: Federation) -> None:
    """Before, a crash may draw anew; afterwards the version is that file to the bit, however often the coordinator dies."""
    coordinator = federation.coordinator
    coordinator.stop()
    coordinator.start(fail_at="before-released")
    federation.submit("durable", privacy=private("durable"), **EXACT)
    coordinator.wait_killed()
    assert not list(coordinator.data.glob("masters/*/1.released.safetensors"))
    coordinator.start(fail_at="after-released")
    coordinator.wait_killed()
    (path,) = coordinator.data.glob("masters/*/1.released.safetensors")
    written = path.read_bytes()
    with SafetensorsReader(path) as reader:
        step = 2.0 ** int(reader.metadata["exponent"])
        released = {spec.name: reader.tensor(spec.name) * step / 3 for spec in reader.specs}
    coordinator.start(fail_at="before-commit")
    coordinator.wait_killed()
    assert path.read_bytes() == written
    coordinator.start()
    report = federation.finished("durable")

    versions = [coordinator.data / "models" / report.run.run_id / f"{version}.safetensors" for version in (0, 1)]
    with SafetensorsReader(versions[0]) as before, SafetensorsReader(versions[1]) as after:
        for spec in before.specs:
            expected = before.tensor(spec.name)
            if spec.name in released:
                expected = (expected.double() + released.pop(spec.name).view(spec.shape)).float()
            assert torch.equal(after.tensor(spec.name), expected)
    assert not released
    assert tensors_digest(versions[1]) == report.models[1].digest
    assert len(spent(federation, "durable").charges) == 1
    until(lambda: not path.exists(), "the noisy sum goes once its version is committed")
