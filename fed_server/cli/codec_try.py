"""Measuring encodings: a file's tensors, or the difference of two files', written as payloads and read back."""

from __future__ import annotations

import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fed_core.codecs.floating import is_lossy, is_lossy_parameter
from fed_core.codecs.planning import LossyTable
from fed_core.codecs.registry import CODECS_OF, EncodingConfig
from fed_core.errors import CorruptError, FedstreamError, InvalidError, NotFiniteError, PayloadError
from fed_core.payload.limits import DIGEST_BYTES, MAGIC
from fed_core.payload.manifest import RAW, UpdateInfo, split_bundle
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Fidelity, write_payload
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import BUFFER, PARAMETER, TensorSpec, explain_difference, is_floating
from fed_core.tensors import check_finite, difference
from fed_server.cli.exit_codes import FileError, SettingError
from fedstream.v1 import common_pb2

Tensors = Sequence[tuple[TensorSpec, Tensor]]

TARGET_ERRORS: Final = (0.02, 0.05, 0.2)
# What a kind alone stands for, where it is not the kind with its defaults, and what it is called.
_RATES: Final = {"uniform": {"uniform 8": "uniform:bits=8", "uniform 4": "uniform:bits=4,block=128"}}
_ENCODINGS: Final[TypeAdapter[EncodingConfig]] = TypeAdapter(EncodingConfig)
_KIND_NAMES: Final = {
    common_pb2.PAYLOAD_KIND_MODEL: "model",
    common_pb2.PAYLOAD_KIND_UPDATE: "update",
    common_pb2.PAYLOAD_KIND_DELTA: "delta",
    common_pb2.PAYLOAD_KIND_PARTIAL: "partial aggregate",
    common_pb2.PAYLOAD_KIND_VARIATE: "common variate",
}
_COMPARED_COORDINATES: Final = 2**20


@dataclass(frozen=True)
class Subject:
    """What encodings are tried on: a title for people, all tensors in memory, and what the user should know of them."""

    title: str
    tensors: Tensors
    notices: list[str]

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(spec.num_elements for spec, _ in self.tensors)


@dataclass(frozen=True)
class Candidate:
    """An encoding under the name that tells it from the others."""

    name: str
    encoding: EncodingConfig


@dataclass(frozen=True)
class TensorTrial:
    """One tensor: its codec, the bits of its head and bodies (what the manifest says of it is not in them), and what came back;
    None for a tensor that is no floating parameter."""

    spec: TensorSpec
    codec: str
    num_bits: int
    fidelity: Fidelity | None


@dataclass(frozen=True)
class Trial:
    """What one encoding did; seconds are of processor time. `problem` says why it could not hold the tensors, and then nothing
    else counts."""

    candidate: Candidate
    num_parameters: int
    total_bytes: int = 0
    fidelity: Fidelity = field(default_factory=Fidelity)
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    tensors: tuple[TensorTrial, ...] = ()
    problem: str = ""

    @property
    def bits(self) -> float:
        """Bits per parameter of the whole payload file."""
        return 8 * self.total_bytes / self.num_parameters

    @property
    def encode_speed(self) -> float:
        """Million coordinates per second."""
        return self.num_parameters / 1e6 / max(self.encode_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """Million coordinates per second."""
        return self.num_parameters / 1e6 / max(self.decode_seconds, 1e-9)

    @property
    def codecs(self) -> dict[str, int]:
        """Number of tensors by codec."""
        names = [tensor.codec for tensor in self.tensors]
        return {name: names.count(name) for name in dict.fromkeys(names)}


def candidates(texts: Sequence[str], target_errors: Sequence[float]) -> list[Candidate]:
    """The encodings that are meant by texts of the form KIND or KIND:SETTINGS, none for all kinds. Those that aim at an error stand
    once for each target, unless the settings name one. Raises SettingError on what is no encoding."""
    for target in target_errors:
        if not 0 < target < 1:
            raise SettingError(
                f"--target-error: expected a number between 0 and 1, got {target:g}",
                cure="0.05 is the default of a run",
            )
    found: dict[str, EncodingConfig] = {}
    for text in texts or CODECS_OF:
        for name, rate in _RATES.get(text, {" ".join(text.split(":", 1)): text}).items():
            encoding = _parse(rate)
            if isinstance(encoding, LossyTable) and "target_error" not in encoding.model_fields_set:
                for target in target_errors or TARGET_ERRORS:
                    found[f"{name} {target:g}"] = encoding.model_copy(update={"target_error": target})
            else:
                found[name] = encoding
    return [Candidate(name, encoding) for name, encoding in found.items()]


def _parse(text: str) -> EncodingConfig:
    kind, _, settings = text.partition(":")
    cure = (
        f"kinds are {', '.join(CODECS_OF)}; settings are those of [uplink] in a run config, such as "
        """--codec uniform:bits=5,block=128 or --codec 'cast:to="float16"'"""
    )
    try:
        table = tomllib.loads(f"encoding = {{ {settings} }}")["encoding"]
        return _ENCODINGS.validate_python({**table, "kind": kind})
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"--codec {text}: {settings!r} cannot be read: {error}", cure=cure) from error
    except ValidationError as error:
        # The first part of a place in a union is the kind, which the text has named.
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'][1:])) or 'kind'}: {e['msg'][:1].lower()}{e['msg'][1:]}"
            for e in error.errors()
        )
        raise SettingError(f"--codec {text}: {problems}", cure=cure) from error


