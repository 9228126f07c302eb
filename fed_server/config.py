"""What a run is: `RunConfig`, written by people as TOML, validated here and nowhere else.

Every table of the file is one frozen model; a choice is a union told apart by `kind`, so a new algorithm is one more class in its
union. Unknown keys are errors. `parse_run_config` reports all problems of a file at once, each with its path, what was
expected, what was given and the cure. The same descriptions make the commented example, the JSON schema and docs/run-config.md.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import Field, Strict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from fed_core.codecs.auto import AutoConfig
from fed_core.codecs.config import CodecTable, FeedbackTable
from fed_core.codecs.registry import UPLINK_ONLY, EncodingConfig
from fed_core.errors import ConfigError
from fed_server.config_privacy import NoPrivacyConfig, PrivacyConfig
from fed_server.config_table import MAX_COHORT, WORD, ConfigTable, LabelWord, refuse

MAX_CONFIG_BYTES = 256 * 1024
MAX_LABELS = 32
MAX_SECONDS = 366 * 24 * 3600.0
MAX_COUNT = 2**31 - 1

Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
LearningRate = Annotated[float, Field(gt=0, le=1e6)]
Factor = Annotated[float, Field(gt=0, le=10)]
Decay = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


Table = ConfigTable | CodecTable


class CohortConfig(ConfigTable):
    """Who takes part in a round."""

    size: int = Field(
        ge=1,
        le=MAX_COHORT,
        description="Updates at which a round closes at once: its goal. In buffered rounds the size of the buffer.",
        examples=[3],
    )
    min_clients: int = Field(
        default_factory=lambda data: data.get("size", 1),
        ge=1,
        le=MAX_COHORT,
        description="Eligible clients (alive, workload installed, labels match) that must be present before a round begins; in "
        "buffered rounds, while nobody is at work. Default: size.",
    )
    quorum: int = Field(
        default_factory=lambda data: math.ceil(data.get("size", 1) * 2 / 3),
        ge=1,
        le=MAX_COHORT,
        description="Updates that suffice at the deadline, or when there is nobody left to wait for; with fewer the round fails. "
        "Default: two thirds of size, rounded up.",
    )
    over_selection: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="Clients selected per update wanted. 1.3 asks 30 % more clients than size, so that slow ones are not waited "
        "for; their work is then dropped.",
    )
    selection: Literal["random", "round_robin", "staleness", "importance"] = Field(
        default="random",
        description="Who of the eligible clients is asked. random: drawn anew for every round; round_robin: whoever was asked "
        "longest ago, so that all take part equally often; staleness: drawn with chances that grow with the rounds since a client "
        "was asked; importance: drawn with chances that grow with the loss it last reported, and its update counts the less.",
    )
    equal_part: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description='With selection = "importance": part of the chances that is dealt out whatever the losses are. An update '
        "counts at most 1 / equal_part times what it counts in a plain mean. Unset: 0.2.",
        examples=[0.2],
    )
    labels: dict[LabelWord, LabelWord] = Field(
        default={},
        max_length=MAX_LABELS,
        description="Only clients that carry all these labels with these values take part. Empty: all clients.",
        examples=[{"region": "north"}],
    )

    @model_validator(mode="after")
    def _check(self) -> CohortConfig:
        problems: dict[str, str] = {}
        if self.quorum > self.size:
            problems["quorum"] = (
                f"expected at most size ({self.size}), got {self.quorum}; no round could close: lower quorum or raise size"
            )
        if self.equal_part is not None and self.selection != "importance":
            problems["equal_part"] = 'has no effect without selection = "importance"; delete it, or set that'
        if self.over_selection > 1 and self.selection == "importance":
            problems["over_selection"] = (
                f'expected 1 with selection = "importance", got {self.over_selection:g}; who is slow would be left out, and '
                "updates would count by chances that nobody had: delete it"
            )
        refuse(problems)
        return self


class ScheduleConfig(ConfigTable):
    """How many rounds, and how long each may take."""

    max_rounds: Count = Field(description="Rounds after which the run is finished.", examples=[10])
    deadline_seconds: Seconds = Field(
        default=600.0,
        description="Seconds of the coordinator's uptime after which a round closes with what it has, if that is a quorum. In "
        "buffered rounds, after which a client that has not delivered is replaced.",
    )
    time_budget_seconds: float = Field(
        default=0.0,
        ge=0,
        le=MAX_SECONDS,
        description="Seconds of training after which a client stops and sends what it has, so that slow sites do fewer steps "
        "instead of missing the round. 0: no budget.",
    )
    max_failed_rounds: Count = Field(default=3, description="Failed rounds in a row after which the run fails.")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.time_budget_seconds >= self.deadline_seconds:
            refuse(
                {
                    "time_budget_seconds": f"expected less than deadline_seconds ({self.deadline_seconds:g}), got "
                    f"{self.time_budget_seconds:g}; the round would close before a client could send: lower it, or raise "
                    "deadline_seconds"
                }
            )
        return self


class SynchronousConfig(ConfigTable):
    """A cohort trains side by side, all from the same version."""

    kind: Literal["synchronous"] = Field(
        default="synchronous", description="A cohort at a time, from the same version."
    )


class ConstantStalenessConfig(ConfigTable):
    """Every update counts the same."""

    kind: Literal["constant"] = Field(default="constant", description="1, however late.")


class PolynomialStalenessConfig(ConfigTable):
    """The later an update, the less it counts."""

    kind: Literal["polynomial"] = Field(default="polynomial", description="1 / (1 + versions late) ^ exponent.")
    exponent: float = Field(
        default=0.5,
        gt=0,
        le=8,
        description="How fast it falls. With 0.5 an update that is 3 versions late counts half.",
    )


StalenessConfig = Annotated[ConstantStalenessConfig | PolynomialStalenessConfig, Field(discriminator="kind")]

# Sums of so many updates, weighted in steps of 2^-16, keep the resolution that every mean has.
MAX_BUFFER = 2048
MAX_STALENESS = 1000


class BufferedConfig(ConfigTable):
    """FedBuff: clients train all the time, each from the version that was the newest when it was asked."""

    kind: Literal["buffered"] = Field(
        default="buffered", description="A version for every cohort.size updates: FedBuff."
    )
    concurrency: int = Field(
        ge=1,
        le=MAX_COHORT,
        description="Clients at work at once. Whenever one delivers, fails or falls silent, another is asked.",
        examples=[10],
    )
    max_staleness: int = Field(
        default=20,
        ge=0,
        le=MAX_STALENESS,
        description="Versions that may be committed while a client works; a later update is refused, and its client asked anew. A "
        "version is kept while somebody works on it, so at most so many more files.",
    )
    staleness: StalenessConfig = Field(
        default=PolynomialStalenessConfig(), description="How much an update counts by the versions that it is late."
    )


RoundsConfig = Annotated[SynchronousConfig | BufferedConfig, Field(discriminator="kind")]


class EpochsConfig(ConfigTable):
    """Local work counted in passes over the site's data."""

    kind: Literal["epochs"] = Field(default="epochs", description="Count passes over the local data.")
    epochs: Count = Field(default=1, description="Passes over the local data.")


