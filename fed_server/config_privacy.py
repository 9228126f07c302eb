"""The run config's [privacy]: which guarantee a run gives, and what it may cost.

What else of a config goes with a guarantee is one table, `FEATURES`: every feature, in every mode, is allowed or refused with the
reason and the cure; a test goes through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, Union

from pydantic import Field, Strict, model_validator

from fed_core.plan import LEAST_NOISE, PrivacyPlan
from fed_server.config_table import WORD, ConfigTable, LabelWord, refuse

if TYPE_CHECKING:
    from fed_server.config import RunConfig

Mode = Literal["central", "local", "examples"]

ClippingNorm = Annotated[float, Field(gt=0, le=1e6)]
Delta = Annotated[float, Field(gt=0, lt=1)]
Budget = Annotated[float, Field(gt=0, le=1e6)]
Population = Annotated[str, Field(min_length=1, max_length=64, pattern=WORD)]

MIN_EXPECTED_COHORT: float = 1.0
"""Units that a round draws on average at least: with fewer the noise is larger than everything that a cohort can send."""


class NoPrivacyConfig(ConfigTable):
    """No differential privacy."""

    kind: Literal["none"] = Field(default="none", description="No guarantee, no noise.")


class FixedClippingConfig(ConfigTable):
    """The same bound in every round."""

    kind: Literal["fixed"] = Field(default="fixed", description="The same bound in every round.")
    norm: ClippingNorm = Field(
        description="L2 norm, over all tensors of an update together, that longer updates are cut to. The noise is in proportion "
        "to it.",
        examples=[1.0],
    )


class AdaptiveClippingConfig(ConfigTable):
    """The bound follows a quantile of the updates' norms, which is found with noise (Andrew et al. 2021, arXiv:1905.03871)."""

    kind: Literal["adaptive"] = Field(default="adaptive", description="The bound follows a quantile of the norms.")
    initial_norm: ClippingNorm = Field(default=0.1, description="Bound of the first round.")
    quantile: float = Field(
        default=0.5, gt=0, lt=1, description="Part of the updates that the bound is to leave uncut."
    )
    learning_rate: float = Field(
        default=0.2, gt=0, le=10, description="How fast the bound follows: it changes by exp(-learning_rate * excess)."
    )


ClippingConfig = Annotated[FixedClippingConfig | AdaptiveClippingConfig, Field(discriminator="kind")]


class IndependentConfig(ConfigTable):
    """Every round draws noise of its own, and sampling amplifies."""

    kind: Literal["independent"] = Field(default="independent", description="Noise of its own in every round.")


class _CorrelationConfig(ConfigTable):
    max_participations: int = Field(
        ge=1,
        le=1_000_000,
        description="Rounds of the run that one client is asked in at most.",
        examples=[10],
    )
    min_separation: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Rounds from one in which a client is asked to the next in which it may be, at least: 1 is any.",
    )


class TreeConfig(_CorrelationConfig):
    """Noise on the nodes of a binary tree over the rounds, of which each version carries few (DP-FTRL, Kairouz et al. 2021,
    arXiv:2103.00039)."""

    kind: Literal["tree"] = Field(default="tree", description="Noise on the nodes of a binary tree over the rounds.")


class BandedInverseConfig(_CorrelationConfig):
    """Each round takes back part of what the last rounds drew, by the coefficients of an inverse square root (Kalinin et al. 2025,
    arXiv:2505.12128)."""

    kind: Literal["banded_inverse"] = Field(
        default="banded_inverse", description="Each round takes back part of the last rounds' noise."
    )
    bands: int = Field(
        default=8,
        ge=2,
        le=64,
        description="Rounds whose noise a round combines, its own included. Each costs a draw of the model's size.",
    )


CorrelationConfig = Annotated[IndependentConfig | TreeConfig | BandedInverseConfig, Field(discriminator="kind")]


