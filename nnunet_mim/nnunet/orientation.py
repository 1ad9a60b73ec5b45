"""How images and arrays lie in the patient: which axis is left-right, and how pictures are turned upright.

Pictures want (z, y, x): z to the head, y to the back, x to the patient's left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_mim.nnunet.datasets import raw_files

REORIENTING = {"SimpleITKIO": "SimpleITKIOWithReorient", "NibabelIO": "NibabelIOWithReorient"}
"""nnU-Net's readers that turn every image to the same orientation (RAS), by those that leave it as it is"""

MIRRORING_IS_OFF = (
    "WARNING: images are not all stored in axial slices, so that mirroring could exchange left and right: none in the "
    "recipe (mim_prepare turns images; stock nnU-Net mirrors all axes)"
)

MOST_IMAGES = 50
"""whose headers are read; a dataset is stored one way, as a rule"""


def left_right_axes(images: Iterable[Path]) -> set[int]:
    """Axes of arrays (z, y, x as nnU-Net reads them) that run from right to left in the first images.

    Images stored in axial slices have it last: {2}. What SimpleITK cannot read, or is not 3-D, is passed over: nnU-Net
    itself says what is wrong with it.
    """
    found = set()
    for path in islice(images, MOST_IMAGES):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            continue
        if reader.GetDimension() == 3:
            to_left = np.abs(np.reshape(reader.GetDirection(), (3, 3))[0])  # of the steps along x, y, z
            found.add(2 - int(to_left.argmax()))
    return found


def mirroring_is_unsafe(raw: Path, dataset_json: dict[str, Any]) -> bool:
    """Whether the default mirroring axes, which are for images stored in axial slices, would exchange left and right.

    Args:
        raw: the dataset in nnUNet_raw; nothing is known where it is gone.
        dataset_json: its content.
    """
    if "dataset" in dataset_json:
        images = [Path(case["images"][0]) for case in raw_files(raw, dataset_json).values() if case["images"]]
    else:
        images = sorted((raw / "imagesTr").glob(f"*_0000{dataset_json['file_ending']}"))
    return not left_right_axes(images) <= {2}

TO_LPS = np.diag([-1.0, -1.0, 1.0])
"""from NIfTI's axes, which point to right, anterior, superior"""


@dataclass(frozen=True)
class Orientation:
    """How to turn arrays in the order of nnU-Net's preprocessed cases for a picture."""

    axes: tuple[int, int, int] = (0, 1, 2)
    """array axes that lie nearest to foot–head, front–back and right–left"""
    flipped: tuple[bool, bool, bool] = (False, False, False)
    """which of these run the other way"""

    def array(self, volume: np.ndarray) -> np.ndarray:
        """A volume (three axes) as (z, y, x)."""
        turned = volume.transpose(self.axes)
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)]

    def triple(self, values: Sequence[float]) -> tuple[float, float, float]:
        """One number an axis, e.g. the spacing, in the order (z, y, x)."""
        return tuple(float(values[axis]) for axis in self.axes)  # type: ignore[return-value]

    def box(self, box: Sequence[slice], shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """A box of voxels of a volume of `shape` (both before turning)."""
        turned = []
        for axis, flip in zip(self.axes, self.flipped, strict=True):
            low, high = box[axis].start, box[axis].stop
            turned.append(slice(shape[axis] - high, shape[axis] - low) if flip else slice(low, high))
        return tuple(turned)  # type: ignore[return-value]


def orientation_of(transpose_forward: Sequence[int], direction: np.ndarray | None = None) -> Orientation:
    """From the plans' order of axes and the direction of the image.

    Args:
        transpose_forward: array axis i of a preprocessed case is axis transpose_forward[i] of the image read as (z, y,
            x).
        direction: (3, 3), columns are the directions of the image's index axes x, y, z in the patient (to left, back,
            head), as in SimpleITK. None: the identity.
    """
    columns = np.eye(3) if direction is None else np.asarray(direction, dtype=float).reshape(3, 3)
    order = list(transpose_forward) or [0, 1, 2]
    along = columns[:, ::-1][:, order]  # column i: where array axis i points
    anatomy = along[::-1]  # rows: to the head, to the back, to the left
    axes = max(permutations(range(3)), key=lambda p: sum(abs(anatomy[row, axis]) for row, axis in enumerate(p)))
    flipped = tuple(bool(anatomy[row, axis] < 0) for row, axis in enumerate(axes))
    return Orientation(axes, flipped)  # type: ignore[arg-type]


def direction_of(properties: Mapping[str, Any]) -> np.ndarray | None:
    """Direction (3, 3) of a preprocessed case from what nnU-Net's readers keep of the image; None if they keep none."""
    if direction := properties.get("sitk_stuff", {}).get("direction"):
        return np.array(direction, dtype=float).reshape(3, 3) if len(direction) == 9 else None
    stuff = properties.get("nibabel_stuff", {})
    affine = stuff.get("reoriented_affine", stuff.get("original_affine"))
    if affine is None:
        return None
    columns = np.asarray(affine, dtype=float)[:3, :3]
    return TO_LPS @ (columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-12))
