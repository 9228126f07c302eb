"""A round's updates side by side, for rules that need them all: decoded once, on disk, read a block of coordinates at a time.

The bodies of two payloads seldom begin at the same coordinates, and each decodes only as a whole. So every update is decoded when
it comes, while others still upload, into a file without a name that vanishes with the process; a block of columns is then one
`pread` per update. Decoding again for each block would cost a body (2^20 coordinates) for a few thousand of them, and keeping one
body of each open 4 MiB per update.

Disk: the cohort times the model. Memory: one body of the update that is being decoded, and one block of `BLOCK_VALUES` values.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from fed_core.errors import CorruptError
from fed_core.payload.reader import PayloadReader
from fed_core.specs import DTYPES, TensorSpec
from fed_core.tensors import check_finite, torch_dtype
from fed_server.aggregation.mean import as_reals

# Values of one block, over all updates: 4 MiB of float32, so that what a rule makes of it stays near the processor.
BLOCK_VALUES = 2**20
# Of a very large cohort, a read of fewer coordinates would cost more than what it brings.
_FEWEST_COORDINATES = 256


class UpdateStack:
    """The updates of one round as the rows of a matrix.

    The rows are in the order of the BLAKE3 of their values, so that neither arrival nor restart, nor the ids that a repeated run
    draws anew, change what is computed from them. `folder` is where the file lies; raises OSError where it is full, and an update
    that could not be added leaves the stack as it was.
    """

    def __init__(self, specs: Sequence[TensorSpec], folder: Path) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._offsets: dict[str, int] = {}
        self._row_bytes = 0
        for spec in specs:
            self._offsets[spec.name] = self._row_bytes
            self._row_bytes += spec.num_bytes
        self._digests: list[bytes] = []
        self._folder = folder
        self._file = -1

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, update: PayloadReader) -> None:
        """Decodes one update. Raises NotFiniteError naming a tensor that holds NaN or infinity."""
        if self._file < 0:
            self._file = _nameless_file(self._folder)
            # Not by hand: a thread may still write for a round that was given up, and the number must not become another file's.
            weakref.finalize(self, os.close, self._file)
        start = len(self) * self._row_bytes
        hasher = blake3()
        for name, spec in self._specs.items():
            for first, tile in update.iter_tiles(name):
                check_finite(name, tile)
                memory = tile.view(torch.uint8).numpy().data
                hasher.update(memory)
                _write(self._file, memory, start + self._offsets[name] + first * DTYPES[spec.dtype])
        self._digests.append(hasher.digest())

    def block(self, spec: TensorSpec, first: int, count: int) -> Tensor:
        """The values of `count` elements of a tensor from `first` on, one row per update: [updates, count], in float64 or float32
        (16-bit types too) where it is floating, in its own dtype otherwise; of complex elements [updates, 2 count] reals."""
        size = DTYPES[spec.dtype]
        rows = torch.empty((len(self), count), dtype=torch_dtype(spec.dtype))
        memory = rows.view(-1).view(torch.uint8).numpy()
        within = self._offsets[spec.name] + first * size
        for row, index in enumerate(self._order()):
            _read(
                self._file, memory[row * count * size : (row + 1) * count * size].data, index * self._row_bytes + within
            )
        if rows.dtype in (torch.float16, torch.bfloat16):
            return rows.float()
        return as_reals(rows).view(len(self), count * (2 if rows.is_complex() else 1))

    def blocks(self, spec: TensorSpec, first: int = 0, count: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """`block` by block: (first element, number of elements, values), at most `BLOCK_VALUES` values each; an empty one where
        there is nothing."""
        end = spec.num_elements if count is None else first + count
        step = max(_FEWEST_COORDINATES, BLOCK_VALUES // max(1, len(self)))
        for start in range(first, max(end, first + 1), step):
            length = min(step, end - start)
            yield start, length, self.block(spec, start, length)

    def _order(self) -> list[int]:
        return sorted(range(len(self)), key=self._digests.__getitem__)


def _nameless_file(folder: Path) -> int:
    # Should we die between the two calls, the next start sweeps what has such a name.
    descriptor, name = tempfile.mkstemp(prefix=".stack.", suffix=".tmp", dir=folder)
    Path(name).unlink(missing_ok=True)
    return descriptor


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        num_bytes = os.pwrite(file, data, offset)
        data, offset = data[num_bytes:], offset + num_bytes


def _read(file: int, data: memoryview, offset: int) -> None:
    while data:
        num_bytes = os.preadv(file, [data], offset)
        if num_bytes == 0:
            raise CorruptError(f"the decoded updates end at byte {offset}", offset=offset)
        data, offset = data[num_bytes:], offset + num_bytes
