"""What a codec is: tensors to segments and back. It knows nothing of files, digests or the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fed_core.specs import TensorSpec

TileSource = Callable[[int, int], Tensor]
"""`(first_coordinate, num_coordinates)` -> that part of a tensor, flat, on the CPU, good until the next call."""


class Codec(Protocol):
    """Encodes one tensor as an optional head and bodies that each decode on their own, given the head.

    A codec holds no state: what decoding needs is in the head. Its `kind` is its key in `fed_core.codecs.registry.CODECS` and
    its name in a manifest. Everything a peer sent is hostile: `decode` raises PayloadError on any bytes that do not fit.
    """

    kind: str
    has_head: bool
    """Whether `plan` returns a head; known beforehand, because a manifest's size is fixed before its segments are made."""

    def body_coordinates(self, dtype: str) -> int:
        """Coordinates of every body but the last, at most 2^20, such that no body exceeds 1 MiB."""
        ...

    def min_body_bytes(self, num_coordinates: int, dtype: str) -> int:
        """Fewest bytes that a body of so many coordinates can have; a shorter one is refused before memory is set aside."""
        ...

    def max_body_bytes(self, num_coordinates: int, dtype: str) -> int:
        """Most bytes that a body of so many coordinates can have, at most 1 MiB."""
        ...

    def plan(self, spec: TensorSpec, source: TileSource) -> bytes | None:
        """The head: what the bodies share, at most 16 MiB; None where `has_head` is false. May read the source."""
        ...

    def encode(self, head: bytes | None, tile: Tensor) -> bytes | memoryview:
        """The body of a flat, contiguous tile on the CPU. May be a view of the tile's memory."""
        ...

    def decode(self, head: bytes | memoryview | None, body: bytes | memoryview, out: Tensor) -> None:
        """Writes a body's values into `out`, flat and contiguous, of the tensor's dtype and the body's length."""
        ...
