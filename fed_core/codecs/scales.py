"""Groups of coordinates that share a frequency table, told from the scales of their row and their column.

An update of a dense or convolutional layer is a sum of outer products, so the local scale of its values is close to a row's times a
column's. Both are sent as small integers, logarithms in fractions of an octave; the sum of the two tells the group. In an order
that sorts rows and columns by level, a group is a few rectangles, so that values are grouped by copying blocks, not by masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_core.codecs.entropy import Ints


class Rectangle(NamedTuple):
    """Part of a flat range: `num_rows` x `num_columns` of the matrix from (`row`, `column`) on, at `offset` of the range."""

    offset: int
    row: int
    num_rows: int
    column: int
    num_columns: int

    def of(self, flat: Tensor) -> Tensor:
        """The rectangle as a view of the flat range."""
        return flat[self.offset : self.offset + self.num_rows * self.num_columns].view(self.num_rows, self.num_columns)


def rectangles(first: int, count: int, num_columns: int) -> Iterator[Rectangle]:
    """A flat range of a matrix as rectangles: the rest of a row, whole rows, the beginning of a row."""
    offset = 0
    while offset < count:
        row, column = divmod(first + offset, num_columns)
        if column or count - offset < num_columns:
            part = Rectangle(offset, row, 1, column, min(num_columns - column, count - offset))
        else:
            part = Rectangle(offset, row, (count - offset) // num_columns, 0, num_columns)
        yield part
        offset += part.num_rows * part.num_columns


class _Block(NamedTuple):
    """A rectangle, how to sort its rows and columns, and the group of each (rows, columns) of what is then sorted."""

    rectangle: Rectangle
    row_order: Tensor | None
    column_order: Tensor | None
    segments: list[tuple[int, slice, slice]]


class Layout:
    """Where the values of one flat range belong. Within a group, the order is that of the sorted rectangles."""

    def __init__(self, num_groups: int, blocks: list[_Block]) -> None:
        self._blocks = blocks
        self.counts = [0] * num_groups
        """Coordinates of each group."""
        for block in blocks:
            for group, rows, columns in block.segments:
                self.counts[group] += (rows.stop - rows.start) * (columns.stop - columns.start)

    def split(self, values: Tensor) -> list[Tensor]:
        """Flat values of the range -> for each group a flat tensor. Copies."""
        groups = [values.new_empty(count) for count in self.counts]
        for (rectangle, row_order, column_order, _), parts in self._parts(groups):
            source = rectangle.of(values)
            source = source if row_order is None else source.index_select(0, row_order)
            arranged = (source if column_order is None else source.index_select(1, column_order)).numpy()
            for part, rows, columns in parts:
                part[...] = arranged[rows, columns]
        return groups

    def join(self, groups: Sequence[Tensor | None], out: Tensor) -> None:
        """The inverse of `split`, written into `out`, flat, with one rounding to its dtype; a group that is None is zero."""
        for (rectangle, row_order, column_order, _), parts in self._parts(groups):
            arranged = np.zeros((rectangle.num_rows, rectangle.num_columns), np.float32)
            for part, rows, columns in parts:
                arranged[rows, columns] = part
            source = torch.from_numpy(arranged)
            source = source if column_order is None else source.index_select(1, column_order.argsort())
            rectangle.of(out).copy_(source if row_order is None else source.index_select(0, row_order.argsort()))

    def _parts(
        self, groups: Sequence[Tensor | None]
    ) -> Iterator[tuple[_Block, list[tuple[NDArray[Any], slice, slice]]]]:
        """Each block with its parts of the groups' values, as matrices: views, in NumPy, whose slices cost a tenth of torch's."""
        flat = [None if group is None else group.numpy() for group in groups]
        starts = [0] * len(flat)
        for block in self._blocks:
            parts = []
            for group, rows, columns in block.segments:
                values = flat[group]
                if values is not None:
                    shape = rows.stop - rows.start, columns.stop - columns.start
                    stop = starts[group] + shape[0] * shape[1]
                    parts.append((values[starts[group] : stop].reshape(shape), rows, columns))
                    starts[group] = stop
            yield block, parts


class Scales:
    """Levels of rows and columns of a matrix, and how many of the ascending `bounds` a sum of the two reaches: the group.

    `rows` and `columns` are int32 and as long as the matrix has rows and columns, or None, which stands for zeros.
    """

    def __init__(self, num_columns: int, rows: Ints | None, columns: Ints | None, bounds: Sequence[int]) -> None:
        self._num_columns = num_columns
        self.rows = rows
        self.columns = columns
        self.bounds = np.asarray(bounds, np.int32)

    @cached_property
    def _sorted_columns(self) -> tuple[Tensor | None, Ints]:
        return _sorted(self.columns, 0, self._num_columns)

    @property
    def num_groups(self) -> int:
        """One more than there are bounds."""
        return len(self.bounds) + 1

    def layout(self, first: int, count: int) -> Layout:
        """Of the `count` coordinates from `first` on."""
        return Layout(self.num_groups, [self._block(part) for part in rectangles(first, count, self._num_columns)])

    def _block(self, part: Rectangle) -> _Block:
        row_order, row_levels = _sorted(self.rows, part.row, part.num_rows)
        column_order, column_levels = (
            self._sorted_columns
            if part.num_columns == self._num_columns
            else _sorted(self.columns, part.column, part.num_columns)
        )
        starts = np.concatenate([[0], np.flatnonzero(np.diff(row_levels)) + 1])
        # Where in each run of rows of one level each group ends.
        cuts = np.searchsorted(column_levels, self.bounds - row_levels[starts][:, None])
        cuts = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, part.num_columns)))
        runs, groups = np.nonzero(np.diff(cuts))
        rows = [slice(*ends) for ends in pairwise([*starts.tolist(), part.num_rows])]
        columns = zip(cuts[runs, groups].tolist(), cuts[runs, groups + 1].tolist(), strict=True)
        segments = [
            (group, rows[run], slice(*ends))
            for group, run, ends in zip(groups.tolist(), runs.tolist(), columns, strict=True)
        ]
        return _Block(part, row_order, column_order, segments)


def _sorted(levels: Ints | None, first: int, count: int) -> tuple[Tensor | None, Ints]:
    """Part of the levels in ascending order, and that order; None for the order that is."""
    if levels is None:
        return None, np.zeros(count, np.int32)
    part = levels[first : first + count]
    order = np.argsort(part, kind="stable")
    return torch.from_numpy(order), part[order]
