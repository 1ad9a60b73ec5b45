"""Pictures of views, their masks and their reconstructions.

Arrays are (z, y, x): z to the head, y to the back, x to the patient's left (`nnunet/orientation.py` turns others).
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

from nnunet_mim.reporting.figures import COLOURS, CT_WINDOW, bare, mark_sides, slice_layout

CHILD_COLOUR = "#4db8ff"


@dataclass(frozen=True)
class ReconstructedView:
    """One view of one level, masked and reconstructed; arrays are (Z, Y, X), in HU for CT."""

    title: str
    input: np.ndarray
    mask: np.ndarray
    """bool, True = masked"""
    reconstruction: np.ndarray
    """shown at masked voxels only; the others are the input's"""
    child_box: tuple[slice, slice, slice] | None
    """masked voxels that the view of the next level was cut from"""
    spacing: tuple[float, float, float]
    """mm between voxels of the view"""
    given: np.ndarray
    """each masked token filled with its own mean, which is added to predictions"""
    infill: np.ndarray
    """masked voxels copied from the nearest visible ones"""


def views_figure(views: Sequence[ReconstructedView], window: tuple[float, float] = CT_WINDOW) -> Figure:
    """Draw one row per level: original, masked, reconstructed of an axial slice, and the same of a coronal slice.

    The slices go through what the next row is cut from, which is framed in blue. `window` is the minimum and maximum HU
    of the grey scale.
    """
    contents = ("original", "masked", "reconstructed")
    titles = [(f"{name}: {content}", axis) for axis, name in enumerate(("axial", "coronal")) for content in contents]
    figure, axes = _grid(views, titles)
    for row, view in zip(axes, views, strict=True):
        image = _grey(view.input, window)
        filled = np.where(view.mask, _grey(view.reconstruction, window), image)
        for axis, (original, masked, reconstructed) in enumerate((row[:3], row[3:])):
            index = slice_to_show(image, view.mask, axis, view.child_box)
            covered = np.take(view.mask, index, axis)
            picture = np.take(image, index, axis)
            _show(original, picture, axis, view)
            _show(masked, np.where(covered[..., None], _hatch(covered.shape), picture[..., None]), axis, view)
            _show(reconstructed, np.take(filled, index, axis), axis, view)
            _outline(reconstructed, covered)
            if view.child_box is not None:
                rows, columns = (view.child_box[a] for a in range(3) if a != axis)
                corner = columns.start - 0.5, rows.start - 0.5
                size = columns.stop - columns.start, rows.stop - rows.start
                for column in (original, masked):
                    column.add_patch(Rectangle(corner, *size, fill=False, edgecolor=CHILD_COLOUR, linewidth=2))
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
    """Draw one row per level: an axial slice, its masked tokens filled in trivially, and by the network."""
    titles = ("original", "given: mean of each token", "nearest visible voxels", "network")
    figure, axes = _grid(views, [(title, 0) for title in titles])
    for row, view in zip(axes, views, strict=True):
        image = _grey(view.input, window)
        index = slice_to_show(image, view.mask, 0, view.child_box)
        for column, volume in zip(row, (view.input, view.given, view.infill, view.reconstruction), strict=True):
            filled = np.where(view.mask[index], _grey(volume[index], window), image[index])
            _show(column, filled, 0, view)
            _outline(column, view.mask[index])
    figure.set_label(
        f"Axial slices of one view per level ({_names(views)}), masked tokens outlined in orange: the original, each "
        "masked token filled with its mean, with the nearest visible voxels, and by the network."
    )
    return figure


def slice_to_show(image: np.ndarray, mask: np.ndarray, axis: int, box: tuple[slice, slice, slice] | None = None) -> int:
    """Index of the slice along an axis with the highest contrast of masked voxels and a balanced share of visible ones.

    Args:
        image: (Z, Y, X) grey values from 0 to 1.
        mask: (Z, Y, X) bool, True = masked.
        axis: 0 or 1.
        box: only slices well inside this box of voxels count.
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
        if score > 1.1 * best + 1e-6:  # of nearly equal slices, the one nearest to the middle wins
            best, chosen = score, index
    return chosen


def interest(image: np.ndarray) -> float:
    """Contrast within the tissue times its share of the voxels of an image (Z, Y, X), from 0 (air) to 1."""
    tissue = image > 0.1
    return float(image[tissue].std() * tissue.mean()) if tissue.any() else 0.0


def _grid(views: Sequence[ReconstructedView], titles: Sequence[tuple[str, int]]) -> tuple[Figure, np.ndarray]:
    """Make a figure with a row per view, and a column per title and the axis that its slices are taken along.

    Flat pictures get wider columns than tall ones, so that neither are small.
    """
    z, y, x = (n * s for n, s in zip(views[0].input.shape, views[0].spacing, strict=True))
    ratios = [min(max((y if axis == 0 else z) / x, 0.4), 2.5) for _, axis in titles]  # height in units of the width
    widths = [1 / math.sqrt(ratio) for ratio in ratios]
    scale = min(12.1 / sum(widths), 3.2)
    height = scale * max(width * ratio for width, ratio in zip(widths, ratios, strict=True))
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.04, hspace=0)
    figure = Figure(figsize=(scale * sum(widths) + 0.5, height * len(views) + 0.6), layout=layout)
    grid = figure.subplots(len(views), len(titles), squeeze=False, gridspec_kw={"width_ratios": widths})
    for column, (title, _) in zip(grid[0], titles, strict=True):
        column.set_title(title, fontsize=10)
        if "original" in title:
            mark_sides(column, 0.03, 0.93)
    for row, view in zip(grid, views, strict=True):
        row[0].set_ylabel(view.title, fontsize=10)
    return figure, grid


def _grey(volume: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Intensities as grey values from 0 to 1."""
    return np.clip((np.asarray(volume, np.float32) - window[0]) / (window[1] - window[0]), 0, 1)


def _show(column: Any, picture: np.ndarray, axis: int, view: ReconstructedView) -> None:
    """Show a slice across axis 0 or 1: grey values (rows, columns), or RGB (rows, columns, 3)."""
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, -1)
    column.imshow(picture, vmin=0, vmax=1, interpolation="nearest", **slice_layout(axis, view.spacing))
    bare(column)


def _outline(column: Any, covered: np.ndarray) -> None:
    """Draw a line around the masked tokens."""
    if covered.any() and not covered.all():
        column.contour(covered, levels=[0.5], colors=COLOURS[0], linewidths=0.7)


def _names(views: Sequence[ReconstructedView]) -> str:
    return ", ".join(" ".join(view.title.split()) for view in views)


def _hatch(shape: tuple[int, ...]) -> np.ndarray:
    """Bluish grey with diagonal lines (rows, columns, RGB), which no tissue looks like."""
    rows, columns = np.indices(shape)
    return np.array([0.40, 0.45, 0.55]) + 0.13 * ((rows + columns) % 4 == 0)[..., None]
