"""Models that were downloaded, by digest: a site that takes part in every round fetches each version once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fed_client.durable import publish

DIGEST_BYTES = 32


class ModelCache:
    """The folder of models: `<hex digest>.payload` is whole and was verified, `<hex digest>.part` is on its way."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Keeps, besides the models in use, at most `keep` files of the newest others."""
        self._directory = directory
        self._keep = keep

    def path(self, digest: bytes) -> Path:
        """Where the whole model lies, or will."""
        return self._directory / f"{digest.hex()}.payload"

    def part(self, digest: bytes) -> Path:
        """Where its bytes gather during the download."""
        return self._directory / f"{digest.hex()}.part"

    def complete(self, digest: bytes) -> Path:
        """Gives a verified and flushed part its final name."""
        path = self.path(digest)
        publish(self.part(digest), path)
        return path

    def touch(self, digest: bytes) -> None:
        """Marks a model as just used."""
        with suppress(FileNotFoundError):
            os.utime(self.path(digest))

    def discard(self, digest: bytes) -> None:
        """Deletes a model and whatever there is of its download."""
        for path in (self.path(digest), self.part(digest)):
            path.unlink(missing_ok=True)

    def trim(self, in_use: set[bytes]) -> list[Path]:
        """Deletes all but the models in use and the newest `keep` others; says which files went."""
        used = {digest.hex() for digest in in_use}
        others = [path for path in self._directory.iterdir() if path.is_file() and path.stem not in used]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[self._keep :]:
            path.unlink(missing_ok=True)
        return others[self._keep :]
