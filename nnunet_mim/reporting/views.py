"""Pictures of what the network is shown and what it makes of it.

They take arrays (z, y, x), z to the head, y to the back, x to the patient's left (`orientation.py` turns others), and
show them as radiologists look at them: the patient's right on the left of the picture, the head up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from nnunet_mim.reporting.figures import COLOURS, bare

MASKED_GREY = 0.45
"""brightness of what the encoder does not see"""
CHILD_COLOUR = "#4db8ff"
CT_WINDOW = (-450.0, 350.0)
FLATTEST, TALLEST = 0.4, 2.5
"""lowest and highest height of a picture, in units of its width"""


@dataclass(frozen=True)
class ReconstructedView:
    """One view of one level, masked and reconstructed; arrays (Z, Y, X), HU where the case is CT."""

    title: str
    input: np.ndarray
    mask: np.ndarray
    """bool per voxel, True = masked"""
    reconstruction: np.ndarray
    """only its masked voxels are shown, the others are the input's"""
    child_box: tuple[slice, slice, slice] | None = None
    """masked voxels that the next level's view was cut from"""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """mm between voxels of the view, for the proportions"""
    given: np.ndarray | None = None
    """each masked token filled with its own mean: what reconstructions get for nothing"""
    infill: np.ndarray | None = None
    """masked voxels copied from the nearest visible ones"""


