"""The lossy encodings as people choose them: the best codec for each tensor, or one family alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from fed_core.codecs.base import Analysis, TensorPlan, TileSource
from fed_core.codecs.config import CodecTable
from fed_core.codecs.entropy import Coder
from fed_core.codecs.fsq import FsqAnalysis
from fed_core.codecs.lrq import LrqAnalysis, NotLowRankError
from fed_core.codecs.planning import Aim, plan_tensors
from fed_core.specs import TensorSpec


class _LossyTable(CodecTable):
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
        description="Scale what is decoded so that, seen along the update, it is as long. Without it updates come out a little short, "
        "by about target_error; with it the error of each is a little larger.",
    )
    coder: Coder = Field(
        default="rans",
        description="Entropy coder: rans is shortest; packed does without the package `constriction`.",
    )

    def _aim(self) -> Aim:
        return Aim(self.target_error, max_tensor_error=self.max_tensor_error)


class FsqConfig(_LossyTable):
    """Uniform steps under a model of the scale of rows and columns."""

    kind: Literal["fsq"] = Field(
        default="fsq",
        description="One step for all values, entropy-coded with the scales of rows and columns as context.",
    )
    contexts: bool = Field(
        default=True, description="Whether rows and columns tell a value's model. Off: one model per tensor, faster."
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Lossy tensors by fsq at one step; small ones by uniform where that is better."""

        def analyze(spec: TensorSpec, source: TileSource) -> Iterator[Analysis]:
            yield FsqAnalysis(spec, source, contexts=self.contexts, match_gain=self.match_gain, coder=self.coder)

        return plan_tensors(tensors, analyze, self._aim(), seed=seed)


class LrqConfig(_LossyTable):
    """Matrices by their leading singular components, everything else as fsq has it."""

    kind: Literal["lrq"] = Field(
        default="lrq", description="Matrices as sums of outer products of small integers, the rest as fsq does."
    )
    max_rank: int = Field(
        default=64,
        ge=1,
        le=1024,
        description="Components looked for in each matrix; those that pay are sent. More takes longer.",
    )
    residual: bool | None = Field(
        default=None,
        description="Whether what the components leave is coded too, by fsq. Unset: where it pays.",
        examples=[False],
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """Matrices by lrq, even where fsq is shorter; what is no matrix by fsq, or if small by uniform."""

        def analyze(spec: TensorSpec, source: TileSource) -> Iterator[Analysis]:
            try:
                yield LrqAnalysis(
                    spec,
                    source,
                    max_rank=self.max_rank,
                    residual=self.residual,
                    match_gain=self.match_gain,
                    coder=self.coder,
                    seed=seed,
                )
            except NotLowRankError:
                yield FsqAnalysis(spec, source, match_gain=self.match_gain, coder=self.coder)

        return plan_tensors(tensors, analyze, self._aim(), seed=seed)


class AutoConfig(_LossyTable):
    """The fewest bits for an error: each tensor by the codec that suits it, all at one step."""

    kind: Literal["auto"] = Field(
        default="auto",
        description="lrq, fsq, uniform or raw for each tensor, whichever is best at the step that all share.",
    )
    max_bits_per_parameter: Annotated[float, Field(gt=0, le=32)] | None = Field(
        default=None,
        description="Most bits per value, over all lossy tensors of a payload; where target_error would take more, the error gives "
        "way (but not max_tensor_error). The manifest, some 100 bytes a tensor, is not counted. Unset: no limit.",
        examples=[0.1],
    )

    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """The plans with the fewest bits that meet the target, or the least error that meets the limit on bits."""

        def analyze(spec: TensorSpec, source: TileSource) -> Iterator[Analysis]:
            yield FsqAnalysis(spec, source, match_gain=self.match_gain, coder=self.coder)
            try:
                yield LrqAnalysis(spec, source, match_gain=self.match_gain, coder=self.coder, seed=seed)
            except NotLowRankError:
                return

        aim = Aim(self.target_error, self.max_bits_per_parameter, self.max_tensor_error)
        return plan_tensors(tensors, analyze, aim, seed=seed)
