"""The encoding that takes the best codec for each tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from fed_core.codecs.base import Analysis, TensorPlan, TileSource
from fed_core.codecs.fsq import FsqAnalysis
from fed_core.codecs.lrq import LrqAnalysis, NotLowRankError
from fed_core.codecs.planning import Aim, LossyTable, plan_tensors
from fed_core.specs import TensorSpec


class AutoConfig(LossyTable):
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

        return plan_tensors(tensors, analyze, self.aim, seed=seed)

    @property
    def aim(self) -> Aim:
        """What is to be reached, as the fields say."""
        return Aim(self.target_error, self.max_bits_per_parameter, self.max_tensor_error)
