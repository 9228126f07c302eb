"""Runs that are compressed both ways, over real gRPC: what clients make of what they get, what is counted, what is reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.light_client import LightClient, MemoryFile, Update, encode_update
from fed_core.codecs.registry import CODECS_OF, encoding_from_json
from fed_core.errors import InvalidError, NotFoundError
from fed_core.payload.manifest import Manifest, parse_manifest, parse_preamble
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fedstream.v1 import common_pb2, participation_pb2, runs_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import back_in, member, open_house, until

Weights = dict[str, Tensor]
Assignment = participation_pb2.Assignment

UPLINKS = {
    "raw": 'kind = "raw"',
    "cast": 'kind = "cast"',
    "uniform": 'kind = "uniform"\nbits = 4\nrounding = "stochastic"',
    "mask": 'kind = "mask"',
    "fsq": 'kind = "fsq"',
    "lrq": 'kind = "lrq"',
    "auto": 'kind = "auto"',
}
DOWNLINKS = {
    "lattice": 'kind = "lattice"',
    "delta": 'kind = "delta"',
    "delta uniform": 'kind = "delta"\n[downlink.encoding]\nkind = "uniform"\nbits = 6',
    "raw": 'kind = "raw"',
}


def model(rows: int = 300) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(rows, 200, generator=generator) / 10,
        "v": torch.randn(200, generator=generator) / 10,
        "b.mean": torch.zeros(200),
        "b.count": torch.tensor(0),
    }


def compressed(uplink: str = "", downlink: str = "", **options: Any) -> str:
    """A run config with these tables; without them, the defaults."""
    extra = (f"\n[uplink]\n{uplink}\n" if uplink else "") + (f"\n[downlink]\n{downlink}\n" if downlink else "")
    return config(is_exact=False, extra=extra + options.pop("extra", ""), **options)


class Site:
    """A light client that keeps models, as a daemon does, and trains by making random steps."""

    def __init__(self, client: LightClient, seed: int) -> None:
        self.client = client
        self.seed = seed
        self.models: dict[bytes, MemoryFile] = {}
        self.tensors: dict[int, Weights] = {}
        self._by_version: dict[int, MemoryFile] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()
        self.client.close()

    def next(self, **news: Any) -> Assignment:
        """Polls with what it holds until there is work."""
        for _ in range(20):
            found = self.client.poll(wait_seconds=5, model_digests=list(self.models), **news).assignments
            if found:
                return found[0]
        raise TimeoutError("no assignment")

    def obtain(self, assignment: Assignment) -> tuple[Manifest, Weights]:
        """The assignment's model: fetched, made and kept."""
        if assignment.model.digest not in self.models:
            memory = self._stack.enter_context(MemoryFile())
            self.client.download(assignment, memory, self._base_of(assignment))
            self.models[assignment.model.digest] = self._by_version[assignment.model.version] = memory
        with self.models[assignment.model.digest].reader() as reader:
            self.tensors[assignment.model.version] = reader.tensors()
            return reader.manifest, self.tensors[assignment.model.version]

    def _base_of(self, assignment: Assignment) -> MemoryFile | None:
        """What the coordinator builds upon: the newest that is older."""
        if assignment.model.payloads[0].kind != common_pb2.PAYLOAD_KIND_DELTA:
            return None
        return self._by_version[max(version for version in self._by_version if version < assignment.model.version)]

    def train(self, assignment: Assignment) -> Update:
        """An update: random steps, the same whenever the same assignment is trained again."""
        manifest, _ = self.obtain(assignment)
        generator = torch.Generator().manual_seed(self.seed + 100 * assignment.round)

        def make(spec: TensorSpec) -> Tensor:
            if spec.dtype == "int64":
                return torch.tensor(assignment.round)
            return torch.randn(spec.shape, generator=generator) / 50

        return encode_update(assignment, manifest.specs, make, num_examples=self.seed + 1)

    def work(self, assignment: Assignment | None = None) -> Assignment:
        """Does one assignment."""
        assignment = assignment or self.next()
        if assignment.kind == common_pb2.ASSIGNMENT_KIND_EVALUATE:
            self.obtain(assignment)
            self.client.report_evaluation(assignment.assignment_id, 10, accuracy=0.5)
        else:
            self.client.upload(assignment.assignment_id, self.train(assignment))
        return assignment


