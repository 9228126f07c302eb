"""Sites that really train, in this process, on a problem whose gradients can be written down: least squares, site by site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.light_client import LightClient, MemoryFile, Update
from fed_client.carried import CarriedState
from fed_client.training.jobs import SiteJobs
from fed_core.plan import SiteOverrides, TrainingPlan, apply_overrides
from fed_core.safetensors_tiles import SafetensorsReader
from fedstream.v1 import participation_pb2
from tests.server.conftest import House, off_loop
from tests.server.houses import back_in, until

NUM_FEATURES = 5
SITES = ("a", "b", "c")
# Unequal, so that weights tell.
NUM_EXAMPLES = {"a": 4, "b": 8, "c": 12}

WORKLOAD = """
from pathlib import Path
import torch
from torch import nn
from fed_core.workload import Workload

class Slopes(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5))
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("b_seen", torch.zeros(()))
    def forward(self, x):
        if self.training:
            self.b_seen += 1
        return x @ self.w

class Squares(Workload):
    name = "echo"
    version = "1"
    def model(self):
        return Slopes()
    def train_data(self, site):
        return tuple(torch.load(Path(site.options["data"])))
    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean() / 2
"""

MODEL = {"w": torch.zeros(NUM_FEATURES), "unused": torch.zeros(2), "b_seen": torch.zeros(())}


def examples(name: str) -> tuple[Tensor, Tensor]:
    """(N, 5) features and (N,) targets of a site: every one has another minimum."""
    generator = torch.Generator().manual_seed(SITES.index(name))
    features = torch.randn(NUM_EXAMPLES[name], NUM_FEATURES, generator=generator)
    return features, features @ torch.randn(NUM_FEATURES, generator=generator) + 1


class TrainingSite:
    """One site: its trainer, what it carries over, and its connection."""

    def __init__(self, house: House, name: str, folder: Path, overrides: SiteOverrides | None = None) -> None:
        folder.mkdir(parents=True)
        self.name, self.folder, self.overrides = name, folder, overrides or SiteOverrides()
        (folder / "task.py").write_text(WORKLOAD)
        torch.save(list(examples(name)), folder / "data.pt")
        site = {"name": name, "data": None, "options": {"data": str(folder / "data.pt")}}
        self.jobs = SiteJobs({"workload": str(folder / "task.py"), "site": site, "device": "cpu"})
        (folder / "carried").mkdir()
        self.carried = CarriedState(folder / "carried", keep=2)
        self.client = LightClient(house.app.address)
        self.credential = self.client.enroll(house.app.tokens.join, name)
        self.rounds: list[int] = []
        self.refused: list[str] = []

    def come_back(self, house: House) -> None:
        """To another life of the coordinator."""
        self.client.close()
        self.client = back_in(house, self.credential)

    def train(self, assignment: participation_pb2.Assignment) -> dict[str, Any]:
        """Trains and spools, as the daemon does."""
        plan, self.refused = apply_overrides(TrainingPlan.from_proto(assignment.plan), self.overrides)
        run_id, assignment_id = assignment.run_id, assignment.assignment_id
        with MemoryFile() as model, MemoryFile() as variate:
            self.client.download(assignment, model)
            common = None
            if assignment.HasField("variate"):
                self.client.fetch(assignment_id, assignment.variate, variate)
                common = (variate.path, assignment.variate.digest.hex())
            answer = self.jobs.answer(
                {
                    "do": "train",
                    "assignment_id": assignment_id,
                    "run_id": run_id,
                    "round": assignment.round,
                    "model_version": assignment.model.version,
                    "model_path": model.path,
                    "base_digest": assignment.model.digest.hex(),
                    "plan": plan.to_json(),
                    "fingerprint": assignment.fingerprint.hex(),
                    "uplink": assignment.uplink,
                    "out_path": str(self.folder / "update"),
                    "carried": {
                        kind: (str(path), digest)
                        for kind, (path, digest) in self.carried.promoted(run_id, assignment.fingerprint).items()
                    },
                    "carry_to": str(self.carried.prefix(run_id, assignment_id)),
                    "common": common,
                    "sent_metrics": {},
                    "num_accounted": None,
                },
                lambda *_: None,
            )
        if answer["carried"] is not None:
            digest = bytes.fromhex(answer["digest"])
            self.carried.add(run_id, assignment_id, digest, assignment.fingerprint, answer["carried"])
        return answer

    def work(self, assignment: participation_pb2.Assignment) -> None:
        """Trains, uploads, and promotes on the receipt."""
        answer = self.train(assignment)
        update = Update(bytes.fromhex(answer["digest"]), (self.folder / "update").read_bytes())
        receipt = self.client.upload(assignment.assignment_id, update)
        self.carried.settle(assignment.run_id, assignment.assignment_id, receipt.digest)
        self.rounds.append(assignment.round)

    def variate(self, run_id: str) -> dict[str, Tensor]:
        """What it carries, zero where it carries nothing."""
        described = self.jobs.answer({"do": "describe", "reads_data": False}, lambda *_: None)
        promoted = self.carried.promoted(run_id, bytes.fromhex(described["fingerprint"]))
        if "variate" not in promoted:
            return {name: torch.zeros_like(value) for name, value in MODEL.items() if name != "b_seen"}
        with SafetensorsReader(promoted["variate"][0]) as reader:
            return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


async def play(house: House, sites: list[TrainingSite], rounds: range, run: str = "test") -> list[set[str]]:
    """Rounds of a run, one after the other: who was asked in each."""
    cohorts = []
    for number in rounds:
        for site in sites:
            await off_loop(site.client.poll, wait_seconds=0)
        await until(lambda number=number: house.operator.run(run).round == number)
        cohort = set()
        for site in sites:
            if work := (await off_loop(site.client.poll, wait_seconds=0)).assignments:
                cohort.add(site.name)
                await off_loop(site.work, work[0])
        cohorts.append(cohort)
        await until(lambda number=number: house.operator.run(run).model_version >= number)
    return cohorts


def version(house: House, number: int, run: str = "test") -> dict[str, Tensor]:
    """A version's tensors."""
    path = house.app.settings.data_dir / "models" / house.operator.run(run).run_id / f"{number}.safetensors"
    with SafetensorsReader(path) as reader:
        return {spec.name: reader.tensor(spec.name) for spec in reader.specs}
