"""The worst, median and best cases of an experiment, as slices with contours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.benchmarking.bench_figures import CasePicture
from nnunet_mim.benchmarking.matrix import Place, case_value
from nnunet_mim.benchmarking.outcome import Outcome
from nnunet_mim.nnunet.datasets import raw_images

AXES = "LPS"
"""x to the patient's left, y to the back, z to the head"""
MARGIN_MM = 30.0
"""around the labels"""


def case_pictures(outcome: Outcome, dataset: str, labels: Collection[int]) -> list[CasePicture]:
    """Worst, median and best case of the first arm with the largest number of labels that every arm has finished, first
    seed and fold. Empty where nothing is finished or the images are not in nnUNet_raw.

    Args:
        outcome: of the experiment.
        dataset: name.
        labels: numbers in label images that are shown.
    """
    matrix = outcome.matrix
    fold = matrix.folds(dataset)[0]
    places = [{arm: Place(dataset, fold, count, 0, arm) for arm in matrix.arms} for count in reversed(matrix.labels)]
    by_arm = next((found for found in places if all(place in outcome.results for place in found.values())), None)
    images = raw_images(dataset)
    if by_arm is None or not images:
        return []
    dice = {
        arm: {case: case_value(metrics, "dice") for case, metrics in outcome.results[place]["cases"].items()}
        for arm, place in by_arm.items()
    }
    first = dice[matrix.arms[0]]
    cases = sorted((case for case in first if np.isfinite(first[case]) and case in images), key=first.__getitem__)
    if not cases:
        return []
    pictures = []
    for title, case in (("worst", cases[0]), ("median", cases[len(cases) // 2]), ("best", cases[-1])):
        reference = matrix.cells[by_arm[matrix.arms[0]]].reference(case)
        outputs = {arm: matrix.training(place).output for arm, place in by_arm.items()}
        predictions = {arm: output / "validation" / reference.name for arm, output in outputs.items()}
        of_case = {arm: values[case] for arm, values in dice.items()}
        try:
            pictures.append(picture_of(title, case, Path(images[case][0]), predictions, reference, of_case, labels))
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
    """The axial slice with the largest part of the reference (of the predictions, where it is empty), cut to what is
    labelled. ValueError where the images have different sizes.
    """
    ct = read(image)
    voxels, truth = sitk.GetArrayFromImage(ct), sitk.GetArrayFromImage(read(reference))
    predicted = {arm: sitk.GetArrayFromImage(read(path)) for arm, path in predictions.items()}
    if any(array.shape != voxels.shape for array in (truth, *predicted.values())):
        raise ValueError(f"image, reference and predictions of {case} have different sizes")
    masks = [np.isin(array, list(shown)) for array in (truth, *predicted.values())]
    labelled = masks[0] if masks[0].any() else np.any(masks, axis=0)
    z = int(labelled.sum(axis=(1, 2)).argmax()) if labelled.any() else len(truth) // 2
    x_mm, y_mm, _ = ct.GetSpacing()
    window = around(np.any(masks, axis=0)[z], (y_mm, x_mm))
    slices = {arm: array[z][window] for arm, array in predicted.items()}
    return CasePicture(title, case, voxels[z][window], truth[z][window], slices, dice, (y_mm, x_mm))


def around(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """A window of a slice (Y, X) with a margin around a mask; the whole slice where the mask is empty."""
    voxels = np.argwhere(mask)
    if not len(voxels):
        return slice(None), slice(None)
    margin = [round(MARGIN_MM / step) for step in spacing]
    low, high = voxels.min(axis=0) - margin, voxels.max(axis=0) + margin + 1
    return slice(max(0, int(low[0])), int(high[0])), slice(max(0, int(low[1])), int(high[1]))


def read(path: Path) -> sitk.Image:
    """An image with its axes in the order AXES."""
    return sitk.DICOMOrient(sitk.ReadImage(str(path)), AXES)
