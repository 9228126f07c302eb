"""What every codec's table in a run's configuration has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

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
