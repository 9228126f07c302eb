"""Models that this site holds, by identity, and the payloads that they are made of for as long as they are needed.

A model's identity is the digest of its payload in the raw codec, and that payload is what lies here: a site that takes part often
needs only what changed since.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from fed_client.durable import publish
from fed_core.errors import FedstreamError, PayloadError
from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import Manifest, parse_manifest, parse_preamble
from fed_core.payload.verify import verify_file
from fedstream.v1 import common_pb2

# As many as a poll may name.
MAX_MODELS: Final = 64
_MODEL, _STEP, _PART = ".payload", ".step", ".part"


class _Model(NamedTuple):
    run_id: str
    version: int


class ModelCache:
    """The folder of models and of what they are made of.

        <identity>.payload       a whole model in the raw codec
        <digest>.part            a payload on its way, of a model or of a step to one
        <digest>.step            a payload that is whole, until the model is made of it
        <identity>.payload.tmp   a model in the making

    What an earlier process left is read and verified once, before it is used or spoken of. Thread-safe; one thread works on files.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Keeps, besides the models in use, the newest `keep` others, at least one: it spares the download of a whole model."""
        self._directory = directory
        self._keep = max(keep, 1)
        self._lock = threading.Lock()
        # What this process has verified, or made.
        self._models: dict[bytes, _Model] = {}
        self._steps: set[bytes] = set()

    @property
    def directory(self) -> Path:
        """Where everything lies."""
        return self._directory

    def path(self, digest: bytes) -> Path:
        """Where a whole model lies, or will."""
        return self._directory / f"{digest.hex()}{_MODEL}"

    def step(self, digest: bytes) -> Path:
        """Where a payload lies that a model is made of, or will."""
        return self._directory / f"{digest.hex()}{_STEP}"

    def part(self, digest: bytes) -> Path:
        """Where a payload's bytes gather during its download."""
        return self._directory / f"{digest.hex()}{_PART}"

    # -- what is here -------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Reads what an earlier process left, which takes as long as the disk needs for it, and deletes what no longer verifies."""
        for path in list(self._directory.iterdir()):
            if path.suffix == ".tmp":
                path.unlink(missing_ok=True)
            elif path.suffix == _MODEL and (digest := _digest_of(path)) is not None:
                self.has_model(digest)

    def has_model(self, digest: bytes) -> bool:
        """Whether the model is here; one that this process has not seen yet is verified first, and deleted where it is damaged."""
        path = self.path(digest)
        with self._lock:
            if not path.exists():
                self._models.pop(digest, None)
                return False
            if digest in self._models:
                return True
        try:
            self._note(digest, checked_model(verify_file(path, digest)))
        except (FedstreamError, OSError) as error:
            structlog.get_logger().warning("model in the cache is damaged, deleted", file=path.name, error=str(error))
            self.discard(digest)
            return False
        return True

    def has_step(self, digest: bytes) -> bool:
        """The same for a payload that a model is to be made of."""
        path = self.step(digest)
        if not path.exists():
            return False
        if digest not in self._steps:
            try:
                verify_file(path, digest)
            except (FedstreamError, OSError):
                path.unlink(missing_ok=True)
                return False
            self._steps.add(digest)
        return True

    def digests(self) -> list[bytes]:
        """Identities of the models that are here and verified, those of most use first; at most 64. Reads no file."""
        with self._lock:
            return self._best_first(digest for digest in self._models if self.path(digest).exists())[:MAX_MODELS]

    # -- what changes -------------------------------------------------------------------------------------------------

    def complete_model(self, digest: bytes) -> Path:
        """Gives a verified and flushed part its final name. Raises PayloadError where it is no model in the raw codec."""
        manifest = checked_model(read_manifest(self.part(digest)))
        path = self.path(digest)
        publish(self.part(digest), path)
        self._note(digest, manifest)
        return path

    def complete_step(self, digest: bytes) -> Path:
        """The same for a payload that a model is to be made of."""
        path = self.step(digest)
        publish(self.part(digest), path)
        self._steps.add(digest)
        return path

    def made(self, digest: bytes) -> None:
        """Notes a model that was made of steps and lies durably under its name."""
        self._note(digest, read_manifest(self.path(digest)))

    def touch(self, digest: bytes) -> None:
        """Marks a model as just used."""
        with suppress(FileNotFoundError):
            os.utime(self.path(digest))

    def discard(self, digest: bytes) -> None:
        """Deletes whatever there is under a digest: model, step, part."""
        with self._lock:
            self._models.pop(digest, None)
            self._steps.discard(digest)
        for path in (self.path(digest), self.step(digest), self.part(digest)):
            path.unlink(missing_ok=True)

    def trim(self, in_use: set[bytes]) -> list[Path]:
        """Deletes all but what is in use (models and payloads), the best of the other models, and the newest parts, with which a
        download that was given up can go on; says which files went."""
        used = {digest.hex() for digest in in_use}
        others = [
            path for path in self._directory.iterdir() if path.is_file() and path.name.partition(".")[0] not in used
        ]
        models = [digest for path in others if path.suffix == _MODEL and (digest := _digest_of(path)) is not None]
        parts = sorted((path for path in others if path.suffix == _PART), key=_used_at, reverse=True)
        with self._lock:
            kept = {self.path(digest) for digest in self._best_first(models)[: self._keep]} | set(parts[: self._keep])
        deleted = [path for path in others if path not in kept]
        for path in deleted:
            path.unlink(missing_ok=True)
        return deleted

    def _note(self, digest: bytes, manifest: Manifest) -> None:
        with self._lock:
            self._models[digest] = _Model(manifest.run_id, manifest.model_version)

    def _best_first(self, digests: Iterable[bytes]) -> list[bytes]:
        """The newest version of each run, the run used last first; then the second newest of each, and so on: the next delta
        most likely begins there. The caller has the lock."""
        by_run: dict[str, list[tuple[int, float, bytes]]] = defaultdict(list)
        for digest in digests:
            model = self._models.get(digest, _Model("", -1))
            by_run[model.run_id].append((model.version, _used_at(self.path(digest)), digest))
        ranked = [
            (rank, -used_at, digest)
            for models in by_run.values()
            for rank, (_, used_at, digest) in enumerate(sorted(models, reverse=True))
        ]
        return [digest for _, _, digest in sorted(ranked)]


def read_manifest(path: Path) -> Manifest:
    """The manifest of a payload file. Raises PayloadError, CorruptError, OSError."""
    with path.open("rb") as file:
        preamble = parse_preamble(file.read(PREAMBLE_BYTES))
        return parse_manifest(preamble, file.read(preamble.manifest_bytes))


def checked_model(manifest: Manifest) -> Manifest:
    """The manifest, if its payload is a model in the raw codec, whose digest is the model's identity. Raises PayloadError."""
    if manifest.kind != common_pb2.PAYLOAD_KIND_MODEL or manifest.model_digest != manifest.digest:
        raise PayloadError(
            f"the payload {manifest.digest.hex()[:16]} is no model in the raw codec, and the assignment says that it is"
        )
    return manifest


def _digest_of(path: Path) -> bytes | None:
    """The digest that a file is named after; None for a file that is not ours."""
    try:
        return bytes.fromhex(path.name.partition(".")[0])
    except ValueError:
        return None


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
