"""What `fedctl privacy` shows: plans in, tables, plots and JSON out."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fed_core.privacy.accounting import Epsilon, rounded_up
from fed_server.cli.codec_render import check_plot
from fed_server.cli.privacy import Kind, Plan
from fedstream.v1 import runs_pb2

__all__ = ["account", "as_json", "check_plot", "plan_table", "text_plot", "write_plot"]

_PLOT_WIDTH, _PLOT_HEIGHT = 64, 12


# Of a long account, the first and the last so many rounds.
_MOST_CHARGES = 12


def account(response: runs_pb2.GetPrivacyResponse) -> RenderableType:
    """What a run was charged, a row a round, what is left, and the guarantee in words; those alone where each site keeps its own
    account."""
    if response.is_kept_by_sites:
        title = f"Population {response.population!r}: kept by each site, delta {response.delta:g}"
        return Group(Text(title, style="bold"), Text(), Text(response.claim))
    units = f"{response.num_units:,} units on the roster" if response.num_units else "the roster is not frozen yet"
    title = f"Population {response.population!r}: {units}, delta {response.delta:g}"
    table = Table(
        Column("round", justify="right"),
        Column("epsilon", justify="right"),
        Column("by Rényi", justify="right", style="dim"),
        Column("cohorts seen", justify="right"),
        Column("population", justify="right"),
        Column("sensitivity", justify="right"),
        Column("noise", justify="right"),
        Column("released"),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    charges = list(response.charges)
    half = _MOST_CHARGES // 2
    shown = charges if len(charges) <= _MOST_CHARGES else [*charges[:half], None, *charges[-half:]]
    for charge in shown:
        if charge is None:
            table.add_row(*["..."] * len(table.columns))
            continue
        table.add_row(
            f"{charge.round:,}",
            _figure(charge.epsilon),
            _figure(charge.epsilon_rdp),
            _figure(charge.epsilon_of_cohort),
            _figure(charge.population_epsilon),
            f"{charge.sensitivity:.4g}",
            f"{charge.sigma:.4g}",
            "yes" if charge.is_released else "no",
        )
    return Group(
        Text(title, style="bold"), Text(), table, Text(), Text(_outlook(response)), Text(), Text(response.claim)
    )


def _outlook(response: runs_pb2.GetPrivacyResponse) -> str:
    spent = response.charges[-1].epsilon if response.charges else 0.0
    further = f"All rounds of the run come to epsilon {_figure(response.projected_epsilon)}."
    if response.projected_epsilon <= spent:
        further = "Nothing more will be charged."
    if not response.max_epsilon:
        return f"No budget. {further}"
    population = response.charges[-1].population_epsilon if response.charges else 0.0
    return (
        f"Budget of the population: epsilon {response.max_epsilon:g}, of which {_figure(population)} is spent; it pays for "
        f"{response.affordable_rounds:,} more rounds of this run. {further}"
    )


def plan_table(plan: Plan) -> RenderableType:
    """The answer in bold among the figures that go with it, and the guarantee in words."""
    question = plan.question
    is_local = question.kind is Kind.LOCAL
    title = (
        f"{'Local' if is_local else 'Central'} differential privacy, {question.num_clients:,} clients, "
        f"sampling rate {question.sampling_rate:g}, delta {question.delta:g}"
    )
    rows = [
        (
            "noise multiplier",
            f"{plan.noise_multiplier:.6g}",
            "standard deviation of the noise over the clipping norm",
        ),
        ("rounds", f"{plan.num_rounds:,}", ""),
        ("epsilon", _figure(plan.released.reported), _released_note(plan)),
    ]
    if not is_local:
        rows.append(("epsilon, cohorts seen", _figure(plan.seen.reported), _seen_note(plan)))
    rows += [
        ("expected cohort", f"{plan.expected_cohort:,.4g}", "clients: sampling rate times clients"),
        (
            "noise on the mean",
            f"{plan.noise_on_mean:.3g}",
            "standard deviation over the clipping norm, of every parameter",
        ),
    ]
    table = Table(
        Column(no_wrap=True), Column(justify="right", no_wrap=True), Column(overflow="fold", style="dim"),
        box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False,
    )  # fmt: skip
    for name, value, note in rows:
        is_answer = name == question.asks_for
        table.add_row(
            Text(name, style="bold" if is_answer else ""), Text(value, style="bold" if is_answer else ""), note
        )
    return Group(Text(title, style="bold"), Text(), table, Text(), Text(plan.claim))


def _released_note(plan: Plan) -> str:
    if plan.question.kind is Kind.LOCAL:
        limit = f"{plan.max_participations:,} round" + ("s" if plan.max_participations != 1 else "")
        return f"towards the coordinator, for a client in {limit}; by RDP {_figure(plan.released.rdp)}"
    return f"towards who sees released models only; by RDP {_figure(plan.released.rdp)}"


def _seen_note(plan: Plan) -> str:
    note = f"towards who also sees who took part: nothing amplified, a client in {plan.max_participations:,} rounds at most"
    return f"{note} (more with probability {plan.coin_failure:.1g}, which is in delta)" if plan.coin_failure else note


def _figure(value: float) -> str:
    """An epsilon, rounded up."""
    return "infinite" if math.isinf(value) else f"{rounded_up(value, 4):.4g}"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the table shows, in full precision; an infinite epsilon is null."""
    question = plan.question
    return {
        "kind": question.kind.value,
        "asks_for": question.asks_for,
        "num_clients": question.num_clients,
        "sampling_rate": question.sampling_rate,
        "delta": question.delta,
        "noise_multiplier": plan.noise_multiplier,
        "num_rounds": plan.num_rounds,
        "epsilon": _epsilon_json(plan.released),
        "epsilon_cohorts_seen": _epsilon_json(plan.seen),
        "max_participations": plan.max_participations,
        "coin_failure": plan.coin_failure,
        "expected_cohort": plan.expected_cohort,
        "noise_on_mean": plan.noise_on_mean,
        "projection": [{"round": point, **_epsilon_json(found)} for point, found in plan.points],
        "warnings": plan.warnings,
        "claim": plan.claim,
    }


