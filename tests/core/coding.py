"""Tensors through a codec and back, as a payload's writer and reader would take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fed_core.codecs.base import Codec, TensorPlan, TileSource
from fed_core.specs import TensorSpec
from fed_core.tensors import dtype_name, torch_dtype

FLOATS = ("float32", "float16", "bfloat16", "float64")


class Body(NamedTuple):
    """One encoded body and the coordinates that it stands for."""

    first: int
    num_coordinates: int
    data: bytes


def spec_of(tensor: Tensor, name: str = "w") -> TensorSpec:
    """The spec of a parameter."""
    return TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype))


def source_of(tensor: Tensor) -> TileSource:
    """The tensor, tile by tile."""
    flat = tensor.reshape(-1)
    return lambda first, count: flat[first : first + count]


def encode(plan: TensorPlan, tensor: Tensor) -> list[Body]:
    """The bodies that the plan makes of the tensor."""
    flat, step = tensor.reshape(-1), plan.body_coordinates
    tiles = [(first, flat[first : first + step]) for first in range(0, len(flat), step)]
    return [Body(first, len(tile), bytes(plan.encode(first, tile))) for first, tile in tiles]


def decode(codec: Codec, spec: TensorSpec, head: bytes | None, bodies: Iterable[Body], fill: int = 0x5A) -> Tensor:
    """The tensor, from bodies in any order; what no body writes keeps the bytes `fill`."""
    out = torch.full((spec.num_bytes,), fill, dtype=torch.uint8).view(torch_dtype(spec.dtype))
    decoder = codec.decoder(spec, head)
    for body in bodies:
        decoder.decode(body.first, memoryview(body.data), out[body.first : body.first + body.num_coordinates])
    return out.view(spec.shape)


def memory_of(tensor: Tensor) -> bytes:
    """Bits, so that NaN equals itself and -0 is not 0."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random_bits(num_coordinates: int, dtype: str, seed: int) -> Tensor:
    """Every bit pattern of the dtype, NaN payloads included; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "bool":
        return torch.randint(0, 2, (num_coordinates,), generator=generator).bool()
    element = torch_dtype(dtype)
    memory = torch.randint(0, 256, (num_coordinates * element.itemsize,), generator=generator, dtype=torch.uint8)
    return memory.view(element)


def finite(num_coordinates: int, dtype: str, seed: int) -> Tensor:
    """Finite values of every size that the dtype has and float32 can hold, both zeros and denormals included."""
    values = random_bits(num_coordinates, dtype, seed)
    return torch.where(values.float().isfinite(), values, torch.zeros_like(values))


def normal(shape: tuple[int, ...], dtype: str = "float32", *, scale: float = 0.02, seed: int = 0) -> Tensor:
    """Gaussian values, as of an update."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(torch_dtype(dtype))
