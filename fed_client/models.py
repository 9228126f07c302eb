"""How a model comes to this site: its payloads fetched in order, and, where they are not the model itself, the model made of them
in the trainer process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fed_client.cache import ModelCache, read_manifest
from fed_client.download import Downloads
from fed_client.stop import Stop
from fed_client.training.trainer import AssembleJob, Trainer
from fed_client.transport import Progress
from fed_core.errors import InvalidError, NotFoundError, PermissionDeniedError
from fed_core.failpoints import failpoint
from fed_core.payload.limits import DIGEST_BYTES, PREAMBLE_BYTES
from fedstream.v1 import common_pb2, participation_pb2

MAX_PAYLOADS: Final = 1024


class WayLostError(Exception):
    """The way to the model that the coordinator named leads nowhere from here; asked again, it will name another.

    `divergence` is set where the way was gone to its end and led to another model.
    """

    def __init__(self, message: str, divergence: participation_pb2.Divergence | None = None) -> None:
        super().__init__(message)
        self.divergence = divergence


class Models:
    """Brings the models of assignments into the cache, one at a time."""

    def __init__(self, downloads: Downloads, cache: ModelCache) -> None:
        self._downloads = downloads
        self._cache = cache

    def obtain(
        self, assignment: participation_pb2.Assignment, trainer: Trainer, stop: Stop, on_progress: Progress, log: Any
    ) -> Path:
        """The path of the assignment's model, whole and verified. `on_progress` counts the bytes of all payloads together. A crash
        anywhere in here costs nothing that was fetched.

        Raises WayLostError, whatever `Downloads.fetch` raises, and WorkloadError of the trainer.
        """
        model = assignment.model
        _check(model)
        if self._cache.has_model(model.digest):
            self._cache.touch(model.digest)
            return self._cache.path(model.digest)
        if not model.payloads:
            raise WayLostError("the coordinator takes this site to hold the model, which is not here any longer")
        # A payload with the digest of the model is the model.
        whole = [payload for payload in model.payloads if payload.digest == model.digest][:1]
        base = self._fetch(assignment, whole or list(model.payloads), bool(whole), stop, on_progress, log)
        if not whole:
            self._assemble(assignment, base, trainer, stop, log)
        return self._cache.path(model.digest)

    def obtain_variate(
        self, assignment: participation_pb2.Assignment, stop: Stop, on_progress: Progress, log: Any
    ) -> Path | None:
        """The path of the common variate that the assignment names, whole and verified; None where it names none. Raises as
        `obtain` does."""
        if not assignment.HasField("variate"):
            return None
        variate = assignment.variate
        _check_payload(variate)
        if not self._cache.has_step(variate.digest):

            def fetched(num_bytes: int) -> None:
                on_progress(num_bytes, variate.total_bytes)

            try:
                self._downloads.fetch(assignment.assignment_id, variate, stop, fetched, log, is_model=False)
            except (NotFoundError, PermissionDeniedError) as error:
                raise WayLostError(f"the coordinator no longer gives out the variate that it named: {error}") from error
        return self._cache.step(variate.digest)

    def _fetch(
        self,
        assignment: participation_pb2.Assignment,
        payloads: list[common_pb2.PayloadRef],
        is_model: bool,
        stop: Stop,
        on_progress: Progress,
        log: Any,
    ) -> bytes:
        """Fetches what is not here yet. Returns the identity of the model that the first of them builds on; empty where it is a
        whole one."""
        total = sum(payload.total_bytes for payload in payloads)
        missing = {payload.digest for payload in payloads if is_model or not self._cache.has_step(payload.digest)}
        num_left = sum(payload.total_bytes for payload in payloads if payload.digest in missing)
        base = b""
        for payload in payloads:
            if payload.digest in missing:
                before = total - num_left
                num_left -= payload.total_bytes

                def fetched(num_bytes: int, before: int = before) -> None:
                    on_progress(before + num_bytes, total)

                try:
                    self._downloads.fetch(
                        assignment.assignment_id,
                        payload,
                        stop,
                        fetched,
                        log,
                        is_model=is_model,
                        num_bytes_after=num_left,
                    )
                except (NotFoundError, PermissionDeniedError) as error:
                    raise WayLostError(f"the coordinator no longer gives out what it named: {error}") from error
            if payload is payloads[0] and not is_model:
                base = read_manifest(self._cache.step(payload.digest)).base_digest
                if base and not self._cache.has_model(base):
                    raise WayLostError(f"the way begins at the model {base.hex()[:16]}, which is not here any longer")
        return base

    def _assemble(
        self, assignment: participation_pb2.Assignment, base: bytes, trainer: Trainer, stop: Stop, log: Any
    ) -> None:
        model, cache = assignment.model, self._cache
        steps = [payload.digest for payload in model.payloads]
        job = AssembleJob(
            base=(cache.path(base), base.hex()) if base else None,
            steps=[(cache.step(digest), digest.hex()) for digest in steps],
            digest=model.digest.hex(),
            out_path=cache.path(model.digest),
        )

        def at_work(done: int, total: int, metrics: Mapping[str, float]) -> None:
            if stop.is_set:
                trainer.cancel()  # an interrupt that came before the trainer had begun had nothing to cancel
            failpoint("client-mid-assemble")

        with stop.interrupting(trainer.cancel):
            result = trainer.assemble(job, at_work)
        stop.check()
        if result.damaged:
            for digest in result.damaged:
                cache.discard(bytes.fromhex(digest))
            raise WayLostError(f"{', '.join(each[:16] for each in result.damaged)} on this site's disk is damaged")
        if result.digest != job.digest:
            for each in (base, *steps):
                cache.discard(each)
            raise WayLostError(
                f"version {model.version} came out as {result.digest[:16]} and should be {job.digest[:16]}",
                participation_pb2.Divergence(
                    assignment_id=assignment.assignment_id, version=model.version, digest=bytes.fromhex(result.digest)
                ),
            )
        cache.made(model.digest)
        failpoint("client-assembled")
        for each in steps:
            cache.discard(each)
        log.info("model made", version=model.version, steps=len(steps), seconds=round(result.seconds, 2))


def _check(model: participation_pb2.ModelRef) -> None:
    """Refuses what becomes file names and sizes here, where it cannot be right."""
    if len(model.digest) != DIGEST_BYTES or len(model.payloads) > MAX_PAYLOADS:
        raise InvalidError(
            f"the assignment names its model by {len(model.digest)} bytes and {len(model.payloads)} payloads; expected "
            f"{DIGEST_BYTES} bytes and at most {MAX_PAYLOADS} payloads"
        )
    for payload in model.payloads:
        _check_payload(payload)


def _check_payload(payload: common_pb2.PayloadRef) -> None:
    if len(payload.digest) != DIGEST_BYTES or payload.total_bytes < PREAMBLE_BYTES:
        raise InvalidError("the assignment names a payload without a digest or length")
