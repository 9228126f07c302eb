"""Making version 0 of a run on the operator's machine, and streaming it to the coordinator.

The coordinator never runs a workload's code: the model is built here, under the run's seed, and travels as a payload.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fed_core.codecs.base import TileSource
from fed_core.errors import ConfigError, InvalidError
from fed_core.payload.frames import CHUNK_BYTES
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec, explain_difference
from fed_core.tensors import check_finite, dtype_name, model_specs, model_tensors
from fed_core.workload import Workload, initial_model, load_workload
from fed_server.cli.exit_codes import FileError
from fed_server.config import RunConfig
from fedstream.v1 import common_pb2, runs_pb2, transfer_pb2

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Version0:
    """A run's first model as a payload file."""

    path: Path
    digest: bytes
    total_bytes: int
    num_tensors: int
    num_parameters: int


def make_version_0(
    config: RunConfig, *, workload: str | None, init: Path | None, path: Path, on_progress: Progress | None = None
) -> Version0:
    """Writes the payload of version 0 to `path`: the workload's own model under the run's seed, or the tensors of a safetensors
    file, or both, in which case names, order and roles are the workload's and values the file's.

    Memory: one model. Raises ConfigError where workload and config disagree, InvalidError where the tensors do not fit or are not
    finite, FileError.
    """
    model = _built_model(config, workload) if workload is not None else None
    if init is not None:
        tensors = _from_safetensors(init, model)
    elif model is not None:
        values = model_tensors(model)
        tensors = [(spec, values[spec.name]) for spec in model_specs(model)]
    else:
        raise ConfigError(
            "a run needs a model to begin from",
            cure="give --workload SOURCE to build it, or --init FILE.safetensors to read it",
        )
    for spec, tensor in tensors:
        check_finite(spec.name, tensor)
    try:
        with path.open("wb+") as file:
            sources: list[tuple[TensorSpec, Tensor | TileSource]] = list(tensors)
            written = write_payload(
                file,
                kind=common_pb2.PAYLOAD_KIND_MODEL,
                run_id="",
                round=0,
                model_version=0,
                base_digest=b"",
                update=None,
                tensors=sources,
                codec=config.codec.kind,
                on_progress=on_progress,
            )
    except OSError as error:
        raise FileError(
            f"cannot write version 0 to {path.parent}: {error.strerror}",
            cure="make room there, or set TMPDIR to another folder",
        ) from error
    num_parameters = sum(spec.num_elements for spec, _ in tensors)
    return Version0(path, written.digest, written.total_bytes, len(tensors), num_parameters)


def create_requests(
    config_toml: str, version_0: Version0, on_progress: Progress | None = None
) -> Callable[[], Iterator[runs_pb2.CreateRunRequest]]:
    """The messages of CreateRun, as often as asked for: the same request id every time, so that a repeat is harmless."""
    request_id = uuid.uuid4().hex
    header = runs_pb2.CreateRunHeader(
        request_id=request_id,
        config_toml=config_toml,
        model=common_pb2.PayloadRef(
            digest=version_0.digest, total_bytes=version_0.total_bytes, kind=common_pb2.PAYLOAD_KIND_MODEL
        ),
    )

    def requests() -> Iterator[runs_pb2.CreateRunRequest]:
        yield runs_pb2.CreateRunRequest(header=header)
        offset = 0
        with version_0.path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield runs_pb2.CreateRunRequest(chunk=transfer_pb2.Chunk(offset=offset, data=data))
                offset += len(data)
                if on_progress is not None:
                    on_progress(offset, version_0.total_bytes)

    return requests


def _built_model(config: RunConfig, source: str) -> torch.nn.Module:
    workload = load_workload(source)
    _check_workload(config, workload, source)
    return initial_model(workload, config.seed)


def _check_workload(config: RunConfig, workload: Workload, source: str) -> None:
    if workload.name != config.workload:
        raise ConfigError(
            f"workload: the config names {config.workload!r}, and {source} is {workload.name!r}",
            cure=f'write workload = "{workload.name}" in the config, or give the source of {config.workload!r}',
        )
    if config.workload_version and workload.version != config.workload_version:
        raise ConfigError(
            f"workload_version: the config asks for {config.workload_version!r}, and {source} is version {workload.version!r}",
            cure=f'write workload_version = "{workload.version}" in the config, or install {config.workload_version!r}',
        )


def _from_safetensors(path: Path, model: torch.nn.Module | None) -> list[tuple[TensorSpec, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(path)
    except OSError as error:
        raise InvalidError(f"--init: cannot read {path}: {error.strerror or error}", cure="correct the path") from error
    except SafetensorError as error:
        raise InvalidError(
            f"--init: {path} is not a safetensors file: {error}",
            cure="write it with safetensors.torch.save_model, or download it with `fedctl model download`",
        ) from error
    if not loaded:
        raise InvalidError(f"--init: {path} holds no tensors", cure="give a file with a model in it")
    actual = [
        TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype), _guessed_role(tensor))
        for name, tensor in loaded.items()
    ]
    if model is None:
        return [(spec, loaded[spec.name]) for spec in actual]
    specs = model_specs(model)
    known = {spec.name: spec for spec in specs}
    # A file says nothing of roles and keeps no order: both are the workload's.
    order = {spec.name: index for index, spec in enumerate(specs)}
    actual = sorted(
        (TensorSpec(s.name, s.shape, s.dtype, known[s.name].role if s.name in known else s.role) for s in actual),
        key=lambda spec: order.get(spec.name, len(order)),
    )
    if actual != specs:
        raise InvalidError(
            f"--init: {path} does not fit the workload's model: {explain_difference(specs, actual)}",
            cure="give the file of a model of this workload",
        )
    return [(spec, loaded[spec.name]) for spec in specs]


def _guessed_role(tensor: Tensor) -> str:
    return "parameter" if tensor.is_floating_point() or tensor.is_complex() else "buffer"
