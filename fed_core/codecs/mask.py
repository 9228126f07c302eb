"""Mostly zeros: where the others are, and what they are. For models that are pruned while they train."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.codecs.config import CodecTable
from fed_core.codecs.floating import TILE, check_lossy, is_lossy, narrow
from fed_core.codecs.raw import raw_plan
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_BODY_BYTES
from fed_core.specs import DTYPES, TensorSpec
from fed_core.tensors import dtype_name, torch_dtype

ValueType = Literal["float32", "float16", "bfloat16"]

_TYPES: Final[tuple[ValueType, ...]] = ("float32", "float16", "bfloat16")
_HEADER: Final = struct.Struct("<BBI")  # type of the values, how the bitmap is written, its length in bytes
_NONE, _ALL, _BITS, _DEFLATED = range(4)
# Numbers of a float's width: numpy does not know bfloat16, and moving values needs no arithmetic.
_UNSIGNED: Final = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class MaskCodec:
    """A body is a header of 6 bytes, a bitmap of the survivors (the coordinates that are not zero), and their values in order.

    Bit i % 8 of the bitmap's byte i // 8 is coordinate i. It is left out where none or all survive, and deflated (RFC 1951) where
    that is shorter. -0.0 counts as zero and comes back as +0.0; so does what is too small for the type of the values. All else
    keeps every bit, where that type is the tensor's own.
    """

    kind = "mask"
    has_head = False

    def body_bytes(self, spec: TensorSpec, num_coordinates: int) -> tuple[int, int]:
        """From a header alone to one with a plain bitmap and all values."""
        check_lossy(self.kind, spec)
        most = _HEADER.size + _bitmap_bytes(num_coordinates) + min(4, DTYPES[spec.dtype]) * num_coordinates
        return _HEADER.size, min(most, MAX_BODY_BYTES)

    def decoder(self, spec: TensorSpec, head: bytes | memoryview | None) -> _MaskDecoder:
        """The same for every tensor of a floating type."""
        check_lossy(self.kind, spec, head)
        return _MaskDecoder()


class _MaskDecoder:
    def decode(self, first: int, body: bytes | memoryview, out: Tensor) -> None:
        """Zeros, then the survivors tile by tile. A bitmap is inflated to its known size and no further."""
        if len(body) < _HEADER.size:
            raise PayloadError(f"a mask body of {len(body)} bytes; its header alone has {_HEADER.size}")
        type_index, form, bitmap_bytes = _HEADER.unpack_from(body)
        if type_index >= len(_TYPES):
            raise PayloadError(f"a mask body with values of type {type_index}; expected 0 to {len(_TYPES) - 1}")
        rest = memoryview(body)[_HEADER.size :]
        if bitmap_bytes > len(rest):
            raise PayloadError(f"a bitmap of {bitmap_bytes} bytes in a mask body that has {len(rest)} left")
        survives = _read_bitmap(form, rest[:bitmap_bytes], len(out))
        values = np.frombuffer(rest[bitmap_bytes:], np.uint8)
        value_bytes = DTYPES[_TYPES[type_index]]
        num_survivors = np.count_nonzero(survives)
        if values.size != num_survivors * value_bytes:
            raise PayloadError(
                f"{values.size} bytes of values for {num_survivors} survivors; expected {num_survivors * value_bytes}"
            )
        out.zero_()
        memory = _unsigned(out)
        for start in range(0, len(out), TILE):
            where = np.flatnonzero(survives[start : start + TILE])
            typed = torch.empty(len(where), dtype=torch_dtype(_TYPES[type_index]))
            typed.view(torch.uint8).numpy()[:] = values[: typed.nbytes]
            values = values[typed.nbytes :]
            memory[start : start + TILE][where] = _unsigned(typed.to(out.dtype))


def mask_plan(spec: TensorSpec, source: TileSource, *, values: ValueType) -> TensorPlan:
    """Bodies of 196,608 coordinates, or 458,752 where a value has two bytes. The source is not read here.

    A tensor whose own type has no more bytes than `values` keeps its type, and every bit. The plan's `encode` raises InvalidError,
    naming the tensor and the cure, where a value would become infinite.
    """
    dtype = torch_dtype(spec.dtype if DTYPES[spec.dtype] <= DTYPES[values] else values)

    def encode(first: int, tile: Tensor) -> bytes:
        narrowed = narrow(spec.name, tile, dtype)
        survives = (narrowed != 0).numpy()
        form, bitmap = _write_bitmap(survives)
        memory = _unsigned(narrowed)
        parts = [
            memory[start : start + TILE][np.flatnonzero(survives[start : start + TILE])].tobytes()
            for start in range(0, len(tile), TILE)
        ]
        return b"".join((_HEADER.pack(_TYPES.index(dtype_name(dtype)), form, len(bitmap)), bitmap, *parts))

    bits_each = 1 + 8 * dtype.itemsize
    body_coordinates = (MAX_BODY_BYTES - _HEADER.size) * 8 // bits_each // TILE * TILE
    return TensorPlan(MaskCodec.kind, None, body_coordinates, encode)


class MaskConfig(CodecTable):
    """The coordinates that are not zero, and where they are."""

    kind: Literal["mask"] = Field(
        default="mask", description="Only values that are not zero: for models that are pruned while they train."
    )
    values: ValueType = Field(
        default="float32",
        description="Type of the values that are sent. float16 and bfloat16 halve them; float16 refuses an update that holds a "
        "value over 65504. A tensor of a smaller type keeps its own.",
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Every floating tensor by this codec, the others raw; the seed decides nothing."""
        return [
            mask_plan(spec, source, values=self.values) if is_lossy(spec) else raw_plan(spec, source)
            for spec, source in tensors
        ]


