"""Updates of older versions, where adding a change would make no sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fed_core.payload.manifest import TensorEntry
from fed_core.payload.reader import PayloadReader
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import PARAMETER


class RebasedUpdate(PayloadReader):
    """An update that began with one version (`base`), as one that is to be added to a later one (`newest`).

    A parameter's change is what the paper adds, whatever it began with. A running statistic is a state of the data and not a sum of
    steps: changes on top of changes would take a variance below zero. What counts is what the site had in the end, so it is given
    as the change that leads there from `newest`, in float64; of a counter the larger of the two. Memory: a few tiles."""

    def __init__(self, path: Path, base: SafetensorsReader, newest: SafetensorsReader) -> None:
        super().__init__(path)
        self._base = base
        self._newest = newest

    def iter_tiles(self, tensor: str | TensorEntry, *, verify: bool = False) -> Iterator[tuple[int, Tensor]]:
        """See `PayloadReader.iter_tiles`."""
        entry = self.entry(tensor) if isinstance(tensor, str) else tensor
        name = entry.spec.name
        for first, tile in super().iter_tiles(entry, verify=verify):
            if tile.dtype == torch.bool:
                yield first, tile
            elif not (tile.is_floating_point() or tile.is_complex()):
                yield first, torch.maximum(tile, self._newest.read_tile(name, first, len(tile)))
            elif entry.spec.role == PARAMETER:
                yield first, tile
            else:
                moved = _exact(self._base.read_tile(name, first, len(tile)))
                moved = moved - _exact(self._newest.read_tile(name, first, len(tile)))
                yield first, moved + _exact(tile)


def _exact(tile: Tensor) -> Tensor:
    return tile.to(torch.complex128 if tile.is_complex() else torch.float64)
