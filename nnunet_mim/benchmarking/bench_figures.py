"""Pictures of an experiment: Dice by number of labels, learning curves, Dice by label, and cases with contours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nnunet_mim.benchmarking.matrix import Place, case_value
from nnunet_mim.benchmarking.outcome import Outcome
from nnunet_mim.benchmarking.tables import smooth
from nnunet_mim.errors import printable
from nnunet_mim.nnunet.image_files import READ_SECONDS, damaged, file_problem
from nnunet_mim.reporting.figures import COLOURS, CT_WINDOW, bare, mark_sides
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory

ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MARGIN_MM = 30.0
"""around the labels of a case"""


@dataclass(frozen=True)
class CasePicture:
    """One axial slice of a case; arrays (Y, X), y to the back, x to the patient's left."""

    title: str
    name: str
    ct: np.ndarray
    """HU"""
    reference: np.ndarray
    """label image"""
    predictions: Mapping[str, np.ndarray]
    """label images, by arm"""
    dice: Mapping[str, float]
    """by arm"""
    spacing: tuple[float, float]
    """mm along y, x"""


def curves_figure(outcome: Outcome, dataset: str) -> Figure:
    """Dice by number of labels, and the learning curves with the largest number of labels."""
    matrix = outcome.matrix
    figure = Figure(figsize=(10.8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    folds, counts, texts = matrix.folds(dataset), {}, []
    for labels in matrix.labels:
        counts[labels] = np.mean([matrix.train_count(dataset, fold, labels) for fold in folds])
    for index, arm in enumerate(matrix.arms):
        colour = ARM_COLOURS[index % len(ARM_COLOURS)]
        seed_means = {
            labels: np.nanmean(outcome.values(dataset, labels, seeds, arm, "dice"), axis=1) * 100
            for labels in sorted(counts, key=counts.__getitem__)
            if (seeds := outcome.seeds(dataset, labels, arm))
        }
        if not seed_means:
            continue
        for labels, values in seed_means.items():
            left.scatter([counts[labels]] * len(values), values, color=colour, s=14, alpha=0.5)
        means = {labels: float(values.mean()) for labels, values in seed_means.items()}
        numbers = [counts[labels] for labels in means]
        left.plot(numbers, list(means.values()), color=colour, marker="o", label=outcome.name(dataset, arm))
        texts.append(f"{arm} {', '.join(f'{mean:.1f} with {labels}' for labels, mean in means.items())}")
        for number, result in enumerate(outcome.trainings(dataset, list(means)[-1], arm)):
            iterations = matrix.bench.iterations_per_epoch * np.arange(1, len(result["curve"]) + 1)
            curve = np.array(smooth(result["curve"])) * 100
            right.plot(iterations, curve, color=colour, alpha=0.75, label=None if number else arm)
    cases = "test" if outcome.test else "validation"
    left.set(xlabel="labelled cases", ylabel=f"Dice on the {cases} cases, %", xscale="log")
    left.set_xticks(list(counts.values()), [f"{count:g}" for count in counts.values()])
    left.minorticks_off()
    right.set(xlabel="iterations", ylabel="Dice on patches, %")
    right.set_title("learning curves with the most labels", fontsize=10)
    for axes in (left, right):
        _plain(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.set_label(f"Dice by number of labels, {outcome.place(dataset)}: {'; '.join(texts)}.")
    return figure


def bars_figure(outcome: Outcome, dataset: str) -> Figure | None:
    """Dice of every label with the largest number of labels that every arm has finished; None where there is none."""
    arms, names = outcome.matrix.arms, outcome.label_names(dataset)
    finished = [labels for labels in outcome.matrix.labels if all(outcome.seeds(dataset, labels, arm) for arm in arms)]
    if not finished:
        return None
    labels = finished[-1]
    figure = Figure(figsize=(max(5.0, min(14.0, 1.5 + 0.32 * len(names) * (len(arms) + 1))), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        colour = ARM_COLOURS[number % len(ARM_COLOURS)]
        seeds = outcome.seeds(dataset, labels, arm)
        means = [np.nanmean(outcome.values(dataset, labels, seeds, arm, "dice", key), axis=1) for key in names]
        places = np.arange(len(names)) + (number - (len(arms) - 1) / 2) * width
        sds = [m.std(ddof=1) * 100 if len(m) > 1 else 0.0 for m in means]
        heights, label = [m.mean() * 100 for m in means], outcome.name(dataset, arm)
        axes.bar(places, heights, width * 0.92, yerr=sds, color=colour, label=label, ecolor="#444444", capsize=2)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names.values()], rotation=20, ha="right")
    axes.set_ylabel("Dice, %")
    axes.set_ylim(0, 100)
    _plain(axes)
    axes.legend(frameon=False, ncols=len(arms), loc="lower right", bbox_to_anchor=(1, 1))
    where = f"{outcome.place(dataset)}, labels {labels}"
    figure.set_label(f"Dice of every label, {where}; bars: standard deviation over seeds.")
    return figure


def label_numbers(outcome: Outcome, dataset: str) -> dict[int, str]:
    """Names of the numbers in label images. Numbers that regions share are named by the number."""
    cell = next(cell for place, cell in outcome.matrix.cells.items() if place.dataset == dataset)
    names: dict[int, str] = {}
    for name, value in cell.dataset_json["labels"].items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if int(number) > 0 and name != "ignore":
                names[int(number)] = name if isinstance(value, int) else f"label {number}"
    return names


def case_pictures(outcome: Outcome, dataset: str, labels: Collection[int]) -> list[CasePicture]:
    """Worst, median and best case of the first arm with the largest number of labels that every arm has finished, first
    seed and fold; `labels` (numbers in label images) are shown. Empty where nothing is finished or the images are not
    in nnUNet_raw.
    """
    matrix = outcome.matrix
    fold = matrix.folds(dataset)[0]
    places = [{arm: Place(dataset, fold, count, 0, arm) for arm in matrix.arms} for count in reversed(matrix.labels)]
    by_arm = next((found for found in places if outcome.results.keys() >= set(found.values())), {})
    images = outcome.images(dataset)
    if not by_arm or not images:
        return []
    dice = {
        arm: {case: case_value(metrics, "dice") for case, metrics in outcome.results[place]["cases"].items()}
        for arm, place in by_arm.items()
    }
    first = dice[matrix.arms[0]]
    cases = sorted((case for case in first if np.isfinite(first[case]) and case in images), key=first.__getitem__)
    if not cases:
        return []
    items = []
    for title, case in (("worst", cases[0]), ("median", cases[len(cases) // 2]), ("best", cases[-1])):
        reference = outcome.reference(by_arm[matrix.arms[0]], case)
        folders = {arm: matrix.training(place).predictions(outcome.test) for arm, place in by_arm.items()}
        predictions = {arm: folder / reference.name for arm, folder in folders.items()}
        of_case = {arm: values[case] for arm, values in dice.items()}
        items.append(((title, case), images[case], reference, predictions, of_case, tuple(labels)))
    pictures = []
    limits = Limits(READ_SECONDS, share_of_memory(physical_memory(), 1))
    with closing(guarded_map(_picture, items, 1, limits)) as finished:
        for index, made in finished:
            if isinstance(made, Failure):  # a file that is gone or damaged, or grids that do not fit
                print(f"note: no picture of {printable(items[index][0][1])} ({printable(made.reason)})")
            else:
                pictures.append(made)
    return pictures


def _picture(item: tuple[Any, ...]) -> CasePicture | Failure:
    """What `read_case` returns for these arguments, once its files are sound. May crash, hang or need much memory."""
    _, image, reference, predictions, *_ = item
    for file in (image, reference, *predictions.values()):
        if problem := file_problem(str(file)) or damaged(file):
            return Failure(f"{file} {problem}")
    return read_case(*item)


def read_case(
    title: tuple[str, str], image: Path, reference: Path, predictions: Mapping[str, Path],
    dice: Mapping[str, float], shown: Collection[int],
) -> CasePicture:  # fmt: skip
    """The axial slice that shows most of the labels, cut to what is labelled; each label counts with the root of its
    share of its largest area in the reference (in a prediction, where that is empty). Only labels in `shown` count;
    `predictions` and `dice` are by arm, `title` is a word and the case's name. ValueError where the images have
    different sizes.
    """
    # axes: x to the patient's left, y to the back, z to the head
    images = [sitk.DICOMOrient(sitk.ReadImage(str(p)), "LPS") for p in (image, reference, *predictions.values())]
    ct, *arrays = [sitk.GetArrayFromImage(turned) for turned in images]
    if any(array.shape != ct.shape for array in arrays):
        raise ValueError("image, reference and predictions have different sizes")
    masks = [np.isin(array, list(shown)) for array in arrays]
    labelled = next((array for array, mask in zip(arrays, masks, strict=True) if mask.any()), arrays[0])
    areas = np.array([(labelled == label).sum(axis=(1, 2)) for label in shown])  # (labels, Z)
    shares = np.sqrt(areas / np.maximum(areas.max(axis=1, keepdims=True), 1)).sum(axis=0)
    z = int(shares.argmax()) if shares.any() else len(ct) // 2
    x_mm, y_mm, _ = images[0].GetSpacing()
    window = _around(np.any(masks, axis=0)[z], (y_mm, x_mm))
    truth, *predicted = [array[z][window] for array in arrays]
    return CasePicture(*title, ct[z][window], truth, dict(zip(predictions, predicted, strict=True)), dice, (y_mm, x_mm))


def _around(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """A window of a slice (Y, X) with a margin around a mask; the whole slice where the mask is empty."""
    voxels = np.argwhere(mask)
    if not len(voxels):
        return slice(None), slice(None)
    margin = [round(MARGIN_MM / step) for step in spacing]
    low, high = voxels.min(axis=0) - margin, voxels.max(axis=0) + margin + 1
    return slice(max(0, int(low[0])), int(high[0])), slice(max(0, int(low[1])), int(high[1]))


def cases_figure(pictures: Sequence[CasePicture], names: Mapping[int, str]) -> Figure:
    """The CT with contours of the labels in `names`, dashed for the reference and solid for the prediction.

    A row per case, a column per arm; R and L are the patient's sides.
    """
    arms = list(pictures[0].predictions)
    column = min(3.1, 12 / len(arms))
    heights = [column * p.ct.shape[0] * p.spacing[0] / (p.ct.shape[1] * p.spacing[1]) for p in pictures]
    figure = Figure(figsize=(column * len(arms) + 0.6, sum(heights) + 0.35 * len(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(pictures), len(arms), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, picture in zip(axes, pictures, strict=True):
        aspect = picture.spacing[0] / picture.spacing[1]
        for column, arm in zip(row, arms, strict=True):
            column.imshow(picture.ct, cmap="gray", vmin=CT_WINDOW[0], vmax=CT_WINDOW[1], aspect=aspect)
            for style, labels in (("dashed", picture.reference), ("solid", picture.predictions[arm])):
                for number, label in enumerate(names):
                    inside = labels == label
                    if inside.any() and not inside.all():
                        colour = COLOURS[number % len(COLOURS)]
                        column.contour(inside, levels=[0.5], colors=colour, linewidths=1.1, linestyles=style)
            column.set_title(f"{arm}: {picture.dice[arm] * 100:.1f} %", fontsize=9)
            mark_sides(column, 0.02, 0.94)
            bare(column)
        row[0].set_ylabel(f"{picture.title}\n{picture.name}", fontsize=9)
    lines = [(name.replace("_", " "), COLOURS[i % len(COLOURS)], "-") for i, name in enumerate(names.values())]
    lines += [("reference", "#555555", "--"), ("arm", "#555555", "-")]
    handles = [Line2D([], [], color=colour, ls=style, label=label) for label, colour, style in lines]
    columns = min(len(handles), 8, int(figure.get_figwidth() / 1.2))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    texts = []
    for picture in pictures:
        dice = ", ".join(f"{arm} {value * 100:.1f} %" for arm, value in picture.dice.items())
        texts.append(f"{picture.title}: {picture.name}, Dice {dice}")
    figure.set_label("; ".join(texts))
    return figure


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
