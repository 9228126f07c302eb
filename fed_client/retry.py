"""Which errors of a transfer pass by themselves, and how long to wait for that."""

from __future__ import annotations

from typing import Any

from fed_client.backoff import Backoff
from fed_client.stop import Stop
from fed_client.transport import StalledError
from fed_core.errors import (
    BusyError,
    DiskFullError,
    FedstreamError,
    InternalError,
    OffsetError,
    UnavailableError,
    WrongPhaseError,
)

# The coordinator is away, full, or stumbled: nothing is wrong with what was asked.
PASSING = (BusyError, UnavailableError, DiskFullError, OffsetError, WrongPhaseError, InternalError)
_MAX_PATIENCE = 16.0


class Retries:
    """The waits of one transfer. Goes on for ever: the work behind it is not to be lost, and the coordinator says when nobody
    wants it any longer."""

    def __init__(self, stop: Stop, log: Any) -> None:
        self._stop = stop
        self._log = log
        self._backoff = Backoff()
        self.patience = 1.0
        """Factor on the stall watchdog, doubled by each stall: what a slow line still holds in its buffers looks like one, and
        no line is to be too slow for us."""

    def wait(self, error: FedstreamError) -> None:
        """Waits as the error asks for. Raises StoppedError as soon as the work is dropped."""
        if isinstance(error, BusyError):
            seconds = self._backoff.within(error.retry_after_seconds)
            self._log.debug("waiting for a free transfer", seconds=round(seconds, 2))
        else:
            if isinstance(error, StalledError):
                self.patience = min(self.patience * 2, _MAX_PATIENCE)
            seconds = self._backoff.next_seconds()
            # The second failure is news, every tenth a reminder; the first is often a restart that is over at once.
            level = (
                self._log.warning
                if self._backoff.attempts == 2 or self._backoff.attempts % 10 == 0
                else self._log.debug
            )
            level("coordinator not available, trying again", error=str(error), seconds=round(seconds, 2))
        self._stop.wait(seconds)

    def progressed(self) -> None:
        """Bytes moved since the last failure: begin with short waits again."""
        self._backoff.reset()
