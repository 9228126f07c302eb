"""Fetches one payload into the cache, verified as it arrives, from where the last attempt stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from fed_client.cache import ModelCache
from fed_client.durable import SiteDiskFullError, disk_errors_named
from fed_client.retry import PASSING, Retries
from fed_client.stop import Stop
from fed_client.transport import Transport
from fed_core.errors import CorruptError, InvalidError, PayloadError
from fed_core.failpoints import failpoint
from fed_core.payload.frames import CHUNK_BYTES
from fed_core.payload.verify import SegmentVerifier
from fedstream.v1 import common_pb2

# A payload that fails at one place so often is bad at the coordinator.
_MAX_REPEATS = 3

OnBytes = Callable[[int], None]
"""Called with the number of bytes that are there."""


class Downloads:
    """Fetches payloads, one at a time. Memory: one chunk and the longest segment."""

    def __init__(self, transport: Transport, cache: ModelCache) -> None:
        self._transport = transport
        self._cache = cache

    def fetch(
        self,
        assignment_id: str,
        payload: common_pb2.PayloadRef,
        stop: Stop,
        on_bytes: OnBytes,
        log: Any,
        *,
        is_model: bool,
        num_bytes_after: int = 0,
    ) -> Path:
        """The path of the whole and verified payload: of the model itself with `is_model`, else of a step to it. Retries what
        passes by itself for as long as the assignment is wanted. `num_bytes_after` more will be fetched, and must have room too.

        Raises StoppedError, SiteDiskFullError, InvalidError (the payload breaks the format's rules, or is rotten at the
        coordinator), NotFoundError and PermissionDeniedError (it is not to be had for this assignment, or no longer), and
        credential errors.
        """
        digest = payload.digest
        complete = self._cache.complete_model if is_model else self._cache.complete_step
        retries = Retries(stop, log)
        bad_offset, num_bad = -1, 0
        while True:
            stop.check()
            before = self._part_size(digest)
            try:
                self._fetch_rest(assignment_id, payload, stop, on_bytes, retries.patience, is_model, num_bytes_after)
                return complete(digest)
            except CorruptError as error:
                num_bad = num_bad + 1 if error.offset == bad_offset else 1
                bad_offset = error.offset
                if num_bad == _MAX_REPEATS:
                    raise InvalidError(
                        f"the payload arrived damaged {num_bad} times at byte {bad_offset}: {error}"
                    ) from error
                log.warning("payload arrived damaged, fetching that part again", error=str(error), offset=error.offset)
                self._truncate(digest, error.offset)
            except SiteDiskFullError:
                raise
            except PASSING as error:
                if self._part_size(digest) > before:
                    retries.progressed()
                retries.wait(error)

    def _fetch_rest(
        self,
        assignment_id: str,
        payload: common_pb2.PayloadRef,
        stop: Stop,
        on_bytes: OnBytes,
        patience: float,
        is_model: bool,
        num_bytes_after: int,
    ) -> None:
        digest, total = payload.digest, payload.total_bytes
        part = self._cache.part(digest)
        verifier, offset = _resume(part, digest, total)
        _check_space(part.parent, total - offset + num_bytes_after)
        with disk_errors_named(part.parent), part.open("r+b" if part.exists() else "w+b") as file:
            file.truncate(offset)
            file.seek(offset)
            position = offset
            on_bytes(position)
            has_room = is_model
            if position < total:
                with closing(self._transport.download(assignment_id, digest, offset, stop, patience)) as chunks:
                    for chunk in chunks:
                        verifier.feed(chunk)
                        if not has_room and verifier.manifest is not None:
                            # Known only now: how large the model is that will be made of it.
                            has_room = True
                            _check_space(part.parent, total - position + num_bytes_after + verifier.manifest.raw_bytes)
                        file.write(chunk)
                        position += len(chunk)
                        on_bytes(position)
                        failpoint("client-mid-download")
            verifier.finish()
            file.flush()
            os.fsync(file.fileno())

    def _part_size(self, digest: bytes) -> int:
        try:
            return self._cache.part(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def _truncate(self, digest: bytes, offset: int) -> None:
        part = self._cache.part(digest)
        if part.exists():
            os.truncate(part, offset)


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SiteDiskFullError(
            f"the model needs {num_bytes} more bytes in {folder}, which has {free} free; free some, or move the state directory to "
            "a larger disk"
        )


def _resume(part: Path, digest: bytes, total_bytes: int) -> tuple[SegmentVerifier, int]:
    """A verifier that has taken what is there of a download, and where to go on: at the end, in the middle of a segment too,
    for on a line that breaks often whole segments may never come through; or at the end of what is good."""
    verifier = SegmentVerifier(digest, total_bytes)
    if not part.exists():
        return verifier, 0
    offset = 0
    try:
        with part.open("rb", buffering=0) as file:
            while block := file.read(CHUNK_BYTES):
                verifier.feed(block)
                offset += len(block)
    except (CorruptError, PayloadError):  # a power cut tore it
        offset = verifier.verified_offset
        verifier = SegmentVerifier(digest, total_bytes, verified=(offset, verifier.manifest))
    return verifier, offset
