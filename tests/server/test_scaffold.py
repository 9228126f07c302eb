"""SCAFFOLD over the real service: the paper's algorithm, c = mean of c_i, and what is refused."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.light_client import LightClient, MemoryFile, constant, encode_update
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.registry import EncodingConfig
from fed_core.errors import ConfigError, DiskFullError, NotFoundError, UpdateRefusedError
from fed_core.payload.reader import PayloadReader
from fed_core.plan import SiteOverrides
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_server.aggregation.base import AggregatorSetting
from fed_server.aggregation.grid import grid_policy, make_grid
from fed_server.aggregation.mean import WeightedMean
from fed_server.aggregation.variate import WithVariate, variate_grid
from fed_server.config import parse_run_config
from fed_server.rounds import variate
from fed_server.store.blobs import DataDirectory
from fedstream.v1 import common_pb2, participation_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import open_house, until
from tests.server.training_sites import MODEL, NUM_EXAMPLES, SITES, TrainingSite, examples, play, version

RATE, STEPS, MOMENTUM, DECAY = 0.125, 5, 0.5, 0.01
SCAFFOLD = f"""
[training]
local_work = {{ kind = "steps", steps = {STEPS} }}
batch_size = 64
objective = {{ kind = "scaffold", population = 3 }}
optimizer = {{ kind = "sgd", learning_rate = {RATE}, momentum = {MOMENTUM}, weight_decay = {DECAY} }}
overridable = ["learning_rate", "optimizer", "local_work"]
[keep]
versions = 99
"""
OVERRIDES = {"b": SiteOverrides(optimizer="adam"), "c": SiteOverrides(learning_rate=RATE / 2, steps=STEPS - 2)}


def text(rounds: int, size: int = 2, extra: str = SCAFFOLD) -> str:
    toml = config(
        size=size, quorum=size, max_rounds=rounds, extra=extra + '[aggregation]\nkind = "mean"\nbound = 64.0\n'
    )
    return toml.replace("[cohort]\n", '[cohort]\nselection = "round_robin"\nmin_clients = 3\n')


def oracle(cohorts: Sequence[set[str]]) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Algorithm 1 of the paper with its letters, option II, in float64: x after every round, c and c_i after the last. The paper's
    K eta is what all gradients of a round weigh in the update."""
    x, c = torch.zeros(5).double(), torch.zeros(5).double()
    c_of = {name: torch.zeros(5).double() for name in SITES}
    versions = []
    for cohort in cohorts:
        trained, changes = {}, {}
        for name in sorted(cohort):
            features, targets = (values.double() for values in examples(name))
            rate, steps = (RATE / 2, STEPS - 2) if name == "c" else (RATE, STEPS)
            y, velocity = x.clone(), torch.zeros(5).double()
            k_eta = sum(rate * sum(MOMENTUM**j for j in range(k + 1)) for k in range(steps))
            for _ in range(steps):
                gradient = features.T @ (features @ y - targets) / len(targets) - c_of[name] + c + DECAY * y
                velocity = MOMENTUM * velocity + gradient
                y = y - rate * velocity
            c_plus = c_of[name] - c + (x - y) / k_eta
            changes[name] = c_plus - c_of[name]
            c_of[name] = c_plus
            trained[name] = y
        total = sum(NUM_EXAMPLES[name] for name in cohort)
        x = x + sum((NUM_EXAMPLES[name] * (trained[name] - x) for name in cohort), torch.zeros(5).double()) / total
        c = c + sum(changes.values(), torch.zeros(5).double()) / len(SITES)
        versions.append(x)
    return versions, c, c_of


def kept(house: House, number: int) -> dict[str, Tensor]:
    """The coordinator's c after a version."""
    run_id = house.operator.run().run_id
    path = house.app.settings.data_dir / "masters" / run_id / f"{number}.variate.safetensors"
    with SafetensorsReader(path) as reader:
        return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


