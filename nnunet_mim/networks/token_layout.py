"""Where the voxels of tokens lie in the grid that they were cut from. Voxels are rows of C channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnunet_mim.config import Size3


def voxel_rows(ids: Tensor, grid: Size3, token: Size3, rim: int = 0) -> Tensor:
    """Which row of the flattened dense grids every voxel of some tokens is.

    Args:
        ids: (N, K) int64, raster numbers of tokens in `grid`.
        grid: tokens per axis.
        token: voxels of a token per axis.
        rim: voxels around each grid, on all sides.

    Returns:
        (N*K*x*y*z,) int64, rows of N grids with rims, flattened.
    """
    device = ids.device
    size = [g * t + 2 * rim for g, t in zip(grid, token, strict=True)]
    x, y, z = (torch.arange(t, device=device) for t in token)
    inside = ((x[:, None, None] * size[1] + y[:, None]) * size[2] + z).flatten()
    views = torch.arange(ids.shape[0], device=device)[:, None]
    x, y, z = ids // (grid[1] * grid[2]) * token[0], ids // grid[2] % grid[1] * token[1], ids % grid[2] * token[2]
    first = ((views * size[0] + x + rim) * size[1] + y + rim) * size[2] + z + rim  # (N, K)
    return (first[..., None] + inside).flatten()


def grid_from_rows(tokens: Tensor, rows: Tensor, grid: Size3, rim: int = 0) -> Tensor:
    """Tokens (N, K, x, y, z, C) → dense grids with rims (N, X, Y, Z, C), zero where there is no token.

    Args:
        tokens: some tokens of N grids.
        rows: their `voxel_rows`, with the same rim.
        grid: tokens per axis.
        rim: voxels around each grid.
    """
    n, _, tx, ty, tz, channels = tokens.shape
    size = [g * t + 2 * rim for g, t in zip(grid, (tx, ty, tz), strict=True)]
    dense = tokens.new_zeros(n * math.prod(size), channels)
    return dense.index_copy_(0, rows, tokens.reshape(-1, channels)).view(n, *size, channels)


def rows_from_grid(x: Tensor, rows: Tensor) -> Tensor:
    """(N, X, Y, Z, C) → (len(rows), C)."""
    return x.reshape(-1, x.shape[-1]).index_select(0, rows)


def grid_from_tokens(tokens: Tensor, grid: Size3) -> Tensor:
    """All tokens of a grid, (N, gx*gy*gz, x, y, z, C) → (N, gx*x, gy*y, gz*z, C)."""
    n, _, tx, ty, tz, channels = tokens.shape
    gx, gy, gz = grid
    x = tokens.reshape(n, gx, gy, gz, tx, ty, tz, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(n, gx * tx, gy * ty, gz * tz, channels)


def tokens_from_grid(x: Tensor, token_size: Size3) -> Tensor:
    """(N, gx*x, gy*y, gz*z, C) → (N, gx*gy*gz, x, y, z, C); inverse of `grid_from_tokens`."""
    n, sx, sy, sz, channels = x.shape
    tx, ty, tz = token_size
    x = x.reshape(n, sx // tx, tx, sy // ty, ty, sz // tz, tz, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(n, -1, tx, ty, tz, channels)
