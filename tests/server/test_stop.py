"""When a run ends."""

from __future__ import annotations

from fed_server.rounds.stop import Best, StopRules, stop_reason, update_best

RULES = StopRules(max_rounds=10, metric="accuracy", direction="max", target=0.9, patience=3, max_seconds=100)


def test_the_best_version_is_the_first_with_the_best_metric() -> None:
    best = Best()
    for version, value in enumerate([0.5, 0.7, 0.7, 0.6], start=1):
        best = update_best(best, RULES, version, {"accuracy": value})
    assert best == Best(version=2, metric=0.7, num_without_gain=2)


def test_less_is_better_where_the_direction_says_so() -> None:
    rules = StopRules(max_rounds=10, metric="loss", direction="min", target=0.1)
    best = update_best(update_best(Best(), rules, 1, {"loss": 0.5}), rules, 2, {"loss": 0.05})
    assert best.version == 2
    assert stop_reason(rules, round=2, elapsed_seconds=0, best=best) == "target reached: loss 0.0500 in version 2"


def test_nan_is_no_gain_and_an_unmeasured_metric_changes_nothing() -> None:
    best = Best(version=1, metric=0.5)
    assert update_best(best, RULES, 2, {"accuracy": float("nan")}) == Best(1, 0.5, 1)
    assert update_best(best, RULES, 2, {"loss": 1.0}) == best


def test_each_rule_ends_the_run_with_its_reason() -> None:
    def reason(round: int = 1, seconds: float = 0, best: Best = Best()) -> str | None:  # noqa: B008
        return stop_reason(RULES, round=round, elapsed_seconds=seconds, best=best)

    assert reason() is None
    assert reason(round=10) == "all 10 rounds done"
    assert "run time are over" in (reason(seconds=100) or "")
    assert "target reached" in (reason(best=Best(3, 0.9)) or "")
    assert "no gain in accuracy for 3 evaluations" in (reason(best=Best(3, 0.5, 3)) or "")
