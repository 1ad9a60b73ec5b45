"""Cuts grids of voxels into tokens and puts tokens back. A voxel is a row of C channels.

A grid of gx, gy, gz tokens is numbered in raster (C) order; a token has X, Y, Z voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_mim.config import Size3


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Select tokens by number: (N, L, ...) and ids (N, K) int64 → (N, K, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], ids]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def view_of_token(ids: Sequence[Tensor]) -> Tensor:
    """Number of the view of each token, (T,) int64, where groups of views have tokens (N, K), one after the other."""
    device, firsts = ids[0].device, accumulate((len(group) for group in ids), initial=0)
    views = [torch.arange(len(group), device=device) + first for group, first in zip(ids, firsts, strict=False)]
    return join([v.repeat_interleave(group.shape[1]) for v, group in zip(views, ids, strict=True)])


def voxel_rows(ids: Tensor, grid: Size3, token: Size3, rim: int = 0) -> Tensor:
    """Compute which rows of the flattened dense grids the voxels of tokens are.

    Args:
        ids: (N, K) int64, raster numbers of the tokens.
        grid: tokens per axis.
        token: voxels of a token per axis.
        rim: voxels around each grid, on all sides.

    Returns:
        (N*K*X*Y*Z,) int64, rows of the N grids with their rims.
    """
    device = ids.device
    (_, gy, gz), (X, Y, Z) = grid, token
    GX, GY, GZ = (g * t + 2 * rim for g, t in zip(grid, token, strict=True))
    x, y, z = (torch.arange(t, device=device) for t in token)
    inside = ((x[:, None, None] * GY + y[:, None]) * GZ + z).flatten()  # (X*Y*Z,)
    views = torch.arange(ids.shape[0], device=device)[:, None]
    x, y, z = ids // (gy * gz) * X, ids // gz % gy * Y, ids % gz * Z
    first = ((views * GX + x + rim) * GY + y + rim) * GZ + z + rim  # (N, K)
    return (first[..., None] + inside).flatten()


def grid_from_rows(tokens: Tensor, rows: Tensor, grid: Size3, rim: int = 0) -> Tensor:
    """Put tokens into dense grids: (N, K, X, Y, Z, C) → (N, gx*X + 2*rim, gy*Y + 2*rim, gz*Z + 2*rim, C).

    Voxels without a token are zero; `rows` are the tokens' `voxel_rows`, with the same rim.
    """
    N, _, X, Y, Z, C = tokens.shape
    size = [g * t + 2 * rim for g, t in zip(grid, (X, Y, Z), strict=True)]
    dense = tokens.new_zeros(N * math.prod(size), C)
    return dense.index_copy_(0, rows, tokens.reshape(-1, C)).view(N, *size, C)


def rows_from_grid(x: Tensor, rows: Tensor) -> Tensor:
    """Select voxels by row: (N, X, Y, Z, C) → (len(rows), C)."""
    return x.reshape(-1, x.shape[-1]).index_select(0, rows)


def grid_from_tokens(tokens: Tensor, grid: Size3) -> Tensor:
    """Join all tokens of a grid: (N, gx*gy*gz, X, Y, Z, C) → (N, gx*X, gy*Y, gz*Z, C)."""
    N, _, X, Y, Z, C = tokens.shape
    gx, gy, gz = grid
    x = tokens.reshape(N, gx, gy, gz, X, Y, Z, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(N, gx * X, gy * Y, gz * Z, C)


def tokens_from_grid(x: Tensor, token_size: Size3) -> Tensor:
    """Cut a grid into tokens: (N, gx*X, gy*Y, gz*Z, C) → (N, gx*gy*gz, X, Y, Z, C)."""
    N, GX, GY, GZ, C = x.shape
    X, Y, Z = token_size
    x = x.reshape(N, GX // X, X, GY // Y, Y, GZ // Z, Z, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(N, -1, X, Y, Z, C)


def visible_voxels(ids_masked: Tensor, grid: Size3, token_size: Size3) -> Tensor:
    """(N, 1, X, Y, Z) bool, False = in a masked token, of views with these masked tokens (N, M) int64."""
    shape = (len(ids_masked), math.prod(grid))
    keep = torch.ones(shape, dtype=torch.bool, device=ids_masked.device).scatter(1, ids_masked, False)
    keep = keep.view(-1, 1, *grid)
    for axis, p in enumerate(token_size):
        keep = keep.repeat_interleave(p, dim=2 + axis)
    return keep


def pad_at_ends(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the last voxels of images (N, C, X, Y, Z) along each axis until they have this size."""
    padding = [n for axis in (2, 1, 0) for n in (0, size[axis] - x.shape[2 + axis])]
    return F.pad(x, padding, mode="replicate")