class CentralPrivacyConfig(ConfigTable):
    """Client-level differential privacy by a coordinator that is trusted with the updates (DP-FedAvg, McMahan et al. 2018,
    arXiv:1710.06963): updates are cut to a norm, cohorts are drawn by independent coins, and every released sum carries noise. What
    is released hardly depends on whether any one client took part in the run at all."""

    kind: Literal["central"] = Field(
        default="central", description="Noise at the coordinator, which is trusted; hides whole clients."
    )
    sampling_rate: float = Field(
        gt=0,
        le=1,
        description="Chance with which each member of the roster, independently of all others, is asked in a round: q. The roster "
        "are the first cohort.size eligible clients, frozen when the run begins.",
        examples=[0.1],
    )
    noise_multiplier: float = Field(
        ge=0.01,
        le=1e4,
        description="Noise in units of the clipping norm: z. `fedctl privacy plan` says which one a budget needs.",
        examples=[1.0],
    )
    clipping: ClippingConfig = Field(description="The norm that updates are cut to.")
    correlation: CorrelationConfig = Field(
        default=IndependentConfig(),
        description="How the noise of one round goes with that of others. With any but independent, noise_multiplier is that of "
        "the whole run, cohorts are drawn in turn and not by coins, nothing is amplified by sampling, and who takes part need not "
        "be secret.",
    )
    delta: Delta = Field(
        description="Delta of the guarantee; must be below 1 / cohort.size, and better below a tenth of that.",
        examples=[1e-5],
    )
    max_epsilon: Budget | None = Field(
        default=None,
        description="Epsilon, at delta, that the population may have spent in all: the run ends before the round that would go "
        "beyond it. Unset: no limit, the run ends after max_rounds.",
        examples=[8.0],
    )
    population: Population = Field(
        default="default",
        description="Whose data is spent. What runs of the same population spent adds up, at this coordinator; give runs over "
        "clients that have nothing in common another name.",
    )
    units: dict[LabelWord, Annotated[tuple[LabelWord, ...], Strict(False)]] = Field(
        default={},
        max_length=65_536,
        description="Clients that belong to one owner and count as one: owner, and the names of its clients. They are drawn "
        "together, and share one clipping norm. Who is not named is a unit by itself.",
        examples=[{"city-hospital": ["ward-a", "ward-b"]}],
    )

    @model_validator(mode="after")
    def _check(self) -> CentralPrivacyConfig:
        named = [name for names in self.units.values() for name in names]
        if len(set(named)) != len(named):
            twice = sorted({name for name in named if named.count(name) > 1})
            refuse(
                {"units": f"expected each client in one unit, got {', '.join(twice)} in more: delete the repetition"}
            )
        if not isinstance(self.correlation, IndependentConfig) and not isinstance(self.clipping, FixedClippingConfig):
            refuse(
                {
                    "clipping.kind": f'expected "fixed" with correlation.kind = "{self.correlation.kind}", whose account needs the '
                    "same bound in every round: set norm"
                }
            )
        return self

    def fewest_units(self, size: int) -> int:
        """Units that a roster of so many clients has at least."""
        return size - sum(len(names) - 1 for names in self.units.values() if names)

    def problems(self, run: RunConfig) -> dict[str, str]:
        """What the rest of the run does not allow, by field."""
        problems: dict[str, str] = {}
        num_units, rate = self.fewest_units(run.cohort.size), self.sampling_rate
        if problem := _delta_problem(self.delta, num_units, "units (cohort.size, owners counted once)"):
            problems["privacy.delta"] = problem
        if rate * num_units < MIN_EXPECTED_COHORT:
            problems["privacy.sampling_rate"] = (
                f"expected at least {MIN_EXPECTED_COHORT:g} in a round on average, got {rate:g} of {num_units} = "
                f"{rate * num_units:.3g}; the noise would drown whatever is sent: raise it, or raise cohort.size"
            )
        return problems | refused_features(run, "central")


class SitePrivacyConfig(ConfigTable):
    """What each site does by itself to protect its data. The coordinator passes it on, and keeps no account."""

    kind: Mode
    delta: Delta = Field(
        description='Delta of the guarantee. With kind = "local" it must be below 1 / cohort.size, and better below a tenth of '
        'that; with "examples" a site refuses one that is not below 1 / its number of examples.',
        examples=[1e-5],
    )
    max_epsilon: Budget | None = Field(
        default=None,
        description="Epsilon, at delta, that one site may spend on the population in all: it refuses assignments that would go "
        "beyond it, or beyond the max_epsilon of its own settings. Unset: the site's limit alone.",
        examples=[8.0],
    )
    population: Population = Field(
        default="default",
        description="Whose data is spent: what runs of the same population spent adds up, at each site by itself.",
    )

    def plan(self) -> PrivacyPlan:
        """What a site is told."""
        raise NotImplementedError

    def problems(self, run: RunConfig) -> dict[str, str]:
        """What the rest of the run does not allow, by field."""
        return refused_features(run, self.kind)


