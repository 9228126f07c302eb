"""How a client comes by a version: every way leads there to the bit, the cheapest is taken, and none is made twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fed_core.codecs.registry import encoding_from_json
from fed_server.config import DeltaDownlinkConfig, DownlinkConfig, LatticeDownlinkConfig, RawDownlinkConfig
from fed_server.rounds import broadcast
from fed_server.rounds.broadcast import WHOLE
from fed_server.store.base import BroadcastRecord
from tests.server.lineage import Lineage, walk

Weights = dict[str, Tensor]
Open = Callable[..., Lineage]


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(120, 80, generator=generator).to(dtype),
        "v": torch.randn(80, generator=generator).to(dtype),
        "zero": torch.zeros(30, 30, dtype=dtype),
        "h": torch.randn(20, 10, generator=generator).half(),
        "b.mean": torch.randn(80, generator=generator),
        "b.count": torch.tensor(0),
    }


@pytest.fixture
def open_lineage(tmp_path: Path) -> Iterator[Open]:
    opened: list[Lineage] = []

    def open_(downlink: DownlinkConfig | None = None, **options: bool) -> Lineage:
        opened.append(Lineage(tmp_path / "data", downlink or LatticeDownlinkConfig(), **options))
        return opened[-1]

    yield open_
    for lineage in opened:
        lineage.close()


def grow(lineage: Lineage, num_versions: int, scale: float = 0.01, share: float = 1.0) -> Lineage:
    weights = model()
    lineage.first(weights)
    for seed in range(1, num_versions + 1):
        weights = walk(weights, seed, scale, share)
        lineage.step(weights)
    return lineage


def ends(way: list[BroadcastRecord]) -> list[tuple[int, int]]:
    return [(step.version, step.base_version) for step in way]


def num_bytes(way: list[BroadcastRecord]) -> int:
    return sum(step.num_bytes for step in way)


# Ways


@pytest.mark.parametrize(
    "downlink",
    [
        LatticeDownlinkConfig(),
        LatticeDownlinkConfig(step=0.5, finest_step=0.0, first_error=1e-3),
        DeltaDownlinkConfig(),
        DeltaDownlinkConfig(encoding=encoding_from_json('{"kind": "uniform", "rounding": "stochastic", "bits": 4}')),
        RawDownlinkConfig(),
    ],
    ids=["lattice", "fine lattice", "delta", "delta uniform", "raw"],
)
async def test_from_whatever_a_client_holds_the_way_leads_to_the_version(
    open_lineage: Open, downlink: DownlinkConfig
) -> None:
    lineage = grow(open_lineage(downlink), 4)
    for version in range(5):
        for held in range(-1, 5):
            known = [*lineage.held(held)] if held >= 0 else []
            way = await lineage.broadcasts.way_to(version, [*known, "f" * 64])
            if held == version:
                assert way == []
                continue
            base = held if 0 <= held < version and way[0].base_version == held else None
            assert lineage.assemble(way, base) == lineage.models[version].payload_digest, (held, version)


async def test_the_next_version_is_one_delta(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 2)
    assert ends(await lineage.broadcasts.way_to(2, lineage.held(1))) == [(2, 1)]
    assert ends(await lineage.broadcasts.way_to(2, lineage.held(0, 1))) == [(2, 1)], "from the newest that it holds"
    assert ends(await lineage.broadcasts.way_to(1, lineage.held(0, 2))) == [(1, 0)], "there is no way back"


async def test_of_chain_and_span_the_shorter_is_taken(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 4)
    way = await lineage.broadcasts.way_to(4, lineage.held(1))
    records = {(r.version, r.base_version): r for r in lineage.records()}
    chain, span = [records[v, v - 1] for v in (2, 3, 4)], [records[4, 1]]
    assert num_bytes(way) == min(num_bytes(chain), num_bytes(span))
    assert ends(way) in ([(4, 1)], [(2, 1), (3, 2), (4, 3)])
    assert lineage.assemble(chain, 1) == lineage.assemble(span, 1) == lineage.models[4].payload_digest


async def test_a_span_over_changes_that_undo_each_other_is_shorter_than_the_chain(open_lineage: Open) -> None:
    lineage = open_lineage()
    weights = model()
    there = walk(weights, 1, 0.1)
    lineage.first(weights)
    for target in (there, weights, there, weights):
        lineage.step(target)
    assert ends(await lineage.broadcasts.way_to(4, lineage.held(0))) == [(4, 0)]


async def test_changes_that_meet_nowhere_are_sent_as_a_chain(open_lineage: Open) -> None:
    """Each delta says shortly which few elements moved; the span has more of them, at the finest step of all."""
    lineage = open_lineage()
    weights = {"w": torch.randn(400, 400, generator=torch.Generator().manual_seed(0))}
    lineage.first(weights)
    for row in (0, 200):
        weights = {"w": weights["w"].clone()}
        weights["w"][row : row + 200] += walk({"d": torch.zeros(200, 400)}, row, 0.1 * 16 ** -(row // 200))["d"]
        lineage.step(weights)
    way = await lineage.broadcasts.way_to(2, lineage.held(0))
    both = {(r.version, r.base_version): r.num_bytes for r in lineage.records()}
    assert num_bytes(way) == min(both[2, 0], both[1, 0] + both[2, 1])


async def test_a_newcomer_takes_version_0_and_what_came_since_where_little_did(open_lineage: Open) -> None:
    lineage = open_lineage()
    # On a coarse lattice from the start, so that nothing of version 0 is carried along.
    weights = {"w": torch.randint(-3, 4, (500, 400), generator=torch.Generator().manual_seed(0)) / 2}
    lineage.first(weights)
    for seed in (1, 2):
        weights = walk(weights, seed, 0.5, share=0.002)
        lineage.step(weights)
    way = await lineage.broadcasts.way_to(2, [])
    assert ends(way) == [(0, WHOLE), (2, 0)]
    whole = next(r for r in lineage.records() if (r.version, r.base_version) == (2, WHOLE))
    assert num_bytes(way) < whole.num_bytes
    assert lineage.assemble(way) == lineage.assemble([whole]) == lineage.models[2].payload_digest


async def test_a_newcomer_takes_the_whole_version_where_much_has_changed(open_lineage: Open) -> None:
    lineage = open_lineage()
    lineage.first(model(0))
    lineage.step(model(1))
    way = await lineage.broadcasts.way_to(1, [])
    assert ends(way) == [(1, WHOLE)]
    first, span = (r for r in lineage.records() if (r.version, r.base_version) in ((0, WHOLE), (1, 0)))
    assert num_bytes(way) <= num_bytes([first, span])


async def test_a_newcomer_to_a_new_run_takes_version_0_as_it_was_made(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 0)
    assert ends(await lineage.broadcasts.way_to(0, [])) == [(0, WHOLE)]
    assert len(lineage.records()) == 1
    raw = sum(t.numel() * t.element_size() for t in model().values())
    assert lineage.records()[0].num_bytes < raw / 4


async def test_without_a_lattice_there_are_no_spans(open_lineage: Open) -> None:
    lineage = grow(open_lineage(DeltaDownlinkConfig()), 3)
    assert ends(await lineage.broadcasts.way_to(3, lineage.held(0))) == [(1, 0), (2, 1), (3, 2)]
    assert ends(await lineage.broadcasts.way_to(3, [])) == [(3, WHOLE)]
    assert lineage.records()[-1].num_bytes > 0


async def test_raw_versions_travel_whole_and_as_the_file_that_is_their_identity(open_lineage: Open) -> None:
    lineage = grow(open_lineage(RawDownlinkConfig()), 2)
    [step] = await lineage.broadcasts.way_to(2, lineage.held(0, 1))
    assert (step.base_version, step.digest) == (WHOLE, lineage.models[2].payload_digest)
    assert len(lineage.records()) == 3, "nothing had to be made"


def outlier() -> list[Weights]:
    """Weights with a value far from the others: too many steps for a fine version 0, which therefore goes raw."""
    weights = {"w": 1 + 0.05 * torch.randn(60, 50, generator=torch.Generator().manual_seed(0))}
    weights["w"][0, 0] = 300.0
    return walked(weights, [0.05] * 5)


def walked(weights: Weights, scales: list[float]) -> list[Weights]:
    path = [weights]
    for seed, scale in enumerate(scales):
        path.append(walk(path[-1], seed, scale))
    return path


PATHS: dict[str, Callable[[], list[Weights]]] = {
    "an outlier": outlier,
    "a tensor that grows a million times": lambda: walked({"w": torch.zeros(60, 50)}, [1e-6] * 3 + [1.0] * 3),
    "a tensor that shrinks a billion times": lambda: (
        [{"w": torch.full((60, 50), 1024.0)}, *walked({"w": torch.zeros(60, 50)}, [1e-6, 1e-6])]
    ),
    "a negative zero": lambda: walked({"w": torch.tensor([[-0.0, 1.0]] * 30)}, [0.1] * 3),
    "doubles": lambda: walked(
        {"w": torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).double()}, [0.1] * 3
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "downlink",
    [LatticeDownlinkConfig(), LatticeDownlinkConfig(step=0.01, finest_step=0.0, first_error=1e-8)],
    ids=["default", "fine"],
)
async def test_spans_are_exact_whatever_becomes_of_the_weights(
    open_lineage: Open, path: str, downlink: DownlinkConfig
) -> None:
    lineage = open_lineage(downlink)
    first, *others = PATHS[path]()
    lineage.first(first)
    for weights in others:
        lineage.step(weights)
    newest = lineage.newest
    for base in range(newest):
        span = await lineage.broadcasts._make_once(newest, base)
        assert lineage.assemble([span], base) == lineage.models[newest].payload_digest, base
    whole = await lineage.broadcasts._make_once(newest, WHOLE)
    assert lineage.assemble([whole]) == lineage.models[newest].payload_digest


async def test_over_a_gap_in_the_chain_the_version_goes_whole(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 4)
    lineage.forget_record(2, 1)
    assert ends(await lineage.broadcasts.way_to(4, lineage.held(1))) == [(4, WHOLE)]
    assert ends(await lineage.broadcasts.way_to(4, lineage.held(2)))[-1][0] == 4
    assert ends(await lineage.broadcasts.way_to(1, lineage.held(0))) == [(1, 0)]


async def test_to_a_client_that_diverged_the_version_goes_whole(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 2, share=0.01)
    for held in ([0], [1], []):
        assert ends(await lineage.broadcasts.way_to(2, lineage.held(*held), has_diverged=True)) == [(2, WHOLE)]
    assert await lineage.broadcasts.way_to(2, lineage.held(2), has_diverged=True) == []


async def test_a_chain_too_long_for_an_assignment_is_no_way(
    open_lineage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "_MAX_CHAIN", 2)
    lineage = grow(open_lineage(DeltaDownlinkConfig()), 3)
    assert ends(await lineage.broadcasts.way_to(3, lineage.held(0))) == [(3, WHOLE)]
    assert ends(await lineage.broadcasts.way_to(3, lineage.held(1))) == [(2, 1), (3, 2)]


# Spans and whole versions are made once


async def test_what_many_ask_for_at_once_is_made_once(open_lineage: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage = grow(open_lineage(), 4)
    written: list[tuple[int, int]] = []
    for name in ("_write_span", "_write_whole"):
        write = getattr(lineage.broadcasts, name)

        def counted(path: Path, version: int, base: int, write: Callable[..., object] = write) -> object:
            written.append((version, base))
            return write(path, version, base)

        monkeypatch.setattr(lineage.broadcasts, name, counted)
    asked = [lineage.broadcasts.way_to(4, lineage.held(*held)) for held in [(1,), (2,), ()] * 10]
    ways = await asyncio.gather(*asked)
    assert sorted(written) == [(4, WHOLE), (4, 0), (4, 1), (4, 2)]
    assert all(way == ways[index % 3] for index, way in enumerate(ways))
    await asyncio.gather(*(lineage.broadcasts.way_to(4, lineage.held(1)) for _ in range(5)))
    assert len(written) == 4


async def test_a_restart_finds_what_was_made_and_makes_the_same_bytes_again(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 4)
    before = {held: await lineage.broadcasts.way_to(4, lineage.held(*held)) for held in [(1,), (2,), ()]}
    records, time = lineage.records(), lineage.records()[-1].created_time
    lineage.close()
    again = open_lineage()
    assert {held: await again.broadcasts.way_to(4, again.held(*held)) for held in before} == before
    assert again.records() == records
    for record in records:
        if record.version - record.base_version > 1:
            again.forget_record(record.version, record.base_version)
    ways = {held: await again.broadcasts.way_to(4, again.held(*held)) for held in before}
    assert {held: [s.digest for s in way] for held, way in ways.items()} == {
        held: [s.digest for s in way] for held, way in before.items()
    }
    assert again.records()[-1].created_time >= time


async def test_what_failed_leaves_no_file_and_is_tried_again(
    open_lineage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = grow(open_lineage(), 3)
    files = sorted(lineage.files.root.rglob("*.payload"))

    def fails(path: Path, version: int, base: int) -> object:
        path.write_bytes(b"half")
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(lineage.broadcasts, "_write_span", fails)
        with pytest.raises(RuntimeError):
            await lineage.broadcasts.way_to(3, lineage.held(1))
    assert sorted(lineage.files.root.rglob("*.payload")) == files
    assert not list(lineage.files.root.rglob("*.tmp"))
    way = await lineage.broadcasts.way_to(3, lineage.held(1))
    assert lineage.assemble(way, 1) == lineage.models[3].payload_digest


def test_a_payload_is_found_by_its_digest_as_long_as_it_is_kept(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 1)
    record = lineage.records()[1]
    assert lineage.broadcasts.find(record.digest) == record
    assert lineage.broadcasts.find("f" * 64) is None
    lineage.forget_record(1, 0)
    assert lineage.broadcasts.find(record.digest) is None


# Retirement


async def test_chains_are_kept_while_they_are_shorter_than_the_version(open_lineage: Open) -> None:
    lineage = open_lineage(LatticeDownlinkConfig(step=0.01, finest_step=0.0))
    weights = model()
    lineage.first(weights)
    lineage.retire()
    for seed in range(1, 12):
        weights = walk(weights, seed, 0.3)
        lineage.step(weights)
        lineage.retire()
        kept = [r for r in lineage.records() if r.is_available]
        chain = sorted(r.version for r in kept if r.base_version >= 0)
        limit = lineage.models[seed].payload_bytes
        assert chain == list(range(chain[0], seed + 1)), "an unbroken chain to the newest"
        assert sum(r.num_bytes for r in kept if r.base_version >= 0) < limit
        older = [r.num_bytes for r in lineage.records() if (r.version, r.base_version) == (chain[0] - 1, chain[0] - 2)]
        assert sum(older) + sum(r.num_bytes for r in kept if r.base_version >= 0) >= limit or chain[0] == 1
        assert any((r.version, r.base_version) == (0, WHOLE) for r in kept) == (chain[0] == 1)
        names = {f"{r.digest}.payload" for r in kept}
        assert {path.name for path in (lineage.files.root / "payloads").glob("*")} == names
    assert chain[0] > 1, "the test must have let some go"
    oldest = chain[0] - 1
    way = await lineage.broadcasts.way_to(11, lineage.held(oldest))
    assert lineage.assemble(way, oldest) == lineage.models[11].payload_digest
    assert ends(await lineage.broadcasts.way_to(11, lineage.held(oldest - 1))) == [(11, WHOLE)]


async def test_what_leads_to_a_version_in_use_is_kept(open_lineage: Open) -> None:
    """Its clients may be in the middle of fetching it."""
    lineage = grow(open_lineage(RawDownlinkConfig()), 3)
    lineage.retire(in_use=[1])
    assert ends([r for r in lineage.records() if r.is_available]) == [(1, WHOLE), (3, WHOLE)]
    lineage.retire()
    assert ends([r for r in lineage.records() if r.is_available]) == [(3, WHOLE)]
    assert len(list((lineage.files.root / "payloads").glob("*"))) == 1


async def test_spans_to_older_versions_go_and_those_to_the_newest_stay(open_lineage: Open) -> None:
    lineage = grow(open_lineage(), 3)
    await lineage.broadcasts.way_to(3, lineage.held(1))
    await lineage.broadcasts.way_to(2, lineage.held(0))
    lineage.retire()
    kept = ends([r for r in lineage.records() if r.is_available])
    assert (3, 1) in kept
    assert (2, 0) not in kept
    assert {(1, 0), (2, 1), (3, 2), (0, WHOLE)} <= set(kept)
    lineage.retire()
    assert ends([r for r in lineage.records() if r.is_available]) == kept
