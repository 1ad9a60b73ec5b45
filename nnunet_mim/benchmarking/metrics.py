"""How well a segmentation agrees with a reference: Dice, and distances of the surfaces in mm."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from scipy import ndimage

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.image_files import READ_SECONDS, damaged, file_problem, header_of
from nnunet_mim.nnunet.labels import read_label
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory

Label = int | tuple[int, ...]


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two boolean arrays; NaN where both are empty (as in nnU-Net's summary.json)."""
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(prediction & reference) / total if total else float("nan")


def _surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm of surface voxels of one mask (X, Y, Z) to the nearest surface voxel of the other, neither empty.

    A voxel is on the surface if one of its six neighbours is not in the mask, or outside the array. Returns those from
    prediction to reference, then those from reference to prediction.
    """
    (box,) = ndimage.find_objects((prediction | reference).astype(np.uint8))
    masks = [np.pad(mask[box], 1) for mask in (prediction, reference)]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    to_prediction, to_reference = (ndimage.distance_transform_edt(~s, sampling=spacing) for s in surfaces)
    return to_reference[surfaces[0]], to_prediction[surfaces[1]]


def _surface_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """95th percentile of the Hausdorff distance (mm), and normalised surface Dice, of masks (X, Y, Z).

    hd95 is the larger one of the 95th percentiles of both directions; nsd the share of the surface voxels of both masks
    that are at most `tolerance` (mm) from the other surface. Both are NaN where both masks are empty; where one is, nsd
    is 0 and hd95 the diagonal of the image, so that a missed organ counts as a large error.
    """
    if not prediction.any() or not reference.any():
        if prediction.any() == reference.any():
            return float("nan"), float("nan")
        return float(np.linalg.norm(np.array(prediction.shape) * np.array(spacing))), 0.0
    distances = _surface_distances(prediction, reference, spacing)
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

    `labels` are without the background, or regions (several labels); voxels with the label `ignore` are left out;
    `tolerance` is that of the normalised surface Dice, mm. The prediction has the geometry of the image, on which the
    reference is laid voxel by voxel, as a label for training is. Raises ValueError where it does not fit, or holds
    other values.
    """
    sizes = [header_of(file).GetSize()[::-1] for file in (prediction, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{prediction} has {sizes[0]} voxels, {reference} {sizes[1]} (z, y, x)")
    values = {0, *np.hstack([0, *labels]).tolist(), *(() if ignore is None else (ignore,))}
    with TemporaryDirectory() as scratch:
        found = read_label(reader, str(reference), str(prediction), values, f"{scratch}/reference")
    if isinstance(found, str):
        raise ValueError(found)
    predictions, properties = reader.read_seg(str(prediction))  # (1, X, Y, Z)
    truth, predicted = found[0][0], predictions[0]
    counted = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    metrics = {}
    for label in labels:
        a, b = (region_or_label_to_mask(image, label) & counted for image in (predicted, truth))
        hd95, nsd = _surface_metrics(a, b, properties["spacing"], tolerance)
        overlap = {"dice": dice(a, b), "hd95": hd95, "nsd": nsd}
        metrics[label_or_region_to_key(label)] = {**overlap, "n_ref": int(b.sum()), "n_pred": int(a.sum())}
    return metrics


def compared(items: Sequence[tuple[Any, ...]]) -> list[dict[str, dict[str, float]]]:
    """What `case_metrics` returns for each of these arguments; a guarded worker process reads the images.

    Raises:
        MiMError: an image is missing or damaged, or two do not fit.
    """
    limits = Limits(READ_SECONDS, share_of_memory(physical_memory(), 1))
    metrics: dict[int, Any] = {}
    with closing(guarded_map(_checked_metrics, items, 1, limits)) as outcomes:
        for index, outcome in outcomes:
            if isinstance(outcome, Failure):
                prediction, reference = items[index][:2]
                raise MiMError(
                    f"cannot compare {prediction} with {reference} ({outcome.reason}): correct the reference, or "
                    "delete the folder of the training, and repeat the command"
                )
            metrics[index] = outcome
    return [metrics[index] for index in range(len(items))]


def _checked_metrics(item: tuple[Any, ...]) -> dict[str, dict[str, float]] | Failure:
    """What `case_metrics` returns, once both files are sound. May crash, hang or need much memory."""
    for file in item[:2]:
        if problem := file_problem(str(file)) or damaged(file):
            return Failure(f"{file} is {problem}" if problem.startswith("damaged") else f"{file} {problem}")
    return case_metrics(*item)