@pytest.mark.parametrize("encoding", [RawConfig(), variate.ENCODING], ids=["raw", "as it is"])
async def test_versions_are_those_of_the_paper_and_c_is_the_mean_of_the_sites(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: EncodingConfig
) -> None:
    """Exactly where c travels as it is, and nearly where it does in 8 bits. That c is the mean is exact in both."""
    monkeypatch.setattr(variate, "ENCODING", encoding)
    tolerance: dict[str, float] = (
        {"rtol": 1e-4, "atol": 1e-5} if encoding.kind == "raw" else {"rtol": 0.02, "atol": 0.02}
    )
    await off_loop(house.operator.submit, text(7), MODEL)
    sites = [await off_loop(TrainingSite, house, name, tmp_path / name, OVERRIDES.get(name)) for name in SITES]
    cohorts = await play(house, sites, range(1, 7))
    assert {len(cohort) for cohort in cohorts} == {2}
    assert set.union(*cohorts) == set(SITES)
    # What has no work that can be told is not allowed; the rest of the overrides is.
    assert [len(site.refused) for site in sites] == [0, 1, 0]

    run_id = (await off_loop(house.operator.run)).run_id
    c, carried = await off_loop(kept, house, 6), [site.variate(run_id) for site in sites]
    for name in ("w", "unused"):
        mean = torch.stack([each[name] for each in carried]).mean(0)
        torch.testing.assert_close(c[name], mean, rtol=1e-5, atol=1e-6)
    versions, expected, of_site = oracle(cohorts)
    torch.testing.assert_close(c["w"].double(), expected, **tolerance)
    for site, each in zip(sites, carried, strict=True):
        torch.testing.assert_close(each["w"].double(), of_site[site.name], **tolerance)
    for number, x in enumerate(versions, start=1):
        made = await off_loop(version, house, number)
        torch.testing.assert_close(made["w"].double(), x, **tolerance)

    await asyncio.gather(*(off_loop(site.client.poll, wait_seconds=1) for site in sites))
    report = await off_loop(house.operator.report)
    fetched = {
        round.round: [
            client.downlink for client in round.clients if client.assignment_kind == common_pb2.ASSIGNMENT_KIND_TRAIN
        ]
        for round in report.rounds
    }
    variate_bytes = 4 * (5 + 2)
    assert {each.raw_bytes for each in fetched[1]} == {variate_bytes + 4}
    assert {each.raw_bytes for each in fetched[2]} == {2 * variate_bytes + 4}
    payloads = house.app.settings.data_dir / "payloads"
    of_variates = [
        path for path in payloads.iterdir() if PayloadReader(path).manifest.kind == common_pb2.PAYLOAD_KIND_VARIATE
    ]
    assert len(of_variates) == 1, "one a version, whoever asks; the earlier ones are deleted"


@pytest.mark.parametrize("uplink", ['kind = "uniform"\nbits = 3', 'kind = "sign"', 'kind = "auto"'])
async def test_c_is_the_mean_of_the_sites_whatever_the_updates_lose(house: House, tmp_path: Path, uplink: str) -> None:
    """Both sides go by what the coordinator decodes, with error feedback too."""
    toml = text(6).replace('[uplink]\nkind = "raw"', f"[uplink]\n{uplink}")
    assert uplink in toml
    await off_loop(house.operator.submit, toml, MODEL)
    sites = [await off_loop(TrainingSite, house, name, tmp_path / name, OVERRIDES.get(name)) for name in SITES]
    await play(house, sites, range(1, 6))
    run_id = (await off_loop(house.operator.run)).run_id
    c = await off_loop(kept, house, 5)
    assert c["w"].abs().max() > 0.05
    for name, tensor in c.items():
        mean = torch.stack([site.variate(run_id)[name] for site in sites]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)


async def test_a_restart_changes_no_bit(tmp_path: Path) -> None:
    results = []
    for name, restarts in (("well", []), ("restarted", [1, 3])):
        sites: list[TrainingSite] = []
        for first, last in itertools.pairwise([0, *restarts, 4]):
            async with open_house(tmp_path / name) as house:
                if not sites:
                    await off_loop(house.operator.submit, text(5, size=3), MODEL)
                    folder = tmp_path / name / "sites"
                    sites = [await off_loop(TrainingSite, house, site, folder / site) for site in SITES]
                else:
                    for site in sites:
                        site.come_back(house)
                await play(house, sites, range(first + 1, last + 1))
                if last == 4:
                    digests = [model.digest for model in (await off_loop(house.operator.report)).models]
                    results.append((digests, {n: t.tolist() for n, t in (await off_loop(kept, house, 4)).items()}))
                for site in sites:
                    site.client.close()
    assert results[0] == results[1]
    assert len(set(results[0][0])) == 5
    assert any(results[0][1]["w"])


