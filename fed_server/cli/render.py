"""What `fedctl` shows: protos in, rich renderables out. Pure, but for the clock that is passed in."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from fedstream.v1 import common_pb2, runs_pb2

WATCHED_ROUNDS = 12
WATCHED_CLIENTS = 16
# Narrower than this a table drops its lesser columns and stands closer.
WIDE = 100

_RUN_STATES = {
    runs_pb2.RUN_STATE_ACTIVE: ("active", "cyan"),
    runs_pb2.RUN_STATE_FINISHED: ("finished", "green"),
    runs_pb2.RUN_STATE_FAILED: ("failed", "red"),
    runs_pb2.RUN_STATE_CANCELLED: ("cancelled", "yellow"),
}
_ROUND_STATES = {
    runs_pb2.ROUND_STATE_SELECTING: ("selecting", "yellow"),
    runs_pb2.ROUND_STATE_TRAINING: ("training", "cyan"),
    runs_pb2.ROUND_STATE_AGGREGATING: ("aggregating", "cyan"),
    runs_pb2.ROUND_STATE_EVALUATING: ("evaluating", "cyan"),
    runs_pb2.ROUND_STATE_COMMITTED: ("committed", "green"),
    runs_pb2.ROUND_STATE_FAILED: ("failed", "red"),
}
_PHASES = {
    common_pb2.WORK_PHASE_UNSPECIFIED: "waiting",
    common_pb2.WORK_PHASE_QUEUED: "queued",
    common_pb2.WORK_PHASE_DOWNLOADING: "downloading",
    common_pb2.WORK_PHASE_TRAINING: "training",
    common_pb2.WORK_PHASE_EVALUATING: "evaluating",
    common_pb2.WORK_PHASE_SPOOLED: "spooled",
    common_pb2.WORK_PHASE_UPLOADING: "uploading",
}
_BULK_PHASES = (common_pb2.WORK_PHASE_DOWNLOADING, common_pb2.WORK_PHASE_UPLOADING)
_UNITS = {common_pb2.WORK_PHASE_TRAINING: "steps", common_pb2.WORK_PHASE_EVALUATING: "examples"}
_FINISHED_ROUNDS = (runs_pb2.ROUND_STATE_COMMITTED, runs_pb2.ROUND_STATE_FAILED)
_PHASE_NAMES = {"selecting": "select", "training": "train", "aggregating": "aggr.", "evaluating": "eval."}


# Numbers, each in as few characters as tell it apart.

_SCALES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def format_bytes(count: float) -> str:
    """Bytes in decimal units, three significant digits: "1.66 MB"."""
    for unit in _SCALES:
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:.{max(0, 2 - int(math.log10(max(count, 1))))}f} {unit}"


def format_seconds(seconds: float) -> str:
    """A span: "20 ms", "0.4 s", "12 s", "3:07", "2:14:09"."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_metric(value: float) -> str:
    """A metric to four digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.4f}"
    return f"{value:.3e}"


def format_time(time: Timestamp, now: float) -> str:
    """How long ago, or the date where that is more than a day."""
    if not time.seconds:
        return "never"
    age = now - time.seconds - time.nanos / 1e9
    if age < 90:
        return f"{max(0, age):.0f} s ago"
    if age < 5400:
        return f"{age / 60:.0f} min ago"
    if age < 36 * 3600:
        return f"{age / 3600:.0f} h ago"
    return datetime.fromtimestamp(time.seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def as_json(message: Message) -> dict[str, Any]:
    """A message as JSON: the contract's field names, every field present, 64-bit integers as text and bytes as base64, as
    protobuf's JSON mapping has it."""
    fields: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def metrics_of(metrics: Iterable[common_pb2.Metric]) -> dict[str, float]:
    """Metrics by name."""
    return {metric.name: metric.value for metric in metrics}


def first_line(text: str) -> str:
    """The sentence of a reason, without the traceback that may follow."""
    return text.strip().splitlines()[0] if text.strip() else ""


def watched_metric(run: runs_pb2.Run) -> str:
    """The metric that the run's config watches."""
    try:
        name = tomllib.loads(run.config_toml).get("evaluation", {}).get("metric", "accuracy")
    except (tomllib.TOMLDecodeError, AttributeError):  # shown all the same
        return "accuracy"
    return str(name)


def _short(metric: str) -> str:
    """A metric's name as a column header."""
    return metric if len(metric) <= 12 else metric.rsplit(".", 1)[-1][:12]


def loss_of(metrics: Mapping[str, float]) -> float | None:
    """The loss on evaluation data, else that of training."""
    return metrics.get("loss", metrics.get("train.loss"))