class LocalPrivacyConfig(SitePrivacyConfig):
    """Client-level differential privacy that each site gives by itself, for coordinators that are not trusted with updates: it cuts
    its update to a norm and adds noise before anything leaves, and keeps the account. Costs far more accuracy than "central", for
    the noise of every site is as large as the whole sum's there."""

    kind: Literal["local"] = Field(
        default="local", description="Noise at the sites, which trust nobody; hides all of a site's data."
    )
    clipping_norm: ClippingNorm = Field(
        description="L2 norm, over all tensors of an update together, that longer updates are cut to.", examples=[1.0]
    )
    noise_multiplier: float = Field(
        ge=LEAST_NOISE,
        le=1e4,
        description="Standard deviation of the noise in units of clipping_norm. Replacing a site's data moves its update by twice "
        "the norm, so the accountant reckons with half of this.",
        examples=[4.0],
    )

    def plan(self) -> PrivacyPlan:
        """What a site is told."""
        return PrivacyPlan(
            "local", self.clipping_norm, self.noise_multiplier, self.delta, self.max_epsilon, self.population
        )

    def problems(self, run: RunConfig) -> dict[str, str]:
        """See `SitePrivacyConfig.problems`."""
        problems: dict[str, str] = {}
        if problem := _delta_problem(self.delta, run.cohort.size, "sites (cohort.size)"):
            problems["privacy.delta"] = problem
        return problems | super().problems(run)


class ExamplePrivacyConfig(SitePrivacyConfig):
    """Example-level differential privacy that each site gives by itself (DP-SGD, Abadi et al. 2016, arXiv:1607.00133): batches are
    drawn by independent coins, each example's gradient is cut to a norm, and every step's sum carries noise. Hides single
    examples, such as one patient's record, but not what all of a site's examples have in common."""

    kind: Literal["examples"] = Field(
        default="examples", description="DP-SGD at the sites, which trust nobody; hides single examples."
    )
    clipping_norm: ClippingNorm = Field(
        description="L2 norm, over all parameters together, that the gradient of each example is cut to.",
        examples=[1.0],
    )
    noise_multiplier: float = Field(
        ge=LEAST_NOISE,
        le=1e4,
        description="Standard deviation of the noise on the sum of a step's gradients, in units of clipping_norm.",
        examples=[1.0],
    )

    def plan(self) -> PrivacyPlan:
        """What a site is told."""
        return PrivacyPlan(
            "examples", self.clipping_norm, self.noise_multiplier, self.delta, self.max_epsilon, self.population
        )


PrivacyConfig: TypeAlias = Annotated[
    Union[NoPrivacyConfig, CentralPrivacyConfig, LocalPrivacyConfig, ExamplePrivacyConfig],  # noqa: UP007
    Field(discriminator="kind"),
]


def _delta_problem(delta: float, count: int, what: str) -> str:
    """Why a guarantee for one of so many would be none; empty where it is one."""
    if count >= 1 and delta < 1 / count:
        return ""
    return (
        f"expected less than 1 / {count} {what}, got {delta:g}; such a guarantee would allow that one of them is given away whole: "
        "lower it, best to a tenth of that"
    )


@dataclass(frozen=True)
class Verdict:
    """What becomes of a feature in a mode. Refused where there is a `field` to put it right, with the reason and the cure in
    `text`; otherwise `text` says at what cost it is allowed."""

    text: str
    field: str = ""

    @property
    def is_allowed(self) -> bool:
        """Whether a run may have it."""
        return not self.field


@dataclass(frozen=True)
class Feature:
    """Something that a run can have besides its guarantee: what it is, when a config has it, an example, and what becomes of it by
    mode."""

    name: str
    is_used: Callable[[RunConfig], bool]
    example: str
    verdicts: Mapping[Mode, Verdict]


def refused_features(run: RunConfig, mode: Mode) -> dict[str, str]:
    """What a config has and the mode refuses, by field."""
    used = [feature.verdicts[mode] for feature in FEATURES if feature.is_used(run)]
    return {verdict.field: verdict.text for verdict in used if not verdict.is_allowed}


_FREE = "free: it is computed from what is released anyway"
_PROTECTED = "free: every update is protected before it leaves its site, whatever becomes of it then"


def _weighting_is(*weightings: str) -> Callable[[RunConfig], bool]:
    return lambda run: run.aggregation.kind == "mean" and run.aggregation.weighting in weightings


def _watches_training(run: RunConfig) -> bool:
    schedule = run.training.schedule
    return schedule.kind == "plateau" and (schedule.metric or "").startswith("train.")


def _central(field: str, text: str) -> dict[Mode, Verdict]:
    return {"central": Verdict(text, field)}


def _central_allows(text: str) -> dict[Mode, Verdict]:
    return {"central": Verdict(text)}


def _sites(text: str, field: str = "") -> dict[Mode, Verdict]:
    return {"local": Verdict(text, field), "examples": Verdict(text, field)}


def _asks_by_losses(run: RunConfig) -> bool:
    return run.cohort.selection == "importance"


