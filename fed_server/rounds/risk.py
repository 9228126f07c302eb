"""How likely it is that a random cohort holds more bad sites than the run's aggregator withstands."""

from __future__ import annotations

from bisect import bisect_right
from math import ceil, exp, expm1, inf, lgamma, log1p

from fed_server.config import RobustConfig, RunConfig
from fed_server.rounds.cohort import num_selected

# What a run may be asked to put up with, in the sentence that says how many bad sites are too many.
_ACCEPTED = 0.01


def cohort_risk(num_sites: int, num_bad: int, drawn: int, num_byzantine: int) -> float:
    """Probability that of `drawn` out of `num_sites` sites, drawn at random without replacement, more than `num_byzantine` are
    among the `num_bad` bad ones: the tail of the hypergeometric distribution, good to ten digits."""
    every = _log_choose(num_sites, drawn)
    first, last = max(num_byzantine + 1, drawn - (num_sites - num_bad)), min(drawn, num_bad)
    tail = (
        exp(_log_choose(num_bad, k) + _log_choose(num_sites - num_bad, drawn - k) - every)
        for k in range(first, last + 1)
    )
    return min(1.0, sum(tail))


def run_risk(chance: float, num_rounds: int) -> float:
    """Probability that what happens in a round with a given chance happens in at least one of so many rounds."""
    return 1.0 if chance >= 1 else abs(expm1(num_rounds * log1p(-chance)))


def most_bad_sites(num_sites: int, drawn: int, num_byzantine: int, num_rounds: int, accepted: float) -> int:
    """The most bad sites with which the risk of a run is at most `accepted`."""

    def risk(num_bad: int) -> float:
        return run_risk(cohort_risk(num_sites, num_bad, drawn, num_byzantine), num_rounds)

    return bisect_right(range(num_sites + 1), accepted, key=risk) - 1


def risk_notice(config: RunConfig, aggregation: RobustConfig, num_sites: int) -> str:
    """What to tell whoever submits a run; `num_sites` of them may be drawn. Cohorts are drawn anew each round, and all that are
    drawn may send an update before the round closes, so over-selection counts."""
    cohort, f, num_rounds = config.cohort, aggregation.num_byzantine, config.schedule.max_rounds
    drawn = min(num_sites, num_selected(cohort.size, cohort.over_selection))
    bad = aggregation.num_byzantine_population
    assumed = ""
    if bad is None:
        bad = ceil(num_sites * f / cohort.size)
        assumed = ", as large a part as num_byzantine is of cohort.size"
    bad = min(bad, num_sites)
    sites = f"{drawn} of {num_sites} sites (those that are here, at least cohort.min_clients)"
    chance = cohort_risk(num_sites, bad, drawn, f)
    most = most_bad_sites(num_sites, drawn, f, num_rounds, _ACCEPTED)
    return (
        f"{aggregation.kind} withstands {f} bad updates a round. Each round draws {sites}: with {bad} bad ones among "
        f"them{assumed}, one round holds more than {f} with probability {chance:.2g}, and at least one of {num_rounds} rounds with "
        f"{run_risk(chance, num_rounds):.2g}. Up to {most} bad sites keep the latter to {_ACCEPTED:.0%}"
    )


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) if 0 <= k <= n else -inf
