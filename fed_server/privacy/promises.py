"""What the sites of a run promise where each of them protects its data by itself. The coordinator keeps no account of it. Pure."""

from __future__ import annotations

from functools import lru_cache

from fed_core.plan import PrivacyPlan
from fed_core.privacy.accounting import Epsilon, Spend, check_delta, claim, epsilon, rounded_up
from fed_core.privacy.mechanism import DISTANCE_PER_NUMBER, local

_KEPT_BY_SITES = (
    "Given by each site itself, which keeps its own account: `fed-client privacy` there shows what it spent. The coordinator "
    "cannot see whether a site does as it was told."
)


@lru_cache(maxsize=4096)
def sites_claim(plan: PrivacyPlan, count: int, num_numbers: int) -> str:
    """The guarantee in words for a site that sent `count` updates, each of at most `num_numbers` numbers. Takes as long as the
    accountant does."""
    if plan.kind == "local":
        one, whole = (claimed_epsilon(plan, each, num_numbers) for each in (1, count))
        spends = [Spend(local(plan.clipping_norm, plan.noise_multiplier), count)]
        words = claim(spends, whole, plan.delta, count * num_numbers * DISTANCE_PER_NUMBER)
        return (
            "Local differential privacy for each site, towards everybody, the coordinator included. What a site has spent that "
            f"sent {count:,} update{'s' if count > 1 else ''}: {words} One update costs epsilon "
            f"{rounded_up(one.reported, 4):g}.{_limit(plan)} {_KEPT_BY_SITES}"
        )
    return (
        "Example-level differential privacy for the data of each site, towards everybody, the coordinator included: DP-SGD with "
        f"the gradient of each example cut to L2 norm {plan.clipping_norm:g} and Gaussian noise of standard deviation "
        f"{plan.noise_multiplier * plan.clipping_norm:g} on every step's sum, batches drawn by independent coins, delta "
        f"{plan.delta:g}. Neighbouring data sets differ by adding or removing one example of one site; what a site's examples have "
        "in common is not hidden. Epsilon hangs on how many examples a site has, which only the site knows."
        f"{_limit(plan)} {_KEPT_BY_SITES}"
    )


def claimed_epsilon(plan: PrivacyPlan, count: int, num_numbers: int) -> Epsilon:
    """What `count` updates cost a site by local noise. Takes as long as the accountant does."""
    mechanism = local(plan.clipping_norm, plan.noise_multiplier)
    return epsilon([Spend(mechanism, count)], plan.delta, distance=count * num_numbers * DISTANCE_PER_NUMBER)


def sites_notices(plan: PrivacyPlan, cohort_size: int, num_rounds: int, num_numbers: int) -> list[str]:
    """What to tell whoever submits a run. Takes as long as the accountant does."""
    if plan.kind == "examples":
        promised = (
            f"differential privacy for single examples: each site trains by DP-SGD at delta {plan.delta:g}, and only the site "
            "knows its epsilon, which hangs on how many examples it has"
        )
        warning = None
    else:
        one, whole = (claimed_epsilon(plan, count, num_numbers).reported for count in (1, num_rounds))
        promised = (
            f"local differential privacy for whole sites: one update costs a site epsilon {one:.4g} at delta {plan.delta:g}, and "
            f"one in each of {num_rounds} rounds {whole:.4g}, towards everybody, this coordinator included"
        )
        warning = check_delta(plan.delta, cohort_size)
    notices = [promised, f"each site keeps its own account, which `fed-client privacy` there shows.{_limit(plan)}"]
    return [*notices, *([f"privacy.delta: {warning}"] if warning else [])]


def _limit(plan: PrivacyPlan) -> str:
    if plan.max_epsilon is None:
        return ""
    return (
        f" A site refuses what would bring it above epsilon {plan.max_epsilon:g} on population {plan.population!r}, other runs "
        "included."
    )
