"""Making version 0 of a run on the operator's machine, and streaming it to the coordinator.

The coordinator never runs a workload's code: the model is built here, under the run's seed, and travels as a payload.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from fed_core.codecs.base import TileSource
from fed_core.errors import ConfigError, FedstreamError, InvalidError, PayloadError
from fed_core.payload.frames import CHUNK_BYTES
from fed_core.payload.writer import write_payload
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec, explain_difference, is_floating
from fed_core.tensors import check_finite, model_specs, model_tensors
from fed_core.workload import Workload, initial_model, load_workload
from fed_server.cli.exit_codes import FileError
from fed_server.config import RunConfig
from fedstream.v1 import common_pb2, runs_pb2, transfer_pb2

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Sources = list[tuple[TensorSpec, Tensor | TileSource]]


@dataclass(frozen=True)
class Version0:
    """A run's first model as a payload file."""

    path: Path
    digest: bytes
    total_bytes: int
    num_tensors: int
    num_parameters: int
    has_trained_weights: bool


def make_version_0(
    config: RunConfig, *, workload: str | None, init: Path | None, path: Path, on_progress: Progress | None = None
) -> Version0:
    """Writes the payload of version 0 to `path`: the workload's own model under the run's seed, or the tensors of a safetensors
    file, or both, in which case names, order and roles are the workload's and values the file's.

    Memory: the workload's model, if there is one, and a tile. Raises ConfigError where workload and config disagree, InvalidError
    where the workload's code fails, the file is unusable or does not fit, NotFiniteError, FileError where `path` cannot be written.
    """
    model = _built_model(config, workload) if workload is not None else None
    with ExitStack() as stack:
        if init is not None:
            sources = _file_sources(stack.enter_context(_open(init)), model, init)
        elif model is not None:
            sources = _model_sources(model)
        else:
            raise ConfigError(
                "a run needs a model to begin from",
                cure="give --workload SOURCE to build it, or --init FILE.safetensors to read it",
            )
        try:
            with path.open("wb+") as file:
                written = write_payload(
                    file,
                    kind=common_pb2.PAYLOAD_KIND_MODEL,
                    run_id="",
                    round=0,
                    model_version=0,
                    base_digest=b"",
                    update=None,
                    tensors=sources,
                    on_progress=on_progress,
                )
        except OSError as error:
            raise FileError(
                f"cannot write version 0 to {path.parent}: {error.strerror}",
                cure="make room there, or set TMPDIR to another folder",
            ) from error
    num_parameters = sum(spec.num_elements for spec, _ in sources)
    return Version0(
        path, written.digest, written.total_bytes, len(sources), num_parameters, has_trained_weights=init is not None
    )


def create_requests(
    config_toml: str, version_0: Version0, on_progress: Progress | None = None
) -> Callable[[], Iterator[runs_pb2.CreateRunRequest]]:
    """The messages of CreateRun, as often as asked for: the same request id every time, so that a repeat is harmless."""
    header = runs_pb2.CreateRunHeader(
        request_id=uuid.uuid4().hex,
        config_toml=config_toml,
        model=common_pb2.PayloadRef(
            digest=version_0.digest, total_bytes=version_0.total_bytes, kind=common_pb2.PAYLOAD_KIND_MODEL
        ),
        has_trained_weights=version_0.has_trained_weights,
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


def _built_model(config: RunConfig, source: str) -> nn.Module:
    try:
        workload = load_workload(source)
        _check_workload(config, workload, source)
        return initial_model(workload, config.seed)
    except FedstreamError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise InvalidError(
            f"workload {source} failed: {type(error).__name__}: {error}", cure="--debug shows where"
        ) from error


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


def _model_sources(model: nn.Module) -> Sources:
    tensors = model_tensors(model)
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    return [(spec, tensors[spec.name]) for spec in model_specs(model)]


def _open(path: Path) -> SafetensorsReader:
    try:
        return SafetensorsReader(path)
    except OSError as error:
        raise InvalidError(f"--init: cannot read {path}: {error.strerror}", cure="correct the path") from error
    except PayloadError as error:
        raise InvalidError(
            f"--init: {error}",
            cure="write one with safetensors.torch.save_model, or fetch one with `fedctl model download`",
        ) from error


def _file_sources(reader: SafetensorsReader, model: nn.Module | None, path: Path) -> Sources:
    if not reader.specs:
        raise InvalidError(f"--init: {path} holds no tensors", cure="give a file with a model in it")
    # A foreign file does not say what is a buffer; what is not a floating number certainly is one.
    actual = [spec if is_floating(spec.dtype) else replace(spec, role="buffer") for spec in reader.specs]
    if model is not None:
        actual = _as_in(model_specs(model), actual, path)
    return [(spec, _checked_tiles(reader, spec.name)) for spec in actual]


def _as_in(specs: Sequence[TensorSpec], actual: Sequence[TensorSpec], path: Path) -> list[TensorSpec]:
    """The workload's specs, once it is sure that the file has just these: order and roles are what a file may not know."""
    by_name = {spec.name: spec for spec in actual}
    known = [replace(by_name[spec.name], role=spec.role) for spec in specs if spec.name in by_name]
    names = {spec.name for spec in specs}
    extra = [spec for spec in actual if spec.name not in names]
    if [*known, *extra] != list(specs):
        raise InvalidError(
            f"--init: {path} does not fit the workload's model: {explain_difference(specs, [*known, *extra])}",
            cure="give the file of a model of this workload",
        )
    return list(specs)


def _checked_tiles(reader: SafetensorsReader, name: str) -> TileSource:
    def read(first: int, num_coordinates: int) -> Tensor:
        tile = reader.read_tile(name, first, num_coordinates)
        check_finite(name, tile)
        return tile

    return read
