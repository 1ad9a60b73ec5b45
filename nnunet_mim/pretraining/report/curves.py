"""Curves of a pretraining run over its iterations, from its train.csv and val.csv: progress.png, as nnU-Net has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
TRAIN, HELD_OUT, GREY = "#a9c4d8", "#0072b2", "#555555"
LEVEL_COLOURS = {1: "#009e73", 2: "#0072b2", 3: "#d55e00"}
LABEL_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2")

Columns = Mapping[str, np.ndarray]
"""name → one value per row, NaN where there is none"""


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    style: str = "-"
    width: float = 1.6


@dataclass(frozen=True)
class Panel:
    """One diagram."""

    title: str
    lines: list[Line]
    right: list[Line] = field(default_factory=list)
    """curves with an axis of their own"""
    logarithmic: bool = False
    """the axis on the right"""
    from_zero: bool = False
    """the axis on the left begins at 0"""


def write_progress(folder: Path) -> None:
    """Draw FOLDER/progress.png from train.csv and val.csv; a picture that fails is no reason to end a run.

    Args:
        folder: of the run. Where it holds nothing to draw yet, nothing is written.
    """
    try:
        train, val = (read_columns(folder / name) for name in ("train.csv", "val.csv"))
        panels = panels_of(TrainingFigures.from_row(train), Measurement.from_row(val))
        if panels:
            write_atomically(folder / PROGRESS, figure_png(progress_figure(panels), dpi=80))
    except Exception as error:  # also a full disk
        print(f"note: {folder / PROGRESS} could not be drawn ({type(error).__name__}: {error})", flush=True)


def read_columns(path: Path, max_rows: int = MAX_ROWS) -> Columns:
    """Columns of a CSV file of numbers; empty for a file that is missing or has no rows.

    Args:
        path: of train.csv or val.csv.
        max_rows: where there are more, an even selection that holds the last one.
    """
    if not path.is_file():
        return {}
    head, *lines = path.read_text().splitlines() or [""]
    names = head.split(",")
    step = max(1, -(-len(lines) // max_rows))
    rows = [line.split(",") for line in lines[(len(lines) - 1) % step :: step]]
    values = [[_number(cell) for cell in row] for row in rows if len(row) == len(names)]  # not a line that is cut short
    return dict(zip(names, np.array(values, dtype=float).T, strict=True)) if values else {}


def columns_of(rows: Sequence[Mapping[str, float]]) -> Columns:
    """Columns of a checkpoint's `loss_history`."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


def panels_of(train: TrainingFigures[np.ndarray], val: Measurement[np.ndarray]) -> list[Panel]:
    """What there is to draw, from the columns of train.csv and val.csv; a panel without data is left out."""
    panels = [_reconstruction(number, train, val) for number in LEVELS]
    panels += [_alignment(val), _features(val), _probe(val), _optimisation(train), _speed(train)]
    return [panel for panel in panels if panel.lines or panel.right]


def _reconstruction(number: int, train: TrainingFigures[np.ndarray], val: Measurement[np.ndarray]) -> Panel:
    level = val.level(number)
    lines = [
        *_line(train.iteration, train.level(number).reconstruction, "training", TRAIN),
        *_line(val.iteration, level.reconstruction, "held out", HELD_OUT, width=2.0),
        *_line(val.iteration, level.guesses.token_mean, "guess: the token's mean", GREY, "--", 1.2),
        *_line(val.iteration, level.guesses.infill, "guess: copy the nearest voxels", GREY, ":", 1.4),
    ]
    return Panel(f"{level.title}: reconstruction loss", lines)


def _alignment(val: Measurement[np.ndarray]) -> Panel:
    lines = []
    for level in val.levels:
        colour = LEVEL_COLOURS[level.number]
        lines += _line(val.iteration, level.alignment_top1, f"{level.title}, held out", colour)
        lines += _line(val.iteration, level.alignment_chance, f"{level.title}, chance", colour, "--", 1.2)
    return Panel("alignment: right place found", lines, from_zero=True)


def _features(val: Measurement[np.ndarray]) -> Panel:
    rank = _line(val.iteration, val.feature_rank, "effective rank (left)", HELD_OUT)
    spread = _line(val.iteration, val.feature_std, "spread (right)", "#d55e00")
    return Panel("encoder features (rank 1, spread 0: collapsed)", rank, spread, from_zero=True)


def _probe(val: Measurement[np.ndarray]) -> Panel:
    lines = _line(val.iteration, val.probe.dice, "mean", "#1d2329", width=2.2)
    for position, (label, dice) in enumerate(sorted(val.probe.labels.items())):
        lines += _line(val.iteration, dice, f"label {label}", LABEL_COLOURS[position % len(LABEL_COLOURS)], width=1.1)
    return Panel("label probe: Dice on held-out cases", lines, from_zero=True)


def _optimisation(train: TrainingFigures[np.ndarray]) -> Panel:
    rate = _line(train.iteration, train.learning_rate, "learning rate (left)", HELD_OUT)
    norm = _line(train.iteration, train.grad_norm, "gradient norm before clipping (right)", "#e0a458", width=1.1)
    return Panel("optimisation", rate, norm, logarithmic=True, from_zero=True)


def _speed(train: TrainingFigures[np.ndarray]) -> Panel:
    speed = _line(train.iteration, train.crops_per_s, "crops/s", GREY, width=1.1)
    return Panel("speed: crops per second", speed, from_zero=True)


def _line(
    iterations: np.ndarray, values: np.ndarray | None, name: str, colour: str, style: str = "-", width: float = 1.6
) -> list[Line]:
    """A column as a curve, or nothing where it has no values."""
    if values is None or not np.isfinite(values).any():
        return []
    x, y = iterations[np.isfinite(values)], values[np.isfinite(values)]
    size = -(-len(x) // MAX_POINTS)
    x, y = (np.array([part.mean() for part in np.array_split(v, -(-len(v) // size))]) for v in (x, y))
    return [Line(name, x, y, colour, style, width)]


def progress_figure(panels: Sequence[Panel], width: float = 10.0, height: float = 1.9) -> Figure:
    """All panels under each other, over the same iterations.

    Args:
        panels: of `panels_of`, at least one.
        width: of the figure, inches.
        height: of a panel, inches.
    """
    total = height * len(panels) + 0.45
    figure = Figure(figsize=(width, total))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    left, right = 0.6 / width, 1 - 0.65 / width
    figure.subplots_adjust(left, 0.5 / total, right, 1 - 0.3 / total, hspace=0.42)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel)
    axes[-1].set_xlabel("iteration", fontsize=9)
    figure.set_label(f"Curves over iterations: {'; '.join(_ends(panel) for panel in panels)}.")
    return figure


def _draw(axis: Any, panel: Panel) -> None:
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
    columns = min(len(handles), 6)
    axis.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=columns, fontsize=8, frameon=False,
        borderaxespad=0.2, handlelength=1.8, columnspacing=1.2,
    )  # fmt: skip


def _ends(panel: Panel) -> str:
    values = ", ".join(f"{line.name} ends at {line.y[-1]:.3g}" for line in [*panel.lines, *panel.right])
    return f"{panel.title} ({values})"
