"""HybridEncoder: three convolution stages and a transformer; one set of parameters, two ways to run it.

Masked voxels never reach visible ones, and everything but the depthwise convolution works per voxel or per token.
Pretraining (`forward`) therefore computes visible tokens only and is equal to the dense masked computation, which
`forward_dense` spells out as the reference. Finetuning (`forward_features`) runs the same modules on whole patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nnunet_mim.config import NetworkConfig, Size3
from nnunet_mim.networks.conv_blocks import ConvBlock, PatchConv, StageEmbed, run_block
from nnunet_mim.networks.depthwise import DepthwiseConv3d, SpatialConv, conv_on_patches, conv_on_tokens
from nnunet_mim.networks.token_layout import grid_from_tokens, tokens_from_grid
from nnunet_mim.networks.vit_blocks import ViTBlock, init_weights, sincos_position


class ConvStage(nn.Module):
    """Stage embed, blocks, and the convolution that turns the stage into a summand of the tokens."""

    def __init__(
        self, in_channels: int, dim: int, depth: int, stride: Size3, mlp_ratio: float, drop_paths: list[float],
        token_dim: int, stride_to_token: Size3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = StageEmbed(in_channels, dim, stride)
        self.blocks = nn.ModuleList(ConvBlock(dim, mlp_ratio, drop_paths[i]) for i in range(depth))
        self.to_token = PatchConv(dim, token_dim, stride_to_token)

    def forward(self, boxes: Tensor, depthwise: SpatialConv, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """(N, T, x, y, z, C_in) → the stage's map (N, T, x/sx, y/sy, z/sz, C), and its share of the tokens."""
        boxes = self.embed(boxes)
        for block in self.blocks:
            boxes = run_block(block, recompute, boxes, depthwise)
        return boxes, self.to_token(boxes)


