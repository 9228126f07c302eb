"""Crashes at named points, for the tests that prove that a crash there loses nothing.

With `FEDSTREAM_FAIL_AT=name` in the environment the process kills itself (SIGKILL: no handler, no flush) the first time that
it reaches that point; with `name:3` the third time. Without the variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

ENVIRONMENT_VARIABLE = "FEDSTREAM_FAIL_AT"

_reached: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Kills the process here if the environment says so."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted is None:
        return
    point, _, nth = wanted.partition(":")
    if point != name:
        return
    _reached[name] += 1
    if _reached[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
