"""Blocks of the convolution stages.

Activations are kept channels last and cut into T boxes: (N, T, x, y, z, C). Pretraining has one box per visible token,
finetuning a single box that is the whole patch. Everything but the depthwise convolution works on one voxel (or one
stride cell) at a time, so both run the same code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_mim.config import Size3
from nnunet_mim.networks.depthwise import DepthwiseConv3d, SpatialConv


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Tensor:
    """Run a block; with `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class PointwiseConv(nn.Conv3d):
    """1x1x1 convolution on channels-last input (..., C_in) → (..., C_out)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class PatchConv(nn.Conv3d):
    """Convolution with kernel = stride (no overlap) on boxes: (N, T, x, y, z, C_in) → (N, T, x/sx, y/sy, z/sz,
    C_out).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Size3) -> None:
        super().__init__(in_channels, out_channels, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        n, t, x0, y0, z0, c = x.shape
        sx, sy, sz = self.stride
        cells = x.reshape(n, t, x0 // sx, sx, y0 // sy, sy, z0 // sz, sz, c).permute(0, 1, 2, 4, 6, 3, 5, 7, 8)
        weight = self.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (C_out, sx*sy*sz*C_in), as the cells are laid out
        return F.linear(cells.flatten(5), weight, self.bias)


class StageEmbed(nn.Module):
    """PatchConv → LayerNorm over channels → GELU: the entry of a stage."""

    def __init__(self, in_channels: int, embed_dim: int, stride: Size3) -> None:
        super().__init__()
        self.proj = PatchConv(in_channels, embed_dim, stride)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x)))


class PointwiseMLP(nn.Module):
    """Two 1x1x1 convolutions with a GELU between them, channels last."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden_dim)
        self.fc2 = PointwiseConv(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvBlock(nn.Module):
    """`x + W2·DW5(W1·LN(x))`, then `x + MLP(LN(x))` (DESIGN of the published architecture, arXiv 2404.15580)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.conv1 = PointwiseConv(dim, dim)
        self.dwconv = DepthwiseConv3d(dim, kernel_size=5)
        self.conv2 = PointwiseConv(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = PointwiseMLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, depthwise: SpatialConv) -> Tensor:
        """(N, T, x, y, z, C) → same; `depthwise(conv, x)` applies the spatial convolution to the boxes."""
        y = depthwise(self.dwconv, self.conv1(self.norm1(x)))
        x = x + self.drop_path(self.conv2(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops the residual branch of a whole sample, rescaled; training only."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if self.probability == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *([1] * (x.ndim - 1))).bernoulli_(1 - self.probability)
        return x * keep / (1 - self.probability)
