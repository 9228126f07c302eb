"""What benchmarks that are measured over hours, run by run, do alike: each run in a process of its own, kept in one JSON."""

from __future__ import annotations

import fcntl
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_ROOT: Final = Path(__file__).parent.parent
# Of Student's distribution, two-sided 95 %, by degrees of freedom.
_STUDENT: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def run_apart(module: str, *arguments: str) -> dict[str, Any]:
    """`python -m module arguments` to its end, and the JSON object that it printed last: what a run leaves in memory and in gRPC is
    nothing to the next. Raises CalledProcessError where it fails."""
    run = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def commit() -> str:
    """Which state of the repository this is."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip()


@contextmanager
def kept_in(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON of a benchmark, which is the file's name, to read and change, for one process at a time; written back when the block
    ends."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        content: dict[str, Any] = json.loads(text) if text else {"benchmark": path.stem}
        yield content
        file.seek(0)
        file.truncate()
        file.write(_compact(json.dumps(content, indent=1)) + "\n")


def _compact(text: str) -> str:
    """JSON with its lists of numbers on one line each."""
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)


@dataclass
class Interval:
    """Mean and 95 % interval of a paired difference or ratio, by Student's distribution; no interval for one pair."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """Of one value for each seed; None where there is none."""
        if not values:
            return None
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, None, None)
        half = _STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)
