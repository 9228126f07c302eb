"""What `fedctl codec try` shows: trials in, tables, plots and JSON out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fed_server.cli.codec_try import Subject, Trial
from fed_server.cli.exit_codes import FileError, SettingError
from fed_server.cli.render import WIDE, format_bytes

FLOAT32_BITS: Final = 32
_PLOT_SUFFIXES: Final = (".png", ".svg", ".pdf")
_PLOT_WIDTH, _PLOT_HEIGHT = 64, 14
# Okabe and Ito's colours, which people with colour blindness can tell apart.
_COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")


def shannon_bits(error: float) -> float:
    """Bits per value in which no code can describe a Gaussian better than this: D = 2^-2R of the variance. Real updates have
    structure and may need fewer."""
    return math.inf if error <= 0 else max(0.0, -math.log2(error) / 2)


def decibels(error: float) -> float:
    """An error over the energy of what was encoded, in dB."""
    return 10 * math.log10(error)


def trials_table(subject: Subject, trials: Sequence[Trial], width: int) -> RenderableType:
    """One line per encoding."""
    is_wide = width >= WIDE
    raw_bytes = sum(spec.num_bytes for spec, _ in subject.tensors)
    table = _table(
        Column("encoding", overflow="fold"), _number("bits"), _number("ratio"), _number("error"),
        *([_number("Gaussian")] if is_wide else []), _number("gain"), _number("encode"), _number("decode"),
        Column("tensors by codec", overflow="fold"), width=width,
    )  # fmt: skip
    for trial in trials:
        name = Text(trial.candidate.name, style="bold")
        if trial.problem:
            table.add_row(name, *[""] * (7 if is_wide else 6), Text(trial.problem, style="red"))
            continue
        error = trial.fidelity.error
        table.add_row(
            name, f"{trial.bits:.3g}", f"{_three_digits(FLOAT32_BITS / trial.bits)}x", f"{error:.3g}",
            *([f"{shannon_bits(error):.3g}" if error > 0 else ""] if is_wide else []), f"{trial.fidelity.gain:.3f}",
            _three_digits(trial.encode_speed), _three_digits(trial.decode_speed),
            ", ".join(f"{codec} {count}" for codec, count in trial.codecs.items()),
        )  # fmt: skip
    title = f"{subject.title}: {len(subject.tensors):,} tensors, {subject.num_parameters:,} parameters, {format_bytes(raw_bytes)}"
    legend = "bits: per parameter, every byte of the payload file; ratio: to 32 bits; error: |x - x'|²/|x|²; "
    legend += "Gaussian: bits that a Gaussian needs at least for this error; " if is_wide else ""
    legend += "gain: <x, x'>/|x|²; encode, decode: million parameters per second on one thread"
    return Group(Text(title, style="bold"), Text(), table, Text(), Text(legend, style="dim"))


def tensors_table(trial: Trial, width: int) -> RenderableType:
    """One line per tensor under one encoding."""
    table = _table(
        Column("tensor", overflow="fold"), _number("shape"), _number("type"), Column("codec", no_wrap=True),
        _number("bits"), _number("error"), _number("gain"), width=width,
    )  # fmt: skip
    for tensor in trial.tensors:
        spec, fidelity = tensor.spec, tensor.fidelity
        table.add_row(
            Text(spec.name, style="bold"), "x".join(map(str, spec.shape)), spec.dtype, tensor.codec,
            f"{tensor.num_bits / max(spec.num_elements, 1):.3g}",
            *((f"{fidelity.error:.3g}", f"{fidelity.gain:.3f}") if fidelity is not None else ("", "")),
        )  # fmt: skip
    title = Text.assemble((trial.candidate.name, "bold"), ("  bits without the manifest; error of parameters", "dim"))
    return Group(Text(), title, table) if not trial.problem else Group()


def as_json(subject: Subject, trials: Sequence[Trial], *, with_tensors: bool) -> dict[str, Any]:
    """Everything that the tables show, in full precision; a trial that failed has a `problem` instead of numbers."""
    return {
        "title": subject.title,
        "notices": subject.notices,
        "num_tensors": len(subject.tensors),
        "num_parameters": subject.num_parameters,
        "raw_bytes": sum(spec.num_bytes for spec, _ in subject.tensors),
        "trials": [_trial_json(trial, with_tensors) for trial in trials],
    }


def _trial_json(trial: Trial, with_tensors: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": trial.candidate.name,
        "encoding": trial.candidate.encoding.model_dump(mode="json"),
    }
    if trial.problem:
        return fields | {"problem": trial.problem}
    fields |= {
        "total_bytes": trial.total_bytes,
        "bits_per_parameter": trial.bits,
        "ratio": FLOAT32_BITS / trial.bits,
        "error": trial.fidelity.error,
        "gain": trial.fidelity.gain,
        "encode_million_per_second": trial.encode_speed,
        "decode_million_per_second": trial.decode_speed,
        "codecs": trial.codecs,
    }
    if with_tensors:
        fields["tensors"] = [
            {
                "name": tensor.spec.name,
                "shape": list(tensor.spec.shape),
                "dtype": tensor.spec.dtype,
                "role": tensor.spec.role,
                "codec": tensor.codec,
                "num_bits": tensor.num_bits,
                "error": tensor.fidelity.error if tensor.fidelity else None,
                "gain": tensor.fidelity.gain if tensor.fidelity else None,
            }
            for tensor in trial.tensors
        ]
    return fields


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _number(header: str) -> Column:
    return Column(header, justify="right", no_wrap=True)


def _table(*columns: Column, width: int) -> Table:
    return Table(
        *columns,
        box=box.SIMPLE_HEAD,
        header_style="dim",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if width >= WIDE else 0, 0, 0),
    )


# Rate and distortion


def _lossy(trials: Sequence[Trial]) -> list[Trial]:
    """Those with a place in a plot of errors on a logarithmic axis, by kind and rate."""
    shown = [trial for trial in trials if not trial.problem and trial.fidelity.error > 0]
    return sorted(shown, key=lambda trial: (trial.candidate.encoding.kind, trial.bits))


def text_plot(trials: Sequence[Trial], width: int) -> RenderableType | None:
    """Error in dB over bits per parameter (logarithmic) in characters, a letter for each kind; None where nothing is lossy."""
    shown = _lossy(trials)
    if not shown:
        return None
    columns, rows = min(_PLOT_WIDTH, width - 10), _PLOT_HEIGHT
    low, high = min(trial.bits for trial in shown) / 1.5, max(trial.bits for trial in shown) * 1.5
    floor = min(decibels(trial.fidelity.error) for trial in shown) - 3
    grid = [[" "] * columns for _ in range(rows)]

    def put(bits: float, level: float, mark: str) -> None:
        column = round((columns - 1) * math.log(bits / low) / math.log(high / low))
        row = round((rows - 1) * level / floor)
        if 0 <= column < columns and 0 <= row < rows:
            grid[row][column] = mark

    for column in range(columns):
        bits = low * (high / low) ** (column / (columns - 1))
        put(bits, decibels(2 ** (-2 * bits)), "·")
    marks: dict[str, str] = {}
    for trial in shown:
        kind = trial.candidate.encoding.kind
        if kind not in marks:
            marks[kind] = next((letter for letter in kind.upper() if letter not in marks.values()), "?")
        put(trial.bits, decibels(trial.fidelity.error), marks[kind])
    lines = [
        f"{f'-{-floor * row / (rows - 1):.0f}' if row else '0':>4} │{''.join(cells)}" for row, cells in enumerate(grid)
    ]
    scale = f"{low:<.2g}".ljust(columns - 12) + f"{high:.2g} bits".rjust(12)
    legend = "   ".join(f"{mark} {kind}" for kind, mark in marks.items())
    return Text("\n".join(["", "error, dB", *lines, " " * 6 + scale, f"{legend}   · Shannon's bound of a Gaussian"]))


def check_plot(path: Path) -> None:
    """Raises SettingError, before anything is measured, where the picture could not be drawn, and FileError where there is no such
    folder."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingError(
            "--plot needs matplotlib, which is not installed here",
            cure="install it (pip install 'fedstream[examples]' brings it), or leave --plot out: a plot in text is printed",
        ) from error
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise SettingError(f"--plot: {path} should end in one of {', '.join(_PLOT_SUFFIXES)}", cure="rename it")
    if not path.parent.is_dir():
        raise FileError(f"--plot: there is no folder {path.parent}", cure="make it, or choose another place")