def send(client: LightClient, work: float, value: float = 0.25) -> participation_pb2.Assignment:
    assignment = client.next_assignment()
    manifest, _ = client.model(assignment)
    client.upload(assignment.assignment_id, encode_update(assignment, manifest.specs, constant(value), work=work))
    return assignment


ALONE = SCAFFOLD.replace("population = 3", "population = 2")


async def test_the_first_rounds_by_hand(house: House) -> None:
    """One of two sites sends; every update is 0.25, and the work behind it 0.5, then 1."""
    toml = text(3, size=1, extra=ALONE).replace("min_clients = 3", "min_clients = 1")
    await off_loop(house.operator.submit, toml)
    client = await off_loop(house.client, "a")
    first = await off_loop(send, client, 0.5)
    assert first.plan.objective == common_pb2.ObjectivePlan(kind=common_pb2.OBJECTIVE_KIND_SCAFFOLD)
    assert not first.HasField("variate")
    await until(lambda: house.operator.run().model_version == 1)
    assert (await off_loop(kept, house, 1))["w"].unique().tolist() == [-0.25]  # (-0 - 0.25 / 0.5) / 2
    second = await off_loop(send, client, 1.0)
    assert second.variate.kind == common_pb2.PAYLOAD_KIND_VARIATE
    await until(lambda: house.operator.run().model_version == 2)
    # -0.25 + (0.25 - 0.25 / 1) / 2, but for what 8 bits lose.
    assert (await off_loop(kept, house, 2))["w"].unique().tolist() == pytest.approx([-0.25], rel=1e-3)


@pytest.mark.parametrize(
    ("extra", "work", "reason"),
    [
        (ALONE, 0.0, "work = 0, and updates of this run are to say what work is behind them"),
        ("", 1.0, "work = 1, and updates of this run are to say nothing of it"),
        (ALONE, 1e-5, r"work = 1e-05, expected at least 0\.00012207; raise the site's learning rate"),
    ],
)  # fmt: skip
async def test_an_update_that_does_not_say_its_work_as_asked_is_refused(
    house: House, extra: str, work: float, reason: str
) -> None:
    await off_loop(house.operator.submit, text(1, size=1, extra=extra).replace("min_clients = 3", "min_clients = 1"))
    client = await off_loop(house.client, "a")
    with pytest.raises(UpdateRefusedError, match=reason):
        await off_loop(send, client, work)


async def test_a_lost_payload_is_made_again_to_the_same_bits(house: House) -> None:
    await off_loop(house.operator.submit, text(3, size=1, extra=ALONE).replace("min_clients = 3", "min_clients = 1"))
    client = await off_loop(house.client, "a")
    await off_loop(send, client, 0.5, 0.3)
    await until(lambda: house.operator.run().model_version == 1)
    assignment = await off_loop(client.next_assignment)
    path = house.app.settings.data_dir / "payloads" / f"{assignment.variate.digest.hex()}.payload"
    before = path.read_bytes()
    path.unlink()
    with MemoryFile() as file:
        with pytest.raises(NotFoundError, match="no longer kept"):
            await off_loop(client.fetch, assignment.assignment_id, assignment.variate, file)
        assert (await off_loop(client.next_assignment)).variate == assignment.variate
        await off_loop(client.fetch, assignment.assignment_id, assignment.variate, file)
    assert path.read_bytes() == before


async def test_the_disk_must_hold_the_variate_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"w": torch.zeros(1000), "b.mean": torch.zeros(10)}
    enough = 4040 * (3 + 6 + 1) + 2 * 2 * 4000
    toml = text(1, size=1, extra=ALONE.replace("versions = 99", "versions = 3")).replace(
        "min_clients = 3", "min_clients = 1"
    )
    monkeypatch.setattr(DataDirectory, "free_bytes", lambda self: enough - 1)
    with pytest.raises(DiskFullError, match="needs"):
        await off_loop(house.operator.submit, toml, model)
    monkeypatch.setattr(DataDirectory, "free_bytes", lambda self: enough)
    await off_loop(house.operator.submit, toml, model)


# -- the sum -----------------------------------------------------------------------------------------------------------