# Reading


def read_subject(path: Path, base: Path | None) -> Subject:
    """The tensors of a file, or what changed in them since `base`, all in memory.

    Raises InvalidError naming the file that cannot be read or does not fit, NotFiniteError naming the tensor that nothing could
    encode.
    """
    file = _read(path)
    tensors, title = file.tensors, f"{path.name}, {file.kind}"
    notices = []
    if any(codec != RAW for codec in file.codecs):
        encoded = ", ".join(f"{codec} {count}" for codec, count in file.codecs.items())
        notices.append(f"{path.name} was encoded before ({encoded}): what is measured is what that has left")
    if base is not None:
        before = _read(base)
        tensors, title = _changes(file, before), f"{path.name} minus {base.name}"
        if file.run_id and before.run_id:
            notices.append(
                "these are two versions of a run: their difference is the mean of many updates, rounded as the downlink has it, "
                "and no client's update"
            )
    elif file.kind == "model":
        notices.append(
            "these count as a model's weights, and clients send differences: --base MODEL, with the version that it was trained "
            "from, shows what an update costs"
        )
    for spec, tensor in tensors:
        try:
            check_finite(spec.name, tensor)
        except NotFiniteError as error:
            raise NotFiniteError(
                f"{title}: {error}", cure="a site refuses to send such an update; lower the learning rate"
            ) from error
    if not any(is_lossy(spec) for spec, _ in tensors):
        raise InvalidError(f"{title}: there is no floating tensor to encode", cure="give a file with a model in it")
    return Subject(title, tensors, notices)


@dataclass(frozen=True)
class _File:
    path: Path
    kind: str
    tensors: Tensors
    codecs: dict[str, int]
    run_id: str


