"""Blocks of the convolution stages of MiM's encoder (arXiv 2404.15580).

Activations are channels last and cut into T boxes: (T, X, Y, Z, C). In pretraining each visible token of all views is
a box; in finetuning the whole patch of each sample is. Both run the same code, because everything but the depthwise
convolution works on one voxel (or one cell of a stride) at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_mim.config import Size3
from nnunet_mim.networks.depthwise import DepthwiseConv3d, SpatialConv
from nnunet_mim.networks.residual import DropPath, Stream, add_and_norm, fuses, linear_gelu, norm_gelu, with_branch


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Stream:
    """Run a block. With `recompute` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class PointwiseConv(nn.Conv3d):
    """1x1x1 convolution, channels last: (..., C_in) → (..., C_out)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class PatchConv(nn.Conv3d):
    """Convolution whose kernel is its stride: (T, X, Y, Z, C_in) → (T, X/sx, Y/sy, Z/sz, C_out)."""

    def __init__(self, in_channels: int, out_channels: int, stride: Size3) -> None:
        super().__init__(in_channels, out_channels, stride, stride)

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        T, X, Y, Z, C = x.shape
        sx, sy, sz = self.stride
        cells = x.reshape(T, X // sx, sx, Y // sy, sy, Z // sz, sz, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
        cells = cells.flatten(4)  # (T, X/sx, Y/sy, Z/sz, sx*sy*sz*C_in)
        weight = self.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (C_out, sx*sy*sz*C_in)
        return F.linear(cells, weight, self.bias if with_bias else None)


class StageEmbed(nn.Module):
    """Entry of a stage: PatchConv → LayerNorm over channels → GELU; shapes as in PatchConv."""

    def __init__(self, in_channels: int, embed_dim: int, stride: Size3) -> None:
        super().__init__()
        self.proj = PatchConv(in_channels, embed_dim, stride)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        if fuses(x) and self.proj.bias is not None:
            return norm_gelu(self.proj(x, with_bias=False), self.proj.bias, self.norm)
        return F.gelu(self.norm(self.proj(x)))


class PointwiseMLP(nn.Module):
    """Two 1x1x1 convolutions, with a GELU between them, as a ConvBlock applies them: (..., C) → (..., C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden_dim)
        self.fc2 = PointwiseConv(hidden_dim, dim)


class ConvBlock(nn.Module):
    """Convolution block of MiM's encoder: `x + W2·DW5(W1·LN(x))`, then `x + MLP(LN(x))`; DW5 is depthwise, 5x5x5."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.conv1 = PointwiseConv(dim, dim)
        self.dwconv = DepthwiseConv3d(dim, kernel_size=5)
        self.conv2 = PointwiseConv(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = PointwiseMLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, stream: Stream, depthwise: SpatialConv, norm_follows: bool = True) -> Stream:
        """(T, X, Y, Z, C) → same shape; `depthwise(conv, x)` applies the depthwise convolution to the boxes, and
        `norm_follows` is that of `with_branch`.
        """
        x, y = add_and_norm(stream, self.norm1)
        y = depthwise(self.dwconv, self.conv1(y))
        x, y = add_and_norm(with_branch(x, y, self.conv2, self.drop_path), self.norm2)
        return with_branch(x, linear_gelu(y, self.mlp.fc1), self.mlp.fc2, self.drop_path, norm_follows)
