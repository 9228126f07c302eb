"""What every codec's table in a run's configuration has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from fed_core.codecs.base import TensorPlan, TileSource
from fed_core.specs import TensorSpec


class CodecTable(BaseModel, ABC):
    """A codec and its settings as people write them: frozen, unknown keys refused, no number read out of a string."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: str

    @abstractmethod
    def plan(self, tensors: Sequence[tuple[TensorSpec, TileSource]], *, seed: int) -> list[TensorPlan]:
        """One plan per tensor, in order. What the codec cannot hold (integers, bools, complex, empty) is planned raw.

        The same tensors and seed give the same bytes.
        """
        ...

    @property
    def wants_feedback(self) -> bool:
        """Whether a client adds to an update what the encoding of its earlier ones lost: never, where there is no such option."""
        return False


class FeedbackTable(CodecTable):
    """A codec at which error feedback can be switched on (fed_client/training/residual.py).

    It must err by less than what it is given, |x - x'|^2 < |x|^2: a code that scales up what it keeps to be right on average may
    err by more, and its residual would grow without end.
    """

    feedback_by_default: ClassVar[bool] = False

    # None and not the default itself: it is the clients' uplink that the default is for, and a downlink refuses only what was said.
    feedback: bool | None = Field(
        default=None,
        description="Error feedback: a client adds what the encoding of its last update lost to the next one. Uplink only. Unset: "
        "on for sign, ternary, topk and a randomk that is not unbiased, which lose most of each update; off for the others, which "
        "gain nothing from it where unlike clients take part now and then.",
        examples=[True],
    )

    @property
    def wants_feedback(self) -> bool:
        """As `feedback` says; where it is unset, as suits the codec."""
        return self.feedback_by_default if self.feedback is None else self.feedback
