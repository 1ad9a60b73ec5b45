"""Curves of a pretraining run over its iterations, from its train.csv and val.csv: progress.png, as nnU-Net has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nnunet_mim.pretraining.monitoring.figures import LEVELS, Measurement, TrainingFigures
from nnunet_mim.reporting.page import figure_png, write_atomically

PROGRESS = "progress.png"
MAX_ROWS = 3000
"""maximum number of rows of a CSV file that are read, evenly spread: a picture has no more pixels"""
MAX_POINTS = 300
"""maximum number of points of a curve; each is the mean of several rows"""
TRAIN, HELD_OUT, UNET, GREY = "#a9c4d8", "#0072b2", "#d55e00", "#555555"
LEVEL_COLOURS = {1: "#009e73", 2: "#0072b2", 3: "#d55e00"}
LABEL_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2")

Columns = Mapping[str, np.ndarray]
"""name → one value per row, NaN where there is none"""


@dataclass(frozen=True)
class _Line:
    """One curve."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    style: str
    width: float


@dataclass(frozen=True)
class _Panel:
    """One diagram."""

    title: str
    lines: list[_Line]
    right: Sequence[_Line] = ()
    """curves with an axis of their own"""
    logarithmic: bool = False
    """the axis on the right"""
    from_zero: bool = False
    """the axis on the left begins at 0"""


def write_progress(folder: Path) -> None:
    """Draw FOLDER/progress.png from train.csv and val.csv, if they hold anything; a failure does not end the run."""
    try:
        train, val = (read_columns(folder / name) for name in ("train.csv", "val.csv"))
        panels = panels_of(TrainingFigures.from_row(train), Measurement.from_row(val))
        if panels:
            write_atomically(folder / PROGRESS, figure_png(progress_figure(panels), dpi=80))
    except Exception as error:  # also a full disk
        print(f"note: {folder / PROGRESS} could not be drawn ({type(error).__name__}: {error})", flush=True)


