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

MARGIN_MM = 30.0
"""around the labels"""


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
    images = raw_images(dataset)
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
    pictures = []
    for title, case in (("worst", cases[0]), ("median", cases[len(cases) // 2]), ("best", cases[-1])):
        reference = matrix.cells[by_arm[matrix.arms[0]]].reference(case)
        outputs = {arm: matrix.training(place).output for arm, place in by_arm.items()}
        predictions = {arm: output / "validation" / reference.name for arm, output in outputs.items()}
        try:
            ct, spacing, truth, slices = _slices(Path(images[case][0]), reference, predictions, labels)
            of_case = {arm: values[case] for arm, values in dice.items()}
            pictures.append(CasePicture(title, case, ct, truth, slices, of_case, spacing))
        except (RuntimeError, ValueError, IndexError) as error:  # a file that is gone, or grids that do not fit
            print(f"note: no picture of {case} ({' '.join(str(error).split())[-200:]})")
    return pictures


def _slices(
    image: Path, reference: Path, predictions: Mapping[str, Path], shown: Collection[int]
) -> tuple[np.ndarray, tuple[float, float], np.ndarray, dict[str, np.ndarray]]:
    """CT, spacing (y, x) in mm, reference and predictions in the axial slice with the largest part of the reference (of
    the predictions, where it is empty), cut to what is labelled. ValueError where the images have different sizes.
    """
    # axes: x to the patient's left, y to the back, z to the head
    images = [sitk.DICOMOrient(sitk.ReadImage(str(p)), "LPS") for p in (image, reference, *predictions.values())]
    ct, *arrays = [sitk.GetArrayFromImage(turned) for turned in images]
    if any(array.shape != ct.shape for array in arrays):
        raise ValueError("image, reference and predictions have different sizes")
    masks = [np.isin(array, list(shown)) for array in arrays]
    labelled = masks[0] if masks[0].any() else np.any(masks, axis=0)
    z = int(labelled.sum(axis=(1, 2)).argmax()) if labelled.any() else len(ct) // 2
    x_mm, y_mm, _ = images[0].GetSpacing()
    window = around(np.any(masks, axis=0)[z], (y_mm, x_mm))
    truth, *predicted = [array[z][window] for array in arrays]
    return ct[z][window], (y_mm, x_mm), truth, dict(zip(predictions, predicted, strict=True))


def around(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """A window of a slice (Y, X) with a margin around a mask; the whole slice where the mask is empty."""
    voxels = np.argwhere(mask)
    if not len(voxels):
        return slice(None), slice(None)
    margin = [round(MARGIN_MM / step) for step in spacing]
    low, high = voxels.min(axis=0) - margin, voxels.max(axis=0) + margin + 1
    return slice(max(0, int(low[0])), int(high[0])), slice(max(0, int(low[1])), int(high[1]))
