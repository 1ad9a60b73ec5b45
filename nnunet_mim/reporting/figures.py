"""Pictures of organs, and what all pictures of slices share.

Arrays are (z, y, x) as in nnU-Net: z to the head, y to the back, x to the patient's left. Slices are shown as
radiologists look at them: the patient's right is on the left of the picture, the head is up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#999999")


def segmentation_figure(
    ct: np.ndarray, truth: np.ndarray, prediction: np.ndarray, names: Sequence[str], spacing: Sequence[float]
) -> Figure:
    """Draw CT, true and predicted organs of a case, in the axial and the coronal slice that show most of the organs.

    Args:
        ct: (Z, Y, X) HU.
        truth: (Z, Y, X) integers, 0 = background, i + 1 = names[i].
        prediction: like truth.
        names: organs, in the order of their labels.
        spacing: mm along (z, y, x).
    """
    figure = Figure(figsize=(10.8, 7.4), layout="constrained")
    axes = figure.subplots(2, 3)
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    contents = {"CT": None, "true organs": truth, "predicted organs": prediction}
    for axis, row, direction in ((0, axes[0], "axial"), (1, axes[1], "coronal")):
        index = _organ_slice(truth, axis, len(names))
        layout = slice_layout(axis, spacing)
        picture = np.take(ct, index, axis)
        for column, (title, labels) in zip(row, contents.items(), strict=True):
            column.imshow(picture, cmap="gray", vmin=-180, vmax=260, **layout)
            if labels is not None:
                _overlay(column, np.take(labels, index, axis), colours, layout)
            bare(column)
            if axis == 0:
                column.set_title(title, fontsize=11)
            mark_sides(column, 0.02, 0.5)
        row[0].set_ylabel(f"{direction}, slice {index}", fontsize=10)
    handles = [Patch(color=c, label=n.replace("_", " ")) for c, n in zip(colours, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 7), frameon=False, fontsize=10)
    figure.set_label(
        f"Axial and coronal slice of one case: the CT, the true organs and the predicted organs ({', '.join(names)})."
    )
    return figure


def _organ_slice(labels: np.ndarray, axis: int, n_organs: int) -> int:
    """Index of the slice that shows most of the organs; each counts with the root of its share of its largest area."""
    others = tuple(a for a in range(3) if a != axis)
    areas = np.stack([(labels == organ).sum(axis=others) for organ in range(1, n_organs + 1)]).astype(float)
    score = np.sqrt(areas / np.maximum(areas.max(axis=1, keepdims=True), 1)).sum(axis=0)
    return int(score.argmax()) if score.any() else len(score) // 2


def _overlay(column: Any, labels: np.ndarray, colours: Sequence[str], layout: dict[str, Any]) -> None:
    """Draw organs as a transparent fill with a solid outline."""
    fill = np.zeros((*labels.shape, 4))
    for organ, colour in enumerate(colours, start=1):
        inside = labels == organ
        fill[inside] = (*to_rgb(colour), 0.45)
        if inside.any() and not inside.all():
            column.contour(inside, levels=[0.5], colors=colour, linewidths=1.2)
    column.imshow(fill, interpolation="nearest", **layout)


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
