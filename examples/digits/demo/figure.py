"""The picture of the demo's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with colour blindness can tell apart.
_FEDERATED: Final = "#0072B2"
_POOLED: Final = "#555555"
_SITES: Final = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_LABEL_GAP: Final = 0.045


def draw(path: Path, accuracy: Mapping[str, Sequence[float]], class_counts: Mapping[str, Sequence[int]]) -> None:
    """Writes a PNG: accuracy by round of "federated", "pooled" and every site, and the digits that each site has."""
    colors = dict(zip(class_counts, _SITES, strict=False))
    settings = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(settings):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10, 4.2), width_ratios=(1.55, 1), layout="constrained", dpi=150
        )
        _accuracy(left, accuracy, colors)
        _digits(right, class_counts, colors)
        figure.savefig(path)
        pyplot.close(figure)


def _accuracy(axes: Axes, accuracy: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    last = len(accuracy["federated"]) - 1
    ends: list[tuple[float, str, str]] = []
    for name, values in accuracy.items():
        is_site = name in colors
        color = colors.get(name, _FEDERATED if name == "federated" else _POOLED)
        axes.plot(
            range(len(values)),
            values,
            color=color,
            linewidth=3 if name == "federated" else 1.6,
            linestyle="-" if is_site or name == "federated" else "--",
            zorder=3 if name == "federated" else 2,
        )
        ends.append((values[-1], f"{name} alone" if is_site else name, color))
    for y, (value, label, color) in zip(_apart([end[0] for end in sorted(ends)]), sorted(ends), strict=True):
        weight = "bold" if label == "federated" else "normal"
        axes.annotate(
            f"{label} {value:.1%}",
            (last, value),
            (last * 1.03, y),
            color=color,
            va="center",
            weight=weight,
            annotation_clip=False,
        )
    axes.set(xlim=(0, last), ylim=(0, 1.02), xlabel="round", title="Accuracy on images that no site has")
    axes.title.set_ha("left")
    axes.title.set_position((0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved so that labels do not overlap, the topmost where it is."""
    placed: list[float] = []
    for height in reversed(heights):
        placed.append(min(height, placed[-1] - _LABEL_GAP) if placed else height)
    return placed[::-1]


def _digits(axes: Axes, class_counts: Mapping[str, Sequence[int]], colors: Mapping[str, str]) -> None:
    bottom = [0] * len(next(iter(class_counts.values())))
    for name, counts in class_counts.items():
        axes.bar(range(len(counts)), counts, bottom=bottom, color=colors[name], width=0.8, label=name)
        bottom = [low + count for low, count in zip(bottom, counts, strict=True)]
    axes.set(xlabel="digit", title="Training images of each site")
    axes.title.set_ha("left")
    axes.title.set_position((0, 1))
    axes.set_xticks(range(len(bottom)))
    axes.set_ylim(0, max(bottom) * 1.22)
    axes.legend(frameon=False, ncols=len(class_counts), loc="upper left", handlelength=1, columnspacing=1.2)
