"""What the lossy codecs agree on: which tensors they hold, and how values enter a smaller type."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from fed_core.errors import InvalidError, PayloadError
from fed_core.specs import PARAMETER, TensorSpec
from fed_core.tensors import dtype_name

LOSSY_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
TILE: Final = 2**16
"""Coordinates that a hot loop handles at once: 256 KiB of float32 stay in the second-level cache."""


def is_lossy(spec: TensorSpec) -> bool:
    """Whether a lossy codec may hold the tensor; any other is sent raw."""
    return spec.dtype in LOSSY_DTYPES and spec.num_elements > 0


def is_lossy_parameter(spec: TensorSpec) -> bool:
    """Whether something may be left out of the tensor: of what is trained, not of buffers."""
    return spec.role == PARAMETER and is_lossy(spec)


def mantissa_exponent(value: float, bits: int) -> tuple[int, int]:
    """A positive number rounded to so many bits, as an odd whole number and the exponent of a power of two."""
    mantissa, exponent = math.frexp(value)
    whole, exponent = round(math.ldexp(mantissa, bits)), exponent - bits
    while not whole & 1:
        whole, exponent = whole >> 1, exponent + 1
    return whole, exponent


def check_lossy(kind: str, spec: TensorSpec, head: bytes | memoryview | None = None) -> None:
    """Raises PayloadError unless a codec without a head may hold the tensor."""
    if spec.dtype not in LOSSY_DTYPES:
        raise PayloadError(f"the codec {kind!r} holds {', '.join(LOSSY_DTYPES)}, not {spec.dtype}; expected raw")
    if head is not None:
        raise PayloadError(f"the codec {kind!r} has no head; here is one of {len(head)} bytes")


def narrow(name: str, tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The tile rounded to float32 and then to `dtype`; itself where it is of that type already.

    Raises InvalidError naming the tensor where a value would become infinite.
    """
    if tile.dtype is dtype:
        return tile
    if torch.finfo(tile.dtype).max > torch.finfo(dtype).max:
        # Rounding is monotone: all values stay finite where the extremes do.
        extremes = torch.stack(torch.aminmax(tile))
        if not extremes.float().to(dtype).isfinite().all():
            largest = float(extremes.abs().max())
            cure = "bfloat16" if dtype is torch.float16 and extremes.float().bfloat16().isfinite().all() else "raw"
            raise InvalidError(
                f"tensor {name!r} holds a value of {largest:.5g}, beyond {dtype_name(dtype)}'s {torch.finfo(dtype).max:.5g}; "
                f"look at the learning rate, or send it as {cure}"
            )
    return tile.float().to(dtype)
