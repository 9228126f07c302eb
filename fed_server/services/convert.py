"""From records to messages: no decisions here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from fed_core.errors import InvalidError
from fed_core.privacy.mechanism import Mechanism
from fed_server.config import parse_run_config
from fed_server.rounds.broadcast import VARIATE, WHOLE
from fed_server.rounds.coordinator import Coordinator
from fed_server.rounds.membership import Progress
from fed_server.rounds.run import LiveRun
from fed_server.store.base import (
    AssignmentKind,
    AssignmentRecord,
    AssignmentState,
    BroadcastRecord,
    ClientRecord,
    LedgerRecord,
    ModelRecord,
    Participation,
    RoundRecord,
    RoundState,
    RunRecord,
    RunState,
)
from fedstream.v1 import common_pb2, runs_pb2

MAX_METRICS = 64

_PHASES = frozenset(common_pb2.WorkPhase.keys())

RUN_STATES = {state: runs_pb2.RunState.Value(f"RUN_STATE_{state.name}") for state in RunState}
ROUND_STATES = {state: runs_pb2.RoundState.Value(f"ROUND_STATE_{state.name}") for state in RoundState}
ASSIGNMENT_STATES = {
    state: runs_pb2.AssignmentState.Value(f"ASSIGNMENT_STATE_{state.name}") for state in AssignmentState
}
ASSIGNMENT_KINDS = {kind: common_pb2.AssignmentKind.Value(f"ASSIGNMENT_KIND_{kind.name}") for kind in AssignmentKind}


def phase_name(phase: int) -> str:
    """A WorkPhase in lower case; an unknown one as "working"."""
    if phase not in common_pb2.WorkPhase.values():
        return "working"
    return common_pb2.WorkPhase.Name(common_pb2.WorkPhase.ValueType(phase)).removeprefix("WORK_PHASE_").lower()


def phase_of(name: str) -> common_pb2.WorkPhase.ValueType:
    """The WorkPhase of a lower-case name."""
    full = f"WORK_PHASE_{name.upper()}"
    return common_pb2.WorkPhase.Value(full) if full in _PHASES else common_pb2.WORK_PHASE_UNSPECIFIED


def timestamp(seconds: float | None) -> Timestamp | None:
    """Seconds since the epoch as a Timestamp; absent where there is none."""
    if not seconds:
        return None
    message = Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def metrics_to_proto(metrics: Mapping[str, float]) -> list[common_pb2.Metric]:
    """In the order of names."""
    return [common_pb2.Metric(name=name, value=value) for name, value in sorted(metrics.items())]


def metrics_from_proto(metrics: Iterable[common_pb2.Metric]) -> dict[str, float]:
    """Raises InvalidError for more than 64, a repeated or an empty or overlong name."""
    result: dict[str, float] = {}
    for metric in metrics:
        if not 1 <= len(metric.name) <= 100 or metric.name in result or len(result) >= MAX_METRICS:
            raise InvalidError(
                f"metric {metric.name[:100]!r}: expected at most {MAX_METRICS} metrics with distinct names of 1 to 100 bytes"
            )
        result[metric.name] = metric.value
    return result


def run_to_proto(record: RunRecord, live: LiveRun | None, metrics: Mapping[str, float]) -> runs_pb2.Run:
    """A run; `live` says why it is where it is now."""
    config = parse_run_config(record.config_toml)
    return runs_pb2.Run(
        run_id=record.run_id,
        name=record.name,
        state=RUN_STATES[record.state],
        reason=live.reason if live is not None else record.reason,
        round=record.round,
        max_rounds=config.schedule.max_rounds,
        model_version=record.model_version,
        best_version=record.best_version,
        workload=common_pb2.WorkloadOffer(name=config.workload, version=config.workload_version),
        seed=config.seed,
        created_time=timestamp(record.created_time),
        finished_time=timestamp(record.finished_time),
        metrics=metrics_to_proto(metrics),
        config_toml=record.config_toml,
        num_parameters=record.num_parameters,
    )


def charge_to_proto(charge: LedgerRecord, is_released: bool) -> runs_pb2.PrivacyCharge:
    """What a round cost."""
    mechanism = Mechanism.from_json(json.loads(charge.mechanism))
    return runs_pb2.PrivacyCharge(
        round=charge.round,
        epsilon=charge.epsilon,
        epsilon_rdp=charge.epsilon_rdp,
        epsilon_of_cohort=charge.epsilon_of_cohort,
        population_epsilon=charge.population_epsilon,
        failure=charge.failure,
        sensitivity=mechanism.sensitivity,
        sigma=mechanism.update_sigma,
        is_released=is_released,
    )


def round_to_proto(
    record: RoundRecord,
    assignments: Iterable[AssignmentRecord],
    coordinator: Coordinator,
    progress: Mapping[str, Progress],
    deadline_seconds: float = -1.0,
) -> runs_pb2.Round:
    """A round with its clients, in the order of (kind, name)."""
    listed = sorted(assignments, key=lambda a: (a.kind, coordinator.name_of(a.client_id)), reverse=False)
    clients = [_client_to_proto(a, coordinator, progress.get(a.assignment_id), record) for a in listed]
    return runs_pb2.Round(
        round=record.round,
        state=ROUND_STATES[record.state],
        reason=record.reason,
        base_version=record.base_version,
        model_version=record.model_version or 0,
        goal=record.goal,
        quorum=record.quorum,
        deadline_seconds=deadline_seconds,
        clients=clients,
        metrics=metrics_to_proto(record.metrics),
        seconds=[
            runs_pb2.PhaseSeconds(phase=phase, seconds=seconds) for phase, seconds in record.phase_seconds.items()
        ],
        downlink=sum_traffic(client.downlink for client in clients),
        uplink=sum_traffic(client.uplink for client in clients),
        created_time=timestamp(record.created_time),
    )


def _client_to_proto(
    a: AssignmentRecord, coordinator: Coordinator, progress: Progress | None, round: RoundRecord
) -> runs_pb2.RoundClient:
    is_training = a.kind is AssignmentKind.TRAIN
    reason = a.reason if not a.traceback else f"{a.reason}\n{a.traceback}"
    return runs_pb2.RoundClient(
        assignment_id=a.assignment_id,
        client_id=a.client_id,
        client_name=coordinator.name_of(a.client_id),
        assignment_kind=ASSIGNMENT_KINDS[a.kind],
        state=ASSIGNMENT_STATES[a.state],
        reason=reason,
        phase=phase_of(progress.phase) if progress else common_pb2.WORK_PHASE_UNSPECIFIED,
        done=progress.done if progress else 0,
        total=progress.total if progress else 0,
        eta_seconds=progress.eta_seconds() if progress else -1.0,
        num_examples=a.num_examples,
        weight=a.weight,
        num_steps=a.num_steps,
        is_partial=a.is_partial,
        metrics=metrics_to_proto(a.metrics or (progress.metrics if progress else {})),
        downlink=runs_pb2.Traffic(
            raw_bytes=a.downlink_raw_bytes, payload_bytes=a.downlink_payload_bytes, wire_bytes=a.downlink_wire_bytes
        ),
        uplink=runs_pb2.Traffic(
            raw_bytes=a.uplink_raw_bytes, payload_bytes=a.uplink_payload_bytes, wire_bytes=a.uplink_wire_bytes
        ),
        training_seconds=a.training_seconds,
        is_alive=coordinator.is_alive(a.client_id),
        fidelity=_fidelity(a),
        has_diverged=a.has_diverged,
        learning_rate=a.learning_rate,
        selection_chance=round.chances.get(coordinator.name_of(a.client_id), 0.0) if is_training else 0.0,
        model_version=a.model_version,
        staleness=a.staleness,
    )


def _fidelity(record: AssignmentRecord | ModelRecord) -> runs_pb2.Fidelity | None:
    if record.error is None or record.gain is None:
        return None
    return runs_pb2.Fidelity(error=record.error, gain=record.gain, tensors=record.codecs)


def sum_traffic(parts: Iterable[runs_pb2.Traffic]) -> runs_pb2.Traffic:
    """Totals."""
    total = runs_pb2.Traffic()
    for part in parts:
        total.raw_bytes += part.raw_bytes
        total.payload_bytes += part.payload_bytes
        total.wire_bytes += part.wire_bytes
    return total


def model_to_proto(
    record: ModelRecord, best_version: int, delta_bytes: int = 0, privacy: str = ""
) -> runs_pb2.ModelVersion:
    """A version; `delta_bytes` is the length of its delta, where it has one, and `privacy` what was spent with it, in words."""
    return runs_pb2.ModelVersion(
        version=record.version,
        round=record.round,
        parent_version=record.parent_version,
        digest=bytes.fromhex(record.digest),
        metrics=metrics_to_proto(record.metrics),
        num_updates=record.num_updates,
        num_examples=record.num_examples,
        is_available=record.is_available,
        is_best=record.version == best_version and record.version > 0,
        created_time=timestamp(record.created_time),
        file_bytes=record.file_bytes,
        fidelity=_fidelity(record) if record.version > 0 else None,
        delta_bytes=delta_bytes,
        privacy=privacy,
    )


def participations_to_proto(
    records: Iterable[Participation], eligible: Iterable[str], coordinator: Coordinator
) -> list[runs_pb2.SiteParticipation]:
    """Who took part how often, in the order of names; those of the `eligible`, by name, who never were asked come with zeros."""
    taken = {record.client_id: record for record in records}
    never = {client_id for client_id in coordinator.client_ids(eligible).values() if client_id not in taken}
    taken |= {client_id: Participation(client_id, 0, 0, 0) for client_id in never}
    sites = [
        runs_pb2.SiteParticipation(
            client_id=record.client_id,
            client_name=coordinator.name_of(record.client_id),
            num_selected=record.num_selected,
            num_counted=record.num_counted,
            last_round=record.last_round,
        )
        for record in taken.values()
    ]
    return sorted(sites, key=lambda site: site.client_name)


def broadcast_to_proto(record: BroadcastRecord) -> common_pb2.PayloadRef:
    """A step on the way to a version, or what goes with it."""
    kinds = {WHOLE: common_pb2.PAYLOAD_KIND_MODEL, VARIATE: common_pb2.PAYLOAD_KIND_VARIATE}
    return common_pb2.PayloadRef(
        digest=bytes.fromhex(record.digest),
        total_bytes=record.num_bytes,
        kind=kinds.get(record.base_version, common_pb2.PAYLOAD_KIND_DELTA),
    )


def client_to_proto(record: ClientRecord, coordinator: Coordinator) -> runs_pb2.Client:
    """An enrolled client."""
    return runs_pb2.Client(
        client_id=record.client_id,
        name=record.name,
        is_alive=coordinator.is_alive(record.client_id),
        last_seen_time=timestamp(record.last_seen_time),
        enrolled_time=timestamp(record.enrolled_time),
        labels=record.labels,
        workloads=[
            common_pb2.WorkloadOffer(name=name, version=version) for name, version in sorted(record.workloads.items())
        ],
        software_version=record.software_version,
        clock_skew_seconds=record.clock_skew_seconds,
        num_open_assignments=coordinator.num_open(record.client_id),
    )
