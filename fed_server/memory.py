"""Keeping freed memory from piling up."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_M_ARENA_MAX = -8


def limit_arenas(count: int = 2) -> None:
    """Lets the C library keep at most `count` heaps; does nothing where that is not glibc.

    glibc makes up to eight per core, one a thread, and each keeps the megabytes of the transfers that once passed through it: 100
    MiB at 8 transfers (benchmarks/echo_rounds.py)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, count)