class StepsConfig(ConfigTable):
    """Local work counted in optimizer steps: the same for every site, however much data it has."""

    kind: Literal["steps"] = Field(default="steps", description="Count optimizer steps; the data is cycled.")
    steps: Count = Field(description="Optimizer steps.", examples=[100])


class _ScheduleTable(ConfigTable):
    warmup_rounds: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="Rounds in which the learning rate rises to its full size, in equal steps; the schedule begins after them. 0: "
        "none.",
    )


class ConstantScheduleConfig(_ScheduleTable):
    """The same learning rate in every round."""

    kind: Literal["constant"] = Field(default="constant", description="The same in every round.")


class _DecayTable(_ScheduleTable):
    floor: Decay = Field(default=1e-9, description="Share of the learning rate that it never falls below.")


class StepScheduleConfig(_DecayTable):
    """The learning rate falls at once, every so many rounds."""

    kind: Literal["step"] = Field(default="step", description="Falls every so many rounds.")
    every: Count = Field(description="Rounds from one fall to the next.", examples=[10])
    factor: Decay = Field(default=0.5, description="What the learning rate is multiplied by.")


class ExponentialScheduleConfig(_DecayTable):
    """The learning rate falls by the same factor after every round: round r uses learning_rate * factor^(r-1)."""

    kind: Literal["exponential"] = Field(default="exponential", description="Falls after every round.")
    factor: Decay = Field(description="What the learning rate is multiplied by.", examples=[0.99])


class CosineScheduleConfig(_DecayTable):
    """The learning rate falls along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts) that ends with
    schedule.max_rounds."""

    kind: Literal["cosine"] = Field(
        default="cosine", description="Falls along half a cosine that ends with schedule.max_rounds."
    )


class PlateauScheduleConfig(_DecayTable):
    """The learning rate falls when a metric has stopped getting better."""

    kind: Literal["plateau"] = Field(default="plateau", description="Falls when a metric gets no better.")
    metric: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        pattern=r"^[a-z0-9_.]+$",
        description="What is watched: a metric of the evaluations, or of the training, which every round has, such as train.loss. "
        "Unset: evaluation.metric, in its direction.",
        examples=["train.loss"],
    )
    direction: Literal["max", "min"] | None = Field(
        default=None, description="Whether more or less of the metric is better; to be set with it.", examples=["min"]
    )
    patience: Count = Field(
        default=5, description="Measurements in a row without a new best after which the learning rate falls."
    )
    factor: Decay = Field(default=0.5, description="What the learning rate is multiplied by.")

    @model_validator(mode="after")
    def _check(self) -> PlateauScheduleConfig:
        if self.metric is not None and self.direction is None:
            refuse({"direction": f'is missing; say whether more or less {self.metric} is better: "max" or "min"'})
        if self.metric is None and self.direction is not None:
            refuse({"direction": "has no effect without a metric of its own; delete it, or set metric"})
        return self


RoundSchedule = ConstantScheduleConfig | StepScheduleConfig | ExponentialScheduleConfig | CosineScheduleConfig
ServerScheduleConfig = Annotated[RoundSchedule, Field(discriminator="kind")]
TrainingScheduleConfig = Annotated[RoundSchedule | PlateauScheduleConfig, Field(discriminator="kind")]


class _OptimizerTable(ConfigTable):
    learning_rate: LearningRate = Field(default=0.001, description="Step size, before [training.schedule].")
    weight_decay: float = Field(
        default=0.0, ge=0, le=1e3, description="Weight decay: L2 for sgd and adam, decoupled for adamw."
    )
    epoch_decay: Factor = Field(
        default=1.0, description="Factor on the learning rate after every local epoch. 1: none."
    )


class SgdConfig(_OptimizerTable):
    """torch.optim.SGD at the sites."""

    kind: Literal["sgd"] = Field(default="sgd", description="torch.optim.SGD.")
    learning_rate: LearningRate = Field(default=0.1, description="Step size, before [training.schedule].")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum coefficient.")


class AdamConfig(_OptimizerTable):
    """torch.optim.Adam at the sites."""

    kind: Literal["adam"] = Field(default="adam", description="torch.optim.Adam.")
    momentum: ClassVar[float] = 0.0


class AdamWConfig(_OptimizerTable):
    """torch.optim.AdamW at the sites."""

    kind: Literal["adamw"] = Field(default="adamw", description="torch.optim.AdamW.")
    weight_decay: float = Field(
        default=0.01, ge=0, le=1e3, description="Weight decay: L2 for sgd and adam, decoupled for adamw."
    )
    momentum: ClassVar[float] = 0.0


class PlainObjectiveConfig(ConfigTable):
    """The workload's loss."""

    kind: Literal["plain"] = Field(default="plain", description="The workload's loss.")


_STRENGTH = "Pull towards the model received: strength / 2 times the squared distance from it is added to the loss."


class _ProximalTable(ConfigTable):
    strength: float = Field(default=0.0, ge=0, le=1e6, description=_STRENGTH)


class FedProxConfig(_ProximalTable):
    """The workload's loss and a pull towards the model received (FedProx, Li et al. 2020), for sites whose data differ."""

    kind: Literal["fedprox"] = Field(
        default="fedprox", description="The workload's loss, and a pull towards the model received."
    )
    strength: float = Field(default=0.01, ge=0, le=1e6, description=_STRENGTH)


class FedNovaConfig(_ProximalTable):
    """Updates are divided by the work behind them and their mean is scaled back (FedNova, Wang et al. 2020), for sites that do
    unequal numbers of steps. Needs the optimizer sgd."""

    kind: Literal["fednova"] = Field(
        default="fednova", description="Updates count by direction, not by how many steps a site did. Needs sgd."
    )


class VariateConfig(ConfigTable):
    """What objectives have in common whose sites carry something from round to round: their sums go by the whole population."""

    kind: str
    population: Count = Field(
        description="Sites that may take part over the run, those included that a round does not ask. Once so many have sent an "
        "update, others are not asked any more.",
        examples=[10],
    )

    def problems(self, run: RunConfig) -> dict[str, str]:
        """What the rest of the run does not allow, by field."""
        problems: dict[str, str] = {}
        if self.population < run.cohort.min_clients:
            problems["training.objective.population"] = (
                f"expected at least cohort.min_clients ({run.cohort.min_clients}), got {self.population}; no round could begin: "
                "raise it to the number of sites that may take part over the run, or lower min_clients"
            )
        if not isinstance(run.aggregation, MeanConfig):
            problems["aggregation.kind"] = (
                f"{self.kind} adds up what all sites send, and {run.aggregation.kind} is no mean of it; take "
                'aggregation.kind = "mean", or the objective "plain" or "fedprox"'
            )
        return problems


