"""How much an update counts by its staleness, the versions that were committed while it was made.

Weights are whole multiples of 2^-16, worked out in decimal arithmetic, so that every machine has the same; exact sums are made of
them as of any other weights (see `grid`).
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, Final

from fed_server.config import StalenessConfig

ONE: Final = 2**16
"""The weight of an update that is not stale."""

# s(t) by the `kind` of its config; Nguyen et al. 2022 (https://arxiv.org/abs/2106.06639, section 5) take "polynomial" with 1/2.
STALENESS_RULES: Final[dict[str, Callable[[Any, int], Decimal]]] = {
    "constant": lambda config, staleness: Decimal(1),
    "polynomial": lambda config, staleness: Decimal(1 + staleness) ** -Decimal(config.exponent),
}


def staleness_weights(config: StalenessConfig, max_staleness: int) -> tuple[int, ...]:
    """The weights of updates of staleness 0 to `max_staleness`, in units of 2^-16: `ONE` at the most, 1 at the least."""
    rule = STALENESS_RULES[config.kind]
    with localcontext(prec=28):
        return tuple(max(1, int((rule(config, t) * ONE).to_integral_value())) for t in range(max_staleness + 1))
