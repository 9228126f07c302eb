"""From what clients measured to one figure each."""

from __future__ import annotations

from collections.abc import Iterable
from math import fsum, isfinite, nan

from fed_server.store.base import AssignmentRecord, Metrics


def mean_metrics(received: Iterable[AssignmentRecord]) -> Metrics:
    """Means weighted by examples, each over those who measured it. Values that are not finite are left out; where nobody's is,
    the mean is NaN: a diverged model is seen, and is no gain. The sum is rounded once (fsum), so the order does not matter."""
    values: dict[str, list[tuple[float, int]]] = {}
    for assignment in received:
        for name, value in assignment.metrics.items():
            if assignment.num_examples > 0:
                finite = values.setdefault(name, [])
                if isfinite(value):
                    finite.append((value, assignment.num_examples))
    return {name: _mean(pairs) for name, pairs in sorted(values.items())}


def _mean(pairs: list[tuple[float, int]]) -> float:
    if not pairs:
        return nan
    return fsum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
