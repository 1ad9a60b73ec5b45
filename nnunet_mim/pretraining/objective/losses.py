"""The losses of MiM, pure functions of tensors. Reference twins, written as loops, are in tests/reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANCE_EPS = 1e-6


def full(x: Tensor) -> Tensor:
    """At least float32: losses are not computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def normalize_tokens(tokens: Tensor) -> Tensor:
    """Subtract each token's mean and divide by sqrt(unbiased variance + 1e-6): (..., P) → (..., P)."""
    variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
    return (tokens - mean) / (variance + VARIANCE_EPS).sqrt()


def flat_tokens(tokens: Tensor, thresholds: Tensor) -> Tensor:
    """Which tokens (..., P), raw voxels with the channel last, are too uniform to be a target (air).

    Returns:
        (...) bool, True = flat: in every channel the unbiased standard deviation is below its threshold (C,).
    """
    channels = tokens.unflatten(-1, (-1, thresholds.shape[0]))  # (..., voxels, C)
    return (channels.std(dim=-2) < thresholds).all(dim=-1)


def reconstruction_loss(
    prediction: Tensor, tokens: Tensor, is_target: Tensor, n_targets: Tensor | None = None
) -> Tensor:
    """Mean squared error against normalised voxels, over target tokens.

    Args:
        prediction: (N, M, P).
        tokens: (N, M, P) raw voxels of the same tokens.
        is_target: (N, M) bool, True = counts. No target at all gives 0.
        n_targets: number of targets that the mean is over, where these views are a part of them; None: those here.
    """
    error = F.mse_loss(full(prediction), normalize_tokens(full(tokens)), reduction="none").mean(dim=-1)
    weight = is_target.to(error.dtype)
    total = weight.sum() if n_targets is None else n_targets.to(error.dtype)
    return (error * weight).sum() / total.clamp(min=1)


@torch.no_grad()
def voxel_error(prediction: Tensor, tokens: Tensor, is_target: Tensor, width: Tensor) -> Tensor:
    """Squared error of the voxels themselves, each token's true mean and standard deviation put back: sum over target
    tokens of the mean squared error, in units of the intensity window's width (C,). The peak signal-to-noise ratio in
    dB is -10 log10 of its mean. Other arguments as in `reconstruction_loss`.
    """
    tokens = full(tokens)
    spread = (tokens.var(dim=-1, keepdim=True) + VARIANCE_EPS).sqrt()
    error = (full(prediction) - normalize_tokens(tokens)) * spread
    error = error.unflatten(-1, (-1, width.shape[0])) / width  # (N, M, voxels, C)
    return (error.square().mean(dim=(-1, -2)) * is_target).sum()


def infonce_loss(
    child: Tensor, parent: Tensor, target: Tensor, weight: Tensor, temperature: float, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Contrast each child with all places of all parents (InfoNCE, arXiv 1807.03748).

    Args:
        child: (N, D) projected child features.
        parent: (Q, D) projected features of all places of all parents.
        target: (N,) int64, the row of `parent` a child was cut from.
        weight: (N,) float; a child outside the volume has 0.
        temperature: divides cosine similarities.
        total: sum of the weights that the mean is over, where these children are a part of them; None: of those here.

    Returns:
        weighted mean cross-entropy, and the share of children whose own place is the most similar one.
    """
    logits = F.normalize(full(child), dim=-1) @ F.normalize(full(parent), dim=-1).T / temperature
    total = (weight.sum() if total is None else total).clamp(min=1)
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / total
    accuracy = ((logits.argmax(dim=1) == target) * weight).sum() / total
    return loss, accuracy


def cosine_loss(child: Tensor, parent: Tensor, target: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
    """2 − 2·cosine between each projected child and the raw feature of its own place; arguments as in
    `infonce_loss`.
    """
    similarity = F.cosine_similarity(full(child), full(parent)[target], dim=-1)
    return ((2 - 2 * similarity) * weight).sum() / (weight.sum() if total is None else total).clamp(min=1)
