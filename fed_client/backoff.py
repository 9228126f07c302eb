"""How long to wait before trying again.

Exponential back-off with full jitter (Brooker 2015, https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/):
each wait is uniform between 0 and a ceiling that doubles, so that a thousand clients whose coordinator restarts do not come
back in step. We differ in a floor of a tenth of the ceiling: a run of tiny draws would hammer a coordinator that is down.
"""

from __future__ import annotations

from random import Random

FIRST_SECONDS = 0.2
CAP_SECONDS = 10.0


class Backoff:
    """A sequence of waits; `reset` after a success. Not thread-safe: each loop has its own."""

    def __init__(
        self, *, first_seconds: float = FIRST_SECONDS, cap_seconds: float = CAP_SECONDS, rng: Random | None = None
    ) -> None:
        self._first = first_seconds
        self._cap = cap_seconds
        self._rng = rng or Random()
        self.attempts = 0

    def next_seconds(self) -> float:
        """Seconds to wait now: uniform in [ceiling / 10, ceiling], the ceiling doubling with every call up to the cap."""
        # The exponent is bounded because 2**attempts of a daemon that waits for days would not fit a float.
        ceiling = min(self._cap, self._first * 2.0 ** min(self.attempts, 60))
        self.attempts += 1
        return self._rng.uniform(ceiling / 10, ceiling)

    def within(self, window_seconds: float) -> float:
        """Seconds to wait where the coordinator named a window: uniform in [a tenth of it, all of it], at least 20 ms."""
        window = min(max(window_seconds, 0.02), 60.0)
        return self._rng.uniform(window / 10, window)

    def reset(self) -> None:
        """Forgets the failures so far."""
        self.attempts = 0
