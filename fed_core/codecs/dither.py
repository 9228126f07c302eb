"""Random thresholds that belong to coordinates: drawn from a seed, the same wherever a tile begins."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

# Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) gives four words of 64 bits per count.
_PER_COUNT: Final = 16


def dither_key(seed: int, name: str) -> int:
    """That of a tensor: 128 bits."""
    return int.from_bytes(blake3(f"{seed}/{name}".encode()).digest(16), "little")


def dither(key: int, first: int, num_coordinates: int) -> Tensor:
    """Uniform on (0, 1) by 16 bits, float32, for the coordinates from `first` on."""
    count, skipped = divmod(first, _PER_COUNT)
    words = np.random.Philox(key=key, counter=count).random_raw(-(-(skipped + num_coordinates) // 4))
    numbers = words.view(np.uint16)[skipped : skipped + num_coordinates].astype(np.float32)
    return torch.from_numpy(numbers).add_(0.5).mul_(2.0**-16)
