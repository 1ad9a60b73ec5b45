"""Pictures of many volumes, and what all pictures of slices share.

Arrays are (z, y, x) as in nnU-Net: z to the head, y to the back, x to the patient's left. Slices are shown as
radiologists look at them: the patient's right is on the left of the picture, the head is up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#999999")
CT_WINDOW = (-450.0, 350.0)
"""HU of the grey scale"""


@dataclass(frozen=True)
class Slices:
    """Two slices through the middle of a volume, in HU for CT."""

    name: str
    coronal: np.ndarray
    """(Z, X)"""
    axial: np.ndarray
    """(Y, X)"""
    spacing: tuple[float, float, float]
    """mm along z, y, x"""


def gallery_figure(volumes: Sequence[Slices]) -> Figure:
    """Draw a column per volume: a coronal slice, head up, and an axial slice; all in the same scale of mm."""
    heights = [max(len(v.coronal) * v.spacing[0] for v in volumes), max(len(v.axial) * v.spacing[1] for v in volumes)]
    width = max(v.coronal.shape[1] * v.spacing[2] for v in volumes)
    column = min(2.2, 12.6 / len(volumes))
    figure = Figure(figsize=(column * len(volumes), column * sum(heights) / width + 0.4), layout="constrained")
    axes = figure.subplots(2, len(volumes), squeeze=False, gridspec_kw={"height_ratios": heights})
    for (above, below), volume in zip(axes.T, volumes, strict=True):
        z, y, x = volume.spacing
        for place, picture, step, height in (
            (above, volume.coronal, z, heights[0]),
            (below, volume.axial[::-1], y, heights[1]),
        ):
            high, wide = picture.shape[0] * step, picture.shape[1] * x
            grey = {"cmap": "gray", "vmin": CT_WINDOW[0], "vmax": CT_WINDOW[1], "interpolation": "nearest"}
            place.imshow(picture, origin="lower", extent=(0, wide, 0, high), **grey)
            place.set_xlim((wide - width) / 2, (wide + width) / 2)
            place.set_ylim((high - height) / 2, (high + height) / 2)
            place.set_facecolor("black")
            bare(place)
        above.set_title(volume.name if len(volume.name) < 22 else f"…{volume.name[-20:]}", fontsize=8)
    names = ", ".join(volume.name for volume in volumes)
    figure.set_label(f"Coronal (above) and axial slices through the middle of {names}, in the same scale.")
    return figure


def histogram_figure(edges: np.ndarray, counts: np.ndarray, window: tuple[float, float]) -> Figure:
    """Draw the share of voxels by HU, from edges (N + 1,) and counts (N,) of bins, and the window (HU) of the plans."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1], counts / counts.sum(), np.diff(edges), align="edge", color=COLOURS[1])
    for place in window:
        axes.axvline(place, color="#555555", linewidth=1.2, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("HU")
    axes.set_ylabel("share of voxels")
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(f"Share of voxels by HU; dashed: the window from {window[0]:g} to {window[1]:g} HU.")
    return figure


def slice_layout(axis: int, spacing: Sequence[float]) -> dict[str, Any]:
    """Arguments of `imshow` that show a slice across axis 0 or 1 of (z, y, x) upright; spacing: mm along each axis."""
    z, y, x = spacing
    return {"origin": "upper", "aspect": y / x} if axis == 0 else {"origin": "lower", "aspect": z / x}


def mark_sides(column: Any, x: float, y: float) -> None:
    """Write R and L, the patient's sides, at `x` from the edges and at height `y`, as shares of the picture."""
    style = {"color": "white", "fontsize": 9, "va": "center", "transform": column.transAxes}
    column.text(x, y, "R", ha="left", **style)
    column.text(1 - x, y, "L", ha="right", **style)


def bare(column: Any) -> None:
    """Remove the ticks and the frame of a picture."""
    column.set_xticks([])
    column.set_yticks([])
    column.spines[:].set_visible(False)
