"""Nested views: from crops to the masked views of every level, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_mim.config import Size3
from nnunet_mim.geometry import Level
from nnunet_mim.networks.mask_in_mask import MaskedViews
from nnunet_mim.networks.token_layout import tokens_from_grid
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks
from nnunet_mim.pretraining.objective.losses import flat_tokens
from nnunet_mim.pretraining.objective.masks import on_device, random_masks


@dataclass(frozen=True)
class LevelViews:
    """The N masked views of one level of a batch of crops."""

    level: Level
    images: Tensor
    """(N, C, *view_size)"""
    crop: Tensor
    """(N,) int64: which crop of the batch a view was cut from"""
    offset: Tensor
    """(N, 3) int64: first voxel of its box in the crop"""
    ids_keep: Tensor
    """(N, K) int64: raster numbers of visible tokens"""
    ids_masked: Tensor
    """(N, M) int64: raster numbers of masked tokens"""
    places: Tensor
    """(N, n_children) int64: masked regions of the children; child i of view n is view n*n_children + i"""
    padded: Tensor
    """(N, L) bool: True = the token has a voxel outside the volume in it"""
    outside: Tensor
    """(N,) bool: True = the view is all padding"""

    def of(self, rows: Tensor) -> LevelViews:
        """Some of the views, by number (n,) int64."""
        tensors = {name: value[rows] for name, value in vars(self).items() if name != "level"}
        return LevelViews(self.level, **tensors)

    def masked(self, part: slice = slice(None)) -> MaskedViews:
        """What a network gets of all views, or of a part of them."""
        return MaskedViews(self.images[part], self.ids_keep[part], self.ids_masked[part])

    def masked_tokens(self, part: slice = slice(None)) -> Tensor:
        """(N, M, P) voxels of the masked tokens of all views, or of a part of them: C order, channel last; P = voxels
        of a token x channels.
        """
        images, ids_masked = self.images[part], self.ids_masked[part]
        rows = torch.arange(images.shape[0], device=images.device)[:, None]
        tokens = tokens_from_grid(images.permute(0, 2, 3, 4, 1), self.level.token_size)
        return tokens[rows, ids_masked].flatten(2)


def nested_views(
    crops: Tensor,
    valid: Tensor,
    fill: Tensor,
    levels: tuple[Level, ...],
    generator: torch.Generator,
    flat_threshold: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> list[LevelViews]:
    """Cut, resize and mask the views of all levels.

    Args:
        crops: (B, C, *levels[0].fov) float. What lies outside `valid` is overwritten before anything else.
        valid: (B, 3, 2) int64: first and one-past-last voxel per axis that lies inside the volume.
        fill: (C,) float: the intensity window's minimum, given to voxels outside the volume.
        levels: geometry, outermost first.
        generator: random numbers for masks and places, on the device of the crops.
        flat_threshold: (C,) standard deviation below which a token counts as air; children are then cut from masked
            places with some tissue in them as long as there are any (docs/adr/0001). None: from any masked place.
        ranks: the crops are this rank's part of a batch; the generator has the same state on all ranks.

    Returns:
        One LevelViews per level; level l+1 has n_children views for each view of level l, in its order.
    """
    device = crops.device
    crops = _fill_padding(crops, valid, fill)
    crop = torch.arange(crops.shape[0], device=device)
    offset = torch.zeros(crops.shape[0], 3, dtype=torch.int64, device=device)
    views = []
    for level in levels:
        images = _resize(_cut(crops, crop, offset, level.fov), level)
        padded = _padded_tokens(offset, valid[crop], level)
        avoid = None
        if flat_threshold is not None and level.n_children:
            avoid = _empty_places(images, padded, level, flat_threshold)
        ids_keep, ids_masked, places = random_masks(crop.shape[0], level, device, generator, avoid, ranks)
        box_end = offset + on_device(level, device).fov
        outside = ((box_end <= valid[crop, :, 0]) | (offset >= valid[crop, :, 1])).any(dim=1)
        views.append(LevelViews(level, images, crop, offset, ids_keep, ids_masked, places, padded, outside))
        offset = (offset[:, None] + on_device(level, device).region_offsets[places]).flatten(0, 1)
        crop = crop.repeat_interleave(places.shape[1], output_size=crop.shape[0] * places.shape[1])
    return views


def _fill_padding(crops: Tensor, valid: Tensor, fill: Tensor) -> Tensor:
    """Replace every voxel outside the volume by the window's minimum. Shapes as in `nested_views`."""
    B, _, *size = crops.shape
    inside = torch.ones(B, 1, *size, dtype=torch.bool, device=crops.device)
    for axis in range(3):
        index = torch.arange(size[axis], device=crops.device)
        within = (index >= valid[:, axis, :1]) & (index < valid[:, axis, 1:])  # (B, size of the axis)
        inside &= within.reshape(B, 1, *(-1 if a == axis else 1 for a in range(3)))
    return torch.where(inside, crops, fill.to(crops.dtype).reshape(1, -1, 1, 1, 1))


def _cut(crops: Tensor, crop: Tensor, offset: Tensor, fov: Size3) -> Tensor:
    """Cut one box per view: (B, C, …), (N,), (N, 3) → (N, C, *fov)."""
    if fov == tuple(crops.shape[2:]):
        return crops
    x, y, z = (offset[:, a, None] + torch.arange(fov[a], device=crops.device) for a in range(3))  # each (N, fov)
    boxes = crops[crop[:, None, None, None], :, x[:, :, None, None], y[:, None, :, None], z[:, None, None, :]]
    return boxes.permute(0, 4, 1, 2, 3)  # (N, fx, fy, fz, C) → (N, C, fx, fy, fz)


def _resize(boxes: Tensor, level: Level) -> Tensor:
    """Resize (N, C, *fov) to (N, C, *view_size): area average down, trilinear (align_corners=False) up."""
    if max(level.down) > 1:
        boxes = F.avg_pool3d(boxes, level.down)
    if tuple(boxes.shape[2:]) != level.view_size:
        boxes = F.interpolate(boxes, size=level.view_size, mode="trilinear", align_corners=False)
    return boxes


def _empty_places(images: Tensor, padded: Tensor, level: Level, flat_threshold: Tensor) -> Tensor:
    """Which places hold no target: every token of theirs is flat (air) or has padding in it.

    Returns:
        (N, n_places) bool, True = empty; of images (N, C, *view_size) with `padded` as in LevelViews.
    """
    tokens = tokens_from_grid(images.permute(0, 2, 3, 4, 1), level.token_size).flatten(2)
    no_target = flat_tokens(tokens, flat_threshold) | padded  # (N, L)
    return no_target[:, on_device(level, images.device).tokens_of_region].all(dim=2)


def _padded_tokens(offset: Tensor, valid: Tensor, level: Level) -> Tensor:
    """Which tokens have a voxel outside the volume in them: (N, L) bool, True = padding in the token.

    Args:
        offset: (N, 3) first voxel of each view's box in its crop.
        valid: (N, 3, 2) volume's first and one-past-last voxel in the crop, per view.
        level: geometry.
    """
    N, _ = offset.shape
    padded = torch.zeros(N, *level.grid, dtype=torch.bool, device=offset.device)
    for axis, bounds in enumerate(on_device(level, offset.device).token_bounds):
        low, high = (bounds[:, i] + offset[:, axis, None] for i in (0, 1))
        outside = (low < valid[:, axis, :1]) | (high > valid[:, axis, 1:])  # (N, g)
        padded |= outside.reshape(N, *(-1 if a == axis else 1 for a in range(3)))
    return padded.flatten(1)
