"""One upload on its way: bytes to a partial file, each checked as it comes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from fed_core.errors import InvalidError, OffsetError, UpdateRefusedError
from fed_core.payload.manifest import Manifest
from fed_core.payload.verify import SegmentVerifier, verify_prefix
from fed_server.aggregation.validate import Expected, ValueChecker
from fed_server.store.blobs import DataDirectory

# Room for the manifest and codecs' tables beside the values; nothing larger is ever begun.
_OVERHEAD_BYTES = 2**20


def largest_upload(raw_bytes: int) -> int:
    """Bytes above which an update of a model of `raw_bytes` cannot be genuine: no codec makes a tensor much larger."""
    return raw_bytes + raw_bytes // 16 + _OVERHEAD_BYTES


class Upload:
    """An upload to one assignment. The methods block (disk, hashing) and are called one at a time."""

    def __init__(
        self, files: DataDirectory, expected: Expected, digest: bytes, total_bytes: int, max_bytes: int
    ) -> None:
        if total_bytes > max_bytes:
            raise UpdateRefusedError(
                f"the update is announced with {total_bytes:,} bytes; at most {max_bytes:,} can be genuine for this model"
            )
        self._files = files
        self._final = files.update_path(expected.assignment_id)
        self._part = files.upload_path(expected.assignment_id)
        self._digest = digest
        self._total_bytes = total_bytes
        self._max_bytes = max_bytes
        self.checker = ValueChecker(expected)
        self._file = -1
        self._verifier: SegmentVerifier | None = None
        self._offset = 0
        # A call that is cancelled leaves its thread in the middle of its work; `close` waits for it, so that whoever comes next
        # finds the files at rest.
        self._working = threading.RLock()
        self._is_closed = False

    def open(self, offset: int) -> None:
        """Checks what is there already, values included, and makes ready to go on at `offset`: the end of it, or 0 to begin anew.
        Another digest than the partial file's discards it. Raises OffsetError with the right offset."""
        with self._working, self._files.disk_errors("storing an update"):
            if not self._is_closed:
                self._open(offset)

    def _open(self, offset: int) -> None:
        if self._final.exists() and not self._part.exists():
            # Made durable by a process that died before it could say so: take it as what has arrived.
            os.replace(self._final, self._part)
        manifest: Manifest | None = None
        accepted = 0
        if offset > 0 and self._part.exists():
            accepted, manifest = verify_prefix(
                self._part,
                self._digest,
                self._max_bytes,
                on_manifest=self.checker.on_manifest,
                on_segment=self.checker.on_segment,
            )
        if offset != accepted:
            raise OffsetError(f"the upload goes on at byte {accepted}, not at {offset}; ask GetUpload", offset=accepted)
        self._files.require_free(self._total_bytes - accepted, "an update")
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, accepted)
        self._offset = accepted
        self._verifier = SegmentVerifier(
            self._digest,
            self._max_bytes,
            on_manifest=self._on_manifest,
            on_segment=self.checker.on_segment,
            verified=(accepted, manifest),
        )

    def _on_manifest(self, manifest: Manifest) -> None:
        self.checker.on_manifest(manifest)
        if manifest.total_bytes != self._total_bytes:
            raise UpdateRefusedError(
                f"the update was announced with {self._total_bytes:,} bytes, its manifest says {manifest.total_bytes:,}"
            )

    def write(self, offset: int, data: memoryview) -> None:
        """Takes the next chunk. Raises CorruptError, PayloadError, UpdateRefusedError, NotFiniteError, DiskFullError."""
        assert self._verifier is not None
        if offset != self._offset:
            raise InvalidError(f"chunk at byte {offset}; expected the next one at {self._offset}")
        if offset + len(data) > self._total_bytes:
            raise UpdateRefusedError(f"more bytes than the {self._total_bytes:,} that were announced")
        # Verified first: what is on disk up to the verified offset has always passed every check.
        self._verifier.feed(data)
        with self._working, self._files.disk_errors("storing an update"):
            written = 0
            while written < len(data) and self._file >= 0:
                written += os.pwrite(self._file, data[written:], offset + written)
        self._offset += len(data)

    def finish(self) -> Manifest:
        """Makes the whole update durable under its assignment; raises CorruptError where bytes are missing."""
        assert self._verifier is not None
        with self._working:
            manifest = self._verifier.finish()
            if not self._is_closed:
                self.close()
                self._files.publish(self._part, self._final)
        return manifest

    def close(self) -> None:
        """Leaves the partial file as it is; what verified will be the accepted offset."""
        with self._working:
            self._is_closed = True
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def discard(self) -> None:
        """Deletes the partial file of an update that was refused by name."""
        self.close()
        self._part.unlink(missing_ok=True)


def accepted_offset(part: Path, final: Path, digest: bytes, max_bytes: int) -> int:
    """Bytes of an update that need not be sent again; 0 where nothing, or another update, is there."""
    for path in (part, final):
        if path.exists():
            return verify_prefix(path, digest, max_bytes)[0]
    return 0