def _metric_text(value: float | None) -> str:
    return "" if value is None else format_metric(value)


def _seconds_of(round: runs_pb2.Round) -> dict[str, float]:
    return {phase.phase: phase.seconds for phase in round.seconds}


def _table(*columns: Column, width: int, title: str | None = None, footer: bool = False) -> Table:
    return Table(
        *columns,
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        footer_style="bold",
        show_footer=footer,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if width >= WIDE else 0, 0, 0),
    )


def _number(header: str, footer: str = "", **options: object) -> Column:
    return Column(header, footer=footer, justify="right", no_wrap=True, **options)  # type: ignore[arg-type]


def _word(header: str, footer: str = "", *, max_width: int | None = None) -> Column:
    return Column(header, footer=footer, no_wrap=True, overflow="ellipsis", max_width=max_width)


def _run_state(run: runs_pb2.Run) -> Text:
    name, style = _RUN_STATES.get(run.state, ("unknown", "dim"))
    return Text(f"● {name}", style=style)


def _round_state(round: runs_pb2.Round) -> Text:
    name, style = _ROUND_STATES.get(round.state, ("unknown", "dim"))
    return Text(name, style=style)


# Lists


def runs_table(runs: Sequence[runs_pb2.Run], now: float, width: int) -> RenderableType:
    """`fedctl run list`."""
    if not runs:
        return Text("No runs yet. Submit one: fedctl run submit CONFIG.toml --workload SOURCE", style="dim")
    is_wide = width >= WIDE
    names = max(len(run.name) for run in runs)
    why = max(16, width - min(names, 24) - (66 if is_wide else 38))
    columns = [
        _word("run", max_width=24),
        Column("state", no_wrap=True),
        _number("round"),
        _word("metric", max_width=18),
    ]
    columns += [_number("version"), _word("submitted")] if is_wide else []
    table = _table(*columns, _word("why", max_width=why), width=width)
    for run in runs:
        metrics = metrics_of(run.metrics)
        metric = watched_metric(run)
        row: list[RenderableType] = [
            Text(run.name, style="bold"), _run_state(run), f"{run.round}/{run.max_rounds}",
            f"{_short(metric)} {format_metric(metrics[metric])}" if metric in metrics else "",
        ]  # fmt: skip
        row += [str(run.model_version), format_time(run.created_time, now)] if is_wide else []
        table.add_row(*row, Text(first_line(run.reason), style="dim"))
    return table


def clients_table(clients: Sequence[runs_pb2.Client], now: float, width: int) -> RenderableType:
    """`fedctl client list`."""
    if not clients:
        return Text(
            "No client has enrolled yet. At a site: fed-client run --server HOST:PORT ...",
            style="dim",
        )
    table = _table(
        _word("client", max_width=24), Column("alive", no_wrap=True), _word("last seen"), _number("work"), Column("workloads"),
        Column("labels"), _word("software"), _number("clock"), width=width,
    )  # fmt: skip
    for client in clients:
        alive = Text("● yes", style="green") if client.is_alive else Text("○ no", style="red")
        skew = client.clock_skew_seconds
        table.add_row(
            Text(client.name, style="bold"),
            alive,
            format_time(client.last_seen_time, now),
            str(client.num_open_assignments),
            ", ".join(f"{offer.name} {offer.version}".strip() for offer in client.workloads),
            ", ".join(f"{key}={value}" for key, value in sorted(client.labels.items())),
            client.software_version,
            Text(f"{skew:+.1f} s", style="yellow" if abs(skew) > 60 else ""),
        )
    return table


def models_table(models: Sequence[runs_pb2.ModelVersion], now: float, width: int) -> RenderableType:
    """`fedctl model list`. A star marks the best version."""
    is_wide = width >= WIDE
    names = _metric_names([metrics_of(model.metrics) for model in models], most=3 if is_wide else 2)
    columns = [
        _number("version"), Column("", no_wrap=True), _number("from"), *(_number(_short(name)) for name in names),
        _number("updates"), _number("examples"), _number("file"), _word("committed"),
    ]  # fmt: skip
    table = _table(*columns, *([_word("digest", max_width=12)] if is_wide else []), width=width)
    for model in models:
        metrics = metrics_of(model.metrics)
        row: list[RenderableType] = [
            str(model.version),
            Text("★", style="yellow") if model.is_best else "",
            str(model.parent_version) if model.parent_version >= 0 else "",
            *(_metric_text(metrics.get(name)) for name in names),
            _count(model.num_updates) if model.num_updates else "",
            _count(model.num_examples) if model.num_examples else "",
            format_bytes(model.file_bytes) if model.is_available else "gone",
            format_time(model.created_time, now),
        ]
        row += [Text(model.digest.hex()[:12], style="dim")] if is_wide else []
        table.add_row(*row, style="" if model.is_available else "dim")
    if not models or not models[-1].privacy:
        return table
    return Group(table, Text(), Text(f"Privacy, up to version {models[-1].version}: {models[-1].privacy}"))


