"""HybridEncoder: three convolution stages and a transformer, run on visible tokens or on whole patches.

Everything but the depthwise convolution works per voxel or per token, and for that convolution masked voxels are zero.
Pretraining (`forward`) therefore computes visible tokens only, and equals the dense masked computation
(benchmarks/dense_encoder.py). Finetuning (`forward_features`) runs the same modules on whole patches.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nnunet_mim.config import NetworkConfig, Size3
from nnunet_mim.geometry import cumulative_strides
from nnunet_mim.networks.conv_blocks import ConvBlock, PatchConv, StageEmbed, run_block
from nnunet_mim.networks.depthwise import SpatialConv, conv_on_patches, conv_on_tokens
from nnunet_mim.networks.residual import Stream
from nnunet_mim.networks.token_layout import join, take_tokens, tokens_from_grid
from nnunet_mim.networks.vit_blocks import Shapes, ViTBlock, init_weights, sincos_position


class ConvStage(nn.Module):
    """Convolution stage of MiM's encoder: embedding, blocks, and a convolution of the stage's map to token size."""

    def __init__(
        self, in_channels: int, dim: int, depth: int, stride: Size3, mlp_ratio: float, drop_paths: list[float],
        token_dim: int, stride_to_token: Size3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = StageEmbed(in_channels, dim, stride)
        self.blocks = nn.ModuleList(ConvBlock(dim, mlp_ratio, drop_paths[i]) for i in range(depth))
        self.to_token = PatchConv(dim, token_dim, stride_to_token)

    def forward(self, boxes: Tensor, depthwise: SpatialConv, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """(T, X, Y, Z, C_in) → the stage's map (T, X/sx, Y/sy, Z/sz, C), and (T, gx, gy, gz, D) at token size."""
        stream = Stream(self.embed(boxes))
        for number, block in enumerate(self.blocks, start=1):
            stream = run_block(block, recompute, stream, depthwise, number < len(self.blocks))
        boxes = stream.joined()
        return boxes, self.to_token(boxes)


