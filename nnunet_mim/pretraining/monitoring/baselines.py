"""Trivial predictors that a pretrained network must beat, computed on the same target tokens as its loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnunet_mim.pretraining.objective.losses import normalize_tokens, reconstruction_loss, voxel_error
from nnunet_mim.pretraining.objective.views import LevelViews


def trivial_losses(view: LevelViews, is_target: Tensor, width: Tensor) -> dict[str, tuple[float, float]]:
    """Reconstruction loss and `voxel_error` (means over target tokens) of two trivial predictors: `token_mean` predicts
    0, the token's own mean; `infill` predicts `infill_tokens`, normalised like the target.

    Args:
        view: views of one level.
        is_target: (N, M) bool, True = counts in the loss.
        width: (C,) of the intensity window.
    """
    tokens = view.masked_tokens()
    predictions = {"token_mean": torch.zeros_like(tokens), "infill": normalize_tokens(infill_tokens(view))}
    return {
        name: (
            float(reconstruction_loss(prediction, tokens, is_target)),
            float(voxel_error(prediction, tokens, is_target, width) / is_target.sum().clamp(min=1)),
        )
        for name, prediction in predictions.items()
    }


def infill_tokens(view: LevelViews) -> Tensor:
    """Fill every masked token from its nearest visible tokens.

    The distance is between token centres, in voxels of the view. Each voxel of the masked token takes the value of the
    voxel of the visible token that is nearest to it; several visible tokens at the same distance are averaged.

    Returns:
        (N, M, P), voxels of the masked tokens: C order, channel last.
    """
    level = view.level
    size = np.array(level.token_size)
    positions = np.stack(np.unravel_index(np.arange(level.n_tokens), level.grid), axis=-1)
    images = view.images.permute(0, 2, 3, 4, 1).cpu().numpy()
    filled = []
    for image, keep, masked in zip(images, view.ids_keep.cpu().numpy(), view.ids_masked.cpu().numpy(), strict=True):
        for token in masked:
            distance = np.square((positions[keep] - positions[token]) * size).sum(axis=1)
            nearest = positions[keep[distance == distance.min()]]
            filled.append(np.mean([_nearest_voxels(image, positions[token], v, size) for v in nearest], axis=0))
    return torch.from_numpy(np.stack(filled)).reshape(*view.ids_masked.shape, -1).to(view.images)


def _nearest_voxels(image: np.ndarray, token: np.ndarray, visible: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(P,) for each voxel of `token` the nearest voxel of `visible`; image is (X, Y, Z, C)."""
    first, lowest = token * size, visible * size
    voxels = [np.clip(np.arange(f, f + n), low, low + n - 1) for f, low, n in zip(first, lowest, size, strict=True)]
    return image[np.ix_(*voxels)].reshape(-1)
