from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_core.errors import InvalidError
from fed_core.plan import (
    MAX_SEED,
    ObjectivePlan,
    OptimizerPlan,
    PrivacyPlan,
    SiteOverrides,
    TrainingPlan,
    apply_overrides,
)
from fedstream.v1 import common_pb2

PARTS = ("batch_size", "learning_rate", "local_work", "optimizer")
SGD = OptimizerPlan("sgd", 0.1, momentum=0.9, weight_decay=0.01, epoch_decay=0.5)
PLAN = TrainingPlan(batch_size=32, optimizer=SGD, seed=7, epochs=3, overridable=PARTS)

positive = st.floats(1e-12, 1e6)
optimizers = st.one_of(
    st.builds(
        OptimizerPlan,
        kind=st.just("sgd"),
        learning_rate=positive,
        momentum=st.floats(0, 1, exclude_max=True),
        weight_decay=st.floats(0, 1e3),
        epoch_decay=positive,
    ),
    st.builds(OptimizerPlan, kind=st.sampled_from(["adam", "adamw"]), learning_rate=positive),
)
counts = st.integers(1, 2**31 - 1)
objectives = st.one_of(
    st.just(ObjectivePlan()),
    st.builds(ObjectivePlan, kind=st.just("fedprox"), strength=st.floats(0, 1e6)),
    st.builds(ObjectivePlan, kind=st.just("feddyn"), strength=st.floats(1e-6, 1e6)),
)
protections = st.builds(
    PrivacyPlan,
    kind=st.sampled_from(["local", "examples"]),
    clipping_norm=st.floats(1e-6, 1e6),
    noise_multiplier=st.floats(0.01, 1e6),
    delta=st.floats(0, 1, exclude_min=True, exclude_max=True),
    max_epsilon=st.none() | st.floats(1e-6, 1e6),
    population=st.from_regex(r"[a-zA-Z0-9._-]{1,64}", fullmatch=True),
)
# A site that protects its data measures nothing besides.
extras = st.one_of(
    st.fixed_dictionaries(
        {"measures": st.lists(st.sampled_from(["received_loss", "validation_loss"]), unique=True).map(tuple)}
    ),
    st.fixed_dictionaries({"privacy": protections}),
)
plans = st.builds(
    lambda work, extra, **rest: TrainingPlan(**work, **extra, **rest),
    extra=extras,
    work=st.one_of(st.fixed_dictionaries({"epochs": counts}), st.fixed_dictionaries({"steps": counts})),
    batch_size=counts,
    optimizer=optimizers,
    seed=st.integers(0, MAX_SEED),
    time_budget_seconds=st.floats(0, 1e9),
    overridable=st.lists(st.sampled_from(PARTS), unique=True).map(tuple),
    num_threads=st.integers(1, 1024),
    objective=objectives,
)


@given(plans)
def test_every_field_survives_the_wire_and_the_pipe(plan: TrainingPlan) -> None:
    message = common_pb2.TrainingPlan.FromString(plan.to_proto().SerializeToString())
    assert TrainingPlan.from_proto(message) == plan
    assert TrainingPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.measures.append(99), "measures is .*measure 99 of a newer coordinator"),
        (lambda m: m.ClearField("epochs"), "local work"),
        (lambda m: setattr(m, "epochs", 0), "epochs"),
        (lambda m: setattr(m, "steps", -1), "steps"),
        (lambda m: setattr(m, "batch_size", 0), "batch_size"),
        (lambda m: setattr(m, "num_threads", 0), "num_threads"),
        (lambda m: setattr(m, "seed", -1), "seed"),
        (lambda m: setattr(m, "time_budget_seconds", float("nan")), "time_budget_seconds"),
        (lambda m: setattr(m.optimizer, "kind", 0), "optimizer"),
        (lambda m: setattr(m.objective, "kind", 99), "objective"),
        (lambda m: setattr(m.objective, "strength", -1), "objective.strength"),
        (lambda m: setattr(m.optimizer, "kind", 99), "optimizer"),
        (lambda m: setattr(m.optimizer, "learning_rate", 0), "learning_rate"),
        (lambda m: setattr(m.optimizer, "learning_rate", float("inf")), "learning_rate"),
        (lambda m: setattr(m.optimizer, "momentum", 1), "momentum"),
        (lambda m: setattr(m.optimizer, "weight_decay", -1), "weight_decay"),
        (lambda m: setattr(m.optimizer, "epoch_decay", 0), "epoch_decay"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_the_field(change: Any, named: str) -> None:
    message = PLAN.to_proto()
    change(message)
    with pytest.raises(InvalidError, match=named):
        TrainingPlan.from_proto(message)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m.privacy, "kind", 99), "privacy is kind 99 of a newer coordinator"),
        (lambda m: setattr(m.privacy, "kind", 0), "privacy is"),
        (lambda m: setattr(m.privacy, "clipping_norm", 0), "privacy.clipping_norm"),
        (lambda m: setattr(m.privacy, "clipping_norm", float("nan")), "privacy.clipping_norm"),
        (lambda m: setattr(m.privacy, "noise_multiplier", 0), "privacy.noise_multiplier is 0.0, expected .* from 0.01"),
        (lambda m: setattr(m.privacy, "delta", 0), "privacy.delta"),
        (lambda m: setattr(m.privacy, "delta", 1), "privacy.delta"),
        (lambda m: setattr(m.privacy, "max_epsilon", -1), "privacy.max_epsilon"),
        (lambda m: setattr(m.privacy, "population", "../x"), "privacy.population"),
        (lambda m: setattr(m.privacy, "population", ""), "privacy.population"),
        (lambda m: m.measures.append(common_pb2.MEASURE_RECEIVED_LOSS), "measures is received_loss, expected none"),
        (lambda m: setattr(m.objective, "kind", common_pb2.OBJECTIVE_KIND_FEDNOVA), "one that tells no work"),
        (lambda m: setattr(m.objective, "kind", common_pb2.OBJECTIVE_KIND_SCAFFOLD), "one that tells no work"),
    ],
)
def test_a_protection_that_protects_nothing_is_refused(change: Any, named: str) -> None:
    message = replace(PLAN, privacy=PrivacyPlan("local", 1.0, 2.0, 1e-5)).to_proto()
    change(message)
    with pytest.raises(InvalidError, match=named):
        TrainingPlan.from_proto(message)


