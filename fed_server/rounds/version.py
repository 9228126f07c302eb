"""Making a model version: tile by tile from the base and the aggregate to the two files of the next version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from fed_core.codecs.base import Encoding, TileSource
from fed_core.codecs.lattice import MAX_STEPS, LatticeEncoding, lattice_exponent
from fed_core.errors import NotFiniteError
from fed_core.payload.manifest import RAW
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, identify_model, write_payload
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter, tensors_digest
from fed_core.specs import PARAMETER, TensorSpec
from fed_core.tensors import apply_difference, difference, torch_dtype
from fed_server.aggregation.base import Aggregator
from fed_server.aggregation.exact import TILE
from fed_server.aggregation.mean import as_reals
from fed_server.optim.average import blend
from fed_server.optim.state import Steps
from fedstream.v1 import common_pb2

TileOf = Callable[[TensorSpec, int, int], Tensor]


@dataclass(frozen=True)
class MadeVersion:
    """What was written. `identity` is the digest of the version's payload in the raw codec, of `identity_bytes`; `max_abs` the
    largest absolute value by floating tensor, for the next round's grid. `payload` is what was encoded to be sent: the version
    whole, or the delta from its parent. `error` is what the delta left out, |w' - v'|^2, over what the round changed, |w' - w|^2
    (over 1 where much is carried along), and `gain` how much of w' - v it carried; None where the version is sent whole."""

    digest: str
    identity: str
    identity_bytes: int
    file_bytes: int
    payload: Written
    max_abs: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    gain: float | None = None


def next_tile(base: SafetensorsReader, aggregate: Aggregator, steps: Steps) -> TileOf:
    """The next version's values, to be asked for once: the optimizer's step for parameters, the plain change for buffers (a running
    mean is no place for a server learning rate), the merged value for counters, the base's value where nothing was merged."""

    def tile_of(spec: TensorSpec, first: int, count: int) -> Tensor:
        tile: Tensor = base.read_tile(spec.name, first, count)
        change = aggregate.report(spec, first, count)
        if change is None:
            steps.stay(spec, first, count)
            return tile
        if not (tile.is_floating_point() or tile.is_complex()):
            return change
        weights = as_reals(tile).to(torch.float64)
        moved = steps.step(spec, first, weights, change) if spec.role == PARAMETER else weights + change
        if tile.is_complex():
            return torch.view_as_complex(moved.reshape(-1, 2)).to(tile.dtype)
        return moved.to(tile.dtype)

    return tile_of


def write_whole(
    specs: Sequence[TensorSpec],
    tile_of: TileOf,
    model_path: Path,
    payload_path: Path,
    *,
    run_id: str,
    version: int,
    notes: Mapping[str, str] | None = None,
) -> MadeVersion:
    """Writes a version once as safetensors, to keep, and once as a payload in the raw codec, to send whole; the caller publishes
    both. `notes` go into the metadata of the former.

    Memory: a few tiles. Raises NotFiniteError naming the tensor where a value is NaN or infinite (a float16 tensor overflowed).
    """
    meter = _ValueMeter(version)
    hasher = blake3()
    with model_path.open("wb+") as model_file, payload_path.open("wb+") as payload_file:
        writer = SafetensorsWriter(model_file, specs, _metadata(run_id, version, notes))

        def seen(spec: TensorSpec, codec: str, first: int, tile: Tensor) -> None:
            hasher.update(tile.view(torch.uint8).numpy().data)
            writer.write_tile(spec.name, first, tile)

        written = write_payload(
            payload_file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id=run_id,
            round=0,
            model_version=version,
            base_digest=b"",
            update=None,
            tensors=[(spec, meter.watch(spec, tile_of)) for spec in specs],
            on_decoded=seen,
        )
        writer.finish()
    return MadeVersion(
        digest=hasher.hexdigest(),
        identity=written.digest.hex(),
        identity_bytes=written.total_bytes,
        file_bytes=model_path.stat().st_size,
        payload=written,
        max_abs=meter.max_abs,
    )


