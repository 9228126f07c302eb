"""The largest values, wherever they are, and where that is; all others are zero.

Aji and Heafield 2017 (https://arxiv.org/abs/1704.05021), Lin et al. 2018 (Deep Gradient Compression,
https://arxiv.org/abs/1712.01887). What we do differently: one threshold for all tensors of an update, not one for each: of as many
survivors it keeps the most energy there is to keep (at 1 % of a CNN's update 0.46 is left out instead of 0.66). Values go through
an encoding of their own, for 32 bits a value would cost four times what its place does. Places are coded by `positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import FeedbackTable
from fed_core.codecs.entropy import ByteReader
from fed_core.codecs.floating import check_lossy
from fed_core.codecs.nested import (
    VALUES,
    UniformValues,
    ValuesConfig,
    ValuesDecoder,
    body_coordinates,
    max_value_bytes,
    plan_values,
    write_values_head,
)
from fed_core.codecs.positions import max_position_bytes, read_positions, write_positions
from fed_core.codecs.sparsity import Fraction, Largest, Tensors, largest, plan_parameters
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec

_NOTHING = b"\0"


class TopkCodec:
    """The head names the codec of the values and holds its head; a single zero byte: nothing of the tensor survives.

    A body is the positions of the survivors (`fed_core.codecs.positions`) and, where there are any, the body of their values.
    """

    kind = "topk"
    has_head = True

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From a byte (no survivors) to a bitmap and all values."""
        check_lossy(self.kind, spec)
        most = max_position_bytes(num_coordinates) + max_value_bytes(spec, num_coordinates)
        return 1, min(most, MAX_BODY_BYTES)

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _TopkDecoder:
        """Memory: that of the decoder of the values."""
        check_lossy(self.kind, spec)
        if head is None:
            raise PayloadError("a tensor of the codec 'topk' has no head")
        return _TopkDecoder(None if bytes(head[:2]) == _NOTHING else ValuesDecoder(spec, ByteReader(head)))


class _TopkDecoder:
    def __init__(self, values: ValuesDecoder | None) -> None:
        self._values = values

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Zeros, then the survivors. Takes some 40 bytes for each of these."""
        reader = ByteReader(body)
        positions = torch.from_numpy(read_positions(reader, len(out)))
        out.zero_()
        if len(positions):
            if self._values is None:
                raise PayloadError(f"{len(positions)} survivors of a tensor that has none")
            out.index_copy_(0, positions, self._values.decode(first, reader.take(reader.left), len(positions)))
        reader.done()


class _Survivors:
    def __init__(self, of_tensor: Largest) -> None:
        self._of_tensor = of_tensor

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._of_tensor.counts

    def values(self, first: int, tile: Tensor) -> Tensor:
        return tile[torch.from_numpy(self._of_tensor.places(first, tile))]


def topk_plan(spec: TensorSpec, survivors: Largest, values: TensorPlan | None) -> TensorPlan:
    """Bodies of up to 2^20 coordinates, fewer where many of them survive in many bytes each. `values` plans the survivors' vector;
    None where there are none."""
    if values is None:
        return TensorPlan(TopkCodec.kind, _NOTHING, MAX_BODY_COORDINATES, lambda first, tile: _NOTHING)

    def encode(first: int, tile: Tensor) -> bytes:
        places = survivors.places(first, tile)
        positions = write_positions(places, len(tile))
        return positions + values.encode(first, tile[torch.from_numpy(places)]) if len(places) else positions

    length = body_coordinates(spec, values, survivors.counts)
    return TensorPlan(TopkCodec.kind, write_values_head(values), length, encode)


class TopkConfig(FeedbackTable):
    """The largest values, in any encoding."""

    feedback_by_default: ClassVar[bool] = True

    kind: Literal["topk"] = Field(default="topk", description="The largest values and where they are, all others zero.")
    fraction: Fraction = 0.05
    values: ValuesConfig = Field(default=UniformValues(), description=VALUES)

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Parameters by this codec, small vectors by uniform, buffers and other types raw; the seed is that of the values."""

        def plan_large(large: Tensors) -> list[TensorPlan]:
            chosen = largest(large, self.fraction)
            vectors = [(spec, source, _Survivors(each)) for (spec, source), each in zip(large, chosen, strict=True)]
            plans = plan_values(self.values, vectors, seed=seed)
            return [topk_plan(spec, each, plan) for (spec, _), each, plan in zip(large, chosen, plans, strict=True)]

        return plan_parameters(tensors, plan_large)
