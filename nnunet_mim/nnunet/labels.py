"""Labels of cases, and masks: whole numbers, such as dataset.json declares, on the grid of their image.

Voxel (i, j, k) of a label belongs to voxel (i, j, k) of its image, whatever the headers say, as nnU-Net takes them. Its
readers that reorient would turn each by its own header.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.image_files import DIRECTION_COSINE, ORIGIN_MM, header_of, write_image
from nnunet_mim.system.files import write_atomically

ROUNDING = 1e-3
"""maximum distance of a label's voxels from a whole number, where a tool has stored them as decimals"""


def declared_values(dataset_json: Mapping[str, Any], file: Path) -> list[int]:
    """The label values that a dataset.json declares, by nnU-Net's rules; the one to ignore is among them.

    Raises MiMError, with the name of the file, where nnU-Net would not accept them.
    """
    try:
        manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    except (AssertionError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise MiMError(f"labels in {file} are not as nnU-Net wants them ({error!r}): correct the file") from error
    values = [*map(int, manager.all_labels)] + ([manager.ignore_label] if manager.has_ignore_label else [])
    if values != list(range(len(values))):
        raise MiMError(f"labels in {file} have the values {values}, nnU-Net wants 0, 1, 2, …: number them anew")
    return values


def geometry_differences(label: str | Path, image: str | Path) -> dict[str, str]:
    """How the grid of a label differs from that of its image, from both headers.

    Returns the differences in words, by "size", "spacing", "origin" and "direction". Raises RuntimeError where
    SimpleITK cannot read a header.
    """
    own, other = header_of(label), header_of(image)
    if own.GetSize() != other.GetSize():
        size, size_of_image = (" x ".join(map(str, header.GetSize())) for header in (own, other))
        return {"size": f"has {size} voxels, its image {size_of_image} (x, y, z)"}
    found = {}
    if not np.allclose(own.GetSpacing(), other.GetSpacing()):
        found["spacing"] = f"has spacing {_mm(own.GetSpacing())}, its image {_mm(other.GetSpacing())} (x, y, z)"
    if not np.allclose(own.GetOrigin(), other.GetOrigin(), rtol=0, atol=ORIGIN_MM):
        found["origin"] = f"has origin {_mm(own.GetOrigin())}, its image {_mm(other.GetOrigin())} (x, y, z)"
    letters, letters_of_image = _axes(own), _axes(other)
    alike = np.allclose(own.GetDirection(), other.GetDirection(), rtol=0, atol=DIRECTION_COSINE)
    if not alike or letters != letters_of_image:
        found["direction"] = f"has another direction than its image ({letters}, its image {letters_of_image})"
    return found


def read_label(
    reader: Any, label: str, image: str, values: Collection[int] | None, scratch: str
) -> tuple[np.ndarray, list[str]] | str:
    """A label as nnU-Net's reader gives it once it has the geometry of its image, or why it cannot be used.

    Args:
        reader: of nnU-Net, the same that reads the image.
        label, image: files.
        values: that may occur; None: all whole numbers.
        scratch: path without ending for a temporary copy of the label.

    Returns:
        (1, Z, Y, X) int16, and a sentence for each difference between the headers.
    """
    differences = geometry_differences(label, image)
    if "size" in differences:
        return f"label {differences['size']}: {label}"
    warnings = [f"label {text}: taken voxel by voxel, as nnU-Net does" for text in differences.values()]
    source = label
    if "direction" in differences:
        source = f"{scratch}_label.nii.gz"
        write_like_image(Path(label), Path(image), Path(source))
    voxels = whole_numbers(reader.read_seg(source)[0], values)
    return f"{voxels}: {label}" if isinstance(voxels, str) else (voxels, warnings)


def whole_numbers(voxels: np.ndarray, values: Collection[int] | None) -> np.ndarray | str:
    """The voxels of a label as int16, or why they cannot be used; float voxels are rounded in place.

    `values` are those that may occur, None: all that fit. Nothing is further than ROUNDING from what it becomes.
    """
    found = np.sort(pd.unique(voxels.reshape(-1)))
    if values is None:
        largest = np.iinfo(np.int16).max
        unknown = [v for v in found if not (abs(v) <= largest and abs(v - np.rint(v)) <= ROUNDING)]
        what = f"that are no whole numbers up to {largest}"
    else:
        unknown = [value for value in found if not any(abs(value - known) <= ROUNDING for known in values)]
        what = "that dataset.json does not declare"
    if unknown:
        shown = ", ".join(f"{value:.6g}" for value in unknown[:5]) + (", …" if len(unknown) > 5 else "")
        return f"label with values {what} ({shown})"
    if voxels.dtype.kind == "f":
        np.rint(voxels, out=voxels)
    return voxels.astype(np.int16)


def write_reference(label: Path, image: Path, target: Path) -> None:
    """Write the label that nnU-Net's validation compares predictions with, unless it is there.

    It is a copy of the label, or, where that would be turned against its image or holds no whole numbers, one with the
    geometry of the image. Raises MiMError where it cannot be written.
    """
    try:
        if target.is_file() and target.stat().st_mtime >= os.stat(label).st_mtime and _fits(target, image):
            return
        if _fits(label, image):
            write_atomically(target, label.read_bytes())
        else:
            write_like_image(label, image, target)
    except (OSError, RuntimeError) as error:  # SimpleITK's errors are RuntimeErrors
        reason = " ".join(str(error).split())
        raise MiMError(f"cannot write {target} ({reason}): free space, then repeat the command") from error


def write_like_image(label: Path, image: Path, target: Path) -> None:
    """Write a label with the geometry of its image, voxel by voxel, and whole numbers. Raises OSError, RuntimeError."""
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
    made = sitk.GetImageFromArray(np.rint(voxels).astype(np.int16) if voxels.dtype.kind == "f" else voxels)
    geometry = header_of(image)
    made.SetSpacing(geometry.GetSpacing())
    made.SetOrigin(geometry.GetOrigin())
    made.SetDirection(geometry.GetDirection())
    write_image(made, target)


def _fits(label: Path, image: Path) -> bool:
    """Whether a label has the direction of its image, and whole numbers."""
    stored = sitk.GetPixelIDValueAsString(header_of(label).GetPixelIDValue())
    return "float" not in stored and "direction" not in geometry_differences(label, image)


def _axes(header: sitk.ImageFileReader) -> str:
    """Where the axes of an image point to, such as RAS."""
    return str(sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(header.GetDirection()))


def _mm(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)}) mm"
