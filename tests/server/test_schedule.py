"""Learning rates by round, and what a plateau schedule makes of metrics."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_server.config import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    ExponentialScheduleConfig,
    PlateauScheduleConfig,
    RunConfig,
    StepScheduleConfig,
    parse_run_config,
)
from fed_server.optim.schedule import NO_PLATEAU, Plateau, rate_factor, update_plateau
from fed_server.rounds.policy import learning_rate, least_work, plateau_after, server_optimizer, training_plan
from fed_server.store.base import AssignmentKind, AssignmentRecord, AssignmentState

PLATEAU = PlateauScheduleConfig(patience=2, factor=0.5, floor=0.2)


def factors(schedule: object, rounds: int, max_rounds: int = 100) -> list[float]:
    return [rate_factor(schedule, r, max_rounds) for r in range(1, rounds + 1)]  # type: ignore[arg-type]


def after(values: list[float | None], schedule: PlateauScheduleConfig = PLATEAU, direction: str = "max") -> Plateau:
    """What a plateau schedule has seen after rounds that measured these."""
    plateau = NO_PLATEAU
    for number, value in enumerate(values, start=1):
        plateau = update_plateau(plateau, schedule, number, value, direction)  # type: ignore[arg-type]
    return plateau


# By hand


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ConstantScheduleConfig(), [1, 1, 1, 1, 1, 1]),
        (ConstantScheduleConfig(warmup_rounds=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (StepScheduleConfig(every=2, factor=0.1), [1, 1, 0.1, 0.1, 0.01, 0.01]),
        (StepScheduleConfig(every=1, factor=0.5, warmup_rounds=2, floor=0.3), [0.5, 1, 1, 0.5, 0.3, 0.3]),
        (ExponentialScheduleConfig(factor=0.5), [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        (ExponentialScheduleConfig(factor=0.5, floor=0.2), [1, 0.5, 0.25, 0.2, 0.2, 0.2]),
        (ExponentialScheduleConfig(factor=0.5, warmup_rounds=3), [1 / 3, 2 / 3, 1, 1, 0.5, 0.25]),
    ],
    ids=str,
)
def test_the_first_rounds_by_hand(schedule: object, expected: list[float]) -> None:
    assert factors(schedule, 6) == pytest.approx(expected)


def test_a_cosine_falls_to_its_floor_as_the_run_ends() -> None:
    assert factors(CosineScheduleConfig(), 4, max_rounds=4) == pytest.approx(
        [1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.14645], rel=1e-4
    )
    assert factors(CosineScheduleConfig(floor=0.5), 4, max_rounds=4)[2] == 0.75
    assert factors(CosineScheduleConfig(warmup_rounds=2), 6, max_rounds=6)[2:] == factors(CosineScheduleConfig(), 4, 4)
    assert rate_factor(CosineScheduleConfig(floor=0.1), 10**6, 4) == 0.1


def test_a_schedule_never_comes_to_nothing() -> None:
    for schedule in (ExponentialScheduleConfig(factor=1e-300), StepScheduleConfig(every=1, factor=1e-300)):
        assert rate_factor(schedule, 2**31 - 1, 2**31 - 1) == 1e-9


@given(
    st.sampled_from(
        [
            ConstantScheduleConfig,
            CosineScheduleConfig,
            lambda **more: StepScheduleConfig(every=3, **more),
            lambda **more: ExponentialScheduleConfig(factor=0.9, **more),
            lambda **more: PlateauScheduleConfig(**more),
        ]
    ),
    st.integers(0, 20),
    st.integers(1, 40),
)
def test_every_schedule_rises_to_one_and_only_falls_from_there(make: object, warmup: int, more: int) -> None:
    schedule = make(warmup_rounds=warmup)  # type: ignore[operator]
    found = factors(schedule, warmup + more, max_rounds=warmup + more)
    assert all(0 < factor <= 1 for factor in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup] == 1
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


# Plateau


def test_the_rate_falls_after_so_many_measurements_without_a_new_best() -> None:
    assert after([0.5, 0.6]) == Plateau(1.0, 0.6, 0)
    assert after([0.5, 0.6, 0.6]) == Plateau(1.0, 0.6, 1), "as good is no gain"
    assert after([0.5, 0.6, 0.6, 0.1]) == Plateau(0.5, 0.6, 0)
    assert after([0.5, 0.6, 0.6, 0.1, 0.2]) == Plateau(0.5, 0.6, 1), "and the count begins anew"
    assert after([0.5, 0.6, 0.6, 0.1, 0.2, 0.7]) == Plateau(0.5, 0.7, 0)
    assert after([0.5] + 10 * [0.4]).factor == 0.2, "not below the floor"


def test_less_may_be_better() -> None:
    assert after([2.0, 1.0, 1.5, 1.5], direction="min") == Plateau(0.5, 1.0, 0)


def test_rounds_without_a_measurement_do_not_count() -> None:
    assert after([0.5, None, 0.4, None, None]) == Plateau(1.0, 0.5, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_no_gain(bad: float) -> None:
    assert after([bad, bad]) == Plateau(0.5, None, 0)
    assert after([bad, bad, 0.1]) == Plateau(0.5, 0.1, 0)


def test_the_warm_up_is_not_counted() -> None:
    schedule = PlateauScheduleConfig(patience=2, warmup_rounds=3)
    assert after([0.5, 0.4, 0.4, 0.4], schedule) == Plateau(1.0, 0.5, 1)
    assert after([0.5, 0.4, 0.4, 0.4, 0.4], schedule) == Plateau(0.5, 0.5, 0)
    assert rate_factor(schedule, 2, 100, Plateau(0.5, 0.5, 0)) == 2 / 3
    assert rate_factor(schedule, 6, 100, Plateau(0.5, 0.5, 0)) == 0.5


# In a run


def config(extra: str) -> RunConfig:
    return parse_run_config(
        f'name = "a"\nworkload = "b"\ncohort.size = 1\nschedule.max_rounds = 8\n[training]\n'
        f'optimizer = {{ kind = "sgd", learning_rate = 0.5, epoch_decay = 0.75 }}\n{extra}'
    )


def assignment(round: int) -> AssignmentRecord:
    return AssignmentRecord("a", "r", round, "c", AssignmentKind.TRAIN, AssignmentState.OPEN, 0, 0.0)


def test_the_plan_has_the_rate_of_its_round() -> None:
    run = config('schedule = { kind = "exponential", factor = 0.5, warmup_rounds = 2 }')
    plans = [training_plan(run, assignment(r), NO_PLATEAU, "a").optimizer for r in range(1, 6)]
    assert [plan.learning_rate for plan in plans] == [0.25, 0.5, 0.5, 0.25, 0.125]
    assert {plan.epoch_decay for plan in plans} == {0.75}
    assert [learning_rate(run, r) for r in range(1, 6)] == [plan.learning_rate for plan in plans]


def test_the_plan_follows_the_plateau() -> None:
    run = config('schedule = { kind = "plateau", factor = 0.5 }')
    assert training_plan(run, assignment(3), Plateau(0.25), "a").optimizer.learning_rate == 0.125


def test_a_site_that_the_config_names_has_a_rate_of_its_own_on_the_same_schedule() -> None:
    run = config('schedule = { kind = "exponential", factor = 0.5 }\nlearning_rate_by_site = { north = 3.0 }')
    rates = {site: [learning_rate(run, r, site=site) for r in (1, 2, 3)] for site in ("north", "south")}
    assert rates == {"north": [3.0, 1.5, 0.75], "south": [0.5, 0.25, 0.125]}
    plans = [training_plan(run, assignment(2), Plateau(), site).optimizer for site in ("north", "south")]
    assert [plan.learning_rate for plan in plans] == [1.5, 0.25]


def test_the_least_work_is_reckoned_by_the_smallest_rate_that_a_site_is_told() -> None:
    scaffold = 'objective = { kind = "scaffold", population = 1 }\n'
    raw = '[uplink]\nkind = "raw"\n'
    alike = config(scaffold + raw)
    unlike = config(f"{scaffold}learning_rate_by_site = {{ a = 2.0, b = 0.0001220703125 }}\n{raw}")
    assert least_work(alike, 1, NO_PLATEAU) == 0.5 * 2**-10
    assert least_work(unlike, 1, NO_PLATEAU) == 2**-13 * 2**-10
    assert least_work(config(""), 1, NO_PLATEAU) == 0.0


def test_the_servers_rate_has_a_schedule_of_its_own() -> None:
    run = config('[server_optimizer]\nkind = "adam"\nlearning_rate = 0.4\nschedule = { kind = "step", every = 2 }')
    rates = [vars(server_optimizer(run, r))["learning_rate"] for r in range(1, 6)]
    assert rates == [0.4, 0.4, 0.2, 0.2, 0.1]
    assert learning_rate(run, 5) == 0.5


def test_a_plateau_watches_its_metric_or_that_of_the_evaluation() -> None:
    run = config('schedule = { kind = "plateau", patience = 1 }\n[evaluation]\nmetric = "loss"\ndirection = "min"')
    seen = plateau_after(run, NO_PLATEAU, 1, {"loss": 2.0, "train.loss": 3.0})
    assert seen == Plateau(1.0, 2.0, 0)
    assert plateau_after(run, seen, 2, {"train.loss": 3.0}) == seen
    assert plateau_after(run, seen, 2, {"loss": 2.5}) == Plateau(0.5, 2.0, 0)
    run = config('schedule = { kind = "plateau", metric = "train.loss", direction = "min" }\n[evaluation]\nat = "none"')
    assert plateau_after(run, NO_PLATEAU, 1, {"loss": 2.0, "train.loss": 3.0}) == Plateau(1.0, 3.0, 0)


def test_another_schedule_sees_nothing() -> None:
    assert plateau_after(config(""), NO_PLATEAU, 1, {"accuracy": 0.5}) == NO_PLATEAU