class FedDynConfig(VariateConfig):
    """The workload's loss, a pull towards the model received, and a term by which each site leans where its own data lead less and
    less (FedDyn, Acar et al. 2021), for sites whose data differ. A site carries its variate from round to round."""

    kind: Literal["feddyn"] = Field(
        default="feddyn", description="Local losses bent until all sites agree on the minimum; sites carry a variate."
    )
    strength: float = Field(default=0.1, gt=0, le=1e6, description=_STRENGTH)

    def problems(self, run: RunConfig) -> dict[str, str]:
        """See `VariateConfig.problems`."""
        problems = super().problems(run)
        optimizer = run.server_optimizer
        is_plain = isinstance(optimizer, ServerSgdConfig) and optimizer.learning_rate == 1
        if not is_plain or optimizer.schedule != ConstantScheduleConfig():
            problems["server_optimizer"] = (
                'feddyn has a rule of its own for the server, in place of "sgd" with learning_rate = 1 and no schedule; delete '
                "[server_optimizer], or take another objective"
            )
        return problems


class ScaffoldConfig(VariateConfig):
    """The workload's loss, with gradients that are corrected by what all sites' are in the mean less what the site's own are
    (SCAFFOLD, Karimireddy et al. 2020), for sites whose data differ. A site carries its variate from round to round, and the common
    one travels beside the model. Needs the optimizer sgd."""

    kind: Literal["scaffold"] = Field(
        default="scaffold", description="Gradients corrected towards those of all sites. Needs sgd."
    )


ObjectiveConfig = Annotated[
    PlainObjectiveConfig | FedProxConfig | FedNovaConfig | FedDynConfig | ScaffoldConfig, Field(discriminator="kind")
]
LocalWorkConfig = Annotated[EpochsConfig | StepsConfig, Field(discriminator="kind")]
OptimizerConfig = Annotated[SgdConfig | AdamConfig | AdamWConfig, Field(discriminator="kind")]
OverridableField = Literal["batch_size", "learning_rate", "local_work", "optimizer"]


class TrainingConfig(ConfigTable):
    """What a client does with the model it receives."""

    local_work: LocalWorkConfig = Field(default=EpochsConfig(), description="How long a client trains in a round.")
    batch_size: int = Field(default=32, ge=1, le=2**20, description="Examples per optimizer step.")
    overridable: Annotated[tuple[OverridableField, ...], Strict(False)] = Field(
        default=(),
        description="What a site may replace by its own settings. Empty: the plan is exact.",
        examples=[["batch_size"]],
    )
    num_threads: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="CPU threads that torch uses at every site. Fixed, because floating-point sums depend on it.",
    )
    optimizer: OptimizerConfig = Field(default=SgdConfig(), description="How a client steps.")
    objective: ObjectiveConfig = Field(default=PlainObjectiveConfig(), description="What a client minimizes.")
    learning_rate_by_site: dict[LabelWord, LearningRate] = Field(
        default={},
        max_length=MAX_COHORT,
        description="Sites by name, and the learning rate of each in place of optimizer.learning_rate; the schedule holds for "
        "it, too.",
        examples=[{"hospital-north": 0.05}],
    )
    schedule: TrainingScheduleConfig = Field(
        default=ConstantScheduleConfig(), description="How the clients' learning rate changes from round to round."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if len(set(self.overridable)) != len(self.overridable):
            refuse({"overridable": f"expected each name once, got {_show(self.overridable)}; delete the repetition"})
        if isinstance(self.objective, FedNovaConfig | ScaffoldConfig) and not isinstance(self.optimizer, SgdConfig):
            refuse(
                {
                    "objective": f"{self.objective.kind} divides updates by the work of sgd, and the optimizer is "
                    f"{self.optimizer.kind}; take sgd, or another objective"
                }
            )
        return self


class MergeConfig(ConfigTable):
    """What becomes of tensors with a certain name, instead of the rule for their role."""

    pattern: str = Field(
        min_length=1,
        max_length=512,
        description="Shell pattern (*, ?, [...]) on the tensor's name in the state dict. The first rule that matches counts.",
        examples=["*.running_var"],
    )
    rule: Literal["mean", "maximum", "keep"] = Field(
        description="mean: what the aggregator does to floating tensors, such as the weighted mean; maximum: elementwise; keep: "
        "stays as it is in the base version.",
        examples=["mean"],
    )


class _AggregationTable(ConfigTable):
    bound: float | None = Field(
        default=None,
        gt=0,
        le=2.0**64,
        description="Largest absolute value that an update may hold in any tensor, rounded up to a power of two; an update with "
        "more is refused by name. Unset: 8 times the largest value of the tensor in the base model, at least 4 for parameters "
        "and 1024 for buffers.",
        examples=[16.0],
    )
    merge: Annotated[tuple[MergeConfig, ...], Strict(False)] = Field(
        default=(),
        max_length=1024,
        description="Exceptions to the merge rules of buffers and integer tensors, tried from the top.",
        examples=[[{"pattern": "*.num_batches_tracked", "rule": "maximum"}]],
    )


class MeanConfig(_AggregationTable):
    """Weighted mean of the updates, summed exactly: no arrival order changes a bit."""

    kind: Literal["mean"] = Field(default="mean", description="Weighted mean.")
    weighting: Literal["examples", "uniform", "custom", "inverse_loss"] = Field(
        default="examples",
        description="Weight of an update: its number of examples, 1, the whole number that the workload gives, or in proportion to "
        "1 / loss of the trained model on the site's evaluation data, which every site must have.",
    )
    smallest_loss: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description='With weighting = "inverse_loss": a loss below it counts as this much, so that no site decides '
        "alone. Unset: 0.01.",
        examples=[0.05],
    )
    importance: dict[LabelWord, Count] = Field(
        default={},
        max_length=MAX_COHORT,
        description="Sites by name, and the whole number that the weight of each one's updates is multiplied by. Who is not named "
        "counts once.",
        examples=[{"hospital-north": 3}],
    )
    max_weight: int | None = Field(
        default=None,
        ge=1,
        le=2**40,
        description="Largest weight that is accepted; an update with more is refused by name. Smaller means a finer mean. Unset: "
        "as much as the resolution allows, at most 2^20.",
        examples=[100_000],
    )

    @model_validator(mode="after")
    def _check(self) -> MeanConfig:
        most = max(self.importance.values(), default=1)
        if self.smallest_loss is not None and self.weighting != "inverse_loss":
            refuse({"smallest_loss": 'has no effect without weighting = "inverse_loss"; delete it, or set that'})
        if self.importance and self.weighting == "inverse_loss":
            refuse(
                {
                    "importance": 'does not go with weighting = "inverse_loss", whose weights have no unit; delete one of them'
                }
            )
        if self.weighting == "uniform" and not self.importance and self.max_weight is not None:
            refuse({"max_weight": 'has no effect with weighting = "uniform", where every weight is 1; delete it'})
        if self.max_weight is not None and most > self.max_weight:
            refuse(
                {"importance": f"expected at most max_weight ({self.max_weight}), got {most}: raise it, or lower this"}
            )
        return self