def write_encoded(
    specs: Sequence[TensorSpec],
    tile_of: TileOf,
    encoding_for: Callable[[ChangeMeter], Encoding],
    paths: VersionPaths,
    *,
    run_id: str,
    version: int,
    seed: int,
    master: SafetensorsReader | None = None,
    base: SafetensorsReader | None = None,
    base_digest: bytes = b"",
    notes: Mapping[str, str] | None = None,
) -> MadeVersion:
    """Writes the next master weights w', a payload that leads to the next version v', and v' itself.

    `tile_of` gives w'. The payload encodes w' - v, a delta from the committed version v (`base`, identified by `base_digest`),
    or, where there is none, w' as a whole model; v' is what a receiver makes of it, to the bit. What the encoding leaves out,
    w' - v', is nowhere stored: it is in the next w' - v again. `encoding_for` chooses the encoding by what has changed since
    the last master weights w. `notes` go into the metadata of the version's file. Memory: a few tiles and what the encoding
    needs. Raises NotFiniteError as `write_whole` does."""
    meter, change = _ValueMeter(version), ChangeMeter(committed=base)
    with paths.master.open("wb+") as file:
        writer = SafetensorsWriter(file, specs, _metadata(run_id, version))
        for spec in specs:
            watched = meter.watch(spec, tile_of)
            for first, count in _tiles(spec):
                tile = watched(first, count)
                change.add(spec, tile, master.read_tile(spec.name, first, count) if master is not None else None)
                writer.write_tile(spec.name, first, tile)
        writer.finish()

    seen = _ValueMeter(version)
    with SafetensorsReader(paths.master) as moved, paths.model.open("wb+") as file, paths.payload.open("wb+") as out:
        model_writer = SafetensorsWriter(file, specs, _metadata(run_id, version, notes))
        values = {spec.name: source for spec, source in file_sources(moved)}

        def change_of(spec: TensorSpec) -> TileSource:
            def tile(first: int, count: int) -> Tensor:
                value = values[spec.name](first, count)
                return value if base is None else difference(value, base.read_tile(spec.name, first, count))

            return tile

        def apply(spec: TensorSpec, codec: str, first: int, decoded: Tensor) -> None:
            if base is not None and codec != RAW:
                decoded = apply_difference(base.read_tile(spec.name, first, len(decoded)), decoded)
            seen.add(spec, decoded)
            model_writer.write_tile(spec.name, first, decoded)

        identity: list[Written] = []

        def identify() -> bytes:
            model_writer.finish()
            with SafetensorsReader(paths.model) as made:
                identity.append(identify_model(run_id, version, file_sources(made)))
            return identity[0].digest

        encoding = encoding_for(change)
        new_values = values
        if isinstance(encoding, LatticeEncoding):
            new_values = {spec.name: encoding.rounded(spec, values[spec.name]) for spec in specs}
        written = write_payload(
            out,
            kind=common_pb2.PAYLOAD_KIND_DELTA if base is not None else common_pb2.PAYLOAD_KIND_MODEL,
            run_id=run_id,
            round=0,
            model_version=version,
            base_digest=base_digest,
            update=None,
            tensors=[(spec, change_of(spec)) for spec in specs],
            encoding=encoding,
            seed=seed,
            new_values=new_values,
            result_digest=identify,
            on_decoded=apply,
        )
    energy = sum(change.energy.values())
    return MadeVersion(
        digest=tensors_digest(paths.model).hex(),
        identity=identity[0].digest.hex(),
        identity_bytes=identity[0].total_bytes,
        file_bytes=paths.model.stat().st_size,
        payload=written,
        max_abs=seen.max_abs,
        error=written.fidelity.squared_error / energy if energy > 0 else 0.0,
        gain=written.fidelity.gain,
    )


