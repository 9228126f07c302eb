"""The sum of central differential privacy: updates cut to a norm, added up exactly, released once with noise (DP-FedAvg, McMahan et
al. 2018, https://arxiv.org/abs/1710.06963, algorithm 1, with the estimator that divides by the expected cohort).

    released = (sum_i clip(x_i) + noise) / (q N),    clip(x) = x min(1, C / |x|)

x is the whole update, all tensors that are released as one vector. Clipped updates are rounded toward zero to a grid whose step is
a power of two, so that no norm grows and every norm is checked exactly; sums are whole numbers of steps, so no order of arrival
changes a bit; the noise is a Gaussian rounded to the same grid (`fed_core.privacy.noise`). Who is missing counts as zero, and the
divisor is a constant: nothing but the noisy sum says who was there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fed_core.errors import ConfigError, InvalidError
from fed_core.failpoints import failpoint
from fed_core.payload.reader import PayloadReader
from fed_core.privacy.clipping import (
    SquaredNorm,
    clip_factor,
    max_squared_steps,
    squared_steps,
    step_exponent,
    to_steps,
)
from fed_core.privacy.noise import GridGaussian, NoiseStream
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter
from fed_core.specs import TensorSpec, is_floating
from fed_server.aggregation.exact import TILE, ExactSum, SumMemory, scratch_tile
from fed_server.aggregation.mean import as_reals
from fed_server.aggregation.merge_rules import MergeRule

logger = logging.getLogger(__name__)


def released_specs(specs: Sequence[TensorSpec], rules: Mapping[str, MergeRule]) -> list[TensorSpec]:
    """The tensors that a private run releases. Raises ConfigError where the model has others that its rules would merge: running
    statistics and counters have scales of their own, which one clipping norm over all tensors does not fit."""
    for spec in specs:
        if rules[spec.name] != "keep" and not (is_floating(spec.dtype) and spec.role == "parameter"):
            raise ConfigError(
                f"privacy: {spec.name!r} ({spec.dtype}) is a buffer that follows the sites' data, and no noise fits its scale; use "
                "layers without running statistics (GroupNorm, LayerNorm), or keep it as it is: [[aggregation.merge]] with pattern "
                f'= "{spec.name}" and rule = "keep"'
            )
    return [spec for spec in specs if rules[spec.name] == "mean"]


@dataclass(frozen=True)
class PrivateNoise:
    """The Gaussian noise on a round's sum: its standard deviation, and that of the noise on the sum of bits by which an adaptive
    clipping norm is found, 0 where it is fixed.

    Where noise is correlated between rounds, `drawn_again` is what earlier rounds drew and this one takes a part of: (key of a
    stream, weight), and `key` that of the round's own stream. Weights that are not whole need a grid that is finer by `finer_bits`,
    for their sum is rounded to it."""

    std: float
    bit_std: float = 0.0
    finer_bits: int = 0
    key: bytes | None = field(default=None, repr=False)
    drawn_again: Sequence[tuple[bytes, float]] = field(default=(), repr=False)

    @property
    def exponent(self) -> int:
        """Sums are whole multiples of 2^exponent."""
        return step_exponent(self.std) - self.finer_bits

    def gaussian(self) -> GridGaussian:
        """The noise on sums, in steps."""
        return GridGaussian(self.std * 2.0**-self.exponent)

    def bit_gaussian(self) -> GridGaussian:
        """The noise on the sum of bits, in steps."""
        return GridGaussian(self.bit_std * 2.0**-self.bit_exponent)

    @property
    def bit_exponent(self) -> int:
        """So are sums of bits."""
        return step_exponent(self.bit_std)

    def failure(self, num_reals: int) -> float:
        """Probability, at most, that what is drawn for so many coordinates is not Gaussian noise rounded to the grid."""
        failure = self.gaussian().failure(num_reals)
        return failure + self.bit_gaussian().failure(1) if self.bit_std else failure


class PrivateSum:
    """The sum of a round, with its noise. `norms` says what each update is cut to, by assignment; `clipping_norm` is the unit's.

    The noise is drawn by `draw`, or with the first update, and not a second time. Once `release` has written the sum
    down durably, nothing may be drawn for its round again: go on from the file (`ReleasedSum`).

    Memory: 8 bytes per element, out of `memory`, and one decoded tile; each update is decoded twice."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        noise: PrivateNoise,
        norms: Mapping[str, float],
        clipping_norm: float,
        memory: SumMemory | None = None,
    ) -> None:
        self._specs = list(specs)
        self._noise = noise
        self._norms = norms
        self._clipping_norm = clipping_norm
        scratch = scratch_tile()
        self._sums = {
            spec.name: ExactSum(spec.num_elements * spec.reals_per_element, noise.exponent, scratch, memory)
            for spec in specs
        }
        self._bits = 0
        self._num_updates = self._num_clipped = 0
        self._is_drawn = False

    @property
    def num_updates(self) -> int:
        """Updates folded so far; as secret as the cohort."""
        return self._num_updates

    @property
    def num_clipped(self) -> int:
        """Of these, those that were longer than their norm; as secret."""
        return self._num_clipped

    @property
    def total_weight(self) -> int:
        """Every update counts the same."""
        return self._num_updates

    def add(self, update: PayloadReader, weight: int) -> None:
        """Cuts an update to its norm and adds it; `weight` is not looked at. An update that one cannot say the norm of is refused
        before anything of it is in the sum."""
        info = update.manifest.update
        assert info is not None, "updates are verified before they are folded"
        bound = self._norms[info.assignment_id]
        norm = SquaredNorm()
        for spec in self._specs:
            for _, tile in update.iter_tiles(spec.name):
                norm.add(as_reals(tile))
        factor = clip_factor(norm.value, bound)
        self.draw()
        squared, out = 0, torch.empty(TILE, dtype=torch.float64)
        for spec in self._specs:
            for first, decoded in update.iter_tiles(spec.name):
                reals = as_reals(decoded)
                for start in range(0, len(reals), TILE):
                    tile = reals[start : start + TILE]
                    steps = to_steps(tile, factor, self._noise.exponent, out[: len(tile)])
                    squared += squared_steps(steps)
                    self._sums[spec.name].add_steps(first * spec.reals_per_element + start, steps)
            failpoint("mid-fold")
        if squared > max_squared_steps(bound, self._noise.exponent):
            raise InvalidError(f"the clipped update of assignment {info.assignment_id} is longer than its norm")
        if self._noise.bit_std:
            # Half a bit for a unit of one client, less for each of several, toward zero.
            half = int(0.5 * min(1.0, bound / self._clipping_norm) * 2.0**-self._noise.bit_exponent)
            self._bits += half if factor == 1.0 else -half
        self._num_updates += 1
        self._num_clipped += factor < 1.0

    def can_report(self) -> bool:
        """An empty round is released like any other."""
        return True

    def prepare(self) -> None:
        """Draws the noise, if that was not done."""
        self.draw()

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """Nothing: a sum is read from what `release` wrote."""
        raise InvalidError("a private sum is released before it is read")

    def draw(self) -> None:
        """Draws the noise, once; may come before the first update."""
        if self._is_drawn:
            return
        self._is_drawn = True
        noise, gaussian = self._noise, self._noise.gaussian()
        stream = NoiseStream(noise.key)
        again = [(NoiseStream(key), weight) for key, weight in noise.drawn_again]
        for total in self._sums.values():
            gaussian.add_to(total.steps, stream)
            if again:
                _add_parts(total.steps, gaussian, again)
        if noise.bit_std:
            self._bits += int(noise.bit_gaussian().draw(1, stream)[0])
        failpoint("noise-drawn")

    def release(self, path: Path) -> None:
        """Writes the noisy sum, which is the only thing that is ever made of the round's updates; not yet durable. Memory: one
        tile."""
        self.draw()
        specs = [
            TensorSpec(spec.name, (spec.num_elements * spec.reals_per_element,), "float64", spec.role)
            for spec in self._specs
        ]
        metadata = {"exponent": str(self._noise.exponent)}
        if self._noise.bit_std:
            metadata["bits"] = str(self._bits * 2.0**self._noise.bit_exponent)
        with path.open("wb+") as file:
            writer = SafetensorsWriter(file, specs, metadata)
            for spec in specs:
                for first in range(0, spec.num_elements, TILE):
                    writer.write_tile(spec.name, first, self._sums[spec.name].steps[first : first + TILE])
            writer.finish()