def _bitmap_bytes(num_coordinates: int) -> int:
    return (num_coordinates + 7) // 8


def _write_bitmap(survives: NDArray[np.bool_]) -> tuple[int, bytes]:
    """How the bitmap is written, and its bytes: the shortest form."""
    num_survivors = np.count_nonzero(survives)
    if num_survivors == 0:
        return _NONE, b""
    if num_survivors == len(survives):
        return _ALL, b""
    bits = np.packbits(survives, bitorder="little").tobytes()
    # Scattered survivors have runs and frequencies to offer, pruned rows and columns repeat: neither strategy is good at both.
    deflated = min((_deflate(bits, strategy) for strategy in (zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY)), key=len)
    return (_DEFLATED, deflated) if len(deflated) < len(bits) else (_BITS, bits)


def _deflate(data: bytes, strategy: int) -> bytes:
    deflater = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=strategy)
    return deflater.compress(data) + deflater.flush()


def _read_bitmap(form: int, data: memoryview, num_coordinates: int) -> NDArray[np.bool_]:
    """Which coordinates survive. Raises PayloadError unless `data` is a bitmap of so many, in that form and nothing more."""
    if form == _DEFLATED:
        data = memoryview(_inflate(data, _bitmap_bytes(num_coordinates)))
    expected = _bitmap_bytes(num_coordinates) if form in (_BITS, _DEFLATED) else 0
    if form > _DEFLATED or len(data) != expected:
        raise PayloadError(
            f"a bitmap in form {form} of {len(data)} bytes; expected {expected}, in form 0 to {_DEFLATED}"
        )
    if form in (_NONE, _ALL):
        return np.full(num_coordinates, form == _ALL)
    bits = np.frombuffer(data, np.uint8)
    return np.unpackbits(bits, count=num_coordinates, bitorder="little").view(np.bool_)


def _inflate(data: memoryview, num_bytes: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte of room more: zlib sees the end of a stream only after its last byte has found a place.
        inflated = inflater.decompress(data, num_bytes + 1)
    except zlib.error as error:
        raise PayloadError(f"a bitmap that cannot be inflated: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise PayloadError("a deflated bitmap that does not end where it says")
    return inflated


def _unsigned(values: Tensor) -> NDArray[np.unsignedinteger]:
    memory: NDArray[np.unsignedinteger] = values.view(torch.uint8).numpy().view(_UNSIGNED[values.dtype.itemsize])
    return memory