def _read(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            is_payload = file.read(len(MAGIC)) == MAGIC
        if is_payload:
            with PayloadReader(path) as payload:
                manifest = payload.manifest
                tensors = payload.tensors(verify=True)
            of_payload = [(spec, tensors[spec.name]) for spec in manifest.specs]
            return _File(path, _KIND_NAMES[manifest.kind], of_payload, manifest.codecs, manifest.run_id)
        with SafetensorsReader(path) as reader:
            # A foreign file does not say what is a buffer; what is not a floating number certainly is one.
            specs = [spec if is_floating(spec.dtype) else replace(spec, role=BUFFER) for spec in reader.specs]
            of_file = [(spec, reader.tensor(spec.name)) for spec in specs]
            return _File(path, "model", of_file, {}, reader.metadata.get("run_id", ""))
    except OSError as error:
        raise InvalidError(f"cannot read {path}: {error.strerror}", cure="correct the path") from error
    except (PayloadError, CorruptError) as error:
        raise InvalidError(
            f"{path}: {error}",
            cure="give a safetensors file (`fedctl model download` writes one), or a payload file of a site or a coordinator",
        ) from error


def _changes(file: _File, before: _File) -> Tensors:
    for each in (file, before):
        if each.kind != "model":
            raise InvalidError(
                f"{each.path} is {_article(each.kind)}, and --base takes the difference of two models",
                cure="leave --base out" if each is file else "give a model to --base",
            )
    received = {spec.name: (spec, tensor) for spec, tensor in before.tensors}
    # Only a payload knows every buffer: what one of the two calls a buffer is one.
    buffers = {spec.name for each in (file, before) for spec, _ in each.tensors if spec.role == BUFFER}
    specs = [replace(spec, role=BUFFER if spec.name in buffers else PARAMETER) for spec, _ in file.tensors]
    expected = [replace(spec, role=BUFFER if spec.name in buffers else PARAMETER) for spec, _ in before.tensors]
    if {spec.name: spec for spec in expected} != {spec.name: spec for spec in specs}:
        raise InvalidError(
            f"{file.path} and {before.path} are not of one model: {explain_difference(expected, specs)}",
            cure="give two versions of the same model",
        )
    return [
        (spec, difference(tensor, received[spec.name][1]))
        for spec, (_, tensor) in zip(specs, file.tensors, strict=True)
    ]


def _article(kind: str) -> str:
    return f"{'an' if kind == 'update' else 'a'} {kind}"


# Measuring


def try_encoding(tensors: Tensors, candidate: Candidate) -> Trial:
    """Writes the tensors as an update into a temporary file, reads it back and compares, on one thread. Memory: what the encoding
    needs, and one tensor.

    Raises FileError where there is no room for temporary files.
    """
    num_parameters = sum(spec.num_elements for spec, _ in tensors)
    with _one_thread(), tempfile.TemporaryDirectory(prefix="fedctl-") as folder:
        path = Path(folder) / "trial.payload"
        try:
            with path.open("wb+") as file:
                begin = time.thread_time()
                written = write_payload(
                    file,
                    kind=common_pb2.PAYLOAD_KIND_UPDATE,
                    run_id="0" * 32,
                    round=1,
                    model_version=0,
                    base_digest=bytes(DIGEST_BYTES),
                    update=UpdateInfo(assignment_id="0" * 32, num_examples=1),
                    tensors=tensors,
                    encoding=candidate.encoding,
                )
                encode_seconds = time.thread_time() - begin
        except OSError as error:
            raise FileError(
                f"cannot write {candidate.name} to {folder}: {error.strerror}",
                cure="make room there, or set TMPDIR to another folder",
            ) from error
        except FedstreamError as error:  # such as a value that float16 does not reach
            return Trial(candidate, num_parameters, problem=str(error))
        with PayloadReader(path) as reader:
            tried, decode_seconds = _read_back(reader, tensors)
    return Trial(
        candidate,
        num_parameters,
        total_bytes=written.total_bytes,
        fidelity=_sum(tensor.fidelity for tensor in tried if tensor.fidelity is not None),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
        tensors=tried,
    )


def _read_back(reader: PayloadReader, tensors: Tensors) -> tuple[tuple[TensorTrial, ...], float]:
    manifest = reader.manifest
    bundled = {}
    if manifest.bundle is not None:
        for part in split_bundle(manifest, reader.read_segment(manifest.bundle)):
            bundled[part.tensor_index] = len(part.head) + len(part.body)
    tried = []
    seconds = 0.0
    for index, (entry, (spec, exact)) in enumerate(zip(manifest.tensors, tensors, strict=True)):
        begin = time.thread_time()
        decoded = reader.tensor(spec.name)
        seconds += time.thread_time() - begin
        segments = [*entry.bodies, *([entry.head] if entry.head is not None else [])]
        num_bytes = bundled.get(index, 0) + sum(segment.length for segment in segments)
        is_compared = is_lossy_parameter(spec)
        fidelity = _compare(exact, decoded) if is_compared else None
        tried.append(TensorTrial(spec, entry.codec, 8 * num_bytes, fidelity))
    return tuple(tried), seconds


def _compare(exact: Tensor, decoded: Tensor) -> Fidelity:
    of_tiles = []
    exact, decoded = exact.reshape(-1), decoded.reshape(-1)
    for first in range(0, len(exact), _COMPARED_COORDINATES):
        x, seen = (tensor[first : first + _COMPARED_COORDINATES].double() for tensor in (exact, decoded))
        left = x - seen
        of_tiles.append(Fidelity(float(x.dot(x)), float(x.dot(seen)), float(left.dot(left))))
    return _sum(of_tiles)


def _sum(parts: Iterable[Fidelity]) -> Fidelity:
    total = Fidelity()
    for part in parts:
        total = Fidelity(
            total.energy + part.energy, total.product + part.product, total.squared_error + part.squared_error
        )
    return total


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
