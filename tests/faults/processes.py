"""A federation of real processes, to be killed.

Every program appends to its own log, runs on the loopback or in a network namespace, and carries a mark in its environment by
which it and its children are found again, so that nothing is left behind. Whoever waits, waits for a condition: `until`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from benchmarks.light_operator import Operator
from fed_core.failpoints import ENVIRONMENT_VARIABLE
from fed_core.tensors import model_specs, model_tensors
from fed_core.workload import initial_model, load_workload
from fedstream.v1 import common_pb2, runs_pb2

T = TypeVar("T")
TRAIN = common_pb2.ASSIGNMENT_KIND_TRAIN
BIN = Path(sys.executable).parent
WORKLOAD = Path(__file__).with_name("workload.py")
SEED = 7
# The machine of a test may be busy: a wait ends with its condition, and this long is a failure.
PATIENCE_SECONDS = 90.0
# A client that is silent for so long is gone.
LEASE_SECONDS = 8.0
PROMPT_SECONDS = 8.0
_MARK = "FEDSTREAM_TEST_PROGRAM"


def until(condition: Callable[[], T], what: str, timeout: float = PATIENCE_SECONDS) -> T:
    """The first true value of the condition. Fails after `timeout` seconds, saying what was waited for."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout:g} s: {what}"
        time.sleep(0.05)
    return value


