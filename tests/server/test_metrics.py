"""Means over clients."""

from __future__ import annotations

from math import inf, isnan, nan

from fed_server.rounds.metrics import mean_metrics
from fed_server.store.base import AssignmentKind, AssignmentRecord, AssignmentState, Metrics


def measured(num_examples: int, metrics: Metrics) -> AssignmentRecord:
    return AssignmentRecord(
        assignment_id="a", run_id="r", round=1, client_id="c", kind=AssignmentKind.EVALUATE, state=AssignmentState.RECEIVED,
        model_version=1, created_time=0.0, num_examples=num_examples, metrics=metrics,
    )  # fmt: skip


def test_means_are_weighted_by_examples_over_those_who_measured() -> None:
    assert mean_metrics([measured(1, {"a": 1.0, "b": 5.0}), measured(3, {"a": 0.0})]) == {"a": 0.25, "b": 5.0}


def test_values_that_are_not_finite_are_left_out_unless_there_is_no_other() -> None:
    means = mean_metrics([measured(1, {"a": nan, "b": inf}), measured(3, {"a": 0.5, "b": nan})])
    assert means["a"] == 0.5
    assert isnan(means["b"])


def test_who_had_no_examples_counts_for_nothing() -> None:
    assert mean_metrics([measured(0, {"a": 1.0})]) == {}
