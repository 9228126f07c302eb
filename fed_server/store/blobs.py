"""The coordinator's data directory: one folder, one daemon, and the files that are too large for the database.

    format                               "fedstream-data 2"
    lock                                 held by the daemon, with its process id
    state.sqlite                         the records
    uploads/<assignment_id>.part         an update on its way; its first bytes name the digest it must have
    updates/<assignment_id>.update       an update, whole and verified
    models/<run_id>/<version>.safetensors     a version as every client has it
    models/<run_id>/<version>.average.safetensors     the moving average of the versions up to it, where one is kept
    masters/<run_id>/<version>.safetensors    what the version would be had nothing been left out of its delta
    masters/<run_id>/<version>.optimizer.safetensors     what the server optimizer keeps of the rounds up to it
    masters/<run_id>/<version>.variate.safetensors     the common variate that goes with the version, where there is one
    masters/<run_id>/<round>.released.safetensors     the noisy sum of a private round, until its version is committed
    secrets/<run_id>.key                 what a private run draws earlier noise again with; never back this folder up
    payloads/<digest>.payload            what is broadcast: versions, deltas, variates
    .../.<name>.<token>.tmp              being written; the next daemon deletes it

A file appears under its name only when its bytes are on the disk (`publish`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fed_core.errors import ConfigError, ConflictError, DiskFullError, InvalidError

FORMAT: Final = "fedstream-data 2"

_FOLDERS = ("uploads", "updates", "models", "masters", "payloads", "secrets")
# What an empty directory may hold: a fresh filesystem's own folder, and what a daemon left that died while it made the directory.
_NOT_CONTENT = {"lost+found", "lock", "format.tmp", *_FOLDERS}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class DataDirectory:
    """An open data directory, made if there is none; no other daemon can open it until `close`.

    Raises ConfigError for a directory that cannot be used, is of another format version or belongs to something else;
    ConflictError, naming the process, for one that is in use.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        # Tells this daemon's unfinished files from those of one that died.
        self._token = secrets.token_hex(4)
        self._lock = -1
        try:
            with self.disk_errors("making the data directory"):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                # Before the lock: someone else's directory gets no lock file from us.
                is_new = self._is_new()
                self._lock = _lock(self.root)
                if is_new:
                    self._set_up()
        except OSError as error:
            self.close()
            raise ConfigError(
                f"data directory {self.root} cannot be used ({error.strerror}): see that it is a directory which this user may "
                "write, or name another with --data-dir"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another daemon open the directory; closing twice is harmless."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # Places

    @property
    def database_path(self) -> Path:
        """Where the records lie."""
        return self.root / "state.sqlite"

    def upload_path(self, assignment_id: str) -> Path:
        """Where an update lies while it arrives."""
        return self.root / "uploads" / f"{_checked(assignment_id)}.part"

    def update_path(self, assignment_id: str) -> Path:
        """Where a whole update lies until its round commits."""
        return self.root / "updates" / f"{_checked(assignment_id)}.update"

    def model_path(self, run_id: str, version: int) -> Path:
        """Where a model version lies as safetensors."""
        return self.root / "models" / _checked(run_id) / f"{version}.safetensors"

    def average_path(self, run_id: str, version: int) -> Path:
        """Where the average of the versions up to this one lies, as long as the version itself."""
        return self.root / "models" / _checked(run_id) / f"{version}.average.safetensors"

    def master_path(self, run_id: str, version: int) -> Path:
        """Where the master weights of a version lie."""
        return self.root / "masters" / _checked(run_id) / f"{version}.safetensors"

    def optimizer_path(self, run_id: str, version: int) -> Path:
        """Where the server optimizer's state after a version lies; like its master weights, as long as the next is made of it."""
        return self.root / "masters" / _checked(run_id) / f"{version}.optimizer.safetensors"

    def variate_path(self, run_id: str, version: int) -> Path:
        """Where the common variate that goes with a version lies, as long as the optimizer's state."""
        return self.root / "masters" / _checked(run_id) / f"{version}.variate.safetensors"

    def noise_key_path(self, run_id: str) -> Path:
        """Where a run that must draw earlier noise again keeps the key to it. Whoever has it can take the noise off: it is of
        no use once the run is over, and belongs in no backup."""
        return self.root / "secrets" / f"{_checked(run_id)}.key"

    def released_path(self, run_id: str, round: int) -> Path:
        """Where the noisy sum of a private round lies, from the moment that no noise may be drawn for it any more until its version
        is committed."""
        return self.root / "masters" / _checked(run_id) / f"{round}.released.safetensors"

    @property
    def scratch_folder(self) -> Path:
        """Where files may be made that nobody needs longer than they are open."""
        return self.root / "updates"

    def payload_path(self, digest: str) -> Path:
        """Where the payload with this digest (hex) lies."""
        return self.root / "payloads" / f"{_checked(digest)}.payload"

    # Writing

    def temporary(self, final: Path) -> Path:
        """A new name beside `final`, to write to and then `publish`; makes the folder. `sweep` leaves it alone as long as this
        daemon lives, so whoever fails to publish deletes it."""
        with self.disk_errors(f"making {final.parent}"):
            if not final.parent.exists():
                final.parent.mkdir(mode=0o700, exist_ok=True)
                _sync(final.parent.parent)
        return final.with_name(f".{final.name}.{secrets.token_hex(4)}{self._temporary_suffix}")

    def publish(self, temporary: Path, final: Path) -> None:
        """Gives a file its name, in place of any file of that name; when this returns, bytes and name survive a power cut."""
        with self.disk_errors(f"publishing {final.name}"):
            _sync(temporary)
            os.replace(temporary, final)
            _sync(final.parent)

    @contextmanager
    def disk_errors(self, what: str) -> Iterator[None]:
        """Turns "no space" (or over quota) within the block into DiskFullError; `what` says what was being done."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DiskFullError(
                f"{what}: no space left in {self.root}; free some, or move it to a larger disk"
            ) from error

    def free_bytes(self) -> int:
        """Bytes that may still be written here."""
        return shutil.disk_usage(self.root).free

    def require_free(self, num_bytes: int, what: str) -> None:
        """Raises DiskFullError where `what` will need more than is free. Nothing is reserved."""
        free = self.free_bytes()
        if num_bytes > free:
            raise DiskFullError(
                f"{what} needs {_megabytes(num_bytes)}, but only {_megabytes(free)} are free in {self.root}: free some, or move "
                "it to a larger disk"
            )

    # Deleting

    def listing(self) -> list[Path]:
        """Every file that `sweep` may delete if nobody needs it."""
        patterns = (
            "uploads/*.part",
            "updates/*.update",
            "payloads/*.payload",
            "models/*/*.safetensors",
            "masters/*/*.safetensors",
            "secrets/*.key",
        )
        return [path for pattern in patterns for path in self.root.glob(pattern)]

    def sweep(
        self,
        live_updates: Collection[str],
        live_uploads: Collection[str],
        live_payloads: Collection[str],
        live_models: Collection[tuple[str, int]],
        live_masters: Collection[tuple[str, int]],
        live_released: Collection[tuple[str, int]] = (),
        live_keys: Collection[str] = (),
        listed: Iterable[Path] | None = None,
    ) -> list[Path]:
        """Deletes what nobody needs, by name, and what a dead daemon left unfinished; returns what it deleted. Files that are no
        part of the layout stay, and so do, while somebody is at work, folders that have become empty. An update stays, too, while
        its assignment is among the live uploads: it may be just about to be recorded.

        `listed`: what `listing` gave before the live sets were read, so that a file that came since is never taken for an
        orphan; without it, nothing else may be at work in the directory.
        """
        live = {self.upload_path(assignment_id) for assignment_id in live_uploads}
        live |= {self.update_path(assignment_id) for assignment_id in {*live_updates, *live_uploads}}
        live |= {self.payload_path(digest) for digest in live_payloads}
        live |= {path(*model) for model in live_models for path in (self.model_path, self.average_path)}
        of_masters = (self.master_path, self.optimizer_path, self.variate_path)
        live |= {path(*master) for master in live_masters for path in of_masters}
        live |= {self.released_path(*round) for round in live_released}
        live |= {self.noise_key_path(run_id) for run_id in live_keys}
        orphans = [path for path in (self.listing() if listed is None else listed) if path not in live]
        unfinished = (path for folder in _FOLDERS for path in (self.root / folder).rglob(".*.tmp"))
        orphans += [path for path in unfinished if not path.name.endswith(self._temporary_suffix)]
        for path in orphans:
            path.unlink(missing_ok=True)
        if listed is None:  # else somebody may be just about to write to a folder that is empty now
            for folder in (path for name in _FOLDERS for path in (self.root / name).iterdir() if path.is_dir()):
                with suppress(OSError):  # a run that still has versions
                    folder.rmdir()
        return orphans

    # Opening

    @property
    def _temporary_suffix(self) -> str:
        return f".{self._token}.tmp"

    def _is_new(self) -> bool:
        try:
            found = (self.root / "format").read_text(errors="replace").strip()
        except FileNotFoundError:
            content = sorted({path.name for path in self.root.iterdir()} - _NOT_CONTENT)
            if content:
                raise ConfigError(
                    f"{self.root} is not empty and not a data directory of fedstream (it holds {', '.join(content[:3])}): name "
                    "an empty or a new one with --data-dir"
                ) from None
            return True
        if found != FORMAT:
            raise ConfigError(
                f"data directory {self.root} has the format {found!r:.50}, this fedstream reads and writes {FORMAT!r}: start the "
                "fedstream that wrote it, or name another with --data-dir"
            )
        return False

    def _set_up(self) -> None:
        with suppress(PermissionError):  # a volume that is mounted for us but is not ours
            self.root.chmod(0o700)
        for name in _FOLDERS:
            (self.root / name).mkdir(mode=0o700, exist_ok=True)
        # Last: a directory with this file is complete.
        temporary = self.root / "format.tmp"
        temporary.write_text(FORMAT + "\n")
        self.publish(temporary, self.root / "format")


def _lock(root: Path) -> int:
    """An open file that this process holds the lock of; the system lets go of it however the process ends."""
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise ConflictError(
            f"data directory {root} is in use by process {holder or 'unknown'}: stop it, or name another with --data-dir"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _checked(name: str) -> str:
    """Ids become file names: one that could lead elsewhere is refused."""
    if not _ID.fullmatch(name):
        raise InvalidError(f"{name!r:.120} is not an id: expected up to 100 letters, digits, '-' and '_'")
    return name


def _sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
