"""The daemon's state directory: everything that a restart goes on from.

identity.json    client id and secret, 0600; made by the enrolment
enrollment.json  name of an enrolment attempt whose answer is not stored yet
lock             held by the running daemon; holds its process id
status.json      what the running daemon is doing, for `fed-client status`; never read back
cache/           models, and what they are being made of (cache.py)
spool/           encoded updates by assignment (spool.py)
carried/         what updates left behind for the next ones, by run (carried.py)
privacy.json     what updates gave away of this site's data, where it keeps the account (privacy.py)
trainer.log      what the user's training code printed
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fed_client.durable import disk_errors_named, sync_directory, write_durably
from fed_core.errors import ConfigError, InvalidError


class StateDirectoryLockedError(Exception):
    """Another daemon runs on this state directory; the message names its process."""


@dataclass(frozen=True)
class Identity:
    """Who this site is to its coordinator."""

    client_id: str
    secret: str
    name: str
    # Where it enrolled, for messages; addresses may change.
    server: str

    def __repr__(self) -> str:
        return f"Identity(client_id={self.client_id!r}, name={self.name!r})"  # never the secret


_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_safe_id(text: str) -> bool:
    """Whether an id may become a file name here."""
    return _SAFE_ID.fullmatch(text) is not None


def checked_id(text: str, what: str = "assignment id") -> str:
    """An id becomes a file name here, so one that could leave its folder is refused with InvalidError."""
    if not is_safe_id(text):
        raise InvalidError(f"{what} {text!r} is not 1 to 100 characters of [A-Za-z0-9._-]; refused")
    return text


class StateDirectory:
    """Owns the folder; made on first use with mode 0700."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "cache"
        self.spool = root / "spool"
        self.carried = root / "carried"
        self.privacy = root / "privacy.json"
        self.trainer_log = root / "trainer.log"
        self._identity = root / "identity.json"
        self._enrollment = root / "enrollment.json"
        self._lock = root / "lock"
        self._status = root / "status.json"
        self._lock_file: int | None = None

    def create(self) -> None:
        """Makes the folders. Raises ConfigError where that cannot be, with the cure."""
        try:
            with disk_errors_named(self.root):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                for folder in (self.cache, self.spool, self.carried):
                    folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"state_dir: {self.root} cannot be used ({error.strerror}); give a folder that this user may write, "
                "with --state-dir or FED_CLIENT_STATE_DIR"
            ) from error

    def lock(self) -> None:
        """Takes the folder for this process until it ends, however it ends. Raises StateDirectoryLockedError."""
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        # `daemon_pid` of a passing `fed-client status` holds the lock for microseconds; a daemon holds it for good.
        for attempts_left in reversed(range(10)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempts_left:
                    time.sleep(0.02)
                    continue
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise StateDirectoryLockedError(
                    f"another fed-client (process {holder}) runs on {self.root}; stop it, or give this one its own --state-dir"
                ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock_file = descriptor

    def unlock(self) -> None:
        """Gives the folder back."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def daemon_pid(self) -> int | None:
        """Process id of the daemon that holds the lock, None where none does; 0 where it holds it but has not said who it is."""
        try:
            descriptor = os.open(self._lock, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            return int(text) if text.isdigit() else 0
        else:
            return None
        finally:
            os.close(descriptor)

    def identity(self) -> Identity | None:
        """The stored identity, or None before the enrolment. Raises ConfigError where the file is damaged."""
        try:
            fields = json.loads(self._identity.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._identity} cannot be read ({error}); restore it, or delete it and enrol anew"
            ) from error
        try:
            return Identity(**{key: str(fields[key]) for key in ("client_id", "secret", "name", "server")})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{self._identity} lacks {error}; restore it, or delete it and enrol anew") from error

    def store_identity(self, identity: Identity) -> None:
        """Writes the identity durably, for this user only, and forgets the attempt that led to it."""
        write_durably(self._identity, json.dumps(asdict(identity), indent=1).encode(), mode=0o600)
        self._enrollment.unlink(missing_ok=True)
        sync_directory(self.root)

    def enrollment_request_id(self) -> str:
        """Name of the enrolment attempt: made once and durable before it is used, so that a lost answer costs nothing."""
        try:
            return str(json.loads(self._enrollment.read_bytes())["request_id"])
        except (OSError, ValueError, KeyError, TypeError):
            request_id = str(uuid.uuid4())
            write_durably(self._enrollment, json.dumps({"request_id": request_id}).encode(), mode=0o600)
            return request_id

    def write_status(self, status: dict[str, Any]) -> None:
        """Replaces status.json. Not flushed: after a crash nobody needs it."""
        temporary = self._status.with_suffix(".tmp")
        with disk_errors_named(self.root):
            temporary.write_text(json.dumps(status))
            os.replace(temporary, self._status)

    def read_status(self) -> dict[str, Any] | None:
        """What the daemon last wrote; None where it never did."""
        try:
            status = json.loads(self._status.read_bytes())
        except (OSError, ValueError):
            return None
        return status if isinstance(status, dict) else None
