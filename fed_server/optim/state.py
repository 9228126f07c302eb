"""What an optimizer keeps from one version to the next: a file beside the version, read and written tile by tile.

A parameter's state is one tensor of the file, with a row for each name of `ServerOptimizer.initial`: float32, or float64 where the
parameter has 64 bits. It is rounded to that once a round, whether or not the coordinator was restarted in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fed_core.errors import NotFiniteError
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter
from fed_core.specs import PARAMETER, TensorSpec, is_floating
from fed_core.tensors import torch_dtype
from fed_server.optim.base import ServerOptimizer, State

# 512 KiB of float64: what a step works on stays in the second-level cache.
_TILE = 2**16

_WIDE = ("float64", "complex128")


def state_specs(optimizer: ServerOptimizer, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The tensors of a model's state file; none where the optimizer keeps nothing."""
    num_rows = len(optimizer.initial)
    return [
        TensorSpec(
            spec.name,
            (num_rows, spec.num_elements * spec.reals_per_element),
            "float64" if spec.dtype in _WIDE else "float32",
        )
        for spec in specs
        if num_rows and spec.role == PARAMETER and is_floating(spec.dtype)
    ]


class Steps:
    """An optimizer between two versions. Every tile of a parameter is to be given once, to `step` or `stay`, in any order."""

    def __init__(
        self,
        optimizer: ServerOptimizer,
        specs: Sequence[TensorSpec],
        before: SafetensorsReader | None = None,
        after: SafetensorsWriter | None = None,
    ) -> None:
        """`before` is the state after the last step, None before the first; `after` is written, and not needed where nothing is
        kept."""
        self._optimizer = optimizer
        self._initial = tuple(optimizer.initial.values())
        self._specs = {spec.name: spec for spec in state_specs(optimizer, specs)}
        self._before = before
        self._after = after
        # Memory that is used again: a fresh tile costs more to map than to fill.
        self._room = torch.empty((len(self._initial), _TILE), dtype=torch.float64)

    def step(self, spec: TensorSpec, first: int, weights: Tensor, delta: Tensor) -> Tensor:
        """The next weights of a tile of a parameter. `weights` and `delta` are 1-D float64, complex elements as pairs, and are
        overwritten; `first` counts the parameter's own elements. Raises NotFiniteError where the state would leave its type's
        range."""
        start = first * spec.reals_per_element
        for at in range(0, len(delta), _TILE):
            mine, change = weights[at : at + _TILE], delta[at : at + _TILE]
            state, moved = self._optimizer.step(self._read(spec.name, start + at, len(mine)), mine, change)
            self._write(spec.name, start + at, state)
            mine.copy_(moved)
        return weights

    def stay(self, spec: TensorSpec, first: int, count: int) -> None:
        """The tile was not part of the round: its state is that of before."""
        if spec.name in self._specs:
            per_element = spec.reals_per_element
            for at in range(first * per_element, (first + count) * per_element, _TILE):
                length = min(_TILE, (first + count) * per_element - at)
                self._write(spec.name, at, self._read(spec.name, at, length))

    def _read(self, name: str, first: int, count: int) -> State:
        state = tuple(self._room[:, :count])
        for row, (kept, value) in enumerate(zip(state, self._initial, strict=True)):
            if self._before is None:
                kept.fill_(value)
            else:
                kept.copy_(self._before.read_tile(name, row * self._specs[name].shape[1] + first, count))
        return state

    def _write(self, name: str, first: int, state: State) -> None:
        for row, (tensor, kept) in enumerate(zip(state, self._optimizer.initial, strict=True)):
            assert self._after is not None, "an optimizer with a state needs a file for it"
            spec = self._specs[name]
            rounded = tensor.to(torch_dtype(spec.dtype))
            if len(rounded) and not all(extreme.isfinite() for extreme in torch.aminmax(rounded)):
                raise NotFiniteError(
                    f"the server optimizer's {kept} of tensor {name!r} holds NaN or leaves the range of {spec.dtype}"
                )
            self._after.write_tile(name, row * spec.shape[1] + first, rounded)


@contextmanager
def open_steps(
    optimizer: ServerOptimizer,
    specs: Sequence[TensorSpec],
    before: Path | None,
    after: Path,
    metadata: Mapping[str, str],
) -> Iterator[Steps]:
    """Steps from the state in one file, None before the first step, to that in another, which is whole when the block ends. No file
    is read or written where the optimizer keeps nothing. Memory: a few tiles."""
    if not optimizer.initial:
        yield Steps(optimizer, specs)
        return
    with ExitStack() as files:
        reader = files.enter_context(SafetensorsReader(before)) if before is not None else None
        file = files.enter_context(after.open("wb+"))
        writer = SafetensorsWriter(
            file, state_specs(optimizer, specs), {**metadata, "rows": " ".join(optimizer.initial)}
        )
        yield Steps(optimizer, specs, reader, writer)
        writer.finish()
