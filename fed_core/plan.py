"""What a client is told to do in a round, and what a site may change of it. Free of torch; mirrors the message `TrainingPlan`.

Both sides build plans through these classes, so a value that makes no sense is refused by whoever has it first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from fed_core.errors import InvalidError
from fedstream.v1 import common_pb2

_WIRE_OF_KIND: Final = {
    "sgd": common_pb2.OPTIMIZER_KIND_SGD,
    "adam": common_pb2.OPTIMIZER_KIND_ADAM,
    "adamw": common_pb2.OPTIMIZER_KIND_ADAMW,
}
_KIND_OF_WIRE: Final = {wire: kind for kind, wire in _WIRE_OF_KIND.items()}
_WIRE_OF_OBJECTIVE: Final = {
    "plain": common_pb2.OBJECTIVE_KIND_PLAIN,
    "fedprox": common_pb2.OBJECTIVE_KIND_FEDPROX,
    "fednova": common_pb2.OBJECTIVE_KIND_FEDNOVA,
    "feddyn": common_pb2.OBJECTIVE_KIND_FEDDYN,
    "scaffold": common_pb2.OBJECTIVE_KIND_SCAFFOLD,
}
_OBJECTIVE_OF_WIRE: Final = {wire: kind for kind, wire in _WIRE_OF_OBJECTIVE.items()} | {
    common_pb2.OBJECTIVE_KIND_UNSPECIFIED: "plain"
}
_WIRE_OF_FIELD: Final = {
    "batch_size": common_pb2.PLAN_FIELD_BATCH_SIZE,
    "learning_rate": common_pb2.PLAN_FIELD_LEARNING_RATE,
    "local_work": common_pb2.PLAN_FIELD_LOCAL_WORK,
    "optimizer": common_pb2.PLAN_FIELD_OPTIMIZER,
}
_WIRE_OF_MEASURE: Final = {
    "received_loss": common_pb2.MEASURE_RECEIVED_LOSS,
    "validation_loss": common_pb2.MEASURE_VALIDATION_LOSS,
}
_MEASURE_OF_WIRE: Final = {wire: name for name, wire in _WIRE_OF_MEASURE.items()}
_FIELD_OF_WIRE: Final = {wire: name for name, wire in _WIRE_OF_FIELD.items()}

_WIRE_OF_PRIVACY: Final = {
    "local": common_pb2.PRIVACY_KIND_LOCAL,
    "examples": common_pb2.PRIVACY_KIND_EXAMPLES,
}
_PRIVACY_OF_WIRE: Final = {wire: kind for kind, wire in _WIRE_OF_PRIVACY.items()}
_POPULATION: Final = re.compile(r"[a-zA-Z0-9._-]{1,64}")

MAX_SEED: Final = 2**63 - 1
LEAST_NOISE: Final = 0.01
"""Least noise multiplier of a site: with less, no accountant finds any guarantee."""


@dataclass(frozen=True, slots=True)
class OptimizerPlan:
    """The local optimizer: "sgd", "adam" or "adamw", and its constants. Raises InvalidError for values out of range."""

    kind: str
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    epoch_decay: float = 1.0

    def __post_init__(self) -> None:
        _require(self.kind in _WIRE_OF_KIND, "optimizer", self.kind, f"one of {', '.join(_WIRE_OF_KIND)}")
        _require(_is_positive(self.learning_rate), "learning_rate", self.learning_rate, "a number greater than 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "0 up to but not including 1")
        _require(self.kind == "sgd" or self.momentum == 0, "momentum", self.momentum, f"0 with {self.kind}")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "a number of at least 0")
        _require(_is_positive(self.epoch_decay), "epoch_decay", self.epoch_decay, "a number greater than 0")


@dataclass(frozen=True, slots=True)
class ObjectivePlan:
    """What a client minimizes: "plain", the workload's loss; "fedprox", that plus strength / 2 |w - w received|^2; "fednova", the
    same, with an update that is divided by the work behind it; "feddyn", as fedprox, less the inner product of w and the site's
    variate, which it carries from round to round; "scaffold", the workload's loss, with gradients that are corrected by the common
    variate less the site's. Raises InvalidError for values out of range."""

    kind: str = "plain"
    strength: float = 0.0

    def __post_init__(self) -> None:
        _require(self.kind in _WIRE_OF_OBJECTIVE, "objective", self.kind, f"one of {', '.join(_WIRE_OF_OBJECTIVE)}")
        _require(0 <= self.strength < math.inf, "objective.strength", self.strength, "a number of at least 0")
        has_pull = self.kind not in ("plain", "scaffold")
        _require(has_pull or not self.strength, "objective.strength", self.strength, f"0 with {self.kind}")
        _require(
            self.kind != "feddyn" or self.strength > 0, "objective.strength", self.strength, "more than 0 with feddyn"
        )

    @property
    def has_variate(self) -> bool:
        """Whether a site carries something from round to round that its gradients are corrected by."""
        return self.kind in ("feddyn", "scaffold")

    @property
    def needs_sgd(self) -> bool:
        """Whether it goes by the work behind an update, which can be told of SGD only."""
        return self.kind in ("fednova", "scaffold")


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """What a site does by itself to protect its data: "local", its update is cut to `clipping_norm` and gets noise; "examples", it
    trains by DP-SGD. The noise's standard deviation is noise_multiplier * clipping_norm. At `delta` one site may spend
    `max_epsilon` on the population; None: no limit. Raises InvalidError for values out of range."""

    kind: str
    clipping_norm: float
    noise_multiplier: float
    delta: float
    max_epsilon: float | None = None
    population: str = "default"

    def __post_init__(self) -> None:
        _require(self.kind in _WIRE_OF_PRIVACY, "privacy", self.kind, f"one of {', '.join(_WIRE_OF_PRIVACY)}")
        norm, noise, budget = self.clipping_norm, self.noise_multiplier, self.max_epsilon
        _require(0 < norm <= 1e6, "privacy.clipping_norm", norm, "a number greater than 0, at most 1e6")
        _require(LEAST_NOISE <= noise <= 1e6, "privacy.noise_multiplier", noise, f"a number from {LEAST_NOISE} to 1e6")
        _require(0 < self.delta < 1, "privacy.delta", self.delta, "a number between 0 and 1")
        _require(budget is None or _is_positive(budget), "privacy.max_epsilon", budget, "a number greater than 0")
        _require(
            _POPULATION.fullmatch(self.population) is not None,
            "privacy.population",
            repr(self.population),
            "1 to 64 characters of [a-zA-Z0-9._-]",
        )

    def to_proto(self) -> common_pb2.PrivacyPlan:
        """The message that travels."""
        return common_pb2.PrivacyPlan(
            kind=_WIRE_OF_PRIVACY[self.kind],
            clipping_norm=self.clipping_norm,
            noise_multiplier=self.noise_multiplier,
            delta=self.delta,
            max_epsilon=self.max_epsilon or 0.0,
            population=self.population,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.PrivacyPlan) -> PrivacyPlan:
        """What the coordinator sent. Raises InvalidError naming the field that makes no sense."""
        return cls(
            kind=_PRIVACY_OF_WIRE.get(message.kind, f"kind {message.kind} of a newer coordinator"),
            clipping_norm=message.clipping_norm,
            noise_multiplier=message.noise_multiplier,
            delta=message.delta,
            max_epsilon=message.max_epsilon or None,
            population=message.population,
        )


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What to do with the model received. Exactly one of `epochs` and `steps` is set. Raises InvalidError for values out of range.

    `seed` decides everything random at the site in this round. `time_budget_seconds` 0 means no budget. `overridable` names what
    the site may replace: "batch_size", "learning_rate", "local_work", "optimizer". `measures` names the metrics that it reports
    besides: "received_loss", of the model received over the training data; "validation_loss", of the trained model over the
    evaluation data. `privacy` is what the site does to protect its data, and then nothing is measured besides, and no work told.
    """

    batch_size: int
    optimizer: OptimizerPlan
    seed: int
    epochs: int | None = None
    steps: int | None = None
    time_budget_seconds: float = 0.0
    overridable: tuple[str, ...] = ()
    num_threads: int = 1
    objective: ObjectivePlan = field(default_factory=ObjectivePlan)
    measures: tuple[str, ...] = ()
    privacy: PrivacyPlan | None = None

    def __post_init__(self) -> None:
        is_sgd = self.optimizer.kind == "sgd"
        kind = self.objective.kind
        _require(is_sgd or not self.objective.needs_sgd, "objective", kind, f"another with {self.optimizer.kind}")
        _require((self.epochs is None) != (self.steps is None), "local work", "both or none", "epochs or steps")
        for name, value in (("epochs", self.epochs), ("steps", self.steps)):
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.num_threads >= 1, "num_threads", self.num_threads, "at least 1")
        _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, "0 to 2^63 - 1")
        budget = self.time_budget_seconds
        _require(0 <= budget < math.inf, "time_budget_seconds", budget, "a number of at least 0")
        unknown = sorted(set(self.overridable) - set(_WIRE_OF_FIELD))
        _require(not unknown, "overridable", unknown, f"names out of {', '.join(_WIRE_OF_FIELD)}")
        unknown = sorted(set(self.measures) - set(_WIRE_OF_MEASURE))
        _require(not unknown, "measures", unknown, f"names out of {', '.join(_WIRE_OF_MEASURE)}")
        if self.privacy is not None:
            # Both would leave the site as they are.
            _require(not self.measures, "measures", ", ".join(self.measures), "none with privacy")
            _require(not self.objective.needs_sgd, "objective", kind, "one that tells no work, with privacy")

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps that the plan asks of a site with so many examples."""
        return self.steps if self.steps is not None else (self.epochs or 0) * math.ceil(num_examples / self.batch_size)

    def sampling_rate(self, num_examples: int) -> float:
        """Chance with which each of so many examples is in a batch where coins decide: `batch_size` of them are expected."""
        return min(1.0, self.batch_size / num_examples)

    def to_proto(self) -> common_pb2.TrainingPlan:
        """The message that travels."""
        message = common_pb2.TrainingPlan(
            batch_size=self.batch_size,
            optimizer=common_pb2.OptimizerPlan(**asdict(self.optimizer) | {"kind": _WIRE_OF_KIND[self.optimizer.kind]}),
            seed=self.seed,
            time_budget_seconds=self.time_budget_seconds,
            overridable=[_WIRE_OF_FIELD[name] for name in self.overridable],
            num_threads=self.num_threads,
            objective=common_pb2.ObjectivePlan(
                kind=_WIRE_OF_OBJECTIVE[self.objective.kind], strength=self.objective.strength
            ),
            measures=[_WIRE_OF_MEASURE[name] for name in self.measures],
            privacy=self.privacy.to_proto() if self.privacy is not None else None,
        )
        if self.steps is not None:
            message.steps = self.steps
        elif self.epochs is not None:
            message.epochs = self.epochs
        return message

    @classmethod
    def from_proto(cls, message: common_pb2.TrainingPlan) -> TrainingPlan:
        """The plan that the coordinator sent. Raises InvalidError naming the field that makes no sense."""
        work = message.WhichOneof("local_work")
        optimizer = message.optimizer
        # Read as what it is: a newer coordinator may let a site override what this client has no setting for.
        known = tuple(_FIELD_OF_WIRE[field] for field in message.overridable if field in _FIELD_OF_WIRE)
        return cls(
            batch_size=message.batch_size,
            optimizer=OptimizerPlan(
                kind=_KIND_OF_WIRE.get(optimizer.kind, f"kind {optimizer.kind} of a newer coordinator"),
                learning_rate=optimizer.learning_rate,
                momentum=optimizer.momentum,
                weight_decay=optimizer.weight_decay,
                epoch_decay=optimizer.epoch_decay,
            ),
            seed=message.seed,
            epochs=message.epochs if work == "epochs" else None,
            steps=message.steps if work == "steps" else None,
            time_budget_seconds=message.time_budget_seconds,
            overridable=known,
            num_threads=message.num_threads,
            objective=ObjectivePlan(
                kind=_OBJECTIVE_OF_WIRE.get(
                    message.objective.kind, f"kind {message.objective.kind} of a newer coordinator"
                ),
                strength=message.objective.strength,
            ),
            measures=tuple(
                _MEASURE_OF_WIRE.get(measure, f"measure {measure} of a newer coordinator")
                for measure in message.measures
            ),
            privacy=PrivacyPlan.from_proto(message.privacy) if message.HasField("privacy") else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as the trainer process reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TrainingPlan:
        """The inverse of `to_json`."""
        return cls(
            **dict(fields)
            | {
                "optimizer": OptimizerPlan(**fields["optimizer"]),
                "objective": ObjectivePlan(**fields["objective"]),
                "overridable": tuple(fields["overridable"]),
                "measures": tuple(fields["measures"]),
                "privacy": PrivacyPlan(**fields["privacy"]) if fields["privacy"] is not None else None,
            }
        )


@dataclass(frozen=True, slots=True)
class SiteOverrides:
    """What a site would rather do than the plan; None keeps the plan's value. At most one of `epochs` and `steps`."""

    batch_size: int | None = None
    learning_rate: float | None = None
    epochs: int | None = None
    steps: int | None = None
    optimizer: str | None = None

    def __post_init__(self) -> None:
        _require(self.epochs is None or self.steps is None, "overrides", "epochs and steps", "only one of them")


def apply_overrides(plan: TrainingPlan, overrides: SiteOverrides) -> tuple[TrainingPlan, list[str]]:
    """The plan with the site's settings in it where the plan allows that, and a sentence for each one that it does not.

    Another optimizer keeps the constants of the plan except momentum, which only SGD has.
    """
    changes: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    refused: list[str] = []
    for part, name, value in (
        ("batch_size", "batch_size", overrides.batch_size),
        ("local_work", "epochs", overrides.epochs),
        ("local_work", "steps", overrides.steps),
        ("learning_rate", "learning_rate", overrides.learning_rate),
        ("optimizer", "kind", overrides.optimizer),
    ):
        if value is None:
            continue
        if part not in plan.overridable:
            setting = part if name == "kind" else name
            refused.append(f"{setting} = {value} is ignored: this run does not let a site override {part}")
        elif name == "kind" and value != "sgd" and plan.objective.needs_sgd:
            refused.append(
                f"optimizer = {value} is ignored: this run goes by the work behind updates ({plan.objective.kind}), which needs sgd"
            )
        elif part == "local_work":
            changes |= {"epochs": None, "steps": None, name: value}
        elif part == "batch_size":
            changes[name] = value
        else:
            optimizer[name] = value
    if optimizer.get("kind", "sgd") != "sgd":
        optimizer["momentum"] = 0.0
    return replace(plan, **changes, optimizer=replace(plan.optimizer, **optimizer)), refused


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _require(is_good: bool, name: str, value: object, expected: str) -> None:
    if not is_good:
        raise InvalidError(f"training plan: {name} is {value}, expected {expected}")
