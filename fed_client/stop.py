"""A request to stop one piece of work, with its reason."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StoppedError(Exception):
    """The work was told to stop; `str` is the reason."""


class Stop:
    """Set once, with a reason, from any thread; wakes waiters and calls whoever registered to be interrupted."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._interrupts: list[Callable[[], object]] = []
        self.reason = ""

    def set(self, reason: str) -> None:
        """Asks the work to stop. The first reason stands. Interrupts run in the caller's thread and must not block."""
        for interrupt in self.mark(reason):
            interrupt()

    def mark(self, reason: str) -> list[Callable[[], object]]:
        """The first half of `set`, for a caller that holds a lock: returns the interrupts to call once it is released."""
        with self._lock:
            if self._event.is_set():
                return []
            self.reason = reason
            self._event.set()
            return list(self._interrupts)

    @property
    def is_set(self) -> bool:
        """Whether the work was told to stop."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises StoppedError if the work was told to stop."""
        if self._event.is_set():
            raise StoppedError(self.reason)

    def wait(self, seconds: float) -> None:
        """Sleeps, and raises StoppedError as soon as the work is told to stop."""
        self._event.wait(seconds)
        self.check()

    def sleep(self, seconds: float) -> None:
        """Sleeps, at most until told to stop."""
        self._event.wait(seconds)

    @contextmanager
    def interrupting(self, interrupt: Callable[[], object]) -> Iterator[None]:
        """While the block runs, `set` calls `interrupt`; raises StoppedError instead of entering where it is already set."""
        with self._lock:
            if self._event.is_set():
                raise StoppedError(self.reason)
            self._interrupts.append(interrupt)
        try:
            yield
        finally:
            with self._lock:
                self._interrupts.remove(interrupt)
