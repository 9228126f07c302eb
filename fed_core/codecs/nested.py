"""The values of survivors, in another encoding: a vector within a tensor.

The survivors of a tensor, in order, are a vector, and any encoding of vectors can have it: its head goes into the head of the
sparse tensor, the body of those that survive in a range goes into the body of the range. The vector counts as one of the tensor's
length, of which the body that begins at the tensor's coordinate c begins at c, too, and is as long as there are survivors: so
every body can be decoded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import Codec, TensorDecoder, TensorPlan, TileSource
from fed_core.codecs.blocks import BlockLength
from fed_core.codecs.cast import CastCodec, CastConfig
from fed_core.codecs.config import CodecTable
from fed_core.codecs.entropy import ByteReader, Coder
from fed_core.codecs.floating import TILE
from fed_core.codecs.fsq import MAX_BODY as MAX_FSQ_BODY
from fed_core.codecs.fsq import FsqCodec, FsqConfig
from fed_core.codecs.positions import max_position_bytes
from fed_core.codecs.raw import RawCodec, RawConfig
from fed_core.codecs.uniform import MAX_BITS, MIN_BITS, Rounding, UniformCodec, UniformConfig
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES, MAX_BODY_COORDINATES
from fed_core.specs import PARAMETER, TensorSpec
from fed_core.tensors import torch_dtype


class UniformValues(CodecTable):
    """`uniform`, with what suits survivors by default."""

    kind: Literal["uniform"] = Field(default="uniform", description="Integers of a few bits and a scale per block.")
    bits: int = Field(default=4, ge=MIN_BITS, le=MAX_BITS, description="Bits per value.")
    block: BlockLength = Field(default=128, description="Values that share a scale of 16 bits, a power of two.")
    rounding: Rounding = Field(
        default="nearest", description="stochastic errs more in one update, and by nothing on average."
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Every vector by uniform; the seed rules stochastic rounding."""
        uniform = UniformConfig(bits=self.bits, block=self.block, rounding=self.rounding)
        return uniform.plan(tensors, seed=seed)


class FsqValues(CodecTable):
    """`fsq`, of which vectors need no contexts."""

    kind: Literal["fsq"] = Field(default="fsq", description="One step for all values, entropy-coded.")
    target_error: float = Field(
        default=0.02, gt=0, lt=1, description="Squared error over squared length of all the values together."
    )
    coder: Coder = Field(default="rans", description="As of the encoding `fsq`.")

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """All vectors at one step; short ones by uniform where that is better."""
        return FsqConfig(target_error=self.target_error, coder=self.coder).plan(tensors, seed=seed)


AnyValues = RawConfig | CastConfig | UniformValues | FsqValues
ValuesConfig = Annotated[AnyValues, Field(discriminator="kind")]
"""How survivors may be encoded. None of these is sparse itself."""
VALUES: Final = (
    "How those that are sent are encoded. uniform of 4 bits loses 1 to 5 % of them; fsq is shorter for its error where they are "
    "many, and slower."
)

# The first byte of a head is the place of the codec in here, and one more; zero stands for no survivors at all.
_CODECS: Final[tuple[Codec, ...]] = (RawCodec(), CastCodec(), UniformCodec(), FsqCodec())
_PLACES: Final = {codec.kind: place for place, codec in enumerate(_CODECS)}


class Survivors(Protocol):
    """Those of one tensor."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many there are in each run of 2^16 coordinates."""
        ...

    def values(self, first: int, tile: Tensor) -> Tensor:
        """Their values, in order, from the tile that begins at coordinate `first`, a multiple of 2^16; a copy."""
        ...


def plan_values(
    values: AnyValues, tensors: Sequence[tuple[TensorSpec, TileSource, Survivors]], *, seed: int
) -> list[TensorPlan | None]:
    """How the survivors of each tensor are encoded, all planned together; None where there are none. Memory: that of `values`."""
    vectors = [_Vector(*each) for each in tensors]
    plans = iter(values.plan([(each.spec, each) for each in vectors if each.spec.num_elements], seed=seed))
    return [next(plans) if each.spec.num_elements else None for each in vectors]


def body_coordinates(spec: TensorSpec, plan: TensorPlan, counts: NDArray[np.int64]) -> int:
    """The longest bodies, up to 2^20 coordinates, of which each has room for its survivors and their positions."""
    codec = _CODECS[_PLACES[plan.codec]]
    length = MAX_BODY_COORDINATES
    while length > TILE:
        most = int(np.add.reduceat(counts, np.arange(0, len(counts), length // TILE)).max())
        if most <= plan.body_coordinates:
            num_bytes = codec.body_bytes(_vector_of(spec, most), most)[1]
            if num_bytes < MAX_BODY_BYTES - max_position_bytes(length):
                break
        length //= 2
    return length


def write_values_head(plan: TensorPlan) -> bytes:
    """What `read_values_head` reads."""
    return bytes([1 + _PLACES[plan.codec]]) + (plan.head or b"")


class ValuesDecoder:
    """Decodes the survivors of one tensor, whose head ends with what `reader` has left. Raises PayloadError where that is no
    head."""

    def __init__(self, spec: TensorSpec, reader: ByteReader) -> None:
        place = reader.u8() - 1
        if not 0 <= place < len(_CODECS):
            raise PayloadError(f"values in the codec {place + 1}; expected 1 to {len(_CODECS)}")
        self._codec = _CODECS[place]
        self._spec = _vector_of(spec, spec.num_elements)
        head = reader.take(reader.left)
        if not self._codec.has_head and len(head):
            raise PayloadError(f"values in the codec {self._codec.kind!r} with a head of {len(head)} bytes")
        self._decoder: TensorDecoder = self._codec.decoder(self._spec, head if self._codec.has_head else None)

    def decode(self, first: int, body: memoryview, count: int) -> Tensor:
        """So many values, at least one. Raises PayloadError on bytes that do not fit, before memory is set aside for them."""
        least, most = self._codec.body_bytes(self._spec, count)
        if not least <= len(body) <= most:
            raise PayloadError(f"{count} values in {len(body)} bytes; expected {least} to {most}")
        values = torch.empty(count, dtype=torch_dtype(self._spec.dtype))
        self._decoder.decode(first, body, values)
        return values


def max_value_bytes(spec: TensorSpec, count: int) -> int:
    """The most bytes that the body of so many values takes in any codec."""
    return max(
        codec.body_bytes(spec, count if codec.kind != "fsq" else min(count, MAX_FSQ_BODY))[1] for codec in _CODECS
    )


def _vector_of(spec: TensorSpec, length: int) -> TensorSpec:
    return TensorSpec(spec.name, (length,), spec.dtype, PARAMETER)


class _Vector:
    """The survivors of a tensor as a source of their own. Reads runs of 2^16 coordinates, however few are asked for."""

    def __init__(self, spec: TensorSpec, source: TileSource, survivors: Survivors) -> None:
        self._num_coordinates = spec.num_elements
        self._source, self._survivors = source, survivors
        self._ends = np.cumsum(survivors.counts)
        self.spec = _vector_of(spec, int(self._ends[-1]))

    def __call__(self, first: int, count: int) -> Tensor:
        runs = range(
            int(np.searchsorted(self._ends, first, "right")), int(np.searchsorted(self._ends, first + count)) + 1
        )
        skipped = first - (int(self._ends[runs[0] - 1]) if runs[0] else 0)
        return torch.cat([self._run(run) for run in runs])[skipped : skipped + count]

    def _run(self, run: int) -> Tensor:
        first = run * TILE
        return self._survivors.values(first, self._source(first, min(TILE, self._num_coordinates - first)))
