"""The daemon's handle of its trainer process: jobs in, results and named errors out. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fed_core.child_process import CANCELLED, DIED, ChildError, ChildProcess, Json, OnProgress
from fed_core.plan import TrainingPlan
from fed_core.workload import Site

MODEL_DAMAGED: Final = "MODEL_DAMAGED"
"""Kind of the error that the model on this site's disk is not what it was; nothing to report, for another can be had."""


class WorkloadError(Exception):
    """A job failed. `kind` names a FailureKind of the contract ("WORKLOAD", "TRAINER_DIED" ...) or is MODEL_DAMAGED; `traceback` is
    that of the workload's code, or the last lines that a dead trainer printed."""

    def __init__(self, kind: str, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.traceback = traceback


class TrainingCancelledError(WorkloadError):
    """`cancel` or `close` ended the job; there is nothing to report."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a site has installed: the workload's name and version, the fingerprint and size of its model, the device that jobs run
    on, and how many training examples there are (None where they were not asked for)."""

    name: str
    version: str
    fingerprint: str
    num_tensors: int
    num_parameters: int
    device: str
    num_examples: int | None = None
    num_evaluation_examples: int | None = None


@dataclass(frozen=True, slots=True)
class AssembleJob:
    """Make a model's raw payload of other payloads, given as (path, digest): whole models, and deltas from `base` or from the
    result of the step before. `digest` is the identity of what is to come out. Digests are in hex; `out_path`'s folder exists."""

    base: tuple[Path, str] | None
    steps: Sequence[tuple[Path, str]]
    digest: str
    out_path: Path


@dataclass(frozen=True, slots=True)
class AssembleResult:
    """What came out: the model lies durably at the job's `out_path` where `digest` is the job's, and nothing does where it is not.
    `damaged` lists the digests of files that are no longer what they were when they were verified; then nothing came out."""

    digest: str
    damaged: Sequence[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Train from a model payload and write an update payload. Digests are in hex; `uplink` is the encoding of the update as the
    coordinator's JSON; `out_path`'s folder exists.

    `carried` is what earlier updates of the run left behind, (path, digest) by kind; what this one leaves behind goes to `carry_to`
    with `.<kind>` appended, in a folder that need not exist. Without `carry_to` nothing is carried over.

    `variate` is the run's common variate, a payload and its digest; without it that is zero.

    Where the plan asks for privacy, `sent_metrics` is all that the update says of itself, and `num_examples` what the site's
    account reckons with, where it does: with another number there is no training."""

    assignment_id: str
    run_id: str
    round: int
    model_version: int
    model_path: Path
    base_digest: str
    plan: TrainingPlan
    fingerprint: str
    uplink: str
    out_path: Path
    carried: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    carry_to: Path | None = None
    variate: tuple[Path, str] | None = None
    sent_metrics: Mapping[str, float] = field(default_factory=dict)
    num_examples: int | None = None


@dataclass(frozen=True, slots=True)
class TrainResult:
    """An update that lies durably at the job's `out_path`, and how it came about. `error` and `gain` say what its encoding cost
    (payload.proto, UpdateInfo), `codecs` how many tensors each codec got.

    `carried` names what it leaves behind, durably, at the job's `carry_to`: digests by kind, none where what was left is lost; None
    where such an update leaves nothing behind. `not_carried` says why something of it is lost."""

    digest: str
    total_bytes: int
    raw_bytes: int
    error: float
    gain: float
    codecs: Mapping[str, int]
    num_examples: int
    num_steps: int
    is_partial: bool
    seconds: float
    metrics: Mapping[str, float]
    carried: Mapping[str, str] | None = None
    not_carried: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class EvaluateJob:
    """Evaluate a model payload on the site's own evaluation data."""

    assignment_id: str
    model_path: Path
    model_digest: str
    fingerprint: str
    batch_size: int
    seed: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Means over `num_examples`; 0 and none where the site has no evaluation data."""

    num_examples: int
    metrics: Mapping[str, float]


class Trainer:
    """One workload at one site, in a process that stays warm between jobs.

    The site's data is read once in the life of that process; model, optimizer and random numbers are made anew for every job, so a
    job gives the same bits in a warm process and in a fresh one. Thread-safe; jobs wait for each other.
    """

    def __init__(self, workload_source: str, *, site: Site, device: str = "auto", log_path: Path | None = None) -> None:
        """`workload_source` is a name or path as `load_workload` takes it; `device` is "auto", "cpu", "cuda" or "mps". What the
        workload prints goes to `log_path`."""
        self.workload_source = workload_source
        settings = {
            "workload": workload_source,
            "site": {
                "name": site.name,
                "data": str(site.data) if site.data is not None else None,
                "options": dict(site.options),
            },
            "device": device,
        }
        self._child = ChildProcess("fed_client.training.child", settings, log_path)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self, *, reads_data: bool = False) -> Description:
        """What the workload is; starts the process. With `reads_data` the site's data is read and counted too."""
        return Description(**self._call({"do": "describe", "reads_data": reads_data}))

    def assemble(self, job: AssembleJob, on_progress: OnProgress | None = None) -> AssembleResult:
        """Makes a model. `on_progress(0, 1, {})` is called when it begins. Raises WorkloadError, also where the steps do not
        follow on from each other; no file is left behind then."""
        request = {
            "do": "assemble",
            "base": [str(job.base[0]), job.base[1]] if job.base is not None else None,
            "steps": [[str(path), digest] for path, digest in job.steps],
            "digest": job.digest,
            "out_path": str(job.out_path),
        }
        return AssembleResult(**self._call(request, on_progress))

    def train(self, job: TrainJob, on_progress: OnProgress | None = None) -> TrainResult:
        """Trains and writes the update. `on_progress(steps done, steps in all, {"loss": running mean})` is called from this
        thread, at most four times a second and once at the end. Raises WorkloadError; no file is left behind then."""
        request = {
            "do": "train",
            "assignment_id": job.assignment_id,
            "run_id": job.run_id,
            "round": job.round,
            "model_version": job.model_version,
            "model_path": str(job.model_path),
            "base_digest": job.base_digest,
            "plan": job.plan.to_json(),
            "fingerprint": job.fingerprint,
            "uplink": job.uplink,
            "out_path": str(job.out_path),
            "carried": {kind: [str(path), digest] for kind, (path, digest) in job.carried.items()},
            "carry_to": str(job.carry_to) if job.carry_to is not None else None,
            "common": [str(job.variate[0]), job.variate[1]] if job.variate is not None else None,
            "sent_metrics": dict(job.sent_metrics),
            "num_accounted": job.num_examples,
        }
        return TrainResult(**self._call(request, on_progress))

    def evaluate(self, job: EvaluateJob, on_progress: OnProgress | None = None) -> EvaluationResult:
        """Evaluates. `on_progress(examples done, examples in all, {})` as in `train`. Raises WorkloadError."""
        request = {
            "do": "evaluate",
            "model_path": str(job.model_path),
            "model_digest": job.model_digest,
            "fingerprint": job.fingerprint,
            "batch_size": job.batch_size,
            "seed": job.seed,
            "num_threads": job.num_threads,
        }
        return EvaluationResult(**self._call(request, on_progress))

    def cancel(self) -> None:
        """From any thread: ends the job at work, which raises TrainingCancelledError; the next one starts a new process."""
        self._child.cancel()

    def close(self) -> None:
        """Ends the process. Closing twice is harmless."""
        self._child.close()

    @property
    def pid(self) -> int | None:
        """Id of the trainer process; None where it does not run."""
        return self._child.pid

    def _call(self, request: Mapping[str, Any], on_progress: OnProgress | None = None) -> Json:
        try:
            return self._child.call(request, on_progress)
        except ChildError as error:
            if error.kind == CANCELLED:
                raise TrainingCancelledError("TRAINER_DIED", str(error)) from None
            if error.kind == DIED:
                raise WorkloadError(
                    "TRAINER_DIED", f"training ended without an answer: {error}", error.traceback
                ) from None
            raise WorkloadError(error.kind, str(error), error.traceback) from None
