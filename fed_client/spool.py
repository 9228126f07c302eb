"""Encoded updates that wait for their receipt: trained work is never lost.

`<assignment id>.update` is the payload, `<assignment id>.json` says whose it is. The payload is durable under its name before the
JSON is written, so a JSON file vouches for the payload beside it; whatever stands alone after a crash is of no use to anyone.
"""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from fed_client.durable import write_durably
from fed_client.state import checked_id, is_safe_id
from fed_core.errors import InvalidError
from fedstream.v1 import common_pb2, participation_pb2


@dataclass(frozen=True)
class SpooledUpdate:
    """An update that is durable here and not yet acknowledged."""

    assignment: participation_pb2.Assignment
    digest: bytes
    total_bytes: int
    path: Path

    @property
    def assignment_id(self) -> str:
        """Identity of the update."""
        return self.assignment.assignment_id

    @property
    def payload(self) -> common_pb2.PayloadRef:
        """How the update is offered to the coordinator."""
        return common_pb2.PayloadRef(
            digest=self.digest, total_bytes=self.total_bytes, kind=common_pb2.PAYLOAD_KIND_UPDATE
        )


class Spool:
    """The folder of updates. One daemon owns it (state.py's lock); its methods may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, assignment_id: str) -> Path:
        """Where the trainer puts the update of an assignment."""
        return self._directory / f"{checked_id(assignment_id)}.update"

    def _record(self, assignment_id: str) -> Path:
        return self._directory / f"{checked_id(assignment_id)}.json"

    def add(self, assignment: participation_pb2.Assignment, digest: bytes, total_bytes: int) -> SpooledUpdate:
        """Vouches for the update that now lies at `path`; durable when it returns. Raises DiskFullError."""
        spooled = SpooledUpdate(assignment, digest, total_bytes, self.path(assignment.assignment_id))
        record = {
            "assignment": base64.b64encode(assignment.SerializeToString()).decode(),
            "digest": digest.hex(),
            "total_bytes": total_bytes,
            # For the reader of the file; the assignment holds them too.
            "run_id": assignment.run_id,
            "round": assignment.round,
        }
        # Flushes the folder too, and with it the payload's own name.
        write_durably(self._record(assignment.assignment_id), json.dumps(record, indent=1).encode())
        return spooled

    def remove(self, assignment_id: str) -> None:
        """Forgets an update, or whatever there is of it. Not flushed: one that comes back after a power cut is offered
        again, and its receipt comes at once."""
        if not is_safe_id(assignment_id):
            return  # nothing can lie under such a name
        for path in (self._record(assignment_id), self.path(assignment_id)):
            with suppress(FileNotFoundError):
                path.unlink()

    def scan(self) -> list[SpooledUpdate]:
        """The updates that a restart finds, the oldest first; deletes leftovers of a crash (temporary files, payloads that
        nothing vouches for). Contents are not read: the coordinator's digests find rot, and `upload` then looks."""
        found: list[tuple[float, SpooledUpdate]] = []
        keep: set[Path] = set()
        for record in self._directory.glob("*.json"):
            spooled = self._read(record)
            if spooled is not None:
                found.append((record.stat().st_mtime, spooled))
                keep |= {record, spooled.path}
        for path in self._directory.iterdir():
            if path not in keep and path.is_file():
                path.unlink()
        return [spooled for _, spooled in sorted(found, key=lambda pair: (pair[0], pair[1].assignment_id))]

    def _read(self, record: Path) -> SpooledUpdate | None:
        try:
            fields = json.loads(record.read_bytes())
            assignment = participation_pb2.Assignment.FromString(base64.b64decode(fields["assignment"], validate=True))
            path = self.path(assignment.assignment_id)
            if record.stem != assignment.assignment_id or not path.is_file():
                return None
            return SpooledUpdate(assignment, bytes.fromhex(fields["digest"]), int(fields["total_bytes"]), path)
        except (OSError, ValueError, KeyError, TypeError, DecodeError, InvalidError):
            return None
