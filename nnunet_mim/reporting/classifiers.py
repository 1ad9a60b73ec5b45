"""Figures about classifiers: curves, calibration, confusion, and cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from nnunet_mim.reporting.figures import COLOURS, bare, mark_sides, slice_layout

N_BINS = 10
FOR_AND_AGAINST = ListedColormap(["#2166ff", "#e31a1c"])
"""colours of maps by their sign; their strength is the opacity, so that the image stays as dark as it is"""


@dataclass(frozen=True)
class CasePicture:
    """An axial slice of a case, in HU for CT."""

    title: str
    image: np.ndarray
    """(Y, X)"""
    mask: np.ndarray
    """(Y, X) bool, outlined"""
    spacing: tuple[float, float, float]
    """mm along z, y, x"""
    saliency: np.ndarray | None = None
    """(Y, X) from -1, against the last class, to 1, for it"""


def curves_figure(positive: np.ndarray, scores: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw the ROC curve and the precision-recall curve of some classifiers, of one class against the others.

    Args:
        positive: (N,) bool.
        scores: (N,) per classifier.
        title: of the class.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    for (name, score), colour in zip(scores.items(), _colours(len(scores)), strict=True):
        false, true, _ = roc_curve(positive, score)
        roc.plot(false, true, color=colour, label=name, linewidth=1.6)
        precision, recall, _ = precision_recall_curve(positive, score)
        pr.step(recall, precision, where="post", color=colour, linewidth=1.6)
    roc.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
    pr.axhline(positive.mean(), color="#999999", linewidth=1, linestyle=":")
    roc.legend(frameon=False, fontsize=8, loc="lower right")
    for axes, x, y in ((roc, "1 - specificity", "sensitivity"), (pr, "recall", "precision")):
        axes.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.set_label(f"ROC and precision-recall curves for {title}; dotted: chance. Classifiers: {', '.join(scores)}.")
    return figure


def calibration_figure(positive: np.ndarray, scores: Mapping[str, np.ndarray], title: str) -> Figure:
    """Draw the share of positive cases by predicted probability, in bins of equal width; size: number of cases."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
    for (name, score), colour in zip(scores.items(), _colours(len(scores)), strict=True):
        bins = np.minimum((score * N_BINS).astype(int), N_BINS - 1)
        used = np.unique(bins)
        x, y = ([float(values[bins == b].mean()) for b in used] for values in (score, positive))
        axes.plot(x, y, color=colour, linewidth=1.2, label=name)
        axes.scatter(x, y, s=[10 + 200 * float((bins == b).mean()) for b in used], color=colour)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set(xlabel="predicted probability", ylabel="share of cases", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(f"Calibration for {title}: share of cases by predicted probability; dotted: perfect.")
    return figure


def confusion_figure(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw the number of cases by true class (rows) and told class (columns), shaded by the share of the row."""
    counts = confusion_matrix(labels, predicted, labels=range(len(classes)))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.2 + 0.7 * len(classes)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, str(count), ha="center", va="center", color="w" if share[row, column] > 0.5 else "k")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, fontsize=10)
    figure.set_label(f"Confusion matrix of {title}: rows are true classes, columns told ones.")
    return figure


def cases_figure(pictures: Sequence[CasePicture], window: tuple[float, float]) -> Figure:
    """Draw axial slices, four a row, with the mask outlined; below each the same slice under its map, if it has one.

    `window` are the minimum and maximum of the grey scale. What speaks for the last class is red, against it blue.
    """
    columns, with_maps = 4, any(picture.saliency is not None for picture in pictures)
    rows = math.ceil(len(pictures) / columns) * (2 if with_maps else 1)
    figure = Figure(figsize=(2.7 * columns, 3.1 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        place = places[2 * row if with_maps else row, column]
        _draw_case(place, picture, window)
        place.set_title(picture.title, fontsize=8)
        if picture.saliency is not None:
            below = places[2 * row + 1, column]
            _draw_case(below, picture, window)
            strength = np.abs(picture.saliency)
            colours: dict[str, Any] = {"cmap": FOR_AND_AGAINST, "vmin": -1, "vmax": 1, "interpolation": "nearest"}
            below.imshow(picture.saliency, alpha=strength, **colours, **slice_layout(0, picture.spacing))
    for place in places.ravel():
        bare(place)
    titles = "; ".join(picture.title.replace("\n", ", ") for picture in pictures)
    maps = ", and below them what the network rests on" if with_maps else ""
    figure.set_label(f"Axial slices of cases, their masks outlined{maps}: {titles}.")
    return figure


def _draw_case(place: Axes, picture: CasePicture, window: tuple[float, float]) -> None:
    grey: dict[str, Any] = {"cmap": "gray", "vmin": window[0], "vmax": window[1], "interpolation": "nearest"}
    place.imshow(picture.image, **grey, **slice_layout(0, picture.spacing))
    if picture.mask.any() and not picture.mask.all():
        place.contour(picture.mask, levels=[0.5], colors=COLOURS[0], linewidths=1)
    mark_sides(place, 0.03, 0.5)


@dataclass(frozen=True)
class Line:
    """A figure of a classifier by the number of labelled patients."""

    name: str
    points: tuple[tuple[float, float, float], ...]
    """number of patients, mean and standard deviation of the figure"""
    is_baseline: bool


def fractions_figure(lines: Sequence[Line], title: str, figure_name: str) -> Figure:
    """Draw a figure of classifiers by the number of labelled patients; baselines are dashed."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for line, colour in zip(lines, _colours(len(lines)), strict=True):
        x, y, sd = zip(*line.points, strict=True)
        style, width = ("o--", 1.0) if line.is_baseline else ("o-", 1.8)
        axes.errorbar(x, y, sd, color=colour, label=line.name, fmt=style, linewidth=width, markersize=4, capsize=3)
    axes.set_xscale("log")
    patients = sorted({x for line in lines for x, _, _ in line.points})
    axes.set_xticks(patients, [f"{x:.0f}" for x in patients])
    axes.minorticks_off()
    axes.set(xlabel="labelled training patients", ylabel=figure_name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(title, fontsize=11)
    names = ", ".join(line.name for line in lines)
    figure.set_label(f"{figure_name} for {title} by labelled training patients. Classifiers: {names}.")
    return figure


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]