def _add_parts(steps: Tensor, gaussian: GridGaussian, again: Sequence[tuple[NoiseStream, float]]) -> None:
    """Adds the weighted sum of what the streams draw, rounded to whole steps once. Memory: two tiles."""
    for start in range(0, len(steps), TILE):
        tile = steps[start : start + TILE]
        parts = torch.zeros_like(tile)
        for stream, weight in again:
            drawn = torch.zeros_like(tile)
            gaussian.add_to(drawn, stream)
            parts += drawn * weight
        tile += parts.round_()


class ReleasedSum:
    """The noisy sum of a round as a file has it, divided by the expected number of units. An `Aggregator` that has been told all
    there is; it counts no updates, for nobody may know how many there were."""

    def __init__(self, path: Path, expected_units: float) -> None:
        """`expected_units` is q N. Raises PayloadError where the file is damaged."""
        self._file = SafetensorsReader(path)
        self._expected = expected_units
        self._scale = 2.0 ** int(self._file.metadata["exponent"])
        self._names = {spec.name for spec in self._file.specs}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def uncut_part(self) -> float:
        """Part of the units whose updates were not longer than an adaptive clipping norm, as it was released with noise."""
        return 0.5 + float(self._file.metadata["bits"]) / self._expected

    @property
    def num_updates(self) -> int:
        """Not told: 0."""
        return 0

    @property
    def total_weight(self) -> int:
        """Not told: 0."""
        return 0

    def add(self, update: PayloadReader, weight: int) -> None:
        """Refused: the sum was released."""
        raise InvalidError("the sum of this round was released; nothing can be added to it any more")

    def can_report(self) -> bool:
        """Always."""
        return True

    def prepare(self) -> None:
        """Nothing is left to decide."""

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """See `Aggregator.report`."""
        if spec.name not in self._names:
            return None
        reals = spec.reals_per_element
        steps = self._file.read_tile(spec.name, first * reals, count * reals)
        return steps.mul_(self._scale).div_(self._expected)


def next_clipping_norm(norm: float, uncut_part: float, quantile: float, learning_rate: float) -> float:
    """The bound of the next round, so that a `quantile` of the updates stays uncut (Andrew et al. 2021,
    https://arxiv.org/abs/1905.03871, algorithm 1): norm exp(-learning_rate (uncut_part - quantile)), from 1e-6 to 1e6."""
    return min(max(norm * exp(-learning_rate * (uncut_part - quantile)), 1e-6), 1e6)