class QFedAvgConfig(_AggregationTable):
    """Sites count the more, the worse the model that they received does on their data (q-FedAvg, Li et al. 2020), so that no site
    is left far behind; every site counts alike otherwise."""

    weighting: ClassVar[Literal["uniform"]] = "uniform"
    max_weight: ClassVar[None] = None
    importance: ClassVar[Mapping[str, int]] = {}

    kind: Literal["qfedavg"] = Field(default="qfedavg", description="Weights by loss, for fairness: q-FedAvg.")
    fairness: float = Field(
        default=1.0,
        ge=0,
        le=20,
        description="q: an update counts its site's loss to this power. 0: all alike; more: the largest losses count ever more, "
        "and steps are shorter.",
    )
    lipschitz: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="L, by which long updates shorten the step. Unset: 1 / training.optimizer.learning_rate.",
        examples=[10.0],
    )

    def problems(self, run: RunConfig) -> dict[str, str]:
        """What the rest of the run does not allow, by field."""
        problems: dict[str, str] = {}
        objective, optimizer = run.training.objective, run.training.optimizer
        if isinstance(objective, FedNovaConfig):
            problems["training.objective"] = (
                'fednova divides updates by their work, and qfedavg goes by their length; take "plain" or "fedprox", or '
                'aggregation.kind = "mean"'
            )
        if self.lipschitz is None and not isinstance(optimizer, SgdConfig):
            problems["aggregation.lipschitz"] = (
                f"is missing: 1 / learning_rate stands for it with sgd, and the optimizer is {optimizer.kind}; write lipschitz = "
                "10.0, or take sgd"
            )
        return problems


# Rules that go by distances keep the distance of any two updates of a round.
MAX_COMPARED = 4096


class RobustConfig(_AggregationTable):
    """What all robust rules have in common. Every update counts the same: a site that may lie about its update may lie about its
    number of examples, too."""

    NEEDS: ClassVar[str] = "2f + 1"
    COMPARES: ClassVar[bool] = True
    weighting: ClassVar[Literal["uniform"]] = "uniform"
    max_weight: ClassVar[None] = None
    importance: ClassVar[Mapping[str, int]] = {}

    kind: str
    num_byzantine: int = Field(
        ge=1,
        le=MAX_COHORT,
        description="Bad updates per round that are to do no harm, whatever they hold: f.",
        examples=[1],
    )
    num_byzantine_population: int | None = Field(
        default=None,
        ge=0,
        le=MAX_COUNT,
        description="Bad sites among all that may be drawn. Submission then says how likely it is that a cohort of the run holds "
        "more than num_byzantine of them. Unset: as large a part as num_byzantine is of size.",
        examples=[3],
    )
    mixing: Literal["none", "nearest"] = Field(
        default="none",
        description="What is done to the updates before the rule. nearest: each becomes the mean of those nearest to it, all but "
        "num_byzantine; helps where sites differ much.",
    )

    def least_updates(self) -> int:
        """Updates that the rule needs at least: `NEEDS` with f = num_byzantine."""
        return 2 * self.num_byzantine + 1

    def problems(self, cohort: CohortConfig) -> dict[str, str]:
        """What the cohort does not allow, by field: (field, sentence)."""
        problems: dict[str, str] = {}
        if self.least_updates() > cohort.quorum:
            problems["num_byzantine"] = (
                f"{self.kind} needs {self.NEEDS} = {self.least_updates()} updates, and a round may close with cohort.quorum = "
                f"{cohort.quorum}; raise the quorum, or lower num_byzantine from {self.num_byzantine}"
            )
        most = math.ceil(cohort.size * cohort.over_selection)
        if (self.COMPARES or self.mixing != "none") and most > MAX_COMPARED:
            problems["kind"] = (
                f"{self.kind} compares every update with every other, at most {MAX_COMPARED:,} of them, and cohort.size times "
                f'over_selection is {most:,}; lower them, or take "median" or "trimmed_mean" without mixing'
            )
        return problems


class MedianConfig(RobustConfig):
    """Coordinate by coordinate the median of the updates."""

    COMPARES: ClassVar[bool] = False
    kind: Literal["median"] = Field(default="median", description="Coordinate-wise median.")


