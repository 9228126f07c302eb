"""One step for all tensors of an update: how lossy encodings share bits between tensors and between codecs.

The cheapest way to a total error gives every coordinate the same slope of its rate-distortion curve: reverse water-filling (Cover
and Thomas, Elements of Information Theory, section 10.3.3). For uniform quantizers with entropy coding the step rules the slope, so
one step serves all, and it is the one number to search for. At a step each tensor takes the codec with the smallest
error + lambda * bits, which is what leads to the fewest bits in all. Two things are decided otherwise, for the sake of what is
learned: no tensor loses more than a share of itself, however little it weighs in the total, and small vectors are kept rather well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch
from pydantic import Field

from fed_core.codecs.base import Analysis, Cost, TensorPlan, TileSource
from fed_core.codecs.config import FeedbackTable
from fed_core.codecs.entropy import Coder
from fed_core.codecs.floating import is_lossy_parameter
from fed_core.codecs.raw import raw_plan
from fed_core.codecs.uniform import UniformCodec, uniform_plan
from fed_core.specs import TensorSpec

LAMBDA: Final = math.log(2) / 6
"""-dD/dR of a uniform quantizer of step 1: its error is 1/12 and falls by a factor of four per bit."""
SMALL_COORDINATES: Final = 4096
"""A tensor of so many coordinates or fewer may be sent by `uniform`, a vector always is."""

Analyze = Callable[[TensorSpec, TileSource], Iterable[Analysis]]
"""The ways in which a tensor may be encoded besides raw and, if it is small, uniform."""

_SMALL_BITS = (4, 5, 6, 7, 8)
_SMALL_BLOCK = 256
# Of the target, what the error of a small vector may be.
_SMALL_SHARE = 0.25
_SCAN_COORDINATES = 2**18

# A search ends when it has narrowed its argument down to this factor.
_NARROW = 1.01
# In steps of a plain quantizer of that error. Of real updates it is 1 to 6: more where much of a tensor is left unsaid.
_FIRST_STEP = 1.3
# Errors of real updates grow with the step's power of about 1.3; a little further, and the bracket is closed at once.
_SLOPE = 1.3
_OVERSHOOT = 1.08
_FIRST_FACTOR = (1.2, 64.0)
_LAST_FACTOR = 2.0**16
# Up there nothing is left of a tensor; down there it is raw, from wherever the search began.
_FURTHEST_UP = 2.0**30
_FURTHEST_DOWN = 2.0**100


class StepTooFineError(ValueError):
    """The tensor has values of more than 2^15 - 1 steps, or beyond float32: take a larger step, or send it raw."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What plans of an update are to reach.

    `target_error`: |x - x'|^2 / |x|^2 over all tensors that are not raw. `max_bits_per_parameter`: bits per coordinate of these,
    heads and bodies; the error then is what it must be. `max_tensor_error`: no tensor's own relative error is above this, whatever
    the other two say.
    """

    target_error: float
    max_bits_per_parameter: float | None = None
    max_tensor_error: float = 0.5


class LossyTable(FeedbackTable):
    """What all lossy encodings have in common. Buffers and tensors of other types are sent raw, small vectors by `uniform`."""

    target_error: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Squared error over squared length, |x - x'|^2 / |x|^2, of all lossy tensors of a payload together. 0.05 loses "
        "5 % of an update's energy; half the error takes about half a bit more for each value that is not zero.",
        examples=[0.1],
    )
    max_tensor_error: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="The same of any single tensor: layers with small updates move too, whatever they weigh in the whole.",
    )
    match_gain: bool = Field(
        default=False,
        description="Scale what is decoded so that, seen along the update, it is as long. Without it updates come out a little "
        "short, by about target_error; with it the error of each is a little larger.",
    )
    coder: Coder = Field(
        default="rans",
        description="Entropy coder: rans is shortest; packed does without the package `constriction`.",
    )

    @property
    def aim(self) -> Aim:
        """What is to be reached, as the fields say."""
        return Aim(self.target_error, max_tensor_error=self.max_tensor_error)


def plan_tensors(
    tensors: Sequence[tuple[TensorSpec, TileSource]], analyze: Analyze, aim: Aim, *, seed: int
) -> list[TensorPlan]:
    """One plan per tensor, in order; parameters of a lossy type are analyzed, all else is raw.

    The error that comes out is within a few percent of the target, as far as the analyses' estimates are true. Memory: all analyses
    at once.
    """
    ways = [_Ways.of(spec, source, analyze, aim, seed) for spec, source in tensors]
    lossy = [each for each in ways if each is not None]
    step = _common_step(lossy, aim)
    return [
        raw_plan(spec, source) if each is None else each.plan(step)
        for (spec, source), each in zip(tensors, ways, strict=True)
    ]


class _Ways:
    """The ways in which one tensor may be encoded."""

    def __init__(self, analyses: Sequence[Analysis], num_coordinates: int, energy: float, max_error: float) -> None:
        self._analyses = analyses
        self.num_coordinates = num_coordinates
        self.energy = energy
        self._max_error = max_error
        self._largest_step = math.inf
        self._rivals = [Rival() for _ in analyses]

    @classmethod
    def of(cls, spec: TensorSpec, source: TileSource, analyze: Analyze, aim: Aim, seed: int) -> _Ways | None:
        """None for a tensor that must be raw: no parameter, no lossy type, or (float64) beyond float32."""
        if not is_lossy_parameter(spec):
            return None
        energy = _energy(spec, source)
        if not math.isfinite(energy):
            return None
        analyses: list[Analysis] = [_raw(spec, source)]
        is_small, is_vector = spec.num_elements <= SMALL_COORDINATES, max(spec.shape, default=1) == spec.num_elements
        if is_small:
            analyses.append(_small_uniform(spec, source, _SMALL_SHARE * aim.target_error * energy, seed))
        if not (is_small and is_vector):
            analyses += analyze(spec, source)
        return cls(analyses, spec.num_elements, energy, aim.max_tensor_error * energy)

    def error(self, step: float) -> float:
        """The error at the step, or at the largest that leaves enough of the tensor: that one need not be known for it."""
        if step > self._largest_step:
            return self._max_error
        return min(self._ranking(step)[0][0].squared_error, self._max_error)

    def bits(self, step: float) -> float:
        """The bits at the step, or at the largest that leaves enough of the tensor."""
        return self._ranking(self._bounded(step))[0][0].bits

    def _bounded(self, step: float) -> float:
        """The step, or the largest that leaves enough of the tensor."""
        step = min(step, self._largest_step)
        if self._ranking(step)[0][0].squared_error > self._max_error:
            step = self._largest_step = solve_rising(
                lambda smaller: self._ranking(smaller)[0][0].squared_error, self._max_error, step, near=0.05
            )
        return step

    def plan(self, step: float) -> TensorPlan:
        """The plan of the best way of which one can be made."""
        step = self._bounded(step)
        for _, analysis in self._ranking(step):
            try:
                return analysis.plan(step)
            except StepTooFineError:
                continue
        raise AssertionError("raw can always be planned")

    def _ranking(self, step: float) -> list[tuple[Cost, Analysis]]:
        """The ways from the best to the worst, without those that cannot be the best. Never empty: raw is always there."""
        ranking = []
        for index, (analysis, rival) in enumerate(zip(self._analyses, self._rivals, strict=True)):
            if rival.may_lead(step):
                with suppress(StepTooFineError):
                    cost = analysis.cost(step)
                    ranking.append((lagrangian(cost, step), index, cost))
        ranking.sort()
        for value, index, cost in ranking:
            if not isinstance(self._analyses[index], _Fixed):
                # A gain that is matched where next to nothing is left of a tensor makes any error, which tells nothing of finer
                # steps.
                is_telling = cost.squared_error <= 1.01 * self.energy
                self._rivals[index].note(step, value if is_telling else ranking[0][0], ranking[0][0])
        return [(cost, self._analyses[index]) for _, index, cost in ranking]


class Rival:
    """A way that was so far behind at some step that it need not be looked at again at steps nearby.

    As the step doubles, error + lambda * bits of an ideal code grows by 1 to 4, so that the ratio of two may change by 4; measured
    on updates of clients, that of two codecs changes by less than 2.
    """

    def __init__(self) -> None:
        self._at, self._octaves = 1.0, 0.0

    def may_lead(self, step: float) -> bool:
        """Whether it is worth looking at."""
        return abs(math.log2(step / self._at)) >= self._octaves

    def note(self, step: float, value: float, best: float) -> None:
        """How it compared at that step."""
        self._at, self._octaves = step, math.log2(value / best) if best > 0 else 0.0


def lagrangian(cost: Cost, step: float) -> float:
    """Error + lambda * bits."""
    return cost.squared_error + LAMBDA * step**2 * cost.bits


def _common_step(ways: Sequence[_Ways], aim: Aim) -> float:
    """The largest step that meets the target, or a larger one where that would take more bits than there are."""
    energy = sum(each.energy for each in ways)
    num_coordinates = sum(each.num_coordinates for each in ways)
    if not energy:
        return 1.0

    start = _FIRST_STEP * math.sqrt(12 * aim.target_error * energy / num_coordinates)
    step = solve_rising(lambda step: sum(each.error(step) for each in ways), aim.target_error * energy, start)
    if aim.max_bits_per_parameter is not None:
        budget = aim.max_bits_per_parameter * num_coordinates
        if sum(each.bits(step) for each in ways) > budget:
            step = 1 / solve_rising(lambda inverse: sum(each.bits(1 / inverse) for each in ways), budget, 1 / step)
    return step


def solve_rising(value: Callable[[float], float], limit: float, start: float, *, near: float = 0.02) -> float:
    """A positive argument at which a rising function is at most the limit: within a share of it, or just before it jumps over it.

    Brackets from `start` outwards, then takes false positions between logarithms. Where the function never crosses the limit: an
    argument far beyond, 2^30 times as large as `start` at most or 2^100 times as small.
    """

    def excess(argument: float) -> float:
        found = value(argument)
        if found > 0 and limit > 0:
            return math.log(found / limit)
        return math.inf if found > limit else -math.inf

    here, here_excess = start, excess(start)
    is_below = here_excess <= 0
    if -near <= here_excess <= 0:
        return start
    far, far_excess = here, here_excess
    least, most = _FIRST_FACTOR
    factor = min(max(_OVERSHOOT * math.exp(min(abs(here_excess) / _SLOPE, math.log(most))), least), most)
    while (far_excess <= 0) == is_below:
        here, here_excess = far, far_excess
        far = min(far * factor, start * _FURTHEST_UP) if is_below else max(far / factor, start / _FURTHEST_DOWN)
        if far == here:
            return here
        factor = min(factor**2, _LAST_FACTOR)
        far_excess = excess(far)
    low, below, high, above = (here, here_excess, far, far_excess) if is_below else (far, far_excess, here, here_excess)
    while below < -near and high > _NARROW * low:
        # Aims at the middle of what is near enough; never at the ends of the bracket, for the function may have steps.
        share = (below + near / 2) / (below - above) if math.isfinite(below - above) else 0.5
        middle = low * (high / low) ** min(max(share, 0.1), 0.9)
        found = excess(middle)
        if found <= 0:
            low, below, above = middle, found, above / 2
        else:
            high, above, below = middle, found, min(below / 2, -2 * near)
    return low


class _Fixed:
    """A plan that no step changes."""

    def __init__(self, plan: TensorPlan, cost: Cost) -> None:
        self._plan, self._cost = plan, cost

    def cost(self, step: float) -> Cost:
        return self._cost

    def plan(self, step: float) -> TensorPlan:
        return self._plan


def _raw(spec: TensorSpec, source: TileSource) -> _Fixed:
    return _Fixed(raw_plan(spec, source), Cost(8 * spec.num_bytes, 0.0))


def _small_uniform(spec: TensorSpec, source: TileSource, max_error: float, seed: int) -> _Fixed:
    """In the fewest bits with which the error is small enough, or the most there are."""
    tile = source(0, spec.num_elements).clone()
    decoded = torch.empty_like(tile)
    for bits in _SMALL_BITS:
        plan = uniform_plan(spec, source, bits=bits, block=_SMALL_BLOCK, seed=seed)
        body = plan.encode(0, tile)
        UniformCodec().decoder(spec, None).decode(0, body, decoded)
        cost = Cost(8 * len(body), float((decoded.double() - tile.double()).square().sum()))
        if cost.squared_error <= max_error:
            break
    return _Fixed(plan, cost)


def _energy(spec: TensorSpec, source: TileSource) -> float:
    """|x|^2 of the tensor in float32."""
    energy = 0.0
    for first in range(0, spec.num_elements, _SCAN_COORDINATES):
        tile = source(first, min(_SCAN_COORDINATES, spec.num_elements - first))
        energy += float(tile.float().double().square().sum())
    return energy
