"""Making a model version: tile by tile from the base and the aggregate to the two files of the next version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from fed_core.errors import NotFiniteError
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype
from fed_server.aggregation.base import Aggregator
from fed_server.aggregation.mean import as_reals
from fed_server.optim.base import ServerOptimizer
from fedstream.v1 import common_pb2

TileOf = Callable[[TensorSpec, int, int], Tensor]


@dataclass(frozen=True)
class MadeVersion:
    """What was written. `max_abs`: largest absolute value by floating tensor, for the next round's grid."""

    digest: str
    payload_digest: str
    payload_bytes: int
    file_bytes: int
    max_abs: dict[str, float] = field(default_factory=dict)


def next_tile(base: SafetensorsReader, aggregate: Aggregator, optimizer: ServerOptimizer) -> TileOf:
    """The next version's values: the optimizer's step for parameters, the plain change for buffers (a running mean is no place for
    a server learning rate), the merged value for counters, the base's value where nothing was merged."""

    def tile_of(spec: TensorSpec, first: int, count: int) -> Tensor:
        tile: Tensor = base.read_tile(spec.name, first, count)
        change = aggregate.report(spec, first, count)
        if change is None:
            return tile
        if not (tile.is_floating_point() or tile.is_complex()):
            return change
        weights = as_reals(tile).to(torch.float64)
        moved = optimizer.step(weights, change) if spec.role == "parameter" else weights + change
        if tile.is_complex():
            return torch.view_as_complex(moved.reshape(-1, 2)).to(tile.dtype)
        return moved.to(tile.dtype)

    return tile_of


def write_version(
    specs: Sequence[TensorSpec],
    tile_of: TileOf,
    model_path: Path,
    payload_path: Path,
    *,
    run_id: str,
    version: int,
    codec: str,
) -> MadeVersion:
    """Writes a version once as safetensors, to keep, and once as a payload, to send; the caller publishes both.

    Memory: a few tiles. Raises NotFiniteError naming the tensor where a value is NaN or infinite (a float16 tensor overflowed).
    """
    hasher = blake3()
    max_abs: dict[str, float] = {}
    with model_path.open("wb+") as model_file, payload_path.open("wb+") as payload_file:
        writer = SafetensorsWriter(model_file, specs, {"run_id": run_id, "version": str(version)})

        def source_of(spec: TensorSpec) -> Callable[[int, int], Tensor]:
            def source(first: int, count: int) -> Tensor:
                tile = tile_of(spec, first, count)
                if tile.is_floating_point() or tile.is_complex():
                    low, high = (float(x) for x in torch.aminmax(as_reals(tile)))
                    largest = max(-low, high)
                    if not largest < float("inf"):
                        raise NotFiniteError(f"tensor {spec.name!r} of version {version} holds NaN or infinity")
                    max_abs[spec.name] = max(largest, max_abs.get(spec.name, 0.0))
                hasher.update(tile.contiguous().view(torch.uint8).numpy().data)
                writer.write_tile(spec.name, first, tile)
                return tile

            return source

        written = write_payload(
            payload_file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id=run_id,
            round=0,
            model_version=version,
            base_digest=b"",
            update=None,
            tensors=[(spec, source_of(spec)) for spec in specs],
            codec=codec,
        )
        writer.finish()
    return MadeVersion(
        digest=hasher.hexdigest(),
        payload_digest=written.digest.hex(),
        payload_bytes=written.total_bytes,
        file_bytes=model_path.stat().st_size,
        max_abs=max_abs,
    )


def payload_tile(payload: PayloadReader) -> TileOf:
    """Values out of a payload, for version 0. Tiles must be asked for in order; memory: one body and one tile."""
    tiles: Iterator[tuple[int, Tensor]] = iter(())
    rest = torch.empty(0)

    def tile_of(spec: TensorSpec, first: int, count: int) -> Tensor:
        nonlocal tiles, rest
        if first == 0:
            tiles, rest = payload.iter_tiles(spec.name), torch.empty(0, dtype=torch_dtype(spec.dtype))
        while len(rest) < count:
            _, body = next(tiles)
            rest = torch.cat([rest, body])  # a copy: the reader's buffer is used again
        tile, rest = rest[:count], rest[count:]
        return tile

    return tile_of


def largest_values(model_path: Path) -> dict[str, float]:
    """Largest absolute value of every floating tensor of a model file; reads it once."""
    result: dict[str, float] = {}
    with SafetensorsReader(model_path) as reader:
        for spec in reader.specs:
            dtype = torch_dtype(spec.dtype)
            if not (dtype.is_floating_point or dtype.is_complex):
                continue
            largest = 0.0
            for first in range(0, spec.num_elements, 2**18):
                tile = reader.read_tile(spec.name, first, min(2**18, spec.num_elements - first))
                low, high = (float(x) for x in torch.aminmax(as_reals(tile)))
                largest = max(largest, -low, high)
            result[spec.name] = largest
    return result