def write_plot(path: Path, trials: Sequence[Trial], title: str) -> None:
    """Error in dB over bits per parameter as a picture, a line for each kind, and the bound of a Gaussian of the same variance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    shown = _lossy(trials)
    lossless = [trial for trial in trials if not trial.problem and trial.fidelity.error == 0]
    kinds = groupby(shown, key=lambda trial: trial.candidate.encoding.kind)
    for index, (kind, of_kind) in enumerate(kinds):
        points = [(trial.bits, decibels(trial.fidelity.error)) for trial in of_kind]
        # Smaller and smaller, so that those that fall together can be seen.
        size, color = max(10 - 1.5 * index, 3), _COLORS[index % len(_COLORS)]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=size, color=color, label=kind)
    for index, trial in enumerate(lossless):
        label = f"{trial.candidate.name} (lossless)"
        axes.axvline(trial.bits, color="#999999", linewidth=1, linestyle=(":", "-.")[index % 2], label=label)
    if shown:
        low, high = min(t.bits for t in shown) / 1.5, max(t.bits for t in (*shown, *lossless)) * 1.2
        bound = [low * (high / low) ** (step / 200) for step in range(201)]
        axes.plot(
            bound,
            [decibels(max(2 ** (-2 * bits), 1e-300)) for bits in bound],
            color="black",
            linestyle="--",
            linewidth=1,
            label="Shannon's bound of a Gaussian",
        )
        axes.set_xlim(low, high)
        axes.set_ylim(min(decibels(t.fidelity.error) for t in shown) - 3, 1)
    axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bits per parameter, every byte of the payload counted")
    axes.set_ylabel("error |x - x'|²/|x|², dB")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
