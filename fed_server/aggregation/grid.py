"""The power-of-two grid on which sums are exact.

Every contribution (value times weight) is rounded once to a whole multiple of 2**exponent. Sums of whole numbers below 2**53 are
exact in float64, so addition is associative: no order, restart or tree of partial sums changes a bit. The exponent of each
tensor is fixed in the transaction that opens the round, from the base model and the run's policy only, never from an update.

    bound     B = 2**ceil(log2(max(8 maxabs(base), 8 floor, reach)))      one value of one update may not exceed it
    step      2**(log2 B + ceil(log2(cohort_limit * max_weight)) - 52)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log2

from fed_core.errors import ConfigError
from fed_core.specs import TensorSpec, is_floating

# A parameter that starts at zero may still move by 8 * 2**-1; a running statistic that starts at zero takes on the scale of the
# data in its first round, so its floor is wider at the price of a coarser (still 2**-16) step.
PARAMETER_FLOOR = 2.0**-1
BUFFER_FLOOR = 2.0**7

# Resolution of the mean that a policy must keep, relative to the bound.
COARSEST_RESOLUTION = 2.0**-26

DEFAULT_MAX_WEIGHT = 2**20

_SUM_BITS = 52


@dataclass(frozen=True)
class GridPolicy:
    """What fixes a run's grids besides the model: at most `cohort_limit` updates a round, each of a weight of at most
    `max_weight`; `bound` replaces the bound that follows from the model, and `reach` is what it is at least: how far noise on
    updates may go."""

    cohort_limit: int
    max_weight: int
    bound: float | None = None
    reach: float = 0.0

    @property
    def weight_bits(self) -> int:
        """Bits that the sum of all weights may take."""
        return ceil(log2(self.cohort_limit * self.max_weight)) if self.cohort_limit * self.max_weight > 1 else 0

    @property
    def resolution(self) -> float:
        """Largest rounding error of the mean relative to the bound, when all weights are 1: the worst case."""
        return 2.0 ** (self.weight_bits - _SUM_BITS - 1)


def grid_policy(cohort_limit: int, max_weight: int | None, bound: float | None, reach: float = 0.0) -> GridPolicy:
    """The policy of a run; without a `max_weight` the largest that keeps the resolution, at most 2**20.

    Raises ConfigError where the mean would be coarser than 2**-26 of the bound.
    """
    largest = int(COARSEST_RESOLUTION * 2.0 ** (_SUM_BITS + 1)) // cohort_limit
    policy = GridPolicy(cohort_limit, max_weight or max(1, min(DEFAULT_MAX_WEIGHT, largest)), bound, reach)
    if policy.resolution > COARSEST_RESOLUTION:
        raise ConfigError(
            f"aggregation.max_weight: {max_weight} with up to {cohort_limit} updates a round makes the mean coarser than 2^-26 "
            f"of the largest value; expected at most {largest}: lower max_weight or the cohort"
        )
    return policy


def bound_exponent(spec: TensorSpec, max_abs: float, policy: GridPolicy) -> int:
    """log2 of the largest absolute value that an update may hold in this tensor."""
    if policy.bound is not None:
        return ceil(log2(policy.bound))
    floor = BUFFER_FLOOR if spec.role == "buffer" else PARAMETER_FLOOR
    return ceil(log2(max(8 * max(max_abs, floor), policy.reach)))


def make_grid(specs: Sequence[TensorSpec], max_abs: Mapping[str, float], policy: GridPolicy) -> dict[str, int]:
    """Exponent of the step of every floating tensor, by name. `max_abs` holds the base model's largest absolute values."""
    grid = {}
    for spec in specs:
        if not is_floating(spec.dtype):
            continue
        largest = max_abs.get(spec.name, 0.0)
        if not isfinite(largest):
            raise ConfigError(
                f"tensor {spec.name!r} of the base model holds NaN or infinity; nothing can be averaged onto it"
            )
        grid[spec.name] = bound_exponent(spec, largest, policy) + policy.weight_bits - _SUM_BITS
    return grid


def bounds_of(grid: Mapping[str, int], policy: GridPolicy) -> dict[str, float]:
    """The bound of every tensor of a grid, by name."""
    return {name: 2.0 ** (exponent + _SUM_BITS - policy.weight_bits) for name, exponent in grid.items()}