def _metric_names(measured: Iterable[Mapping[str, float]], *, most: int) -> list[str]:
    """Names in the order of first sight, training metrics last; at most a few columns of them."""
    names = list(dict.fromkeys(name for metrics in measured for name in metrics))
    return sorted(names, key=lambda name: name.startswith("train."))[:most]


def model_summary(model: runs_pb2.ModelVersion) -> RenderableType:
    """`fedctl model best`."""
    grid = _facts()
    grid.add_row("version", str(model.version))
    for name, value in metrics_of(model.metrics).items():
        grid.add_row(name, format_metric(value))
    if model.round:
        grid.add_row("round", f"{model.round}, from version {model.parent_version}")
        # A private run tells neither.
        if model.num_updates:
            grid.add_row("made of", f"{model.num_updates} updates, {model.num_examples:,} examples")
    grid.add_row("file", format_bytes(model.file_bytes) if model.is_available else "no longer kept")
    grid.add_row("digest", model.digest.hex())
    if model.privacy:
        grid.add_row("privacy", Text(model.privacy))
    return grid


def _facts() -> Table:
    return Table.grid(Column(style="dim", no_wrap=True), Column(), padding=(0, 2, 0, 0))


# One run


def run_header(run: runs_pb2.Run) -> RenderableType:
    """Name, state, how far, how good, and why."""
    parts: list[RenderableType] = [
        Text.assemble((run.name, "bold"), "  ", _run_state(run), f"  round {run.round} of {run.max_rounds}")
    ]
    metrics = metrics_of(run.metrics)
    version = Text(f"version {run.model_version}")
    for name in dict.fromkeys((watched_metric(run), "loss")):
        if name in metrics:
            version.append(f"  {name} ").append(format_metric(metrics[name]), style="bold")
    if run.best_version:
        version.append(f"  best version {run.best_version}")
    parts.append(version)
    if run.reason:
        parts.append(Text(first_line(run.reason), style="dim"))
    return Group(*parts)


def run_details(response: runs_pb2.GetRunResponse, now: float, width: int) -> RenderableType:
    """`fedctl run show`."""
    run = response.run
    grid = _facts()
    grid.add_row("id", run.run_id)
    grid.add_row("workload", f"{run.workload.name} {run.workload.version}".strip())
    grid.add_row("model", f"{run.num_parameters:,} elements")
    grid.add_row("seed", str(run.seed))
    grid.add_row("submitted", format_time(run.created_time, now))
    if run.HasField("finished_time"):
        grid.add_row("ended", format_time(run.finished_time, now))
    parts: list[RenderableType] = [run_header(run), Text(), grid]
    if response.HasField("round"):
        view = WatchView().updated(runs_pb2.WatchRunResponse(run=run, rounds=[response.round]), now)
        parts += [Text(), rounds_table(view, width), Text(), *round_parts(view, now, width)]
    if response.sites:
        parts += [Text(), *participation_parts(response.sites, width, most=WATCHED_CLIENTS)]
    return Group(*parts)


