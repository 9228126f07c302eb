"""Files that survive a power cut: written, flushed and renamed in that order."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fed_core.errors import DiskFullError


class SiteDiskFullError(DiskFullError):
    """No space on this site's own disk: unlike the coordinator's, it is reported and not waited for."""


_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turns "no space" (or quota) in the block into SiteDiskFullError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise SiteDiskFullError(
            f"no space left in {path}: free some, or move the state directory to a larger disk"
        ) from error


def sync_directory(directory: Path) -> None:
    """Makes renames and deletions in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Renames a file whose bytes are already flushed, and makes the name durable."""
    os.replace(temporary, final)
    sync_directory(final.parent)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a small file so that after a crash it is either whole or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors_named(path.parent):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
