"""safetensors files, written and read tile by tile: memory O(tile), however large the model.

The files are ordinary ones (github.com/huggingface/safetensors) that the safetensors library reads, and its files are read here.
Our own metadata keeps what the format has no place for: which tensors are buffers, and that a complex128 tensor, which it does not
know, lies there as pairs of float64 in one more dimension.

As the library does, we lay larger element types first, so that every tensor is aligned to its elements; the header lists the
tensors in the order of the model.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import torch
from blake3 import blake3
from torch import Tensor

from fed_core.errors import InvalidError, PayloadError
from fed_core.payload.limits import MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSOR_ELEMENTS, MAX_TENSORS
from fed_core.specs import BUFFER, DTYPES, TensorSpec
from fed_core.tensors import dtype_name, torch_dtype

# The library's own limit.
MAX_HEADER_BYTES: Final = 100_000_000

_FORMAT_NAMES: Final = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
}
_DTYPE_OF_FORMAT: Final = {name: dtype for dtype, name in _FORMAT_NAMES.items()}

_METADATA: Final = "__metadata__"
_BUFFERS: Final = "fedstream.buffers"
_COMPLEX128: Final = "fedstream.complex128"

_LENGTH_BYTES = 8
_DIGEST_STEP_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor and where its bytes begin, from the start of the file."""

    spec: TensorSpec
    offset: int

    def span(self, first: int, count: int) -> int:
        """Offset of the tile that begins at a coordinate. Raises InvalidError unless the tile lies within the tensor."""
        if first < 0 or count < 0 or first + count > self.spec.num_elements:
            raise InvalidError(
                f"tensor {self.spec.name!r} has {self.spec.num_elements} elements; there is no tile of {count} at {first}"
            )
        return self.offset + first * DTYPES[self.spec.dtype]


