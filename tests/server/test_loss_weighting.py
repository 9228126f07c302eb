"""Weights by a loss that the sites report: what it is, what it makes of updates, and who is refused."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.light_client import LightClient, constant, encode_update
from fed_client.training.jobs import CannotDoError
from fed_core.errors import UpdateRefusedError
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.tensors import load_tensors
from fed_core.workload import initial_model, load_workload
from fed_server.aggregation.loss_weight import LossWeighting
from fedstream.v1 import common_pb2, runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import member, weights
from tests.server.training_sites import MODEL, WORKLOAD, TrainingSite, examples

INVERSE = (
    '[aggregation]\nkind = "mean"\nweighting = "inverse_loss"\nsmallest_loss = 0.25\nmax_weight = 1000\nbound = 64.0\n'
)


def said(**metrics: float) -> UpdateInfo:
    return UpdateInfo(assignment_id="a", num_examples=3, metrics=metrics)


@given(st.floats(0, 1e30), st.floats(1e-6, 1e6), st.integers(1, 2**40))
def test_an_inverse_loss_is_rounded_once_and_never_nought(loss: float, scale: float, most: int) -> None:
    weight = LossWeighting("loss", scale, -1.0, most).weight_of(said(loss=loss))
    exact = most * min(Fraction(1), Fraction(scale) / max(Fraction(loss), Fraction(1, 10**10)))
    assert 1 <= weight <= most
    assert abs(weight - max(exact, 1)) <= Fraction(1, 2) + exact / 2**50


@given(st.floats(0, 1e30), st.floats(0, 1e30), st.floats(1e-6, 1e6), st.sampled_from([-1.0, 0.5, 1.0, 5.0]))
def test_the_better_the_loss_the_more_it_counts_and_the_other_way_round(
    low: float, high: float, scale: float, power: float
) -> None:
    weighting = LossWeighting("loss", scale, power, 10**6)
    low, high = sorted((low, high))
    of_low, of_high = weighting.weight_of(said(loss=low)), weighting.weight_of(said(loss=high))
    assert of_low >= of_high if power < 0 else of_low <= of_high
    assert weighting.weight_of(said(loss=scale)) == 10**6


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -0.1])
def test_a_loss_that_is_none_is_refused(loss: float) -> None:
    with pytest.raises(UpdateRefusedError, match=r"reports validation_loss = .* weights updates by it"):
        LossWeighting("validation_loss", 1.0, -1.0, 9).weight_of(said(validation_loss=loss))


def send(client: LightClient, value: float, **metrics: float) -> common_pb2.TrainingPlan:
    assignment = client.next_assignment()
    manifest, _ = client.model(assignment)
    client.upload(assignment.assignment_id, encode_update(assignment, manifest.specs, constant(value), metrics=metrics))
    return assignment.plan


async def test_updates_count_by_the_inverse_of_their_loss(house: House) -> None:
    await off_loop(house.operator.submit, config(size=2, extra=INVERSE))
    a, b = [await off_loop(house.client, name) for name in ("a", "b")]
    plan, _ = await asyncio.gather(
        off_loop(send, a, 1.0, loss=9.0, validation_loss=0.125), off_loop(send, b, -2.0, loss=0.5, validation_loss=1.0)
    )
    await off_loop(house.operator.wait)
    assert list(plan.measures) == [common_pb2.MEASURE_VALIDATION_LOSS]
    assert [(await off_loop(member, house, name)).weight for name in ("a", "b")] == [1000, 250]
    assert await off_loop(weights, house, 1) == pytest.approx((1000 * 1.0 - 250 * 2.0) / 1250, abs=1e-6)


async def test_an_update_without_the_loss_is_refused_and_says_what_to_do(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1, extra=INVERSE))
    client = await off_loop(house.client, "a")
    with pytest.raises(UpdateRefusedError, match=r"reports no validation_loss, .* install the coordinator's version"):
        await off_loop(send, client, 1.0, loss=1.0)


HELD_OUT = """
    def evaluation_data(self, site):
        x, y = torch.load(Path(site.options["data"]))
        return (x[:2], y[:2]) if site.name != "c" else None
"""


def loss_of(site: TrainingSite, state: dict[str, torch.Tensor], count: int | None = None) -> float:
    """The loss of a model over a site's first examples, by the workload itself."""
    workload = load_workload(str(site.folder / "task.py"))
    model = initial_model(workload, 0)
    load_tensors(model, state)
    x, y = examples(site.name)
    return float(workload.loss(model, (x[:count], y[:count])).detach())


async def test_sites_measure_what_the_plan_says_and_train_as_they_would_without(house: House, tmp_path: Path) -> None:
    site = await off_loop(TrainingSite, house, "a", tmp_path / "a")
    (site.folder / "task.py").write_text(WORKLOAD + HELD_OUT)
    answers: dict[str, dict[str, Any]] = {}
    made = {}
    for run, extra in (("with", INVERSE), ("without", "[aggregation]\nkind = 'mean'\nbound = 64.0\n")):
        await off_loop(house.operator.submit, config(run, size=1, extra=extra), MODEL)
        work = await off_loop(site.client.next_assignment)
        answers[run] = await off_loop(site.train, work)
        await off_loop(house.operator.call, "CancelRun", runs_pb2.CancelRunRequest(run=run))
        with PayloadReader(site.folder / "update") as update:
            made[run] = update.tensor("w")
    assert torch.equal(made["with"], made["without"])
    assert set(answers["without"]["metrics"]) == {"loss"}
    measured = answers["with"]["metrics"]["validation_loss"]
    assert measured == pytest.approx(loss_of(site, MODEL | {"w": made["with"]}, 2), rel=1e-6)


async def test_a_site_without_held_out_examples_says_so_before_it_trains(house: House, tmp_path: Path) -> None:
    site = await off_loop(TrainingSite, house, "c", tmp_path / "c")
    (site.folder / "task.py").write_text(WORKLOAD + HELD_OUT)
    await off_loop(house.operator.submit, config(size=1, extra=INVERSE), MODEL)
    with pytest.raises(CannotDoError, match="evaluation_data of the workload has none at this site"):
        await off_loop(lambda: site.train(site.client.next_assignment()))
