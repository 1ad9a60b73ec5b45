"""How well a segmentation agrees with a reference: Dice, and distances of the surfaces in mm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from scipy import ndimage

Label = int | tuple[int, ...]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two boolean arrays; NaN where both are empty (as in nnU-Net's summary.json)."""
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(prediction & reference) / total if total else float("nan")


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from every surface voxel of one mask to the nearest surface voxel of the other.

    A voxel is on the surface if one of its six neighbours is not in the mask, or outside the array.

    Args:
        prediction, reference: (X, Y, Z) bool, neither empty.
        spacing: mm per voxel and axis.

    Returns:
        (from prediction to reference, from reference to prediction), mm.
    """
    (box,) = ndimage.find_objects((prediction | reference).astype(np.uint8))
    masks = [np.pad(mask[box], 1) for mask in (prediction, reference)]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    to_prediction, to_reference = (ndimage.distance_transform_edt(~s, sampling=spacing) for s in surfaces)
    return to_reference[surfaces[0]], to_prediction[surfaces[1]]


def surface_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """95th percentile of the Hausdorff distance, and normalised surface Dice.

    Args:
        prediction, reference: (X, Y, Z) bool.
        spacing: mm per voxel and axis.
        tolerance: maximum distance at which a surface voxel agrees with the other surface, mm.

    Returns:
        (hd95, nsd). hd95: the larger one of the 95th percentiles of both directions, mm. nsd: share of the surface
        voxels of both masks that agree. Both are NaN where both masks are empty; where one is, hd95 is the diagonal of
        the image, so that a missed organ counts as a large error, and nsd is 0.
    """
    if not prediction.any() or not reference.any():
        if prediction.any() == reference.any():
            return float("nan"), float("nan")
        return float(np.linalg.norm(np.array(prediction.shape) * np.array(spacing))), 0.0
    distances = surface_distances(prediction, reference, spacing)
    within = np.concatenate(distances) <= tolerance
    return max(float(np.percentile(d, 95)) for d in distances), float(within.mean())


def case_metrics(
    prediction: Path,
    reference: Path,
    labels: Sequence[Label],
    reader: BaseReaderWriter,
    ignore: int | None = None,
    tolerance: float = 1.0,
) -> dict[str, dict[str, float]]:
    """Metrics of every label of one case, by the label's key in nnU-Net's summary.json: Dice, hd95 (mm), nsd, and
    numbers of voxels (n_ref, n_pred).

    Args:
        prediction, reference: label images on the same grid.
        labels: labels without the background, or regions (several labels).
        reader: nnU-Net's reader of images.
        ignore: label of voxels that are left out.
        tolerance: of the normalised surface Dice, mm.
    """
    references, properties = reader.read_seg(str(reference))  # (1, X, Y, Z)
    truth, predicted = references[0], reader.read_seg(str(prediction))[0][0]
    if truth.shape != predicted.shape:
        raise ValueError(f"{prediction} has {predicted.shape} voxels, {reference} {truth.shape}")
    counted = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    metrics = {}
    for label in labels:
        a, b = (region_or_label_to_mask(image, label) & counted for image in (predicted, truth))
        hd95, nsd = surface_metrics(a, b, properties["spacing"], tolerance)
        overlap = {"dice": dice(a, b), "hd95": hd95, "nsd": nsd}
        metrics[label_or_region_to_key(label)] = {**overlap, "n_ref": int(b.sum()), "n_pred": int(a.sum())}
    return metrics