FEATURES: tuple[Feature, ...] = (
    Feature(
        "weights by number of examples, or by the workload",
        _weighting_is("examples", "custom"),
        '[aggregation]\nkind = "mean"\nweighting = "custom"',
        _central(
            "aggregation.weighting",
            'weights that the sites\' data decide change how much one client may move the sum; set weighting = "uniform"',
        )
        | _sites(
            'how much data a site has stays there, and every update says that it is of one example; set weighting = "uniform"',
            "aggregation.weighting",
        ),
    ),
    Feature(
        "weights by validation loss",
        _weighting_is("inverse_loss"),
        '[aggregation]\nkind = "mean"\nweighting = "inverse_loss"',
        _central(
            "aggregation.weighting",
            "losses come of the sites' data, and one client could move the sum beyond its clipping norm; set weighting = "
            '"uniform"',
        )
        | _sites(
            'losses come of the sites\' data and would leave without noise; set weighting = "uniform"',
            "aggregation.weighting",
        ),
    ),
    Feature(
        "weights that the operator gives",
        lambda run: bool(run.aggregation.importance),
        '[aggregation]\nkind = "mean"\nweighting = "uniform"\nimportance = { a = 2 }',
        _central(
            "aggregation.importance",
            "every client counts the same where noise is to hide any one of them; delete it",
        )
        | _sites(_PROTECTED),
    ),
    Feature(
        "q-FedAvg",
        lambda run: run.aggregation.kind == "qfedavg",
        '[aggregation]\nkind = "qfedavg"',
        _central(
            "aggregation.kind",
            'qfedavg weights by losses, which come of the sites\' data; take "mean" with weighting = "uniform"',
        )
        | _sites(
            'qfedavg weights by losses, which come of the sites\' data and would leave without noise; take "mean" with '
            'weighting = "uniform"',
            "aggregation.kind",
        ),
    ),
    Feature(
        "robust aggregation",
        lambda run: run.aggregation.kind not in ("mean", "qfedavg"),
        '[aggregation]\nkind = "median"\nnum_byzantine = 1',
        _central(
            "aggregation.kind",
            "how far one client may move a robust rule's result is not bounded by its clipping norm; take "
            '"mean" with weighting = "uniform", which clipping makes robust against length',
        )
        | _sites(_PROTECTED),
    ),
    Feature(
        "a bound on values",
        lambda run: run.aggregation.bound is not None,
        '[aggregation]\nkind = "mean"\nweighting = "uniform"\nbound = 1.0',
        {
            "central": Verdict(
                "updates are cut to privacy.clipping, which bounds every value; delete it", "aggregation.bound"
            ),
            "local": Verdict(
                "the noise of a site may be of any size, and a run takes a bound that leaves room for it; delete it",
                "aggregation.bound",
            ),
            "examples": Verdict(_PROTECTED),
        },
    ),
    Feature(
        "buffered rounds",
        lambda run: run.rounds.kind == "buffered",
        '[rounds]\nkind = "buffered"\nconcurrency = 2',
        _central(
            "rounds.kind",
            "who is in a buffer hangs on who is fast, which no accountant covers; delete [rounds]",
        )
        | _sites(_PROTECTED),
    ),
    Feature(
        "cohorts that go by who was asked when",
        lambda run: run.cohort.selection in ("round_robin", "staleness"),
        '[cohort]\nsize = 100\nselection = "round_robin"',
        _central("cohort.selection", "the accountant covers independent coins alone; delete it")
        | _sites("free: it goes by no data; and no chance of being left out is counted"),
    ),
    Feature(
        "cohorts that go by losses",
        _asks_by_losses,
        '[cohort]\nsize = 100\nselection = "importance"',
        _central(
            "cohort.selection",
            "the accountant covers independent coins alone, and losses come of the sites' data; delete it",
        )
        | _sites("losses come of the sites' data and would leave without noise; delete it", "cohort.selection"),
    ),
    Feature(
        "over-selection",
        lambda run: run.cohort.over_selection != 1,
        "[cohort]\nsize = 100\nover_selection = 1.5",
        _central(
            "cohort.over_selection",
            "the cohort is drawn by privacy.sampling_rate, and who is late counts as zero; delete it",
        )
        | _sites("free, but a site has been charged for an update that is not waited for, once it has left"),
    ),
    Feature(
        "a quorum, or a wait for so many clients",
        lambda run: (
            (run.cohort.quorum, run.cohort.min_clients) != (math.ceil(run.cohort.size * 2 / 3), run.cohort.size)
        ),
        "[cohort]\nsize = 100\nquorum = 3",
        _central(
            "cohort.quorum",
            "a round is released whoever comes, or the release would say who did; delete quorum and min_clients",
        )
        | _sites("free: that a site takes part is not hidden"),
    ),
    Feature(
        "SCAFFOLD",
        lambda run: run.training.objective.kind == "scaffold",
        '[training.objective]\nkind = "scaffold"\npopulation = 100',
        _central(
            "training.objective",
            "scaffold sends the sum of all sites' variates, a second release that has no noise; "
            'take "plain" or "fedprox"',
        )
        | _sites(
            "with scaffold an update says how much work is behind it, which hangs on how much data there is; take "
            '"plain", "fedprox" or "feddyn"',
            "training.objective",
        ),
    ),
    Feature(
        "FedDyn",
        lambda run: run.training.objective.kind == "feddyn",
        '[training.objective]\nkind = "feddyn"\npopulation = 100',
        _central(
            "training.objective",
            "feddyn adds up what each site sent over the whole run, and its rule for the server divides by who has "
            'taken part; take "plain" or "fedprox"',
        )
        | _sites("free: what a site carries follows its update as others decode it"),
    ),
    Feature(
        "FedNova",
        lambda run: run.training.objective.kind == "fednova",
        '[training.objective]\nkind = "fednova"',
        _central(
            "training.objective",
            "fednova scales the mean by the work that the sites did, which hangs on how much data they have; take "
            '"plain" or "fedprox"',
        )
        | _sites(
            "with fednova an update says how much work is behind it, which hangs on how much data there is; take "
            '"plain", "fedprox" or "feddyn"',
            "training.objective",
        ),
    ),
    Feature(
        "FedProx",
        lambda run: run.training.objective.kind == "fedprox",
        '[training.objective]\nkind = "fedprox"',
        _central_allows("free: it changes what a client trains, not what it may send")
        | _sites("free: the model received, towards which it pulls, is no secret"),
    ),
    Feature(
        "evaluation by the clients, and what follows from it (best version, target, patience)",
        lambda run: run.evaluation.at in ("clients", "both"),
        '[evaluation]\nat = "clients"',
        _central(
            "evaluation.at",
            'metrics of the clients\' data would be released without noise; take "coordinator" (on public data, with fed-server '
            '--workload) or "none"',
        )
        | _sites(
            'metrics of the clients\' data would leave without noise; take "coordinator" (on public data, with fed-server '
            '--workload) or "none"',
            "evaluation.at",
        ),
    ),
    Feature(
        "a learning rate that falls by the training's loss",
        _watches_training,
        '[training.schedule]\nkind = "plateau"\nmetric = "train.loss"\ndirection = "min"',
        _central(
            "training.schedule.metric",
            "the losses of a cohort would be released without noise; watch a metric of the coordinator's evaluation",
        )
        | _sites(
            "losses do not leave the sites; watch a metric of the coordinator's evaluation",
            "training.schedule.metric",
        ),
    ),
    Feature(
        "evaluation at the coordinator, and what follows from it (best version, target, patience, plateau)",
        lambda run: run.evaluation.at == "coordinator",
        '[evaluation]\nat = "coordinator"',
        _central_allows(f"{_FREE}, and from data that the coordinator has, which must be nobody's secret")
        | _sites(f"{_FREE}, and from data that the coordinator has, which must be nobody's secret"),
    ),
    Feature(
        "a server optimizer, or a moving average of the versions",
        lambda run: run.server_optimizer.kind != "sgd" or run.average.decay > 0,
        '[server_optimizer]\nkind = "adam"\n[average]\ndecay = 0.9',
        _central_allows(_FREE) | _sites(_PROTECTED),
    ),
    Feature(
        "error feedback at the clients",
        lambda run: bool(getattr(run.uplink, "feedback", False)),
        '[uplink]\nkind = "sign"\nfeedback = true',
        {
            "central": Verdict("free: what is carried over is the client's own, and is cut with its next update"),
            "local": Verdict("free: what is carried over is added before the update is cut and gets its noise"),
            "examples": Verdict("free: what is carried over was trained under the same guarantee"),
        },
    ),
    Feature(
        "a time budget",
        lambda run: run.schedule.time_budget_seconds > 0,
        "[schedule]\nmax_rounds = 3\ntime_budget_seconds = 5.0",
        {
            "central": Verdict("free: it changes what a client trains, not what it may send"),
            "local": Verdict("free: it changes what a site trains, not what it may send"),
            "examples": Verdict("free, but a site is charged for all steps that were planned"),
        },
    ),
)
"""Every feature of a run that could release something besides the versions, or change what one client may do to them."""
