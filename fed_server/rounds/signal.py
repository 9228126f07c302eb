"""Waking those who wait for a change."""

from __future__ import annotations

import asyncio


class Signal:
    """A change that any number of tasks may wait for. A task that looks at the state, then waits, misses nothing: `wait` takes the
    count that it last saw."""

    def __init__(self) -> None:
        self.count = 0
        self._next: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Wakes everybody."""
        self.count += 1
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
        self._next = None

    async def wait(self, seen: int, timeout_seconds: float) -> int:
        """Returns as soon as the count differs from `seen`, or after the timeout; the count now."""
        if self.count == seen and timeout_seconds > 0:
            if self._next is None:
                self._next = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._next], timeout=timeout_seconds)
        return self.count
