"""MaskedUNet: the U-Net of finetuning, which in pretraining reconstructs the masked tokens of views.

It has all parts of a HybridUNet but the encoder, under the same names. As in SparK (arXiv 2301.03580) masked places of
the encoder's maps are filled with one learned vector per stage. The stem sees images whose masked voxels have a learned
value. So nothing reads a masked voxel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_mim.config import Size3
from nnunet_mim.networks.hybrid_unet import UNetAroundEncoder
from nnunet_mim.networks.token_layout import grid_from_tokens, join, view_of_token, visible_voxels


class MaskedUNet(UNetAroundEncoder):
    """The parts of a HybridUNet but its encoder, with a head for images and what stands for masked places.

    Args:
        in_channels: image channels.
        arch_kwargs: of the HybridUNet, as in plans.
    """

    def __init__(self, in_channels: int, arch_kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        embed_dims, strides = arch_kwargs["embed_dims"], [tuple(stride) for stride in arch_kwargs["strides"]]
        widths = arch_kwargs["stem_features"], arch_kwargs["decoder_features"], arch_kwargs["n_conv_per_stage_decoder"]
        self.add_unet(in_channels, in_channels, embed_dims, strides, *widths)
        del self.decoder.heads[1:]  # it predicts at full resolution alone
        self.mask_voxel = nn.Parameter(torch.zeros(in_channels))
        self.mask_vectors = nn.ParameterList(torch.randn(dim) * 0.02 for dim in embed_dims)

    def forward(
        self, images: Sequence[Tensor], ids_keep: Sequence[Tensor], ids_masked: Sequence[Tensor], maps: Sequence[Tensor]
    ) -> Tensor:
        """Predict images from what is visible of them.

        Args:
            images, ids_keep, ids_masked: for each group of views as in MaskedViews.
            maps: of `HybridEncoder.encode_maps`, at last its latent tokens as (T, 1, 1, 1, D).

        Returns:
            (sum of N, C, X, Y, Z)
        """
        size, token = images[0].shape[2:], self.cumulative_strides[len(maps)]
        grid: Size3 = tuple(n // p for n, p in zip(size, token, strict=True))  # type: ignore[assignment]
        visible = join([visible_voxels(ids, grid, token) for ids in ids_masked])  # (sum of N, 1, X, Y, Z)
        image = torch.where(visible, join(images), self.mask_voxel.view(-1, 1, 1, 1))
        place = view_of_token(ids_keep), join([ids.flatten() for ids in ids_keep])
        dense = [
            _filled(tokens, vector, place, len(image), grid)
            for tokens, vector in zip(maps, self.mask_vectors, strict=True)
        ]
        return self.decode(image, dense)[0]


def _filled(tokens: Tensor, vector: Tensor, place: tuple[Tensor, Tensor], n_views: int, grid: Size3) -> Tensor:
    """Put visible tokens (T, X, Y, Z, C) at their places (view, number) in maps (n_views, C, gx*X, gy*Y, gz*Z) that
    hold a vector (C,) elsewhere.
    """
    gx, gy, gz = grid
    maps = vector.to(tokens.dtype).expand(n_views, gx * gy * gz, *tokens.shape[1:]).index_put(place, tokens)
    return grid_from_tokens(maps, grid).permute(0, 4, 1, 2, 3)
