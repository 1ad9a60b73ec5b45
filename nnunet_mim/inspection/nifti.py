"""Views as NIfTI files that lie over the CT they were cut from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.ct import Grid
from nnunet_mim.pretraining.report.pictures import LevelPicture


def write_views(
    pictures: Sequence[LevelPicture], grid: Grid, transpose_forward: Sequence[int], lowest: float, stem: Path
) -> list[Path]:
    """Write `STEM_level1_input.nii.gz`, …_masked, …_reconstruction, …_mask (1 = masked), and the same of each level.

    Args:
        pictures: of one case.
        grid: of the preprocessed volume that they were cut from.
        transpose_forward: order of its axes.
        lowest: intensity of masked voxels in …_masked, that of air.
        stem: folder and first part of the names.

    Returns:
        The written files.

    Raises:
        MiMError: a file cannot be written.
    """
    files = []
    for picture in pictures:
        parts: dict[str, np.ndarray] = {
            "input": picture.input.astype(np.float32),
            "masked": np.where(picture.mask, np.float32(lowest), picture.input).astype(np.float32),
            "reconstruction": picture.reconstruction.astype(np.float32),
            "mask": picture.mask.astype(np.uint8),
        }
        for part, values in parts.items():
            path = stem.with_name(f"{stem.name}_{picture.name}_{part}.nii.gz")
            image = as_image(values, grid.part(picture.start, picture.step), transpose_forward)
            try:
                sitk.WriteImage(image, str(path), True)
            except RuntimeError as error:
                raise MiMError(
                    f"cannot write {path}: free some disk space, or choose another folder with -o"
                ) from error
            files.append(path)
    return files


def as_image(values: np.ndarray, grid: Grid, transpose_forward: Sequence[int]) -> sitk.Image:
    """Turn an array in the axis order of preprocessed cases into an image in the axis order of the original."""
    backward = [int(axis) for axis in np.argsort(transpose_forward)]
    grid = grid.reordered(backward)  # z, y, x
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(backward)))
    columns = grid.steps[:, ::-1]
    spacing = np.linalg.norm(columns, axis=0)
    image.SetOrigin(grid.origin.tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns / spacing).flatten().tolist())
    return image