@asynccontextmanager
async def sites(house: House, *names: str) -> AsyncIterator[list[Site]]:
    with ExitStack() as stack:
        made: list[Site] = []
        for seed, name in enumerate(names):
            made.append(Site(await off_loop(house.client, name), seed))
            stack.callback(made[-1].close)
            await off_loop(made[-1].client.poll, wait_seconds=0)
        yield made


async def rounds_of(house: House, found: list[Site], num_rounds: int) -> None:
    """All sites do all that a run without evaluation asks of them."""
    for _ in range(num_rounds):
        await asyncio.gather(*(off_loop(site.work) for site in found))
    run = await off_loop(house.operator.wait)
    assert run.state == runs_pb2.RUN_STATE_FINISHED, run.reason


def stored(house: House, folder: str, version: int, run: str = "test") -> Weights:
    run_id = house.operator.run(run).run_id
    with SafetensorsReader(house.app.settings.data_dir / folder / run_id / f"{version}.safetensors") as reader:
        return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


def names_in(house: House, folder: str) -> list[str]:
    return sorted(path.name for path in (house.app.settings.data_dir / folder).rglob("*") if path.is_file())


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def manifest_of(update: Update) -> Manifest:
    preamble = parse_preamble(update.data[:44])
    return parse_manifest(preamble, update.data[44 : 44 + preamble.manifest_bytes])


# What clients make of it


@pytest.mark.parametrize("downlink", DOWNLINKS)
async def test_every_client_has_the_bits_of_the_version_however_it_comes_by_it(house: House, downlink: str) -> None:
    """One takes part often, one joins late, one skips rounds, and all hold what the operator downloads."""
    text = compressed(downlink=DOWNLINKS[downlink], size=1, quorum=1, max_rounds=5, extra=TURNS)
    await off_loop(house.operator.submit, text, model())
    async with sites(house, "often", "late", "rare") as (often, late, rare):
        for site in (often, rare, often, late, rare):
            await off_loop(take_turn, site)
        assert (await off_loop(house.operator.wait)).model_version == 5
        seen = {version: tensors for site in (often, late, rare) for version, tensors in site.tensors.items()}
        assert sorted(seen) == [0, 1, 2, 3, 4]
        for version in (3, 4):  # those before are no longer kept
            assert same(seen[version], await off_loop(stored, house, "models", version))
        assert not same(seen[3], seen[4])
        assert seen[4]["b.count"] == 4


TURNS = '\n[cohort.labels]\nturn = "mine"\n'


def take_turn(site: Site) -> Assignment:
    """One round of a run with TURNS, by this site alone."""
    assignment = site.next(labels={"turn": "mine"})
    # Said before the round ends, for the next cohort is drawn then.
    site.client.poll(held=(assignment.assignment_id,), wait_seconds=0, labels={"turn": "over"})
    return site.work(assignment)


@pytest.mark.parametrize("uplink", UPLINKS)
async def test_updates_come_in_the_codecs_of_the_runs_encoding(house: House, uplink: str) -> None:
    await off_loop(house.operator.submit, compressed(uplink=UPLINKS[uplink], size=2, quorum=2, max_rounds=2), model())
    async with sites(house, "a", "b") as found:
        assignment = await off_loop(found[0].next)
        assert encoding_from_json(assignment.uplink).kind == uplink
        codecs = manifest_of(await off_loop(found[0].train, assignment)).codecs
        assert set(codecs) <= CODECS_OF[uplink] | {"raw"}
        assert uplink == "raw" or set(codecs) & CODECS_OF[uplink]
        await rounds_of(house, found, 2)
    for round in (await off_loop(house.operator.report)).rounds:
        for client in round.clients:
            assert dict(client.fidelity.tensors).keys() == codecs.keys()
            assert (client.fidelity.error > 0) == (uplink not in ("raw", "mask"))
            assert 0 <= client.fidelity.error < 0.1
            assert client.fidelity.gain == pytest.approx(1, abs=0.1)


