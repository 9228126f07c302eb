"""What the rounds need of a store: records, and transactions over them.

A record is a frozen value; `Transaction.put` inserts or replaces the row with its key. Everything that must become true
together is written in one transaction. Times are seconds since the epoch (UTC); they are shown, never decided upon.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

Metrics = dict[str, float]


class RunState(StrEnum):
    """Life of a run."""

    ACTIVE = "active"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RoundState(StrEnum):
    """Life of a round. Each move is one transaction."""

    SELECTING = "selecting"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    COMMITTED = "committed"
    FAILED = "failed"


class AssignmentKind(StrEnum):
    """What an assignment asks for."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class AssignmentState(StrEnum):
    """Life of an assignment."""

    OPEN = "open"
    RECEIVED = "received"
    FAILED = "failed"
    DROPPED = "dropped"


@dataclass(frozen=True)
class ClientRecord:
    """An enrolled site. Key: client_id; name and enroll_request_id are unique."""

    client_id: str
    name: str
    secret_hash: str
    enroll_request_id: str
    enrolled_time: float
    has_authenticated: bool = False
    last_seen_time: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    # Workload name -> version.
    workloads: dict[str, str] = field(default_factory=dict)
    software_version: str = ""
    clock_skew_seconds: float = 0.0


@dataclass(frozen=True)
class RunRecord:
    """A run. Key: run_id; name and request_id are unique."""

    run_id: str
    name: str
    request_id: str
    state: RunState
    reason: str
    config_toml: str
    created_time: float
    # BLAKE3 over the specs of version 0, hex.
    fingerprint: str
    num_parameters: int
    model_bytes: int
    finished_time: float | None = None
    round: int = 0
    model_version: int = 0
    best_version: int = 0
    best_metric: float | None = None
    # Evaluated versions since the best one: for patience.
    num_without_gain: int = 0
    # What the plateau schedule of the clients' learning rate has seen.
    plateau_factor: float = 1.0
    plateau_best: float | None = None
    plateau_num_without_gain: int = 0
    # Rounds that failed in a row.
    num_failed_rounds: int = 0
    # Seconds of the coordinator's uptime that the run has been active.
    elapsed_seconds: float = 0.0


@dataclass(frozen=True)
class RoundRecord:
    """A round. Key: (run_id, round)."""

    run_id: str
    round: int
    state: RoundState
    reason: str
    base_version: int
    created_time: float
    goal: int = 0
    quorum: int = 0
    # Version that it committed.
    model_version: int | None = None
    # Tensor name -> exponent of its grid, fixed when the round opens.
    grid: dict[str, int] = field(default_factory=dict)
    # Where the cohort was drawn by importance: client name -> weight of its update, the weight that stands for 1, and client
    # name -> chance that it had. Fixed when the round opens; empty and 0 otherwise.
    weights: dict[str, int] = field(default_factory=dict)
    weight_unit: int = 0
    chances: dict[str, float] = field(default_factory=dict)
    # Loss that stands for the largest weight, where weights rise with losses; 0 otherwise.
    loss_scale: float = 0.0
    # What private updates were cut to, and what those of the next round are to be; 0 otherwise.
    clipping_norm: float = 0.0
    next_clipping_norm: float = 0.0
    # Phase name -> seconds of uptime spent in it.
    phase_seconds: dict[str, float] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class AssignmentRecord:
    """A piece of work for one client and, once received, the update or evaluation that came of it. Key: assignment_id;
    (run_id, round, client_id, kind, turn) is unique.

    Where rounds are buffered, `round` is the one in which the client was asked, and `buffer`, `position` and `staleness` are the
    journal: written with the receipt, they say which version an update is part of, and as what."""

    assignment_id: str
    run_id: str
    round: int
    client_id: str
    kind: AssignmentKind
    state: AssignmentState
    model_version: int
    created_time: float
    seed: int = 0
    # What the plan of a training said; 0 for evaluations, and where a version before this wrote the record.
    learning_rate: float = 0.0
    reason: str = ""
    traceback: str = ""
    received_time: float | None = None
    # Payload digest of the update, hex; empty until received and for evaluations.
    digest: str = ""
    num_examples: int = 0
    weight: int = 0
    num_steps: int = 0
    is_partial: bool = False
    training_seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    downlink_raw_bytes: int = 0
    downlink_payload_bytes: int = 0
    downlink_wire_bytes: int = 0
    uplink_raw_bytes: int = 0
    uplink_payload_bytes: int = 0
    uplink_wire_bytes: int = 0
    # What the update's encoding cost, as the client measured it; None until received and for evaluations.
    error: float | None = None
    gain: float | None = None
    # Codec -> number of the update's tensors in it.
    codecs: dict[str, int] = field(default_factory=dict)
    has_diverged: bool = False
    # How often the client had been asked before in the same round; only buffered rounds ask again.
    turn: int = 0
    # Seconds of uptime that the run had been active when the client was asked.
    asked_seconds: float = 0.0
    # Round whose buffer the update is in, or in whose time the work failed or was dropped; 0 while open, and where it is `round`.
    buffer: int = 0
    # Updates that were in the buffer before.
    position: int = 0
    # Versions that were committed between the one that the work began with and the one that the update is added to.
    staleness: int = 0

    @property
    def outcome_round(self) -> int:
        """The round that its outcome is part of; while it is open, the one in which the client was asked."""
        return self.buffer or self.round


