"""Writes a map of a preprocessed case as an image in the geometry of the raw one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.nnunet.image_files import write_image
from nnunet_mim.nnunet.source import Source


def write_map(values: np.ndarray, properties: Mapping[str, Any], source: Source, path: Path) -> None:
    """Write a map on the voxels of the raw image.

    Args:
        values: (X, Y, Z) float32 of a preprocessed case.
        properties: what nnU-Net's preprocessing has recorded of it.
        source: dataset and plans that it was preprocessed with.
        path: NIfTI file; its folder is made.

    Raises:
        OSError, RuntimeError: the file cannot be written.
    """
    raw = in_raw_geometry(values, properties, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "sitk_stuff" in properties:
        write_image(_of_sitk(raw, properties["sitk_stuff"]), path)
    else:
        nib.save(_of_nibabel(raw, properties["nibabel_stuff"]), path)


def in_raw_geometry(values: np.ndarray, properties: Mapping[str, Any], source: Source) -> np.ndarray:
    """A map (X, Y, Z) of a preprocessed case on the voxels of the raw image as nnU-Net reads it, 0 outside the crop."""
    plans = PlansManager(source.plans)
    configuration = plans.get_configuration(source.configuration)
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    resampled = configuration.resampling_fn_probabilities(values[None], shape, configuration.spacing, spacing)
    whole = np.zeros(properties["shape_before_cropping"], np.float32)
    whole[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])] = np.asarray(resampled)[0]
    return whole.transpose(plans.transpose_backward)


def _of_sitk(array: np.ndarray, stuff: Mapping[str, Any]) -> sitk.Image:
    """What SimpleITKIO.write_seg does, in float32; turned back where the reader has turned the image."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(stuff["spacing"])
    image.SetOrigin(stuff["origin"])
    image.SetDirection(stuff["direction"])
    turned = stuff.get("original_orientation")
    return sitk.DICOMOrient(image, turned) if turned else image


def _of_nibabel(array: np.ndarray, stuff: Mapping[str, Any]) -> nib.Nifti1Image:
    """Likewise for nnU-Net's readers that use nibabel."""
    image = nib.Nifti1Image(array.transpose(2, 1, 0), stuff.get("reoriented_affine", stuff["original_affine"]))
    if "reoriented_affine" not in stuff:
        return image
    to = nib.orientations.io_orientation(stuff["original_affine"])
    return image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to))
