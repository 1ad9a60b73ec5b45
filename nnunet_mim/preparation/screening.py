"""Checks whether an image is a CT volume to pretrain on: reasons against it, or warnings where it is doubtful."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_mim.nnunet.image_files import check_gzip, header_of
from nnunet_mim.preparation.finding import Volume
from nnunet_mim.pretraining.data.case_index import BODY_HU

HIGHEST_MINIMUM_HU = -200.0
"""every CT of a body has fat or air in it; label maps, MR and raw scanner values have nothing below 0"""
SMALLEST_BODY = 0.002
"""minimum share of voxels above BODY_HU"""
LARGEST_SPACING = 20.0
"""mm"""
NOT_FINITE = "holds NaN or infinite voxels"
MODALITY, IMAGE_TYPE, INTERCEPT, POSITION, ORIENTATION = "0008|0060", "0008|0008", "0028|1052", "0020|0032", "0020|0037"


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
    """Size and spacing of a volume without reading its voxels, or why it cannot be used.

    `min_slices` is the minimum number of voxels on every axis.
    """
    if volume.unreadable:
        return f"cannot be read ({len(volume.files)} DICOM files that are damaged or hold no image)"
    try:
        reader = header_of(volume.files[0])
    except RuntimeError as error:
        return f"cannot be read ({last_line(error)})"
    size, spacing = list(reader.GetSize()), list(reader.GetSpacing())
    if volume.series:
        if problem := _dicom_problem(reader):
            return problem
        if len(volume.files) >= max(2, min_slices):
            gap = _slice_gap(volume.files)
            if isinstance(gap, str):
                return gap
            size, spacing = [*size[:2], len(volume.files)], [*spacing[:2], gap]
        else:
            size[2:] = [len(volume.files)]
    if problem := header_problem(size, spacing, reader.GetNumberOfComponents(), min_slices):
        return problem
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(reader.GetDirection())
    order = sorted(range(3), key=lambda axis: "SIAPRL".index(letters[axis]))  # axes that become z, y, x in RAS
    return Header(tuple(size[i] for i in order), tuple(spacing[i] for i in order))


def header_problem(size: list[int], spacing: list[float], components: int, min_slices: int) -> str | None:
    """Why an image of this size (voxels), spacing (mm) and number of values per voxel is no CT volume, or None."""
    shown = " x ".join(map(str, size))
    if components > 1:
        return f"in colour ({components} values a voxel)"
    if len(size) > 3:
        return f"{len(size)}-D ({shown})"
    if len(size) < 3 or min(size) < 2:
        return f"2-D ({shown})"
    if min(size) < min_slices:
        return f"fewer than {min_slices} slices ({shown})"
    if not all(0 < s <= LARGEST_SPACING for s in spacing):
        return f"implausible spacing ({', '.join(f'{s:g}' for s in spacing)} mm)"
    return None


def _dicom_problem(reader: sitk.ImageFileReader) -> str | None:
    """Why a DICOM series is no CT in Hounsfield units, or None. The reader has read the header of one slice."""

    def tag(name: str) -> str:
        return reader.GetMetaData(name).strip() if reader.HasMetaDataKey(name) else ""

    if tag(MODALITY) != "CT":
        return f"not a CT (modality {tag(MODALITY) or 'unknown'})"
    if "LOCALIZER" in tag(IMAGE_TYPE).upper():
        return "a localiser"
    if not tag(INTERCEPT):
        return "no HU (no rescale intercept in the DICOM header)"
    return None


def _slice_gap(files: tuple[str, ...]) -> float | str:
    """Distance between the slices of a DICOM series in mm, or why they do not make a volume."""
    positions, normal = [], np.zeros(3)
    for file in files:
        try:
            reader = header_of(file)
            positions.append([float(v) for v in reader.GetMetaData(POSITION).split("\\")])
            rows = np.array([float(v) for v in reader.GetMetaData(ORIENTATION).split("\\")]).reshape(2, 3)
        except (RuntimeError, ValueError) as error:
            return f"slice {file} cannot be read or has no position ({last_line(error)})"
        normal = np.cross(*rows)
    steps = np.diff(np.array(positions), axis=0)
    along = np.abs(steps @ normal)
    gap = float(np.median(along))
    if gap < 1e-3:
        return "several slices at the same place"
    if np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max() > 0.05 * gap:
        return "slices are shifted against each other (gantry tilt)"
    for (before, after), step in zip(pairwise(files), along, strict=True):
        if abs(step - gap) > 0.05 * gap:
            return f"slices are missing: {step:.3g} mm instead of {gap:.3g} between {Path(before).name} and {after}"
    return gap


def damaged(path: Path) -> str | None:
    """Why a file is damaged, or None: it ends early, fails its checksum, or is NIfTI with NaN or infinite voxels.

    SimpleITK reads zeros in all these cases.
    """
    try:
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return _nifti_problem(path)
        check_gzip(path)
    except (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        return f"damaged ({last_line(error)})"
    return None


def _nifti_problem(path: Path) -> str | None:
    """Why a NIfTI file is incomplete or has voxels that are not finite, or None. Reads the file once, in parts."""
    image: Any = nibabel.load(path)
    dtype, missing = image.get_data_dtype(), math.prod(image.shape)
    with nibabel.openers.ImageOpener(str(path)) as file:
        file.read(image.dataobj.offset)
        while part := file.read((1 << 24) * dtype.itemsize):
            voxels = np.frombuffer(part[: missing * dtype.itemsize], dtype)
            missing -= len(voxels)
            if dtype.kind in "fc" and not np.isfinite(voxels).all():
                return NOT_FINITE
    return f"damaged (ends {missing} voxels early)" if missing > 0 else None


def voxel_problem(ct: np.ndarray) -> str | None:
    """Why voxels (Z, Y, X) are not those of a body in Hounsfield units, or None."""
    low, high = float(ct.min()), float(ct.max())
    if not np.isfinite([low, high]).all():  # min and max of an array with NaN are NaN
        return NOT_FINITE
    if low > HIGHEST_MINIMUM_HU:
        return f"no HU (values {low:g} to {high:g}: a label map, an MR, raw or cut-off values)"
    if np.count_nonzero(ct > BODY_HU) < SMALLEST_BODY * ct.size:
        return f"no body in it (values {low:g} to {high:g})"
    return None


def voxel_warnings(ct: np.ndarray) -> tuple[str, ...]:
    """What is doubtful about voxels (Z, Y, X) that are used all the same, a sentence each."""
    return ()


def last_line(error: Exception) -> str:
    """The last line of an error's message, at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[-1].split())[:200]
