"""Many sites in one process: the daemon's own threads, state directory, cache, spool and channel for each, without a process and a
trainer process of its own.

What differs from `fed-client run` is process management alone: jobs are done in the work thread, one at a time over all sites,
because seeds and threads of torch belong to the process.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from fed_client.daemon import Daemon
from fed_client.settings import Settings
from fed_client.state import StateDirectory
from fed_client.training.jobs import SiteJobs, kind_of
from fed_client.training.trainer import Trainer, WorkloadError
from fed_core.child_process import Json, OnProgress
from fed_core.workload import Site

_JOBS = threading.Lock()
JOB_SECONDS: defaultdict[str, float] = defaultdict(float)
"""Processor seconds of all jobs so far, by what they did."""
# As often as a trainer process reports.
_PROGRESS_SECONDS = 0.25


class LocalTrainer(Trainer):
    """Does its jobs in the caller's thread; what goes in and out is JSON, as between the processes."""

    def __init__(self, workload_source: str, *, site: Site, seconds: float = 0.0) -> None:
        super().__init__(workload_source, site=site)
        self._seconds = seconds
        self._jobs = SiteJobs(
            {
                "workload": workload_source,
                "site": {"name": site.name, "data": str(site.data), "options": dict(site.options)},
                "device": "cpu",
            }
        )

    def _call(self, request: Mapping[str, Any], on_progress: OnProgress | None = None) -> Json:
        if request["do"] == "train":
            time.sleep(self._seconds)
        with _JOBS:
            began = time.thread_time()
            try:
                answer: Json = json.loads(
                    json.dumps(self._jobs.answer(json.loads(json.dumps(request)), _throttled(on_progress)))
                )
            except Exception as error:
                raise WorkloadError(kind_of(error), str(error), traceback.format_exc()) from error
            finally:
                JOB_SECONDS[request["do"]] += time.thread_time() - began
            return answer


class SimulatedSite(Daemon):
    """A daemon that is one of many in its process."""

    def __init__(self, settings: Settings, seconds: float = 0.0) -> None:
        """Takes the lock of the state directory, which it makes. Training takes so many seconds longer than its work."""
        self._directory = StateDirectory(settings.state_dir)
        self._directory.create()
        self._directory.lock()
        super().__init__(settings, self._directory)
        site = Site(name=settings.name, data=settings.data, options=settings.options)
        self._sources = [LocalTrainer(source, site=site, seconds=seconds) for source in settings.workload]

    def start(self) -> None:
        """Enrols and works, in threads of its own."""
        self._spawn("start", self._start)

    def stop(self) -> None:
        """As a signal would."""
        self._shut_down()
        self._directory.unlock()


class Journal:
    """What the daemons' logs say, counted: one processor for all of them."""

    def __init__(self) -> None:
        self.warnings: Counter[str] = Counter()
        self.fetches: Counter[int] = Counter()
        """Assignments by the number of payloads that the coordinator named for their model."""
        self._lock = threading.Lock()

    def configure(self) -> None:
        """Becomes the process's log."""
        structlog.configure(
            processors=[self._take],
            wrapper_class=structlog.make_filtering_bound_logger(20),
            cache_logger_on_first_use=False,
        )

    def _take(self, _: Any, level: str, event: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._lock:
            if level in ("warning", "error", "critical"):
                self.warnings[str(event.get("event"))] += 1
                print(f"site: {dict(event)}", flush=True)
            elif event.get("event") == "assignment taken":
                self.fetches[int(event["fetches"])] += 1
        raise structlog.DropEvent


@contextmanager
def simulated_sites(
    address: str,
    join_token: str,
    folder: Path,
    *,
    workload: str,
    data: Path,
    options: Sequence[Mapping[str, str]],
    overrides: Sequence[Mapping[str, Any]] = (),
    seconds: Sequence[float] = (),
) -> Iterator[list[SimulatedSite]]:
    """One site for each set of options, named site-000 and so on, at work while the block runs. `overrides` and `seconds`, where
    given, have what each site sets instead of the plan, and how much longer than its work it trains."""
    sites = [
        SimulatedSite(
            Settings.model_validate(
                {
                    "server": address,
                    "state_dir": folder / f"site-{number:03d}",
                    "name": f"site-{number:03d}",
                    "join_token": join_token,
                    "workload": [workload],
                    "data": data,
                    "options": dict(each),
                    "overrides": dict(overrides[number]) if overrides else {},
                    "device": "cpu",
                    "poll_seconds": 60.0,
                }
            ),
            seconds[number] if seconds else 0.0,
        )
        for number, each in enumerate(options)
    ]
    try:
        for site in sites:
            site.start()
        yield sites
    finally:
        stopping = [threading.Thread(target=site.stop) for site in sites]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()


def _throttled(on_progress: OnProgress | None) -> OnProgress:
    due = 0.0

    def report(done: int, total: int, metrics: Mapping[str, float]) -> None:
        nonlocal due
        now = time.monotonic()
        if on_progress is not None and (now >= due or done == total):
            due = now + _PROGRESS_SECONDS
            on_progress(done, total, metrics)

    return report