def write_average(version: SafetensorsReader, before: SafetensorsReader, path: Path, *, decay: float) -> None:
    """Writes the average of the versions up to this one: a model file, each tensor in its own type; integers and booleans are the
    version's. `before` is the average so far. Memory: a few tiles."""
    with path.open("wb+") as file:
        writer = SafetensorsWriter(file, version.specs, {**version.metadata, "average_decay": f"{decay:g}"})
        for spec in version.specs:
            for first, count in _tiles(spec):
                tile = version.read_tile(spec.name, first, count)
                if tile.is_floating_point() or tile.is_complex():
                    values = as_reals(tile)
                    average = as_reals(before.read_tile(spec.name, first, count))
                    blended = blend(average.to(torch.float64), values.to(torch.float64), decay).to(values.dtype)
                    tile = torch.view_as_complex(blended.reshape(-1, 2)) if tile.is_complex() else blended
                writer.write_tile(spec.name, first, tile)
        writer.finish()


@dataclass(frozen=True)
class VersionPaths:
    """Where `write_encoded` writes: the master weights, the version, and the payload that leads to it."""

    master: Path
    model: Path
    payload: Path


@dataclass
class ChangeMeter:
    """What a round did to the master weights, by parameter: |w' - w|^2, |w'|^2, the largest |w'|, and the number of elements.
    `committed` is the version v that the round began with, if there is one."""

    committed: SafetensorsReader | None = None
    energy: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    max_abs: dict[str, float] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    def add(self, spec: TensorSpec, moved: Tensor, before: Tensor | None) -> None:
        """Takes note of a tile; where nothing was before, all of it is change."""
        if spec.role != PARAMETER or not moved.is_floating_point() or not len(moved):
            return
        after = moved.to(torch.float64)
        step = after - before.to(torch.float64) if before is not None else after
        self.specs[spec.name] = spec
        self.energy[spec.name] = self.energy.get(spec.name, 0.0) + float(step.dot(step))
        self.weights[spec.name] = self.weights.get(spec.name, 0.0) + float(after.dot(after))
        self.max_abs[spec.name] = max(self.max_abs.get(spec.name, 0.0), float(after.abs().max()))

    def keeps_exact(self, name: str, exponent: int) -> bool:
        """Whether v and whole steps of 2^exponent add up to w', or what is near it, without rounding. Reads v once."""
        if self.committed is None:
            return True
        base, spec = self.committed, self.specs[name]
        held = lattice_exponent(spec, lambda first, count: base.read_tile(name, first, count))
        return held is not None and self.max_abs[name] <= MAX_STEPS * 2.0 ** min(held, exponent)


class _ValueMeter:
    """Refuses values that are not finite and remembers the largest, by floating tensor."""

    def __init__(self, version: int) -> None:
        self._version = version
        self.max_abs: dict[str, float] = {}

    def watch(self, spec: TensorSpec, tile_of: TileOf) -> TileSource:
        def source(first: int, count: int) -> Tensor:
            tile = tile_of(spec, first, count)
            self.add(spec, tile)
            return tile

        return source

    def add(self, spec: TensorSpec, tile: Tensor) -> None:
        if not (tile.is_floating_point() or tile.is_complex()) or not len(tile):
            return
        low, high = (float(x) for x in torch.aminmax(as_reals(tile)))
        largest = max(-low, high)
        if not largest < float("inf"):
            raise NotFiniteError(f"tensor {spec.name!r} of version {self._version} holds NaN or infinity")
        self.max_abs[spec.name] = max(largest, self.max_abs.get(spec.name, 0.0))


def _metadata(run_id: str, version: int, notes: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**(notes or {}), "run_id": run_id, "version": str(version)}


def _tiles(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    for first in range(0, spec.num_elements, TILE):
        yield first, min(TILE, spec.num_elements - first)


def file_sources(model: SafetensorsReader) -> list[tuple[TensorSpec, TileSource]]:
    """The tensors of a model file, to be read tile by tile."""

    def source(spec: TensorSpec) -> TileSource:
        return lambda first, count: model.read_tile(spec.name, first, count)

    return [(spec, source(spec)) for spec in model.specs]


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
