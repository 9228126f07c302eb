"""Sums that do not depend on their order."""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

# 2**16 float64 are 512 KiB: the scratch tile stays in the second-level cache.
TILE = 2**16


def _zeros(num_elements: int) -> Tensor:
    """Float64 zeros, in pages of their own. A model-sized block on the heap is freed every round and leaves a hole that the
    transfers fill with their buffers; the next round's would then need new memory."""
    if num_elements == 0:
        return torch.zeros(0, dtype=torch.float64)
    return torch.frombuffer(mmap.mmap(-1, 8 * num_elements), dtype=torch.float64)


class SumMemory:
    """Memory of sums that are no longer there, for new ones of the same length: pages new from the system cost more than a fold.

    What it holds is bounded by the sums that lived at the same time. Thread-safe."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def zeros(self, num_elements: int) -> Tensor:
        """Float64 zeros."""
        try:
            return self._free[num_elements].pop().zero_()
        except LookupError:
            return _zeros(num_elements)

    def take_back(self, steps: Tensor) -> None:
        """What `zeros` gave, and nobody looks at any longer."""
        self._free.setdefault(len(steps), []).append(steps)


def scratch_tile() -> Tensor:
    """Room for one tile."""
    return torch.empty(TILE, dtype=torch.float64)


class ExactSum:
    """A weighted sum of real tensors, held as whole multiples of 2**exponent in float64.

    Law: any sequence of `add`, `subtract` and `merge` that stands for the same multiset of (values, weight) gives the same bits.
    It holds as long as the absolute sum stays below 2**53 steps, which the grid's policy promises.

    `steps` are these whole numbers. Memory: 8 bytes an element, out of `memory` and back into it when the sum is dropped. `scratch`
    (see `scratch_tile`) may be shared by sums that are not added to at the same time."""

    def __init__(
        self, num_elements: int, exponent: int, scratch: Tensor | None = None, memory: SumMemory | None = None
    ) -> None:
        self.exponent = exponent
        self.steps = _zeros(num_elements) if memory is None else memory.zeros(num_elements)
        if memory is not None:
            weakref.finalize(self, memory.take_back, self.steps)
        self._scratch = scratch_tile() if scratch is None else scratch

    def add(self, first: int, values: Tensor, weight: float) -> None:
        """Adds weight * values to the coordinates from `first` on. `values` is 1-D and floating; `weight` may be negative to
        take a contribution out again. The product is exact for values of up to 24 bits and whole weights below 2**29, so the only
        rounding is the one to the grid; with any other weight it is rounded once more, each contribution by itself."""
        # Scaling a whole number by a power of two is exact.
        scale = float(weight) * 2.0**-self.exponent
        for start in range(0, len(values), TILE):
            tile = values[start : start + TILE]
            scratch = self._scratch[: len(tile)]
            scratch.copy_(tile)
            scratch.mul_(scale).round_()
            self.steps[first + start : first + start + len(tile)].add_(scratch)

    def __len__(self) -> int:
        return len(self.steps)

    def add_steps(self, first: int, steps: Tensor) -> None:
        """Adds whole numbers of steps to the coordinates from `first` on."""
        self.steps[first : first + len(steps)].add_(steps)

    def merge(self, other: ExactSum) -> None:
        """Adds another partial sum of the same coordinates on the same grid."""
        if other.exponent != self.exponent or len(other.steps) != len(self.steps):
            raise ValueError("partial sums merge only on the same grid")
        self.steps.add_(other.steps)

    def mean(self, first: int, count: int, total_weight: int) -> Tensor:
        """The sum divided by `total_weight`, float64, for `count` coordinates from `first` on."""
        tile = self.steps[first : first + count] * 2.0**self.exponent
        return tile.div_(float(total_weight))
