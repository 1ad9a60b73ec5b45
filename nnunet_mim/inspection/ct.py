"""Image files as a pretrained network expects them: read with SimpleITK, preprocessed by nnU-Net's own code."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.image_files import case_name, check_gzip


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an array with three axes lie in the patient, in SimpleITK's axes (to left, back, head)."""

    origin: np.ndarray
    """(3,) mm, centre of voxel (0, 0, 0)"""
    steps: np.ndarray
    """(3, 3) mm, column i: from one voxel to the next along array axis i"""

    def part(self, first: Sequence[float], step: Sequence[float]) -> Grid:
        """Grid of larger or smaller voxels that fill the same space.

        Args:
            first: voxel at whose lower corner the new grid starts; may be fractional or negative.
            step: width of a new voxel in voxels of this grid, per axis.
        """
        centre = np.asarray(first, float) + 0.5 * np.asarray(step, float) - 0.5
        return Grid(self.origin + self.steps @ centre, self.steps * np.asarray(step, float))

    def reordered(self, axes: Sequence[int]) -> Grid:
        """Grid of the array after `array.transpose(axes)`."""
        return Grid(self.origin, self.steps[:, list(axes)])


@dataclass(frozen=True)
class RawImage:
    """One image of one or several channels."""

    name: str
    voxels: np.ndarray
    """(C, Z, Y, X) float32"""
    grid: Grid
    """place of every channel, axes z, y, x"""

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres between voxels along z, y, x."""
        return np.linalg.norm(self.grid.steps, axis=0)

    @property
    def direction(self) -> np.ndarray:
        """Direction matrix (3, 3) as in SimpleITK: columns for x, y, z."""
        return (self.grid.steps / self.spacing)[:, ::-1]


def read_image(paths: Sequence[Path]) -> RawImage:
    """Read the channels of one case, one file per channel, all of the same size and place.

    Raises MiMError for a file that is missing, unreadable, no volume, in colour, not finite or all 0.
    """
    images = [_read(path) for path in paths]
    first = images[0]
    for path, image in zip(paths, images, strict=True):
        same_spacing = np.allclose(image.GetSpacing(), first.GetSpacing(), rtol=1e-3)
        same_origin = np.allclose(image.GetOrigin(), first.GetOrigin(), atol=0.1)
        if image.GetSize() != first.GetSize() or not (same_spacing and same_origin):
            raise MiMError(f"{path} has another size, spacing or origin than {paths[0]}: channels must fit")
    voxels = np.stack([sitk.GetArrayFromImage(image) for image in images]).astype(np.float32)
    if not np.isfinite(voxels).all():
        raise MiMError(f"{paths[0]} holds NaN or infinite voxels: correct the image")
    if not voxels.any():
        raise MiMError(f"{paths[0]} holds nothing but zeros: give a CT in Hounsfield units")
    direction = np.array(first.GetDirection()).reshape(3, 3)
    steps = (direction * np.array(first.GetSpacing()))[:, ::-1]
    return RawImage(case_name(paths[0]), voxels, Grid(np.array(first.GetOrigin()), steps))


def _read(path: Path) -> sitk.Image:
    if not path.is_file():
        raise MiMError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give NIfTI, NRRD or MHA files")
    try:
        check_gzip(path)
        image = sitk.ReadImage(str(path))
    except (RuntimeError, OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).strip().splitlines()[-1].split())
        raise MiMError(f"cannot read {path} as an image ({reason}): give NIfTI, NRRD or MHA") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise MiMError(f"{path} has {image.GetNumberOfComponentsPerPixel()} values a voxel (colour): give a grey CT")
    if image.GetDimension() != 3 or min(image.GetSize()) < 2:
        size = " × ".join(map(str, image.GetSize()))
        raise MiMError(f"{path} is no volume (size {size}): give a 3-D CT")
    return image


def preprocess(
    image: RawImage, provenance: Mapping[str, Any], spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, Grid]:
    """Let nnU-Net prepare an image as it prepared the cases of a pretraining: axes, crop, intensities, spacing.

    Args:
        provenance: of the checkpoint.
        spacing: mm along the network's axes, used if the checkpoint states none. None: the image's own.

    Returns:
        (C, X, Y, Z) normalised voxels, and their place.
    """
    forward = order_of_axes(provenance)
    own = [float(image.spacing[axis]) for axis in forward]
    target = [float(s) for s in provenance["spacing"] or spacing or own]
    plans, name = _plans(provenance, forward, target), provenance["configuration"]
    properties: dict[str, Any] = {"spacing": [float(s) for s in image.spacing]}
    try:
        manager = PlansManager(plans)
        voxels, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
            image.voxels, None, properties, manager, manager.get_configuration(name), {}
        )
    except (RuntimeError, ValueError, IndexError, KeyError, MemoryError) as error:
        raise MiMError(f"nnU-Net cannot prepare {image.name} ({type(error).__name__}: {error})") from error
    low = [float(bounds[0]) for bounds in properties["bbox_used_for_cropping"]]
    before = properties["shape_after_cropping_and_before_resampling"]
    step = [a / b for a, b in zip(before, voxels.shape[1:], strict=True)]
    return voxels, image.grid.reordered(forward).part(low, step)


def order_of_axes(provenance: Mapping[str, Any]) -> list[int]:
    """`transpose_forward` of the pretraining's plans; the image's own order if the checkpoint does not state it."""
    return [int(axis) for axis in provenance.get("transpose_forward", (0, 1, 2))]


def _plans(provenance: Mapping[str, Any], forward: list[int], spacing: list[float]) -> dict[str, Any]:
    """The part of nnU-Net's plans that its preprocessing reads, with nnU-Net's default resampling."""
    channels, resample = provenance["normalization"], "resample_data_or_seg_to_shape"
    options = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "spacing": spacing,
        "normalization_schemes": list(channels),
        "use_mask_for_norm": [False] * len(channels),
        "architecture": {},
        "resampling_fn_data": resample,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **options},
        "resampling_fn_seg": resample,
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **options},
    }
    return {
        "transpose_forward": forward,
        "transpose_backward": np.argsort(forward).tolist(),
        "foreground_intensity_properties_per_channel": provenance["intensity_properties"],
        "configurations": {provenance["configuration"]: configuration},
    }