class TrimmedMeanConfig(RobustConfig):
    """Coordinate by coordinate the mean of the updates without the largest and the smallest."""

    COMPARES: ClassVar[bool] = False
    kind: Literal["trimmed_mean"] = Field(default="trimmed_mean", description="Coordinate-wise trimmed mean.")
    trim: float | None = Field(
        default=None,
        gt=0,
        lt=0.5,
        description="Part of the updates left out on each side, rounded up to whole updates. Unset: num_byzantine updates.",
        examples=[0.2],
    )

    def num_trimmed(self, num_updates: int) -> int:
        """Values left out on each side, so that at least one stays."""
        if self.trim is None:
            return self.num_byzantine
        # 0.1 of 30 is 3, whatever the nearest double to 0.1 is.
        wanted = math.ceil(Fraction(str(self.trim)) * num_updates)
        return max(self.num_byzantine, min(wanted, (num_updates - 1) // 2))

    def problems(self, cohort: CohortConfig) -> dict[str, str]:
        """See `RobustConfig.problems`."""
        problems = super().problems(cohort)
        if self.trim is not None and Fraction(str(self.trim)) * cohort.quorum < self.num_byzantine:
            problems["trim"] = (
                f"expected at least num_byzantine / cohort.quorum = {self.num_byzantine / cohort.quorum:.4g}, got {self.trim:g}; a "
                "round may close with so few updates: raise it, or delete it to leave out num_byzantine on each side"
            )
        return problems


class KrumConfig(RobustConfig):
    """The one update that lies nearest to most others."""

    NEEDS: ClassVar[str] = "2f + 3"
    kind: Literal["krum"] = Field(default="krum", description="The update nearest to most others.")

    def least_updates(self) -> int:
        """See `RobustConfig.least_updates`."""
        return 2 * self.num_byzantine + 3


class MultiKrumConfig(RobustConfig):
    """The mean of the updates that lie nearest to most others."""

    NEEDS: ClassVar[str] = "2f + 3"
    kind: Literal["multi_krum"] = Field(default="multi_krum", description="Mean of those nearest to most others.")
    num_averaged: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COHORT,
        description="Updates that are averaged, at most n - num_byzantine - 2 of n. Unset: so many.",
        examples=[2],
    )

    def least_updates(self) -> int:
        """See `RobustConfig.least_updates`."""
        return 2 * self.num_byzantine + 3

    def problems(self, cohort: CohortConfig) -> dict[str, str]:
        """See `RobustConfig.problems`."""
        problems = super().problems(cohort)
        most = cohort.quorum - self.num_byzantine - 2
        if self.num_averaged is not None and not problems and self.num_averaged > most:
            problems["num_averaged"] = (
                f"expected at most cohort.quorum - num_byzantine - 2 = {most}, got {self.num_averaged}; bad updates could be among "
                "them: lower it, or raise the quorum"
            )
        return problems


class BulyanConfig(RobustConfig):
    """Krum chooses updates, and each coordinate becomes the mean of the values nearest to their median."""

    NEEDS: ClassVar[str] = "4f + 3"
    kind: Literal["bulyan"] = Field(default="bulyan", description="Krum, then the values nearest to the median.")

    def least_updates(self) -> int:
        """See `RobustConfig.least_updates`."""
        return 4 * self.num_byzantine + 3


class GeometricMedianConfig(RobustConfig):
    """The point whose distances to all updates add up to the least: RFA."""

    kind: Literal["geometric_median"] = Field(default="geometric_median", description="Geometric median: RFA.")
    iterations: int = Field(default=100, ge=1, le=10_000, description="Most steps of Weiszfeld's algorithm.")
    smoothing: float = Field(
        default=1e-6,
        gt=0,
        le=1,
        description="Distance below which updates count as equally near, in medians of the updates' distances to their mean.",
    )


class _ClippingTable(RobustConfig):
    clipping_norm: float | None = Field(
        default=None,
        gt=0,
        le=1e12,
        description="Length at which an update is cut: the L2 norm over all parameters. Unset: the median of the round's updates.",
        examples=[1.0],
    )


class NormBoundingConfig(_ClippingTable):
    """The mean of the updates, of which long ones are shortened."""

    kind: Literal["norm_bounding"] = Field(default="norm_bounding", description="Mean of updates cut to a length.")


class CenteredClippingConfig(_ClippingTable):
    """The mean of the updates, of which those far from the result are drawn nearer to it."""

    kind: Literal["centered_clipping"] = Field(
        default="centered_clipping", description="Mean of updates cut to a distance from the result."
    )
    iterations: int = Field(default=10, ge=1, le=10_000, description="How often result and distances are found anew.")


AggregationConfig = Annotated[
    MeanConfig
    | QFedAvgConfig
    | MedianConfig
    | TrimmedMeanConfig
    | KrumConfig
    | MultiKrumConfig
    | BulyanConfig
    | GeometricMedianConfig
    | NormBoundingConfig
    | CenteredClippingConfig,
    Field(discriminator="kind"),
]


class _ServerOptimizerTable(ConfigTable):
    learning_rate: LearningRate = Field(
        default=1.0, description="Factor on what is added to the model, before [server_optimizer.schedule]."
    )
    schedule: ServerScheduleConfig = Field(
        default=ConstantScheduleConfig(),
        description="How the server's learning rate changes from round to round.",
    )


class ServerSgdConfig(_ServerOptimizerTable):
    """The next model is the last plus learning_rate times the mean update."""

    kind: Literal["sgd"] = Field(default="sgd", description="Adds the mean update times the learning rate.")
    learning_rate: LearningRate = Field(default=1.0, description="Factor on the mean update. 1 is federated averaging.")


class ServerMomentumConfig(_ServerOptimizerTable):
    """FedAvgM: mean updates add up, and fade."""

    kind: Literal["momentum"] = Field(default="momentum", description="Adds a fading sum of the mean updates: FedAvgM.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="What is left of the sum after a round.")


class _AdaptiveTable(_ServerOptimizerTable):
    learning_rate: LearningRate = Field(default=0.01, description="About what a coordinate moves in a round.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of updates. 0: only this round's.")
    tau: float = Field(
        default=1e-3,
        gt=0,
        le=1e6,
        description="Size of an update below which steps are no longer scaled up. Larger is closer to plain averaging.",
    )


class ServerAdagradConfig(_AdaptiveTable):
    """FedAdagrad: every coordinate's step is divided by the root of the sum of its squared updates."""

    kind: Literal["adagrad"] = Field(default="adagrad", description="Divides by all updates so far: FedAdagrad.")
    learning_rate: LearningRate = Field(default=0.1, description="What a coordinate moves at most in the first round.")
    beta1: float = Field(default=0.0, ge=0, lt=1, description="Decay of the mean of updates. 0: only this round's.")


class ServerAdamConfig(_AdaptiveTable):
    """FedAdam: every coordinate's step is divided by the root of the mean of its squared updates."""

    kind: Literal["adam"] = Field(default="adam", description="Divides by the mean size of updates: FedAdam.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the mean of squared updates.")


class ServerYogiConfig(_AdaptiveTable):
    """FedYogi: as FedAdam, with a mean of squares that falls slowly."""

    kind: Literal["yogi"] = Field(default="yogi", description="As adam, but forgets large updates slowly: FedYogi.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the mean of squared updates.")


ServerOptimizerConfig = Annotated[
    ServerSgdConfig | ServerMomentumConfig | ServerAdagradConfig | ServerAdamConfig | ServerYogiConfig,
    Field(discriminator="kind"),
]


class EvaluationConfig(ConfigTable):
    """How model versions are measured."""

    at: Literal["clients", "coordinator", "both", "none"] = Field(
        default="clients",
        description="Whose data: that of the clients (mean weighted by examples), the coordinator's own, both, or no evaluation. "
        'With both, the coordinator\'s metrics are named "coordinator.accuracy" and so on.',
    )
    every: Count = Field(
        default=1, description="Rounds from one evaluation to the next; the last round is always evaluated."
    )
    metric: str = Field(
        default="accuracy",
        min_length=1,
        max_length=100,
        pattern=r"^[a-z0-9_.]+$",
        description="Metric of the workload that decides which version is best, and that [stop] watches.",
    )
    direction: Literal["max", "min"] = Field(default="max", description="Whether more or less of the metric is better.")
    deadline_seconds: Seconds = Field(
        default=120.0, description="Seconds that clients have to evaluate; who is late is left out of the mean."
    )
    batch_size: int = Field(default=256, ge=1, le=2**20, description="Examples per batch when evaluating.")


class StopConfig(ConfigTable):
    """What ends a run before max_rounds."""

    target: float | None = Field(
        default=None,
        description="Value of evaluation.metric at which the run is finished. Unset: none.",
        examples=[0.95],
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="Evaluations in a row without a new best after which the run is finished. Unset: no limit.",
        examples=[5],
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds of the coordinator's uptime after which the run is finished, at the end of a round. Unset: "
        "no limit.",
        examples=[3600.0],
    )


class LatticeDownlinkConfig(ConfigTable):
    """Versions travel as sparse differences in whole steps of powers of two, lossless for every client; what is left out of one is
    carried into the next."""

    kind: Literal["lattice"] = Field(default="lattice", description="Deltas in whole steps of powers of two.")
    step: float = Field(
        default=4.0,
        gt=0,
        le=1024,
        description="Step of a round's delta, in root mean squares of what the round changed, tensor by tensor; rounded down to "
        "a power of two. Wider is shorter: fewer coordinates move, each by more.",
    )
    finest_step: float = Field(
        default=2.0**-4,
        ge=0,
        le=1,
        description="Finest step there is, in root mean squares of the tensor's weights: the resolution of the versions that "
        "clients see.",
    )
    first_error: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Error of version 0 as it is sent, |v - w|^2 / |w|^2. Unset: 0.03, which random weights do not mind, or 0.0001 "
        "where the run was submitted with --init.",
        examples=[0.001],
    )


class DeltaDownlinkConfig(ConfigTable):
    """Versions travel as differences in any encoding; who lacks one gets the chain of them, or the whole model."""

    kind: Literal["delta"] = Field(default="delta", description="Deltas in an encoding of your choice.")
    encoding: EncodingConfig = Field(default=AutoConfig(), description="How the differences are encoded.")

    @model_validator(mode="after")
    def _check(self) -> DeltaDownlinkConfig:
        if reason := UPLINK_ONLY.get(self.encoding.kind):
            refuse(
                {"encoding.kind": f'"{self.encoding.kind}" is for an uplink only: {reason}; take "auto" or "uniform"'}
            )
        if isinstance(self.encoding, FeedbackTable) and self.encoding.feedback:
            refuse(
                {
                    "encoding.feedback": "is for an uplink only; delete it: what a delta loses stays in the coordinator's master "
                    "weights and is part of the next one anyway"
                }
            )
        return self


class RawDownlinkConfig(ConfigTable):
    """Every version travels whole."""

    kind: Literal["raw"] = Field(default="raw", description="Lossless and whole, every time.")


DownlinkConfig = Annotated[LatticeDownlinkConfig | DeltaDownlinkConfig | RawDownlinkConfig, Field(discriminator="kind")]


class AverageConfig(ConfigTable):
    """An exponential moving average of the versions, kept beside them."""

    decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the average that stays when a version enters it: 0.9 looks back over about 10 versions. It begins "
        "lower, so that version 0 is soon forgotten. 0: no average is kept.",
    )


