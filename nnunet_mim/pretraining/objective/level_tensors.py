"""The geometry of a level as tensors on a device, made once: a copy in every iteration would make host and GPU wait."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_mim.geometry import Level


class LevelTensors(NamedTuple):
    """int64 tensors of the properties of `Level` with the same names."""

    fov: Tensor
    """(3,)"""
    region_of_token: Tensor
    """(n_tokens,)"""
    tokens_of_region: Tensor
    """(n_places, tokens per region)"""
    region_offsets: Tensor
    """(n_places, 3)"""
    token_bounds: tuple[Tensor, ...]
    """per axis (g, 2)"""


@lru_cache(maxsize=64)
def on_device(level: Level, device: torch.device) -> LevelTensors:
    """Tensors of `level` on `device`."""
    return LevelTensors(
        fov=torch.as_tensor(level.fov, device=device),
        region_of_token=torch.as_tensor(level.region_of_token, device=device),
        tokens_of_region=torch.as_tensor(level.tokens_of_region, device=device),
        region_offsets=torch.as_tensor(level.region_offsets, device=device),
        token_bounds=tuple(torch.as_tensor(bounds, device=device) for bounds in level.token_bounds),
    )
