"""Images as a pretrained network expects them: preprocessed by nnU-Net's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.components import check_name
from nnunet_mim.nnunet.raw_image import Grid, RawImage


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
    for scheme in channels:
        check_name("the checkpoint's normalization", "normalization", scheme, "take another copy of it")
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
