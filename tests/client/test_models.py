"""How a model comes to a site: real transfers, and a real trainer process that makes it of deltas."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from fed_client.cache import ModelCache
from fed_client.download import Downloads
from fed_client.durable import SiteDiskFullError
from fed_client.models import Models, WayLostError
from fed_client.stop import Stop, StoppedError
from fed_client.training.trainer import Trainer, WorkloadError
from fed_client.transport import Transport
from fed_core.errors import InvalidError, PermissionDeniedError, UnavailableError
from fed_core.payload.verify import verify_file
from fed_core.workload import Site
from fedstream.v1 import participation_pb2
from tests.client.lineage import Lineage

if TYPE_CHECKING:
    from tests.client.conftest import FakeCoordinator

pytestmark = pytest.mark.xdist_group("trainer")

WORKLOAD = """
from torch import nn
from fed_core.workload import Workload

class Idle(Workload):
    name = "idle"
    def model(self): return nn.Linear(1, 1)
    def train_data(self, site): return ()
    def loss(self, model, batch): return model(batch)
"""

Obtain = Callable[..., Path]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    path = tmp_path_factory.mktemp("idle") / "idle.py"
    path.write_text(WORKLOAD)
    with Trainer(str(path), site=Site(), device="cpu") as trainer:
        yield trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> ModelCache:
    return ModelCache(folder, keep=2)


@pytest.fixture
def lineage(coordinator: FakeCoordinator) -> Lineage:
    return Lineage(coordinator.payloads.__setitem__)


@pytest.fixture
def obtain(transport: Transport, cache: ModelCache, trainer: Trainer) -> Obtain:
    def obtain(
        model: participation_pb2.ModelRef,
        stop: Stop | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        cache: ModelCache = cache,
    ) -> Path:
        assignment = participation_pb2.Assignment(assignment_id="a1", model=model)
        models = Models(Downloads(transport, cache), cache)
        return models.obtain(assignment, trainer, stop or Stop(), on_progress, structlog.get_logger())

    return obtain


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_raw_model_is_itself_what_is_kept(
    coordinator: FakeCoordinator, lineage: Lineage, obtain: Obtain, cache: ModelCache, folder: Path
) -> None:
    path = obtain(lineage.ref(0, lineage.raw(0)))
    assert path.read_bytes() == coordinator.payloads[lineage.digests[0]]
    assert names(folder) == [f"{lineage.digests[0].hex()}.payload"]
    assert cache.digests() == [lineage.digests[0]]
    assert obtain(lineage.ref(0)) == path
    assert len(coordinator.calls["Download"]) == 1


def test_a_chain_of_deltas_gives_the_bits_of_the_last_version(
    coordinator: FakeCoordinator, lineage: Lineage, obtain: Obtain, cache: ModelCache, folder: Path
) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    steps = [lineage.step() for _ in range(3)]
    seen: list[tuple[int, int]] = []
    path = obtain(lineage.ref(3, *steps), on_progress=lambda done, total: seen.append((done, total)))
    lineage.raw(3)
    assert path.read_bytes() == coordinator.payloads[lineage.digests[3]]
    # One number of bytes for all steps, much smaller than the model; what they were made of goes.
    total = sum(step.total_bytes for step in steps)
    assert seen == sorted(seen)
    assert {each[1] for each in seen} == {total}
    assert seen[-1][0] == total < path.stat().st_size
    assert sorted(names(folder)) == sorted(f"{lineage.digests[version].hex()}.payload" for version in (0, 3))
    assert cache.digests() == [lineage.digests[3], lineage.digests[0]]


@pytest.mark.parametrize("kind", ["raw", "cast"])
def test_a_whole_model_and_deltas_need_no_base(
    coordinator: FakeCoordinator, lineage: Lineage, obtain: Obtain, folder: Path, kind: str
) -> None:
    keyframe = lineage.raw(0) if kind == "raw" else lineage.cast(0)
    delta = lineage.step()
    path = obtain(lineage.ref(1, keyframe, delta))
    lineage.raw(1)
    assert path.read_bytes() == coordinator.payloads[lineage.digests[1]]
    assert names(folder) == [path.name]


def test_a_whole_model_in_a_codec_becomes_the_raw_one(
    coordinator: FakeCoordinator, lineage: Lineage, obtain: Obtain
) -> None:
    path = obtain(lineage.ref(0, lineage.cast(0)))
    lineage.raw(0)
    assert path.read_bytes() == coordinator.payloads[lineage.digests[0]]


def test_a_variate_is_fetched_once_beside_the_model(
    coordinator: FakeCoordinator, lineage: Lineage, transport: Transport, cache: ModelCache, folder: Path
) -> None:
    """Which payload it is does not matter to whoever fetches it."""
    models = Models(Downloads(transport, cache), cache)
    assignment = participation_pb2.Assignment(assignment_id="a1")
    seen: list[tuple[int, int]] = []

    def fetch() -> Path | None:
        return models.obtain_variate(assignment, Stop(), lambda *at: seen.append(at), structlog.get_logger())

    assert fetch() is None
    assignment.variate.CopyFrom(lineage.step())
    for _ in range(2):
        path = fetch()
        assert path is not None
        assert path.read_bytes() == coordinator.payloads[assignment.variate.digest]
    assert len(coordinator.calls["Download"]) == 1
    assert seen[-1] == (assignment.variate.total_bytes,) * 2
    assert names(folder) == [f"{assignment.variate.digest.hex()}.step"]
    cache.trim({assignment.variate.digest})
    assert path.exists()
    cache.trim(set())
    assert names(folder) == []

    coordinator.payloads.clear()
    with pytest.raises(WayLostError, match="no longer gives out the variate"):
        fetch()
    assignment.variate.digest = b"short"
    with pytest.raises(InvalidError, match="without a digest"):
        fetch()


def test_a_model_that_the_coordinator_thinks_is_here_is_asked_for(lineage: Lineage, obtain: Obtain) -> None:
    with pytest.raises(WayLostError, match="not here") as caught:
        obtain(lineage.ref(0))
    assert caught.value.divergence is None


def test_a_base_that_is_gone_is_found_before_the_rest_is_fetched(
    coordinator: FakeCoordinator, lineage: Lineage, obtain: Obtain
) -> None:
    steps = [lineage.step(), lineage.step()]
    with pytest.raises(WayLostError, match=lineage.digests[0].hex()[:16]):
        obtain(lineage.ref(2, *steps))
    assert len(coordinator.calls["Download"]) == 1


def test_a_base_that_rotted_since_it_was_verified_is_no_divergence(
    lineage: Lineage, obtain: Obtain, cache: ModelCache, folder: Path
) -> None:
    base = obtain(lineage.ref(0, lineage.raw(0)))
    rot(base)
    with pytest.raises(WayLostError, match="damaged") as caught:
        obtain(lineage.ref(1, lineage.step()))
    assert caught.value.divergence is None
    assert cache.digests() == []
    assert base.name not in names(folder)


@pytest.mark.parametrize("what", ["truncated", "rotten"])
def test_a_base_of_an_earlier_life_is_verified_before_it_is_spoken_of(
    lineage: Lineage, obtain: Obtain, folder: Path, what: str
) -> None:
    good = obtain(lineage.ref(0, lineage.raw(0)))
    bad = obtain(lineage.ref(1, lineage.step()))
    if what == "rotten":
        rot(bad)
    else:
        bad.write_bytes(bad.read_bytes()[:-1])
    (folder / f"{bad.name}.tmp").write_bytes(b"half of a model")
    (folder / "stranger.payload").write_bytes(b"")
    again = ModelCache(folder, keep=2)
    assert again.digests() == []
    again.verify()
    assert again.digests() == [lineage.digests[0]]
    assert names(folder) == sorted([good.name, "stranger.payload"])


def test_a_delta_that_leads_elsewhere_is_told_and_forgotten_with_its_base(
    lineage: Lineage, obtain: Obtain, cache: ModelCache, folder: Path
) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    delta = lineage.step(result=b"x" * 32)
    model = participation_pb2.ModelRef(digest=b"x" * 32, version=1, payloads=[delta])
    with pytest.raises(WayLostError, match="version 1") as caught:
        obtain(model)
    assert caught.value.divergence == participation_pb2.Divergence(
        assignment_id="a1", version=1, digest=lineage.digests[1]
    )
    assert names(folder) == []
    assert cache.digests() == []


def test_payloads_that_lead_to_another_model_than_the_assignment_are_refused(lineage: Lineage, obtain: Obtain) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    first, second = lineage.step(), lineage.step()
    with pytest.raises(WorkloadError, match="the assignment asks for") as caught:
        obtain(lineage.ref(2, first))
    assert caught.value.kind == "REFUSED_BY_SITE"
    with pytest.raises(WorkloadError, match="begins at") as caught:
        obtain(lineage.ref(2, first, first, second))
    assert caught.value.kind == "REFUSED_BY_SITE"


def test_a_model_in_a_codec_is_not_taken_for_the_model_itself(lineage: Lineage, obtain: Obtain, folder: Path) -> None:
    keyframe = lineage.cast(0)
    model = participation_pb2.ModelRef(digest=keyframe.digest, version=0, payloads=[keyframe])
    with pytest.raises(InvalidError, match="no model in the raw codec"):
        obtain(model)
    assert not list(folder.glob("*.payload"))


def test_a_step_that_is_no_longer_given_out_is_asked_about(
    coordinator: FakeCoordinator, lineage: Lineage, obtain: Obtain
) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    delta = lineage.step()
    coordinator.faults["Download"].append(PermissionDeniedError("not part of the assignment"))
    with pytest.raises(WayLostError, match="not part of"):
        obtain(lineage.ref(1, delta))
    del coordinator.payloads[delta.digest]
    with pytest.raises(WayLostError, match="no longer kept"):
        obtain(lineage.ref(1, delta))


def test_a_broken_download_of_a_step_goes_on_where_it_stopped(
    coordinator: FakeCoordinator, transport: Transport, lineage: Lineage, obtain: Obtain, folder: Path
) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    first, second = lineage.step(), lineage.step()
    assert second.total_bytes > 2**18
    coordinator.offsets.clear()
    seen: list[int] = []
    coordinator.download_faults.append((2**18, UnavailableError("gone")))
    path = obtain(lineage.ref(2, first, second), on_progress=lambda done, total: seen.append(done))
    verify_file(path, lineage.digests[2])
    assert coordinator.offsets[:2] == [0, 2**18]
    assert seen == sorted(seen)


def test_what_was_fetched_before_a_crash_is_not_fetched_again_unless_it_rotted(
    coordinator: FakeCoordinator, lineage: Lineage, obtain: Obtain, cache: ModelCache, folder: Path
) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    steps = [lineage.step() for _ in range(3)]
    for step in steps[:2]:
        cache.step(step.digest).write_bytes(coordinator.payloads[step.digest])
    rot(cache.step(steps[1].digest))
    cache.part(steps[2].digest).write_bytes(coordinator.payloads[steps[2].digest][:5000])
    (folder / f"{lineage.digests[3].hex()}.payload.tmp").write_bytes(b"half of a model")
    coordinator.calls["Download"].clear()
    coordinator.offsets.clear()
    later = ModelCache(folder, keep=2)
    later.verify()
    path = obtain(lineage.ref(3, *steps), cache=later)
    verify_file(path, lineage.digests[3])
    assert [call.digest for call in coordinator.calls["Download"]] == [steps[1].digest, steps[2].digest]
    assert coordinator.offsets == [0, 5000]
    assert sorted(names(folder)) == sorted(f"{lineage.digests[version].hex()}.payload" for version in (0, 3))


def test_a_disk_without_room_for_the_model_that_a_step_makes_is_found_early(
    lineage: Lineage, obtain: Obtain, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    delta = lineage.step()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(delta.total_bytes + 2**20 - 1))
    with pytest.raises(SiteDiskFullError, match="free some"):
        obtain(lineage.ref(1, delta))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(delta.total_bytes + 2**20 + 100))
    obtain(lineage.ref(1, delta))


def test_a_drop_ends_it_between_fetching_and_making(lineage: Lineage, obtain: Obtain, folder: Path) -> None:
    obtain(lineage.ref(0, lineage.raw(0)))
    delta, stop = lineage.step(), Stop()

    def drop(done: int, total: int) -> None:
        if done == total:
            stop.set("the round closed")

    with pytest.raises(StoppedError, match="the round closed"):
        obtain(lineage.ref(1, delta), stop=stop, on_progress=drop)
    assert f"{lineage.digests[1].hex()}.payload" not in names(folder)


@pytest.mark.parametrize(
    "model",
    [
        participation_pb2.ModelRef(digest=b"d" * 31),
        participation_pb2.ModelRef(digest=b"d" * 32, payloads=[{"digest": b"../../etc/passwd", "total_bytes": 100}]),
        participation_pb2.ModelRef(digest=b"d" * 32, payloads=[{"digest": b"d" * 32, "total_bytes": 3}]),
        participation_pb2.ModelRef(digest=b"d" * 32, payloads=[{"digest": b"e" * 32, "total_bytes": 100}] * 1025),
    ],
    ids=["digest", "payload", "length", "too many"],
)
def test_a_model_that_cannot_be_right_is_refused(obtain: Obtain, model: Any) -> None:
    with pytest.raises(InvalidError):
        obtain(model)
