"""MiMDecoder: predicts the voxels of masked tokens from the latent of visible ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_mim.config import NetworkConfig, Size3
from nnunet_mim.networks.conv_blocks import run_block
from nnunet_mim.networks.residual import Stream, add_and_norm
from nnunet_mim.networks.token_layout import join, view_of_token
from nnunet_mim.networks.vit_blocks import ViTBlock, init_weights, sincos_position


class MiMDecoder(nn.Module):
    """Decoder of MiM (arXiv 2404.15580), MAE's (arXiv 2111.06377) in 3-D: a transformer that sees mask tokens.

    The head predicts the voxels of a token in C order, channel last.
    """

    def __init__(self, in_channels: int, network: NetworkConfig) -> None:
        super().__init__()
        dim = network.decoder_embed_dim
        self.embed = nn.Linear(network.embed_dims[-1], dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            ViTBlock(dim, network.decoder_num_heads, network.mlp_ratio) for _ in range(network.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, math.prod(network.token_size) * in_channels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_keep: Tensor, grid: Size3, recompute: bool = False) -> Tensor:
        """Compute the features of all tokens; `head` turns them into voxels.

        Args:
            latent: (N, K, D_encoder) float, the encoder's latent of the visible tokens.
            ids_keep: (N, K) int64, raster numbers of the visible tokens.
            grid: tokens per axis; L is their product.
            recompute: keep no activations of blocks, compute them again in the backward pass.

        Returns:
            (N, L, D) features after the LayerNorm, in raster order.
        """
        return self.decode_groups(latent.flatten(0, 1), [ids_keep], grid, recompute)

    def decode_groups(
        self, latent: Tensor, ids_keep: Sequence[Tensor], grid: Size3, recompute: bool = False
    ) -> Tensor:
        """Compute the features of all tokens of groups of views at once.

        Args:
            latent: (T, D_encoder) float, of `HybridEncoder.encode_groups`.
            ids_keep: for each group (N, K) int64.
            grid, recompute: as in `forward`.

        Returns:
            (sum of N, L, D), as in `forward`.
        """
        N, L = sum(len(ids) for ids in ids_keep), math.prod(grid)
        visible = self.embed(latent)  # (T, D)
        place = view_of_token(ids_keep), join([ids.flatten() for ids in ids_keep])
        x = self.mask_token.to(visible.dtype).expand(N, L, -1).index_put(place, visible)  # (N, L, D)
        x = x + sincos_position(grid, x.shape[-1], x)
        stream = Stream(x)
        for block in self.blocks:
            stream = run_block(block, recompute, stream)
        return add_and_norm(stream, self.norm)[1]
