"""Fetching a model version into a file: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fed_core.errors import ConflictError, CorruptError
from fed_server.cli.connection import Coordinator
from fed_server.cli.exit_codes import SettingError
from fedstream.v1 import runs_pb2


def model_request(run: str, version: str, *, average: bool = False) -> runs_pb2.DownloadModelRequest:
    """What to ask for: "best", "newest", or a number, or the average up to it. Raises SettingError on anything else."""
    if version == "best":
        return runs_pb2.DownloadModelRequest(run=run, best=True, average=average)
    if version == "newest":
        return runs_pb2.DownloadModelRequest(run=run, newest=True, average=average)
    if version.isascii() and version.isdigit() and int(version) < 2**63:
        return runs_pb2.DownloadModelRequest(run=run, version=int(version), average=average)
    raise SettingError(
        f"--version: expected best, newest or a number, got {version!r}", cure=f"`fedctl model list {run}` shows them"
    )


def download(
    coordinator: Coordinator,
    request: runs_pb2.DownloadModelRequest,
    file: Path | None,
    *,
    force: bool,
    console: Console,
) -> Path:
    """Writes the version beside its place and renames it when it is complete. Returns the path.

    Raises ConflictError where the file exists and `force` is not set, CorruptError where the stream is not what its header said;
    an unfinished file is deleted.
    """
    if file is not None:
        _refuse_existing(file, force)
    messages = coordinator.download_model(request)
    model = next(messages).header.model
    which = "-average" if request.average else ""
    path = file if file is not None else Path(f"{request.run}-v{model.version}{which}.safetensors")
    _refuse_existing(path, force)
    part = path.with_name(path.name + ".part")
    columns = (
        TextColumn(f"version {model.version}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with (
            part.open("wb") as out,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task("", total=model.file_bytes)
            size = sum(_write(out, message, progress, task) for message in messages)
            if size != model.file_bytes:
                raise CorruptError(
                    f"version {model.version} ended after {size:,} of {model.file_bytes:,} bytes",
                    cure="run the command again",
                )
            out.flush()
            os.fsync(out.fileno())
        _refuse_existing(path, force)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _write(out: BinaryIO, message: runs_pb2.DownloadModelResponse, progress: Progress, task: TaskID) -> int:
    chunk = message.chunk
    if chunk.offset != out.tell():
        raise CorruptError(
            f"the coordinator sent bytes from {chunk.offset:,} where {out.tell():,} come next",
            cure="run the command again",
        )
    out.write(chunk.data)
    progress.update(task, advance=len(chunk.data))
    return len(chunk.data)


def _refuse_existing(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise ConflictError(f"{path} exists already", cure="give another name, or --force to replace it")