async def test_the_aggregate_is_of_what_was_decoded_to_the_last_bit(house: House) -> None:
    """With one update the next master weights are the base's plus what its payload decodes to."""
    text = compressed(uplink=UPLINKS["uniform"], size=1, quorum=1, max_rounds=2)
    await off_loop(house.operator.submit, text, model())
    async with sites(house, "site") as (site,):
        update = await off_loop(site.train, await off_loop(site.next))
        with MemoryFile() as memory:
            memory.file.write(update.data)
            with memory.reader() as reader:
                change = reader.tensors(verify=True)
        await off_loop(site.work)
        await off_loop(site.next)
        masters = await off_loop(stored, house, "masters", 1)
    for name in ("w", "v", "b.mean"):
        # The mean lies on the round's grid, far finer than float32 here.
        assert (masters[name] - (model()[name] + change[name])).abs().max() < 1e-7


# What is counted


async def test_bytes_are_counted_raw_as_payload_and_on_the_wire(house: House) -> None:
    await off_loop(house.operator.submit, compressed(size=2, quorum=2, max_rounds=3), model())
    async with sites(house, "a", "b") as found:
        sent = {}
        for number in (1, 2, 3):
            for site in found:
                assignment = await off_loop(site.next)
                update = await off_loop(site.train, assignment)
                sent[number, site.seed] = update, sum(step.total_bytes for step in assignment.model.payloads)
                await off_loop(site.client.upload, assignment.assignment_id, update)
        await off_loop(house.operator.wait)
    report = await off_loop(house.operator.report)
    raw_bytes = sum(t.numel() * t.element_size() for t in model().values())
    for round in report.rounds:
        for seed, client in enumerate(round.clients):
            update, downloaded = sent[round.round, seed]
            up, down = client.uplink, client.downlink
            assert (up.raw_bytes, up.payload_bytes) == (raw_bytes, len(update.data))
            assert (down.raw_bytes, down.payload_bytes) == (raw_bytes, downloaded)
            for traffic in (up, down):
                # Frames: a header, and 5 bytes and an offset a chunk.
                assert traffic.payload_bytes < traffic.wire_bytes < traffic.payload_bytes + 300
                assert traffic.payload_bytes < traffic.raw_bytes / 3
        for total, parts in (
            ("uplink", [c.uplink for c in round.clients]),
            ("downlink", [c.downlink for c in round.clients]),
        ):
            assert getattr(round, total).wire_bytes == sum(part.wire_bytes for part in parts)
            assert getattr(round, total).payload_bytes == sum(part.payload_bytes for part in parts)
            assert getattr(round, total).raw_bytes == 2 * raw_bytes
    for total in ("uplink", "downlink"):
        for unit in ("raw_bytes", "payload_bytes", "wire_bytes"):
            of_rounds = [getattr(getattr(round, total), unit) for round in report.rounds]
            assert getattr(getattr(report, total), unit) == sum(of_rounds)


async def test_what_is_sent_again_counts_on_the_wire_only(house: House) -> None:
    await off_loop(house.operator.submit, compressed(UPLINKS["raw"], DOWNLINKS["raw"], size=1, quorum=1), model(2000))
    async with sites(house, "site") as (site,):
        assignment = await off_loop(site.next)
        [payload] = assignment.model.payloads
        with MemoryFile() as memory:
            for _ in range(3):
                await off_loop(site.client.fetch, assignment.assignment_id, payload, memory)
        update = await off_loop(site.train, assignment)  # the fourth time
        for _ in range(2):
            with pytest.raises(Exception, match="not whole"):
                await off_loop(
                    site.client.upload, assignment.assignment_id, update, until=len(update.data) - 9, retry=False
                )
            # From the beginning, as a client does that lost its place.
            (house.app.settings.data_dir / "uploads" / f"{assignment.assignment_id}.part").unlink()
        await off_loop(site.client.upload, assignment.assignment_id, update)
        await off_loop(house.operator.wait)
    client = await off_loop(member, house, "site")
    raw_bytes = sum(t.numel() * t.element_size() for t in model(2000).values())
    for traffic, payload_bytes, times in (
        (client.downlink, payload.total_bytes, 4),
        (client.uplink, len(update.data), 3),
    ):
        assert (traffic.raw_bytes, traffic.payload_bytes) == (raw_bytes, payload_bytes)
        assert times * (payload_bytes - 9) < traffic.wire_bytes < times * (payload_bytes + 300)


