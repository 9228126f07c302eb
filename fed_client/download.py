"""Fetches the model of an assignment into the cache, verified as it arrives, from where the last attempt stopped."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from fed_client.cache import ModelCache
from fed_client.durable import SiteDiskFullError, disk_errors_named
from fed_client.retry import PASSING, Retries
from fed_client.stop import Stop
from fed_client.transport import Progress, Transport
from fed_core.errors import CorruptError, FedstreamError, InvalidError, NotFoundError, PayloadError
from fed_core.failpoints import failpoint
from fed_core.payload.frames import CHUNK_BYTES
from fed_core.payload.verify import SegmentVerifier, verify_file
from fedstream.v1 import participation_pb2

# A payload that fails at one place so often is bad at the coordinator, and one that is "not found" so often is gone.
_MAX_REPEATS = 3


class Downloads:
    """Fetches models, one at a time. Memory: one chunk and the longest segment."""

    def __init__(self, transport: Transport, cache: ModelCache) -> None:
        self._transport = transport
        self._cache = cache
        # What this process verified itself; a file from before a restart is read once before it is trusted.
        self._verified: set[bytes] = set()

    def fetch(self, assignment: participation_pb2.Assignment, stop: Stop, on_progress: Progress, log: Any) -> Path:
        """The path of the whole and verified model. Retries what passes by itself for as long as the assignment is wanted.

        Raises StoppedError, SiteDiskFullError, InvalidError (the payload breaks the format's rules, or is rotten at the
        coordinator), NotFoundError, and credential errors.
        """
        digest = assignment.model.digest
        if self._is_whole(digest):
            self._cache.touch(digest)
            return self._cache.path(digest)
        retries = Retries(stop, log)
        bad_offset, num_bad, num_missing = -1, 0, 0
        while True:
            stop.check()
            before = self._part_size(digest)
            try:
                self._fetch_rest(assignment, stop, on_progress, retries.patience)
                self._verified.add(digest)
                return self._cache.complete(digest)
            except CorruptError as error:
                num_bad = num_bad + 1 if error.offset == bad_offset else 1
                bad_offset = error.offset
                if num_bad == _MAX_REPEATS:
                    raise InvalidError(
                        f"the model arrived damaged {num_bad} times at byte {bad_offset}: {error}"
                    ) from error
                log.warning("model arrived damaged, fetching that part again", error=str(error), offset=error.offset)
                self._truncate(digest, error.offset)
            except NotFoundError as error:
                num_missing += 1
                if num_missing == _MAX_REPEATS:
                    raise
                retries.wait(error)
            except SiteDiskFullError:
                raise
            except PASSING as error:
                if self._part_size(digest) > before:
                    retries.progressed()
                retries.wait(error)

    def _is_whole(self, digest: bytes) -> bool:
        path = self._cache.path(digest)
        if not path.exists():
            return False
        if digest not in self._verified:
            try:
                verify_file(path, digest)
            except (FedstreamError, OSError):
                self._cache.discard(digest)
                return False
            self._verified.add(digest)
        return True

    def _fetch_rest(
        self, assignment: participation_pb2.Assignment, stop: Stop, on_progress: Progress, patience: float
    ) -> None:
        digest, total = assignment.model.digest, assignment.model.total_bytes
        part = self._cache.part(digest)
        verifier, offset = _resume(part, digest, total)
        if shutil.disk_usage(part.parent).free < total - offset:
            raise SiteDiskFullError(
                f"the model needs {total - offset} more bytes in {part.parent}, which has fewer free; free some, or move the "
                "state directory to a larger disk"
            )
        with disk_errors_named(part.parent), part.open("r+b" if part.exists() else "w+b") as file:
            file.truncate(offset)
            file.seek(offset)
            position = offset
            on_progress(position, total)
            if position < total:
                with closing(
                    self._transport.download(assignment.assignment_id, digest, offset, stop, patience)
                ) as chunks:
                    for chunk in chunks:
                        verifier.feed(chunk)
                        file.write(chunk)
                        position += len(chunk)
                        on_progress(position, total)
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