class KeepConfig(ConfigTable):
    """How long files live."""

    versions: Count = Field(default=3, description="Newest model versions kept, besides the best one.")


class RunConfig(ConfigTable):
    """A run, whole."""

    name: str = Field(
        min_length=1,
        max_length=64,
        pattern=WORD,
        description="Name of the run, unique at the coordinator.",
        examples=["digits"],
    )
    workload: str = Field(
        min_length=1,
        max_length=100,
        description="Name of the workload that the sites have installed.",
        examples=["digits"],
    )
    workload_version: str = Field(
        default="", max_length=100, description="Version that the sites must have. Empty: any."
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="Seed of version 0, of the cohorts and of the clients' random numbers. Recorded with the run.",
    )
    cohort: CohortConfig = Field(description="Who takes part in a round.")
    schedule: ScheduleConfig = Field(description="How many rounds, and how long each may take.")
    rounds: RoundsConfig = Field(default=SynchronousConfig(), description="Whether clients wait for each other.")
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="What a client does with the model it receives."
    )
    aggregation: AggregationConfig = Field(default=MeanConfig(), description="How updates become one.")
    server_optimizer: ServerOptimizerConfig = Field(
        default=ServerSgdConfig(), description="How the combined update becomes the next model."
    )
    average: AverageConfig = Field(
        default=AverageConfig(),
        description="An exponential moving average of the versions. No client trains on it: it is for `fedctl model download "
        '--average`, and an evaluation at the coordinator measures it too, as "average.accuracy" and so on.',
    )
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="How model versions are measured.")
    stop: StopConfig = Field(default=StopConfig(), description="What ends the run before max_rounds.")
    uplink: EncodingConfig = Field(default=AutoConfig(), description="How clients encode their updates.")
    downlink: DownlinkConfig = Field(
        default=LatticeDownlinkConfig(), description="How versions are sent to the clients."
    )
    keep: KeepConfig = Field(default=KeepConfig(), description="How long model versions are kept.")
    privacy: PrivacyConfig = Field(
        default=NoPrivacyConfig(), description="Differential privacy: what is promised to whom, and at what cost."
    )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        problems: dict[str, str] = {}
        measuring = "coordinator" if isinstance(self.rounds, BufferedConfig) else "clients"
        schedules = {"training": self.training.schedule, "server_optimizer": self.server_optimizer.schedule}
        for table, schedule in schedules.items():
            if schedule.warmup_rounds >= self.schedule.max_rounds:
                problems[f"{table}.schedule.warmup_rounds"] = (
                    f"expected less than schedule.max_rounds ({self.schedule.max_rounds}), got {schedule.warmup_rounds}; no round "
                    "would have the whole learning rate: lower it"
                )
        plateau = self.training.schedule
        if isinstance(plateau, PlateauScheduleConfig) and self.evaluation.at == "none":
            if plateau.metric is None or not plateau.metric.startswith("train."):
                problems["training.schedule.metric"] = (
                    'needs a measured metric, and evaluation.at is "none"; watch one of the training, such as "train.loss", or set '
                    f'evaluation.at to "{measuring}"'
                )
        if isinstance(self.aggregation, RobustConfig):
            problems |= {f"aggregation.{name}": text for name, text in self.aggregation.problems(self.cohort).items()}
            if isinstance(self.training.objective, FedNovaConfig):
                problems["training.objective"] = (
                    "fednova scales what was combined by the mean of what the sites say of their work, and one bad site decides a "
                    'mean; take "plain" or "fedprox", or aggregation.kind = "mean"'
                )
        if isinstance(self.training.objective, VariateConfig):
            problems |= self.training.objective.problems(self)
        if not isinstance(self.privacy, NoPrivacyConfig):
            problems |= self.privacy.problems(self)
        if isinstance(self.aggregation, QFedAvgConfig):
            problems |= self.aggregation.problems(self)
        if self.cohort.selection == "importance":
            problems |= self._importance_problems()
        if isinstance(self.rounds, BufferedConfig):
            problems |= self._problems_of_buffers()
        elif self.cohort.min_clients < self.cohort.quorum:
            problems["cohort.min_clients"] = (
                f"expected at least quorum ({self.cohort.quorum}), got {self.cohort.min_clients}; a round would begin that cannot "
                "close: raise min_clients or lower quorum"
            )
        if self.evaluation.at == "none":
            for field in ("target", "patience"):
                if getattr(self.stop, field) is not None:
                    problems[f"stop.{field}"] = (
                        f'needs a measured metric, and evaluation.at is "none"; delete it, or set evaluation.at to "{measuring}"'
                    )
        refuse(problems)
        return self

    def _importance_problems(self) -> dict[str, str]:
        """What does not go with a draw by importance, whose weights are fixed when a round opens."""
        problems: dict[str, str] = {}
        aggregation, objective = self.aggregation, self.training.objective
        if not isinstance(aggregation, MeanConfig):
            problems["cohort.selection"] = (
                f'"importance" weights updates so that their mean is right on average, and {aggregation.kind} is no mean; take '
                '"random", or aggregation.kind = "mean"'
            )
        else:
            if aggregation.weighting not in ("examples", "uniform"):
                problems["aggregation.weighting"] = (
                    'with cohort.selection = "importance" weights are fixed before the clients train: take "examples" (as many as '
                    'they last reported) or "uniform"'
                )
            if aggregation.max_weight is not None:
                problems["aggregation.max_weight"] = (
                    'has no effect with cohort.selection = "importance", where weights are chances; delete it'
                )
        if not isinstance(objective, PlainObjectiveConfig | FedProxConfig):
            problems["training.objective"] = (
                f'{objective.kind} needs more than a mean, and cohort.selection = "importance" corrects the mean alone; take '
                '"plain" or "fedprox", or another selection'
            )
        return problems

    def _problems_of_buffers(self) -> dict[str, str]:
        """What a buffered run cannot do, by field."""
        problems: dict[str, str] = {}
        if self.cohort.selection == "importance":
            problems["cohort.selection"] = (
                '"importance" gives updates weights that make up for their chances, and in buffered rounds they count by their '
                'staleness alone; take "random", "round_robin" or "staleness"'
            )
        if self.cohort.size > MAX_BUFFER:
            problems["cohort.size"] = (
                f"expected at most {MAX_BUFFER} in buffered rounds, got {self.cohort.size}; sums weighted by staleness would be "
                "too coarse: lower it"
            )
        if self.cohort.over_selection != 1:
            problems["cohort.over_selection"] = (
                "has no effect in buffered rounds, where no work is dropped because others were faster; delete it"
            )
        aggregation = self.aggregation
        if not isinstance(aggregation, MeanConfig):
            problems["aggregation.kind"] = (
                f"{aggregation.kind} combines updates of one version, and those of a buffer are of several; take "
                '"mean", or rounds.kind = "synchronous"'
            )
        else:
            if aggregation.weighting != "uniform":
                problems["aggregation.weighting"] = (
                    f'expected "uniform" in buffered rounds, got "{aggregation.weighting}"; the sum is divided by cohort.size '
                    'whatever comes, so that updates count by their staleness alone: set weighting = "uniform"'
                )
            if aggregation.importance:
                problems["aggregation.importance"] = (
                    "has no effect in buffered rounds, where updates count by their staleness alone; delete it"
                )
        objective = self.training.objective
        if not isinstance(objective, PlainObjectiveConfig | FedProxConfig):
            problems["training.objective"] = (
                f"{objective.kind} takes it that the updates of a round are of one version and of one cohort; take "
                '"plain" or "fedprox", or rounds.kind = "synchronous"'
            )
        if self.evaluation.at in ("clients", "both"):
            problems["evaluation.at"] = (
                f'expected "coordinator" or "none" in buffered rounds, got "{self.evaluation.at}"; the sites never rest to measure '
                'a version: set at = "coordinator", with fed-server --workload'
            )
        return problems