async def test_a_client_that_holds_the_version_fetches_nothing(house: House) -> None:
    """What it fetched to evaluate a version, it need not fetch again to train on it."""
    await off_loop(house.operator.submit, compressed(size=1, quorum=1, max_rounds=2, at="clients"), model())
    async with sites(house, "site") as (site,):
        for _ in range(4):
            assignment = await off_loop(site.work)
        assert [step.total_bytes for step in assignment.model.payloads] != []
        await off_loop(house.operator.wait)
    first, second = (await off_loop(house.operator.report)).rounds
    by_kind = {c.assignment_kind: c.downlink for c in first.clients}
    assert by_kind[common_pb2.ASSIGNMENT_KIND_EVALUATE].payload_bytes > 0
    trained = next(c for c in second.clients if c.assignment_kind == common_pb2.ASSIGNMENT_KIND_TRAIN)
    assert trained.downlink == runs_pb2.Traffic()


async def test_every_step_of_a_way_is_counted_and_the_model_once(house: House) -> None:
    text = compressed(downlink=DOWNLINKS["delta"], size=1, quorum=1, max_rounds=4, extra=TURNS)
    await off_loop(house.operator.submit, text, model())
    async with sites(house, "rare", "often") as (rare, often):
        for site in (rare, often, often):
            await off_loop(take_turn, site)
        assignment = await off_loop(take_turn, rare)
        await off_loop(house.operator.wait)
    assert [step.kind for step in assignment.model.payloads] == [common_pb2.PAYLOAD_KIND_DELTA] * 3
    downlink = (await off_loop(member, house, "rare", round=4)).downlink
    assert downlink.payload_bytes == sum(step.total_bytes for step in assignment.model.payloads)
    assert downlink.raw_bytes == sum(t.numel() * t.element_size() for t in model().values())


# What is reported


async def test_the_report_says_what_was_lost_both_ways(house: House) -> None:
    await off_loop(house.operator.submit, compressed(size=2, quorum=2, max_rounds=3), model())
    async with sites(house, "a", "b") as found:
        await rounds_of(house, found, 3)
    report = await off_loop(house.operator.report)
    for client in (client for round in report.rounds for client in round.clients):
        assert 0.001 < client.fidelity.error < 0.03, "auto aims at 0.02"
        assert sum(client.fidelity.tensors.values()) == len(model())
    first, *versions = report.models
    assert not first.HasField("fidelity")
    assert first.delta_bytes == 0
    raw_bytes = sum(t.numel() * t.element_size() for t in model().values())
    for version in versions:
        assert version.fidelity.error > 0
        assert 0 < version.fidelity.gain <= 1.1
        assert dict(version.fidelity.tensors) == {"fsq": 2, "raw": 2}
        assert 0 < version.delta_bytes < raw_bytes / 4


async def test_whole_versions_have_no_loss_to_report(house: House) -> None:
    await off_loop(house.operator.submit, compressed(downlink=DOWNLINKS["raw"], size=1, quorum=1), model())
    async with sites(house, "site") as (site,):
        await rounds_of(house, [site], 1)
    for version in (await off_loop(house.operator.report)).models:
        assert not version.HasField("fidelity")
        assert version.delta_bytes == 0


async def test_submitting_says_that_version_0_is_rounded_unless_it_was_trained(house: House) -> None:
    answer = await off_loop(house.operator.submit, compressed(name="random", size=1, quorum=1), model())
    assert any("version 0 is sent rounded, with an error of 0.03" in notice for notice in answer.notices)
    exact = compressed(name="exact", downlink=DOWNLINKS["raw"], size=1, quorum=1)
    answer = await off_loop(house.operator.submit, exact, model())
    assert not any("rounded" in notice for notice in answer.notices)
    values = await off_loop(stored, house, "models", 0, "random")
    error = (values["w"] - model()["w"]).square().sum() / model()["w"].square().sum()
    assert 0.005 < error < 0.03
    assert same(await off_loop(stored, house, "masters", 0, "random"), model())