class HybridEncoder(nn.Module):
    """Hybrid convolution-transformer encoder of MiM (arXiv 2404.15580).

    Args:
        in_channels: image channels.
        network: sizes; those of the decoder are not used.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first; 0 in pretraining.
    """

    def __init__(self, in_channels: int, network: NetworkConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = network
        self.in_channels = in_channels
        self.token_size = network.token_size
        dims, depths, strides = network.embed_dims, network.depths, network.strides
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        first_block = [sum(depths[:s]) for s in range(4)]

        self.stages = nn.ModuleList(
            ConvStage(
                in_channels if s == 0 else dims[s - 1], dims[s], depths[s], strides[s], network.mlp_ratio,
                rates[first_block[s] :], dims[3], stride_to_token=cumulative_strides(strides[s + 1 :])[-1],
            )
            for s in range(3)
        )  # fmt: skip
        self.token_embed = StageEmbed(dims[2], dims[3], strides[3])
        self.token_proj = nn.Linear(dims[3], dims[3])
        self.vit_blocks = nn.ModuleList(
            ViTBlock(dims[3], network.num_heads, network.mlp_ratio, rate) for rate in rates[first_block[3] :]
        )
        self.norm = nn.LayerNorm(dims[3], eps=1e-6)
        self.apply(init_weights)

    def forward(self, x: Tensor, ids_keep: Tensor, recompute: bool = False) -> Tensor:
        """Encode the visible tokens of views; masked voxels are never read.

        Args:
            x: (N, C, X, Y, Z) float, views whose sizes are multiples of the token size.
            ids_keep: (N, K) int64, raster numbers of the visible tokens.
            recompute: keep no activations of blocks, compute them again in the backward pass.

        Returns:
            (N, K, D) latent tokens in the order of `ids_keep`.
        """
        return self.encode_groups([x], [ids_keep], recompute).unflatten(0, ids_keep.shape)

    def encode_groups(self, views: Sequence[Tensor], ids_keep: Sequence[Tensor], recompute: bool = False) -> Tensor:
        """Encode groups of views at once, which need not have the same number of visible tokens.

        Args:
            views, ids_keep: for each group as in `forward`; all views have the same size.
            recompute: as in `forward`.

        Returns:
            (T, D) latent tokens of all views, one group after the other.
        """
        return self.encode_maps(views, ids_keep, recompute)[0]

    def encode_maps(
        self, views: Sequence[Tensor], ids_keep: Sequence[Tensor], recompute: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Do what `encode_groups` does, and return the maps of the three convolution stages too, (T, X, Y, Z, C)."""
        grid, boxes = self.grid(views[0]), []
        for x, ids in zip(views, ids_keep, strict=True):
            tokens = tokens_from_grid(x.permute(0, 2, 3, 4, 1), self.token_size)  # (N, L, X, Y, Z, C), a box per token
            boxes.append(take_tokens(tokens, ids).flatten(0, 1))  # (N*K, X, Y, Z, C)
        tokens, stage_sum, maps = self._run_stages(join(boxes), conv_on_tokens(ids_keep, grid), recompute)
        tokens, stage_sum = tokens.flatten(1), stage_sum.flatten(1)  # both (T, D): a box has one token
        position = sincos_position(grid, tokens.shape[-1], tokens)[join([ids.flatten() for ids in ids_keep])]
        shapes = [(ids.shape[0], ids.shape[1]) for ids in ids_keep]
        return self._run_transformer(tokens + position, stage_sum, shapes, recompute), maps

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Encode whole patches in which nothing is masked, as finetuning does.

        Args:
            x: (N, C, X, Y, Z) float; sizes are multiples of the token size.

        Returns:
            Four maps (N, D, X, Y, Z) at the cumulative strides of the stages; the last is the transformer's output.
        """
        N, grid = x.shape[0], self.grid(x)
        boxes = x.permute(0, 2, 3, 4, 1)  # (N, X, Y, Z, C): the patch is the only box
        tokens, stage_sum, maps = self._run_stages(boxes, conv_on_patches(N, x.device))
        tokens, stage_sum = tokens.flatten(1, 3), stage_sum.flatten(1, 3)  # both (N, L, D)
        latent = self._run_transformer(tokens + sincos_position(grid, tokens.shape[-1], tokens), stage_sum)
        maps = [m.permute(0, 4, 1, 2, 3) for m in maps]
        return [*maps, latent.transpose(1, 2).reshape(N, -1, *grid)]

    def grid(self, x: Tensor) -> Size3:
        """Number of tokens per axis of images (N, C, X, Y, Z)."""
        return tuple(size // p for size, p in zip(x.shape[2:], self.token_size, strict=True))  # type: ignore[return-value]

    def _run_stages(
        self, boxes: Tensor, depthwise: SpatialConv, recompute: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Boxes (T, X, Y, Z, C) → tokens for the transformer and sum of the stages' maps at token size, both
        (T, gx, gy, gz, D); and the maps.
        """
        maps, stage_sum = [], None
        for stage in self.stages:
            boxes, at_token_size = stage(boxes, depthwise, recompute)
            maps.append(boxes)
            stage_sum = at_token_size if stage_sum is None else stage_sum + at_token_size
        return self.token_proj(self.token_embed(boxes)), stage_sum, maps  # type: ignore[return-value]

    def _run_transformer(
        self, tokens: Tensor, stage_sum: Tensor, shapes: Shapes | None = None, recompute: bool = False
    ) -> Tensor:
        """(N, L, D) or (T, D) tokens and sum of the stages → latent tokens of the same shape."""
        stream = Stream(tokens)
        for number, block in enumerate(self.vit_blocks, start=1):
            stream = run_block(block, recompute, stream, shapes, number < len(self.vit_blocks))
        return self.norm(stream.joined() + stage_sum)
