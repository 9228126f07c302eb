"""What the trainer process does: describe its workload, train and write an update, evaluate."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fed_client.training.loop import train
from fed_core.batches import check_metric_names, choose_device, evaluate, num_examples, reproducible
from fed_core.child_process import Json, OnProgress
from fed_core.codecs.base import TileSource
from fed_core.errors import DiskFullError, InvalidError, NotFiniteError
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, write_payload
from fed_core.plan import TrainingPlan
from fed_core.specs import TensorSpec, explain_difference, fingerprint
from fed_core.tensors import check_finite, difference, load_tensors, model_specs, model_tensors
from fed_core.workload import Data, Site, Workload, initial_model, load_workload
from fedstream.v1 import common_pb2

_FULL = {errno.ENOSPC, errno.EDQUOT}


class FingerprintMismatchError(InvalidError):
    """The site's model and the run's differ."""


def kind_of(error: BaseException) -> str:
    """Name of the contract's FailureKind for what a job raised."""
    if isinstance(error, FingerprintMismatchError):
        return "FINGERPRINT_MISMATCH"
    if isinstance(error, NotFiniteError):
        return "NOT_FINITE"
    if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _FULL):
        return "DISK_FULL"
    return "WORKLOAD"


class SiteJobs:
    """One workload at one site. The data is read when first needed and kept; nothing else is carried between jobs."""

    def __init__(self, settings: Json) -> None:
        self._settings = settings

    def answer(self, request: Json, on_progress: OnProgress) -> Json:
        """Does one request of `fed_client.training.trainer`."""
        jobs: dict[str, Callable[..., Json]] = {
            "describe": self._describe,
            "train": self._train,
            "evaluate": self._evaluate,
        }
        return jobs[request.pop("do")](on_progress=on_progress, **request)

    # What may fail is read here and not in the constructor, so that every request says why.

    @cached_property
    def _workload(self) -> Workload:
        return load_workload(self._settings["workload"])

    @cached_property
    def _device(self) -> torch.device:
        return choose_device(self._settings["device"])

    @cached_property
    def _site(self) -> Site:
        site = self._settings["site"]
        return Site(site["name"], Path(site["data"]) if site["data"] is not None else None, site["options"])

    @cached_property
    def _train_data(self) -> Data:
        with reproducible(0, torch.get_num_threads()):  # a random split must be the same after a restart
            return self._workload.train_data(self._site)

    @cached_property
    def _evaluation_data(self) -> Data | None:
        with reproducible(0, torch.get_num_threads()):
            return self._workload.evaluation_data(self._site)

    def _describe(self, reads_data: bool, on_progress: OnProgress) -> Json:
        specs = model_specs(initial_model(self._workload, 0))
        held_out = self._evaluation_data if reads_data else None
        return {
            "name": self._workload.name,
            "version": self._workload.version,
            "fingerprint": fingerprint(specs).hex(),
            "num_tensors": len(specs),
            "num_parameters": sum(spec.num_elements for spec in specs),
            "device": str(self._device),
            "num_examples": num_examples(self._train_data) if reads_data else None,
            "num_evaluation_examples": num_examples(held_out) if held_out is not None else 0 if reads_data else None,
        }

    def _train(
        self,
        *,
        assignment_id: str,
        run_id: str,
        round: int,
        model_version: int,
        model_path: str,
        base_digest: str,
        plan: Json,
        fingerprint: str,
        codec: str,
        out_path: str,
        on_progress: OnProgress,
    ) -> Json:
        training = TrainingPlan.from_json(plan)
        with PayloadReader(Path(model_path), bytes.fromhex(base_digest)) as base:
            with reproducible(training.seed, training.num_threads):
                model, specs = self._load(base, fingerprint, training.seed)
            outcome = train(self._workload, model, self._train_data, training, self._device, on_progress)
            check_metric_names(outcome.metrics)
            update = UpdateInfo(
                assignment_id=assignment_id,
                num_examples=outcome.num_examples,
                custom_weight=self._workload.custom_weight(self._site, outcome.num_examples),
                num_steps=outcome.num_steps,
                is_partial=outcome.is_partial,
                training_seconds=outcome.seconds,
                metrics=outcome.metrics,
            )
            local = model_tensors(model)
            with _published(Path(out_path)) as write:
                written = write(
                    kind=common_pb2.PAYLOAD_KIND_UPDATE,
                    run_id=run_id,
                    round=round,
                    model_version=model_version,
                    base_digest=base.manifest.digest,
                    update=update,
                    tensors=[(spec, _update_of(spec.name, local[spec.name], base)) for spec in specs],
                    codec=codec,
                )
        return {
            "digest": written.digest.hex(),
            "total_bytes": written.total_bytes,
            "raw_bytes": written.raw_bytes,
            "num_examples": outcome.num_examples,
            "num_steps": outcome.num_steps,
            "is_partial": outcome.is_partial,
            "seconds": outcome.seconds,
            "metrics": dict(outcome.metrics),
        }

    def _evaluate(
        self,
        *,
        model_path: str,
        fingerprint: str,
        batch_size: int,
        seed: int,
        num_threads: int,
        on_progress: OnProgress,
    ) -> Json:
        data = self._evaluation_data
        if data is None:
            return {"num_examples": 0, "metrics": {}}
        with reproducible(seed, num_threads):
            with PayloadReader(Path(model_path)) as payload:
                model, _ = self._load(payload, fingerprint, seed)
            total, metrics = evaluate(
                self._workload, model, data, batch_size, self._device, lambda done, all: on_progress(done, all, {})
            )
        return {"num_examples": total, "metrics": metrics}

    def _load(self, payload: PayloadReader, expected: str, seed: int) -> tuple[nn.Module, list[TensorSpec]]:
        """The workload's model with the payload's values, on the device. Raises FingerprintMismatchError."""
        model = initial_model(self._workload, seed)
        specs = model_specs(model)
        if fingerprint(specs).hex() != expected:
            difference = (
                explain_difference(payload.manifest.specs, specs) or "the run's own model does not fit its fingerprint"
            )
            raise FingerprintMismatchError(
                f"the model of workload {self._workload.name!r} (version {self._workload.version!r}) at this site is not the "
                f"run's: {difference}; install the version of the workload that the run was made with"
            )
        load_tensors(model, payload.tensors(verify=True))
        return model.to(self._device), specs


def _update_of(name: str, local: Tensor, base: PayloadReader) -> TileSource:
    """One tensor's share of the update, tile by tile. Memory: this tensor, from its first tile to its last."""
    whole: list[Tensor] = []

    def tile(first: int, num_coordinates: int) -> Tensor:
        if not whole:
            whole.append(difference(local.cpu(), base.tensor(name)).reshape(-1))
            check_finite(name, whole[0])
        part = whole[0][first : first + num_coordinates]
        if first + num_coordinates == whole[0].numel():
            whole.clear()
        return part

    return tile


@contextmanager
def _published(path: Path) -> Iterator[Callable[..., Written]]:
    """A function that writes the payload; when the block ends it has its name, durably. Nothing is left of a failure."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:

            def write(**payload: Any) -> Written:
                return write_payload(file, **payload)

            yield write
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise DiskFullError(
                f"no space left for the update in {path.parent}: free some, or move the state directory to a larger disk"
            ) from error
        raise
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