class Program:
    """A process that can be started, killed and started again."""

    def __init__(self, name: str, folder: Path, prefix: Sequence[str] = ()) -> None:
        """`prefix` runs the program somewhere: ip netns exec NAME."""
        self.name = name
        self.folder = folder
        self.fail_at: str | None = None
        self._prefix = list(prefix)
        self._mark = f"{name}-{uuid.uuid4().hex}"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._output, self._log = folder / "stdout", folder / "stderr"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process as it was last started."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def spawn(self, *command: str, fail_at: str | None = None) -> None:
        """Starts it, to kill itself at a named point (fed_core/failpoints.py) if one is given."""
        assert not self.is_running, f"{self.name} runs already"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("FED_", "FEDSTREAM_"))}
        environment = kept | {_MARK: self._mark, "OMP_NUM_THREADS": "1"}
        if fail_at is not None:
            environment[ENVIRONMENT_VARIABLE] = fail_at
        self.fail_at = fail_at
        with self._output.open("ab") as output, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=log, env=environment
            )

    def kill(self) -> None:
        """kill -9; its children must die with it."""
        self.process.kill()
        self.wait_killed()

    def wait_killed(self) -> None:
        """Waits until it was killed, by whomever, and its children are gone too."""
        until(lambda: not self.is_running, f"{self.name} is killed ({self.fail_at})")
        assert self.process.returncode == -signal.SIGKILL, f"{self.name} ended by itself:\n{self.tail()}"
        until(lambda: not self.remains(), f"the children of {self.name} die with it: {self.remains()}", PROMPT_SECONDS)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Asks it to end, which it must do soon, well, and with its children."""
        self.process.send_signal(number)
        until(lambda: not self.is_running, f"{self.name} ends on {number.name}", PROMPT_SECONDS)
        assert self.process.returncode == 0, f"{self.name} ended with {self.process.returncode}:\n{self.tail()}"
        until(lambda: not self.remains(), f"the children of {self.name} end with it: {self.remains()}", PROMPT_SECONDS)

    def remains(self) -> list[psutil.Process]:
        """Living processes that it started, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # gone in the meantime, or another user's
        return found

    def sweep(self) -> list[str]:
        """Ends whatever is left, at the end of a session; says what was left besides the program itself."""
        if self.is_running:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        if self._process is not None:
            self._process.wait()
        children = self.remains()
        _, stubborn = psutil.wait_procs(children, timeout=PROMPT_SECONDS)
        for process in stubborn:
            process.kill()
        return [str(process) for process in stubborn]

    def output(self) -> str:
        """What it printed, over all its lives."""
        return self._output.read_text()

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text().splitlines()[-lines:])

    def events(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Lines of its log, over all its lives, with this event and these fields."""
        found = []
        for line in self._log.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # torn by a kill, or not of the log
            if entry.get("event") == event and fields.items() <= entry.items():
                found.append(entry)
        return found


class Coordinator(Program):
    """fed-server on one data directory; after the first start always on the same address."""

    def __init__(self, folder: Path, *options: str, listen: str = "127.0.0.1:0", prefix: Sequence[str] = ()) -> None:
        super().__init__("coordinator", folder, prefix)
        self.data = folder / "data"
        self.address = listen
        self._options = options
        self._operator: Operator | None = None

    def start(self, fail_at: str | None = None) -> None:
        """Returns when it serves, or has already died at the point where it should."""
        said = self._output.stat().st_size if self._output.exists() else 0
        command = [str(BIN / "fed-server"), "run", "--data-dir", str(self.data), "--listen", self.address]
        command += ["--lease-seconds", str(LEASE_SECONDS), "--log-format", "json", *self._options]
        self.spawn(*command, fail_at=fail_at)

        def greeting() -> str:
            if not self.is_running:
                assert fail_at is not None, self.tail()
                assert self.process.returncode == -signal.SIGKILL, self.tail()
                return self.address
            first, _, _ = self.output()[said:].partition("\n")
            return first.removeprefix("fed-server is serving on ").partition(" ")[0] if "serving on" in first else ""

        self.address = until(greeting, "fed-server serves")

    @property
    def operator(self) -> Operator:
        """The operator's service of the process that runs now."""
        if self._operator is None:
            self._operator = Operator(f"unix:{self.data / 'fed-server.sock'}")
        return self._operator

    def spawn(self, *command: str, fail_at: str | None = None) -> None:
        """A new process is a new connection: the old one would wait before it tries again."""
        self.disconnect()
        super().spawn(*command, fail_at=fail_at)

    def disconnect(self) -> None:
        """Closes the operator's connection."""
        if self._operator is not None:
            self._operator.channel.close()
            self._operator = None


class Site(Program):
    """fed-client on one state directory."""

    def __init__(
        self,
        name: str,
        folder: Path,
        coordinator: Coordinator,
        data_seed: int,
        *options: str,
        prefix: Sequence[str] = (),
    ) -> None:
        super().__init__(name, folder, prefix)
        self.state = folder / "state"
        self._trouble = folder / "trouble"
        self._coordinator = coordinator
        self._options = (f"--option=data_seed={data_seed}", *options)

    def command(self, *options: str) -> list[str]:
        """The command line of this site."""
        command = [
            str(BIN / "fed-client"),
            "run",
            "--server",
            self._coordinator.address,
            "--state-dir",
            str(self.state),
        ]
        command += ["--name", self.name, "--join-token-file", str(self._coordinator.data / "join-token")]
        command += ["--workload", str(WORKLOAD), "--option", f"trouble={self._trouble}", "--label", f"site={self.name}"]
        return [*command, "--device", "cpu", "--log-format", "json", *self._options, *options]

    def start(self, fail_at: str | None = None) -> None:
        """Does not wait for anything."""
        self.spawn(*self.command(), fail_at=fail_at)

    def trouble(self, what: str | None) -> None:
        """What the training code does at its next step; None: its work."""
        if what is None:
            self._trouble.unlink(missing_ok=True)
            return
        part = self._trouble.with_suffix(".part")
        part.write_text(what)
        part.replace(self._trouble)

    def spooled(self) -> list[Path]:
        """Updates in its spool."""
        return sorted((self.state / "spool").glob("*.update"))


class Federation:
    """A coordinator and its sites."""

    def __init__(self, coordinator: Coordinator, sites: Sequence[Site]) -> None:
        self.coordinator = coordinator
        self.sites = list(sites)
        self._model = initial_model(load_workload(str(WORKLOAD)), SEED)

    def start(self) -> None:
        """Makes everything run, healthy and idle, whatever happened to it before."""
        if self.coordinator.is_running and self.coordinator.fail_at is not None:
            self.coordinator.kill()
        if not self.coordinator.is_running:
            self.coordinator.start()
        for run in self.coordinator.operator.call("ListRuns", runs_pb2.ListRunsRequest()).runs:
            if run.state == runs_pb2.RUN_STATE_ACTIVE:
                self.coordinator.operator.call("CancelRun", runs_pb2.CancelRunRequest(run=run.name))
        for site in self.sites:
            site.trouble(None)
            if site.is_running:
                site.process.send_signal(signal.SIGCONT)
                if site.fail_at is not None:
                    site.kill()
            if not site.is_running:
                site.start()

    def stop(self) -> None:
        """Ends everything; nothing may be left."""
        self.coordinator.disconnect()
        left = [process for program in (*self.sites, self.coordinator) for process in program.sweep()]
        assert not left, f"left behind: {left}"

    def submit(
        self,
        name: str,
        *,
        size: int | None = None,
        quorum: int | None = None,
        rounds: int = 1,
        site: Site | None = None,
        steps: int | None = None,
        deadline: float = 600,
        budget: float = 0,
        evaluation: str = "none",
        uplink: str = "",
        downlink: str = "",
        server_optimizer: str = "",
        objective: str = "",
        aggregation: str = "",
        selection: str = "random",
        concurrency: int = 0,
        privacy: str = "",
    ) -> None:
        """A run over all sites, or one of them, that fails with its first failed round. Bit-identical where it is not told
        otherwise: the whole population, no deadline or budget that matters. `uplink`, `downlink`, `server_optimizer`, `objective`,
        `aggregation` and `privacy` are inline tables; without them it is compressed, and steps, as runs do by default. Unless it is
        one site's, a cohort is drawn from all. With a `concurrency` rounds are buffered."""
        size = size or (1 if site else len(self.sites))
        labels = f'labels = {{ site = "{site.name}" }}' if site else ""
        buffered = f'kind = "buffered", concurrency = {concurrency}, max_staleness = 999'
        work = f'{{ kind = "steps", steps = {steps} }}' if steps else '{ kind = "epochs", epochs = 1 }'
        self.coordinator.operator.submit(
            f"""
            name = "{name}"
            workload = "faults"
            seed = {SEED}
            {f"uplink = {uplink}" if uplink else ""}
            {f"downlink = {downlink}" if downlink else ""}
            {f"server_optimizer = {server_optimizer}" if server_optimizer else ""}
            {f"aggregation = {aggregation}" if aggregation else ""}
            {f"rounds = {{ {buffered} }}" if concurrency else ""}
            {f"privacy = {privacy}" if privacy else ""}
            [cohort]
            size = {size}
            min_clients = {size if site else len(self.sites)}
            selection = "{selection}"
            quorum = {quorum or size}
            {labels}
            [schedule]
            max_rounds = {rounds}
            max_failed_rounds = 1
            deadline_seconds = {deadline}
            time_budget_seconds = {budget}
            [training]
            batch_size = 16
            local_work = {work}
            {f"objective = {objective}" if objective else ""}
            [training.optimizer]
            kind = "sgd"
            learning_rate = 0.05
            momentum = 0.9
            [evaluation]
            at = "{evaluation}"
            """,
            model_tensors(self._model),
            specs=model_specs(self._model),
        )

    def killed_at(self, points: Sequence[str], name: str, **settings: Any) -> runs_pb2.GetReportResponse:
        """The report of a finished run whose coordinator was killed at each of these points in turn, and then left alone."""
        self.coordinator.stop()
        self.coordinator.start(fail_at=points[0])
        self.submit(name, **settings)
        for point in (*points[1:], None):
            self.coordinator.wait_killed()
            self.coordinator.start(fail_at=point)
        return self.finished(name)

    def until_all_killed(
        self, site: Site, at_coordinator: Sequence[str], at_site: Sequence[str], timeout: float = PATIENCE_SECONDS
    ) -> None:
        """Starts whichever of the two was killed again, to be killed at its next point, until nobody is to be killed any more."""
        programs: list[tuple[Coordinator | Site, Iterator[str]]] = [
            (self.coordinator, iter(at_coordinator)),
            (site, iter(at_site)),
        ]

        def are_all_killed() -> bool:
            for program, points in programs:
                if not program.is_running:
                    program.wait_killed()
                    program.start(fail_at=next(points, None))
            return all(program.fail_at is None for program, _ in programs)

        until(are_all_killed, f"kills, the last ones at {at_coordinator} and {at_site}", timeout)

    def report(self, name: str) -> runs_pb2.GetReportResponse:
        """Everything about a run."""
        return self.coordinator.operator.report(name)

    def run_id(self, name: str) -> str:
        """What the logs call it."""
        return self.report(name).run.run_id

    def over(self, name: str, timeout: float = PATIENCE_SECONDS) -> runs_pb2.GetReportResponse:
        """The report of a run when it is over, however it ended."""
        report = self.report(name)

        def ended() -> bool:
            nonlocal report
            report = self.report(name)
            return report.run.state != runs_pb2.RUN_STATE_ACTIVE

        try:
            until(ended, "", timeout)
        except AssertionError:
            raise AssertionError(f"run {name} not over within {timeout:g} s: {report.run.reason}") from None
        return report

    def finished(self, name: str, timeout: float = PATIENCE_SECONDS) -> runs_pb2.GetReportResponse:
        """The report of a run that ends as it should."""
        report = self.over(name, timeout)
        assert report.run.state == runs_pb2.RUN_STATE_FINISHED, report.run.reason
        return report

    def assignment(self, name: str, site: Site, round: int = 1) -> runs_pb2.RoundClient | None:
        """How a site's training in a round stands; None before it was selected."""
        for each in self.report(name).rounds:
            for client in each.clients:
                if each.round == round and client.client_name == site.name and client.assignment_kind == TRAIN:
                    return client
        return None

    def until_training(self, name: str, site: Site) -> None:
        """Waits until the site's training code is at work."""

        def is_training() -> bool:
            assignment = self.assignment(name, site)
            return assignment is not None and assignment.phase == common_pb2.WORK_PHASE_TRAINING

        until(is_training, f"{site.name} trains for {name}")


def digests(report: runs_pb2.GetReportResponse) -> list[str]:
    """Of every version's values."""
    return [model.digest.hex() for model in report.models]


def losses(report: runs_pb2.GetReportResponse) -> list[object]:
    """What every encoding made of what it was given: the lengths, errors and gains of updates and deltas, to the last bit."""
    updates = [
        (client.client_name, client.uplink.payload_bytes, _fidelity(client.fidelity))
        for round in report.rounds
        for client in round.clients
        if client.assignment_kind == TRAIN
    ]
    return [*updates, *((model.delta_bytes, _fidelity(model.fidelity)) for model in report.models)]


def _fidelity(fidelity: runs_pb2.Fidelity) -> tuple[float, float, dict[str, int]]:
    return fidelity.error, fidelity.gain, dict(fidelity.tensors)