# Clients that come to other bits


async def test_a_client_that_diverged_is_marked_and_sent_the_whole_version(house: House) -> None:
    await off_loop(house.operator.submit, compressed(size=1, quorum=1, max_rounds=2), model())
    async with sites(house, "site") as (site,):
        await off_loop(site.work)
        assignment = await off_loop(site.next)
        assert [step.kind for step in assignment.model.payloads] == [common_pb2.PAYLOAD_KIND_DELTA]
        # As a daemon does: it forgets what it began from, and says what came out.
        site.models.clear()
        diverged = participation_pb2.Divergence(
            assignment_id=assignment.assignment_id, version=1, digest=bytes(range(32))
        )
        again = await off_loop(site.next, divergences=[diverged])
        assert again.assignment_id == assignment.assignment_id
        assert [step.kind for step in again.model.payloads] == [common_pb2.PAYLOAD_KIND_MODEL]
        assert again.model.digest == assignment.model.digest
        await off_loop(site.work, again)
        assert (await off_loop(house.operator.wait)).state == runs_pb2.RUN_STATE_FINISHED
    report = await off_loop(house.operator.report)
    assert [client.has_diverged for round in report.rounds for client in round.clients] == [False, True]


async def test_a_divergence_of_another_clients_assignment_changes_nothing(house: House) -> None:
    await off_loop(house.operator.submit, compressed(size=2, quorum=2), model())
    async with sites(house, "a", "b") as (a, b):
        mine, other = await off_loop(a.next), await off_loop(b.next)
        for assignment_id in (other.assignment_id, "unheard-of", ""):
            diverged = participation_pb2.Divergence(assignment_id=assignment_id, version=0, digest=bytes(32))
            await off_loop(a.next, divergences=[diverged])
        await off_loop(a.work, mine)
        await off_loop(b.work, other)
        await off_loop(house.operator.wait)
    [round] = (await off_loop(house.operator.report)).rounds
    assert [client.has_diverged for client in round.clients] == [False, False]


async def test_a_poll_that_holds_too_many_models_is_refused(house: House) -> None:
    async with sites(house, "site") as (site,):
        with pytest.raises(InvalidError, match="at most 64 model_digests"):
            await off_loop(site.client.poll, wait_seconds=0, model_digests=[bytes(32)] * 65)
        for digests in ([bytes(32)] * 64, [b"short"], [b""]):
            await off_loop(site.client.poll, wait_seconds=0, model_digests=digests)


# Files, and starting again


async def test_an_open_round_keeps_what_leads_to_its_version_and_only_that(house: House) -> None:
    text = compressed(size=1, quorum=1, max_rounds=6, extra="\n[keep]\nversions = 1\n")
    await off_loop(house.operator.submit, text, model())
    async with sites(house, "site") as (site,):
        for version in range(5):
            assignment = await off_loop(site.next)
            await until(lambda v=version: names_in(house, "masters") == [f"{v}.safetensors"])
            await until(lambda v=version: names_in(house, "models") == [f"{v}.safetensors"])
            await off_loop(site.work, assignment)
        last = await off_loop(site.next)
        # The chain from version 0, and version 0 itself: a client with any of them, or none, can still be served.
        await until(lambda: len(names_in(house, "payloads")) == 6)
        for held in [[], *([digest] for digest in site.models)]:
            found = await off_loop(site.client.poll, wait_seconds=0, model_digests=held)
            assert found.assignments[0].model.digest == last.model.digest
            for step in found.assignments[0].model.payloads:
                assert f"{step.digest.hex()}.payload" in names_in(house, "payloads")
        await off_loop(site.work, last)
        await off_loop(house.operator.wait)
    await until(lambda: names_in(house, "payloads") == names_in(house, "masters") == [])
    assert names_in(house, "models") == ["6.safetensors"]


