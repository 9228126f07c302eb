"""How a client comes by a version: whole, by the chain of deltas from one that it holds, or by one difference that spans them.

A round's delta is made once, with its version, whatever the number of clients. Whole versions and spans are made when a client
first needs them, and serve every other one with the same need. A span is the sum of the deltas in its chain, which is exact on a
lattice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fed_core.codecs.base import TileSource
from fed_core.codecs.lattice import LATTICE_DTYPES, LosslessEncoding
from fed_core.errors import CorruptError
from fed_core.payload.manifest import RAW
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, write_payload
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_core.tensors import torch_dtype
from fed_server.rounds.surroundings import Facilities, Surroundings
from fed_server.rounds.variate import encode_variate
from fed_server.rounds.version import file_sources
from fed_server.store.base import BroadcastRecord, ModelRecord, Transaction
from fedstream.v1 import common_pb2

logger = logging.getLogger(__name__)

WHOLE = -1
"""The base version of a payload that needs none."""

VARIATE = -2
"""What stands for it in the common variate that goes with a version, which leads nowhere (see variate.py)."""

# A site resumes what it has begun to fetch: more steps than this are not given it at once.
_MAX_CHAIN = 256


class Broadcasts:
    """The payloads of one run, and the ways that they make. `models` is the run's own table of versions."""

    def __init__(
        self,
        facilities: Facilities,
        surroundings: Surroundings,
        run_id: str,
        models: Mapping[int, ModelRecord],
        *,
        is_lattice: bool,
    ) -> None:
        self._facilities = facilities
        self._surroundings = surroundings
        self._run_id = run_id
        self._models = models
        self._is_lattice = is_lattice
        self._records: dict[tuple[int, int], BroadcastRecord] = {}
        self._making = asyncio.Lock()

    def remember(self, record: BroadcastRecord) -> None:
        """Takes note of a payload that the store has."""
        self._records[record.version, record.base_version] = record

    def find(self, digest: str) -> BroadcastRecord | None:
        """The payload with that digest, where it is still kept."""
        return next((r for r in self._records.values() if r.digest == digest and r.is_available), None)

    async def way_to(self, version: int, held: Collection[str], *, has_diverged: bool = False) -> list[BroadcastRecord]:
        """The cheapest payloads that lead to a version from those models that a client holds (identities, hex), in order; none
        where it holds the version. Where its additions have come out otherwise than ours, the whole version."""
        if self._models[version].payload_digest in held:
            return []
        if has_diverged:
            return [await self._make_once(version, WHOLE)]
        bases = [v for v, model in self._models.items() if v < version and model.payload_digest in held]
        base = max(bases, default=None)
        ways = []
        if base is not None and (chain := self._chain(base, version)):
            ways.append(chain)
            if len(chain) > 1 and (span := await self._span(version, base)):
                ways.append([span])
        if not ways:
            ways.append([await self._make_once(version, WHOLE)])
            # The first version is on a coarse lattice, and what was added to it since is sparse.
            first = self._available(0, WHOLE)
            if first is not None and self._chain(0, version) and (span := await self._span(version, 0)):
                ways.append([first, span])
        return min(ways, key=lambda way: sum(step.num_bytes for step in way))

    async def variate(self, version: int) -> BroadcastRecord | None:
        """The common variate that goes with a version; None with version 0, where it is zero."""
        return await self._make_once(version, VARIATE) if version > 0 else None

    async def lose(self, record: BroadcastRecord) -> None:
        """Takes note that a payload's file is gone, so that another way is found, or the payload made again."""
        logger.error("broadcast payload lost", extra={"run_id": self._run_id, "digest": record.digest})
        lost = replace(record, is_available=False)

        def write(tx: Transaction) -> None:
            tx.put(lost)

        await self._facilities.workers.store(write)
        self.remember(lost)

    def retire(self, version: int, in_use: Collection[int]) -> list[BroadcastRecord]:
        """Records, changed, of payloads that nobody will need again now that `version` is the newest. Chains are kept as long as
        they are shorter than the version whole; what leads to a version in use (`in_use`) always is."""
        kept: set[tuple[int, int]] = {key for key in self._records if key[0] >= version or key[0] in in_use}
        limit = self._models[version].payload_bytes
        newest = version
        while (delta := self._available(newest, newest - 1)) is not None and limit > delta.num_bytes:
            kept.add((newest, newest - 1))
            limit -= delta.num_bytes
            newest -= 1
        if newest == 0 and self._is_lattice:
            kept.add((0, WHOLE))
        return [
            replace(record, is_available=False)
            for key, record in self._records.items()
            if record.is_available and key not in kept
        ]

    async def _span(self, version: int, base: int) -> BroadcastRecord | None:
        """None where spans are not exact, or a delta of the chain cannot be read any more."""
        if not self._is_lattice:
            return None
        try:
            return await self._make_once(version, base)
        except (CorruptError, FileNotFoundError) as error:
            logger.error("no span can be made", extra={"run_id": self._run_id, "base": base, "reason": str(error)})
            return None

    def _available(self, version: int, base: int) -> BroadcastRecord | None:
        record = self._records.get((version, base))
        return record if record is not None and record.is_available else None

    def _chain(self, base: int, version: int) -> list[BroadcastRecord]:
        """The deltas from one version to another, none where one of them is missing."""
        if not 1 <= version - base <= _MAX_CHAIN:
            return []
        steps = [self._available(v, v - 1) for v in range(base + 1, version + 1)]
        return [step for step in steps if step is not None] if None not in steps else []

    async def _make_once(self, version: int, base: int) -> BroadcastRecord:
        async with self._making:
            if record := self._available(version, base):
                return record
            files, workers = self._facilities.files, self._facilities.workers
            part = files.temporary(files.payload_path(f"{version}-{base + 1}"))
            try:
                with files.disk_errors(f"making a payload of version {version}"):
                    make = {WHOLE: self._write_whole, VARIATE: self._write_variate}.get(base, self._write_span)
                    written = await workers.compute(make, part, version, base)
                record = BroadcastRecord(
                    run_id=self._run_id,
                    version=version,
                    base_version=base,
                    digest=written.digest.hex(),
                    num_bytes=written.total_bytes,
                    created_time=self._facilities.clock.now(),
                )
                async with self._surroundings.files_lock:
                    await workers.disk(files.publish, part, files.payload_path(record.digest))

                    def write(tx: Transaction) -> None:
                        tx.put(record)

                    await workers.store(write)
                self.remember(record)
            finally:
                part.unlink(missing_ok=True)
        logger.debug(
            "broadcast made",
            extra={"run_id": self._run_id, "version": version, "base": base, "bytes": record.num_bytes},
        )
        return record

    def _write_whole(self, path: Path, version: int, base: int) -> Written:
        model = self._models[version]
        with (
            SafetensorsReader(self._facilities.files.model_path(self._run_id, version)) as reader,
            path.open("wb+") as file,
        ):
            return write_payload(
                file,
                kind=common_pb2.PAYLOAD_KIND_MODEL,
                run_id=self._run_id,
                round=0,
                model_version=version,
                base_digest=b"",
                update=None,
                tensors=file_sources(reader),
                encoding=LosslessEncoding() if self._is_lattice else None,
                result_digest=lambda: bytes.fromhex(model.payload_digest),
            )

    def _write_variate(self, path: Path, version: int, base: int) -> Written:
        variate = self._facilities.files.variate_path(self._run_id, version)
        return encode_variate(path, variate, run_id=self._run_id, version=version)

    def _write_span(self, path: Path, version: int, base: int) -> Written:
        with ExitStack() as stack:
            chain = [
                stack.enter_context(PayloadReader(self._facilities.files.payload_path(step.digest)))
                for step in self._chain(base, version)
            ]
            newest = stack.enter_context(SafetensorsReader(self._facilities.files.model_path(self._run_id, version)))
            file = stack.enter_context(path.open("wb+"))
            return write_payload(
                file,
                kind=common_pb2.PAYLOAD_KIND_DELTA,
                run_id=self._run_id,
                round=0,
                model_version=version,
                base_digest=bytes.fromhex(self._models[base].payload_digest),
                update=None,
                tensors=[(spec, _sum_of(spec, chain)) for spec in newest.specs],
                encoding=LosslessEncoding(
                    raw={name for step in chain for name in _raw_names(step)}
                    | {spec.name for spec in newest.specs if not _is_exact(spec, chain)}
                ),
                new_values={spec.name: source for spec, source in file_sources(newest)},
                result_digest=lambda: bytes.fromhex(self._models[version].payload_digest),
            )


def _raw_names(step: PayloadReader) -> set[str]:
    return {entry.spec.name for entry in step.manifest.tensors if entry.codec == RAW}


def _is_exact(spec: TensorSpec, chain: list[PayloadReader]) -> bool:
    """Whether the sum of a tensor's deltas is exact in its own type, as it is unless weights shrink far below what they were."""
    if spec.dtype not in LATTICE_DTYPES:
        return True
    total = sum((step.tensor(spec.name).double() for step in chain[1:]), chain[0].tensor(spec.name).double())
    return total.to(torch_dtype(spec.dtype)).double().equal(total)


def _sum_of(spec: TensorSpec, chain: list[PayloadReader]) -> TileSource:
    """The sum of a tensor's deltas, held from when it is first read until the next tensor is."""
    total: list[Tensor] = []

    def tile(first: int, count: int) -> Tensor:
        if not total:
            total.append(chain[0].tensor(spec.name).reshape(-1))
            for step in chain[1:]:
                total[0] = total[0] + step.tensor(spec.name).reshape(-1)
        return total[0][first : first + count]

    return tile