@dataclass(frozen=True)
class ModelRecord:
    """A committed model version. Key: (run_id, version)."""

    run_id: str
    version: int
    round: int
    parent_version: int
    # BLAKE3 over the tensors' bytes in manifest order, hex: equal exactly where the models are.
    digest: str
    # Identity of the version: hex digest and length of its payload in the raw codec, whether or not such a file is ever written.
    payload_digest: str
    payload_bytes: int
    file_bytes: int
    created_time: float
    num_updates: int = 0
    num_examples: int = 0
    is_available: bool = True
    metrics: Metrics = field(default_factory=dict)
    # What the broadcast's encoding left out of the round's change; None where versions are sent whole.
    error: float | None = None
    gain: float | None = None
    # Codec -> number of the delta's tensors in it.
    codecs: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BroadcastRecord:
    """A payload that leads to a version, or goes with it. Key: (run_id, version, base_version)."""

    run_id: str
    version: int
    # Version that it begins at; -1 for a whole model, -2 for the common variate.
    base_version: int
    # Payload digest, hex, and length of the file.
    digest: str
    num_bytes: int
    created_time: float
    is_available: bool = True


@dataclass(frozen=True)
class RosterRecord:
    """Who may take part in a private run, frozen before its first round. Key: run_id."""

    run_id: str
    population: str
    created_time: float
    # Client name -> the privacy unit that it belongs to.
    units: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LedgerRecord:
    """What a round of a private run costs, charged before its noise is drawn and never taken back. Key: (run_id, round)."""

    run_id: str
    round: int
    population: str
    created_time: float
    # The mechanism as JSON (`fed_core.privacy.mechanism`).
    mechanism: str
    delta: float
    # Total variation distance, at most, between the drawn noise and what the mechanism says; it takes its part of delta.
    failure: float
    # Spent at delta by the run up to and with this round: by privacy loss distributions, and by Rényi divergences beside it.
    epsilon: float
    epsilon_rdp: float
    # The same for whoever sees the cohorts, and not only what is released.
    epsilon_of_cohort: float
    # Spent by all runs of the population.
    population_epsilon: float


@dataclass(frozen=True)
class Participation:
    """How often a client was asked to train in a run, how many of its updates are in a committed version, and the round for which
    it was last asked."""

    client_id: str
    num_selected: int
    num_counted: int
    last_round: int


Record = (
    ClientRecord
    | RunRecord
    | RoundRecord
    | AssignmentRecord
    | ModelRecord
    | BroadcastRecord
    | RosterRecord
    | LedgerRecord
)


class Transaction(Protocol):
    """Reads and writes that become durable together, or not at all. Every read sees the transaction's own writes. A reader
    that finds nothing returns None or an empty list; lists come in the order of their keys unless said otherwise."""

    def client(self, client_id: str) -> ClientRecord | None: ...
    def client_by_name(self, name: str) -> ClientRecord | None: ...
    def client_by_enroll_request(self, request_id: str) -> ClientRecord | None: ...
    def clients(self) -> list[ClientRecord]:
        """In the order of names."""
        ...

    def run(self, run_id: str) -> RunRecord | None: ...
    def run_by_name(self, name: str) -> RunRecord | None: ...
    def run_by_request(self, request_id: str) -> RunRecord | None: ...
    def runs(self, state: RunState | None = None) -> list[RunRecord]:
        """The oldest first; with a state, only those in it."""
        ...

    def round(self, run_id: str, round: int) -> RoundRecord | None: ...
    def rounds(self, run_id: str, newest: int | None = None) -> list[RoundRecord]:
        """In ascending order; of all, or of the newest so many."""
        ...

    def assignment(self, assignment_id: str) -> AssignmentRecord | None: ...
    def assignments(self, run_id: str, round: int | None = None) -> list[AssignmentRecord]:
        """All of a run, or those whose outcome is part of the round. In the order of (round, kind, client_id)."""
        ...

    def unsettled_assignments(self, run_id: str, round: int) -> list[AssignmentRecord]:
        """Those that are open, and those whose outcome is part of this round or a later one. In the order of (round, kind,
        client_id)."""
        ...

    def participations(self, run_id: str) -> list[Participation]:
        """Of all clients that were ever asked to train, in the order of their ids."""
        ...

    def open_assignments(self, client_id: str | None = None) -> list[AssignmentRecord]:
        """Those in state OPEN, of all clients or of one, the oldest first."""
        ...

    def model(self, run_id: str, version: int) -> ModelRecord | None: ...
    def models(self, run_id: str) -> list[ModelRecord]: ...
    def broadcasts(self, run_id: str) -> list[BroadcastRecord]:
        """In the order of (version, base_version)."""
        ...

    def roster(self, run_id: str) -> RosterRecord | None: ...
    def charges(self, run_id: str) -> list[LedgerRecord]:
        """What a run was charged, the first round first."""
        ...

    def charges_of_population(self, population: str) -> list[LedgerRecord]:
        """What all runs of a population were charged, the oldest first."""
        ...

    def put(self, record: Record) -> None:
        """Inserts the record, or replaces the one with its key. A second row with a unique value (a name, a request id)
        raises ConflictError."""
        ...


class Store(Protocol):
    """A durable store. Not thread-safe by contract: the app calls it from one thread."""

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Opens a writing transaction; commits (durably: a power cut cannot undo it) when the block ends, rolls back when it
        raises. A full disk raises DiskFullError, and nothing was written."""
        ...

    def close(self) -> None:
        """Releases the store's files."""
        ...
