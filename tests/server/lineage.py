"""Versions of one model as a run makes them, without the run: files, records, and the payloads that lead to each."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fed_core.codecs.base import Encoding
from fed_core.codecs.raw import RawConfig
from fed_core.payload.assemble import assemble_model
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_core.tensors import dtype_name
from fed_server.config import DeltaDownlinkConfig, DownlinkConfig, LatticeDownlinkConfig, RawDownlinkConfig
from fed_server.rounds.broadcast import WHOLE, Broadcasts
from fed_server.rounds.downlink import first_error, first_lattice_for, lattice_for
from fed_server.rounds.membership import Membership
from fed_server.rounds.surroundings import Facilities
from fed_server.rounds.version import (
    ChangeMeter,
    MadeVersion,
    VersionPaths,
    file_sources,
    write_encoded,
    write_whole,
)
from fed_server.rounds.workers import Workers
from fed_server.store.base import BroadcastRecord, ModelRecord, RunRecord, RunState, Transaction
from fed_server.store.blobs import DataDirectory
from fed_server.store.sql import SqlStore
from fedstream.v1 import common_pb2
from tests.server.houses import MovableClock

RUN = "r1"
Tensors = Mapping[str, Tensor]


def specs_of(tensors: Tensors) -> tuple[TensorSpec, ...]:
    """Parameters, but for what begins with "b."."""
    return tuple(
        TensorSpec(name, tuple(t.shape), dtype_name(t.dtype), "buffer" if name.startswith("b.") else "parameter")
        for name, t in tensors.items()
    )


class Lineage:
    """`first` and `step` make versions of master weights that the test gives. Close it."""

    def __init__(self, root: Path, downlink: DownlinkConfig, *, has_trained_weights: bool = False) -> None:
        self.downlink = downlink
        self.files = DataDirectory(root)
        self.store = SqlStore(f"sqlite:///{self.files.database_path}")
        self.models: dict[int, ModelRecord] = {}
        self.made: dict[int, MadeVersion] = {}
        self.specs: tuple[TensorSpec, ...] = ()
        self._has_trained_weights = has_trained_weights
        clock = MovableClock()
        self.facilities = Facilities(
            workers=Workers(self.store, num_disk_threads=2, num_compute_threads=2),
            files=self.files,
            clock=clock,
            membership=Membership(5, clock.monotonic()),
            evaluators={},
            new_id=lambda: uuid.uuid4().hex,
        )
        with self.store.transaction() as tx:
            known = tx.models(RUN)
            if tx.run(RUN) is None:
                tx.put(RunRecord(RUN, "test", "q", RunState.ACTIVE, "", "", 0.0, "", 0, 0))
        self.models |= {model.version: model for model in known}
        self.broadcasts = Broadcasts(
            self.facilities,
            SimpleNamespace(files_lock=asyncio.Lock()),  # type: ignore[arg-type]
            RUN,
            self.models,
            is_lattice=isinstance(downlink, LatticeDownlinkConfig),
        )
        for record in self.records():
            self.broadcasts.remember(record)

    def close(self) -> None:
        """Lets another one open the directory."""
        self.facilities.workers.close()
        self.files.close()

    @property
    def newest(self) -> int:
        return max(self.models)

    def records(self) -> list[BroadcastRecord]:
        """The payloads that the store knows."""
        with self.store.transaction() as tx:
            return tx.broadcasts(RUN)

    def first(self, weights: Tensors) -> MadeVersion:
        """Version 0 of these weights."""
        self.specs = specs_of(weights)
        trained, downlink = self._has_trained_weights, self.downlink

        def encoding(change: ChangeMeter) -> Encoding:
            if isinstance(downlink, LatticeDownlinkConfig):
                return first_lattice_for(first_error(downlink, trained), change)
            return RawConfig()

        return self._make(0, weights, encoding)

    def step(self, weights: Tensors) -> MadeVersion:
        """The next version of these weights."""
        downlink = self.downlink

        def encoding(change: ChangeMeter) -> Encoding:
            if isinstance(downlink, DeltaDownlinkConfig):
                return downlink.encoding
            assert isinstance(downlink, LatticeDownlinkConfig)
            return lattice_for(downlink, change, seed=0)

        return self._make(self.newest + 1, weights, encoding)

    def _make(self, version: int, weights: Tensors, encoding: Any) -> MadeVersion:
        files = self.files
        final = VersionPaths(files.master_path(RUN, version), files.model_path(RUN, version), files.payload_path("new"))
        parts = VersionPaths(*(files.temporary(path) for path in vars(final).values()))

        def tile_of(spec: TensorSpec, first: int, count: int) -> Tensor:
            return weights[spec.name].reshape(-1)[first : first + count]

        with ExitStack() as stack:
            if isinstance(self.downlink, RawDownlinkConfig):
                made = write_whole(self.specs, tile_of, parts.model, parts.payload, run_id=RUN, version=version)
            else:
                before: dict[str, Any] = {}
                if version > 0:
                    before = {
                        "master": stack.enter_context(SafetensorsReader(files.master_path(RUN, version - 1))),
                        "base": stack.enter_context(SafetensorsReader(files.model_path(RUN, version - 1))),
                        "base_digest": bytes.fromhex(self.models[version - 1].payload_digest),
                    }
                made = write_encoded(
                    self.specs, tile_of, encoding, parts, run_id=RUN, version=version, seed=version, **before
                )
                files.publish(parts.master, final.master)
        digest = made.payload.digest.hex()
        files.publish(parts.model, final.model)
        files.publish(parts.payload, files.payload_path(digest))
        model = ModelRecord(
            run_id=RUN,
            version=version,
            round=version,
            parent_version=version - 1,
            digest=made.digest,
            payload_digest=made.identity,
            payload_bytes=made.identity_bytes,
            file_bytes=made.file_bytes,
            created_time=0.0,
        )
        is_whole = version == 0 or isinstance(self.downlink, RawDownlinkConfig)
        record = BroadcastRecord(
            RUN, version, WHOLE if is_whole else version - 1, digest, made.payload.total_bytes, created_time=0.0
        )

        def write(tx: Transaction) -> None:
            tx.put(model)
            tx.put(record)

        with self.store.transaction() as tx:
            write(tx)
        self.models[version] = model
        self.made[version] = made
        self.broadcasts.remember(record)
        return made

    def retire(self, in_use: Collection[int] = ()) -> None:
        """What a run does after a commit, and the collection of garbage."""
        retired = self.broadcasts.retire(self.newest, in_use)
        with self.store.transaction() as tx:
            for record in retired:
                tx.put(record)
        for record in retired:
            self.broadcasts.remember(record)
        kept = {record.digest for record in self.records() if record.is_available}
        every = {(RUN, version) for version in self.models}
        self.files.sweep((), (), kept, every, every)

    def forget_record(self, version: int, base: int) -> None:
        """As if that payload were no longer kept."""
        [record] = [r for r in self.records() if (r.version, r.base_version) == (version, base)]
        self.broadcasts.remember(replace(record, is_available=False))

    # What clients see

    def held(self, *versions: int) -> list[str]:
        """Identities of versions, as a poll says them."""
        return [self.models[version].payload_digest for version in versions]

    def values(self, version: int) -> dict[str, Tensor]:
        """v: what every client has."""
        return _values(self.files.model_path(RUN, version))

    def masters(self, version: int) -> dict[str, Tensor]:
        """w: what it would be had nothing been left out."""
        return _values(self.files.master_path(RUN, version))

    @contextmanager
    def opened(self, way: Sequence[BroadcastRecord]) -> Iterator[list[PayloadReader]]:
        """The payloads of a way."""
        with ExitStack() as stack:
            yield [stack.enter_context(PayloadReader(self.files.payload_path(step.digest))) for step in way]

    def assemble(self, way: Sequence[BroadcastRecord], base: int | None = None) -> str:
        """Makes the model that a way leads to, from a version that the client holds; its identity. What does not come out to the
        bit raises."""
        raw = self.files.root / "lost+found"
        with ExitStack() as stack:
            first = None
            if base is not None:
                with raw.open("wb+") as file, SafetensorsReader(self.files.model_path(RUN, base)) as model:
                    write_payload(
                        file,
                        kind=common_pb2.PAYLOAD_KIND_MODEL,
                        run_id=RUN,
                        round=0,
                        model_version=base,
                        base_digest=b"",
                        update=None,
                        tensors=file_sources(model),
                    )
                first = stack.enter_context(PayloadReader(raw))
            return assemble_model(first, stack.enter_context(self.opened(way)), BytesIO()).digest.hex()


def _values(path: Path) -> dict[str, Tensor]:
    with SafetensorsReader(path) as reader:
        return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


def walk(weights: Tensors, seed: int, scale: float = 0.01, share: float = 1.0) -> dict[str, Tensor]:
    """Weights a little further on: floating tensors move by a random `scale`, a `share` of their elements; counters count."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor + 1
        change = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
        chosen = torch.rand(tensor.shape, generator=generator) < share
        return (tensor.double() + change * chosen).to(tensor.dtype)

    return {name: moved(tensor) for name, tensor in weights.items()}
