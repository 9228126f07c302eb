"""What the next poll has to say besides what is held, and the way to have it asked at once."""

from __future__ import annotations

import threading
from typing import Final

from fed_client.stop import Stop
from fedstream.v1 import participation_pb2

# As many as a poll may name.
MAX_DIVERGENCES: Final = 64


class Question:
    """Between the threads that have news and the one that polls. Thread-safe, never blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._divergences: list[participation_pb2.Divergence] = []
        self._asking = Stop()

    def add(self, divergence: participation_pb2.Divergence) -> None:
        """Said in every poll until one is answered."""
        with self._lock:
            self._divergences = [*self._divergences, divergence][-MAX_DIVERGENCES:]

    def ask_now(self) -> None:
        """The poll that is out was asked before the caller's news: another takes its place. Its answer may be lost, harmlessly."""
        with self._lock:
            asking = self._asking
        asking.set("there is news")

    def begin(self) -> tuple[Stop, list[participation_pb2.Divergence]]:
        """For the poll that begins now, before it looks at anything else: what ends it early, and what it has to say."""
        with self._lock:
            self._asking = Stop()
            return self._asking, self._divergences

    def answered(self, divergences: list[participation_pb2.Divergence]) -> None:
        """These need not be said again."""
        with self._lock:
            self._divergences = [each for each in self._divergences if not any(each is said for said in divergences)]
