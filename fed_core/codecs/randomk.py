"""Values at places that both sides draw from a seed: no place is sent, and none is preferred.

The random mask of Konecny et al. 2016 (https://arxiv.org/abs/1610.05492). Scaled up by one over the fraction, the estimate is right
on average whatever the vector, with a variance of 1/fraction - 1 times its energy, which falls as the cohort grows. What we do
differently: the places are stratified. A run of n coordinates is divided into k strata of equal length, but for one coordinate, and
one coordinate is drawn of each; a value is scaled by the length of its stratum. So there are k of them in every run, drawing costs
nothing for those that are left out, and two neighbours hardly ever go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final, Literal

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import FeedbackTable
from fed_core.codecs.entropy import ByteReader, varint
from fed_core.codecs.floating import TILE, check_lossy
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
from fed_core.codecs.positions import Positions
from fed_core.codecs.sparsity import Tensors, plan_parameters
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype

_DENSITY_BITS: Final = 20
_SEED_BYTES: Final = 8


class RandomkCodec:
    """The head is the density as a varint (parts in 2^20), the seed (8 bytes, little-endian), and the codec and head of the values.

    A body is that of its values, in order of their coordinates. Each run of n coordinates, 2^16 or what is left of the body, has
    k = ceil(n * density / 2^20) of them: one in each of the strata that begin at floor(i * n / k), at its beginning plus
    floor(h * w / 2^32). w is the length of the stratum, h the upper half of splitmix64 (Steele et al. 2014,
    https://doi.org/10.1145/2660193.2660195) of the seed at the tensor's coordinate c where the stratum begins: of the seed plus
    c times 0x9E3779B97F4A7C15, all modulo 2^64.
    """

    kind = "randomk"
    has_head = True

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From a single value to all of them."""
        check_lossy(self.kind, spec)
        return 1, min(max_value_bytes(spec, num_coordinates), MAX_BODY_BYTES)

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _RandomkDecoder:
        """Memory: that of the decoder of the values."""
        check_lossy(self.kind, spec)
        if head is None:
            raise PayloadError("a tensor of the codec 'randomk' has no head")
        reader = ByteReader(head)
        density = reader.varint()
        if not 1 <= density <= 2**_DENSITY_BITS:
            raise PayloadError(f"a density of {density} in 2^{_DENSITY_BITS}; expected 1 to 2^{_DENSITY_BITS}")
        places = Places(density, int.from_bytes(reader.take(_SEED_BYTES), "little"))
        return _RandomkDecoder(places, ValuesDecoder(spec, reader))


class _RandomkDecoder:
    def __init__(self, places: Places, values: ValuesDecoder) -> None:
        self._places, self._values = places, values

    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Zeros, then the values. Takes as much memory as these, and that of a run."""
        values = self._values.decode(first, memoryview(body), self._places.count(len(out)))
        out.zero_()
        for positions, _ in self._places.runs(first, len(out)):
            out.index_copy_(0, torch.from_numpy(positions), values[: len(positions)])
            values = values[len(positions) :]


class Places:
    """What coordinates are drawn, by a density (parts in 2^20) and a seed of 64 bits: integers only, the same everywhere."""

    def __init__(self, density: int, seed: int) -> None:
        self.density, self.seed = density, seed

    def count(self, num_coordinates: int) -> int:
        """How many are drawn of so many coordinates."""
        num_runs, rest = divmod(num_coordinates, TILE)
        return num_runs * self._of_run(TILE) + self._of_run(rest)

    def _of_run(self, length: int) -> int:
        return -(-length * self.density >> _DENSITY_BITS)

    def draw(self, first: int, num_coordinates: int) -> tuple[Positions, NDArray[np.int64]]:
        """The places in a body that begins at coordinate `first`, ascending, and the lengths of their strata."""
        positions, widths = zip(*self.runs(first, num_coordinates), strict=True)
        return np.concatenate(positions), np.concatenate(widths)

    def runs(self, first: int, num_coordinates: int) -> Iterator[tuple[Positions, NDArray[np.int64]]]:
        """The same, run by run."""
        for start in range(0, num_coordinates, TILE):
            length = min(TILE, num_coordinates - start)
            count = self._of_run(length)
            bounds = np.arange(count + 1) * length // count + start
            widths = np.diff(bounds)
            drawn = _splitmix(self.seed, bounds[:-1] + first) >> np.uint64(32)
            # Both are below 2^32, and no product wraps.
            drawn *= widths.view(np.uint64)
            drawn >>= np.uint64(32)
            yield bounds[:-1] + drawn.view(np.int64), widths


def _splitmix(seed: int, counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """splitmix64: element `counters` of the sequence that begins after `seed`, less one step."""
    z = counters.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


class Survivors:
    """What is drawn of a tensor, scaled up where that is asked for."""

    def __init__(self, spec: TensorSpec, places: Places, *, unbiased: bool) -> None:
        self._num_coordinates = spec.num_elements
        self._largest = min(torch.finfo(torch_dtype(spec.dtype)).max, torch.finfo(torch.float32).max)
        self.places, self._unbiased = places, unbiased

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """How many there are in each run of 2^16 coordinates."""
        starts = range(0, self._num_coordinates, TILE)
        return np.array([self.places.count(min(TILE, self._num_coordinates - start)) for start in starts])

    def values(self, first: int, tile: Tensor) -> Tensor:
        """In order. None is scaled beyond its type or float32."""
        positions, widths = self.places.draw(first, len(tile))
        values = tile[torch.from_numpy(positions)]
        if not self._unbiased:
            return values
        exact = values.double()
        limits = exact.abs().clamp_(min=self._largest)
        return (exact * torch.from_numpy(widths)).clamp_(-limits, limits).to(values.dtype)


def randomk_plan(spec: TensorSpec, survivors: Survivors, values: TensorPlan) -> TensorPlan:
    """Bodies of up to 2^20 coordinates, fewer where their values have many bytes each. `values` plans the survivors' vector."""
    places = survivors.places
    head = varint(places.density) + places.seed.to_bytes(_SEED_BYTES, "little") + write_values_head(values)

    def encode(first: int, tile: Tensor) -> bytes | memoryview:
        return values.encode(first, survivors.values(first, tile))

    return TensorPlan(RandomkCodec.kind, head, body_coordinates(spec, values, survivors.counts), encode)


class RandomkConfig(FeedbackTable):
    """Values at random places, which need not be sent."""

    kind: Literal["randomk"] = Field(
        default="randomk",
        description="Values at random places that both sides draw: unbiased, noisy, for large cohorts.",
    )
    fraction: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Share of an update's values that are sent, the same of every tensor.",
    )
    unbiased: bool = Field(
        default=True,
        description="Scale values by 1/fraction, so that the estimate is right on average; its error is 1/fraction - 1. Off: the "
        "error is 1 - fraction, and updates are as much shorter.",
    )
    values: ValuesConfig = Field(default=UniformValues(rounding="stochastic"), description=VALUES)

    @model_validator(mode="after")
    def _check(self) -> RandomkConfig:
        if self.feedback and self.unbiased:
            problem = (
                "needs unbiased = false: what scaling up adds to an update would come back in the next one, and grow"
            )
            raise PydanticCustomError(
                "cross_field", "fields contradict each other", {"problems": {"feedback": problem}}
            )
        return self

    @property
    def wants_feedback(self) -> bool:
        """Unless told otherwise where the estimate is short, never where it is scaled up."""
        return not self.unbiased and self.feedback is not False

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Parameters by this codec, small vectors by uniform, buffers and other types raw. Seed and name rule the places."""
        density = max(1, round(self.fraction * 2**_DENSITY_BITS))

        def plan_large(large: Tensors) -> list[TensorPlan]:
            survivors = [
                Survivors(spec, Places(density, _seed_of(seed, spec)), unbiased=self.unbiased) for spec, _ in large
            ]
            vectors = [(*each, of_tensor) for each, of_tensor in zip(large, survivors, strict=True)]
            plans = plan_values(self.values, vectors, seed=seed)
            return [
                randomk_plan(spec, of_tensor, plan)
                for (spec, _), of_tensor, plan in zip(large, survivors, plans, strict=True)
                if plan is not None  # none is without survivors
            ]

        return plan_parameters(tensors, plan_large)


def _seed_of(seed: int, spec: TensorSpec) -> int:
    return int.from_bytes(blake3(f"places/{seed}/{spec.name}".encode()).digest(_SEED_BYTES), "little")
