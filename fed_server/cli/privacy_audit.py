"""`fedctl privacy audit`: canaries through the coordinator's own rounds, and what the guesses about them contradict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fed_core.privacy.accounting import check_delta, rounded_up
from fed_server.cli.console import stderr
from fed_server.privacy.audit import Finding, examine, make_canaries
from fed_server.rounds.private_audit import audited_privacy, claimed_epsilon, evidence

if TYPE_CHECKING:
    from fed_server.config import RunConfig


@dataclass(frozen=True)
class Audit:
    """What was audited, with what, and what was found.

    Attributes:
        claimed: epsilon at `delta` that the ledger would charge.
        num_in: canaries that the coins let in.
        seed: what coins and directions were made of; noise has no seed."""

    num_rounds: int
    sampling_rate: float
    noise_multiplier: float
    delta: float
    claimed: float
    num_canaries: int
    num_in: int
    dimension: int
    seed: int
    confidence: float
    finding: Finding

    @property
    def is_contradicted(self) -> bool:
        """Whether more leaks than is claimed."""
        return self.finding.contradicts(self.claimed)

    @property
    def could_contradict(self) -> bool:
        """Whether any guesses could have contradicted this claim."""
        return self.finding.most > self.claimed


def audit(
    config: RunConfig,
    *,
    num_canaries: int,
    dimension: int,
    num_rounds: int | None,
    delta: float | None,
    seed: int,
    confidence: float,
) -> Audit:
    """Audits what a run config promises, with progress on a terminal. Takes as long as `evidence` and the accountant do.

    Raises ConfigError for a config without a guarantee that canaries can audit, and for what is out of range."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    privacy = audited_privacy(config)
    rounds = config.schedule.max_rounds if num_rounds is None else num_rounds
    at = privacy.delta if delta is None else delta
    check_delta(at, privacy.fewest_units(config.cohort.size))
    columns = (
        SpinnerColumn(), TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("claim", total=None)
        claimed = claimed_epsilon(config, num_canaries, dimension, rounds, at)
        progress.update(task, description="canaries")
        canaries = make_canaries(num_canaries, dimension, seed)
        progress.update(task, description="rounds", total=rounds)
        ratios = evidence(config, canaries, rounds, on_round=lambda _: progress.advance(task))
    return Audit(
        num_rounds=rounds,
        sampling_rate=privacy.sampling_rate,
        noise_multiplier=privacy.noise_multiplier,
        delta=at,
        claimed=claimed,
        num_canaries=num_canaries,
        num_in=int(canaries.is_in.sum()),
        dimension=dimension,
        seed=seed,
        confidence=confidence,
        finding=examine(ratios, canaries.is_in, at, confidence),
    )


def as_json(found: Audit) -> dict[str, Any]:
    """Everything that the table shows, in full precision; an infinite epsilon is null."""
    return {
        "num_rounds": found.num_rounds,
        "sampling_rate": found.sampling_rate,
        "noise_multiplier": found.noise_multiplier,
        "relation": "add_remove",
        "delta": found.delta,
        "claimed_epsilon": found.claimed if math.isfinite(found.claimed) else None,
        "confidence": found.confidence,
        "audited_epsilon": found.finding.bound,
        "largest_auditable_epsilon": found.finding.most,
        "is_contradicted": found.is_contradicted,
        "num_canaries": found.num_canaries,
        "num_in": found.num_in,
        "dimension": found.dimension,
        "seed": found.seed,
        "attempts": [
            {
                "num_guessed_in": attempt.num_guessed_in,
                "num_guessed_out": attempt.num_guessed_out,
                "num_right": attempt.num_right,
                "audited_epsilon": attempt.bound,
            }
            for attempt in found.finding.attempts
        ],
    }


def report(found: Audit) -> RenderableType:
    """The ways to guess, a row each, the claim beside what they contradict, and the verdict in words."""
    title = (
        f"Audit of {found.num_rounds:,} rounds at sampling rate {found.sampling_rate:g}, noise multiplier "
        f"{found.noise_multiplier:g}, with {found.num_canaries:,} canaries in {found.dimension:,} dimensions (seed {found.seed})"
    )
    table = Table(
        Column("guessed in", justify="right"),
        Column("guessed out", justify="right"),
        Column("guesses", justify="right"),
        Column("right", justify="right"),
        Column("share", justify="right"),
        Column("epsilon above", justify="right"),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for attempt in found.finding.attempts:
        style = "bold" if attempt is found.finding.best and attempt.bound > 0 else ""
        table.add_row(
            f"{attempt.num_guessed_in:,}",
            f"{attempt.num_guessed_out:,}",
            f"{attempt.num_guesses:,}",
            f"{attempt.num_right:,}",
            f"{attempt.num_right / attempt.num_guesses:.1%}",
            f"{_rounded_down(attempt.bound)}",
            style=style,
        )
    figures = Table(
        Column(no_wrap=True), Column(justify="right", no_wrap=True), Column(style="dim"), box=None, show_header=False
    )
    at = f"at delta {found.delta:g}"
    figures.add_row(
        "claimed epsilon", _figure(found.claimed), f"{at}, adding or removing one client, released models only"
    )
    figures.add_row(
        "audited epsilon",
        _rounded_down(found.finding.bound),
        f"or more, {at}, with {found.confidence:.3g} confidence over all rows together",
    )
    figures.add_row(
        "at most auditable", _rounded_down(found.finding.most), "what the audit would say if every guess were right"
    )
    style = "bold red" if found.is_contradicted else "bold"
    return Group(Text(title, style="bold"), Text(), table, Text(), figures, Text(), Text(verdict(found), style=style))


def verdict(found: Audit) -> str:
    """What follows, in words that claim no more."""
    claimed, bound = _figure(found.claimed), _rounded_down(found.finding.bound)
    if found.is_contradicted:
        return (
            f"The audit contradicts the claim: epsilon is above {bound}, and {claimed} is claimed. A mechanism that keeps its "
            f"claim fails so with probability {1 - found.confidence:.2g} at most. Release nothing of this build; repeat the audit "
            "with another seed, and look at clipping, noise and divisor."
        )
    if not found.could_contradict:
        return (
            f"The audit says nothing about the claim: with {found.num_canaries:,} canaries at delta {found.delta:g} it cannot "
            f"contradict an epsilon of {claimed}, whatever leaks. Give fewer --rounds, whose claim is lower, more --canaries or a "
            "smaller --delta."
        )
    return (
        f"The audit did not contradict the claim: the guesses fit any epsilon above {bound}, and {claimed} is claimed. That is no "
        "confirmation: an audit sees defects that help its guesses, and no others."
    )


def _figure(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{rounded_up(value, 4):.4g}"


def _rounded_down(value: float) -> str:
    return f"{math.floor(value * 1000) / 1000:.3f}"
