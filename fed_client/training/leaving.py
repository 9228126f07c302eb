"""Writing what an update leaves behind at its site: a file of tensors for the next update of the run (fed_client/carried.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from torch import Tensor

from fed_client.durable import publish
from fed_core.payload.writer import OnDecoded, Written
from fed_core.safetensors_tiles import SafetensorsWriter, tensors_digest
from fed_core.specs import TensorSpec

Update = list[tuple[TensorSpec, Tensor]]

Write = Callable[[Update, OnDecoded | None], Written]
"""Encodes an update, telling whoever is given what a receiver will decode."""


def also_telling(listener: OnDecoded, write: Write) -> Write:
    """The same, telling `listener` too."""

    def telling(update: Update, on_decoded: OnDecoded | None) -> Written:
        def tell(spec: TensorSpec, codec: str, first: int, decoded: Tensor) -> None:
            listener(spec, codec, first, decoded)
            if on_decoded is not None:
                on_decoded(spec, codec, first, decoded)

        return write(update, tell)

    return telling


class LeftFile:
    """A file that is written tile by tile while the update is encoded, and has its name once it is whole. A disk that is full or
    broken costs the file and not the training: `problem` then says why there is none. Memory: nothing that is model-sized."""

    def __init__(self, kind: str, path: Path, specs: Sequence[TensorSpec]) -> None:
        """`kind` is what the file holds, in a word; it gets its name, `path`, by `finish`, and its folder is made."""
        self.problem = ""
        self._kind, self._path, self._temporary = kind, path, path.with_name(path.name + ".tmp")
        self._file: BinaryIO | None = None
        with self._sparing_the_training():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._file = self._temporary.open("wb")
            self._writer = SafetensorsWriter(self._file, specs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_up("")

    def write_tile(self, name: str, first: int, tile: Tensor) -> None:
        """As that of SafetensorsWriter; nothing once there was a problem."""
        if not self.problem:
            with self._sparing_the_training():
                self._writer.write_tile(name, first, tile)

    def finish(self) -> dict[str, str]:
        """Makes the file durable under its name, all tiles being there: {kind: digest in hex}, for the record of what is carried
        over. Nothing where there was a problem."""
        if self._file is not None:
            with self._sparing_the_training():
                self._writer.finish()
                os.fsync(self._file.fileno())
                digest = tensors_digest(self._temporary).hex()
                publish(self._temporary, self._path)
                return {self._kind: digest}
        return {}

    def give_up(self, problem: str) -> None:
        """Nothing is left of what was not published, least of all the room that it took."""
        self.problem = self.problem or problem
        if self._file is not None:
            self._file.close()
            self._file = None
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _sparing_the_training(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.give_up(f"the {self._kind} cannot be written: {error}")
