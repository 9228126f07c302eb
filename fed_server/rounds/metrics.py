"""From what clients measured to one figure each."""

from __future__ import annotations

from collections.abc import Iterable
from math import fsum, isfinite

from fed_server.store.base import AssignmentRecord, Metrics


def mean_metrics(received: Iterable[AssignmentRecord]) -> Metrics:
    """Means weighted by examples, each over those who measured it; values that are not finite are left out. The sum is rounded
    once (fsum), so the order does not matter."""
    values: dict[str, list[tuple[float, int]]] = {}
    for assignment in received:
        for name, value in assignment.metrics.items():
            if isfinite(value) and assignment.num_examples > 0:
                values.setdefault(name, []).append((value, assignment.num_examples))
    return {
        name: fsum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
        for name, pairs in sorted(values.items())
    }