async def test_a_payload_that_was_let_go_is_not_found_and_the_next_answer_names_another(house: House) -> None:
    await off_loop(
        house.operator.submit, compressed(downlink=DOWNLINKS["raw"], size=1, quorum=1, max_rounds=3), model()
    )
    async with sites(house, "site") as (site,):
        first = await off_loop(site.work)
        second = await off_loop(site.next)
        await until(lambda: len(names_in(house, "payloads")) == 1)
        with MemoryFile() as memory, pytest.raises(NotFoundError, match="no longer kept"):
            await off_loop(site.client.fetch, second.assignment_id, first.model.payloads[0], memory)
        await off_loop(site.work, second)
        await off_loop(site.work)
        assert (await off_loop(house.operator.wait)).model_version == 3


@pytest.mark.parametrize("downlink", DOWNLINKS)
async def test_a_restart_changes_neither_the_way_nor_the_versions(tmp_path: Path, downlink: str) -> None:
    digests = []
    for restarts in (False, True):
        folder = tmp_path / str(restarts)
        text = compressed(UPLINKS["uniform"], DOWNLINKS[downlink], size=1, quorum=1, max_rounds=4)
        async with open_house(folder) as house:
            await off_loop(house.operator.submit, text, model())
            client = LightClient(house.app.address)
            credential = await off_loop(client.enroll, house.app.tokens.join, "site")
            site = Site(client, 1)
            for _ in range(2):
                await off_loop(site.work)
            if not restarts:
                for _ in range(2):
                    await off_loop(site.work)
                await off_loop(house.operator.wait)
            else:
                before = await off_loop(site.next)
                newcomer = await off_loop(client.poll, wait_seconds=0)
            report = await off_loop(house.operator.report)
        if restarts:
            async with open_house(folder) as house:
                client.close()
                site.client = back_in(house, credential)
                after = await off_loop(site.next)
                assert (after.assignment_id, after.model) == (before.assignment_id, before.model)
                again = await off_loop(site.client.poll, wait_seconds=0)
                assert again.assignments[0].model == newcomer.assignments[0].model
                for _ in range(2):
                    await off_loop(site.work)
                await off_loop(house.operator.wait)
                report = await off_loop(house.operator.report)
        site.close()
        digests.append([version.digest for version in report.models])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 5


# Evaluation at the coordinator


TASK = """
import torch
from fed_core.workload import Workload

class Echo(Workload):
    name = "echo"

    def model(self):
        return torch.nn.Linear(40, 30, bias=False)

    def train_data(self, site):
        raise AssertionError("no business of the coordinator")

    def coordinator_data(self, path):
        return torch.ones(4, 40), torch.ones(4, 1)

    def loss(self, model, batch):
        return model.weight.double().square().sum()

    def metrics(self, model, batch):
        return {"accuracy": model.weight.double().abs().sum()}
"""


@pytest.mark.xdist_group("evaluation")
async def test_the_coordinator_measures_the_version_that_clients_have(tmp_path: Path) -> None:
    """And not the master weights, which nobody else ever sees."""
    (tmp_path / "task.py").write_text(TASK)
    text = compressed(size=1, quorum=1, max_rounds=2, at="coordinator")
    async with open_house(tmp_path / "data", workloads=[str(tmp_path / "task.py")]) as house:
        weights = {"weight": torch.randn(30, 40, generator=torch.Generator().manual_seed(0))}
        await off_loop(house.operator.submit, text, weights)
        async with sites(house, "site") as (site,):
            masters = {}
            for version in (0, 1):
                assignment = await off_loop(site.next)
                masters[version] = await off_loop(stored, house, "masters", version)
                await off_loop(site.work, assignment)
            await off_loop(house.operator.wait)
        for version in (await off_loop(house.operator.report)).models[1:2]:
            measured = {metric.name: metric.value for metric in version.metrics}
            seen = (await off_loop(stored, house, "models", version.version))["weight"]
            assert measured["accuracy"] == pytest.approx(float(seen.double().abs().sum()), rel=1e-6)
            hidden = masters[version.version]["weight"]
            assert measured["accuracy"] != pytest.approx(float(hidden.double().abs().sum()), rel=1e-4)
