"""Depthwise convolution, and its use on visible tokens only.

PyTorch's depthwise backward on a CPU is several times slower than its forward. The input gradient of a stride-1
depthwise convolution is the same convolution with the flipped kernel, so `DepthwiseConv3d` computes it as one, in
channels-last layout, where oneDNN has a vectorised kernel (measured in benchmarks/results/depthwise_cpu.md).
On a GPU Triton kernels take over where Triton is installed (depthwise_triton.py); NNUNET_MIM_TRITON=0 switches them
off. What is here is their fallback and their test.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_mim.config import Size3


class _DepthwiseCPU(torch.autograd.Function):
    """Depthwise convolution of (N, C, X, Y, Z) with zero padding that keeps the size; odd kernel, stride 1."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        x = x.contiguous(memory_format=torch.channels_last_3d)
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, bias, padding=_same(weight), groups=weight.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def, override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        channels, padding = weight.shape[0], _same(weight)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv3d(grad, weight.flip(2, 3, 4), padding=padding, groups=channels)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1, 1], padding, [1, 1, 1], False, [0, 0, 0], channels, [False, True, False]
            )[1]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 2, 3, 4))
        return grad_x, grad_weight, grad_bias


class DepthwiseConv3d(nn.Conv3d):
    """Depthwise convolution, zero padding, size kept. Weight (C, 1, k, k, k) and bias (C,) as in nn.Conv3d."""

    def __init__(self, channels: int, kernel_size: int = 5) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, X, Y, Z, C) → (N, X, Y, Z, C), channels last."""
        x = x.permute(0, 4, 1, 2, 3)
        use_cpu_path = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if use_cpu_path:
            y = _DepthwiseCPU.apply(x, self.weight, self.bias)
        else:
            y = F.conv3d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)
        return y.permute(0, 2, 3, 4, 1)


SpatialConv = Callable[[DepthwiseConv3d, Tensor], Tensor]
"""applies a depthwise convolution to boxes (N, T, x, y, z, C), each caller in its own way"""


def conv_on_tokens(ids_keep: Tensor, grid: Size3) -> SpatialConv:
    """The convolution of pretraining: boxes are visible tokens, masked voxels count as zero.

    Args:
        ids_keep: (N, K) int64, raster numbers of the visible tokens in `grid`.
        grid: tokens per axis.
    """
    if use_triton(ids_keep.device):
        return _triton_conv(ids_keep, grid)
    return lambda conv, x: depthwise_on_tokens(conv, x, ids_keep, grid)


def conv_on_patches(n: int, device: torch.device) -> SpatialConv:
    """The convolution of finetuning: the one box (N, 1, X, Y, Z, C) is the whole patch of each of `n` samples."""
    if use_triton(device):
        return _triton_conv(torch.zeros(n, 1, dtype=torch.int64, device=device), (1, 1, 1))
    return lambda conv, x: conv(x.squeeze(1)).unsqueeze(1)


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run there: CUDA, Triton installed, not switched off."""
    wanted = device.type == "cuda" and os.environ.get("NNUNET_MIM_TRITON") != "0"
    return wanted and importlib.util.find_spec("triton") is not None


def _triton_conv(ids_keep: Tensor, grid: Size3) -> SpatialConv:
    from nnunet_mim.networks.depthwise_triton import masked_depthwise, slot_table

    def convolve(conv: DepthwiseConv3d, x: Tensor) -> Tensor:
        token = list(x.shape[2:5])
        table = slot_table(ids_keep, list(grid), token, conv.kernel_size[0])
        return masked_depthwise(x, conv.weight, conv.bias, ids_keep, table, list(grid), token)

    return convolve


def depthwise_on_tokens(conv: DepthwiseConv3d, x: Tensor, ids_keep: Tensor, grid: Size3) -> Tensor:
    """Depthwise convolution that sees only visible tokens; masked voxels count as zero.

    Args:
        conv: the convolution.
        x: (N, K, x, y, z, C), voxels of the visible tokens.
        ids_keep: (N, K) int64, raster numbers of the visible tokens in `grid`.
        grid: tokens per axis.

    Returns:
        (N, K, x, y, z, C), equal to the convolution of the dense grid with masked voxels set to zero, at visible
        tokens.
    """
    n, _, tx, ty, tz, channels = x.shape
    rows = torch.arange(n, device=x.device)[:, None]
    dense = x.new_zeros(n, grid[0] * grid[1] * grid[2], tx, ty, tz, channels)
    dense = dense.index_put((rows, ids_keep), x)
    dense = conv(grid_from_tokens(dense, grid))
    return tokens_from_grid(dense, (tx, ty, tz))[rows, ids_keep]


def grid_from_tokens(tokens: Tensor, grid: Size3) -> Tensor:
    """(N, gx*gy*gz, x, y, z, C) → (N, gx*x, gy*y, gz*z, C)."""
    n, _, tx, ty, tz, channels = tokens.shape
    gx, gy, gz = grid
    x = tokens.reshape(n, gx, gy, gz, tx, ty, tz, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(n, gx * tx, gy * ty, gz * tz, channels)


def tokens_from_grid(x: Tensor, token_size: Size3) -> Tensor:
    """(N, gx*x, gy*y, gz*z, C) → (N, gx*gy*gz, x, y, z, C); inverse of `grid_from_tokens`."""
    n, sx, sy, sz, channels = x.shape
    tx, ty, tz = token_size
    x = x.reshape(n, sx // tx, tx, sy // ty, ty, sz // tz, tz, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(n, -1, tx, ty, tz, channels)


def _same(weight: Tensor) -> list[int]:
    return [k // 2 for k in weight.shape[2:]]