def views_figure(views: Sequence[ReconstructedView], window: tuple[float, float] = CT_WINDOW) -> Figure:
    """What the encoder is shown and what the decoder makes of it: one row a level.

    Args:
        views: one a level, outermost first.
        window: lowest and highest HU of the grey scale.

    Returns:
        A figure with six columns: original, masked, reconstructed of an axial slice, then of a coronal slice. The
        slices go through what the next row is cut from, which is framed in blue.
    """
    figure, axes = _grid(views, (0, 0, 0, 1, 1, 1))
    for number, (row, view) in enumerate(zip(axes, views, strict=True)):
        image, made = _grey(view.input, window), _grey(view.reconstruction, window)
        mask = np.asarray(view.mask, bool)
        for axis, name, columns in ((0, "axial", row[:3]), (1, "coronal", row[3:])):
            index = telling_slice(image, mask, axis, view.child_box)
            covered = np.take(mask, index, axis)
            for column, volume, what in zip(
                columns, (image, image, np.where(mask, made, image)), ("original", "masked", "reconstructed"),
                strict=True,
            ):  # fmt: skip
                picture = np.repeat(np.take(volume, index, axis)[..., None], 3, -1)
                if what == "masked":
                    picture = np.where(covered[..., None], _hatch(covered.shape), picture)
                _show(column, picture, axis, view)
                if what == "reconstructed":
                    _outline(column, covered)
                if view.child_box is not None and what != "reconstructed":
                    column.add_patch(_frame(*(view.child_box[a] for a in range(3) if a != axis)))
                if number == 0:
                    column.set_title(f"{name}: {what}", fontsize=10)
            if number == 0:
                _mark_sides(columns[0])
        row[0].set_ylabel(view.title, fontsize=10)
    handles = [
        Patch(facecolor="none", edgecolor=COLOURS[0], label="filled in by the network"),
        Patch(facecolor="none", edgecolor=CHILD_COLOUR, linewidth=2, label="masked place the next row is cut from"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.set_label(
        f"Slices of one view per level ({_names(views)}): the original, the same with masked tokens greyed out, and "
        "the same with the masked tokens filled in by the decoder, outlined in orange."
    )
    return figure


def comparison_figure(views: Sequence[ReconstructedView], window: tuple[float, float] = CT_WINDOW) -> Figure:
    """The network beside trivial ways to fill in the same tokens, an axial slice of one view a level.

    Args:
        views: one a level, with `given` and `infill`.
        window: lowest and highest HU of the grey scale.
    """
    figure, axes = _grid(views, (0, 0, 0, 0))
    for number, (row, view) in enumerate(zip(axes, views, strict=True)):
        image, mask = _grey(view.input, window), np.asarray(view.mask, bool)
        index = telling_slice(image, mask, 0, view.child_box)
        columns = {
            "original": view.input,
            "given: mean of each token": view.given,
            "nearest visible voxels": view.infill,
            "network": view.reconstruction,
        }
        for column, (name, volume) in zip(row, columns.items(), strict=True):
            filled = np.where(mask, _grey(view.input if volume is None else volume, window), image)
            _show(column, np.repeat(filled[index][..., None], 3, -1), 0, view)
            _outline(column, mask[index])
            if number == 0:
                column.set_title(name, fontsize=10)
        if number == 0:
            _mark_sides(row[0])
        row[0].set_ylabel(view.title, fontsize=10)
    figure.set_label(
        f"Axial slices of one view per level ({_names(views)}), masked tokens outlined in orange: the original, each "
        "masked token filled with its mean, with the nearest visible voxels, and by the network."
    )
    return figure


def telling_slice(image: np.ndarray, mask: np.ndarray, axis: int, box: tuple[slice, slice, slice] | None = None) -> int:
    """The slice that shows most of what has to be filled in, beside what is visible.

    Args:
        image: (Z, Y, X) grey values in 0 … 1.
        mask: bool, True = masked.
        axis: that the slices are taken along.
        box: only slices well inside this box of voxels.
    """
    first, last = 0, image.shape[axis] - 1
    if box is not None:
        inset = (box[axis].stop - box[axis].start) // 4
        first, last = box[axis].start + inset, box[axis].stop - 1 - inset
    middle = (image.shape[axis] - 1) / 2
    best, chosen = -1.0, first
    for index in sorted(range(first, last + 1), key=lambda i: abs(i - middle)):
        picture, covered = np.take(image, index, axis), np.take(mask, index, axis)
        share = covered.mean()
        score = float(picture[covered].std() * min(share, 1 - share)) if covered.any() else 0.0
        if score > 1.1 * best + 1e-6:  # the middle wins where there is little between them
            best, chosen = score, index
    return chosen


def interest(image: np.ndarray) -> float:
    """How much there is to see: the contrast within the tissue, times its share.

    Args:
        image: (Z, Y, X) grey values in 0 … 1, where air is 0.
    """
    tissue = image > 0.1
    return float(image[tissue].std() * tissue.mean()) if tissue.any() else 0.0


def _grid(views: Sequence[ReconstructedView], across: Sequence[int]) -> tuple[Figure, np.ndarray]:
    """An empty figure with a row a view and a column for each number in `across`: the axis its slices are taken along.

    Flat pictures are wider than high ones, so that neither are small.
    """
    z, y, x = (n * s for n, s in zip(views[0].input.shape, views[0].spacing, strict=True))
    flatness = [min(max((y if axis == 0 else z) / x, FLATTEST), TALLEST) for axis in across]
    widths = [1 / math.sqrt(ratio) for ratio in flatness]
    scale = min(12.1 / sum(widths), 3.2)
    height = scale * max(width * ratio for width, ratio in zip(widths, flatness, strict=True))
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.04, hspace=0)
    figure = Figure(figsize=(scale * sum(widths) + 0.5, height * len(views) + 0.6), layout=layout)
    grid = figure.subplots(len(views), len(across), squeeze=False, gridspec_kw={"width_ratios": widths})
    return figure, grid


def _grey(volume: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Grey values in 0 … 1."""
    return np.clip((np.asarray(volume, np.float32) - window[0]) / (window[1] - window[0]), 0, 1)


def _show(column: Any, picture: np.ndarray, axis: int, view: ReconstructedView) -> None:
    """A slice (rows, columns, RGB) across `axis` 0 or 1, upright and in proportion."""
    z, y, x = view.spacing
    aspect = y / x if axis == 0 else z / x
    origin = "lower" if axis == 1 else "upper"
    column.imshow(picture, vmin=0, vmax=1, origin=origin, interpolation="nearest", aspect=aspect)
    bare(column)


def _outline(column: Any, covered: np.ndarray) -> None:
    """Line around the masked tokens."""
    if covered.any() and not covered.all():
        column.contour(covered, levels=[0.5], colors=COLOURS[0], linewidths=0.7)


def _mark_sides(column: Any) -> None:
    """R and L, of the patient."""
    side = {"color": "white", "fontsize": 9, "va": "center", "transform": column.transAxes}
    column.text(0.03, 0.93, "R", ha="left", **side)
    column.text(0.97, 0.93, "L", ha="right", **side)


def _names(views: Sequence[ReconstructedView]) -> str:
    return ", ".join(" ".join(view.title.split()) for view in views)


def _frame(rows: slice, columns: slice) -> Rectangle:
    """Outline of a box of pixels."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    corner = (columns.start - 0.5, rows.start - 0.5)
    return Rectangle(corner, width, height, fill=False, edgecolor=CHILD_COLOUR, linewidth=2)


def _hatch(shape: tuple[int, ...]) -> np.ndarray:
    """Bluish grey with diagonal lines (rows, columns, RGB): no tissue looks like it."""
    rows, columns = np.indices(shape)
    lines = ((rows + columns) % 4 == 0)[..., None] * 0.13
    return np.array([MASKED_GREY - 0.05, MASKED_GREY, MASKED_GREY + 0.1]) + lines