def test_a_part_that_only_a_newer_client_could_override_is_left_out() -> None:
    message = PLAN.to_proto()
    message.overridable.append(99)  # type: ignore[arg-type]
    assert TrainingPlan.from_proto(message) == PLAN


def test_feddyn_without_strength_is_refused() -> None:
    with pytest.raises(InvalidError, match=r"objective\.strength is 0\.0, expected more than 0 with feddyn"):
        ObjectivePlan("feddyn")


def test_scaffold_has_no_strength_and_needs_sgd() -> None:
    with pytest.raises(InvalidError, match=r"objective\.strength is 0\.1, expected 0 with scaffold"):
        ObjectivePlan("scaffold", 0.1)
    with pytest.raises(InvalidError, match="objective is scaffold, expected another with adam"):
        TrainingPlan(1, OptimizerPlan("adam", 0.1), 0, steps=1, objective=ObjectivePlan("scaffold"))
    plan = TrainingPlan(1, SGD, 0, steps=1, objective=ObjectivePlan("scaffold"))
    assert TrainingPlan.from_proto(plan.to_proto()) == TrainingPlan.from_json(plan.to_json()) == plan


def test_momentum_belongs_to_sgd() -> None:
    with pytest.raises(InvalidError, match=r"momentum is 0\.9, expected 0 with adam"):
        OptimizerPlan("adam", 0.1, momentum=0.9)


def test_steps_count_the_smaller_last_batch() -> None:
    assert PLAN.num_steps(65) == 3 * 3
    assert TrainingPlan(batch_size=32, optimizer=SGD, seed=0, steps=5).num_steps(65) == 5


def test_no_overrides_change_nothing() -> None:
    assert apply_overrides(PLAN, SiteOverrides()) == (PLAN, [])


def test_allowed_overrides_take_effect() -> None:
    wanted = SiteOverrides(batch_size=4, learning_rate=0.5, steps=9, optimizer="adam")
    plan, refused = apply_overrides(PLAN, wanted)
    assert refused == []
    assert (plan.batch_size, plan.epochs, plan.steps) == (4, None, 9)
    assert plan.optimizer == OptimizerPlan("adam", 0.5, weight_decay=0.01, epoch_decay=0.5)
    assert (plan.seed, plan.num_threads) == (PLAN.seed, PLAN.num_threads)


@pytest.mark.parametrize("part", PARTS)
def test_an_override_that_the_run_does_not_allow_is_ignored_and_reported(part: str) -> None:
    setting: dict[str, Any] = {"local_work": {"epochs": 1}, "optimizer": {"optimizer": "adam"}}.get(part, {part: 1})
    strict = TrainingPlan(
        batch_size=32, optimizer=SGD, seed=7, epochs=3, overridable=tuple(other for other in PARTS if other != part)
    )
    plan, refused = apply_overrides(strict, SiteOverrides(**setting))
    assert plan == strict
    assert len(refused) == 1
    assert part in refused[0]


def test_epochs_and_steps_are_not_overridden_together() -> None:
    with pytest.raises(InvalidError, match="only one"):
        SiteOverrides(epochs=1, steps=1)
