"""The daemon: what runs beside what, how it starts and how it stops.

    main       waits for signals, writes status.json
    poll       asks for work (session.py)
    cache      verifies the models of an earlier life, then ends (cache.py)
    work       fetches, trains, spools (worker.py); starts the trainer processes, which die with this thread
    upload     delivers the spool (worker.py)
    progress   reports how far things are (reports.py)
    outbox     delivers failures and evaluations (reports.py)

Stopping is the same as being killed, only politer: nothing is flushed, the state directory is always ready for the next start.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import structlog

from fed_client.cache import ModelCache
from fed_client.carried import CarriedState
from fed_client.download import Downloads
from fed_client.exit_codes import ExitCode, exit_code_of
from fed_client.models import Models
from fed_client.privacy import Limits, PrivacyLedger, SiteAccount
from fed_client.question import Question
from fed_client.reports import Outbox, ProgressReporter
from fed_client.session import PollLoop, enroll
from fed_client.settings import Settings
from fed_client.spool import Spool
from fed_client.state import StateDirectory
from fed_client.stop import Stop, StoppedError
from fed_client.training.trainer import Trainer, WorkloadError
from fed_client.transport import Transport
from fed_client.work import Held, WorkTable
from fed_client.worker import Uploader, Worker
from fed_core.errors import ConfigError, FedstreamError
from fed_core.workload import Site
from fedstream.v1 import common_pb2

STATUS_SECONDS = 1.0
# How long a stop waits for the threads; what they leave is what a kill would leave.
_JOIN_SECONDS = 2.0


def make_trainers(settings: Settings, state: StateDirectory) -> list[Trainer]:
    """A trainer for each workload source; none is started yet."""
    site = Site(name=settings.name, data=settings.data, options=settings.options)
    return [
        Trainer(source, site=site, device=settings.device, log_path=state.trainer_log) for source in settings.workload
    ]


class Daemon:
    """One site at work. `run` blocks in the main thread until a signal or a fatal error."""

    def __init__(self, settings: Settings, state: StateDirectory) -> None:
        """The caller holds the state directory's lock."""
        self._settings = settings
        self._state = state
        self._stop = Stop()
        # A queue, because a signal handler may not take the lock inside an Event that the main thread is waiting on.
        self._ended: queue.SimpleQueue[ExitCode] = queue.SimpleQueue()
        self._table = WorkTable()
        self._spool = Spool(state.spool)
        self._carried = CarriedState(state.carried, keep=settings.carried_runs)
        self._account = SiteAccount(PrivacyLedger(state.privacy), Limits(settings.max_epsilon, settings.max_delta))
        self._cache = ModelCache(state.cache, keep=settings.cache_models)
        self._question = Question()
        self._sources = make_trainers(settings, state)
        self._offered: dict[str, Trainer] = {}
        self._threads: list[threading.Thread] = []
        self._closers: list[Callable[[], None]] = []
        self._progress: ProgressReporter | None = None
        self._poll: PollLoop | None = None

    def run(self) -> ExitCode:
        """Works until told to stop; returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self._spawn("start", self._start)
        while True:
            try:
                code = self._ended.get(timeout=STATUS_SECONDS)
                break
            except queue.Empty:
                self._write_status()
        self._shut_down()
        return code

    # -- starting -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        identity = enroll(self._settings, self._state, self._stop)
        self._stop.check()
        transport = Transport(self._settings, identity)
        self._closers.append(transport.close)
        progress = ProgressReporter(transport, self._on_dropped, self._fatal)
        outbox = Outbox(transport, self._discard, self._fatal)
        self._progress = progress
        self._carried.sweep()
        for spooled in self._spool.scan():
            held = Held(spooled.assignment, common_pb2.WORK_PHASE_SPOOLED, spooled)
            self._table.add(held)
            progress.update(held.assignment_id, common_pb2.WORK_PHASE_SPOOLED)
            structlog.get_logger().info("found in the spool", bytes=spooled.total_bytes, **held.log_fields)
        uploader = Uploader(
            transport,
            self._spool,
            self._carried,
            self._account,
            self._table,
            progress,
            outbox,
            self._discard,
            self._fatal,
        )
        worker = Worker(
            self._settings,
            transport,
            self._offered,
            Models(Downloads(transport, self._cache), self._cache),
            self._cache,
            self._spool,
            self._carried,
            self._account,
            self._table,
            self._question,
            progress,
            outbox,
            self._discard,
            self._fatal,
        )
        self._poll = PollLoop(
            self._settings,
            transport,
            self._table,
            self._cache,
            self._question,
            on_dropped=self._on_dropped,
            on_refused=worker.refuse,
            fatal=self._fatal,
        )
        self._closers += [progress.close, outbox.close, self._poll.close]
        # What is trained already need not wait for torch to load.
        self._spawn("upload", uploader.run)
        self._spawn("progress", progress.run)
        self._spawn("outbox", outbox.run)
        verifying = self._spawn("cache", self._cache.verify)
        self._spawn("work", lambda: self._load_and_work(worker, verifying))

    def _load_and_work(self, worker: Worker, verifying: threading.Thread) -> None:
        """In the work thread because the trainer processes die with the thread that started them."""
        workloads = self._describe()
        # A site that asks before it knows what it holds is sent a whole model, which takes longer than a look at the disk.
        verifying.join()
        poll = self._poll
        assert poll is not None
        self._spawn("poll", lambda: poll.run(workloads))
        worker.run()

    def _describe(self) -> dict[str, str]:
        log = structlog.get_logger()
        versions: dict[str, str] = {}
        problems: list[str] = []
        for trainer, source in zip(self._sources, self._settings.workload, strict=True):
            try:
                description = trainer.describe()
            except WorkloadError as error:
                self._stop.check()
                log.error("workload does not load", workload=source, error=str(error), traceback=error.traceback)
                problems.append(f"{source}: {error}")
                continue
            if description.name in versions:
                raise ConfigError(f"workload {description.name!r} is given twice; give each once")
            versions[description.name] = description.version
            self._offered[description.name] = trainer
            log.info("workload offered", workload=description.name, version=description.version)
        if not versions:
            raise ConfigError("no workload loads: " + "; ".join(problems) + ". Try fed-client doctor")
        return versions

    def _spawn(self, name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guard, args=(target,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _guard(self, target: Callable[[], None]) -> None:
        """No thread ends unnoticed: a daemon that only seems to live is worse than one that its supervisor restarts."""
        try:
            target()
        except StoppedError:
            pass
        except FedstreamError as error:
            self._fatal(error)
        except Exception:
            structlog.get_logger().exception("the daemon failed")
            self._ended.put(ExitCode.SOFTWARE)

    # -- ends of work -------------------------------------------------------------------------------------------------

    def _discard(self, held: Held) -> None:
        """Forgets an assignment and everything that is kept for it."""
        self._spool.remove(held.assignment_id)
        self._table.finish(held)
        if self._progress is not None:
            self._progress.forget(held.assignment_id)

    def _on_dropped(self, assignment_id: str, reason: str) -> None:
        """The coordinator wants it no longer. Where a thread has it in hand, that thread cleans up."""
        held = self._table.drop(assignment_id, reason)
        if held is not None:
            structlog.get_logger().info("dropped", reason=reason, **held.log_fields)
            self._discard(held)
        elif self._progress is not None:
            self._progress.forget(assignment_id)

    def _fatal(self, error: FedstreamError) -> None:
        if not self._table.is_closed:
            structlog.get_logger().error("the daemon stops", error=str(error))
            self._ended.put(exit_code_of(error))

    # -- stopping -----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        for repeated in (signal.SIGINT, signal.SIGTERM):
            signal.signal(repeated, _exit_at_once)
        self._ended.put(ExitCode.OK)

    def _shut_down(self) -> None:
        structlog.get_logger().info("stopping; the next start goes on from here")
        deadline = time.monotonic() + _JOIN_SECONDS
        self._stop.set("the daemon stops")
        self._table.close("the daemon stops")
        for close in reversed(self._closers):
            close()
        for trainer in self._sources:
            # A process without state has nothing to put in order, and torch takes its time to unload.
            if (pid := trainer.pid) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            trainer.close()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._write_status()

    def _write_status(self) -> None:
        progress = self._progress.snapshot() if self._progress is not None else {}
        try:
            self._state.write_status(
                {
                    "pid": os.getpid(),
                    "time": time.time(),
                    "server": self._settings.server,
                    "workloads": sorted(self._offered),
                    "coordinator": self._poll.last if self._poll is not None else {},
                    "assignments": [_describe_held(held, progress) for held in self._table.held()],
                }
            )
        except (OSError, FedstreamError) as error:
            structlog.get_logger().debug("status not written", error=str(error))


def _describe_held(held: Held, progress: dict[str, tuple[common_pb2.WorkPhase.ValueType, int, int]]) -> dict[str, Any]:
    phase, done, total = progress.get(held.assignment_id, (held.phase, 0, 0))
    name = common_pb2.WorkPhase.Name(phase).removeprefix("WORK_PHASE_").lower()
    return {**held.log_fields, "phase": name, "done": done, "total": total}


def _exit_at_once(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)
