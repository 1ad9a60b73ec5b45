"""MiMDecoder: predicts the voxels of masked tokens from the latent of visible ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_mim.config import Size3
from nnunet_mim.networks.conv_blocks import run_block
from nnunet_mim.networks.vit_blocks import ViTBlock, init_weights, sincos_position


class MiMDecoder(nn.Module):
    """Decoder of MiM (arXiv 2404.15580), MAE's (arXiv 2111.06377) in 3-D: a transformer that sees mask tokens.

    Args:
        latent_dim: width of the encoder's latent.
        token_voxels: outputs per token, voxels times channels (C order, channel last).
        embed_dim, depth, num_heads, mlp_ratio: sizes of the transformer.
    """

    def __init__(
        self, latent_dim: int, token_voxels: int, embed_dim: int = 576, depth: int = 8, num_heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Linear(latent_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(ViTBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, token_voxels)
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
        N, L = latent.shape[0], grid[0] * grid[1] * grid[2]
        visible = self.embed(latent)  # (N, K, D)
        rows = torch.arange(N, device=latent.device)[:, None]
        x = self.mask_token.to(visible.dtype).expand(N, L, -1).index_put((rows, ids_keep), visible)  # (N, L, D)
        x = x + sincos_position(grid, x.shape[-1], x)
        for block in self.blocks:
            x = run_block(block, recompute, x)
        return self.norm(x)
