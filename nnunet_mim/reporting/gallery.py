"""Figures of many volumes: two slices of each, and the distribution of their intensities.

Arrays are (z, y, x): z to the head, y to the back, x to the patient's left (`nnunet/orientation.py` turns others).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from nnunet_mim.reporting.figures import COLOURS, bare
from nnunet_mim.reporting.views import CT_WINDOW


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


def gallery_figure(volumes: Sequence[Slices], window: tuple[float, float] = CT_WINDOW) -> Figure:
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
            place.imshow(
                picture, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest", origin="lower",
                extent=(0, wide, 0, high),
            )  # fmt: skip
            place.set_xlim((wide - width) / 2, (wide + width) / 2)
            place.set_ylim((high - height) / 2, (high + height) / 2)
            place.set_facecolor("black")
            bare(place)
        above.set_title(volume.name if len(volume.name) < 22 else f"…{volume.name[-20:]}", fontsize=8)
    names = ", ".join(volume.name for volume in volumes)
    figure.set_label(f"Coronal (above) and axial slices through the middle of {names}, in the same scale.")
    return figure


def histogram_figure(edges: np.ndarray, counts: np.ndarray, window: tuple[float, float]) -> Figure:
    """Draw the share of voxels by HU, and the window of the plans.

    Args:
        edges: (N + 1,) HU; the first and the last bin hold everything beyond them.
        counts: (N,) voxels.
        window: minimum and maximum HU; the plans clip what lies outside.
    """
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
