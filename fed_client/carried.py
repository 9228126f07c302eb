"""State of this site that follows its updates: what an update leaves behind for the next one of its run.

It is made with the update and stands once the coordinator has counted that update, never before and never otherwise: the residual
of error feedback is what the encoding of this update lost, and nobody else can send it any more.

    carried/<run>/<assignment>.<kind>   a file of tensors, written by the trainer
    carried/<run>/<assignment>.json     vouches for the files of this assignment, and says with which update they go: pending
    carried/<run>/promoted              the same of the last update that was counted: what stands

To promote is to rename a record, so a crash leaves the old state or the new one. Whether an update was counted is the coordinator's
word alone, its receipt; a site that missed it asks again before it trains for the run the next time (`settle_earlier`).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from fed_client.durable import publish, sync_directory, write_durably
from fed_client.retry import PASSING, Retries
from fed_client.spool import Spool
from fed_client.state import checked_id, is_safe_id
from fed_client.stop import Stop
from fed_client.transport import Transport
from fed_core.errors import InvalidError, NoLongerNeededError, NotFoundError, PermissionDeniedError
from fed_core.failpoints import failpoint

_PROMOTED: Final = "promoted"
_RECORD: Final = ".json"
# An update that is on its way is asked about so often.
_ASK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Carried:
    """What an update left behind. Digests are in hex; `files` has that of each file by its kind, none where nothing is left."""

    assignment_id: str
    update_digest: str
    fingerprint: str
    files: Mapping[str, str]


class CarriedState:
    """The folder of what updates left behind. One daemon owns it (state.py's lock). Thread-safe."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Keeps the state of the newest `keep` runs besides those at work."""
        self._directory = directory
        self._keep = keep
        self._lock = threading.Lock()

    def prefix(self, run_id: str, assignment_id: str) -> Path:
        """Where the trainer puts the files of an assignment: `.<kind>` is appended. It makes the folder."""
        return self._folder(run_id) / checked_id(assignment_id)

    def promoted(self, run_id: str, fingerprint: bytes) -> dict[str, tuple[Path, str]]:
        """What stands: (path, digest in hex) by kind. Nothing in a new run; nothing is left either where the run's tensors are no
        longer those that it belongs to."""
        with self._lock:
            folder = self._folder(run_id)
            carried = _read(folder / _PROMOTED)
            if carried is None:
                return {}
            if carried.fingerprint != fingerprint.hex():
                self._clear(folder, "the names or shapes of the run's tensors changed")
                return {}
            return {
                kind: (folder / f"{carried.assignment_id}.{kind}", digest) for kind, digest in carried.files.items()
            }

    def pending(self, run_id: str) -> list[Carried]:
        """What waits for its update to be counted."""
        with self._lock:
            records = sorted(self._folder(run_id).glob(f"*{_RECORD}"))
            return [carried for record in records if (carried := _read_pending(record)) is not None]

    def add(
        self, run_id: str, assignment_id: str, update_digest: bytes, fingerprint: bytes, files: Mapping[str, str]
    ) -> None:
        """Vouches for the files that now lie at `prefix`; durable when it returns, and pending. Raises DiskFullError."""
        record = self.prefix(run_id, assignment_id).with_name(assignment_id + _RECORD)
        record.parent.mkdir(mode=0o700, exist_ok=True)
        carried = Carried(assignment_id, update_digest.hex(), fingerprint.hex(), dict(files))
        write_durably(record, json.dumps(asdict(carried), indent=1).encode())
        sync_directory(self._directory)

    def settle(self, run_id: str, assignment_id: str, counted: bytes) -> None:
        """The coordinator has counted an update of this assignment, with this digest: promotes what it left behind. Settling again
        changes nothing.

        Where the digest is another one, a state directory was copied or restored: that update was encoded elsewhere and left its
        residual there. It took up the state that stands here as well, or one that is not known here, so nothing is left that may be
        added to another update, and the run begins anew without any."""
        with self._lock:
            folder = self._folder(run_id)
            pending = _read_pending(folder / f"{checked_id(assignment_id)}{_RECORD}")
            if pending is None:
                return
            if pending.update_digest != counted.hex():
                self._clear(folder, "the coordinator had counted another update than this site's")
                return
            before = _read(folder / _PROMOTED)
            failpoint("client-before-promotion")
            publish(folder / f"{assignment_id}{_RECORD}", folder / _PROMOTED)
            failpoint("client-promoted")
            if before is not None and before.assignment_id != assignment_id:
                _delete(folder, before.assignment_id)

    def drop(self, run_id: str, assignment_id: str) -> None:
        """The update was not counted and will not be: forgets what it left behind, whatever there is of it. What stands stays."""
        if not (is_safe_id(run_id) and is_safe_id(assignment_id)):
            return  # nothing can lie under such a name
        with self._lock:
            folder = self._folder(run_id)
            promoted = _read(folder / _PROMOTED)
            if promoted is None or promoted.assignment_id != assignment_id:
                _delete(folder, assignment_id)

    def clear(self, run_id: str, reason: str) -> None:
        """Forgets everything of a run, which goes on as a new one would."""
        with self._lock:
            folder = self._folder(run_id)
            if folder.exists():
                self._clear(folder, reason)

    def sweep(self) -> None:
        """At a start: deletes what a crash left and no record vouches for."""
        with self._lock:
            for folder in self._folders():
                keep: set[Path] = set()
                for record in (folder / _PROMOTED, *folder.glob(f"*{_RECORD}")):
                    carried = (_read if record.name == _PROMOTED else _read_pending)(record)
                    if carried is not None:
                        keep |= {record, *(folder / f"{carried.assignment_id}.{kind}" for kind in carried.files)}
                for path in set(folder.iterdir()) - keep:
                    path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    folder.rmdir()

    def trim(self, in_use: set[str]) -> None:
        """Deletes the state of all runs but those in use and the newest others: nobody tells a site that a run is over."""
        with self._lock:
            others = [folder for folder in self._folders() if folder.name not in in_use]
            for folder in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[self._keep :]:
                structlog.get_logger().info("carried state deleted", run=folder.name, reason="newer runs need the room")
                shutil.rmtree(folder, ignore_errors=True)

    def _clear(self, folder: Path, reason: str) -> None:
        structlog.get_logger().warning("carried state cleared", run=folder.name, reason=reason)
        shutil.rmtree(folder)

    def _folder(self, run_id: str) -> Path:
        return self._directory / checked_id(run_id, "run id")

    def _folders(self) -> list[Path]:
        return [path for path in self._directory.iterdir() if path.is_dir()]


def settle_earlier(
    transport: Transport, carried: CarriedState, spool: Spool, run_id: str, stop: Stop, log: Any
) -> None:
    """Finds out which updates of the run were counted whose receipt this site missed: the line broke, it was killed, or a poll told
    it first that the work is over. Returns when nothing is pending any more.

    An update that is still wanted and lies in the spool is on its way in another thread, and is waited for: what is trained next
    begins with what it leaves behind. Raises credential errors, and StoppedError."""
    retries = Retries(stop, log)
    while pending := carried.pending(run_id):
        stop.check()
        assignment_id = pending[0].assignment_id
        try:
            state = transport.get_upload(assignment_id, bytes.fromhex(pending[0].update_digest))
        except (NoLongerNeededError, NotFoundError, PermissionDeniedError, InvalidError) as error:
            log.info("an earlier update was not counted", of=assignment_id, reason=str(error))
            carried.drop(run_id, assignment_id)
        except PASSING as error:
            retries.wait(error)
        else:
            if state.HasField("receipt"):
                carried.settle(run_id, assignment_id, state.receipt.digest)
            elif spool.path(assignment_id).exists():
                stop.wait(_ASK_AGAIN_SECONDS)
            else:  # nobody can deliver it any more; or it has just been counted, and then there is nothing to drop
                carried.drop(run_id, assignment_id)


def _read(record: Path) -> Carried | None:
    """A record, if it is one."""
    try:
        fields = json.loads(record.read_bytes())
        carried = Carried(**fields)
        bytes.fromhex(carried.update_digest)
        checked_id(carried.assignment_id)
        dict(carried.files)
    except (OSError, ValueError, TypeError, InvalidError):
        return None
    return carried


def _read_pending(record: Path) -> Carried | None:
    """A record under the name of its assignment, which a pending one has."""
    carried = _read(record)
    return carried if carried is not None and record.name == carried.assignment_id + _RECORD else None


def _delete(folder: Path, assignment_id: str) -> None:
    """The record of an assignment first, then its files."""
    (folder / f"{assignment_id}{_RECORD}").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            if path.name.removesuffix(".tmp").rpartition(".")[0] == assignment_id:
                path.unlink(missing_ok=True)
