"""nnU-Net's default resampling of images in bounded memory, with the same result up to rounding.

Spline interpolation is a linear map along each axis in turn, so a small matrix per axis, made with SciPy's `zoom`, does
it. nnU-Net resamples all axes at once in float64, with several copies of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from batchgenerators.augmentations.utils import resize_segmentation
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from scipy.ndimage import zoom

SLICES_AT_ONCE = 16


class LeanConfiguration(ConfigurationManager):
    """A configuration whose default resampling needs less memory; other resampling is left as it is."""

    @property
    def resampling_fn_data(self) -> Any:
        return _resample_image if self._is_default("data", is_seg=False, order=3) else super().resampling_fn_data

    @property
    def resampling_fn_seg(self) -> Any:
        stock, default = super().resampling_fn_seg, self._is_default("seg", is_seg=True, order=1)

        def resample(seg: np.ndarray, new_shape: Sequence[int], *spacings: Any) -> np.ndarray:
            if not default or determine_do_sep_z_and_axis(None, *spacings)[0]:
                return stock(seg, new_shape, *spacings)
            return _resample_outside(seg, new_shape) if seg.max() <= 0 else _resample_labels(seg, new_shape)

        return resample

    def _is_default(self, kind: str, **kwargs: Any) -> bool:
        name, given = (self.configuration[f"resampling_fn_{kind}{ending}"] for ending in ("", "_kwargs"))
        kwargs |= {"order_z": 0, "force_separate_z": None}
        return name == resample_data_or_seg_to_shape.__name__ and given == kwargs


def _resample_image(
    image: np.ndarray, new_shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> np.ndarray:
    """Resample images like nnU-Net's `resample_data_or_seg_to_shape` with its default settings.

    That is cubic splines, but the nearest slice along an axis with much larger spacing (mm) than the others.
    (C, X, Y, Z) float32 → (C, *new_shape) float32.
    """
    if tuple(image.shape[1:]) == tuple(new_shape):
        return image
    separate, axis = determine_do_sep_z_and_axis(None, spacing, new_spacing)
    result = np.empty((image.shape[0], *new_shape), image.dtype)
    for channel, volume in zip(result, image, strict=True):
        if separate:
            channel[:] = _slice_by_slice(volume, tuple(new_shape), int(axis))
        else:
            channel[:] = _along_axes(volume, tuple(new_shape), (0, 1, 2))
            np.clip(channel, volume.min(), volume.max(), out=channel)
    return result


def _resample_outside(seg: np.ndarray, new_shape: Sequence[int]) -> np.ndarray:
    """Resample the segmentation of a case without labels, where nnU-Net marks voxels outside the image with -1.

    The mask is interpolated linearly, as nnU-Net does, a few slices at a time. (1, X, Y, Z) integer, 0 and -1 →
    (1, *new_shape) of the same type.
    """
    if tuple(seg.shape[1:]) == tuple(new_shape):
        return seg
    result = np.zeros((1, *new_shape), seg.dtype)
    if not seg.any():
        return result
    across, rows, columns = (_spline_matrix(n, m, 1) for n, m in zip(seg.shape[1:], new_shape, strict=True))
    for first in range(0, new_shape[0], SLICES_AT_ONCE):
        part = across[first : first + SLICES_AT_ONCE]
        used = np.flatnonzero(part.any(axis=0))
        low, high = used[0], used[-1] + 1
        outside = rows @ (seg[0, low:high] < 0).astype(np.float64) @ columns.T
        result[0, first : first + SLICES_AT_ONCE][np.tensordot(part[:, low:high], outside, 1) > 0.5] = -1
    return result


def _resample_labels(seg: np.ndarray, new_shape: Sequence[int]) -> np.ndarray:
    """Resample labels (C, X, Y, Z) to (C, *new_shape) as nnU-Net does where no axis has much larger spacing than the
    others, without a copy of the whole volume in float64.
    """
    if tuple(seg.shape[1:]) == tuple(new_shape):
        return seg
    return np.stack([resize_segmentation(channel, tuple(new_shape), 1) for channel in seg])


def _slice_by_slice(volume: np.ndarray, new_shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Resample each slice within the range of its own values, then take the nearest slices."""
    in_plane = tuple(a for a in range(3) if a != axis)
    limits = volume.min(in_plane, keepdims=True), volume.max(in_plane, keepdims=True)
    resized = _along_axes(volume, new_shape, in_plane)
    np.clip(resized, *limits, out=resized)
    old, new = volume.shape[axis], new_shape[axis]
    places = np.floor((np.arange(new) + 0.5) * (old / new) - 0.5 + 0.5).astype(np.int64)
    return resized.take(places.clip(0, old - 1), axis)


def _along_axes(volume: np.ndarray, new_shape: tuple[int, ...], axes: Sequence[int]) -> np.ndarray:
    for axis in sorted(axes, key=lambda a: new_shape[a] / volume.shape[a]):  # the axis that shrinks most first
        matrix = _spline_matrix(volume.shape[axis], new_shape[axis]).astype(np.float32)
        if axis == 0:
            volume = (matrix @ volume.reshape(volume.shape[0], -1)).reshape(-1, *volume.shape[1:])
        elif axis == 1:
            volume = matrix @ volume
        else:
            volume = volume @ matrix.T
    return volume


@lru_cache(maxsize=16)
def _spline_matrix(old: int, new: int, order: int = 3) -> np.ndarray:
    """Matrix (new, old) that interpolates `old` values with splines of this order at the centres of `new` equal parts.

    Beyond the edges values are constant.
    """
    if old == 1:
        return np.ones((new, 1))
    columns = [zoom(unit, new / old, order=order, mode="nearest", grid_mode=True) for unit in np.eye(old)]
    return np.stack(columns, axis=1)
