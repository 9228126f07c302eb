"""The largest values as plus or minus their mean magnitude, the others zero: sparse ternary compression.

Sattler et al. 2019 (https://arxiv.org/abs/1903.02891): the largest fraction p of an update's values survives, as {-m, 0, +m}; m is
the mean magnitude of the survivors, a sign takes one bit, the places are entropy-coded. What we do differently:

- The fraction is of the whole update, one threshold for all tensors, as there. It could be of each tensor, or a multiple of its
  root mean square (threshold quantizers): at 1 % of a CNN's update 0.66 of the energy were then left out instead of 0.46, at 5 % of
  a transformer's 0.62 instead of 0.40.
- m belongs to 256 survivors and not to all: with one threshold the magnitudes of survivors differ by row and by tensor. At 5 % of a
  CNN's update the error is 0.42 instead of 0.47, for 0.06 bits a survivor.
- Places are coded by `positions`, in which Golomb's code (Rice's, its kind for powers of two) is one form of three.

At 1 % the best that there is of a Gaussian: survivors lie so near to the threshold that their sign says 99 % of what they are, and
error and bits are within 0.2 dB of Shannon's bound. In updates of real models the largest values differ more among each other, and
from some percent on `topk` with a few bits a value, and `fsq` above all, need fewer bits for an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import FeedbackTable
from fed_core.codecs.entropy import ByteReader
from fed_core.codecs.floating import check_lossy
from fed_core.codecs.positions import max_position_bytes, read_positions, write_positions
from fed_core.codecs.sign import max_sign_bytes, read_signs, write_signs
from fed_core.codecs.sparsity import Fraction, Largest, Tensors, largest, plan_parameters
from fed_core.payload.limits import MAX_BODY_COORDINATES
from fed_core.specs import TensorSpec

_BLOCK: Final = 256


class TernaryCodec:
    """A body is the positions of the survivors (`fed_core.codecs.positions`) and, where there are any, their signs and scales as a
    body of the codec `sign` has them."""

    kind = "ternary"
    has_head = False

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From a byte (no survivors) to a bitmap and as many signs."""
        check_lossy(self.kind, spec)
        return 1, max_position_bytes(num_coordinates) + max_sign_bytes(num_coordinates)

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _TernaryDecoder:
        """The same for every tensor of a floating type."""
        check_lossy(self.kind, spec, head)
        return _TernaryDecoder()


class _TernaryDecoder:
    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Zeros, then the survivors. Takes some 40 bytes for each of these."""
        reader = ByteReader(body)
        positions = torch.from_numpy(read_positions(reader, len(out)))
        out.zero_()
        if len(positions):
            values = torch.empty(len(positions), dtype=out.dtype)
            read_signs(reader.take(reader.left), values)
            out.index_copy_(0, positions, values)
        reader.done()


def ternary_plan(spec: TensorSpec, survivors: Largest) -> TensorPlan:
    """Bodies of 2^20 coordinates."""

    def encode(first: int, tile: Tensor) -> bytes:
        places = survivors.places(first, tile)
        positions = write_positions(places, len(tile))
        if not len(places):
            return positions
        return positions + write_signs(spec.name, tile[torch.from_numpy(places)], _BLOCK)

    return TensorPlan(TernaryCodec.kind, None, MAX_BODY_COORDINATES, encode)


class TernaryConfig(FeedbackTable):
    """The signs of the largest values."""

    feedback_by_default: ClassVar[bool] = True

    kind: Literal["ternary"] = Field(
        default="ternary",
        description="The largest values as plus or minus a mean, all others zero: a few bits for each.",
    )
    fraction: Fraction = 0.05

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Parameters by this codec, small vectors by uniform, buffers and other types raw; the seed decides nothing."""

        def plan_large(large: Tensors) -> list[TensorPlan]:
            chosen = largest(large, self.fraction)
            return [ternary_plan(spec, survivors) for (spec, _), survivors in zip(large, chosen, strict=True)]

        return plan_parameters(tensors, plan_large)
