"""The demo's child processes: daemons that are started again when somebody kills them, and commands that are waited for."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Final, Self

STOP_SECONDS: Final = 15.0
COMMAND_SECONDS: Final = 120.0
MAX_RESTARTS: Final = 5
_POLL_SECONDS: Final = 0.1
_TAIL_LINES: Final = 15
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


class ProcessError(Exception):
    """A process ended as it should not have; `tail` holds the last lines that it wrote."""

    def __init__(self, message: str, tail: str) -> None:
        super().__init__(message)
        self.tail = tail


class Daemon:
    """A process that should run until it is stopped. Both of its streams go to `log`, which grows over restarts."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.command, self.log = name, list(command), log
        self.num_restarts = 0
        self.process = self._start()

    def start_again(self) -> None:
        """After its death."""
        self.num_restarts += 1
        self.process = self._start()

    @property
    def died_of(self) -> str | None:
        """How it ended, in words; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        return f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"

    def tail(self) -> str:
        """The last lines of its log."""
        return tail(self.log)

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for the demo, which then stops everything in order.
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_the_demo,
            )


class Crew:
    """All daemons of the demo. As a context manager it stops them at the end, the newest first, and waits until they are gone."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.daemons: list[Daemon] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], log: Path) -> Daemon:
        """Starts a daemon."""
        daemon = Daemon(name, command, log)
        self.daemons.append(daemon)
        return daemon

    def dead(self) -> list[Daemon]:
        """Those that ended though nobody stopped them. Raises ProcessError for one that failed by itself: only the killed are
        worth another start."""
        dead = [daemon for daemon in self.daemons if daemon.died_of is not None]
        for daemon in dead:
            if daemon.process.returncode > 0 or daemon.num_restarts == MAX_RESTARTS:
                raise ProcessError(f"{daemon.name} {daemon.died_of}; the end of {daemon.log}:", daemon.tail())
        return dead

    def revive(self) -> None:
        """Starts again who was killed, as a service manager would."""
        for daemon in self.dead():
            self._say(f"[yellow]{daemon.name} {daemon.died_of}; starting it again[/]")
            daemon.start_again()

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Waits, and keeps the crew alive. Raises ProcessError where it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                newest = self.daemons[-1]
                raise ProcessError(
                    f"{what} did not happen within {seconds:.0f} s; the end of {newest.log}:", newest.tail()
                )
            self.revive()
            time.sleep(_POLL_SECONDS)

    def run(self, command: Sequence[str], log: Path) -> str:
        """Runs a command to its end, and returns what it wrote to stdout. Raises ProcessError where it fails; its stderr goes to
        `log`."""
        with log.open("ab") as errors, TemporaryFile() as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
            try:
                self.wait_until(lambda: process.poll() is not None, " ".join(command[1:3]), COMMAND_SECONDS)
            finally:
                _end(process)
            if process.returncode:
                raise ProcessError(f"{' '.join(command[1:3])} failed; the end of {log}:", tail(log))
            output.seek(0)
            return output.read().decode()

    def show(self, command: Sequence[str], log: Path) -> int:
        """Runs a command that draws on our terminal, and returns its exit status. When a daemon is killed the drawing is
        interrupted, so that the news has a line of its own."""
        while True:
            with log.open("ab") as errors:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors)
                try:
                    while (status := process.poll()) is None and not self.dead():
                        time.sleep(_POLL_SECONDS)
                finally:
                    _end(process)
            if status is not None:
                return status
            self.revive()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for who does not end in time."""
        for daemon in reversed(self.daemons):
            with suppress(ProcessLookupError):
                daemon.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for daemon in reversed(self.daemons):
            try:
                daemon.process.wait(max(0.0, deadline - time.monotonic()))
            except BaseException:  # out of time, or out of patience: a second Ctrl-C
                daemon.process.kill()
                daemon.process.wait()
        self.daemons.clear()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a command that still runs, and waits for it: a terminal that it drew on is left in order."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_with_the_demo() -> None:
    """In the child before it becomes the daemon: even if the demo itself is killed, Linux ends what it started."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def tail(log: Path) -> str:
    """The last lines of a file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
