"""What a tensor is, without the tensor: name, shape, element type, role. Free of torch, so that the daemon can compare models.

A fingerprint identifies an ordered list of specs; two sides with equal fingerprints share the same parameters.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSOR_ELEMENTS
from fedstream.v1 import common_pb2

PARAMETER: Final = "parameter"
BUFFER: Final = "buffer"

# Bytes per element, by torch's name; the keys are the names of the wire's Dtype in lower case.
DTYPES: Final[dict[str, int]] = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "complex64": 8,
    "complex128": 16,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "bool": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
}
_WIRE_OF_DTYPE = {name: common_pb2.Dtype.Value(f"DTYPE_{name.upper()}") for name in DTYPES}
_DTYPE_OF_WIRE = {wire: name for name, wire in _WIRE_OF_DTYPE.items()}
_WIRE_OF_ROLE = {
    PARAMETER: common_pb2.TENSOR_ROLE_PARAMETER,
    BUFFER: common_pb2.TENSOR_ROLE_BUFFER,
}
_ROLE_OF_WIRE = {wire: role for role, wire in _WIRE_OF_ROLE.items()}

_MAX_DIFFERENCES = 5


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape, element type (torch's name, a key of `DTYPES`) and role ("parameter" or "buffer") of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str = PARAMETER

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def reals_per_element(self) -> int:
        """2 for complex numbers, which are added up as pairs of reals; else 1."""
        return 2 if self.dtype.startswith("complex") else 1

    @property
    def num_bytes(self) -> int:
        """Size of the values in memory."""
        return self.num_elements * DTYPES[self.dtype]


def is_floating(dtype: str) -> bool:
    """Whether values of this type are averaged as numbers with a fraction: float*, bfloat16 and complex*."""
    return dtype.startswith(("float", "bfloat", "complex"))


def variate_specs(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The tensors of a model's variate (what gradients are corrected by): parameters of floating types, of at least 32 bits."""
    return [
        TensorSpec(spec.name, spec.shape, "float32" if spec.dtype in ("float16", "bfloat16") else spec.dtype)
        for spec in specs
        if spec.role == PARAMETER and is_floating(spec.dtype)
    ]


def to_proto(spec: TensorSpec) -> common_pb2.TensorSpec:
    """The spec as it travels. Raises PayloadError where the dtype or the role has no place in the contract."""
    if spec.dtype not in _WIRE_OF_DTYPE:
        raise PayloadError(f"tensor {spec.name!r} has dtype {spec.dtype}; a payload holds {', '.join(DTYPES)}")
    if spec.role not in _WIRE_OF_ROLE:
        raise PayloadError(f"tensor {spec.name!r} has role {spec.role!r}; expected {PARAMETER!r} or {BUFFER!r}")
    return common_pb2.TensorSpec(
        name=spec.name,
        shape=spec.shape,
        dtype=_WIRE_OF_DTYPE[spec.dtype],
        role=_WIRE_OF_ROLE[spec.role],
    )


def from_proto(message: common_pb2.TensorSpec) -> TensorSpec:
    """The spec that a peer sent, checked against every limit. Raises PayloadError naming what is wrong."""
    name, shape = message.name, tuple(message.shape)
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise PayloadError(f"a tensor's name has {len(name.encode())} bytes; expected 1 to {MAX_NAME_BYTES}")
    if len(shape) > MAX_DIMENSIONS:
        raise PayloadError(f"tensor {name!r} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    if any(length < 0 for length in shape):
        raise PayloadError(f"tensor {name!r} has the negative dimension {min(shape)}")
    # Zero dimensions count as one: torch multiplies the others into strides even where there is no element.
    if math.prod(max(length, 1) for length in shape) > MAX_TENSOR_ELEMENTS:
        raise PayloadError(f"tensor {name!r} has shape {shape}; at most {MAX_TENSOR_ELEMENTS} elements are allowed")
    if message.dtype not in _DTYPE_OF_WIRE:
        raise PayloadError(
            f"tensor {name!r} has the unknown dtype {message.dtype}; expected one of {', '.join(DTYPES)}"
        )
    if message.role not in _ROLE_OF_WIRE:
        raise PayloadError(f"tensor {name!r} has the unknown role {message.role}; expected parameter or buffer")
    return TensorSpec(name, shape, _DTYPE_OF_WIRE[message.dtype], _ROLE_OF_WIRE[message.role])


def fingerprint(specs: Iterable[TensorSpec]) -> bytes:
    """32 bytes that identify an ordered list of specs: BLAKE3 over an encoding in which no two lists look alike."""
    hasher = blake3()
    for spec in specs:
        for text in (spec.name, spec.dtype, spec.role):
            encoded = text.encode()
            hasher.update(struct.pack("<I", len(encoded)) + encoded)
        hasher.update(struct.pack(f"<I{len(spec.shape)}q", len(spec.shape), *spec.shape))
    return hasher.digest()


def explain_difference(expected: Sequence[TensorSpec], actual: Sequence[TensorSpec]) -> str:
    """A sentence that names the first few differences between two lists of specs; empty where they are equal."""
    wanted, found = ({spec.name: spec for spec in specs} for specs in (expected, actual))
    differences = [f"{name!r} is missing" for name in wanted if name not in found]
    differences += [f"{name!r} is not expected" for name in found if name not in wanted]
    for name in wanted:
        if name in found:
            differences += _explain_tensor(wanted[name], found[name])
    if len(found) != len(actual):
        differences.append("a name is listed twice")
    if not differences and list(expected) != list(actual):
        differences.append("the tensors are the same but their order differs")
    more = len(differences) - _MAX_DIFFERENCES
    return "; ".join(differences[:_MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _explain_tensor(expected: TensorSpec, actual: TensorSpec) -> list[str]:
    return [
        f"{expected.name!r} has {field} {getattr(actual, field)}, expected {getattr(expected, field)}"
        for field in ("shape", "dtype", "role")
        if getattr(actual, field) != getattr(expected, field)
    ]
