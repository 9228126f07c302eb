"""Following a run: a live screen on a terminal, a line per change elsewhere; it outlives restarts of the coordinator."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from rich.console import Console, RenderableType
from rich.live import Live

from fed_core.errors import FedstreamError, UnavailableError
from fed_server.cli import render
from fed_server.cli.connection import Connection, Coordinator, backoff_seconds
from fedstream.v1 import runs_pb2

Talk = Callable[[str], None]
Updates = Iterator[runs_pb2.WatchRunResponse | str]

_ENDED = (runs_pb2.RUN_STATE_FINISHED, runs_pb2.RUN_STATE_FAILED, runs_pb2.RUN_STATE_CANCELLED)


def follow(connection: Connection, run: str, sleep: Callable[[float], None] = time.sleep) -> Updates:
    """A run's states until it has ended. Where the connection breaks, says so in a sentence and tries again for as long as it
    takes; only the first connection must succeed. Raises the errors of the tree."""
    attempt = 0
    has_answered = False
    while True:
        try:
            with Coordinator(connection) as coordinator:
                if not has_answered:
                    # Older rounds come without their clients; the report has them. A coordinator too busy for it costs a column.
                    with suppress(FedstreamError):
                        report = coordinator.get_report(run)
                        yield runs_pb2.WatchRunResponse(run=report.run, rounds=report.rounds)
                for message in coordinator.watch_run(run):
                    if attempt:
                        yield ""
                    has_answered, attempt = True, 0
                    yield message
                    if message.run.state in _ENDED:
                        return
            reason = "the coordinator ended the connection"
        except UnavailableError as error:
            if not has_answered:
                raise
            reason = str(error)
        attempt += 1
        pause = backoff_seconds(attempt)
        yield f"{reason}; trying again in {pause:.0f} s (attempt {attempt}). The run goes on when the coordinator is back."
        sleep(pause)


def watch(connection: Connection, run: str, *, console: Console, talk: Talk, as_json: bool = False) -> bool:
    """Shows a run until it has ended. Returns whether it finished, rather than failed or was cancelled. Ctrl-C ends the watching
    only, and raises KeyboardInterrupt."""
    updates = _in_background(follow(connection, run))
    if as_json:
        last = _as_json(updates, console, talk)
    elif console.is_terminal:
        last = _on_terminal(updates, console)
    else:
        last = _as_lines(updates, console, talk)
    return last is not None and last.state == runs_pb2.RUN_STATE_FINISHED


def _in_background(updates: Updates) -> Updates:
    """The same updates, made in another thread, so that Ctrl-C strikes a queue and never the inside of gRPC, which would not get
    over it. Whoever stops reading leaves the thread to end with the process."""
    made: queue.SimpleQueue[runs_pb2.WatchRunResponse | str | BaseException | None] = queue.SimpleQueue()

    def make() -> None:
        try:
            for update in updates:
                made.put(update)
            made.put(None)
        except BaseException as error:
            made.put(error)

    threading.Thread(target=make, name="watch", daemon=True).start()
    while (update := made.get()) is not None:
        if isinstance(update, BaseException):
            raise update
        yield update


def _on_terminal(updates: Updates, console: Console) -> runs_pb2.Run | None:
    view = render.WatchView()

    def frame() -> RenderableType:
        return render.watch_screen(view, time.time(), console.width, console.height)

    # The screen redraws itself so that countdowns move; a frame reads one immutable view, so no lock is needed.
    with Live(get_renderable=frame, console=console, refresh_per_second=4, vertical_overflow="crop") as live:
        for update in updates:
            view = view.noting(update) if isinstance(update, str) else view.updated(update, time.time())
        live.refresh()
    return view.run


def _as_lines(updates: Updates, console: Console, talk: Talk) -> runs_pb2.Run | None:
    run: runs_pb2.Run | None = None
    said: dict[int, tuple[int, str]] = {}
    view = render.WatchView()
    for update in updates:
        if isinstance(update, str):
            if update:
                talk(update)
            continue
        view, run = view.updated(update, time.time()), update.run
        for number in sorted(round.round for round in update.rounds):
            round = view.rounds[number]
            # A round that waits says anew what it waits for; in every other state the numbers move and only the state is news.
            waits = round.state == runs_pb2.ROUND_STATE_SELECTING
            news = (round.state, round.reason if waits else "")
            if said.get(number) != news:
                said[number] = news
                _line(console, render.round_line(round, render.watched_metric(run)))
    if run is not None:
        _line(console, render.run_line(run))
    return run


def _as_json(updates: Updates, console: Console, talk: Talk) -> runs_pb2.Run | None:
    run: runs_pb2.Run | None = None
    for update in updates:
        if isinstance(update, str):
            if update:
                talk(update)
            continue
        run = update.run
        _line(console, json.dumps(render.as_json(update)))
    return run


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)
    console.file.flush()