def parse_run_config(text: str) -> RunConfig:
    """Reads a run config. Raises ConfigError that lists every problem in lines `path: expected ..., got ...; cure`."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CONFIG_BYTES:
        raise ConfigError(f"the run config is longer than {MAX_CONFIG_BYTES:,} bytes; it is meant to be read by people")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_explain_syntax(error, text)) from None
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        lines = [line for details in error.errors(include_url=False) for line in _explain(details)]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n  ".join([f"{count} in the run config", *lines])) from None


def config_schema() -> dict[str, Any]:
    """JSON schema of the TOML document, for editors and for checks before submission."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | RunConfig.model_json_schema()


def example_config() -> str:
    """A complete config with every option explained; the options that are commented out have no value by default."""
    document = {"name": "digits", "workload": "digits", "cohort": {"size": 3}, "schedule": {"max_rounds": 10}}
    return _write(RunConfig.model_validate(document), comments=True)


def to_toml(config: RunConfig) -> str:
    """The config with every default written out; `parse_run_config` gives back an equal one."""
    return _write(config, comments=False)


# Writing TOML. The standard library only reads it; a config has a handful of shapes.


def _write(config: RunConfig, *, comments: bool) -> str:
    return "\n".join(_table("", config, comments=comments)).strip() + "\n"


def _table(path: str, table: Table, *, comments: bool) -> Iterator[str]:
    subtables: list[tuple[str, FieldInfo, Table]] = []
    # The kind comes first: it says which keys follow.
    for name, field in sorted(type(table).model_fields.items(), key=lambda item: item[0] != "kind"):
        value = getattr(table, name)
        if isinstance(value, Table):
            subtables.append((f"{path}.{name}" if path else name, field, value))
            continue
        if comments:
            yield from _comment(field)
        if value is None or (comments and field.examples and not value):
            if comments:
                yield f"# {name} = {_value(field.examples[0])}" if field.examples else f"# {name} ="
        else:
            yield f"{name} = {_value(value)}"
        if comments:
            yield ""
    for subpath, field, value in subtables:
        yield ""
        if comments:
            yield from _comment(field)
        lines = list(_table(subpath, value, comments=comments))
        yield from [f"[{subpath}]", *lines] if any(lines) else []


def _comment(field: FieldInfo) -> list[str]:
    text = field.description or ""
    kinds = union_members(field)
    if len(kinds) > 1:
        text += f" One of {', '.join(kinds)}; each has its own keys."
    elif limits := describe_range(field):
        text += f" ({limits})"
    return [f"# {line}" for line in textwrap.wrap(text, 98, break_on_hyphens=False)]


def _value(value: object) -> str:
    if isinstance(value, str):
        # A TOML basic string is a JSON string but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Table):
        return _value({name: getattr(value, name) for name in type(value).model_fields})
    if isinstance(value, Mapping):
        items = (f"{_key(key)} = {_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }" if value else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"a run config holds no {type(value).__name__}")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


# Reading the models: which keys there are, what they may be.


def union_members(field: FieldInfo) -> dict[str, type[Table]]:
    """The tables that a field may hold, by kind; one without a `kind` stands under the empty string, none for a plain value."""
    candidates = get_args(field.annotation) or (field.annotation,)
    tables = [arg for arg in candidates if isinstance(arg, type) and issubclass(arg, Table)]
    return {str(table.model_fields["kind"].default) if "kind" in table.model_fields else "": table for table in tables}


def describe_range(field: FieldInfo) -> str:
    """What a plain value may be, in words, such as "1 to 65536", "one of max, min", "more than 0"; empty for free text."""
    annotation, metadata = _without_none(field.annotation), field.metadata
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = [*metadata, *more]
    if choices := get_args(annotation):
        if all(isinstance(choice, str | int) for choice in choices):
            return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else ""
        inner = get_args(choices[0])
        if inner and all(isinstance(choice, str) for choice in inner):
            return f"any of {', '.join(inner)}"
        return ""
    limits = {key: limit for item in metadata for key, limit in _limits(item)}
    if annotation not in (int, float):
        return ""
    low = _number(limits.get("ge", limits.get("gt", 0)))
    high = _number(limits.get("le", limits.get("lt", math.inf)))
    if "ge" in limits and "le" in limits and limits["le"] < MAX_COUNT:
        return f"{low} to {high}"
    bounds = [f"at least {low}"] if "ge" in limits else [f"more than {low}"] if "gt" in limits else []
    if "lt" in limits:
        bounds.append(f"less than {high}")
    elif limits.get("le", math.inf) < MAX_COUNT:  # beyond, the limit only keeps numbers in their fields on the wire
        bounds.append(f"at most {high}")
    return ", ".join(bounds)


