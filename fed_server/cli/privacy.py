"""`fedctl privacy`: what differential privacy costs, before a run is submitted. Planning needs no coordinator."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from fed_core.errors import ConfigError
from fed_core.privacy.accounting import (
    MAX_ROUNDS,
    Epsilon,
    Spend,
    check_delta,
    claim,
    default_delta,
    epsilon,
    epsilon_without_sampling,
    likely_participations,
    noise_multiplier_for,
    projection,
    rounded_up,
    rounds_for,
)
from fed_core.privacy.mechanism import CLIPPING_NORMS, Mechanism, Poisson, central_poisson, local
from fed_server.cli.console import stderr, stdout

privacy_app = typer.Typer(no_args_is_help=True, help="Differential privacy: plan what a run may cost.")

# In cohorts smaller than this the noise of a useful epsilon is as large as what the clients agree on.
SMALL_COHORT: Final = 50
# A promise beyond this one is not what the word privacy suggests.
LARGE_EPSILON: Final = 10.0
# Part of delta that is set aside for a client that the coins name more often than planned.
_COIN_SHARE: Final = 0.01
_NUM_POINTS: Final = 12


class Kind(StrEnum):
    """Who adds the noise."""

    CENTRAL = "central"
    LOCAL = "local"


@dataclass(frozen=True)
class Question:
    """What is given: two of epsilon, noise multiplier (over the clipping norm) and rounds."""

    kind: Kind
    epsilon: float | None
    noise_multiplier: float | None
    num_rounds: int | None
    num_clients: int
    sampling_rate: float
    delta: float
    max_participations: int | None

    @property
    def asks_for(self) -> str:
        """The one that is not given."""
        if self.noise_multiplier is None:
            return "noise multiplier"
        return "rounds" if self.num_rounds is None else "epsilon"

    def mechanism(self, noise_multiplier: float) -> Mechanism:
        """A round, for a clipping norm of 1."""
        if self.kind is Kind.LOCAL:
            return local(1.0, noise_multiplier)
        return central_poisson(1.0, noise_multiplier, self.sampling_rate)


@dataclass(frozen=True)
class Plan:
    """The answer, and what else goes with it.

    Attributes:
        noise_multiplier: standard deviation of the noise over the clipping norm.
        released: epsilon towards who sees released models only; towards the coordinator where the noise is local.
        seen: epsilon towards who also sees which clients took part in which round.
        max_participations: rounds of one client that `seen` covers; exceeded with probability `coin_failure`, which is in delta.
        noise_on_mean: standard deviation of one parameter's noise in the mean of an expected cohort, over the clipping norm.
        points: (round, epsilon) up to the last round.
        claim: the guarantee in words."""

    question: Question
    noise_multiplier: float
    num_rounds: int
    released: Epsilon
    seen: Epsilon
    max_participations: int
    coin_failure: float
    expected_cohort: float
    noise_on_mean: float
    points: list[tuple[int, Epsilon]]
    warnings: list[str]
    claim: str


def make_plan(question: Question) -> Plan:
    """Answers a question by the accountant that runs are held to. Takes seconds.

    Raises ConfigError where there is no answer: not a single round fits, or more than MAX_ROUNDS do."""
    is_local, delta = question.kind is Kind.LOCAL, question.delta
    warning = check_delta(delta, question.num_clients)
    noise, num_rounds = question.noise_multiplier, question.num_rounds
    if noise is None:
        assert question.epsilon is not None and num_rounds is not None
        of_one = question.mechanism(1.0)
        count = _participations(question, num_rounds)[0] if is_local else num_rounds
        ratio = noise_multiplier_for(question.epsilon, delta, count, of_one.sampling, of_one.relation)
        # As many digits as people copy, and the epsilon of just these.
        noise = rounded_up(ratio * CLIPPING_NORMS[of_one.relation], 5)
    mechanism = question.mechanism(noise)
    if num_rounds is None:
        assert question.epsilon is not None
        num_rounds = _rounds(question, question.epsilon, mechanism)
    most, coin_failure = _participations(question, num_rounds)
    seen = epsilon_without_sampling([Spend(mechanism, num_rounds)], most, delta, coin_failure)
    spends = [Spend(mechanism, most if is_local else num_rounds)]
    released = seen if is_local else epsilon(spends, delta)
    expected = question.sampling_rate * question.num_clients
    # Local noise is added by every client and averages out; central noise is added once.
    on_mean = noise / math.sqrt(expected) if is_local else noise / expected
    return Plan(
        question=question,
        noise_multiplier=noise,
        num_rounds=num_rounds,
        released=released,
        seen=seen,
        max_participations=most,
        coin_failure=coin_failure,
        expected_cohort=expected,
        noise_on_mean=on_mean,
        points=projection(mechanism, spends[0].count, delta, num_points=_NUM_POINTS),
        warnings=[*_warnings(expected, on_mean, released.reported), *([warning] if warning else [])],
        claim=claim(spends, released, delta),
    )


def _participations(question: Question, num_rounds: int) -> tuple[int, float]:
    """Most rounds of one client, and with what probability the coins name it more often."""
    if question.max_participations is not None:
        return min(question.max_participations, num_rounds), 0.0
    if question.kind is Kind.LOCAL or question.sampling_rate == 1:
        return num_rounds, 0.0
    likely = likely_participations(num_rounds, question.sampling_rate, _COIN_SHARE * question.delta)
    return (likely, _COIN_SHARE * question.delta) if likely < num_rounds else (num_rounds, 0.0)


def _rounds(question: Question, budget: float, mechanism: Mechanism) -> int:
    found = rounds_for(budget, question.delta, mechanism)
    if found == 0:
        once = epsilon([Spend(mechanism)], question.delta).reported
        raise ConfigError(
            f"not one round fits: a noise multiplier of {question.noise_multiplier:g} costs an epsilon of {once:.3g} in the first",
            cure="give a larger --noise-multiplier or --epsilon, or give --rounds instead of --noise-multiplier",
        )
    if found >= MAX_ROUNDS:
        raise ConfigError(
            f"more than {MAX_ROUNDS:,} rounds fit, which is as good as any number",
            cure="give --rounds instead of --noise-multiplier: less noise will do",
        )
    return found


def _warnings(expected: float, on_mean: float, cost: float) -> Iterator[str]:
    if expected < SMALL_COHORT:
        yield (
            f"the expected cohort of {expected:g} clients is small: noise of {on_mean:.2g} clipping norms is on every parameter of "
            f"the mean, which few models survive. Have {SMALL_COHORT} or more in a round: a larger --sampling-rate, or more clients"
        )
    if cost > LARGE_EPSILON:
        yield (
            f"an epsilon of {cost:.3g} promises little: what is released may be e^{cost:.3g} times as likely with somebody's data "
            f"as without. Plan for {LARGE_EPSILON:g} or less: more noise, fewer rounds or a smaller sampling rate"
        )


_EPILOG = (
    "[bold]Which noise for epsilon 3?[/] fedctl privacy plan --epsilon 3 --rounds 200 --sampling-rate 0.05 --clients 1000. "
    "[bold]Which epsilon?[/] --noise-multiplier 1.2 --rounds 200. [bold]How many rounds?[/] --epsilon 3 --noise-multiplier 1.2."
)
_HELP = (
    "Find the noise, the epsilon or the rounds of a private run from the other two. Needs no coordinator.\n\n"
    "Give two of --epsilon, --noise-multiplier and --rounds. Central: the coordinator adds the noise, and each client is in a "
    "round by an independent coin at --sampling-rate. Local: each client adds it to what it sends, and --rounds are those that one "
    "client takes part in."
)


@privacy_app.command("plan", help=_HELP, epilog=_EPILOG)
def privacy_plan(
    clients: Annotated[
        int,
        typer.Option("--clients", metavar="N", min=1, help="Clients on the run's roster.", show_default=False),
    ],
    target: Annotated[
        float | None,
        typer.Option("--epsilon", metavar="X", help="Budget: epsilon after the last round.", show_default=False),
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            "--noise-multiplier",
            metavar="Z",
            help="Standard deviation of the noise over the clipping norm, as in a run config.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", metavar="T", min=1, max=MAX_ROUNDS, help="Rounds of the run.", show_default=False),
    ] = None,
    sampling_rate: Annotated[
        float,
        typer.Option("--sampling-rate", metavar="Q", help="Probability with which a client is in a round."),
    ] = 1.0,
    delta: Annotated[
        float | None,
        typer.Option(
            "--delta",
            metavar="D",
            help="Probability with which the guarantee may fail. Default: 1/(10 N), rounded down to one digit.",
            show_default=False,
        ),
    ] = None,
    max_participations: Annotated[
        int | None,
        typer.Option(
            "--max-participations",
            metavar="K",
            min=1,
            help="Most rounds that one client takes part in, for who sees the cohorts. Default: as many as coins may bring.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[Kind, typer.Option("--kind", help="Who adds the noise.")] = Kind.CENTRAL,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            help="Write epsilon over rounds as a picture (.png, .svg or .pdf; needs matplotlib).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Find the noise, the epsilon or the rounds of a private run from the other two."""
    from rich.markup import escape

    from fed_server.cli import privacy_render

    if [target, noise_multiplier, rounds].count(None) != 1:
        raise typer.BadParameter(
            "give two of the three, and the third is what you get",
            param_hint="--epsilon / --noise-multiplier / --rounds",
        )
    _check_positive(target, "--epsilon")
    _check_positive(noise_multiplier, "--noise-multiplier")
    with _named("--sampling-rate"):
        Poisson(sampling_rate)
    delta = default_delta(clients) if delta is None else delta
    with _named("--delta"):
        check_delta(delta, clients)
    if plot is not None:
        privacy_render.check_plot(plot)
    question = Question(
        kind, target, noise_multiplier, rounds, clients, sampling_rate, delta, max_participations
    )  # fmt: skip
    console = stderr()
    if console.is_terminal:
        with console.status(f"looking for the {question.asks_for} ..."):
            plan = make_plan(question)
    else:
        plan = make_plan(question)
    if plot is not None:
        privacy_render.write_plot(plot, plan)
        console.print(f"wrote {escape(str(plot))}", soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(privacy_render.as_json(plan), indent=2) + "\n")
        return
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    out = stdout()
    out.print(privacy_render.plan_table(plan))
    if plot is None:
        out.print(privacy_render.text_plot(plan, out.width))


def _check_positive(value: float | None, option: str) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value:g} is not a finite number above 0", param_hint=option)


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Turns what is refused into an error of this option."""
    try:
        yield
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
