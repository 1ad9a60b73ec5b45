"""The worst, median and best cases of an experiment, as slices with contours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.benchmarking.bench_figures import CasePicture
from nnunet_mim.benchmarking.cell import validation_folder
from nnunet_mim.benchmarking.matrix import Place, case_value
from nnunet_mim.benchmarking.tables import Outcome
from nnunet_mim.nnunet.datasets import raw_images

AXES = "LPS"
"""x to the patient's left, y to the back, z to the head"""
MARGIN_MM = 30.0
"""around what is labelled"""


def case_pictures(outcome: Outcome, dataset: str, labels: Collection[int]) -> list[CasePicture]:
    """Worst, median and best case of the first arm with the most labels that every arm has finished, first seed and
    fold; empty where nothing is finished or the images are not in nnUNet_raw.

    Args:
        outcome: of the experiment.
        dataset: name.
        labels: numbers in label images that are shown.
    """
    matrix = outcome.matrix
    fold = matrix.folds(dataset)[0]
    places = [{arm: Place(dataset, fold, count, 0, arm) for arm in matrix.arms} for count in reversed(matrix.labels)]
    found = next((by_arm for by_arm in places if all(place in outcome.results for place in by_arm.values())), None)
    images = raw_images(dataset)
    if found is None or not images:
        return []
    dice = {
        arm: {case: case_value(metrics, "dice") for case, metrics in outcome.results[place]["cases"].items()}
        for arm, place in found.items()
    }
    first = dice[matrix.arms[0]]
    known = sorted((case for case in first if np.isfinite(first[case]) and case in images), key=first.__getitem__)
    if not known:
        return []
    chosen = dict(zip(("worst", "median", "best"), (known[0], known[len(known) // 2], known[-1]), strict=True))
    pictures = []
    for title, case in chosen.items():
        predictions = {arm: predicted(outcome, place, case) for arm, place in found.items()}
        reference = reference_of(outcome, found[matrix.arms[0]], case)
        its_dice = {arm: values[case] for arm, values in dice.items()}
        try:
            pictures.append(picture_of(title, case, Path(images[case][0]), predictions, reference, its_dice, labels))
        except (RuntimeError, ValueError, IndexError) as error:  # a file that is gone, or grids that do not fit
            print(f"note: no picture of {case} ({' '.join(str(error).split())[-200:]})")
    return pictures


def picture_of(
    title: str,
    case: str,
    image: Path,
    predictions: Mapping[str, Path],
    reference: Path,
    dice: Mapping[str, float],
    shown: Collection[int],
) -> CasePicture:
    """The axial slice with most of the reference (of the predictions, where it is empty), around what is labelled."""
    ct, truth = read(image), read(reference)
    labels = {arm: sitk.GetArrayFromImage(read(path)) for arm, path in predictions.items()}
    voxels, true = sitk.GetArrayFromImage(ct), sitk.GetArrayFromImage(truth)
    if any(array.shape != voxels.shape for array in (true, *labels.values())):
        raise ValueError(f"image, reference and predictions of {case} have different sizes")
    masks = [np.isin(array, list(shown)) for array in (true, *labels.values())]
    labelled = masks[0] if masks[0].any() else np.any(masks, axis=0)
    z = int(labelled.sum(axis=(1, 2)).argmax()) if labelled.any() else len(true) // 2
    x_mm, y_mm, _ = ct.GetSpacing()
    window = around(np.any(masks, axis=0)[z], (y_mm, x_mm))
    return CasePicture(
        title, case, voxels[z][window], true[z][window], {arm: found[z][window] for arm, found in labels.items()},
        dice, (y_mm, x_mm),
    )  # fmt: skip


def around(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """A window of a slice (Y, X) with some margin around a mask; the whole slice where the mask is empty."""
    places = np.argwhere(mask)
    if not len(places):
        return slice(None), slice(None)
    margin = [round(MARGIN_MM / step) for step in spacing]
    low, high = places.min(axis=0) - margin, places.max(axis=0) + margin + 1
    return slice(max(0, int(low[0])), int(high[0])), slice(max(0, int(low[1])), int(high[1]))


def read(path: Path) -> sitk.Image:
    """An image with its axes in AXES."""
    return sitk.DICOMOrient(sitk.ReadImage(str(path)), AXES)


def predicted(outcome: Outcome, place: Place, case: str) -> Path:
    """A training's prediction of a validation case."""
    cell = outcome.matrix.cells[place]
    return validation_folder(cell, outcome.matrix.folder(place)) / f"{case}{file_ending(outcome, place)}"


def reference_of(outcome: Outcome, place: Place, case: str) -> Path:
    """What nnU-Net compares a prediction with."""
    return outcome.matrix.cells[place].references / f"{case}{file_ending(outcome, place)}"


def file_ending(outcome: Outcome, place: Place) -> str:
    """Of the dataset's images."""
    return outcome.matrix.cells[place].dataset_json["file_ending"]
