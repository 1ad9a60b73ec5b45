"""Transformer blocks on sequences of tokens, and the fixed sine-cosine position embedding.

Tokens are (N, L, D). Those of groups of views with other numbers of tokens lie one after the other, (T, D), and
`shapes` has (N, L) of each group: only attention has to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_mim.config import Size3
from nnunet_mim.networks.residual import DropPath, Stream, add_and_norm, linear_gelu, with_branch
from nnunet_mim.networks.token_layout import join

Shapes = Sequence[tuple[int, int]]
"""number of views and of tokens of each view, of each group"""


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762) within each view, qkv with bias: (N, L, D) or (T, D) → the same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, shapes: Shapes | None = None) -> Tensor:
        """All but the projection at the end, which a ViTBlock applies."""
        qkv = self.qkv(x)
        if shapes is None:
            return self._attend(qkv)
        groups = qkv.split([N * L for N, L in shapes])
        attended = [self._attend(group.unflatten(0, shape)) for group, shape in zip(groups, shapes, strict=True)]
        return join([group.flatten(0, 1) for group in attended])

    def _attend(self, qkv: Tensor) -> Tensor:
        """(N, L, 3 D) → (N, L, D)."""
        N, L, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        qkv = qkv.reshape(N, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(dim=2))  # each (N, heads, L, D/heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D)


class MLP(nn.Module):
    """Linear → GELU → Linear: (..., D) → (..., out_dim), by default D."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block (ViT, arXiv 2010.11929): (N, L, D) or (T, D) → the same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, stream: Stream, shapes: Shapes | None = None, norm_follows: bool = True) -> Stream:
        x, y = add_and_norm(stream, self.norm1)
        x, y = add_and_norm(with_branch(x, self.attn.attend(y, shapes), self.attn.proj, self.drop_path), self.norm2)
        return with_branch(x, linear_gelu(y, self.mlp.fc1), self.mlp.fc2, self.drop_path, norm_follows)


def sincos_position(grid: Size3, dim: int, like: Tensor) -> Tensor:
    """Fixed position embedding of a token grid, MAE's (arXiv 2111.06377) with a third axis.

    Args:
        grid: tokens per axis.
        dim: D, divisible by 6. Each axis gets a third, in array order: sine, then cosine, of the token's index times
            ω_i = 10000^(-i / (D/6)).
        like: tensor whose device and dtype the embedding gets.

    Returns:
        (gx*gy*gz, D), tokens in raster order.
    """
    dtype = torch.float32 if like.device.type == "mps" else torch.float64  # MPS has no float64
    omega = 10000.0 ** (-torch.arange(dim // 6, device=like.device, dtype=dtype) / (dim // 6))
    axes = []
    for g in grid:
        angle = torch.arange(g, device=like.device, dtype=dtype)[:, None] * omega  # (g, D/6)
        axes.append(torch.cat([angle.sin(), angle.cos()], dim=1))  # (g, D/3)
    x, y, z = axes
    parts = [x[:, None, None], y[None, :, None], z[None, None, :]]
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).reshape(-1, dim).to(like.dtype)


def init_weights(module: nn.Module) -> None:
    """Set Xavier-uniform weights (convolutions as if flattened) and zero biases, as MAE does (arXiv 2111.06377)."""
    if isinstance(module, (nn.Linear, nn.Conv3d)):
        nn.init.xavier_uniform_(module.weight.data.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