class HybridEncoder(nn.Module):
    """Hybrid convolution-transformer encoder of MiM (arXiv 2404.15580).

    Args:
        in_channels: image channels.
        embed_dims, depths: channels and blocks of the four stages.
        strides: downsampling of each stage per axis; their product is the token size.
        num_heads: of the transformer stage.
        mlp_ratio: hidden width of MLPs over their input width.
        drop_path: stochastic depth of the last block, rising linearly from 0; pretraining uses 0.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: tuple[int, ...] = (48, 96, 192, 384),
        depths: tuple[int, ...] = (2, 2, 2, 11),
        strides: tuple[Size3, ...] = ((2, 2, 2),) * 4,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = NetworkConfig(
            tuple(embed_dims),
            tuple(depths),
            num_heads,
            mlp_ratio,
            tuple(tuple(s) for s in strides),  # type: ignore[arg-type, misc]
        )
        self.in_channels = in_channels
        self.token_size = self.config.token_size
        strides = self.config.strides
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        first = [sum(depths[:s]) for s in range(5)]

        self.stages = nn.ModuleList()
        for s in range(3):
            stride_to_token = tuple(math.prod(st[axis] for st in strides[s + 1 :]) for axis in range(3))
            self.stages.append(
                ConvStage(
                    in_channels if s == 0 else embed_dims[s - 1], embed_dims[s], depths[s], strides[s], mlp_ratio,
                    rates[first[s] : first[s + 1]], embed_dims[3], stride_to_token,  # type: ignore[arg-type]
                )
            )  # fmt: skip
        self.token_embed = StageEmbed(embed_dims[2], embed_dims[3], strides[3])
        self.token_proj = nn.Linear(embed_dims[3], embed_dims[3])
        self.vit_blocks = nn.ModuleList(
            ViTBlock(embed_dims[3], num_heads, mlp_ratio, rates[first[3] + i]) for i in range(depths[3])
        )
        self.norm = nn.LayerNorm(embed_dims[3], eps=1e-6)
        self.apply(init_weights)

    def forward(self, x: Tensor, ids_keep: Tensor, recompute: bool = False) -> Tensor:
        """Encode the visible tokens; masked voxels are never read.

        Args:
            x: (N, C, X, Y, Z) views; sizes are multiples of the token size.
            ids_keep: (N, K) int64, raster numbers of the visible tokens.
            recompute: keep no activations inside blocks, compute them again in the backward pass.

        Returns:
            (N, K, D) latent tokens in the order of `ids_keep`.
        """
        grid = self.grid(x)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        boxes = tokens_from_grid(x.permute(0, 2, 3, 4, 1), self.token_size)[rows, ids_keep]
        tokens, stage_sum, _ = self._run_stages(boxes, conv_on_tokens(ids_keep, grid), recompute)
        tokens, stage_sum = tokens.flatten(1, 4), stage_sum.flatten(1, 4)  # (N, K, D): a box is one token
        position = sincos_position(grid, tokens.shape[-1], tokens)[ids_keep]
        return self._run_transformer(tokens + position, stage_sum, recompute)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Encode whole patches, nothing masked (finetuning).

        Args:
            x: (N, C, X, Y, Z); sizes are multiples of the token size.

        Returns:
            Four channels-first maps, at the cumulative strides of the stages; the last is the transformer's output.
        """
        grid = self.grid(x)
        boxes = x.permute(0, 2, 3, 4, 1).unsqueeze(1)
        tokens, stage_sum, maps = self._run_stages(boxes, conv_on_patches(x.shape[0], x.device))
        tokens, stage_sum = tokens.flatten(1, 4), stage_sum.flatten(1, 4)  # (N, L, D)
        latent = self._run_transformer(tokens + sincos_position(grid, tokens.shape[-1], tokens), stage_sum)
        maps = [m.squeeze(1).permute(0, 4, 1, 2, 3) for m in maps]
        return [*maps, latent.transpose(1, 2).reshape(x.shape[0], -1, *grid)]

    def forward_dense(
        self, x: Tensor, mask: Tensor, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """The masked computation on all voxels, with PyTorch's own convolution: reference for `forward`.

        Args:
            x: (N, C, X, Y, Z).
            mask: (N, L) bool, True = masked; every row masks the same number of tokens.
            memory_format: layout that PyTorch's depthwise convolution gets, its default or channels last.

        Returns:
            (N, K, D) latent of the visible tokens in raster order.
        """
        grid = self.grid(x)
        visible = grid_from_tokens((~mask).to(x.dtype)[..., None, None, None, None], grid)  # (N, gx, gy, gz, 1)

        def depthwise(conv: DepthwiseConv3d, y: Tensor) -> Tensor:
            y = y.squeeze(1)
            keep = visible
            for axis in (1, 2, 3):
                keep = keep.repeat_interleave(y.shape[axis] // keep.shape[axis], dim=axis)
            y = (y * keep).permute(0, 4, 1, 2, 3).contiguous(memory_format=memory_format)
            y = nn.functional.conv3d(y, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
            return y.permute(0, 2, 3, 4, 1).unsqueeze(1)

        tokens, stage_sum, _ = self._run_stages(x.permute(0, 2, 3, 4, 1).unsqueeze(1), depthwise)
        tokens, stage_sum = tokens.flatten(1, 4), stage_sum.flatten(1, 4)
        tokens = tokens + sincos_position(grid, tokens.shape[-1], tokens)
        n, _, dim = tokens.shape
        return self._run_transformer(tokens[~mask].reshape(n, -1, dim), stage_sum[~mask].reshape(n, -1, dim))

    def grid(self, x: Tensor) -> Size3:
        """Tokens per axis of a batch of images (N, C, X, Y, Z)."""
        return tuple(size // p for size, p in zip(x.shape[2:], self.token_size, strict=True))  # type: ignore[return-value]

    def _run_stages(
        self, boxes: Tensor, depthwise: SpatialConv, recompute: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(N, T, x, y, z, C) → stage-4 embedding, sum of the stages' token embeddings, maps of stages 1-3."""
        maps, stage_sum = [], None
        for stage in self.stages:
            boxes, token = stage(boxes, depthwise, recompute)
            maps.append(boxes)
            stage_sum = token if stage_sum is None else stage_sum + token
        return self.token_proj(self.token_embed(boxes)), stage_sum, maps  # type: ignore[return-value]

    def _run_transformer(self, tokens: Tensor, stage_sum: Tensor, recompute: bool = False) -> Tensor:
        for block in self.vit_blocks:
            tokens = run_block(block, recompute, tokens)
        return self.norm(tokens + stage_sum)
