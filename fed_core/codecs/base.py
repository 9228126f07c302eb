"""What a codec is: tensors to segments and back. It knows nothing of files, digests or the network.

The two directions have two shapes. Decoding is one object per tensor, made from its head, and trusts nothing. Encoding is decided
for all tensors of a payload together (one step size serves them all), tensor by tensor analysed, then planned, then written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeGuard

from torch import Tensor

from fed_core.specs import TensorSpec

TileSource = Callable[[int, int], Tensor]
"""`(first_coordinate, num_coordinates)` -> that part of a tensor, flat, contiguous, on the CPU, in the tensor's dtype, good until
the next call. It can be asked for any part, in any order and as often as a codec likes."""


class TensorDecoder(Protocol):
    """Decodes the bodies of one tensor, in any order."""

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Writes the values of the body that begins at coordinate `first` into `out`: flat, contiguous, of the tensor's dtype and
        the body's length. Raises PayloadError on any bytes that do not fit; memory is bounded by a multiple of `out`'s."""
        ...


class BoundedDecoder(TensorDecoder, Protocol):
    """A decoder that can tell how large the values of a body are at most, without decoding it."""

    def bound(self, body: bytes | memoryview, num_coordinates: int) -> float:
        """No value of the body is larger in absolute value, before it is rounded to the tensor's dtype; infinity where that cannot
        be told. Raises PayloadError for every body that `decode` would refuse."""
        ...


def is_bounded(decoder: TensorDecoder) -> TypeGuard[BoundedDecoder]:
    """Whether it is one. Cheaper than isinstance, which looks for a protocol's every member."""
    return hasattr(decoder, "bound")


class Codec(Protocol):
    """Decodes what a manifest names by `kind`, its key in `fed_core.codecs.registry.CODECS`. Holds no state.

    Everything a peer sent is hostile: every length, rank, table and exponent is checked before memory is set aside for it.
    """

    kind: str
    has_head: bool
    """Whether its tensors have a head."""

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """Fewest and most bytes of a body of so many coordinates; any other is refused before memory is set aside. At most 1 MiB.

        Raises PayloadError for a tensor that the codec cannot hold (most hold only floating types).
        """
        ...

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> TensorDecoder:
        """A decoder of the tensor with that head. Raises PayloadError on a head that does not fit the spec."""
        ...


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one tensor is going to be encoded; everything that its bodies share is decided.

    `encode(first, tile)` gives the body of the tile that begins at coordinate `first`: flat, contiguous, in the tensor's dtype,
    `body_coordinates` long except the last. At least one byte. May be a view of the tile's memory.
    """

    codec: str
    head: bytes | None
    body_coordinates: int
    encode: Callable[[int, Tensor], bytes | memoryview]


class Cost(NamedTuple):
    """What encoding a tensor would cost: bits on the wire, and the squared error |x - x'|^2 that the receiver is left with."""

    bits: float
    squared_error: float


class Analysis(Protocol):
    """One tensor seen by one codec whose rate is ruled by a step size: what any step would cost, and the plan for the one
    chosen."""

    def cost(self, step: float) -> Cost:
        """An estimate, cheap after the first call; it may look at a sample of the tensor."""
        ...

    def plan(self, step: float) -> TensorPlan:
        """The plan at that step. The codec may round the step to what its head can say."""
        ...


class Encoding(Protocol):
    """How a sender encodes: the config of a codec, or of a choice among codecs."""

    @property
    def kind(self) -> str:
        """Its name in a run config."""
        ...

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Plans for all tensors of a payload, in order. The same tensors and seed give the same plans on the same machine."""
        ...
