"""How images and arrays lie in the patient: the left-right axis, and turning arrays upright for pictures.

Upright is (z, y, x): z to the head, y to the back, x to the patient's left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.nnunet.datasets import raw_files
from nnunet_mim.nnunet.image_files import FileHeader, read_headers

REORIENTING = {"SimpleITKIO": "SimpleITKIOWithReorient", "NibabelIO": "NibabelIOWithReorient"}
"""nnU-Net's readers that turn every image to RAS, by those that leave it as it is"""

MIRRORING_IS_OFF = (
    "WARNING: images are not all stored in axial slices, so that mirroring could exchange left and right: none in the "
    "recipe (mim_prepare turns images; stock nnU-Net mirrors all axes)"
)


def _left_right_axes(images: Iterable[Path]) -> set[int]:
    """Array axes (z, y, x as nnU-Net reads them) that run along left-right in the first 50 images.

    It is {2} for images stored in axial slices. Unreadable and 2-D images are skipped: nnU-Net itself reports them.
    """
    headers = read_headers([str(path) for path in islice(images, 50)], 1)
    found = set()
    for header in headers:
        if isinstance(header, FileHeader) and len(header.size) == 3:
            left_right = np.abs(np.reshape(header.direction, (3, 3))[0])  # share in the steps along x, y, z
            found.add(2 - int(left_right.argmax()))
    return found


def mirroring_is_unsafe(raw: Path, dataset_json: dict[str, Any]) -> bool:
    """Whether the default mirroring axes would exchange left and right, as some images are not in axial slices.

    `raw` is the dataset's folder in nnUNet_raw; where it is gone the answer is False.
    """
    if "dataset" in dataset_json:
        images = [Path(case["images"][0]) for case in raw_files(raw, dataset_json).values() if case["images"]]
    else:
        images = sorted((raw / "imagesTr").glob(f"*_0000{dataset_json['file_ending']}"))
    return not _left_right_axes(images) <= {2}


@dataclass(frozen=True)
class Orientation:
    """How to turn arrays of nnU-Net's preprocessed cases upright."""

    axes: tuple[int, int, int] = (0, 1, 2)
    """array axes nearest to foot–head, front–back and right–left"""
    flipped: tuple[bool, bool, bool] = (False, False, False)
    """whether each of these runs the other way"""

    def array(self, volume: np.ndarray) -> np.ndarray:
        """A volume, turned to (Z, Y, X)."""
        turned = volume.transpose(self.axes)
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)]

    def triple(self, values: Sequence[float]) -> tuple[float, float, float]:
        """One number per axis, such as the spacing, in the order (z, y, x)."""
        return tuple(float(values[axis]) for axis in self.axes)  # type: ignore[return-value]

    def box(self, box: Sequence[slice], shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """A box of voxels, turned; box and shape of its volume are those before turning."""
        turned = []
        for axis, flip in zip(self.axes, self.flipped, strict=True):
            low, high = box[axis].start, box[axis].stop
            turned.append(slice(shape[axis] - high, shape[axis] - low) if flip else slice(low, high))
        return tuple(turned)  # type: ignore[return-value]


def orientation_of(transpose_forward: Sequence[int], direction: np.ndarray | None = None) -> Orientation:
    """Orientation of preprocessed cases, from the order of axes in the plans and the direction of the image.

    Array axis i of a case is axis transpose_forward[i] of the image read as (z, y, x). The columns of the direction
    (3, 3) are where the image's axes x, y, z point in the patient (left, back, head), as in SimpleITK; None: identity.
    """
    columns = np.eye(3) if direction is None else np.asarray(direction, dtype=float).reshape(3, 3)
    order = list(transpose_forward) or [0, 1, 2]
    along = columns[:, ::-1][:, order]  # column i: where array axis i points
    anatomy = along[::-1]  # rows: to the head, to the back, to the left
    axes = max(permutations(range(3)), key=lambda p: sum(abs(anatomy[row, axis]) for row, axis in enumerate(p)))
    flipped = tuple(bool(anatomy[row, axis] < 0) for row, axis in enumerate(axes))
    return Orientation(axes, flipped)  # type: ignore[arg-type]


def direction_of(properties: Mapping[str, Any]) -> np.ndarray | None:
    """Direction (3, 3) of the image of a preprocessed case; None if nnU-Net's reader has not kept it."""
    if direction := properties.get("sitk_stuff", {}).get("direction"):
        return np.array(direction, dtype=float).reshape(3, 3) if len(direction) == 9 else None
    stuff = properties.get("nibabel_stuff", {})
    affine = stuff.get("reoriented_affine", stuff.get("original_affine"))
    if affine is None:
        return None
    columns = np.asarray(affine, dtype=float)[:3, :3]
    to_lps = np.diag([-1.0, -1.0, 1.0])  # from NIfTI's right, anterior, superior
    return to_lps @ (columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-12))