def _epsilon_json(found: Epsilon) -> dict[str, float | None]:
    return {"pld": _finite(found.pld), "rdp": _finite(found.rdp)}


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


# Epsilon over rounds


def _curve(plan: Plan) -> list[tuple[int, float]]:
    return [(point, found.reported) for point, found in plan.points if math.isfinite(found.reported)]


def _at(curve: list[tuple[int, float]], place: float) -> float:
    """Epsilon at a place between the first point and the last, on the straight line between its neighbours."""
    for (left, low), (right, high) in pairwise(curve):
        if place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return curve[-1][1]


def text_plot(plan: Plan, width: int) -> RenderableType:
    """Epsilon over rounds in characters; nothing where it is infinite, or there is one round only."""
    curve = _curve(plan)
    if len(curve) < 2:
        return Group()
    columns, rows = min(_PLOT_WIDTH, width - 10), _PLOT_HEIGHT
    first, last, top = curve[0][0], curve[-1][0], curve[-1][1]
    grid = [[" "] * columns for _ in range(rows)]
    for column in range(columns):
        value = _at(curve, first + (last - first) * column / (columns - 1))
        grid[rows - 1 - round((rows - 1) * value / top)][column] = "•"
    lines = []
    for row, cells in enumerate(grid):
        level = top * (rows - 1 - row) / (rows - 1)
        lines.append(f"{f'{level:.3g}' if row in (0, rows // 2, rows - 1) else '':>7} │{''.join(cells)}")
    what = "rounds" if plan.question.kind is Kind.CENTRAL else "rounds of one client"
    scale = f"{first:,}".ljust(columns - 30) + f"{last:,} {what}".rjust(30)
    return Text("\n".join(["", "epsilon", *lines, " " * 9 + scale]))


def write_plot(path: Path, plan: Plan) -> None:
    """Epsilon over rounds as a picture: by privacy loss distributions, and by RDP."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    places = [point for point, _ in plan.points]
    axes.plot(places, [found.reported for _, found in plan.points], marker="o", color="#0072B2", label="reported")
    axes.plot(
        places,
        [found.rdp for _, found in plan.points],
        linestyle="--",
        color="#D55E00",
        label="Renyi differential privacy",
    )
    if plan.question.epsilon is not None:
        axes.axhline(plan.question.epsilon, color="#999999", linestyle=":", label=f"budget {plan.question.epsilon:g}")
    axes.set_xlabel("rounds" if plan.question.kind is Kind.CENTRAL else "rounds of one client")
    axes.set_ylabel(f"epsilon at delta {plan.question.delta:g}")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{plan.question.kind.value}, noise multiplier {plan.noise_multiplier:g}, {plan.question.num_clients:,} clients, "
        f"sampling rate {plan.question.sampling_rate:g}",
        fontsize=10,
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
