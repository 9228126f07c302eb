"""Blocks of coordinates that share a scale of two bytes, the upper half of a float32: 0, or a normal number with 8 bits of
mantissa."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_core.errors import PayloadError

BlockLength = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]

MIN_LOG_BLOCK: Final = 5
MAX_LOG_BLOCK: Final = 16
LEAST_SCALE: Final = 0x0080
"""2^-126: no product is denormal, and no machine's way of flushing those matters."""
_INFINITE_SCALE: Final = 0x7F80


def read_scales(data: bytes | memoryview, num_blocks: int, offset: int) -> Tensor:
    """So many scales from a byte on, float32. Raises PayloadError for one that cannot be."""
    scales = np.frombuffer(data, np.uint16, num_blocks, offset)
    is_good = (scales == 0) | (scales >= LEAST_SCALE) & (scales < _INFINITE_SCALE)
    if not is_good.all():
        raise PayloadError(f"the scale {scales[~is_good][0]:#06x}; expected 0, or {LEAST_SCALE:#06x} to 0x7f7f")
    return scales_as_floats(scales)


def scales_as_floats(scales: NDArray[np.uint16]) -> Tensor:
    """What the upper halves stand for."""
    return torch.from_numpy((scales.astype(np.uint32) << 16).view(np.float32))


def split_blocks(values: Tensor, block: int, of_blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole blocks as a matrix, and the last one that is shorter, each with the column of what belongs to it."""
    num_whole = len(values) // block
    if num_whole:
        yield values[: num_whole * block].view(num_whole, block), of_blocks[:num_whole, None]
    if len(values) % block:
        yield values[num_whole * block :].view(1, -1), of_blocks[num_whole : num_whole + 1, None]
