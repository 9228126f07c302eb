"""What the trainer process does: describe its workload, make a model of deltas, train and write an update, evaluate."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from fed_client.training.leaving import Update, Write, also_telling
from fed_client.training.local_privacy import protect, released_names
from fed_client.training.loop import train
from fed_client.training.refusal import CannotDoError
from fed_client.training.residual import RESIDUAL, write_with_feedback
from fed_client.training.trainer import MODEL_DAMAGED
from fed_client.training.variates import VARIATE, NextVariate, add_common, read_corrections
from fed_core.batches import check_metric_names, choose_device, evaluate, mean_loss, num_examples, reproducible
from fed_core.child_process import Json, OnProgress
from fed_core.codecs.registry import EncodingConfig, encoding_from_json
from fed_core.errors import CorruptError, DiskFullError, FedstreamError, InvalidError, NotFiniteError, PayloadError
from fed_core.payload.assemble import DivergedError, assemble_model
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.verify import verify_file
from fed_core.payload.writer import OnDecoded, Written, write_payload
from fed_core.plan import TrainingPlan
from fed_core.specs import PARAMETER, TensorSpec, explain_difference, fingerprint, is_floating
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
    if isinstance(error, CannotDoError):
        return "REFUSED_BY_SITE"
    if isinstance(error, CorruptError):
        return MODEL_DAMAGED
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
            "assemble": self._assemble,
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

    def _assemble(
        self,
        *,
        base: list[str] | None,
        steps: list[list[str]],
        digest: str,
        out_path: str,
        on_progress: OnProgress,
    ) -> Json:
        on_progress(0, 1, {})
        begin = time.monotonic()
        files = [(Path(path), bytes.fromhex(name)) for path, name in ([base] if base is not None else []) + steps]
        came_out, damaged = "", list[str]()
        try:
            came_out = _assemble(files, base is not None, bytes.fromhex(digest), Path(out_path))
        except (PayloadError, CorruptError, FileNotFoundError) as error:
            # Whatever went wrong: files that are not what they were explain it, and only they can be had again.
            damaged = _damaged(files)
            if not damaged:
                if not isinstance(error, DivergedError):
                    raise CannotDoError(f"the model cannot be made of what the coordinator sent: {error}") from error
                came_out = error.digest
        return {"digest": came_out, "damaged": damaged, "seconds": time.monotonic() - begin}

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
        uplink: str,
        out_path: str,
        carried: dict[str, tuple[str, str]],
        carry_to: str | None,
        common: tuple[str, str] | None = None,
        sent_metrics: Json,
        num_accounted: int | None,
        on_progress: OnProgress,
    ) -> Json:
        encoding = _encoding(uplink)
        training = TrainingPlan.from_json(plan)
        privacy = training.privacy
        if num_accounted not in (None, num_examples(self._train_data)):
            raise CannotDoError(
                "the site's data changed while it was accounted for; the next assignment finds it as it is"
            )
        with _open_model(model_path, base_digest) as base:
            with reproducible(training.seed, training.num_threads):
                model, specs = self._load(base, fingerprint, training.seed)
            released = released_names(model) if privacy is not None else None
            measured = self._measure_before(model, training)
            corrections, problem = None, ""
            if training.objective.has_variate:
                corrections, problem = read_corrections(specs, carried.get(VARIATE))
                if common is not None:
                    with _open_model(*common) as payload:
                        add_common(corrections, specs, payload)
            outcome = train(
                self._workload,
                model,
                self._train_data,
                training,
                self._device,
                on_progress,
                corrections=corrections,
            )
            metrics = dict(outcome.metrics) | measured | self._measure_after(model, training)
            check_metric_names(metrics)
            info = UpdateInfo(
                assignment_id=assignment_id,
                num_examples=outcome.num_examples,
                custom_weight=self._workload.custom_weight(self._site, outcome.num_examples),
                num_steps=outcome.num_steps,
                is_partial=outcome.is_partial,
                training_seconds=outcome.seconds,
                metrics=metrics,
                normalizer=outcome.normalizer,
                work=outcome.work,
            )
            if privacy is not None:
                info = UpdateInfo(assignment_id, num_examples=1, custom_weight=1, metrics=sent_metrics)
            is_checked = privacy is None or privacy.kind != "local"
            update = _update(model, base, specs, outcome.normalizer, released, is_checked)
        del model  # an encoding may need room, and the update is all that is left to do

        def write(tensors: Update, on_decoded: OnDecoded | None = None) -> Written:
            with reproducible(training.seed, training.num_threads), _published(Path(out_path)) as file:
                try:
                    return write_payload(
                        file,
                        kind=common_pb2.PAYLOAD_KIND_UPDATE,
                        run_id=run_id,
                        round=round,
                        model_version=model_version,
                        base_digest=bytes.fromhex(base_digest),
                        update=info,
                        tensors=tensors,
                        encoding=encoding,
                        seed=training.seed,
                        on_decoded=on_decoded,
                    )
                except PayloadError as error:
                    raise CannotDoError(f"the update cannot be encoded as the coordinator asks: {error}") from error

        def protecting(tensors: Update) -> None:
            if privacy is not None and privacy.kind == "local" and released is not None:
                protect(tensors, released, privacy)

        left: dict[str, str] | None = None
        not_carried = [problem]
        with ExitStack() as stack:
            writing: Write = write
            variate: NextVariate | None = None
            if corrections is not None and carry_to is not None:
                factor = 1 / outcome.work if outcome.work else training.objective.strength
                following = NextVariate(Path(f"{carry_to}.{VARIATE}"), specs, corrections, factor)
                variate = stack.enter_context(following)
                writing = also_telling(variate.keep, write)
            if encoding.wants_feedback and carry_to is not None:
                following_residual = Path(f"{carry_to}.{RESIDUAL}")
                fed_back = write_with_feedback(writing, update, carried.get(RESIDUAL), following_residual, protecting)
                written, left = fed_back.written, fed_back.carried
                not_carried += fed_back.problems
            else:
                protecting(update)
                written = writing(update, None)
            if variate is not None:
                left = (left or {}) | variate.finish()
                not_carried.append(variate.problem)
        return {
            "digest": written.digest.hex(),
            "total_bytes": written.total_bytes,
            "raw_bytes": written.raw_bytes,
            "error": written.fidelity.error,
            "gain": written.fidelity.gain,
            "codecs": written.codecs,
            "num_examples": outcome.num_examples,
            "num_steps": outcome.num_steps,
            "is_partial": outcome.is_partial,
            "seconds": outcome.seconds,
            "metrics": metrics,
            "carried": left,
            "not_carried": [problem for problem in not_carried if problem],
        }

    def _measure_before(self, model: nn.Module, plan: TrainingPlan) -> dict[str, float]:
        """What the plan wants measured before the training. Raises CannotDoError where the site could not measure the rest after
        it."""
        if "validation_loss" in plan.measures:
            held_out = self._evaluation_data
            if held_out is None or not num_examples(held_out):
                raise CannotDoError(
                    "this run weights updates by the loss on the sites' evaluation data, and evaluation_data of the workload has "
                    "none at this site; hold some examples out, or leave the run"
                )
        if "received_loss" not in plan.measures:
            return {}
        with reproducible(plan.seed, plan.num_threads):
            loss = mean_loss(self._workload, model, self._train_data, plan.batch_size, self._device)
        return {"received_loss": loss}

    def _measure_after(self, model: nn.Module, plan: TrainingPlan) -> dict[str, float]:
        held_out = self._evaluation_data if "validation_loss" in plan.measures else None
        if held_out is None:
            return {}
        with reproducible(plan.seed, plan.num_threads):
            return {"validation_loss": mean_loss(self._workload, model, held_out, plan.batch_size, self._device)}

    def _evaluate(
        self,
        *,
        model_path: str,
        model_digest: str,
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
            with _open_model(model_path, model_digest) as payload:
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


def _encoding(uplink: str) -> EncodingConfig:
    try:
        return encoding_from_json(uplink)
    except InvalidError as error:
        raise CannotDoError(str(error)) from error


def _open_model(path: str, digest: str) -> PayloadReader:
    """The model, or another payload, that was verified when it came. Raises CorruptError where it is no longer what it was."""
    try:
        return PayloadReader(Path(path), bytes.fromhex(digest))
    except (PayloadError, CorruptError, FileNotFoundError) as error:
        raise CorruptError(f"{path} has rotted or is gone: {error}", offset=0) from error


def _update(
    model: nn.Module,
    base: PayloadReader,
    specs: Sequence[TensorSpec],
    normalizer: float,
    released: Collection[str] | None,
    is_checked: bool,
) -> Update:
    """What training changed, parameters divided by the normalizer if there is one, each tensor checked for NaN and infinity before
    anything is encoded unless `is_checked` is false. Where only some are `released`, the others are as they were received. Takes
    the model's gradients; memory: the update, and one tensor."""
    model.zero_grad(set_to_none=True)
    local = model_tensors(model)
    update: Update = []
    for spec in specs:
        received = base.tensor(spec.name, verify=True)
        is_released = released is None or spec.name in released
        change = difference(local[spec.name].cpu() if is_released else received, received)
        if normalizer and spec.role == PARAMETER and is_floating(spec.dtype):
            change = change.div_(normalizer)
        if is_checked:
            check_finite(spec.name, change)
        update.append((spec, change))
    return update


def _assemble(files: Sequence[tuple[Path, bytes]], has_base: bool, digest: bytes, out_path: Path) -> str:
    """Makes the model of that identity, of a base if there is one and steps; returns the identity in hex."""
    with ExitStack() as opened:
        payloads = [opened.enter_context(PayloadReader(path, name)) for path, name in files]
        led_to = payloads[-1].manifest.model_digest
        if led_to != digest:
            raise PayloadError(
                f"the payloads lead to the model {led_to.hex()[:16]}, the assignment asks for {digest.hex()[:16]}"
            )
        base, steps = (payloads[0], payloads[1:]) if has_base else (None, payloads)
        with _published(out_path) as file:
            return assemble_model(base, steps, file).digest.hex()


def _damaged(files: Sequence[tuple[Path, bytes]]) -> list[str]:
    """The digests of those files that do not verify, or are gone."""
    damaged = []
    for path, digest in files:
        try:
            verify_file(path, digest)
        except (FedstreamError, OSError):
            damaged.append(digest.hex())
    return damaged


@contextmanager
def _published(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name, durably, when the block ends. Nothing is left of a failure."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise DiskFullError(
                f"no space left for {path.name} in {path.parent}: free some, or move the state directory to a larger disk"
            ) from error
        raise
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
