"""What a classifier has to beat: classifiers that see the prevalence, the size, simple statistics or a column only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.ndimage import binary_erosion

from nnunet_mim.classification.job import Job
from nnunet_mim.classification.regions import CaseVoxels, mask_box
from nnunet_mim.nnunet.intensities import Intensities
from nnunet_mim.system.progress import ProgressBar

BASELINE = "baseline_"
PREVALENCE, SIZE, SIZE_HU, COVARIATES = (BASELINE + name for name in ("prevalence", "size", "size_hu", "covariates"))
BASELINES = (PREVALENCE, SIZE, SIZE_HU, COVARIATES)
"""names of their results folders; with few labels what is labelled stands behind them"""
PERCENTILES = (5, 25, 50, 75, 95)
N_DIRECTIONS = 500
"""directions that a diameter is looked for in; the longest is missed by less than half a percent"""


def baseline_features(job: Job) -> dict[str, np.ndarray]:
    """(N, F) float64 inputs of each baseline by name, for all cases of the table.

    Size and HU are those of the mask, or of the whole case where there is none. HU are those of the preprocessed
    voxels: the window of the plans has cut them.
    """
    covariates = job.table.covariates
    cases = ProgressBar(job.table.cases, desc="sizes", unit="case")
    rows = [_size_and_hu(job.reader.read(case), job.source.intensities) for case in cases]
    sizes, hu = (np.stack(part) for part in zip(*rows, strict=True))
    features = {
        PREVALENCE: np.zeros((len(rows), 1)),
        SIZE: sizes,
        SIZE_HU: np.concatenate([sizes, hu], axis=1),
    }
    return features | ({COVARIATES: covariates} if covariates.shape[1] else {})


def is_baseline(arm: str) -> bool:
    """Whether a results folder of this name holds a baseline."""
    return arm.startswith(BASELINE)


def describe_baselines(covariates: tuple[str, ...]) -> Mapping[str, str]:
    """What each baseline sees, in words."""
    return {
        PREVALENCE: "nothing: the classes' shares of the training cases",
        SIZE: "volume, its logarithm and the largest diameter of the mask (of the case where there is none)",
        SIZE_HU: "these, and mean, deviation and percentiles of the HU in it",
        COVARIATES: f"the columns {', '.join(covariates)}",
    }


def _size_and_hu(case: CaseVoxels, intensities: Intensities) -> tuple[np.ndarray, np.ndarray]:
    low, high = case.box(0.0)
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    first_channel = (slice(0, 1), *inside)
    voxels = np.asarray(case.voxels[first_channel][0], np.float64)
    std, mean = intensities.scale()
    mask = np.ones(voxels.shape, bool) if case.mask is None else case.mask[inside]
    hu = voxels[mask] * std + mean
    volume = float(mask.sum()) * float(np.prod(case.spacing))
    sizes = np.array([volume, np.log(volume), largest_diameter(mask, case.spacing)])
    return sizes, np.array([hu.mean(), hu.std(), *np.percentile(hu, PERCENTILES)])


def largest_diameter(mask: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Largest distance (mm) between the outer faces of two voxels of a mask, over N_DIRECTIONS directions.

    Args:
        mask: (X, Y, Z) bool with some place in it.
        spacing: mm per voxel.
    """
    low, high = mask_box(mask)
    inside = np.pad(mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], 1)
    rim = np.argwhere(inside & ~binary_erosion(inside)) * np.array(spacing)  # (P, 3) mm
    i = np.arange(N_DIRECTIONS) + 0.5
    z, angle = i / N_DIRECTIONS, np.pi * (1 + 5**0.5) * i  # a spiral over half a sphere (Fibonacci)
    radius = np.sqrt(1 - z**2)
    directions = np.stack([radius * np.cos(angle), radius * np.sin(angle), z])  # (3, directions)
    along = rim @ directions
    return float((np.ptp(along, axis=0) + np.array(spacing) @ np.abs(directions)).max())
