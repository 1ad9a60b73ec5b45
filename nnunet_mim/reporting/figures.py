"""Figures of losses and of organs.

They take numpy arrays in nnU-Net's array order (z, y, x), z to the head, y to the back, x to the patient's left, and
show them as radiologists look at them: the patient's right on the left of the picture, the head up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#999999")


@dataclass(frozen=True)
class LossPanel:
    """Curves of one level."""

    title: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """name → (iterations, losses)"""
    baselines: Mapping[str, float]
    """name → loss of a trivial guess, drawn as a level line"""


def loss_figure(panels: Sequence[LossPanel], ylabel: str = "reconstruction loss") -> Figure:
    """Pretraining curves over iterations, one panel a level, with the trivial guesses as dashed lines."""
    figure = Figure(figsize=(12.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for column, panel in zip(axes, panels, strict=True):
        for (name, (x, y)), colour in zip(panel.curves.items(), ("#9dbcd4", "#0072b2", "#d55e00"), strict=False):
            column.plot(x, y, color=colour, linewidth=1.8, label=name)
        for (name, value), dashes in zip(panel.baselines.items(), ("--", ":"), strict=False):
            column.axhline(value, color="#555555", linewidth=1.2, linestyle=dashes, label=name)
        column.set_title(panel.title, fontsize=11)
        column.set_xlabel("iteration")
        column.grid(alpha=0.25)
        column.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    ends = [f"{p.title}: {name} ends at {y[-1]:.3g}" for p in panels for name, (_, y) in p.curves.items() if len(y)]
    figure.set_label(f"Curves of the {ylabel} over iterations: {'; '.join(ends)}. Dashed lines are trivial guesses.")
    return figure


def segmentation_figure(
    ct: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    names: Sequence[str],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    window: tuple[float, float] = (-180.0, 260.0),
) -> Figure:
    """One case: CT, true organs, predicted organs, in the axial and the coronal slice that show most of the organs.

    Args:
        ct: (Z, Y, X) HU.
        truth: (Z, Y, X) integers, 0 = background, i + 1 = names[i].
        prediction: as truth.
        names: of the labels 1, 2, …
        spacing: mm along (z, y, x), for the proportions.
        window: lowest and highest HU of the grey scale.
    """
    figure = Figure(figsize=(10.8, 7.4), layout="constrained")
    axes = figure.subplots(2, 3)
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    for axis, row, what in ((0, axes[0], "axial"), (1, axes[1], "coronal")):
        index = _organ_slice(truth, axis, len(names))
        aspect = spacing[1] / spacing[2] if axis == 0 else spacing[0] / spacing[2]
        picture = np.take(ct, index, axis)
        for column, labels, title in zip(
            row, (None, truth, prediction), ("CT", "true organs", "predicted organs"), strict=True
        ):
            origin = "lower" if axis == 1 else "upper"
            column.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1], origin=origin, aspect=aspect)
            if labels is not None:
                _overlay(column, np.take(labels, index, axis), colours, origin, aspect)
            bare(column)
            if axis == 0:
                column.set_title(title, fontsize=11)
            side = {"color": "white", "fontsize": 9, "va": "center", "transform": column.transAxes}
            column.text(0.02, 0.5, "R", ha="left", **side)
            column.text(0.98, 0.5, "L", ha="right", **side)
        row[0].set_ylabel(f"{what}, slice {index}", fontsize=10)
    handles = [Patch(color=c, label=n.replace("_", " ")) for c, n in zip(colours, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 7), frameon=False, fontsize=10)
    figure.set_label(
        f"Axial and coronal slice of one case: the CT, the true organs and the predicted organs ({', '.join(names)})."
    )
    return figure


def _organ_slice(labels: np.ndarray, axis: int, n_organs: int) -> int:
    """The slice with most organs, each counted by its area there relative to its largest area."""
    others = tuple(a for a in range(3) if a != axis)
    areas = np.stack([(labels == organ).sum(axis=others) for organ in range(1, n_organs + 1)]).astype(float)
    score = np.sqrt(areas / np.maximum(areas.max(axis=1, keepdims=True), 1)).sum(axis=0)
    return int(score.argmax()) if score.any() else len(score) // 2


def _overlay(column: Any, labels: np.ndarray, colours: Sequence[str], origin: str, aspect: float) -> None:
    """Organs as a see-through fill with a solid outline."""
    fill = np.zeros((*labels.shape, 4))
    for organ, colour in enumerate(colours, start=1):
        inside = labels == organ
        fill[inside] = (*to_rgb(colour), 0.45)
        if inside.any() and not inside.all():
            column.contour(inside, levels=[0.5], colors=colour, linewidths=1.2)
    column.imshow(fill, origin=origin, aspect=aspect, interpolation="nearest")


def bare(column: Any) -> None:
    """No ticks and no frame around a picture."""
    column.set_xticks([])
    column.set_yticks([])
    column.spines[:].set_visible(False)
