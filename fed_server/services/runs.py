"""Runs: the operator's service."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fed_core.errors import CorruptError, InvalidError, NotFoundError
from fed_core.payload.frames import CHUNK_BYTES
from fed_core.payload.verify import SegmentVerifier
from fed_server.config import MAX_CONFIG_BYTES, parse_run_config
from fed_server.config_privacy import CentralPrivacyConfig, SitePrivacyConfig
from fed_server.privacy.ledger import claim_after
from fed_server.privacy.promises import sites_claim
from fed_server.rounds.coordinator import Coordinator
from fed_server.rounds.membership import Membership, Progress
from fed_server.rounds.private_run import project
from fed_server.rounds.run import LiveRun
from fed_server.rounds.workers import Workers
from fed_server.services.convert import (
    charge_to_proto,
    client_to_proto,
    model_to_proto,
    participations_to_proto,
    round_to_proto,
    run_to_proto,
    sum_traffic,
)
from fed_server.store.base import (
    AssignmentRecord,
    AssignmentState,
    LedgerRecord,
    ModelRecord,
    RosterRecord,
    RoundRecord,
    RoundState,
    RunRecord,
    RunState,
    Transaction,
)
from fed_server.store.blobs import DataDirectory
from fedstream.v1 import runs_pb2, runs_pb2_grpc, transfer_pb2

# A watcher gets a message at least so often, so that a proxy keeps the stream and the deadline counts down before one's eyes.
WATCH_IDLE_SECONDS = 5.0
# And at most so often.
WATCH_SECONDS = 0.2


class RunsService(runs_pb2_grpc.RunsServicer):
    """Reads the request, asks the coordinator, writes the answer."""

    def __init__(
        self, coordinator: Coordinator, workers: Workers, files: DataDirectory, membership: Membership
    ) -> None:
        self._coordinator = coordinator
        self._workers = workers
        self._files = files
        self._membership = membership

    async def CreateRun(
        self, request_iterator: AsyncIterator[runs_pb2.CreateRunRequest], context: Any
    ) -> runs_pb2.CreateRunResponse:
        """See the proto."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidError("expected a header as the first message of a run's submission")
        header = first.header
        if len(header.config_toml.encode()) > MAX_CONFIG_BYTES or not 16 <= len(header.request_id) <= 64:
            raise InvalidError("expected a config of at most 256 KiB and a request id of 16 to 64 characters")
        path = self._files.temporary(self._files.payload_path(header.model.digest.hex() or "none"))
        try:
            await self._receive_model(request_iterator, header, path)
            record, notices = await self._coordinator.create_run(
                header.config_toml, header.request_id, path, has_trained_weights=header.has_trained_weights
            )
        finally:
            await self._workers.disk(path.unlink, missing_ok=True)
        live = self._coordinator.live_run(record.run_id)
        return runs_pb2.CreateRunResponse(run=run_to_proto(record, live, {}), notices=notices)

    async def _receive_model(
        self, requests: AsyncIterator[runs_pb2.CreateRunRequest], header: runs_pb2.CreateRunHeader, path: Path
    ) -> None:
        await self._workers.disk(self._files.require_free, header.model.total_bytes, "the model of a new run")
        verifier = SegmentVerifier(header.model.digest, header.model.total_bytes)
        file = await self._workers.disk(path.open, "wb")

        def take(data: bytes) -> None:
            verifier.feed(data)
            with self._files.disk_errors("storing the model of a new run"):
                file.write(data)

        try:
            offset = 0
            async for request in requests:
                if request.WhichOneof("part") != "chunk" or request.chunk.offset != offset:
                    raise InvalidError(f"expected the chunk at byte {offset}")
                await self._workers.disk(take, request.chunk.data)
                offset += len(request.chunk.data)
            if not verifier.is_complete:
                raise CorruptError(f"the model ended after {offset} bytes; submit again", offset=0)
        finally:
            with self._files.disk_errors("storing the model of a new run"):
                await self._workers.disk(file.close)

    async def GetRun(self, request: runs_pb2.GetRunRequest, context: Any) -> runs_pb2.GetRunResponse:
        """See the proto."""
        record = await self._coordinator.find_run(request.run)
        rounds = await self._rounds(record, newest_only=True)
        return runs_pb2.GetRunResponse(
            run=await self._run(record), round=rounds[-1] if rounds else None, sites=await self._sites(record)
        )

    async def ListRuns(self, request: runs_pb2.ListRunsRequest, context: Any) -> runs_pb2.ListRunsResponse:
        """See the proto."""
        records = await self._workers.store(lambda tx: tx.runs())
        return runs_pb2.ListRunsResponse(runs=[await self._run(record) for record in reversed(records)])

    async def CancelRun(self, request: runs_pb2.CancelRunRequest, context: Any) -> runs_pb2.CancelRunResponse:
        """See the proto."""
        record = await self._coordinator.cancel_run(request.run)
        return runs_pb2.CancelRunResponse(run=await self._run(record))

    async def WatchRun(
        self, request: runs_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[runs_pb2.WatchRunResponse]:
        """See the proto."""
        record = await self._coordinator.find_run(request.run)
        sent: dict[int, bytes] = {}
        is_first = True
        while True:
            live = self._coordinator.live_run(record.run_id)
            seen = live.changed.count if live is not None else 0
            record = await self._coordinator.find_run(record.run_id)
            rounds = await self._rounds(record, newest_only=not is_first, with_previous=True)
            for earlier in rounds[:-1] if is_first else []:
                del earlier.clients[:]
            changed = [r for r in rounds if sent.get(r.round) != r.SerializeToString(deterministic=True)]
            sent |= {r.round: r.SerializeToString(deterministic=True) for r in changed}
            yield runs_pb2.WatchRunResponse(run=await self._run(record), rounds=changed)
            if record.state is not RunState.ACTIVE:
                return
            is_first = False
            if live is not None:
                # At most so often: whoever watches must not cost more than the round.
                await asyncio.sleep(WATCH_SECONDS)
                await live.changed.wait(seen, WATCH_IDLE_SECONDS)

    async def GetReport(self, request: runs_pb2.GetReportRequest, context: Any) -> runs_pb2.GetReportResponse:
        """See the proto."""
        record = await self._coordinator.find_run(request.run)
        rounds = await self._rounds(record)
        return runs_pb2.GetReportResponse(
            run=await self._run(record),
            rounds=rounds,
            models=await self._models(record),
            downlink=sum_traffic(r.downlink for r in rounds),
            uplink=sum_traffic(r.uplink for r in rounds),
            sites=await self._sites(record),
        )

    async def ListClients(self, request: runs_pb2.ListClientsRequest, context: Any) -> runs_pb2.ListClientsResponse:
        """See the proto."""
        clients = [client_to_proto(client, self._coordinator) for client in self._coordinator.clients()]
        return runs_pb2.ListClientsResponse(clients=clients)

    async def ListModels(self, request: runs_pb2.ListModelsRequest, context: Any) -> runs_pb2.ListModelsResponse:
        """See the proto."""
        record = await self._coordinator.find_run(request.run)
        return runs_pb2.ListModelsResponse(models=await self._models(record))

    async def GetPrivacy(self, request: runs_pb2.GetPrivacyRequest, context: Any) -> runs_pb2.GetPrivacyResponse:
        """See the proto."""
        record = await self._coordinator.find_run(request.run)
        config = parse_run_config(record.config_toml)
        privacy = config.privacy
        if isinstance(privacy, SitePrivacyConfig):
            plan, num_rounds, num_numbers = privacy.plan(), config.schedule.max_rounds, 2 * record.num_parameters
            return runs_pb2.GetPrivacyResponse(
                claim=await self._workers.compute(sites_claim, plan, num_rounds, num_numbers),
                population=privacy.population,
                delta=privacy.delta,
                max_epsilon=privacy.max_epsilon or 0.0,
                is_kept_by_sites=True,
            )
        if not isinstance(privacy, CentralPrivacyConfig):
            raise NotFoundError(
                f"run {record.name} promises no differential privacy; a run does whose config has [privacy] (docs/privacy.md)"
            )
        named = privacy.population

        def read(
            tx: Transaction,
        ) -> tuple[list[LedgerRecord], list[LedgerRecord], RosterRecord | None, list[ModelRecord]]:
            run_id = record.run_id
            return tx.charges(run_id), tx.charges_of_population(named), tx.roster(run_id), tx.models(run_id)

        charged, of_population, roster, models = await self._workers.store(read)
        released = {model.round for model in models}
        num_left = config.schedule.max_rounds - record.round if record.state is RunState.ACTIVE else 0
        outlook = await self._workers.compute(
            project, config, privacy, charged, of_population, num_left, record.num_parameters
        )
        return runs_pb2.GetPrivacyResponse(
            claim=claim_after(charged, record.round),
            population=named,
            num_units=len(set(roster.units.values())) if roster is not None else 0,
            delta=privacy.delta,
            max_epsilon=privacy.max_epsilon or 0.0,
            charges=[charge_to_proto(each, each.round in released) for each in charged],
            projected_epsilon=outlook.epsilon,
            affordable_rounds=outlook.rounds,
        )

    async def _models(self, record: RunRecord) -> list[runs_pb2.ModelVersion]:
        run_id = record.run_id
        models, broadcasts, charged = await self._workers.store(
            lambda tx: (tx.models(run_id), tx.broadcasts(run_id), tx.charges(run_id))
        )
        deltas = {b.version: b.num_bytes for b in broadcasts if b.base_version == b.version - 1 >= 0}

        def claims() -> list[str]:
            """By version; version 0 is made of nobody's data."""
            privacy = parse_run_config(record.config_toml).privacy
            if isinstance(privacy, SitePrivacyConfig):
                plan, num_numbers = privacy.plan(), 2 * record.num_parameters
                return [sites_claim(plan, m.round, num_numbers) if m.round else "" for m in models]
            return [claim_after(charged, m.round) if charged and m.round else "" for m in models]

        claimed = await self._workers.compute(claims)
        return [
            model_to_proto(model, record.best_version, deltas.get(model.version, 0), words)
            for model, words in zip(models, claimed, strict=True)
        ]

    async def DownloadModel(
        self, request: runs_pb2.DownloadModelRequest, context: Any
    ) -> AsyncIterator[runs_pb2.DownloadModelResponse]:
        """See the proto."""
        record = await self._coordinator.find_run(request.run)
        model = await self._find_model(record, request)
        place = self._files.average_path if request.average else self._files.model_path
        try:
            path = place(record.run_id, model.version)
            file = await self._workers.disk(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if request.average:
                raise NotFoundError(
                    f"there is no average at version {model.version} of run {record.name}: a run keeps one from version 1 on if "
                    "its config sets average.decay"
                ) from None
            raise NotFoundError(f"the file of version {model.version} is no longer kept") from None
        try:
            version = model_to_proto(model, record.best_version)
            version.file_bytes = os.fstat(file).st_size
            yield runs_pb2.DownloadModelResponse(header=runs_pb2.DownloadModelHeader(model=version))
            offset = 0
            while data := await self._workers.disk(os.pread, file, CHUNK_BYTES, offset):
                chunk = transfer_pb2.Chunk(offset=offset, data=data)
                yield runs_pb2.DownloadModelResponse(chunk=chunk)
                offset += len(data)
        finally:
            os.close(file)

    async def _find_model(self, record: RunRecord, request: runs_pb2.DownloadModelRequest) -> ModelRecord:
        match request.WhichOneof("which"):
            case "version":
                version = request.version
            case "best":
                version = record.best_version or record.model_version
            case _:
                version = record.model_version
        models = await self._workers.store(lambda tx: tx.models(record.run_id))
        for model in models:
            if model.version == version and model.is_available:
                return model
        kept = ", ".join(str(model.version) for model in models if model.is_available)
        raise NotFoundError(f"version {version} of run {record.name} is not kept; there are {kept}")

    async def _run(self, record: RunRecord) -> runs_pb2.Run:
        models = await self._workers.store(lambda tx: tx.models(record.run_id))
        measured = [model.metrics for model in models if model.metrics]
        live = self._coordinator.live_run(record.run_id)
        return run_to_proto(record, live, measured[-1] if measured else {})

    async def _sites(self, record: RunRecord) -> list[runs_pb2.SiteParticipation]:
        taken = await self._workers.store(lambda tx: tx.participations(record.run_id))
        live = self._coordinator.live_run(record.run_id)
        eligible = self._coordinator.eligible(live) if live is not None else ()
        return participations_to_proto(taken, eligible, self._coordinator)

    async def _rounds(
        self, record: RunRecord, *, newest_only: bool = False, with_previous: bool = False
    ) -> list[runs_pb2.Round]:
        """All rounds of a run, the open one as it stands in memory; or only the newest (and the one before it)."""

        def read(tx: Transaction) -> list[tuple[RoundRecord, list[AssignmentRecord]]]:
            newest = None if not newest_only else 2 if with_previous else 1
            rounds = tx.rounds(record.run_id, newest=newest)
            return [(r, tx.assignments(record.run_id, r.round)) for r in rounds]

        while True:
            before = self._open_number(record)
            stored = await self._workers.store(read)
            live = self._coordinator.live_run(record.run_id)
            # What is stored and what is in memory must be of the same moment: a round may have ended in between.
            if before == self._open_number(record):
                break
        result = []
        for round, assignments in stored:
            if live is not None and live.round is not None and live.round.round == round.round:
                continue
            # Where rounds are buffered, whoever is still at work has gone on into the open one.
            ended = [a for a in assignments if a.state is not AssignmentState.OPEN]
            result.append(round_to_proto(round, ended, self._coordinator, {}))
        if live is not None:
            result.append(self._open_round(live))
        return result

    def _open_number(self, record: RunRecord) -> tuple[int, bool] | None:
        """Of the round that is open, or would be next, and which of the two it is; None where the run is over."""
        live = self._coordinator.live_run(record.run_id)
        return (live.next_round, live.round is None) if live is not None else None

    def _open_round(self, live: LiveRun) -> runs_pb2.Round:
        if live.round is None:  # between rounds: the next one waits for its cohort
            waiting = RoundRecord(
                run_id=live.run_id,
                round=live.next_round,
                state=RoundState.SELECTING,
                reason=live.reason,
                base_version=live.record.model_version,
                created_time=0.0,
                goal=live.config.cohort.size,
                quorum=live.config.cohort.quorum,
            )
            return round_to_proto(waiting, [], self._coordinator, {})
        progress: dict[str, Progress] = {}
        for assignment_id in live.assignments:
            known = self._membership.progress(assignment_id)
            if known is not None:
                progress[assignment_id] = known
        message = round_to_proto(live.round, live.of_this_round(), self._coordinator, progress, live.deadline_seconds())
        message.reason = live.reason
        return message