def read_columns(path: Path) -> Columns:
    """Columns of train.csv or val.csv; empty for a file that is missing or has no rows.

    Of more than `MAX_ROWS` rows, an even selection that holds the last one.
    """
    if not path.is_file():
        return {}
    head, *lines = path.read_text().splitlines() or [""]
    names = head.split(",")
    step = max(1, -(-len(lines) // MAX_ROWS))
    lines = lines[(len(lines) - 1) % step :: step]
    rows = [line for line in lines if line.count(",") == head.count(",")]  # not a line that is cut short
    return dict(zip(names, np.genfromtxt(rows, delimiter=",", ndmin=2).T, strict=True)) if rows else {}


def columns_of(rows: Sequence[Mapping[str, float]]) -> Columns:
    """Columns of a checkpoint's `loss_history`."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}


def panels_of(train: TrainingFigures[np.ndarray], val: Measurement[np.ndarray]) -> list[_Panel]:
    """What there is to draw, from the columns of train.csv and val.csv; a panel without data is left out."""
    panels = []
    for level in (val.level(number) for number in LEVELS):
        lines = [
            *_line(train.iteration, train.level(level.number).reconstruction, "training", TRAIN),
            *_line(val.iteration, level.reconstruction, "held out", HELD_OUT, width=2.0),
            *_line(val.iteration, level.unet, "U-Net, held out", UNET, width=2.0),
            *_line(val.iteration, level.guesses.token_mean, "guess: the token's mean", GREY, "--", 1.2),
            *_line(val.iteration, level.guesses.infill, "guess: copy the nearest voxels", GREY, ":", 1.4),
        ]
        panels.append(_Panel(f"{level.title}: reconstruction loss", lines))

    alignment = []
    for level in val.levels:
        colour = LEVEL_COLOURS[level.number]
        alignment += _line(val.iteration, level.alignment_top1, f"{level.title}, held out", colour)
        alignment += _line(val.iteration, level.alignment_chance, f"{level.title}, chance", colour, "--", 1.2)
    rank = _line(val.iteration, val.feature_rank, "effective rank (left)", HELD_OUT)
    spread = _line(val.iteration, val.feature_std, "spread (right)", "#d55e00")
    dice = _line(val.iteration, val.probe.dice, "mean", "#1d2329", width=2.2)
    for (label, values), colour in zip(sorted(val.probe.labels.items()), cycle(LABEL_COLOURS), strict=False):
        dice += _line(val.iteration, values, f"label {label}", colour, width=1.1)
    rate = _line(train.iteration, train.learning_rate, "learning rate (left)", HELD_OUT)
    norm = _line(train.iteration, train.grad_norm, "gradient norm before clipping (right)", "#e0a458", width=1.1)
    speed = _line(train.iteration, train.crops_per_s, "crops/s", GREY, width=1.1)
    panels += [
        _Panel("alignment: right place found", alignment, from_zero=True),
        _Panel("encoder features (rank 1, spread 0: collapsed)", rank, spread, from_zero=True),
        _Panel("label probe: Dice on held-out cases", dice, from_zero=True),
        _Panel("optimisation", rate, norm, logarithmic=True, from_zero=True),
        _Panel("speed: crops per second", speed, from_zero=True),
    ]
    return [panel for panel in panels if panel.lines or panel.right]


def _line(
    iterations: np.ndarray, values: np.ndarray | None, name: str, colour: str, style: str = "-", width: float = 1.6
) -> list[_Line]:
    """A column as a curve, or nothing where it has no values."""
    if values is None or not np.isfinite(values).any():
        return []
    x, y = iterations[np.isfinite(values)], values[np.isfinite(values)]
    size = -(-len(x) // MAX_POINTS)
    x, y = (np.array([part.mean() for part in np.array_split(v, -(-len(v) // size))]) for v in (x, y))
    return [_Line(name, x, y, colour, style, width)]


def progress_figure(panels: Sequence[_Panel], width: float = 10.0, height: float = 1.9) -> Figure:
    """All panels (at least one) under each other; width of the figure and height of a panel in inches."""
    total = height * len(panels) + 0.45
    figure = Figure(figsize=(width, total))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(0.6 / width, 0.5 / total, 1 - 0.65 / width, 1 - 0.3 / total, hspace=0.42)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel)
    axes[-1].set_xlabel("iteration", fontsize=9)
    texts = []
    for panel in panels:
        ends = ", ".join(f"{line.name} ends at {line.y[-1]:.3g}" for line in [*panel.lines, *panel.right])
        texts.append(f"{panel.title} ({ends})")
    figure.set_label(f"Curves over iterations: {'; '.join(texts)}.")
    return figure


def _draw(axis: Any, panel: _Panel) -> None:
    axes = [(axis, panel.lines), *([(axis.twinx(), panel.right)] if panel.right else [])]
    handles = []
    for side, lines in axes:
        for line in lines:
            marker = "o" if len(line.x) < 12 and line.style == "-" else ""
            handles += side.plot(
                line.x, line.y, color=line.colour, linestyle=line.style, linewidth=line.width, marker=marker,
                markersize=3, label=line.name,
            )  # fmt: skip
    axis.set_title(panel.title, fontsize=10, loc="left", pad=4)
    axis.grid(alpha=0.25)
    for side, _ in axes:
        side.tick_params(labelsize=8)
        side.ticklabel_format(axis="y", scilimits=(-3, 4))
        side.spines["top"].set_visible(False)
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    for side, lines in axes[1:]:
        if panel.logarithmic and all((line.y > 0).all() for line in lines):
            side.set_yscale("log")
        else:
            side.set_ylim(bottom=0)
    axis.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=min(len(handles), 6), fontsize=8,
        frameon=False, borderaxespad=0.2, handlelength=1.8, columnspacing=1.2,
    )  # fmt: skip
