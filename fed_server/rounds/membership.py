"""Who is there, and how far their work is: in memory only, rebuilt from the next polls after a start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Presence:
    """What a client said of itself at its last poll. Times are of the monotonic clock."""

    last_seen: float
    labels: Mapping[str, str] = field(default_factory=dict)
    workloads: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far an assignment is: the units depend on the phase (bytes, steps, examples). `since` and `at` are the monotonic times of
    the first and the last report of this phase."""

    phase: str
    done: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    since: float = 0.0
    first_done: int = 0
    at: float = 0.0

    def eta_seconds(self) -> float:
        """Estimated seconds to the end of the phase; -1 where unknown."""
        moved = self.done - self.first_done
        if moved <= 0 or self.total <= 0 or self.at <= self.since:
            return -1.0
        return (self.total - self.done) * (self.at - self.since) / moved


class Membership:
    """The clients' leases and progress. `started` is the monotonic time of the coordinator's start."""

    def __init__(self, lease_seconds: float, started: float) -> None:
        self.lease_seconds = lease_seconds
        self.started = started
        self._presence: dict[str, Presence] = {}
        self._progress: dict[str, Progress] = {}

    def announce(self, client_id: str, now: float, labels: Mapping[str, str], workloads: Mapping[str, str]) -> bool:
        """Renews a lease with what the client says of itself; true where that is news (a newcomer, or another offer)."""
        known = self._presence.get(client_id)
        presence = Presence(now, dict(labels), dict(workloads))
        self._presence[client_id] = presence
        return (
            known is None
            or now - known.last_seen > self.lease_seconds
            or (known.labels, known.workloads) != (presence.labels, presence.workloads)
        )

    def renew(self, client_id: str, now: float) -> None:
        """Renews a lease without news."""
        known = self._presence.get(client_id, Presence(now))
        self._presence[client_id] = Presence(now, known.labels, known.workloads)

    def presence(self, client_id: str) -> Presence | None:
        """What the client last said; None where it has not called since the start."""
        return self._presence.get(client_id)

    def is_alive(self, client_id: str, now: float) -> bool:
        """Whether the client called within the lease."""
        presence = self._presence.get(client_id)
        return presence is not None and now - presence.last_seen <= self.lease_seconds

    def silent_seconds(self, client_id: str, now: float) -> float:
        """Seconds since the client's last call, or since the start where it has not called."""
        presence = self._presence.get(client_id)
        return now - (presence.last_seen if presence else self.started)

    def report(
        self,
        assignment_id: str,
        now: float,
        phase: str,
        done: int,
        total: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Notes how far an assignment is."""
        known = self._progress.get(assignment_id)
        if known is None or known.phase != phase:
            known = Progress(phase, since=now, first_done=done)
        self._progress[assignment_id] = Progress(
            phase, done, total, dict(metrics or known.metrics), known.since, known.first_done, now
        )

    def progress(self, assignment_id: str) -> Progress | None:
        """The last report."""
        return self._progress.get(assignment_id)

    def forget(self, assignment_id: str) -> None:
        """Drops the progress of an assignment that is over."""
        self._progress.pop(assignment_id, None)
