"""Masked depthwise convolution on a CPU, forward and both gradients as forward convolutions of oneDNN.

oneDNN's forward depthwise kernel is fast in channels-last layout; its gradient kernels are 4 to 10 times slower
(benchmarks/results/depthwise_cpu.md). The input gradient is the same convolution with the flipped kernel. The weight
gradient is a convolution too: each box of the output gradient, taken as the kernel, slides over the input around that
box, and what comes out are its 5x5x5 sums. Boxes are tokens (or parts of them), so masked voxels cost nothing; a few
boxes at a time go into one call, each with its channels as groups of their own, so that the data stays in the cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_mim.config import Size3
from nnunet_mim.networks.token_layout import grid_from_rows, rows_from_grid, tokens_from_grid, voxel_rows

LARGEST_BOX = 8
"""voxels per axis of a box of the weight gradient"""
BYTES_PER_CALL = 1_200_000
"""input voxels of the boxes in one call: about the second-level cache of a core"""


class MaskedDepthwise(torch.autograd.Function):
    """Depthwise convolution of visible tokens; masked voxels count as zero. See `masked_depthwise`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, ids_keep: Tensor, grid: Size3) -> Tensor:  # type: ignore[no-untyped-def, override]
        x = x.contiguous()
        ctx.save_for_backward(x, weight, ids_keep)
        ctx.grid = grid
        return _convolve(x, weight, bias, ids_keep, grid)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        x, weight, ids_keep = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve(grad, weight.flip(2, 3, 4), None, ids_keep, ctx.grid)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, grad, ids_keep, ctx.grid, weight.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, 4).sum(dim=0)
        return grad_x, grad_weight, grad_bias, None, None


def masked_depthwise(x: Tensor, weight: Tensor, bias: Tensor, ids_keep: Tensor, grid: Size3) -> Tensor:
    """Masked depthwise convolution with gradients.

    Args:
        x: (N, K, x, y, z, C) float32, voxels of the visible tokens.
        weight: (C, 1, k, k, k), k odd.
        bias: (C,).
        ids_keep: (N, K) int64, raster numbers of the visible tokens in `grid`.
        grid: tokens per axis.

    Returns:
        like x.
    """
    return MaskedDepthwise.apply(x, weight, bias, ids_keep, grid)  # type: ignore[no-untyped-call]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, ids_keep: Tensor, grid: Size3) -> Tensor:
    token: Size3 = tuple(x.shape[2:5])  # type: ignore[assignment]
    rows = voxel_rows(ids_keep, grid, token)
    dense = grid_from_rows(x, rows, grid).permute(0, 4, 1, 2, 3)
    dense = F.conv3d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return rows_from_grid(dense.permute(0, 2, 3, 4, 1), rows).view(x.shape)


def weight_gradient(x: Tensor, grad: Tensor, ids_keep: Tensor, grid: Size3, kernel: int) -> Tensor:
    """Gradient of the weight, (C, 1, k, k, k).

    Args:
        x, grad: (N, K, x, y, z, C) contiguous, input of the convolution and the gradient of its result.
        ids_keep, grid: as in `masked_depthwise`.
        kernel: k.
    """
    channels, rim = x.shape[-1], kernel // 2
    token: Size3 = tuple(x.shape[2:5])  # type: ignore[assignment]
    rows = voxel_rows(ids_keep, grid, token, rim)
    image = grid_from_rows(x, rows, grid, rim)  # zeros where masked, and around
    _, _, size_y, size_z, _ = image.shape

    box: Size3 = tuple(_largest_divisor(t) for t in token)  # type: ignore[assignment]
    around = [b + 2 * rim for b in box]
    kernels = tokens_from_grid(grad.flatten(0, 1), box).flatten(0, 1)  # (boxes, *box, C)
    first = rows.view(-1, *token)[:, :: box[0], :: box[1], :: box[2]].flatten() - (size_y * size_z + size_z + 1) * rim
    i, j, k = (torch.arange(n, device=x.device) for n in around)
    inside = ((i[:, None, None] * size_y + j[:, None]) * size_z + k).flatten()

    total = x.new_zeros(channels, kernel**3)
    for part in range(0, len(first), n := max(1, BYTES_PER_CALL // (4 * math.prod(around) * channels))):
        corners = first[part : part + n]
        groups = len(corners) * channels
        voxels = rows_from_grid(image, (inside[:, None] + corners).flatten()).view(1, *around, groups)
        weights = kernels[part : part + n].permute(1, 2, 3, 0, 4).reshape(1, *box, groups)
        sums = F.conv3d(voxels.permute(0, 4, 1, 2, 3), weights.permute(4, 0, 1, 2, 3), groups=groups)
        total += sums.view(-1, channels, kernel**3).sum(dim=0)
    return total.view(channels, 1, kernel, kernel, kernel)


def _largest_divisor(size: int) -> int:
    return max(n for n in range(1, LARGEST_BOX + 1) if size % n == 0)
