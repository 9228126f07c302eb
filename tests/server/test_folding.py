"""What the disk loses after the receipt is set aside by name, and leaves nothing in the sums."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fed_core.errors import CorruptError, DiskFullError
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec
from fed_server.aggregation.base import Aggregator
from fed_server.aggregation.mean import WeightedMean
from fed_server.rounds.folding import Folding
from fed_server.rounds.workers import Workers
from fed_server.store.base import AssignmentKind, AssignmentRecord, AssignmentState
from fed_server.store.blobs import DataDirectory
from fed_server.store.sql import SqlStore
from fedstream.v1 import common_pb2

SPECS = [TensorSpec("w", (10,), "float32"), TensorSpec("v", (7,), "float32")]


class LosesItsDisk(WeightedMean):
    """A mean that cannot read the rest of the update of weight 7 after its first tensor."""

    def add(self, update: PayloadReader, weight: int) -> None:
        super().add(update, weight)
        if weight == 7:
            raise CorruptError("the disk gave back other bytes", offset=100)


def new_aggregate() -> LosesItsDisk:
    return LosesItsDisk(SPECS, {"w": -40, "v": -40}, {"w": "mean", "v": "mean"})


@dataclass
class Desk:
    files: DataDirectory
    folding: Folding

    def put(self, name: str, value: float, weight: int) -> AssignmentRecord:
        record = AssignmentRecord(
            assignment_id=name, run_id="run", round=1, client_id=name, kind=AssignmentKind.TRAIN,
            state=AssignmentState.RECEIVED, model_version=0, created_time=0.0, weight=weight,
        )  # fmt: skip
        with self.files.update_path(name).open("wb+") as file:
            written = write_payload(
                file, kind=common_pb2.PAYLOAD_KIND_MODEL, run_id="", round=0, model_version=0, base_digest=b"", update=None,
                tensors=[(spec, torch.full(spec.shape, value)) for spec in SPECS],
            )  # fmt: skip
        record = AssignmentRecord(**{**vars(record), "digest": written.digest.hex()})
        self.folding.put(record)
        return record


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    with DataDirectory(tmp_path / "data") as files:
        workers = Workers(SqlStore(f"sqlite:///{files.database_path}"), num_disk_threads=1, num_compute_threads=1)
        folding = Folding(workers, files, lambda client_id: client_id)
        folding.begin(new_aggregate)
        task = asyncio.create_task(folding.run())
        yield Desk(files, folding)
        task.cancel()
        workers.close()


def means(aggregate: object) -> Sequence[float]:
    assert isinstance(aggregate, WeightedMean)
    tiles = [aggregate.report(spec, 0, spec.num_elements) for spec in SPECS]
    return sorted({value for tile in tiles if tile is not None for value in tile.tolist()})


async def test_an_update_that_fails_in_the_middle_leaves_no_trace_in_the_sums(desk: Desk) -> None:
    desk.put("a", 0.125, 1)
    desk.put("b", 0.5, 7)
    desk.put("c", 0.375, 1)
    aggregate = await desk.folding.finished()
    assert [(update.client_id, reason) for update, reason in desk.folding.lost] == [
        ("b", "the coordinator's copy of this update cannot be read: the disk gave back other bytes")
    ]
    assert aggregate is not None
    assert aggregate.num_updates == 2
    assert means(aggregate) == [0.25]


async def test_an_update_whose_file_is_gone_is_set_aside(desk: Desk) -> None:
    desk.files.update_path(desk.put("a", 0.125, 1).assignment_id).unlink()
    desk.put("b", 0.5, 1)
    aggregate = await desk.folding.finished()
    assert [update.client_id for update, _ in desk.folding.lost] == ["a"]
    assert means(aggregate) == [0.5]


async def test_damage_is_seen_before_it_is_folded_after_a_start(desk: Desk) -> None:
    record = desk.put("a", 0.125, 1)
    await desk.folding.finished()
    assert await desk.folding.damage(record) == ""
    path = desk.files.update_path("a")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "is damaged" in await desk.folding.damage(record)


async def test_nothing_put_is_nothing_to_report(desk: Desk) -> None:
    assert await desk.folding.finished() is None


async def test_an_update_that_waits_when_its_round_ends_is_no_part_of_the_next(desk: Desk) -> None:
    desk.put("old", 0.125, 1)
    desk.folding.end()
    desk.folding.begin(new_aggregate)
    desk.put("new", 0.5, 1)
    aggregate = await desk.folding.finished()
    assert aggregate is not None
    assert aggregate.num_updates == 1
    assert means(aggregate) == [0.5]


async def test_what_is_done_early_is_done_before_the_first_update_and_for_an_open_round_alone(desk: Desk) -> None:
    seen: list[int] = []

    def note(aggregate: Aggregator) -> None:
        seen.append(aggregate.num_updates)

    desk.folding.begin(new_aggregate, early=note)
    desk.folding.end()
    desk.folding.begin(new_aggregate, early=note)
    desk.put("a", 0.125, 1)
    desk.put("b", 0.5, 7)  # lost: the sums begin anew
    await desk.folding.finished()
    assert seen == [0]


class FillsItsDisk(WeightedMean):
    """A mean that found the disk full when the update of weight 7 came for the first few times."""

    num_refused = 0

    def add(self, update: PayloadReader, weight: int) -> None:
        if weight == 7 and FillsItsDisk.num_refused < 2:
            FillsItsDisk.num_refused += 1
            raise OSError(errno.ENOSPC, "no space left")
        super().add(update, weight)


async def test_an_update_that_there_is_no_disk_for_is_neither_lost_nor_counted_twice(desk: Desk) -> None:
    FillsItsDisk.num_refused = 0
    desk.folding.begin(lambda: FillsItsDisk(SPECS, {"w": -40, "v": -40}, {"w": "mean", "v": "mean"}))
    desk.put("a", 0.125, 1)
    desk.put("b", 0.5, 7)
    for _ in range(2):
        with pytest.raises(DiskFullError, match="side by side: no space left"):
            await desk.folding.finished()
    aggregate = await desk.folding.finished()
    assert desk.folding.lost == []
    assert aggregate is not None
    assert aggregate.num_updates == 2
    assert means(aggregate) == [(0.125 + 7 * 0.5) / 8]
