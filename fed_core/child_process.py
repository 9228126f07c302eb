"""Running other people's code in a process of its own: both ends of a pipe that speaks JSON, a line per message.

The parent sends one request at a time; the child answers with any number of progress lines and then a result or an error. The
child stays warm between requests. Whatever it prints goes to the log: the pipe of answers is out of its reach. It ignores Ctrl-C,
which is the parent's to decide on, and does not outlive the parent. The parent needs nothing of what the child imports.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from fed_core.errors import FedstreamError

Json = dict[str, Any]
OnProgress = Callable[[int, int, Mapping[str, float]], None]
"""Called with (done, total, what was measured so far)."""

DIED: Final = "DIED"
CANCELLED: Final = "CANCELLED"

_TAIL_LINES: Final = 20
_MAX_LOG_BYTES: Final = 8 * 1024 * 1024
_MAX_TRACEBACK: Final = 32 * 1024
_PROGRESS_SECONDS: Final = 0.25
_CHECK_SECONDS: Final = 0.5
_CLOSE_SECONDS: Final = 3.0
_PR_SET_PDEATHSIG: Final = 1


class ChildError(Exception):
    """A request failed. `kind` is the child's word for why, or DIED or CANCELLED; `traceback` is that of the code at fault, or
    the last lines of a dead child's log."""

    def __init__(self, kind: str, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.traceback = traceback


class ChildProcess:
    """The parent's handle of `python -m module`: started by the first call, and again by the next one after it died.

    Thread-safe; calls wait for each other. `settings` is sent to every new child before anything else. `log_path` receives what
    the child prints, and is put aside as `<name>.1` at 8 MiB. On Linux a child also dies with the thread that started it.
    """

    def __init__(self, module: str, settings: Mapping[str, Any], log_path: Path | None = None) -> None:
        self._module = module
        self._settings = settings
        self._log_path = log_path
        self._calls = threading.Lock()
        self._state = threading.Lock()
        self._running: _Running | None = None
        self._is_busy = self._is_cancelled = self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def call(self, request: Mapping[str, Any], on_progress: OnProgress | None = None) -> Json:
        """Sends a request and waits for its result. Raises ChildError. What `on_progress` raises kills the child and passes
        through."""
        with self._calls:
            with self._state:
                self._is_busy, self._is_cancelled = True, False
            try:
                running = self._started()
                try:
                    return running.ask(request, on_progress)
                except (EOFError, BrokenPipeError):
                    raise self._explain_death(running) from None
                except ChildError:
                    raise
                except BaseException:
                    running.kill()
                    raise
            finally:
                with self._state:
                    self._is_busy = False

    def cancel(self) -> None:
        """From any thread: kills the child if it is at work; the call raises ChildError of kind CANCELLED."""
        with self._state:
            if self._is_busy:
                self._is_cancelled = True
                if self._running is not None:
                    self._running.kill()

    def close(self) -> None:
        """Ends the child, at once if it is at work; no call is answered afterwards. Closing twice is harmless."""
        self.cancel()
        with self._state:
            self._is_closed = True
        # The call at work notices within moments; its pipes are not closed under it.
        is_ours = self._calls.acquire(timeout=_CLOSE_SECONDS)
        try:
            with self._state:
                running, self._running = self._running, None
            if running is not None:
                running.close()
        finally:
            if is_ours:
                self._calls.release()

    @property
    def pid(self) -> int | None:
        """Process id of the child; None where there is none."""
        with self._state:
            return self._running.process.pid if self._running is not None and self._running.is_alive else None

    def _started(self) -> _Running:
        with self._state:
            if self._is_closed or self._is_cancelled:
                raise self._cancelled()
            if self._running is None or not self._running.is_alive:
                if self._running is not None:
                    self._running.close()
                self._running = _Running(self._module, self._settings, self._log_path)
            return self._running

    def _explain_death(self, running: _Running) -> ChildError:
        status, log = running.close()
        with self._state:
            if self._is_cancelled or self._is_closed:
                return self._cancelled()
        last_words = f"; its last line was: {log[-1]}" if log else ""
        return ChildError(DIED, f"the process {_describe_exit(status)}{last_words}", "\n".join(log))

    def _cancelled(self) -> ChildError:
        return ChildError(CANCELLED, "the work was cancelled")


class _Running:
    """One life of the child."""

    def __init__(self, module: str, settings: Mapping[str, Any], log_path: Path | None) -> None:
        # -u: what it prints must not be lost when it dies; faulthandler: a segmentation fault names the line of Python;
        # -P: the folder that the daemon happens to run in is no place to import from.
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-X", "faulthandler", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A session of its own: neither a terminal's Ctrl-C nor a kill of this group reaches beyond it.
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
        self._requests = self.process.stdin
        self._answers = self.process.stdout
        self._buffer = bytearray()
        self._log = _Log(self.process.stderr, log_path)
        self._settings: Mapping[str, Any] | None = settings
        self._is_doomed = False

    @property
    def is_alive(self) -> bool:
        return not self._is_doomed and self.process.poll() is None

    def ask(self, request: Mapping[str, Any], on_progress: OnProgress | None) -> Json:
        """Raises EOFError or BrokenPipeError where the child died."""
        if self._settings is not None:
            self._send(self._settings)
            self._settings = None
        self._send(request)
        while True:
            answer = self._receive()
            if "progress" in answer:
                if on_progress is not None:
                    done, total, metrics = answer["progress"]
                    on_progress(done, total, metrics)
            elif "error" in answer:
                raise ChildError(**answer["error"])
            else:
                result: Json = answer["result"]
                return result

    def kill(self) -> None:
        """Ends it and what it started; `is_alive` is false from then on."""
        self._is_doomed = True
        if self.process.poll() is None:
            self._kill_group()

    def close(self) -> tuple[int, list[str]]:
        """Lets it end if it is idle, else ends it; returns its exit status and the last lines of its log."""
        with suppress(BrokenPipeError):
            self._requests.close()
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        status = self.process.wait()
        # What it left behind; the id of a group is not given anew while a member lives, and an empty one is no error.
        self._kill_group()
        log = self._log.finish()
        self._answers.close()
        return status, log

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _send(self, message: Mapping[str, Any]) -> None:
        self._requests.write(json.dumps(message).encode() + b"\n")
        self._requests.flush()

    def _receive(self) -> Json:
        while (end := self._buffer.find(b"\n")) < 0:
            # The end of the pipe is not enough: a process that the child left behind may hold it open.
            if select.select([self._answers], [], [], _CHECK_SECONDS)[0]:
                data = os.read(self._answers.fileno(), 65536)
                if not data:
                    raise EOFError
                self._buffer += data
            elif not self.is_alive:
                raise EOFError
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        answer: Json = json.loads(line)
        return answer


class _Log:
    """Drains what a child prints into a bounded file, and remembers the last lines."""

    def __init__(self, stream: IO[bytes], path: Path | None) -> None:
        self._stream = stream
        self._path = path
        self._tail = b""
        self._thread = threading.Thread(target=self._drain, name="child-log", daemon=True)
        self._thread.start()

    def finish(self) -> list[str]:
        """The last lines, once the child is dead."""
        self._thread.join(1.0)  # longer only where a grandchild still holds the pipe
        if not self._thread.is_alive():
            self._stream.close()
        lines = [line.rstrip() for line in self._tail.decode(errors="replace").splitlines()]
        return [line for line in lines if line][-_TAIL_LINES:]

    def _drain(self) -> None:
        while data := os.read(self._stream.fileno(), 65536):
            self._tail = (self._tail + data)[-16384:]
            # A log that cannot be written must not stop the training.
            if self._path is not None:
                with suppress(OSError):
                    self._append(self._path, data)

    @staticmethod
    def _append(path: Path, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)
            is_full = file.tell() > _MAX_LOG_BYTES
        if is_full:
            os.replace(path, path.with_name(path.name + ".1"))


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = ", perhaps because the machine ran out of memory" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


class Channel:
    """The child's end. `open` it before importing anything that may print."""

    def __init__(self, requests: queue.SimpleQueue[Json | None], answers: int) -> None:
        self._requests = requests
        self._answers = answers
        self._is_working = threading.Event()

    @classmethod
    def open(cls) -> Channel:
        """Takes the pipes for itself, lets prints go to the log, ignores Ctrl-C, and ties its life to the parent's."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _die_with_parent()
        answers = os.dup(1)
        os.dup2(2, 1)
        channel = cls(queue.SimpleQueue(), answers)
        threading.Thread(target=channel._listen, args=(os.dup(0),), name="requests", daemon=True).start()
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        return channel

    def settings(self) -> Json:
        """The first message."""
        message = self._requests.get()
        if message is None:
            raise SystemExit(0)
        return message

    def serve(self, answer: Callable[[Json, OnProgress], Json], kind_of: Callable[[BaseException], str]) -> None:
        """Answers requests until the parent closes the pipe. What `answer` raises becomes an error of its `kind_of`."""
        while (request := self._requests.get()) is not None:
            self._is_working.set()
            try:
                self._send({"result": answer(request, self._throttled())})
            except BaseException as error:
                self._send({"error": {"kind": kind_of(error), "message": _explain(error), "traceback": _trace(error)}})
            self._is_working.clear()

    def _listen(self, requests: int) -> None:
        with open(requests, "rb") as lines:
            for line in lines:
                self._requests.put(json.loads(line))
        self._requests.put(None)
        # Idle, it ends in good order; at work, or if that takes too long, nobody is left to read the answer.
        if not self._is_working.is_set():
            time.sleep(_CLOSE_SECONDS - 1)
        os._exit(0)

    def _throttled(self) -> OnProgress:
        due = 0.0

        def report(done: int, total: int, metrics: Mapping[str, float]) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due or done == total:
                due = now + _PROGRESS_SECONDS
                self._send({"progress": [done, total, dict(metrics)]})

        return report

    def _send(self, message: Json) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._answers, data) :]


def _die_with_parent() -> None:
    """Asks Linux for a SIGKILL when the parent goes; elsewhere the end of the pipe must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _explain(error: BaseException) -> str:
    if isinstance(error, FedstreamError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"the code called sys.exit({error.code!r})"
    return "".join(traceback.format_exception_only(error)).strip()


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
