"""What the evaluating process does."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from fed_core.batches import choose_device, evaluate, num_examples, reproducible
from fed_core.child_process import Json, OnProgress
from fed_core.errors import ConfigError, InvalidError
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import explain_difference
from fed_core.tensors import load_tensors, model_specs
from fed_core.workload import Data, Workload, initial_model, load_workload


class EvaluationJobs:
    """One workload and the coordinator's data for it, read when first needed and kept."""

    def __init__(self, settings: Json) -> None:
        self._settings = settings

    def answer(self, request: Json, on_progress: OnProgress) -> Json:
        """Does one request of `fed_server.evaluation.evaluator`."""
        if request["do"] == "describe":
            return {"name": self._workload.name, "num_examples": num_examples(self._data)}
        return self._evaluate(Path(request["model_path"]), request["batch_size"], on_progress)

    @cached_property
    def _workload(self) -> Workload:
        return load_workload(self._settings["workload"])

    @cached_property
    def _device(self) -> torch.device:
        return choose_device(self._settings["device"])

    @cached_property
    def _data(self) -> Data:
        path = self._settings["data"]
        with reproducible(0, self._settings["num_threads"]):
            data = self._workload.coordinator_data(Path(path) if path is not None else None)
        if data is None:
            raise ConfigError(
                f"workload {self._workload.name!r} has no coordinator_data; define it, or evaluate at the clients only"
            )
        return data

    def _evaluate(self, model_path: Path, batch_size: int, on_progress: OnProgress) -> Json:
        with reproducible(0, self._settings["num_threads"]):
            model = initial_model(self._workload, 0)
            with SafetensorsReader(model_path) as version:
                difference = explain_difference(version.specs, model_specs(model))
                if difference:
                    raise InvalidError(
                        f"the workload's model at the coordinator is not the run's: {difference}; install the version of the "
                        "workload that the run was made with"
                    )
                load_tensors(model, {spec.name: version.tensor(spec.name) for spec in version.specs})
            total, metrics = evaluate(
                self._workload,
                model.to(self._device),
                self._data,
                batch_size,
                self._device,
                lambda done, all: on_progress(done, all, {}),
            )
        return {"num_examples": total, "metrics": metrics}
