"""`fedctl codec`: what encodings do to the user's own tensors. Needs no coordinator."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fed_server.cli.console import stderr, stdout

if TYPE_CHECKING:
    from fed_server.cli.codec_try import Candidate, Tensors, Trial

codec_app = typer.Typer(
    no_args_is_help=True, help="Encodings: what each of them would cost and lose on your tensors. Needs no coordinator."
)

# One line a paragraph: typer sets lines apart by blank ones.
_HELP = (
    "Try encodings on a model, an update or any payload: bits, error, gain and speed of each.\n\n"
    "Every encoding writes a whole payload file, which is read back and compared. Bits count every byte of that file. Error is "
    "|x - x'|^2 / |x|^2 over all floating parameters x together, 0 for lossless; gain is <x, x'> / |x|^2: below 1 the encoding "
    "shrinks what it carries. Speeds are of processor time on one thread; encoding includes what a site does besides: choosing "
    "codecs, measuring, hashing."
)
_EPILOG = (
    "[bold]What to give:[/] a safetensors file (`fedctl model download`), or a payload: a site's spool/*.update and "
    "cache/*.payload, a coordinator's updates/* and payloads/*. Clients send differences, not weights: "
    "[bold]fedctl codec try trained.safetensors --base received.safetensors[/] shows what such an update costs."
)


@codec_app.command("try", help=_HELP, epilog=_EPILOG)
def codec_try(
    file: Annotated[
        Path,
        typer.Argument(metavar="MODEL|PAYLOAD", help="A safetensors file or a payload file.", show_default=False),
    ],
    codec: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="KIND[:SETTINGS]",
            help="Encoding to try, as \\[uplink] in a run config has it: auto, or uniform:bits=5,block=128. Repeat it for "
            "several. Default: all kinds.",
            show_default=False,
        ),
    ] = None,
    target_error: Annotated[
        list[float] | None,
        typer.Option(
            "--target-error",
            metavar="X",
            help="Error at which fsq, lrq, auto and their like are tried, between 0 and 1. Repeat it for several. "
            "Default: 0.02, 0.05, 0.2.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Try the difference to this model, which is what an update holds.",
            show_default=False,
        ),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show every tensor under every encoding too.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            help="Write error over bits as a picture, beside Shannon's bound (.png, .svg or .pdf; needs matplotlib).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured as JSON.")] = False,
) -> None:
    """Try encodings on a model, an update or any payload."""
    from rich.markup import escape

    from fed_server.cli import codec_render
    from fed_server.cli.codec_try import candidates, read_subject

    chosen = candidates(codec or [], target_error or [])
    if plot is not None:
        codec_render.check_plot(plot)
    subject = read_subject(file, base)
    for notice in subject.notices:
        stderr().print(f"[yellow]notice:[/] {escape(notice)}", soft_wrap=True)
    trials = _try_all(subject.tensors, chosen)
    if plot is not None:
        codec_render.write_plot(plot, trials, subject.title)
        stderr().print(f"wrote {escape(str(plot))}", soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(codec_render.as_json(subject, trials, with_tensors=tensors), indent=2) + "\n")
        return
    console = stdout()
    console.print(codec_render.trials_table(subject, trials, console.width))
    if tensors:
        for trial in trials:
            console.print(codec_render.tensors_table(trial, console.width))
    if plot is None and (drawing := codec_render.text_plot(trials, console.width)) is not None:
        console.print(drawing)


def _try_all(tensors: Tensors, chosen: list[Candidate]) -> list[Trial]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from fed_server.cli.codec_try import try_encoding

    console = stderr()
    columns = (
        SpinnerColumn(), TextColumn("{task.description:<20}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    trials = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen))
        for candidate in chosen:
            progress.update(task, description=candidate.name)
            trials.append(try_encoding(tensors, candidate))
            progress.advance(task)
    return trials
