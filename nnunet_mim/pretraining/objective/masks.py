"""Random masks, True = masked everywhere; and the geometry of a level as tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_mim.geometry import Level
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks


class _LevelTensors(NamedTuple):
    """int64 tensors of the properties of `Level` with the same names and shapes."""

    fov: Tensor
    region_of_token: Tensor
    tokens_of_region: Tensor
    region_offsets: Tensor
    token_bounds: tuple[Tensor, ...]


@lru_cache(maxsize=64)
def on_device(level: Level, device: torch.device) -> _LevelTensors:
    """Tensors of `level`, made once: a copy in every iteration would make host and GPU wait for each other."""
    return _LevelTensors(
        fov=torch.as_tensor(level.fov, device=device),
        region_of_token=torch.as_tensor(level.region_of_token, device=device),
        tokens_of_region=torch.as_tensor(level.tokens_of_region, device=device),
        region_offsets=torch.as_tensor(level.region_offsets, device=device),
        token_bounds=tuple(torch.as_tensor(bounds, device=device) for bounds in level.token_bounds),
    )


def random_masks(
    n: int, level: Level, device: torch.device, generator: torch.Generator, avoid: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw the masks of n views of a level and the places that their children are cut from.

    Whole regions are masked where regions are larger than a token, single tokens elsewhere; every view of a level has
    the same number of visible tokens.

    Args:
        n: views.
        level: geometry of the level.
        device: of the result.
        generator: random numbers, on the same device.
        avoid: (n, n_units) bool, True = a region or token that becomes a child's place only where no other masked one
            is left (air); it has no influence on the mask. None: all alike.

    Returns:
        ids_keep: (n, K) int64, raster numbers of the visible tokens, ascending.
        ids_masked: (n, M) int64, of the masked tokens, ascending.
        places: (n, n_children) int64, raster numbers of distinct masked regions; (n, 0) on the last level.
    """
    order = ranks.draw(n, level.n_units, device, generator).argsort(dim=1)
    masked_units = order[:, : level.n_masked_units]
    unit_mask = torch.zeros(n, level.n_units, dtype=torch.bool, device=device).scatter(1, masked_units, True)
    mask = unit_mask[:, on_device(level, device).region_of_token] if level.masks_regions else unit_mask
    tokens = mask.to(torch.uint8).argsort(dim=1, stable=True)  # visible first, each part in raster order
    ids_keep, ids_masked = tokens[:, : level.n_visible_tokens], tokens[:, level.n_visible_tokens :]
    if avoid is not None:
        last = avoid.gather(1, masked_units).to(torch.uint8).argsort(dim=1, stable=True)
        masked_units = masked_units.gather(1, last)
    return ids_keep.contiguous(), ids_masked.contiguous(), masked_units[:, : level.n_children]


def mask_of(ids_masked: Tensor, n_tokens: int) -> Tensor:
    """(N, M) raster numbers → (N, n_tokens) bool, True = masked."""
    mask = torch.zeros(ids_masked.shape[0], n_tokens, dtype=torch.bool, device=ids_masked.device)
    return mask.scatter(1, ids_masked, True)