def participation_parts(
    sites: Sequence[runs_pb2.SiteParticipation],
    width: int,
    most: int | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[RenderableType]:
    """Who took part how often; with `most`, those of whom the fewest updates count, and how many others there are. Evenness is
    Jain's index of the updates that count, sum^2 / (n sum of squares): 1 where all are alike, 1 / n where all are of one site."""
    counted = [site.num_counted for site in sites]
    total, squares = sum(counted), sum(count * count for count in counted)
    table = _table(
        _word("client", "total", max_width=24 if width >= WIDE else 16), _number("asked", _count(sum(s.num_selected for s in
        sites))), _number("counted", _count(total)), _number("share"), _number("last round"),
        *([_number("rate")] if rates else []),
        title="Who took part" + (f"  (evenness {total * total / (len(sites) * squares):.2f})" if total else ""),
        footer=True, width=width,
    )  # fmt: skip
    shown = (
        sites if most is None else sorted(sites, key=lambda s: (s.num_counted, s.num_selected, s.client_name))[:most]
    )
    for site in shown:
        share = f"{100 * site.num_counted / total:.1f} %" if total else ""
        last = str(site.last_round) if site.last_round else "never"
        table.add_row(
            Text(site.client_name, style="bold"), _count(site.num_selected), _count(site.num_counted), share, last,
            *([f"{rate:.3g}" if (rate := rates.get(site.client_name)) else ""] if rates else []),
        )  # fmt: skip
    rest = len(sites) - len(shown)
    return [table, *([Text(f"and {rest:,} more, who took part as often or more", style="dim")] if rest else [])]


@dataclass(frozen=True)
class WatchView:
    """What is known of a watched run: every message makes a new one, so that it can be drawn from another thread."""

    run: runs_pb2.Run | None = None
    rounds: dict[int, runs_pb2.Round] = field(default_factory=dict)
    received_time: float = 0.0
    note: str = ""

    def updated(self, message: runs_pb2.WatchRunResponse, now: float) -> WatchView:
        """With what a message says. A round that comes without its clients keeps those that are known."""
        rounds = dict(self.rounds)
        for round in message.rounds:
            known = rounds.get(round.round)
            if known is not None and known.clients and not round.clients:
                merged = runs_pb2.Round()
                merged.CopyFrom(round)
                merged.clients.extend(known.clients)
                round = merged
            rounds[round.round] = round
        return WatchView(message.run, rounds, now)

    def noting(self, note: str) -> WatchView:
        """With a line for the reader below the tables; empty for none."""
        return replace(self, note=note)

    @property
    def newest(self) -> runs_pb2.Round | None:
        """The round that is on, or was last."""
        return self.rounds[max(self.rounds)] if self.rounds else None


def watch_screen(view: WatchView, now: float, width: int, height: int) -> RenderableType:
    """`fedctl run watch`, one frame."""
    if view.run is None:
        return Text(view.note or "connecting ...", style="dim")
    most_clients = max(3, min(WATCHED_CLIENTS, height - WATCHED_ROUNDS - 14))
    parts: list[RenderableType] = [run_header(view.run)]
    if view.rounds:
        parts += [Text(), rounds_table(view, width), Text(), *round_parts(view, now, width, most_clients)]
    if view.note:
        parts += [Text(), Text(view.note, style="yellow")]
    return Group(*parts)


def rounds_table(view: WatchView, width: int) -> RenderableType:
    """The last rounds, one line each."""
    assert view.run is not None
    metric = watched_metric(view.run)
    shown = [view.rounds[number] for number in sorted(view.rounds)[-WATCHED_ROUNDS:]]
    late = _late_column(shown)
    # What is left of the line beside the numbers.
    why = width - 84 - 9 * len(late)
    columns = [
        _number("round"), Column("state", no_wrap=True, min_width=11), _number("version"), _number(_short(metric), min_width=6),
        _number("loss", min_width=6), _number("updates"), *late, _number("down", min_width=7), _number("up", min_width=7),
        _number("time", min_width=5),
    ]  # fmt: skip
    table = _table(*columns, *([_word("why", max_width=why)] if why >= 24 else []), width=width)
    for round in shown:
        metrics = metrics_of(round.metrics)
        row: list[RenderableType] = [
            str(round.round), _round_state(round), str(round.model_version) if round.model_version else "",
            Text(_metric_text(metrics.get(metric)), style="bold"), _metric_text(loss_of(metrics)), _updates(round),
            *[_lateness(metrics) for _ in late], _moved(round.downlink), _moved(round.uplink), _time_of(round),
        ]  # fmt: skip
        table.add_row(*row, *([Text(first_line(round.reason), style="dim")] if why >= 24 else []))
    return table


def _late_column(rounds: Iterable[runs_pb2.Round]) -> list[Column]:
    """The column for how stale updates were, mean and most; none where rounds are synchronous."""
    return [_number("late")] if any(_lateness(metrics_of(round.metrics)) for round in rounds) else []


def _lateness(metrics: Mapping[str, float]) -> str:
    if "staleness.max" not in metrics:
        return ""
    return f"{metrics['staleness.mean']:.1f}/{metrics['staleness.max']:.0f}"


def _updates(round: runs_pb2.Round) -> str:
    if not round.clients:
        return f"–/{round.goal}" if round.goal else ""
    return f"{_num_received(round)}/{round.goal}"


def _num_received(
    round: runs_pb2.Round, kind: common_pb2.AssignmentKind.ValueType = common_pb2.ASSIGNMENT_KIND_TRAIN
) -> int:
    return sum(
        client.assignment_kind == kind and client.state == runs_pb2.ASSIGNMENT_STATE_RECEIVED
        for client in round.clients
    )


def _moved(traffic: runs_pb2.Traffic) -> str:
    return format_bytes(traffic.wire_bytes) if traffic.wire_bytes else ""


def _time_of(round: runs_pb2.Round) -> str:
    seconds = sum(_seconds_of(round).values())
    return format_seconds(seconds) if seconds else ""


def round_parts(view: WatchView, now: float, width: int, most_clients: int = WATCHED_CLIENTS) -> list[RenderableType]:
    """The newest round: what it waits for, and its clients one by one."""
    round = view.newest
    if round is None:
        return []
    age = max(0.0, now - view.received_time)
    line = Text.assemble((f"Round {round.round}", "bold"), "  ", _round_state(round))
    if round.reason and (view.run is None or round.reason != view.run.reason):
        line.append(f"  {first_line(round.reason)}", style="dim")
    parts: list[RenderableType] = [line]
    left = round.deadline_seconds - age
    if round.state not in _FINISHED_ROUNDS and round.deadline_seconds > 0 and left > 0:
        line.append(f"  {format_seconds(left)} to the deadline", style="dim")
    clients = _current_clients(round)
    if clients:
        parts.append(_clients_of_round(clients, round, age, width, most_clients))
    parts += [
        Text.assemble(("✗ ", "red"), (client.client_name, "bold"), f": {first_line(client.reason)}")
        for client in clients
        if client.state == runs_pb2.ASSIGNMENT_STATE_FAILED and client.reason
    ][:5]
    return parts


def _current_clients(round: runs_pb2.Round) -> list[runs_pb2.RoundClient]:
    """Those who evaluate while the round evaluates, else those who train."""
    evaluates = round.state == runs_pb2.ROUND_STATE_EVALUATING
    kind = common_pb2.ASSIGNMENT_KIND_EVALUATE if evaluates else common_pb2.ASSIGNMENT_KIND_TRAIN
    return [client for client in round.clients if client.assignment_kind == kind] or list(round.clients)


def _clients_of_round(
    clients: Sequence[runs_pb2.RoundClient], round: runs_pb2.Round, age: float, width: int, most: int
) -> RenderableType:
    # What still moves is worth a line before what is done.
    order = (runs_pb2.ASSIGNMENT_STATE_OPEN, runs_pb2.ASSIGNMENT_STATE_FAILED)
    shown = sorted(clients, key=lambda client: order.index(client.state) if client.state in order else 9)[:most]
    if len(shown) == len(clients):
        shown = list(clients)
    is_over = round.state in _FINISHED_ROUNDS
    table = _table(
        Column("", no_wrap=True), _word("client", max_width=24 if width >= WIDE else 16),
        Column("phase", no_wrap=True, min_width=11), Column("progress", min_width=10, ratio=1, max_width=40),
        _number("%", min_width=3), _number("done", min_width=14), _number("left", min_width=5), _number("loss", min_width=6),
        width=width,
    )  # fmt: skip
    for client in shown:
        loss = metrics_of(client.metrics).get("loss")
        table.add_row(*_doing(client, age, is_over, round.base_version), _metric_text(loss))
    if len(shown) == len(clients):
        return table
    hidden = [_describe_state(client) for client in clients if client not in shown]
    counts = ", ".join(f"{hidden.count(state)} {state}" for state in dict.fromkeys(hidden))
    return Group(table, Text(f"and {len(hidden)} more: {counts}", style="dim"))


def _doing(client: runs_pb2.RoundClient, age: float, is_over: bool, base_version: int) -> list[RenderableType]:
    """Mark, name, phase, bar, percentage, amount, ETA. `base_version` is that of the round, which a client of buffered rounds may
    be behind."""
    name = Text(client.client_name, style="bold" if client.is_alive or is_over else "dim")
    phase = _describe_state(client)
    if client.state == runs_pb2.ASSIGNMENT_STATE_RECEIVED:
        amount = f"{client.num_examples:,} ex." if client.num_examples else ""
        if client.is_partial:
            phase = "partial"
        if client.staleness:
            phase += f", {client.staleness} late"
        bar = ProgressBar(total=1, completed=1, complete_style="green", finished_style="green")
        return [Text("✓", style="green"), name, Text(phase, style="green"), bar, "100", amount, ""]
    if client.state == runs_pb2.ASSIGNMENT_STATE_FAILED:
        return [Text("✗", style="red"), name, Text(phase, style="red"), "", "", "", ""]
    if client.state == runs_pb2.ASSIGNMENT_STATE_DROPPED:
        return [Text("–", style="dim"), name, Text(phase, style="dim"), "", "", "", ""]
    mark = Text("●", style="green") if client.is_alive else Text("○", style="red")
    if not client.is_alive:
        phase = "silent"
    if client.model_version < base_version:
        phase += f", {base_version - client.model_version} late"
    if client.total <= 0:
        return [mark, name, phase, "", "", "", ""]
    share = min(1.0, client.done / client.total)
    eta = client.eta_seconds - age
    bar = ProgressBar(total=1, completed=share, complete_style="cyan", finished_style="cyan")
    left = "" if client.eta_seconds < 0 else format_seconds(eta) if eta >= 1 else "< 1 s"
    return [mark, name, phase, bar, f"{100 * share:.0f}", _amount(client), left]


def _describe_state(client: runs_pb2.RoundClient) -> str:
    if client.state == runs_pb2.ASSIGNMENT_STATE_RECEIVED:
        return "evaluated" if client.assignment_kind == common_pb2.ASSIGNMENT_KIND_EVALUATE else "received"
    if client.state == runs_pb2.ASSIGNMENT_STATE_FAILED:
        return "failed"
    if client.state == runs_pb2.ASSIGNMENT_STATE_DROPPED:
        return "dropped"
    return _PHASES.get(client.phase, "waiting")


def _amount(client: runs_pb2.RoundClient) -> str:
    if client.phase in _BULK_PHASES:
        total, unit = format_bytes(client.total).split()
        digits = len(total.partition(".")[2])
        return f"{client.done / _SCALES[unit]:.{digits}f}/{total} {unit}"
    return f"{client.done:,}/{client.total:,} {_UNITS.get(client.phase, '')}".rstrip()


def round_line(round: runs_pb2.Round, metric: str) -> str:
    """A round in one line of plain text, for logs."""
    state, _ = _ROUND_STATES.get(round.state, ("unknown", ""))
    parts = []
    if round.model_version:
        parts.append(f"version {round.model_version}")
    metrics = metrics_of(round.metrics)
    parts += [
        f"{name} {format_metric(metrics[name])}"
        for name in dict.fromkeys((metric, "loss", "train.loss"))
        if name in metrics
    ]
    if round.clients and round.state != runs_pb2.ROUND_STATE_SELECTING:
        parts.append(f"{_updates(round)} updates")
    if late := _lateness(metrics):
        parts.append(f"{late} versions late")
    if round.state in _FINISHED_ROUNDS:
        if round.downlink.wire_bytes or round.uplink.wire_bytes:
            parts.append(f"{format_bytes(round.downlink.wire_bytes)} down, {format_bytes(round.uplink.wire_bytes)} up")
        if seconds := _time_of(round):
            parts.append(seconds)
    if round.reason and round.state in (runs_pb2.ROUND_STATE_SELECTING, runs_pb2.ROUND_STATE_FAILED):
        parts.append(first_line(round.reason))
    return f"round {round.round} {state}" + (f": {', '.join(parts)}" if parts else "")


def run_line(run: runs_pb2.Run) -> str:
    """A run in one line of plain text, for logs."""
    state, _ = _RUN_STATES.get(run.state, ("unknown", ""))
    return f"run {run.name} {state}" + (f": {first_line(run.reason)}" if run.reason else "")


# The report


def report(response: runs_pb2.GetReportResponse, width: int) -> RenderableType:
    """`fedctl run report`."""
    run = response.run
    best = next((model for model in response.models if model.is_best), None)
    parts: list[RenderableType] = [run_header(run), Text()]
    if response.rounds:
        parts += [_report_rounds(response, width), Text(), _report_traffic(response, width), Text()]
        if (compression := _report_compression(response, width)) is not None:
            parts += [compression, Text()]
        parts += [*_report_clients(response, width), Text()]
    if response.sites:
        parts += [*participation_parts(response.sites, width, rates=_rates(response.rounds)), Text()]
    grid = _facts()
    grid.add_row("ended" if run.HasField("finished_time") else "now", first_line(run.reason) or "still going on")
    if saved := _saved(response):
        grid.add_row("wire", saved)
    if best is not None:
        measured = ", ".join(f"{name} {format_metric(value)}" for name, value in metrics_of(best.metrics).items())
        grid.add_row("best", f"version {best.version}" + (f" ({measured})" if measured else ""))
        if best.is_available:
            grid.add_row("", Text(f"fedctl model download {run.name} --version best", style="dim"))
    if response.models and response.models[-1].privacy:
        grid.add_row("privacy", Text(response.models[-1].privacy))
    parts.append(grid)
    return Group(*parts)


def _saved(response: runs_pb2.GetReportResponse) -> str:
    """Ratio, error and accuracy in one line; empty where nothing has moved."""
    parts = [
        f"{arrow} {traffic.raw_bytes / traffic.payload_bytes:,.1f}x smaller"
        for arrow, traffic in (("↓", response.downlink), ("↑", response.uplink))
        if traffic.payload_bytes
    ]
    of = [fidelity for round in response.rounds if (fidelity := _uplink_fidelity(round)) is not None]
    if of and any(lossy for _, _, lossy in of):
        parts.append(f"error of an update {sum(error for error, _, _ in of) / len(of):.3g}")
        parts.append(f"gain {sum(gain for _, gain, _ in of) / len(of):.3f}")
    metric = watched_metric(response.run)
    measured = [value for round in response.rounds if (value := metrics_of(round.metrics).get(metric)) is not None]
    if parts and measured:
        parts.append(f"{metric} {format_metric(measured[-1])}")
    return ", ".join(parts)


def _report_rounds(response: runs_pb2.GetReportResponse, width: int) -> Table:
    metric = watched_metric(response.run)
    totals = {name: sum(_seconds_of(round).get(name, 0.0) for round in response.rounds) for name in _PHASE_NAMES}
    is_wide = width >= WIDE
    late = _late_column(response.rounds)
    table = _table(
        _number("round", "total"), Column("state", no_wrap=True), *([_number("version")] if is_wide else []),
        _number(_short(metric)), _number("loss"), _number("clients"), *late,
        *(_number(name, format_seconds(totals[phase])) for phase, name in _PHASE_NAMES.items()),
        _number("time", format_seconds(sum(totals.values()))),
        title="Rounds", footer=True, width=width,
    )  # fmt: skip
    for round in response.rounds:
        metrics, seconds = metrics_of(round.metrics), _seconds_of(round)
        table.add_row(
            str(round.round), _round_state(round),
            *([str(round.model_version) if round.model_version else ""] if is_wide else []),
            Text(_metric_text(metrics.get(metric)), style="bold"), _metric_text(loss_of(metrics)), _updates(round),
            *[_lateness(metrics) for _ in late],
            *(format_seconds(seconds[name]) if name in seconds else "" for name in _PHASE_NAMES), _time_of(round),
        )  # fmt: skip
    return table


def _report_traffic(response: runs_pb2.GetReportResponse, width: int) -> Table:
    down, up = response.downlink, response.uplink
    table = _table(
        _number("round", "total"),
        *(
            _number(f"{arrow} {name}" if name == "raw" else name, value)
            for arrow, traffic in (("↓", down), ("↑", up))
            for name, value in zip(("raw", "payload", "wire", "ratio"), _traffic(traffic), strict=True)
        ),
        title="Traffic  (↓ to the clients, ↑ from them; ratio = raw / payload)",
        footer=True,
        width=width,
    )
    for round in response.rounds:
        table.add_row(str(round.round), *_traffic(round.downlink), *_traffic(round.uplink))
    return table


def _report_compression(response: runs_pb2.GetReportResponse, width: int) -> Table | None:
    """What compression saved and what it cost, by round; None where nothing was compressed."""
    versions = {model.version: model for model in response.models}
    all_errors = [_uplink_fidelity(round) for round in response.rounds]
    if not any(fidelity is not None and fidelity[2] for fidelity in all_errors) and not any(
        model.HasField("fidelity") for model in response.models
    ):
        return None
    table = _table(
        _number("round", "total"),
        _number("↓ bits", _bits(response.downlink)), _number("error"), _number("delta"),
        _number("↑ bits", _bits(response.uplink)), _number("error"), _number("gain"),
        _word("tensors by codec  ↓ | ↑", max_width=max(12, width - 66)),
        title="Compression  (bits a parameter, of 32; ↓ error: what a delta leaves for the next one, over the round's change)",
        footer=True,
        width=width,
    )  # fmt: skip
    for round, fidelity in zip(response.rounds, all_errors, strict=True):
        model = versions.get(round.model_version) if round.model_version else None
        down = model.fidelity if model is not None and model.HasField("fidelity") else None
        table.add_row(
            str(round.round),
            _bits(round.downlink), f"{down.error:.3g}" if down else "", format_bytes(model.delta_bytes) if model and down else "",
            _bits(round.uplink), *((f"{fidelity[0]:.3g}", f"{fidelity[1]:.3f}") if fidelity else ("", "")),
            f"{_codecs(down.tensors) if down else ''} | {_codecs(fidelity[2]) if fidelity else ''}",
        )  # fmt: skip
    return table


def _uplink_fidelity(round: runs_pb2.Round) -> tuple[float, float, dict[str, int]] | None:
    """Mean error and gain of a round's updates, and the tensors by codec of one of them; None where none was received."""
    of = [client.fidelity for client in round.clients if client.HasField("fidelity")]
    if not of:
        return None
    lossy = {codec: count for codec, count in of[0].tensors.items() if codec != "raw"}
    return sum(f.error for f in of) / len(of), sum(f.gain for f in of) / len(of), lossy


def _codecs(tensors: Mapping[str, int]) -> str:
    return " ".join(
        f"{codec} {count}" for codec, count in sorted(tensors.items(), key=lambda item: (-item[1], item[0]))
    )


def _bits(traffic: runs_pb2.Traffic) -> str:
    """Payload bits for every 32 bits of tensor."""
    return (
        f"{32 * traffic.payload_bytes / traffic.raw_bytes:.3g}" if traffic.raw_bytes and traffic.payload_bytes else ""
    )


def _traffic(traffic: runs_pb2.Traffic) -> list[str]:
    ratio = f"{traffic.raw_bytes / traffic.payload_bytes:.2f}" if traffic.payload_bytes else ""
    amounts = (traffic.raw_bytes, traffic.payload_bytes, traffic.wire_bytes)
    return [*(format_bytes(amount) if amount else "" for amount in amounts), ratio]


@dataclass
class _ClientTotals:
    received: int = 0
    failed: int = 0
    dropped: int = 0
    evaluated: int = 0
    partial: int = 0
    examples: int = 0
    training_seconds: float = 0.0
    down: int = 0
    up: int = 0
    learning_rate: float = 0.0
    reason: str = ""


def client_totals(rounds: Iterable[runs_pb2.Round]) -> dict[str, _ClientTotals]:
    """What each client did in all rounds, by name; `examples` and `learning_rate` are those of the last time."""
    totals: dict[str, _ClientTotals] = {}
    for round in rounds:
        for client in round.clients:
            of = totals.setdefault(client.client_name, _ClientTotals())
            of.down += client.downlink.wire_bytes
            of.up += client.uplink.wire_bytes
            of.training_seconds += client.training_seconds
            of.learning_rate = client.learning_rate or of.learning_rate
            if client.has_diverged:
                of.reason = (
                    f"round {round.round}: DIVERGED, a delta did not give it the version; it was sent a whole one"
                )
            if client.state == runs_pb2.ASSIGNMENT_STATE_FAILED:
                of.failed += 1
                of.reason = f"round {round.round}: {first_line(client.reason)}"
            elif client.state == runs_pb2.ASSIGNMENT_STATE_DROPPED:
                of.dropped += 1
                of.reason = of.reason or f"round {round.round}: {first_line(client.reason)}"
            elif client.state != runs_pb2.ASSIGNMENT_STATE_RECEIVED:
                continue
            elif client.assignment_kind == common_pb2.ASSIGNMENT_KIND_EVALUATE:
                of.evaluated += 1
            else:
                of.received += 1
                of.partial += client.is_partial
                of.examples = client.num_examples
    return dict(sorted(totals.items()))


def _report_clients(response: runs_pb2.GetReportResponse, width: int) -> list[RenderableType]:
    totals = client_totals(response.rounds)
    shown: list[tuple[str, Callable[[_ClientTotals], float], Callable[[float], str]]] = [
        ("updates", lambda of: of.received, _count),
        ("partial", lambda of: of.partial, _count),
        ("failed", lambda of: of.failed, _count),
        ("dropped", lambda of: of.dropped, _count),
        ("evals", lambda of: of.evaluated, _count),
        ("examples", lambda of: of.examples, _count),
        ("train", lambda of: of.training_seconds, format_seconds),
        ("↓ wire", lambda of: of.down, format_bytes),
        ("↑ wire", lambda of: of.up, format_bytes),
    ]
    table = _table(
        _word("client", "total", max_width=20 if width >= WIDE else 12),
        *(_number(name, text(sum(value(of) for of in totals.values()))) for name, value, text in shown),
        title="Clients",
        footer=True,
        width=width,
    )
    for name, of in totals.items():
        table.add_row(Text(name, style="bold"), *(text(value(of)) if value(of) else "" for _, value, text in shown))
    return [table, *(Text.assemble((name, "bold"), f"  {of.reason}") for name, of in totals.items() if of.reason)]


def _rates(rounds: Sequence[runs_pb2.Round]) -> dict[str, float]:
    """The learning rate that each site was last told, by name; empty where in no round one was told another than the others: what
    holds for all is in the config."""

    def differ(round: runs_pb2.Round) -> bool:
        return len({client.learning_rate for client in round.clients if client.learning_rate}) > 1

    return {name: of.learning_rate for name, of in client_totals(rounds).items()} if any(map(differ, rounds)) else {}


def _count(value: float) -> str:
    return f"{value:,.0f}"
