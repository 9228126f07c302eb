"""The trainer's jobs without its process: a workload in a file, a model as it comes, and what would be sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fed_client.training.jobs import SiteJobs
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.plan import OptimizerPlan, PrivacyPlan, TrainingPlan
from fed_core.specs import fingerprint
from fed_core.tensors import model_specs, model_tensors
from fed_core.workload import initial_model, load_workload
from fedstream.v1 import common_pb2

LOCAL = PrivacyPlan("local", clipping_norm=1.0, noise_multiplier=0.5, delta=1e-3)
EXAMPLES = PrivacyPlan("examples", clipping_norm=1.0, noise_multiplier=1.0, delta=1e-3)


def plan(privacy: PrivacyPlan | None, **changes: Any) -> TrainingPlan:
    """Two steps of SGD with that guarantee."""
    made = {"batch_size": 8, "optimizer": OptimizerPlan("sgd", 0.1), "seed": 11, "steps": 2, "privacy": privacy}
    return TrainingPlan(**(made | changes))


@dataclass
class Jobs:
    """One site of the workload that the source says."""

    folder: Path
    source: str
    received: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        path = self.folder / "task.py"
        path.write_text(self.source)
        site = {"name": "north", "data": None, "options": {}}
        self.jobs = SiteJobs({"workload": str(path), "device": "cpu", "site": site})
        model = initial_model(load_workload(str(path)), 3)
        self.specs, self.received = model_specs(model), {k: v.clone() for k, v in model_tensors(model).items()}
        with (self.folder / "base.payload").open("wb") as file:
            self.base = write_payload(
                file,
                kind=common_pb2.PAYLOAD_KIND_MODEL,
                run_id="r",
                round=0,
                model_version=4,
                base_digest=b"",
                update=None,
                tensors=[(spec, self.received[spec.name]) for spec in self.specs],
            )

    def train(
        self, plan: TrainingPlan, uplink: str = '{"kind": "raw"}', num_accounted: int | None = None, **more: Any
    ) -> tuple[Mapping[str, Any], UpdateInfo, dict[str, Tensor]]:
        """What the job answers, and what the update says of itself and holds."""
        out = self.folder / "a1.update"
        answer = self.jobs.answer(
            {
                "do": "train",
                "assignment_id": "a1",
                "run_id": "r",
                "round": 5,
                "model_version": 4,
                "model_path": str(self.folder / "base.payload"),
                "base_digest": self.base.digest.hex(),
                "plan": plan.to_json(),
                "fingerprint": fingerprint(self.specs).hex(),
                "uplink": uplink,
                "out_path": str(out),
                "carried": {},
                "carry_to": None,
                "sent_metrics": {},
                "num_accounted": num_accounted,
            }
            | more,
            lambda *_: None,
        )
        with PayloadReader(out, bytes.fromhex(answer["digest"])) as reader:
            assert reader.manifest.update is not None
            return answer, reader.manifest.update, reader.tensors()


def longest(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm of all of them together."""
    return float(torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()]).norm())