def _limits(constraint: object) -> Iterator[tuple[str, float]]:
    for item in (constraint, *getattr(constraint, "metadata", ())):
        for key in ("ge", "gt", "le", "lt"):
            if (limit := getattr(item, key, None)) is not None:
                yield key, limit


def _without_none(annotation: Any) -> Any:
    args = get_args(annotation)
    return next(arg for arg in args if arg is not type(None)) if type(None) in args else annotation


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def option_paths(table: type[Table] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Every option as (path, kind that it belongs to or "", field), tables before what is in them."""
    kind = str(table.model_fields["kind"].default) if "kind" in table.model_fields else ""
    for name, field in table.model_fields.items():
        yield f"{prefix}{name}", kind, field
        for member in union_members(field).values():
            yield from option_paths(member, f"{prefix}{name}.")


# Explaining what is wrong.


def _explain_syntax(error: tomllib.TOMLDecodeError, text: str) -> str:
    message = str(error)
    match = re.search(r"\(at line (\d+), column (\d+)\)", message)
    lines = text.splitlines()
    if match is None or not 1 <= int(match[1]) <= len(lines):
        return f"the run config is not TOML: {message}"
    line = lines[int(match[1]) - 1]
    what = message[: match.start()].strip()
    return (
        f"the run config is not TOML: line {match[1]}, column {match[2]}: {what}\n"
        f"  {line}\n  {' ' * (int(match[2]) - 1)}^"
    )


def _explain(details: ErrorDetails) -> list[str]:
    """One line per problem in one of pydantic's errors."""
    kind, context = details["type"], details.get("ctx", {})
    path, table, field = _locate(details["loc"])
    got = f"got {_show(details['input'])}"
    if kind == "default_factory_not_called":  # only follows from another problem
        return []
    if kind == "cross_field":
        prefix = f"{path}." if path else ""
        return [f"{prefix}{name}: {sentence}" for name, sentence in context["problems"].items()]
    if kind == "extra_forbidden":
        return [f"{path}: {_explain_unknown(path, table)}"]
    if kind == "missing":
        return [f"{path}: is missing; {_explain_missing(path, field)}"]
    if kind == "union_tag_not_found" and field is not None:
        return [f"{path}: has no kind; add kind = {_alternatives(union_members(field))}"]
    if kind == "union_tag_invalid" and field is not None:
        tag = str(context["tag"])
        return [
            f"{path}.kind: expected {_alternatives(union_members(field))}, got {_show(tag)}{_nearest(tag, union_members(field))}"
        ]
    if kind == "literal_error":
        found = re.findall(r"'([^']*)'|(\d+)", str(context["expected"]))
        choices = [int(number) if number else text for text, number in found]
        return [f"{path}: expected {_alternatives(choices)}, {got}{_nearest(details['input'], choices)}"]
    return [f"{path}: expected {_expected(details, field)}, {got}"]


def _locate(loc: Sequence[int | str]) -> tuple[str, type[Table], FieldInfo | None]:
    """Path of an error as it stands in the file, the table that it is in, and the field; the field is None for an unknown
    key. pydantic's own location also names the member of a union, which no file does."""
    table: type[Table] = RunConfig
    field: FieldInfo | None = None
    path = ""
    parts = list(loc)
    while parts:
        part = parts.pop(0)
        if part == "[key]":  # pydantic's word for "the key itself is wrong"
            continue
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        if field is not None and (members := union_members(field)):
            if part in members and len(members) > 1:
                table, field = members[str(part)], None
                continue
            table, field = next(iter(members.values())), None
        path += f".{part}" if path else part
        if field is not None:  # a key of a plain mapping, such as labels
            continue
        field = table.model_fields.get(part)
    return path, table, field


def _explain_unknown(path: str, table: type[Table]) -> str:
    *_, name = path.split(".")
    here = list(table.model_fields)
    if near := difflib.get_close_matches(name, here, n=1):
        return f"there is no such key; did you mean {near[0]!r}?"
    everywhere: dict[str, dict[str, None]] = {}
    for option, kind, _ in option_paths():
        everywhere.setdefault(option, {})[kind] = None
    same_name = [option for option in everywhere if option.rsplit(".", 1)[-1] == name]
    if same_name:
        option = same_name[0]
        needs = f", which needs kind = {_alternatives(list(everywhere[option]))}" if option == path else ""
        return f"there is no such key here; did you mean {option!r}{needs}?"
    near = difflib.get_close_matches(name, [option.rsplit(".", 1)[-1] for option in everywhere], n=1)
    if near:
        option = next(option for option in everywhere if option.rsplit(".", 1)[-1] == near[0])
        return f"there is no such key here; did you mean {option!r}?"
    return f"there is no such key; the keys here are {', '.join(here)}"


def _explain_missing(path: str, field: FieldInfo | None) -> str:
    table, _, name = path.rpartition(".")
    if field is not None and (members := union_members(field)):
        required = [key for key, option in next(iter(members.values())).model_fields.items() if option.is_required()]
        return f"add a table [{path}] with {', '.join(required)}"
    example = _value(field.examples[0]) if field is not None and field.examples else "..."
    return f"write {name} = {example}" + (f" under [{table}]" if table else " at the top of the file")


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "tuple_type": "an array [...]",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _expected(details: ErrorDetails, field: FieldInfo | None) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in _TYPES:
        limits = describe_range(field) if field is not None else ""
        return _TYPES[kind] + (f", {limits}" if limits else "")
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than") and field is not None:
        return describe_range(field)
    if kind == "string_pattern_mismatch":
        allowed = str(context["pattern"]).strip("^$+").strip("[]")
        return f"only characters of {allowed}"
    if kind in ("string_too_short", "string_too_long", "too_long", "too_short", "dict_too_long"):
        return details["msg"].removeprefix("String should have ").removeprefix("Dictionary should have ")
    return details["msg"][:1].lower() + details["msg"][1:]


def _alternatives(choices: Sequence[str | int] | Mapping[str, object]) -> str:
    quoted = [_value(choice) for choice in choices]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _nearest(value: object, choices: Sequence[str | int] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(str(value), [choice for choice in choices if isinstance(choice, str)], n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _show(value: object) -> str:
    """A value as one would write it in the file, cut to a line."""
    if value is PydanticUndefined:
        return "nothing"
    try:
        text = _value(value)
    except TypeError:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
