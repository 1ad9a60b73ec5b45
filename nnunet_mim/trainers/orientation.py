"""How images are stored: which axis of an array is left-right."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_mim.raw_files import raw_files

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
