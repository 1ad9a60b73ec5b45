"""Depthwise convolution of visible tokens, and its gradients on a CPU as forward convolutions of oneDNN.

oneDNN's forward depthwise kernel is fast with channels last; its gradient kernels are 4 to 10 times slower
(benchmarks/results/depthwise_cpu.md). The input gradient is the same convolution with the flipped kernel. The weight
gradient is a convolution too: a box of the output gradient is the kernel and slides over the input around that box,
which gives the 5x5x5 sums of the box. Boxes are tokens or parts of them, so masked voxels cost nothing. One call
takes a few boxes, each with its channels as groups of their own, so that the data stays in the cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_mim.config import Size3
from nnunet_mim.networks.token_layout import grid_from_rows, rows_from_grid, tokens_from_grid, voxel_rows

LARGEST_BOX = 8
"""maximum voxels per axis of a box of the weight gradient"""
BYTES_PER_CALL = 1_200_000
"""bytes of input voxels in one call: about the second-level cache of a core"""


def depthwise_on_tokens(x: Tensor, weight: Tensor, bias: Tensor | None, ids_keep: Tensor, grid: Size3) -> Tensor:
    """Convolve a dense grid whose masked voxels are zero, and return the visible tokens.

    Args:
        x: (N, K, X, Y, Z, C), voxels of the visible tokens.
        weight: (C, 1, k, k, k), k odd.
        bias: (C,).
        ids_keep: (N, K) int64, raster numbers of the visible tokens.
        grid: tokens per axis.

    Returns:
        (N, K, X, Y, Z, C).
    """
    _, _, X, Y, Z, _ = x.shape
    rows = voxel_rows(ids_keep, grid, (X, Y, Z))
    dense = grid_from_rows(x, rows, grid).permute(0, 4, 1, 2, 3)  # (N, C, gx*X, gy*Y, gz*Z)
    dense = F.conv3d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return rows_from_grid(dense.permute(0, 2, 3, 4, 1), rows).view(x.shape)


class MaskedDepthwise(torch.autograd.Function):
    """`depthwise_on_tokens` in float32 with gradients of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, ids_keep: Tensor, grid: Size3) -> Tensor:  # type: ignore[no-untyped-def, override]
        x = x.contiguous()
        ctx.save_for_backward(x, weight, ids_keep)
        ctx.grid = grid
        return depthwise_on_tokens(x, weight, bias, ids_keep, grid)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        x, weight, ids_keep = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = depthwise_on_tokens(grad, weight.flip(2, 3, 4), None, ids_keep, ctx.grid)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad, ids_keep, ctx.grid, weight.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, 4).sum(dim=0)  # (C,)
        return grad_x, grad_weight, grad_bias, None, None


def _weight_gradient(x: Tensor, grad: Tensor, ids_keep: Tensor, grid: Size3, kernel: int) -> Tensor:
    """Gradient of the weight, (C, 1, k, k, k).

    Args:
        x, grad: (N, K, X, Y, Z, C) contiguous, input of the convolution and gradient of its result.
        ids_keep, grid: as in `depthwise_on_tokens`.
        kernel: k.
    """
    _, _, X, Y, Z, C = x.shape
    rim = kernel // 2
    rows = voxel_rows(ids_keep, grid, (X, Y, Z), rim)
    image = grid_from_rows(x, rows, grid, rim)  # (N, GX, GY, GZ, C), zero where masked and in the rim
    _, _, GY, GZ, _ = image.shape

    bx, by, bz = (_largest_divisor(n) for n in (X, Y, Z))
    boxes = tokens_from_grid(grad.flatten(0, 1), (bx, by, bz)).flatten(0, 1)  # (boxes, bx, by, bz, C)
    window = [b + 2 * rim for b in (bx, by, bz)]  # voxels of the input that a box of the gradient depends on
    i, j, k = (torch.arange(n, device=x.device) for n in window)
    rows_in_window = ((i[:, None, None] * GY + j[:, None]) * GZ + k).flatten()
    first_rows = rows.view(-1, X, Y, Z)[:, ::bx, ::by, ::bz].flatten() - (GY * GZ + GZ + 1) * rim  # (boxes,)

    total = x.new_zeros(C, kernel**3)
    boxes_per_call = max(1, BYTES_PER_CALL // (4 * math.prod(window) * C))
    for starts, weights in zip(first_rows.split(boxes_per_call), boxes.split(boxes_per_call), strict=True):
        groups = len(starts) * C
        voxels = rows_from_grid(image, (rows_in_window[:, None] + starts).flatten()).view(1, *window, groups)
        weights = weights.permute(1, 2, 3, 0, 4).reshape(1, bx, by, bz, groups)
        sums = F.conv3d(voxels.permute(0, 4, 1, 2, 3), weights.permute(4, 0, 1, 2, 3), groups=groups)
        total += sums.view(-1, C, kernel**3).sum(dim=0)  # sums: (1, boxes*C, k, k, k)
    return total.view(C, 1, kernel, kernel, kernel)


def _largest_divisor(size: int) -> int:
    return max(n for n in range(1, LARGEST_BOX + 1) if size % n == 0)
