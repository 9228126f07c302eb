"""All runs together: who is there, whose turn it is, what each client should be doing."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fed_core.codecs.raw import RawConfig
from fed_core.errors import (
    ConfigError,
    ConflictError,
    FedstreamError,
    NoLongerNeededError,
    NotFoundError,
    UnavailableError,
    WrongPhaseError,
)
from fed_core.payload.manifest import Manifest
from fed_core.payload.reader import PayloadReader
from fed_core.specs import BUFFER, TensorSpec, fingerprint, is_floating, variate_specs
from fed_server.aggregation.merge_rules import merge_rules
from fed_server.aggregation.private import released_specs
from fed_server.config import (
    BufferedConfig,
    LatticeDownlinkConfig,
    RawDownlinkConfig,
    RobustConfig,
    RunConfig,
    ScaffoldConfig,
    parse_run_config,
)
from fed_server.config_privacy import CentralPrivacyConfig, IndependentConfig, SitePrivacyConfig
from fed_server.optim.state import state_specs
from fed_server.privacy.promises import sites_notices
from fed_server.rounds.broadcast import WHOLE
from fed_server.rounds.buffered import staleness_notice
from fed_server.rounds.buffered_run import BufferedRun
from fed_server.rounds.cohort import Candidates, Selection, broadcast_seed, select, some, within_population
from fed_server.rounds.correlated_run import CorrelatedRun
from fed_server.rounds.downlink import first_error, first_lattice_for
from fed_server.rounds.membership import Presence
from fed_server.rounds.policy import importance_policy, population, run_grid_policy, server_optimizer
from fed_server.rounds.private_run import PrivateRun, privacy_notices
from fed_server.rounds.risk import risk_notice
from fed_server.rounds.run import LiveRun
from fed_server.rounds.signal import Signal
from fed_server.rounds.surroundings import Facilities
from fed_server.rounds.version import MadeVersion, VersionPaths, payload_tile, write_encoded, write_whole
from fed_server.store.base import (
    AssignmentKind,
    AssignmentRecord,
    AssignmentState,
    BroadcastRecord,
    ClientRecord,
    Metrics,
    ModelRecord,
    RoundState,
    RunRecord,
    RunState,
    Transaction,
)

logger = logging.getLogger(__name__)

# After a start, clients that were there before have this long to call again before a cohort is drawn without them.
SETTLE_SECONDS = 10.0

# Presence is written down at least this often, for `client list` and for the next start.
_SAVE_PRESENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Desired:
    """What a client should be doing, and what it may forget."""

    assignments: tuple[AssignmentRecord, ...]
    dropped: tuple[tuple[str, str], ...]
    idle_reason: str = ""


class Coordinator:
    """The service's state. Everything here runs on the event loop; what blocks goes to the workers."""

    def __init__(self, facilities: Facilities) -> None:
        self._facilities = facilities
        self._runs: dict[str, LiveRun] = {}
        self._drivers: dict[str, asyncio.Task[None]] = {}
        self._clients: dict[str, ClientRecord] = {}
        self._ids: dict[str, str] = {}
        # client id -> assignment id -> assignment: what each client should be doing.
        self._open: dict[str, dict[str, AssignmentRecord]] = {}
        self._signals: dict[str, Signal] = {}
        self._saved_presence: dict[str, float] = {}
        self._turns = 0
        # run id -> names of those that it was given and that do not know yet.
        self._promised: dict[str, set[str]] = {}
        # Held from the publication of a file until the transaction that refers to it, and by whoever deletes unreferenced files.
        self.files_lock = asyncio.Lock()
        self.ledger_lock = asyncio.Lock()
        self._garbage = Signal()
        self._collector: asyncio.Task[None] | None = None
        self.is_draining = False

    # Life

    async def start(self) -> None:
        """Reloads what is unfinished, sweeps orphans, and goes on."""

        def read(tx: Transaction) -> tuple[list[ClientRecord], list[RunRecord]]:
            return tx.clients(), tx.runs(RunState.ACTIVE)

        clients, runs = await self._facilities.workers.store(read)
        for client in clients:
            self.remember_client(client)
        for record in runs:
            await self._adopt(record, parse_run_config(record.config_toml))
        await self._collect_garbage()
        self._collector = asyncio.create_task(self._collect_when_told(), name="collect garbage")

    async def drain(self) -> None:
        """Gives out no more work."""
        self.is_draining = True
        for signal in self._signals.values():
            signal.notify()

    async def stop(self) -> None:
        """Ends the drivers where they stand; the store has everything."""
        tasks = [*self._drivers.values(), *([self._collector] if self._collector else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _adopt(self, record: RunRecord, config: RunConfig) -> LiveRun:
        run = _kind_of(config)(self._facilities, self, record, config)
        await run.load()
        self._runs[record.run_id] = run
        self.assignments_changed(run.open_assignments())
        # A context of its own: a run submitted by a call must not log that call's request id for the rest of its life.
        task = asyncio.create_task(self._drive(run), name=f"run {record.name}", context=contextvars.Context())
        self._drivers[record.run_id] = task
        return run

    async def _drive(self, run: LiveRun) -> None:
        try:
            await run.drive()
        finally:
            self._drivers.pop(run.run_id, None)
            self._promised.pop(run.run_id, None)
            if run.record.state is not RunState.ACTIVE:
                self._runs.pop(run.run_id, None)
                self._wake_runs()
                self.garbage_left()

    # Clients

    def remember_client(self, client: ClientRecord) -> None:
        """Takes note of an enrolled client."""
        self._clients[client.client_id] = client
        self._ids[client.name] = client.client_id

    def client(self, client_id: str) -> ClientRecord | None:
        """An enrolled client."""
        return self._clients.get(client_id)

    def clients(self) -> list[ClientRecord]:
        """All of them, in the order of names."""
        return sorted(self._clients.values(), key=lambda client: client.name)

    def is_alive(self, client_id: str) -> bool:
        """Whether the client called within the lease."""
        return self._facilities.membership.is_alive(client_id, self._facilities.clock.monotonic())

    def num_open(self, client_id: str) -> int:
        """Assignments that the client should be working on."""
        return len(self._open.get(client_id, {}))

    async def poll(
        self,
        client_id: str,
        held: Mapping[str, str],
        wait_seconds: float,
        *,
        labels: Mapping[str, str],
        workloads: Mapping[str, str],
        software_version: str,
        clock_skew_seconds: float,
        divergences: Iterable[tuple[str, int, str]] = (),
    ) -> Desired:
        """The full desired set of a client: at once where it differs from what the client holds, else when it begins to, or after
        the wait. Raises UnavailableError while draining."""
        await self._note_presence(client_id, labels, workloads, software_version, clock_skew_seconds)
        for assignment_id, version, digest in divergences:
            if assignment_id in self._open.get(client_id, {}):
                run = self._runs[self._open[client_id][assignment_id].run_id]
                await run.receive_divergence(assignment_id, version, digest)
        for assignment_id, phase in held.items():
            is_mine = assignment_id in self._open.get(client_id, {})
            if is_mine and self._facilities.membership.progress(assignment_id) is None:
                self._facilities.membership.report(assignment_id, self._facilities.clock.monotonic(), phase, 0, 0)
        signal = self._signals.setdefault(client_id, Signal())
        end = self._facilities.clock.monotonic() + wait_seconds
        while True:
            if self.is_draining:
                raise UnavailableError("the coordinator is stopping; it will be back")
            seen = signal.count
            desired = self._open.get(client_id, {})
            left = end - self._facilities.clock.monotonic()
            if set(desired) != set(held) or left <= 0:
                break
            await signal.wait(seen, left)
        gone = [assignment_id for assignment_id in held if assignment_id not in desired]
        dropped = []
        if gone:
            dropped = await self._facilities.workers.store(lambda tx: [_why_dropped(tx, client_id, a) for a in gone])
        idle = "" if desired else self._idle_reason(client_id)
        return Desired(tuple(desired.values()), tuple(zip(gone, dropped, strict=True)), idle)

    async def _note_presence(
        self,
        client_id: str,
        labels: Mapping[str, str],
        workloads: Mapping[str, str],
        software_version: str,
        clock_skew_seconds: float,
    ) -> None:
        now = self._facilities.clock.monotonic()
        is_news = self._facilities.membership.announce(client_id, now, labels, workloads)
        if is_news or now - self._saved_presence.get(client_id, -_SAVE_PRESENCE_SECONDS) >= _SAVE_PRESENCE_SECONDS:
            self._saved_presence[client_id] = now
            client = replace(
                self._clients[client_id],
                has_authenticated=True,
                last_seen_time=self._facilities.clock.now(),
                labels=dict(labels),
                workloads=dict(workloads),
                software_version=software_version,
                clock_skew_seconds=clock_skew_seconds,
            )
            self._clients[client_id] = client
            await self._facilities.workers.store(lambda tx: tx.put(client))
        if is_news:
            self._wake_runs()

    def _idle_reason(self, client_id: str) -> str:
        presence = self._facilities.membership.presence(client_id)
        waiting = []
        for run in self._runs.values():
            mismatch = _mismatch(run.config, presence) if presence else None
            if excluded := run.excludes(self._clients[client_id].name):
                waiting.append(f"run {run.record.name}: {excluded}")
            else:
                waiting.append(f"run {run.record.name}: {f'this site {mismatch}' if mismatch else run.reason}")
        return "; ".join(waiting) or "there is no active run"

    # Assignments

    def assignment(self, client_id: str, assignment_id: str) -> AssignmentRecord:
        """One of the client's assignments in the rounds that are open. Raises NotFoundError for any other, or another client's."""
        for run in self._runs.values():
            assignment = run.assignments.get(assignment_id)
            if assignment is not None and assignment.client_id == client_id:
                return assignment
        raise NotFoundError(f"assignment {assignment_id!r} is not one of yours, or is over; poll again")

    def run_of(self, assignment: AssignmentRecord) -> LiveRun:
        """The run that an open assignment belongs to."""
        run = self._runs.get(assignment.run_id)
        if run is None:
            raise NotFoundError(f"run {assignment.run_id} is over")
        return run

    def report_progress(
        self, client_id: str, assignment_id: str, phase: str, done: int, total: int, metrics: Metrics
    ) -> str:
        """Notes progress and renews the lease. Returns why the work should stop, or an empty string."""
        now, membership = self._facilities.clock.monotonic(), self._facilities.membership
        if membership.presence(client_id) is None:
            # At work since before the coordinator's start: it offers what it did then, until it polls again.
            known = self._clients[client_id]
            membership.announce(client_id, now, known.labels, known.workloads)
        membership.renew(client_id, now)
        try:
            assignment = self.assignment(client_id, assignment_id)
        except NotFoundError as error:
            return str(error)
        if assignment.state is AssignmentState.OPEN:
            run = self._runs[assignment.run_id]
            membership.report(assignment_id, now, phase, done, total, metrics if run.keeps_metrics else {})
            run.changed.notify()
            return ""
        return "" if assignment.state is AssignmentState.RECEIVED else assignment.reason

    async def report_failure(self, client_id: str, assignment_id: str, reason: str, traceback: str) -> None:
        """Records that a client gave up. A repeat, or a word about a round that is over, changes nothing."""
        try:
            assignment = self.assignment(client_id, assignment_id)
        except NotFoundError:
            await self._check_owner(client_id, assignment_id)
            return
        await self.run_of(assignment).receive_failure(assignment_id, reason, traceback)

    async def report_evaluation(self, client_id: str, assignment_id: str, num_examples: int, metrics: Metrics) -> None:
        """Records an evaluation; a repeat changes nothing."""
        try:
            assignment = self.assignment(client_id, assignment_id)
        except NotFoundError:
            assignment = await self._check_owner(client_id, assignment_id)
        if assignment.kind is not AssignmentKind.EVALUATE:
            raise WrongPhaseError("this assignment asks for an update, not for an evaluation; upload one")
        if assignment.state is AssignmentState.RECEIVED:
            return
        if assignment.state is not AssignmentState.OPEN:
            raise NoLongerNeededError(assignment.reason)
        await self.run_of(assignment).receive_evaluation(assignment_id, num_examples, metrics)

    async def finished_assignment(self, client_id: str, assignment_id: str) -> AssignmentRecord:
        """One of the client's assignments, whatever became of it. Raises NotFoundError for any other."""
        return await self._check_owner(client_id, assignment_id)

    async def _check_owner(self, client_id: str, assignment_id: str) -> AssignmentRecord:
        found = await self._facilities.workers.store(lambda tx: tx.assignment(assignment_id))
        if found is None or found.client_id != client_id:
            raise NotFoundError(f"assignment {assignment_id!r} is not one of yours; poll again")
        return found

    # Runs

    async def create_run(
        self, config_toml: str, request_id: str, model_path: Path, *, has_trained_weights: bool = False
    ) -> tuple[RunRecord, list[str]]:
        """Makes a run of a config and version 0 (a verified payload file). Nothing exists until it returns. A repeat with the same
        request id gives the first run. Raises ConfigError, ConflictError, NotFiniteError."""
        config = parse_run_config(config_toml)
        workers, files = self._facilities.workers, self._facilities.files

        def find(tx: Transaction) -> tuple[RunRecord | None, RunRecord | None]:
            return tx.run_by_request(request_id), tx.run_by_name(config.name)

        same_request, same_name = await workers.store(find)
        if same_request is not None:
            return same_request, []
        if same_name is not None:
            raise ConflictError(
                f"a run named {config.name!r} exists already ({same_name.state.value}); choose another name in the config"
            )
        policy = run_grid_policy(config)
        importance = max(config.aggregation.importance.values(), default=1)
        if importance > policy.max_weight:
            raise ConfigError(
                f"aggregation.importance: {importance:,} is beyond the largest weight that the mean takes, {policy.max_weight:,}: "
                "lower it, or set aggregation.max_weight"
            )
        run_id = self._facilities.new_id()
        path, master_path = files.model_path(run_id, 0), files.master_path(run_id, 0)
        parts = VersionPaths(
            master=files.temporary(master_path),
            model=files.temporary(path),
            payload=files.temporary(files.payload_path(f"{run_id}-0")),
        )
        downlink = config.downlink

        def write(payload: PayloadReader) -> MadeVersion:
            specs, tile_of = payload.manifest.specs, payload_tile(payload)
            if isinstance(downlink, RawDownlinkConfig):
                return write_whole(specs, tile_of, parts.model, parts.payload, run_id=run_id, version=0)
            return write_encoded(
                specs,
                tile_of,
                # Deltas of other encodings begin at the model as it was given.
                lambda change: (
                    first_lattice_for(first_error(downlink, has_trained_weights), change)
                    if isinstance(downlink, LatticeDownlinkConfig)
                    else RawConfig()
                ),
                parts,
                run_id=run_id,
                version=0,
                seed=broadcast_seed(config.seed, 0),
            )

        def make() -> tuple[RunRecord, ModelRecord, BroadcastRecord]:
            with PayloadReader(model_path) as payload:
                manifest = payload.manifest
                rules = merge_rules(manifest.specs, [(m.pattern, m.rule) for m in config.aggregation.merge])
                if isinstance(config.privacy, CentralPrivacyConfig):
                    released_specs(manifest.specs, rules)
                _require_disk(self._facilities, manifest, config)
                if config.average.decay > 0:
                    _require_averageable(manifest.specs)
                if isinstance(config.rounds, BufferedConfig) and config.aggregation.bound is not None:
                    _require_no_statistics(manifest.specs)
                made = write(payload)
            now = self._facilities.clock.now()
            record = RunRecord(
                run_id=run_id,
                name=config.name,
                request_id=request_id,
                state=RunState.ACTIVE,
                reason="submitted",
                config_toml=config_toml,
                created_time=now,
                fingerprint=fingerprint(manifest.specs).hex(),
                num_parameters=sum(spec.num_elements for spec in manifest.specs),
                model_bytes=manifest.raw_bytes,
            )
            model = ModelRecord(
                run_id=run_id,
                version=0,
                round=0,
                parent_version=-1,
                digest=made.digest,
                payload_digest=made.identity,
                payload_bytes=made.identity_bytes,
                file_bytes=made.file_bytes,
                created_time=now,
            )
            broadcast = BroadcastRecord(
                run_id=run_id,
                version=0,
                base_version=WHOLE,
                digest=made.payload.digest.hex(),
                num_bytes=made.payload.total_bytes,
                created_time=now,
            )
            return record, model, broadcast

        async def publish(record: RunRecord, model: ModelRecord, broadcast: BroadcastRecord) -> LiveRun:
            async with self.files_lock:
                await workers.disk(files.publish, parts.model, path)
                await workers.disk(files.publish, parts.payload, files.payload_path(broadcast.digest))
                if parts.master.exists():
                    await workers.disk(files.publish, parts.master, master_path)

                def write(tx: Transaction) -> None:
                    tx.put(record)
                    tx.put(model)
                    tx.put(broadcast)

                await workers.store(write)
            return await self._adopt(record, config)

        try:
            with files.disk_errors(f"making run {config.name!r}"):
                record, model, broadcast = await workers.compute(make)
            # Whoever submitted may hang up now: a run that the store has needs its driver all the same.
            run = await asyncio.shield(asyncio.create_task(publish(record, model, broadcast)))
        finally:
            for part in (parts.master, parts.model, parts.payload):
                part.unlink(missing_ok=True)
        candidates, notices = self._candidates(run), list[str]()
        if isinstance(config.rounds, BufferedConfig):
            notices = [staleness_notice(config.rounds)]
        elif isinstance(config.aggregation, RobustConfig):
            num_sites = max(len(candidates.alive), config.cohort.min_clients)
            notices = [risk_notice(config, config.aggregation, num_sites)]
        elif isinstance(config.privacy, CentralPrivacyConfig):
            named = config.privacy.population
            charged = await workers.store(lambda tx: tx.charges_of_population(named))
            notices = await workers.compute(privacy_notices, config, config.privacy, charged, record.num_parameters)
        elif not isinstance(config.privacy, SitePrivacyConfig):
            notices = [
                f"the mean is exact to {policy.resolution:.1e} of the largest value, with weights up to {policy.max_weight:,}"
            ]
        if isinstance(config.privacy, SitePrivacyConfig):
            size, num_rounds = config.cohort.size, config.schedule.max_rounds
            promise = config.privacy.plan(), size, num_rounds, 2 * record.num_parameters
            notices += await workers.compute(sites_notices, *promise)
        if isinstance(downlink, LatticeDownlinkConfig) and not has_trained_weights:
            notices.append(
                f"version 0 is sent rounded, with an error of {first_error(downlink, False):g}, as random weights can be; set "
                "downlink.first_error where they were trained before"
            )
        if unknown := self._unknown_sites(config):
            notices.append(unknown)
        if len(candidates.alive) < config.cohort.min_clients:
            chosen = self._choose(run, candidates)
            notices.append(f"not enough clients yet: {chosen.reason}")
        logger.info("run created", extra={"run": config.name, "run_id": run_id, "parameters": record.num_parameters})
        return record, notices

    def _unknown_sites(self, config: RunConfig) -> str:
        """What to say of sites that the config names and that have not enrolled; empty where there are none."""
        named = {
            "training.learning_rate_by_site": config.training.learning_rate_by_site,
            "aggregation.importance": config.aggregation.importance,
        }
        parts = [
            f"{some(unknown)} ({field})" for field, sites in named.items() if (unknown := set(sites) - set(self._ids))
        ]
        if not parts:
            return ""
        return f"no site has enrolled as {'; '.join(parts)}: it counts once one does; see fedctl client list for those there are"

    def live_run(self, run_id: str) -> LiveRun | None:
        """A run that is not over."""
        run = self._runs.get(run_id)
        # One that is over stays until its driver has put its things away.
        return run if run is not None and run.record.state is RunState.ACTIVE else None

    async def find_run(self, name_or_id: str) -> RunRecord:
        """A run by id or name. Raises NotFoundError, which lists the runs there are."""

        def find(tx: Transaction) -> tuple[RunRecord | None, list[str]]:
            found = tx.run(name_or_id) or tx.run_by_name(name_or_id)
            return found, [] if found else [run.name for run in tx.runs()]

        found, names = await self._facilities.workers.store(find)
        if found is None:
            known = f"there are {', '.join(names[-10:])}" if names else "there are none yet: fedctl run submit"
            raise NotFoundError(f"no run {name_or_id!r}; {known}")
        live = self._runs.get(found.run_id)
        return live.record if live else found

    async def cancel_run(self, name_or_id: str) -> RunRecord:
        """Ends a run. Raises WrongPhaseError where it ended otherwise before."""
        record = await self.find_run(name_or_id)
        live = self._runs.get(record.run_id)
        if live is not None:
            await live.cancel("cancelled by an operator")
            return live.record
        if record.state is not RunState.CANCELLED:
            raise WrongPhaseError(f"run {record.name} is over already: {record.state.value} ({record.reason})")
        return record

    # Whose turn it is

    def select(self, run: LiveRun) -> Selection:
        """The cohort of the run's next round, or whom a buffered run asks next. Runs that wait take turns: one that lacks only
        clients at work elsewhere keeps its claim on them against those whose turn comes later."""
        if self.is_draining:
            return Selection((), "the coordinator is stopping")
        reserved: set[str] = set()
        waiting = sorted(
            (r for r in self._runs.values() if r.wants_clients), key=lambda r: (r.last_turn, r.record.created_time)
        )
        for earlier in waiting:
            if earlier is run:
                break
            candidates = self._candidates(earlier)
            if self._choose(earlier, candidates).waits_for_busy:
                reserved |= candidates.alive
        selection = self._choose(run, replace(self._candidates(run), reserved=frozenset(reserved)))
        self._promised[run.run_id] = set(selection.cohort)
        if selection.cohort:
            self._turns += 1
            run.last_turn = self._turns
        return selection

    def _choose(self, run: LiveRun, candidates: Candidates) -> Selection:
        membership, cohort = self._facilities.membership, run.config.cohort
        is_settling = self._facilities.clock.monotonic() - membership.started < SETTLE_SECONDS
        if isinstance(run, BufferedRun):
            return run.choose_next(candidates, is_settling=is_settling)
        return select(
            candidates,
            seed=run.config.seed,
            round=run.next_round,
            size=cohort.size,
            over_selection=cohort.over_selection,
            min_clients=cohort.min_clients,
            is_settling=is_settling,
            selection=cohort.selection,
            turns=run.turns,
            importance=importance_policy(run.config, run.reports),
        )

    def _candidates(self, run: LiveRun) -> Candidates:
        now, membership = self._facilities.clock.monotonic(), self._facilities.membership
        alive, busy, expected, unlike = set(), set(), set(), []
        for client in self._clients.values():
            presence = membership.presence(client.client_id)
            if presence is None:
                before = Presence(0.0, client.labels, client.workloads)
                was_there = self._facilities.clock.now() - client.last_seen_time < 10 * membership.lease_seconds
                if was_there and _mismatch(run.config, before) is None:
                    expected.add(client.name)
            elif membership.is_alive(client.client_id, now):
                mismatch = _mismatch(run.config, presence)
                if mismatch is None:
                    alive.add(client.name)
                else:
                    unlike.append((client.name, mismatch))
            is_promised = any(client.name in names for run_id, names in self._promised.items() if run_id != run.run_id)
            if is_promised or any(
                a.kind is AssignmentKind.TRAIN for a in self._open.get(client.client_id, {}).values()
            ):
                busy.add(client.name)
        candidates = Candidates(
            frozenset(alive), busy=frozenset(busy), expected=frozenset(expected), unlike=tuple(sorted(unlike))
        )
        limit = population(run.config)
        return candidates if limit is None else within_population(candidates, run.members, limit)

    def eligible(self, run: LiveRun) -> frozenset[str]:
        """Names of those who could be asked for a round of the run now, busy or not."""
        return self._candidates(run).alive

    def keep_none(self, run: LiveRun) -> None:
        """Gives back what `select` promised the run."""
        self._promised.pop(run.run_id, None)

    def client_ids(self, names: Iterable[str]) -> dict[str, str]:
        """Ids of clients by name."""
        return {name: self._ids[name] for name in names}

    def name_of(self, client_id: str) -> str:
        """Name of a client."""
        return self._clients[client_id].name

    def assignments_changed(self, assignments: Iterable[AssignmentRecord]) -> None:
        """Updates what each client should be doing and tells the pollers; a client that came free may be what a run waits for."""
        someone_free = False
        for assignment in assignments:
            mine = self._open.setdefault(assignment.client_id, {})
            if assignment.state is AssignmentState.OPEN:
                mine[assignment.assignment_id] = assignment
                self._promised.get(assignment.run_id, set()).discard(self.name_of(assignment.client_id))
            else:
                someone_free |= mine.pop(assignment.assignment_id, None) is not None
            signal = self._signals.get(assignment.client_id)
            # Who delivered knows it from the receipt; only news is worth a wake-up.
            if signal is not None and assignment.state is not AssignmentState.RECEIVED:
                signal.notify()
        if someone_free:
            self._wake_runs()

    def _wake_runs(self) -> None:
        for run in self._runs.values():
            if run.wants_clients:
                run.changed.notify()

    # Files

    def garbage_left(self) -> None:
        """Says that there are files that nobody needs any longer; no round waits for their deletion."""
        self._garbage.notify()

    async def _collect_when_told(self) -> None:
        seen = 0
        while True:
            seen = await self._garbage.wait(seen, 3600.0)
            try:
                await self._collect_garbage()
            except (FedstreamError, OSError):
                logger.exception("files could not be deleted; the next round tries again")

    async def _collect_garbage(self) -> None:
        """Deletes files that nothing refers to: updates of rounds that are over, payloads that no open round sends, versions
        that are no longer kept, partial uploads of assignments that are over."""
        async with self.files_lock:
            files = self._facilities.files
            listed = await self._facilities.workers.disk(files.listing)
            live_models: set[tuple[str, int]] = set()
            live_masters: set[tuple[str, int]] = set()
            live_payloads: set[str] = set()
            live_released: set[tuple[str, int]] = set()
            live_keys: set[str] = set()

            def read(tx: Transaction) -> tuple[set[str], set[str]]:
                updates: set[str] = set()
                uploads: set[str] = set()
                for record in tx.runs():
                    for model in tx.models(record.run_id):
                        if model.is_available:
                            live_models.add((record.run_id, model.version))
                    if record.state is not RunState.ACTIVE:
                        continue
                    live_keys.add(record.run_id)
                    live_masters.add((record.run_id, record.model_version))
                    live_payloads.update(b.digest for b in tx.broadcasts(record.run_id) if b.is_available)
                    first = record.round + 1
                    round = tx.round(record.run_id, record.round) if record.round else None
                    if round is not None and round.state not in (RoundState.COMMITTED, RoundState.FAILED):
                        live_masters.add((record.run_id, round.base_version))
                        first = round.round
                        if round.state is not RoundState.EVALUATING:
                            live_released.add((record.run_id, round.round))
                    for assignment in tx.unsettled_assignments(record.run_id, first):
                        if assignment.state is AssignmentState.RECEIVED:
                            updates.add(assignment.assignment_id)
                        elif assignment.state is AssignmentState.OPEN:
                            uploads.add(assignment.assignment_id)
                return updates, uploads

            updates, uploads = await self._facilities.workers.store(read)
            deleted = await self._facilities.workers.disk(
                files.sweep,
                updates,
                uploads,
                live_payloads,
                live_models,
                live_masters,
                live_released,
                live_keys,
                listed,
            )
            if deleted:
                logger.debug("files deleted", extra={"count": len(deleted)})


def _kind_of(config: RunConfig) -> type[LiveRun]:
    if isinstance(config.privacy, CentralPrivacyConfig):
        return PrivateRun if isinstance(config.privacy.correlation, IndependentConfig) else CorrelatedRun
    return BufferedRun if isinstance(config.rounds, BufferedConfig) else LiveRun


def _mismatch(config: RunConfig, presence: Presence) -> str | None:
    """Why a client cannot take part in a run, or None."""
    version = presence.workloads.get(config.workload)
    if version is None:
        offered = ", ".join(sorted(presence.workloads)) or "none"
        return f"has no workload {config.workload!r} (it has {offered})"
    if config.workload_version and version != config.workload_version:
        return f"has version {version!r} of workload {config.workload!r}, the run wants {config.workload_version!r}"
    for key, value in config.cohort.labels.items():
        if presence.labels.get(key) != value:
            return f"has label {key}={presence.labels.get(key, '')!r}, the run wants {value!r}"
    return None


def _why_dropped(tx: Transaction, client_id: str, assignment_id: str) -> str:
    assignment = tx.assignment(assignment_id)
    if assignment is None or assignment.client_id != client_id:
        return "the coordinator does not know this assignment"
    if assignment.state is AssignmentState.RECEIVED:
        return "received"
    return assignment.reason or f"the assignment is {assignment.state.value}"


def _require_averageable(specs: Sequence[TensorSpec]) -> None:
    """An average of half precision would stand still: what a version adds to it is less than it can hold."""
    for spec in specs:
        if spec.dtype in ("float16", "bfloat16"):
            raise ConfigError(
                f"average.decay: tensor {spec.name!r} is {spec.dtype}, which is too coarse for a moving average: delete "
                "[average], or train in float32"
            )


def _require_no_statistics(specs: Sequence[TensorSpec]) -> None:
    """Statistics of older versions are moved by what the versions differ in, which nothing but the bound of the model covers."""
    for spec in specs:
        if spec.role == BUFFER and is_floating(spec.dtype):
            raise ConfigError(
                f"aggregation.bound: the model has running statistics ({spec.name!r}), and in buffered rounds their bound must "
                "follow from the model: delete it"
            )


def _require_disk(facilities: Facilities, manifest: Manifest, config: RunConfig) -> None:
    """A run needs its kept versions, the one being made, master weights, payloads, a round's updates, and what the server optimizer
    keeps, twice, at once."""
    updates, versions = config.cohort.size * config.cohort.over_selection, config.keep.versions
    if isinstance(config.rounds, BufferedConfig):
        # What comes while a version is made, and the versions that clients are at work on.
        updates += config.rounds.concurrency
        versions += min(config.rounds.concurrency, config.rounds.max_staleness)
    if isinstance(config.aggregation, RobustConfig):
        updates *= 2  # as they came, and decoded side by side
    if config.average.decay > 0:  # one beside every version
        updates += versions + 2
    state_bytes = sum(spec.num_bytes for spec in state_specs(server_optimizer(config, 1), manifest.specs))
    if isinstance(config.training.objective, ScaffoldConfig):  # as it is kept, and as it is sent
        state_bytes += 2 * sum(spec.num_bytes for spec in variate_specs(manifest.specs))
    needed = int(manifest.raw_bytes * (versions + 6 + updates)) + 2 * state_bytes
    facilities.files.require_free(needed, f"run {config.name!r} (its versions and a round's updates)")
