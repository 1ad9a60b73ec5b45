"""Floating-point operations of the networks, counted by hand: 2 per multiply-add of convolutions and matrix products.

Norms, activations and additions are left out. PyTorch's FlopCounter takes a depthwise convolution for a full one and
is off by the number of channels.
"""

from __future__ import annotations

import math

from nnunet_mim.config import NetworkConfig
from nnunet_mim.geometry import Level, views_per_crop

DEPTHWISE_KERNEL = 5**3


def transformer_flops(n_tokens: int, dim: int, depth: int, mlp_ratio: float) -> int:
    """Forward FLOPs of `depth` transformer blocks on one sequence."""
    linear = 2 * n_tokens * dim * dim * 4 + 2 * 2 * n_tokens * dim * int(dim * mlp_ratio)  # qkv, proj; two MLP layers
    attention = 2 * 2 * n_tokens * n_tokens * dim  # q·k and weights·v, all heads
    return depth * (linear + attention)


def encoder_flops(network: NetworkConfig, in_channels: int, n_visible: int, n_convolved: int | None = None) -> int:
    """Forward FLOPs of HybridEncoder on one view.

    Args:
        network: sizes.
        in_channels: image channels.
        n_visible: tokens that the transformer sees.
        n_convolved: tokens that the convolution stages compute; None: the visible ones. In the dense masked computation
            these are all.
    """
    dims, ratio = network.embed_dims, network.mlp_ratio
    voxels = math.prod(network.token_size)  # of one token, at the resolution of the stage
    total, before = 0, in_channels
    for dim, depth, stride in zip(dims[:3], network.depths[:3], network.strides[:3], strict=True):
        cell = math.prod(stride)
        voxels //= cell
        total += 2 * voxels * cell * before * dim  # stage embed
        per_voxel = 2 * 2 * dim * dim + 2 * DEPTHWISE_KERNEL * dim + 2 * 2 * dim * int(dim * ratio)
        total += depth * voxels * per_voxel
        total += 2 * voxels * dim * dims[3]  # to_token: kernel = what is left to the token
        before = dim
    total += 2 * voxels * before * dims[3] + 2 * dims[3] * dims[3]  # token embed, token_proj
    convolved = n_visible if n_convolved is None else n_convolved
    return convolved * total + transformer_flops(n_visible, dims[3], network.depths[3], ratio)


def decoder_flops(network: NetworkConfig, in_channels: int, n_visible: int, n_tokens: int, n_predicted: int) -> int:
    """Forward FLOPs of MiMDecoder on one view, its head on `n_predicted` tokens."""
    dim = network.decoder_embed_dim
    embed = 2 * n_visible * network.embed_dims[3] * dim
    head = 2 * n_predicted * dim * math.prod(network.token_size) * in_channels
    return embed + transformer_flops(n_tokens, dim, network.decoder_depth, network.mlp_ratio) + head


def dense_view_flops(network: NetworkConfig, in_channels: int, n_visible: int, n_tokens: int) -> int:
    """Forward FLOPs of the dense masked computation on one view: convolution stages and head on all tokens."""
    return encoder_flops(network, in_channels, n_visible, n_tokens) + decoder_flops(
        network, in_channels, n_visible, n_tokens, n_tokens
    )


def view_flops(network: NetworkConfig, in_channels: int, n_visible: int, n_tokens: int) -> int:
    """Forward FLOPs of pretraining on one view: encoder on visible tokens, decoder, head on masked tokens."""
    return encoder_flops(network, in_channels, n_visible) + decoder_flops(
        network, in_channels, n_visible, n_tokens, n_tokens - n_visible
    )


def crop_flops(network: NetworkConfig, in_channels: int, levels: tuple[Level, ...]) -> int:
    """FLOPs of one training step on one crop, forward and backward (twice the forward), all views of all levels."""
    return 3 * sum(
        count * view_flops(network, in_channels, level.n_visible_tokens, level.n_tokens)
        for level, count in zip(levels, views_per_crop(levels), strict=True)
    )
