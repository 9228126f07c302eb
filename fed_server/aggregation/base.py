"""What a round needs of an aggregator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fed_core.payload.reader import PayloadReader
from fed_core.specs import TensorSpec
from fed_server.aggregation.exact import SumMemory
from fed_server.aggregation.loss_weight import LossWeighting
from fed_server.aggregation.merge_rules import MergeRule


@dataclass(frozen=True)
class AggregatorSetting:
    """What an aggregator of one round works with besides its config: the model's tensors, the round's grid and the merge rules by
    name, a folder for files that go with the aggregator, memory that the run's earlier rounds used, how weights go by a loss, where
    they do, and the clients' learning rate before its schedule. `divisor` is what a mean's sum is divided by where that is not the
    sum of weights."""

    specs: Sequence[TensorSpec]
    grid: Mapping[str, int]
    rules: Mapping[str, MergeRule]
    scratch_folder: Path
    memory: SumMemory = field(default_factory=SumMemory)
    loss_weighting: LossWeighting | None = None
    learning_rate: float = 1.0
    divisor: int | None = None


class Aggregator(Protocol):
    """Combines a round's updates, a stream: memory does not grow with the cohort.

    `add` is called once per update, from one thread, in any order; the result may not depend on it. Then `prepare`, then `report`.
    """

    def add(self, update: PayloadReader, weight: int) -> None:
        """Folds one verified update. `weight` is a whole number from 1 to the run's max_weight. Raises OSError where the disk is
        full; the aggregator is then as it was."""
        ...

    @property
    def num_updates(self) -> int:
        """Updates folded so far."""
        ...

    @property
    def total_weight(self) -> int:
        """Sum of their weights."""
        ...

    def can_report(self) -> bool:
        """Whether there is anything to report."""
        ...

    def prepare(self) -> None:
        """Decides what only all updates together decide; blocks for as long as passes over them take. After the last `add` and
        before the first `report`; a repeat changes nothing. Raises InvalidError where the updates are not what the rule needs."""
        ...

    def report(self, spec: TensorSpec, first: int, count: int) -> Tensor | None:
        """The combination for `count` coordinates of a tensor from `first` on, 1-D. For a floating tensor the change to apply,
        float64 (complex ones as real pairs: `count` counts complex elements and the result has twice as many); for the others
        the new value in the tensor's dtype. None where the base model's value stays."""
        ...