class SafetensorsWriter:
    """Writes a file whose tensors arrive in tiles, in any order, from any thread.

    `file` is open for writing and empty; it is written by position and not closed. `metadata` is kept for the reader; names that
    begin with "fedstream." are ours. Raises InvalidError for a name that is listed twice, OSError as the disk has it.
    """

    def __init__(self, file: BinaryIO, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        header, self._places = _lay_out(specs, metadata or {})
        self._fd = file.fileno()
        self._written = {spec.name: _Coverage() for spec in specs}
        self._claiming = threading.Lock()
        _write_all(self._fd, memoryview(header), 0)

    def write_tile(self, name: str, first: int, tile: Tensor) -> None:
        """Writes the elements from coordinate `first` (row-major) on; `tile` has the tensor's dtype and any shape.

        Raises InvalidError for an unknown name, another dtype, a tile that leaves the tensor or overlaps an earlier one.
        """
        place = _find(self._places, name)
        if tile.dtype != torch_dtype(place.spec.dtype):
            raise InvalidError(f"tensor {name!r} is {place.spec.dtype}; a tile came as {dtype_name(tile.dtype)}")
        offset = place.span(first, tile.numel())
        with self._claiming:
            self._written[name].add(first, first + tile.numel(), name)
        _write_all(self._fd, _bytes_of(tile), offset)

    def finish(self) -> None:
        """Raises InvalidError, naming the first gap, unless every tensor is there in full. The caller flushes the file."""
        for name, place in self._places.items():
            gap = self._written[name].first_gap(place.spec.num_elements)
            if gap is not None:
                raise InvalidError(
                    f"tensor {name!r} has {place.spec.num_elements} elements; element {gap} was not written"
                )


class SafetensorsReader:
    """An open safetensors file. Opening it reads and checks the header; all reads are positional, so threads may share a reader.

    `specs`: the tensors in the order of the header; `metadata`: what its writer kept, less what is ours. Raises PayloadError naming
    what is wrong with a file that is none, is cut short or breaks a limit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header, size = self._read_header()
            self._places, self.metadata = _parse_header(header, size)
        except PayloadError as error:
            self.close()
            raise PayloadError(f"{path.name} is not a usable safetensors file: {error}") from error
        except BaseException:
            self.close()
            raise
        self.specs = tuple(place.spec for place in self._places.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_tile(self, name: str, first: int, count: int, out: Tensor | None = None) -> Tensor:
        """`count` elements from coordinate `first` (row-major) on, flat: in the beginning of `out` where given (flat, contiguous,
        on the CPU, of the tensor's dtype and at least so long), else in fresh memory.

        Raises InvalidError for an unknown name, a tile that leaves the tensor or an `out` that does not fit, PayloadError
        where the file ends early or a bool is neither 0 nor 1.
        """
        place = _find(self._places, name)
        offset = place.span(first, count)
        dtype = torch_dtype(place.spec.dtype)
        if out is None:
            out = torch.empty(count, dtype=dtype)
        elif out.dtype != dtype or out.dim() != 1 or not out.is_contiguous() or not out.is_cpu or len(out) < count:
            raise InvalidError(
                f"`out` for {count} elements of tensor {name!r} must be flat, contiguous, {place.spec.dtype}, on the CPU"
            )
        tile = out[:count]
        _read_all(self._fd, tile.view(torch.uint8).numpy().data, offset)
        # torch trusts the bytes of a bool.
        if dtype == torch.bool and count and int(tile.view(torch.uint8).max()) > 1:
            raise PayloadError(f"tensor {name!r} in {self.path.name} is bool, but holds bytes other than 0 and 1")
        return tile

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its shape, in fresh memory."""
        spec = _find(self._places, name).spec
        return self.read_tile(name, 0, spec.num_elements).reshape(spec.shape)

    def raw_tiles(self) -> Iterator[memoryview]:
        """The bytes of all tensors in the order of `specs`, in pieces whose memory the next step reuses."""
        buffer = memoryview(bytearray(_DIGEST_STEP_BYTES))
        for place in self._places.values():
            for begin in range(0, place.spec.num_bytes, len(buffer)):
                piece = buffer[: min(len(buffer), place.spec.num_bytes - begin)]
                _read_all(self._fd, piece, place.offset + begin)
                yield piece

    def _read_header(self) -> tuple[bytearray, int]:
        size = os.fstat(self._fd).st_size
        if size < _LENGTH_BYTES:
            raise PayloadError(f"it has only {size} bytes")
        prefix = bytearray(_LENGTH_BYTES)
        _read_all(self._fd, memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise PayloadError(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if _LENGTH_BYTES + length > size:
            raise PayloadError(f"its header claims {length} bytes; the file has {size}")
        header = bytearray(length)
        _read_all(self._fd, memoryview(header), _LENGTH_BYTES)
        return header, size


def tensors_digest(source: Path | SafetensorsReader) -> bytes:
    """The digest of a model: BLAKE3 over the bytes of its tensors in the order of its specs. It says nothing of names and shapes;
    a fingerprint does."""
    if isinstance(source, Path):
        with SafetensorsReader(source) as reader:
            return tensors_digest(reader)
    hasher = blake3()
    for piece in source.raw_tiles():
        hasher.update(piece)
    return hasher.digest()


class _Coverage:
    """Which elements were written: disjoint spans in order, neighbours joined, so that tiles in order cost one span."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int, name: str) -> None:
        """Adds a span. Raises InvalidError where it overlaps one that is there."""
        if begin == end:
            return
        at = bisect_right(self._begins, begin)
        if (at > 0 and self._ends[at - 1] > begin) or (at < len(self._begins) and self._begins[at] < end):
            raise InvalidError(f"elements {begin} to {end} of tensor {name!r} were written before, at least in part")
        joins_left = at > 0 and self._ends[at - 1] == begin
        joins_right = at < len(self._begins) and self._begins[at] == end
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends.pop(at)
            del self._begins[at]
        elif joins_left:
            self._ends[at - 1] = end
        elif joins_right:
            self._begins[at] = begin
        else:
            self._begins.insert(at, begin)
            self._ends.insert(at, end)

    def first_gap(self, num_elements: int) -> int | None:
        """The first element that is missing, or None."""
        reached = self._ends[0] if self._begins and self._begins[0] == 0 else 0
        return reached if reached < num_elements else None


def _lay_out(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, _Place]]:
    """The header, padded so that the data begin on a multiple of eight, and the tensors' places in the order of `specs`."""
    if len({spec.name for spec in specs} - {_METADATA}) != len(specs):
        raise InvalidError(f"a safetensors file needs names that differ, and none may be {_METADATA}")
    begins: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=_alignment, reverse=True):
        begins[spec.name] = end
        end += spec.num_bytes
    ours = {
        _BUFFERS: [spec.name for spec in specs if spec.role == BUFFER],
        _COMPLEX128: [spec.name for spec in specs if spec.dtype == "complex128"],
    }
    document: dict[str, Any] = {
        _METADATA: {**metadata, **{key: json.dumps(names) for key, names in ours.items() if names}}
    }
    for spec in specs:
        is_pair = spec.dtype == "complex128"
        document[spec.name] = {
            "dtype": "F64" if is_pair else _FORMAT_NAMES[spec.dtype],
            "shape": [*spec.shape, 2] if is_pair else list(spec.shape),
            "data_offsets": [begins[spec.name], begins[spec.name] + spec.num_bytes],
        }
    header = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    if len(header) > MAX_HEADER_BYTES:
        raise InvalidError(
            f"the names of {len(specs)} tensors need {len(header)} bytes; {MAX_HEADER_BYTES} are allowed"
        )
    start = _LENGTH_BYTES + len(header)
    return struct.pack("<Q", len(header)) + header, {
        spec.name: _Place(spec, start + begins[spec.name]) for spec in specs
    }


def _alignment(spec: TensorSpec) -> int:
    return min(DTYPES[spec.dtype], 8)


def _parse_header(header: bytearray, size: int) -> tuple[dict[str, _Place], dict[str, str]]:
    try:
        document = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"its header is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise PayloadError("its header is not a JSON object")
    metadata = document.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PayloadError(f"its {_METADATA} is not an object of texts")
    if len(document) > MAX_TENSORS:
        raise PayloadError(f"it holds {len(document)} tensors; at most {MAX_TENSORS} are allowed")
    start = _LENGTH_BYTES + len(header)
    buffers, pairs = _names(metadata, _BUFFERS), _names(metadata, _COMPLEX128)
    places: dict[str, _Place] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in document.items():
        spec, begin, end = _parse_entry(name, entry)
        spans.append((begin, end, name))
        if name in buffers:
            spec = replace(spec, role=BUFFER)
        if name in pairs and spec.dtype == "float64" and spec.shape[-1:] == (2,):
            spec = replace(spec, dtype="complex128", shape=spec.shape[:-1])
        places[name] = _Place(spec, start + begin)
    # Nothing hidden between tensors or after them, nothing shared: as the library demands.
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise PayloadError(f"tensor {name!r} begins at byte {begin} of the data, expected {reached}")
        reached = end
    if start + reached != size:
        raise PayloadError(f"its tensors need {start + reached} bytes; the file has {size}")
    return places, {key: value for key, value in metadata.items() if key not in (_BUFFERS, _COMPLEX128)}


def _parse_entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    match entry:
        case {"dtype": str(format_name), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            pass
        case _:
            raise PayloadError(f"tensor {name!r:.100} needs a dtype, a shape and two data_offsets, and nothing else")
    if not 1 <= _encoded_length(name) <= MAX_NAME_BYTES:
        raise PayloadError(f"the name of tensor {name!r:.100} is not text of 1 to {MAX_NAME_BYTES} bytes")
    if format_name not in _DTYPE_OF_FORMAT:
        raise PayloadError(
            f"tensor {name!r} has dtype {format_name!r:.20}; expected one of {', '.join(_DTYPE_OF_FORMAT)}"
        )
    # One dimension more than a model may have: complex pairs.
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise PayloadError(f"tensor {name!r} has a shape or an offset that is not a whole number from 0")
    if len(shape) > MAX_DIMENSIONS + 1 or prod(max(length, 1) for length in shape) > MAX_TENSOR_ELEMENTS:
        raise PayloadError(
            f"tensor {name!r} has more than {MAX_DIMENSIONS} dimensions or {MAX_TENSOR_ELEMENTS} elements"
        )
    spec = TensorSpec(name, tuple(shape), _DTYPE_OF_FORMAT[format_name])
    if end - begin != spec.num_bytes:
        raise PayloadError(f"tensor {name!r} needs {spec.num_bytes} bytes, its offsets span {end - begin}")
    return spec, begin, end


def _encoded_length(name: str) -> int:
    try:
        return len(name.encode())
    except UnicodeEncodeError:  # JSON can spell half a character
        return 0


def _names(metadata: dict[str, str], key: str) -> set[str]:
    try:
        names = json.loads(metadata.get(key, "[]"))
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"its metadata {key!r} is not JSON") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PayloadError(f"its metadata {key!r} is not a list of names")
    return set(names)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise PayloadError("its header has a name twice")
    return result


def _find(places: Mapping[str, _Place], name: str) -> _Place:
    if name not in places:
        raise InvalidError(f"there is no tensor {name!r} in this file")
    return places[name]


def _bytes_of(tile: Tensor) -> memoryview:
    """The values of a tensor as bytes: its own memory unless they lie there in another order, or elsewhere."""
    flat = tile.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        num_bytes = os.pwrite(fd, view, offset)
        view, offset = view[num_bytes:], offset + num_bytes


def _read_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        num_bytes = os.preadv(fd, [view], offset)
        if num_bytes == 0:
            raise PayloadError(f"the file ends at byte {offset}")
        view, offset = view[num_bytes:], offset + num_bytes
