"""The two threads that turn an assignment into a receipt: one fetches and trains, the other uploads.

They meet in the spool, so an upload goes on while the next training runs.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from fed_client.cache import ModelCache
from fed_client.carried import CarriedState, settle_earlier
from fed_client.durable import SiteDiskFullError
from fed_client.models import Models, WayLostError
from fed_client.privacy import Charge, LedgerError, SiteAccount
from fed_client.question import Question
from fed_client.reports import Fatal, Outbox, ProgressReporter, evaluation, failure, failure_kind, failure_name
from fed_client.settings import Settings
from fed_client.spool import Spool
from fed_client.stop import StoppedError
from fed_client.training.trainer import MODEL_DAMAGED, EvaluateJob, Trainer, TrainJob, TrainResult, WorkloadError
from fed_client.transport import Transport
from fed_client.upload import SpoolCorruptError, deliver
from fed_client.work import Held, WorkTable
from fed_core.errors import (
    FedstreamError,
    InvalidError,
    NoLongerNeededError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from fed_core.failpoints import failpoint
from fed_core.plan import SiteOverrides, TrainingPlan, apply_overrides
from fedstream.v1 import common_pb2, participation_pb2

_PAUSE_AFTER_BUG_SECONDS = 10.0
# How often an assignment asks for another way to its model.
_MAX_WAYS_LOST = 3

Discard = Callable[[Held], None]


class Worker:
    """Fetches the model, trains or evaluates in the trainer process, spools the update. One assignment at a time."""

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        trainers: Mapping[str, Trainer],
        models: Models,
        cache: ModelCache,
        spool: Spool,
        carried: CarriedState,
        account: SiteAccount,
        table: WorkTable,
        question: Question,
        progress: ProgressReporter,
        outbox: Outbox,
        discard: Discard,
        fatal: Fatal,
    ) -> None:
        """`trainers` maps the names of the workloads offered; it is filled before `run`."""
        self._settings = settings
        self._transport = transport
        self._trainers = trainers
        self._models = models
        self._cache = cache
        self._spool = spool
        self._carried = carried
        self._account = account
        self._table = table
        self._question = question
        self._progress = progress
        self._outbox = outbox
        self._discard = discard
        self._fatal = fatal

    def run(self) -> None:
        """The thread: works until the table closes."""
        while held := self._table.take(common_pb2.WORK_PHASE_QUEUED):
            log = structlog.get_logger().bind(**held.log_fields)
            try:
                try:
                    self._work(held, log)
                except WayLostError as error:
                    self._ask_again(held, error, log)
            except Exception as error:
                self._end(held, error, log)
            self._cache.trim(self._in_use())
            self._carried.trim({each.assignment.run_id for each in self._table.held()})

    def refuse(self, held: Held, problem: str) -> None:
        """Gives up an assignment that this site cannot do; the caller has it in hand."""
        structlog.get_logger().warning("assignment refused", reason=problem, **held.log_fields)
        self._outbox.put(held, failure(held, participation_pb2.FAILURE_KIND_REFUSED_BY_SITE, problem))

    def _in_use(self) -> set[bytes]:
        """Digests of the models of what is held, and of the payloads that those are to be made of that are not here."""
        models = [held.assignment.model for held in self._table.held()]
        missing = [model for model in models if not self._cache.has_model(model.digest)]
        steps = {each.digest for model in missing for each in model.payloads}
        variates = {
            held.assignment.variate.digest for held in self._table.held() if held.assignment.HasField("variate")
        }
        return {model.digest for model in models} | steps | variates

    def _work(self, held: Held, log: Any) -> None:
        assignment = held.assignment  # a poll answer may put another in its place meanwhile
        is_training = assignment.kind == common_pb2.ASSIGNMENT_KIND_TRAIN
        encoding = encoding_name(assignment.uplink)
        fetches = [*assignment.model.payloads, *([assignment.variate] if assignment.HasField("variate") else [])]
        log.info(
            "assignment taken",
            kind="train" if is_training else "evaluate",
            workload=assignment.workload.name,
            model_version=assignment.model.version,
            fetches=len(fetches),
            fetch_bytes=sum(payload.total_bytes for payload in fetches),
            reads=str(self._settings.data) if self._settings.data else "what the workload reads",
            sends=_what_is_sent(held, encoding),
        )
        if self._settings.require_privacy and not held.protects_data:
            raise InvalidError(
                'this site takes part only in runs that have it protect its data by itself: submit one with privacy.kind = "local" '
                'or "examples", or ask its administrator to take require_privacy back'
            )
        self._table.move(held, common_pb2.WORK_PHASE_DOWNLOADING)

        def downloaded(done: int, total: int) -> None:
            self._progress.update(held.assignment_id, common_pb2.WORK_PHASE_DOWNLOADING, done, total)

        trainer = self._trainers[assignment.workload.name]
        known = self._cache.digests()
        self._models.obtain(assignment, trainer, held.stop, downloaded, log)
        variate = self._models.obtain_variate(assignment, held.stop, downloaded, log)
        if assignment.model.digest not in known:
            self._question.ask_now()  # what comes next may then build on it
        try:
            if is_training:
                self._train(held, assignment, trainer, variate, log)
            else:
                self._evaluate(held, assignment, trainer, log)
        except WorkloadError as error:
            if error.kind != MODEL_DAMAGED:
                raise
            self._cache.discard(assignment.model.digest)
            if assignment.HasField("variate"):
                self._cache.discard(assignment.variate.digest)
            raise WayLostError(str(error)) from error

    def _ask_again(self, held: Held, error: WayLostError, log: Any) -> None:
        """Lets the coordinator name another way to the model; not for ever."""
        if error.divergence is not None:
            self._question.add(error.divergence)
        if held.num_lost == _MAX_WAYS_LOST:
            raise InvalidError(
                f"the model of version {held.assignment.model.version} cannot be had; of {held.num_lost + 1} ways to it the last "
                f"failed so: {error}"
            ) from error
        log.warning(
            "the way to the model was lost, asking for another",
            reason=str(error),
            diverged=error.divergence is not None,
        )
        self._table.wait_for_answer(held)
        self._progress.update(held.assignment_id, common_pb2.WORK_PHASE_QUEUED)
        self._question.ask_now()

    def _train(
        self,
        held: Held,
        assignment: participation_pb2.Assignment,
        trainer: Trainer,
        variate: Path | None,
        log: Any,
    ) -> None:
        overrides = SiteOverrides(**self._settings.overrides.model_dump())
        plan, refused = apply_overrides(TrainingPlan.from_proto(assignment.plan), overrides)
        if refused:
            log.warning("overrides that this run does not allow are left out", refused=refused)
        charge = self._charge(held, assignment, plan, trainer, log) if plan.privacy is not None else None
        carried, run_id, assignment_id = self._carried, assignment.run_id, assignment.assignment_id
        carried.drop(run_id, assignment_id)  # of an earlier life that got no further
        settle_earlier(self._transport, carried, self._spool, run_id, held.stop, log)
        job = TrainJob(
            assignment_id=assignment_id,
            run_id=run_id,
            round=assignment.round,
            model_version=assignment.model.version,
            model_path=self._cache.path(assignment.model.digest),
            base_digest=assignment.model.digest.hex(),
            plan=plan,
            fingerprint=assignment.fingerprint.hex(),
            uplink=assignment.uplink,
            out_path=self._spool.path(assignment_id),
            carried=carried.promoted(run_id, assignment.fingerprint),
            carry_to=carried.prefix(run_id, assignment_id),
            variate=(variate, assignment.variate.digest.hex()) if variate is not None else None,
            sent_metrics=charge.metrics if charge is not None else {},
            num_examples=charge.num_examples if charge is not None else None,
        )
        self._begin(held, common_pb2.WORK_PHASE_TRAINING)
        with held.stop.interrupting(trainer.cancel):
            result = trainer.train(job, self._watch(held, trainer, common_pb2.WORK_PHASE_TRAINING))
        held.stop.check()
        digest = bytes.fromhex(result.digest)
        for problem in result.not_carried:
            log.warning("carried state cleared", reason=problem)
        if result.carried is not None:
            # Before the update may be sent: what it leaves behind must be there when it is counted.
            carried.add(run_id, assignment_id, digest, assignment.fingerprint, result.carried)
            failpoint("client-carried")
        spooled = self._spool.add(assignment, digest, result.total_bytes)
        failpoint("client-spooled")
        self._progress.update(held.assignment_id, common_pb2.WORK_PHASE_SPOOLED)
        log.info("trained", **_trained(result))
        self._table.release(held, common_pb2.WORK_PHASE_SPOOLED, spooled)

    def _charge(
        self, held: Held, assignment: participation_pb2.Assignment, plan: TrainingPlan, trainer: Trainer, log: Any
    ) -> Charge:
        """What the assignment costs, which is charged now. Raises InvalidError where this site may not spend it."""
        assert plan.privacy is not None
        by_examples = plan.privacy.kind == "examples"
        with held.stop.interrupting(trainer.cancel):
            description = trainer.describe(reads_data=by_examples)
        held.stop.check()
        num_examples = description.num_examples if by_examples else None
        # A complex number is two.
        charge = self._account.charge(assignment, plan, 2 * description.num_parameters, num_examples)
        failpoint("client-charged")
        log.info("charged", population=charge.population, epsilon=float(f"{charge.epsilon:.4g}"), delta=charge.delta)
        return charge

    def _evaluate(self, held: Held, assignment: participation_pb2.Assignment, trainer: Trainer, log: Any) -> None:
        if assignment.plan.HasField("privacy"):
            raise InvalidError("this run is to protect the site's data, and metrics of it would leave as they are")
        job = EvaluateJob(
            assignment_id=assignment.assignment_id,
            model_path=self._cache.path(assignment.model.digest),
            model_digest=assignment.model.digest.hex(),
            fingerprint=assignment.fingerprint.hex(),
            batch_size=assignment.plan.batch_size,
            seed=assignment.plan.seed,
            num_threads=assignment.plan.num_threads,
        )
        self._begin(held, common_pb2.WORK_PHASE_EVALUATING)
        with held.stop.interrupting(trainer.cancel):
            result = trainer.evaluate(job, self._watch(held, trainer, common_pb2.WORK_PHASE_EVALUATING))
        held.stop.check()
        log.info(
            "evaluated",
            num_examples=result.num_examples,
            **{name: round(value, 5) for name, value in result.metrics.items()},
        )
        self._outbox.put(held, evaluation(held, result.num_examples, result.metrics))

    def _begin(self, held: Held, phase: common_pb2.WorkPhase.ValueType) -> None:
        """Said at once: what hangs in its first step must not look like what came before."""
        self._table.move(held, phase)
        self._progress.update(held.assignment_id, phase)

    def _watch(
        self, held: Held, trainer: Trainer, phase: common_pb2.WorkPhase.ValueType
    ) -> Callable[[int, int, Mapping[str, float]], None]:
        def on_progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
            if held.stop.is_set:
                trainer.cancel()  # an interrupt that came before the trainer had begun had nothing to cancel
            if held.protects_data:  # steps tell how much data there is, and losses what is in it
                done, total, metrics = 0, 0, {}
            self._progress.update(held.assignment_id, phase, done, total, metrics)

        return on_progress

    def _end(self, held: Held, error: Exception, log: Any) -> None:
        if self._table.is_closed:
            return
        self._carried.drop(held.assignment.run_id, held.assignment_id)  # what was not offered was not counted
        if held.stop.is_set or isinstance(error, StoppedError):
            log.info("dropped", reason=held.stop.reason)
            self._discard(held)
        elif isinstance(error, UnauthenticatedError):
            self._fatal(error)
        else:
            self._spool.remove(held.assignment_id)
            verdict = verdict_of(held, error)
            log.warning("assignment failed", kind=failure_name(verdict.kind), error=str(error))
            if isinstance(error, WorkloadError) and error.traceback:
                log.debug("traceback", traceback=error.traceback)
            self._outbox.put(held, verdict)


def _trained(result: TrainResult) -> dict[str, Any]:
    """What the log says of a training and of the update that came of it."""
    return {
        "num_examples": result.num_examples,
        "num_steps": result.num_steps,
        "is_partial": result.is_partial,
        "seconds": round(result.seconds, 2),
        "update_bytes": result.total_bytes,
        "raw_bytes": result.raw_bytes,
        "ratio": round(result.raw_bytes / result.total_bytes, 1),
        "error": float(f"{result.error:.3g}"),
        "gain": round(result.gain, 4),
        "codecs": ", ".join(f"{codec} {num_tensors}" for codec, num_tensors in result.codecs.items()),
        **{name: round(value, 5) for name, value in result.metrics.items()},
    }


def encoding_name(uplink: str) -> str:
    """`auto (target_error 0.1)` for {"kind": "auto", "target_error": 0.1}: for people; the trainer is the one that reads it."""
    try:
        config = dict(json.loads(uplink))
        kind = str(config.pop("kind"))
    except (ValueError, TypeError, KeyError):
        return repr(uplink[:100])
    options = ", ".join(f"{name} {value}" for name, value in config.items() if value is not None)
    return f"{kind} ({options})" if options else kind


def _what_is_sent(held: Held, encoding: str) -> str:
    if held.assignment.kind != common_pb2.ASSIGNMENT_KIND_TRAIN:
        return "metrics"
    update = f"update of the shared tensors, encoded as {encoding}"
    return f"{update}, after it was protected; nothing else" if held.protects_data else f"{update}; metrics"


def verdict_of(held: Held, error: Exception) -> participation_pb2.ReportFailureRequest:
    """What is reported of an error that ended a piece of work."""
    if held.protects_data and not isinstance(error, FedstreamError | SpoolCorruptError):
        return _verdict_without_words(held, error)
    if isinstance(error, WorkloadError):
        return failure(held, failure_kind(error.kind), str(error), error.traceback)
    if isinstance(error, SiteDiskFullError):
        return failure(held, participation_pb2.FAILURE_KIND_DISK_FULL, str(error))
    if isinstance(error, SpoolCorruptError):
        return failure(held, participation_pb2.FAILURE_KIND_SPOOL_CORRUPT, str(error))
    if isinstance(error, FedstreamError):
        return failure(held, participation_pb2.FAILURE_KIND_REFUSED_BY_SITE, str(error))
    message = f"fed-client itself failed: {type(error).__name__}: {error}"
    return failure(
        held, participation_pb2.FAILURE_KIND_REFUSED_BY_SITE, message, "".join(traceback.format_exception(error))
    )


def _verdict_without_words(held: Held, error: Exception) -> participation_pb2.ReportFailureRequest:
    """The same where the site's data is to be protected: what the workload's code said of it stays here."""
    kind = error.kind if isinstance(error, WorkloadError) else "REFUSED_BY_SITE"
    message = "it failed; this run protects the site's data, so what was said of it is in the site's log alone"
    if isinstance(error, WorkloadError) and kind in _SAYS_NOTHING_OF_DATA:
        message = str(error)
    return failure(held, failure_kind(kind), message)


# Kinds of failures whose messages are our own.
_SAYS_NOTHING_OF_DATA = ("REFUSED_BY_SITE", "FINGERPRINT_MISMATCH", "DISK_FULL")


class Uploader:
    """Delivers what the spool holds, the oldest first."""

    def __init__(
        self,
        transport: Transport,
        spool: Spool,
        carried: CarriedState,
        account: SiteAccount,
        table: WorkTable,
        progress: ProgressReporter,
        outbox: Outbox,
        discard: Discard,
        fatal: Fatal,
    ) -> None:
        self._transport = transport
        self._spool = spool
        self._carried = carried
        self._account = account
        self._table = table
        self._progress = progress
        self._outbox = outbox
        self._discard = discard
        self._fatal = fatal

    def run(self) -> None:
        """The thread: delivers until the table closes."""
        while held := self._table.take(common_pb2.WORK_PHASE_SPOOLED):
            log = structlog.get_logger().bind(**held.log_fields)
            self._table.move(held, common_pb2.WORK_PHASE_UPLOADING)
            try:
                self._upload(held, log)
            except Exception as error:
                self._end(held, error, log)

    def _upload(self, held: Held, log: Any) -> None:
        assert held.spooled is not None
        if held.protects_data:
            self._account.sending(held.assignment_id, held.spooled.digest)
            failpoint("client-sending")

        def uploaded(done: int, total: int) -> None:
            self._progress.update(held.assignment_id, common_pb2.WORK_PHASE_UPLOADING, done, total)

        receipt = deliver(self._transport, held.spooled, held.stop, uploaded, log)
        # Before the spool forgets the update: after a crash in between it is offered again, and the receipt repeated.
        self._carried.settle(held.assignment.run_id, held.assignment_id, receipt.digest)
        self._discard(held)
        log.info("uploaded", bytes=held.spooled.total_bytes)
        if receipt.digest != held.spooled.digest:
            log.info("the coordinator had taken another update for this assignment before", digest=receipt.digest.hex())

    def _end(self, held: Held, error: Exception, log: Any) -> None:
        if self._table.is_closed:
            return
        # A poll that drops it may do so because it was received: what it left behind stays until the coordinator is asked.
        if isinstance(error, NoLongerNeededError | NotFoundError | PermissionDeniedError):
            self._carried.drop(held.assignment.run_id, held.assignment_id)
        if isinstance(error, StoppedError | NoLongerNeededError | NotFoundError | PermissionDeniedError):
            log.info("dropped", reason=str(error))
            self._discard(held)
        elif isinstance(error, UnauthenticatedError):
            self._fatal(error)
        elif isinstance(error, SpoolCorruptError | LedgerError):
            log.warning("update not sent", error=str(error))
            self._spool.remove(held.assignment_id)
            self._outbox.put(held, verdict_of(held, error))
        elif isinstance(error, InvalidError):
            log.warning("update refused", error=str(error))
            # What was carried into this update may be what is wrong with it, and would be in the next one too.
            self._carried.clear(held.assignment.run_id, "an update was refused")
            self._spool.remove(held.assignment_id)
            self._outbox.put(held, failure(held, participation_pb2.FAILURE_KIND_UPDATE_REFUSED, str(error)))
        else:
            # A bug of ours must neither lose the update nor end the thread.
            log.error("upload failed unexpectedly, trying again later", exc_info=error)
            held.stop.sleep(_PAUSE_AFTER_BUG_SECONDS)
            try:
                self._table.release(held, common_pb2.WORK_PHASE_SPOOLED)
            except StoppedError as stopped:
                self._end(held, stopped, log)
