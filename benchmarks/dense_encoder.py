"""The dense masked computation of HybridEncoder, which its computation on visible tokens must equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_mim.networks.depthwise import DepthwiseConv3d
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.token_layout import grid_from_tokens
from nnunet_mim.networks.vit_blocks import sincos_position


def encode_dense(
    encoder: HybridEncoder, x: Tensor, mask: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Run the masked computation on all voxels with PyTorch's own convolution.

    Args:
        encoder: its modules and weights.
        x: (N, C, X, Y, Z) float.
        mask: (N, L) bool, True = masked, with the same number of masked tokens in every row.
        memory_format: layout of the depthwise convolution's input, default or channels last.

    Returns:
        (N, K, D) latent tokens, the visible ones in raster order.
    """
    grid = encoder.grid(x)
    visible = grid_from_tokens((~mask).to(x.dtype)[..., None, None, None, None], grid)  # (N, gx, gy, gz, 1)

    def depthwise(conv: DepthwiseConv3d, y: Tensor) -> Tensor:
        keep = visible  # (N, X, Y, Z, C), as y
        for axis in (1, 2, 3):
            keep = keep.repeat_interleave(y.shape[axis] // keep.shape[axis], dim=axis)
        y = (y * keep).permute(0, 4, 1, 2, 3).contiguous(memory_format=memory_format)
        y = nn.functional.conv3d(y, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
        return y.permute(0, 2, 3, 4, 1)

    tokens, stage_sum, _ = encoder._run_stages(x.permute(0, 2, 3, 4, 1), depthwise)
    tokens, stage_sum = tokens.flatten(1, 3), stage_sum.flatten(1, 3)  # (N, L, D)
    N, _, D = tokens.shape
    tokens = tokens + sincos_position(grid, D, tokens)
    return encoder._run_transformer(tokens[~mask].reshape(N, -1, D), stage_sum[~mask].reshape(N, -1, D))
