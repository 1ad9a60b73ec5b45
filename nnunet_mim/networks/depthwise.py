"""Depthwise convolution, and its use on visible tokens only.

`depthwise_on_tokens` says what is computed, with PyTorch's own operations. Where there is something faster it takes
over: on a CPU depthwise_cpu.py, on a GPU with Triton depthwise_triton.py (NNUNET_MIM_TRITON=0 switches that off).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_mim.config import Size3
from nnunet_mim.networks.depthwise_cpu import masked_depthwise as masked_depthwise_cpu
from nnunet_mim.networks.token_layout import grid_from_rows, rows_from_grid, voxel_rows

HAS_TRITON = importlib.util.find_spec("triton") is not None


class DepthwiseConv3d(nn.Conv3d):
    """Depthwise convolution, zero padding, size kept. Weight (C, 1, k, k, k) and bias (C,) as in nn.Conv3d."""

    def __init__(self, channels: int, kernel_size: int = 5) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, X, Y, Z, C) → (N, X, Y, Z, C), channels last."""
        y = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, self.bias, padding=self.padding, groups=self.groups)
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

    def convolve(conv: DepthwiseConv3d, x: Tensor) -> Tensor:
        if use_cpu_path(x):
            return masked_depthwise_cpu(x, conv.weight, conv.bias, ids_keep, grid)  # type: ignore[arg-type]
        return depthwise_on_tokens(conv, x, ids_keep, grid)

    return convolve


def conv_on_patches(n: int, device: torch.device) -> SpatialConv:
    """The convolution of finetuning: the one box (N, 1, X, Y, Z, C) is the whole patch of each of `n` samples."""
    return conv_on_tokens(torch.zeros(n, 1, dtype=torch.int64, device=device), (1, 1, 1))


def use_cpu_path(x: Tensor) -> bool:
    """Whether depthwise_cpu.py is the fastest: float32 training on a CPU, not under autocast, not compiled."""
    eager = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return eager and x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled()


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run there: CUDA, Triton installed, not switched off."""
    wanted = device.type == "cuda" and os.environ.get("NNUNET_MIM_TRITON") != "0"
    return wanted and HAS_TRITON


def _triton_conv(ids_keep: Tensor, grid: Size3) -> SpatialConv:
    from nnunet_mim.networks.depthwise_triton import masked_depthwise, rims, slot_table

    tables: dict[tuple[int, ...], Tensor] = {}  # blocks and stages whose kernels reach equally far share one

    def convolve(conv: DepthwiseConv3d, x: Tensor) -> Tensor:
        token, kernel = list(x.shape[2:5]), conv.kernel_size[0]
        reach = tuple(rims(token, kernel))
        if reach not in tables:
            tables[reach] = slot_table(ids_keep, list(grid), token, kernel)
        return masked_depthwise(x, conv.weight, conv.bias, ids_keep, tables[reach], list(grid), token)

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
    token: Size3 = tuple(x.shape[2:5])  # type: ignore[assignment]
    rows = voxel_rows(ids_keep, grid, token)
    y = rows_from_grid(conv(grid_from_rows(x, rows, grid)), rows)
    return y.view(x.shape)