SPECS = [
    TensorSpec("w", (70, 1000), "float32"),
    TensorSpec("half", (33,), "bfloat16"),
    TensorSpec("complex", (5,), "complex64"),
    TensorSpec("b.mean", (7,), "float32", "buffer"),
    TensorSpec("count", (), "int64", "buffer"),
]
ASSIGNMENT = participation_pb2.Assignment(assignment_id="a", run_id="r", round=1)
ASSIGNMENT.model.digest = b"m" * 32


def summed(folder: Path, updates: Sequence[tuple[int, float]]) -> dict[str, Tensor]:
    """The second sum over updates of (seed, work), in that order."""
    policy = grid_policy(16, None, None)
    grid = make_grid(SPECS, {}, policy)
    rules: Mapping[str, object] = {spec.name: "maximum" if spec.name == "count" else "mean" for spec in SPECS}
    setting = AggregatorSetting(SPECS, grid, rules, folder)  # type: ignore[arg-type]
    mean = WeightedMean(SPECS, grid, rules)  # type: ignore[arg-type]
    aggregate = WithVariate(mean, setting, variate_grid(grid, policy, 1e-4))
    for number, (seed, work) in enumerate(updates):
        update = encode_update(ASSIGNMENT, tuple(SPECS), lambda spec, seed=seed: values(spec, seed), work=work)
        path = folder / f"{number}.update"
        path.write_bytes(update.data)
        with PayloadReader(path) as reader:
            aggregate.add(reader, 3)
    assert aggregate.num_updates == len(updates)
    assert aggregate.total_weight == 3 * len(updates)
    return {
        spec.name: aggregate.report_quotients(spec.name, 0, spec.num_elements * spec.reals_per_element)
        for spec in SPECS[:3]
    }


def values(spec: TensorSpec, seed: int) -> Tensor:
    if spec.dtype == "int64":
        return torch.tensor(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return torch.randn(spec.shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)


@settings(max_examples=10, deadline=None)
@given(works=st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=5), order=st.randoms(use_true_random=False))
def test_the_sum_is_that_of_the_quotients_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, works: list[float], order: object
) -> None:
    updates = list(enumerate(works))
    first = summed(tmp_path_factory.mktemp("first"), updates)
    order.shuffle(updates)  # type: ignore[attr-defined]
    again = summed(tmp_path_factory.mktemp("again"), updates)
    for spec in SPECS[:3]:
        assert torch.equal(first[spec.name], again[spec.name])
        exact = torch.zeros_like(first[spec.name])
        for seed, work in updates:
            update = values(spec, seed)
            exact += (torch.view_as_real(update) if update.is_complex() else update).reshape(-1).double() / work
        torch.testing.assert_close(first[spec.name], exact, rtol=1e-9, atol=1e-6)


def test_the_grid_holds_what_the_largest_cohort_can_bring() -> None:
    """Every update at its bound, with the least work: the steps stay below 2^53."""
    for cohort, bound in itertools.product((1, 7, 1000), (None, 16.0)):
        policy = grid_policy(cohort, None, bound)
        spec = TensorSpec("w", (1,), "float32")
        grid = make_grid([spec], {"w": 3.0}, policy)
        largest = bound or 32.0
        for least in (1e-5, 0.125, 3.0):
            exponent = variate_grid(grid, policy, least)["w"]
            assert 2**48 < cohort * largest / least / 2.0**exponent < 2**53


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (", population = 3", "", "training.objective.population: is missing; write population = 10 under"),
        ("population = 3", "population = 2", "training.objective.population: expected at least cohort.min_clients (3), got 2"),
        ("population = 3", "population = 3, strength = 1", "training.objective.strength: there is no such key"),
        (
            f'kind = "sgd", learning_rate = {RATE}, momentum = {MOMENTUM}, weight_decay = {DECAY}',
            'kind = "adamw"',
            "training.objective: scaffold divides updates by the work of sgd, and the optimizer is adamw",
        ),
        ('kind = "mean"', 'kind = "median"\nnum_byzantine = 1', "aggregation.kind: scaffold adds up what all sites send"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused_with_the_cure(before: str, after: str, expected: str) -> None:
    toml = text(3, size=3)
    assert before in toml
    with pytest.raises(ConfigError) as caught:
        parse_run_config(toml.replace(before, after))
    assert expected in str(caught.value)


def test_any_server_optimizer_goes_with_it() -> None:
    run = parse_run_config(text(3).replace("[keep]", '[server_optimizer]\nkind = "adam"\n[keep]'))
    assert run.server_optimizer.kind == "adam"
