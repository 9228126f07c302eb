"""The two clocks, handed in so that tests can move them."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What time it is."""

    def now(self) -> float:
        """Seconds since the epoch: shown to people, never decided upon."""
        ...

    def monotonic(self) -> float:
        """Seconds of uptime from some point: for deadlines and leases."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """See `Clock.now`."""
        return time.time()

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()
