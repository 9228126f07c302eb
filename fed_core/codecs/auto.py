"""The encoding that takes the best codec for each tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal

from pydantic import Field

from fed_core.codecs.base import Analysis, TensorPlan, TileSource
from fed_core.codecs.fsq import FsqAnalysis
from fed_core.codecs.lrq import LrqAnalysis, NotLowRankError
from fed_core.codecs.planning import Aim, LossyTable, plan_tensors
from fed_core.specs import TensorSpec

COHORT: Final = 10
"""Size of a cohort up to which every update is to have the target error itself."""
_MOST_SHARE: Final = 10.0


class AutoConfig(LossyTable):
    """The fewest bits for an error: each tensor by the codec that suits it, all at one step.

    What counts is the error of the cohort's mean. Errors of different updates average out as far as they are independent, so each
    update of a large cohort may have more of it: see `for_cohort`.
    """

    kind: Literal["auto"] = Field(
        default="auto",
        description="lrq, fsq, uniform or raw for each tensor, whichever is best at the step that all share.",
    )
    target_error: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="Squared error over squared length, |x - x'|^2 / |x|^2, of an update, over all lossy tensors together. In a "
        "cohort of more than ten, whose mean averages errors out, n/10 times as much, up to ten times.",
        examples=[0.1],
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

    def for_cohort(self, size: int) -> AutoConfig:
        """The encoding of one of so many updates whose mean is to be as good as that of ten with `target_error` each: n updates
        with an error of e each leave about e / n of one update's energy in their mean. At most ten times the target, and never
        above `max_tensor_error`: what all updates leave out together does not average out."""
        share = min(max(size / COHORT, 1.0), _MOST_SHARE)
        if share == 1.0:
            return self
        # An error of a fifth would shorten every update, and their mean with them, by a fifth.
        error = min(share * self.target_error, self.max_tensor_error)
        return self.model_copy(update={"target_error": error, "match_gain": True})

    @property
    def aim(self) -> Aim:
        """What is to be reached, as the fields say."""
        return Aim(self.target_error, self.max_bits_per_parameter, self.max_tensor_error)
