"""Checks whether an image is a CT volume to pretrain on: reasons against it, or warnings where it is doubtful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunet_mim.nnunet.dicom import dicom_problem
from nnunet_mim.nnunet.image_files import NOT_FINITE, FileHeader
from nnunet_mim.preparation.finding import Volume
from nnunet_mim.pretraining.data.case_index import BODY_HU

HIGHEST_MINIMUM_HU = -200.0
"""every CT of a body has fat or air in it; label maps, MR and raw scanner values have nothing below 0"""
SMALLEST_BODY = 0.002
"""minimum share of voxels above BODY_HU"""
SMALLEST_SPACING, LARGEST_SPACING = 0.05, 20.0
"""mm; of inner ears 0.1 mm is usual"""
DOUBTFUL_SPACING, DOUBTFUL_EXTENT = 0.2, 2500.0
"""mm; smaller voxels on two axes, and longer bodies, may be given in centimetres or other units"""
HIGH_HU, LARGEST_HIGH = 2000.0, 0.05
"""bone and metal are above this value, and no more than this share of a body"""
LARGEST_HU = 1e5
"""scanners store 16 bits"""


@dataclass(frozen=True)
class Header:
    """Size and spacing of an image, from its header."""

    size: tuple[int, ...]
    """voxels per axis; array order (z, y, x) after turning to RAS"""
    spacing: tuple[float, ...]
    """mm, same order"""
    warnings: tuple[str, ...] = ()
    """what is doubtful about the image, a sentence each; it is used all the same"""


def read_header(volume: Volume, min_slices: int) -> Header | str:
    """Size and spacing of a volume from its header, or why it cannot be used.

    `min_slices` is the minimum number of voxels on every axis.
    """
    found = volume.header
    if isinstance(found, str):
        return found
    if volume.series and (problem := dicom_problem(found)):
        return problem
    if problem := shape_problem(found.size, found.components, min_slices):
        return problem
    if problem := found.problem or spacing_problem(found.spacing):  # in this order: what is read then may be anything
        return problem
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(found.direction)
    order = sorted(range(3), key=lambda axis: "SIAPRL".index(letters[axis]))  # axes that become z, y, x in RAS
    warnings = (*found.warnings, *_size_warnings(found))
    return Header(tuple(found.size[i] for i in order), tuple(found.spacing[i] for i in order), warnings)


def shape_problem(size: Sequence[int], components: int, min_slices: int) -> str | None:
    """Why an image of this size (voxels, x y z) and number of values per voxel is no CT volume, or None."""
    shown = " x ".join(map(str, size)) + (", x y z" if len(size) == 3 else "")
    if components > 1:
        return f"in colour ({components} values a voxel)"
    if len(size) > 3:
        return f"{len(size)}-D ({shown})"
    if len(size) < 3 or min(size) < 2:
        return f"2-D ({shown})"
    if min(size) < min_slices:
        return f"fewer than {min_slices} slices ({shown})"
    return None


def spacing_problem(spacing: Sequence[float]) -> str | None:
    """Why the voxels of an image of this spacing (mm, x y z) are not those of a CT, or None."""
    if not all(SMALLEST_SPACING <= s <= LARGEST_SPACING for s in spacing):
        return f"implausible spacing ({', '.join(f'{s:g}' for s in spacing)} mm, x y z)"
    return None


def _size_warnings(header: FileHeader) -> tuple[str, ...]:
    """What is doubtful about the size of a volume, a sentence each."""
    extents = [n * mm for n, mm in zip(header.size, header.spacing, strict=True)]
    if sorted(header.spacing)[1] >= DOUBTFUL_SPACING and max(extents) <= DOUBTFUL_EXTENT:
        return ()
    voxel, whole = (" x ".join(f"{mm:.3g}" for mm in of) for of in (header.spacing, extents))
    return (f"hardly the size of a body ({whole} mm, of voxels of {voxel} mm, x y z): is its spacing in mm?",)


def voxel_problem(ct: np.ndarray) -> str | None:
    """Why voxels (Z, Y, X) are not those of a body in Hounsfield units, or None."""
    low, high = float(ct.min()), float(ct.max())
    if not np.isfinite([low, high]).all():  # min and max of an array with NaN are NaN
        return NOT_FINITE
    if low > HIGHEST_MINIMUM_HU:
        return f"no HU (values {low:g} to {high:g}: a label map, an MR, raw or cut-off values)"
    if max(-low, high) > LARGEST_HU or np.count_nonzero(ct > HIGH_HU) > LARGEST_HIGH * ct.size:
        share = np.count_nonzero(ct > HIGH_HU) / ct.size
        return f"no HU (values {low:g} to {high:g}, {share:.0%} above {HIGH_HU:,.0f}: wrong byte order or scale)"
    if np.count_nonzero(ct > BODY_HU) < SMALLEST_BODY * ct.size:
        return f"no body in it (values {low:g} to {high:g})"
    return None


def voxel_warnings(ct: np.ndarray) -> tuple[str, ...]:
    """What is doubtful about voxels (Z, Y, X) that are used all the same, a sentence each: of cases with a label."""
    problem = voxel_problem(ct)
    return () if problem is None else (problem,)
