"""From a checkpoint of `mim_pretrain` and a case to pictures of what the network sees and makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_mim.checkpoint.units import Units
from nnunet_mim.config import FLAT_FRACTION, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import Level, crop_start, level_number, levels_of
from nnunet_mim.networks.build import PretrainingNetwork, build_network
from nnunet_mim.networks.token_layout import grid_from_tokens, tokens_from_grid
from nnunet_mim.nnunet.orientation import Orientation
from nnunet_mim.pretraining.monitoring.baselines import infill_tokens
from nnunet_mim.pretraining.objective.losses import VARIANCE_EPS, normalize_tokens
from nnunet_mim.pretraining.objective.views import LevelViews, nested_views
from nnunet_mim.reporting.views import ReconstructedView, interest


@dataclass(frozen=True)
class LevelPicture:
    """One view of one level, first channel: arrays of the view's size in the order of preprocessed cases, HU for CT."""

    number: int
    """of the level, 1 to 3"""
    level: Level
    input: np.ndarray
    mask: np.ndarray
    """bool per voxel, True = masked"""
    reconstruction: np.ndarray
    """the input with masked tokens replaced by the network's prediction, each token's true mean and standard deviation
    put back
    """
    given: np.ndarray
    """the same with nothing but the mean of each token"""
    infill: np.ndarray
    """the same with the pattern of the nearest visible voxels"""
    start: tuple[int, int, int]
    """first voxel of the field of view in the preprocessed volume; may be negative"""
    child_box: tuple[slice, slice, slice] | None
    """masked voxels that the next level's view was cut from"""

    @property
    def name(self) -> str:
        return f"level{self.number}"

    @property
    def step(self) -> tuple[float, float, float]:
        """Voxels of the preprocessed volume from one voxel of the view to the next, per axis."""
        x, y, z = (f / v for f, v in zip(self.level.fov, self.level.view_size, strict=True))
        return x, y, z


def load_network(checkpoint: Mapping[str, Any], device: str = "cpu") -> PretrainingNetwork:
    """The network of a checkpoint, without what alignment needs, ready to reconstruct.

    Raises:
        MiMError: the weights are not those of the network that the checkpoint says.
    """
    config = replace(PretrainConfig.from_dict(checkpoint["mim_config"]), alignment="none")
    with torch.random.fork_rng(devices=[]):  # a run that draws pictures computes what one without them does
        model = build_network(config)
    weights = {n: w for n, w in checkpoint["network_weights"].items() if not n.startswith("projectors.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise MiMError(
            f"the checkpoint's weights are not those of its network ({str(error).splitlines()[-1].strip()}): take "
            "another copy"
        ) from error
    return model.to(device).eval()


def reconstruct_volume(
    model: PretrainingNetwork, checkpoint: Mapping[str, Any], volume: np.ndarray, seed: int = 0
) -> list[LevelPicture]:
    """As `reconstruct_crop`, of the box around the middle of the body in a volume (C, X, Y, Z).

    The volume is preprocessed like the pretraining's cases (same spacing and normalisation).
    """
    size = np.array(levels_of(PretrainConfig.from_dict(checkpoint["mim_config"]))[0].fov)
    start = crop_start(np.array(volume.shape[1:]), size, _tissue_centre(volume[0], Units.of(checkpoint["provenance"])))
    low, high = np.maximum(start, 0), np.minimum(start + size, volume.shape[1:])
    inside = (slice(None), *map(slice, low, high))
    outside = [(0, 0), *zip(low - start, start + size - high, strict=True)]
    crop = np.pad(np.asarray(volume[inside], np.float32), outside)
    return reconstruct_crop(model, checkpoint, crop, np.stack([low - start, high - start], axis=-1), start, seed)


@torch.no_grad()
def reconstruct_crop(
    model: PretrainingNetwork, checkpoint: Mapping[str, Any], crop: np.ndarray, valid: np.ndarray, start: np.ndarray,
    seed: int = 0,
) -> list[LevelPicture]:  # fmt: skip
    """Mask and reconstruct one view per level, each cut from a masked place of the one before.

    Args:
        model: of `load_network`.
        checkpoint: as `load_checkpoint` returns it.
        crop: (C, *field of view of level 1) normalised voxels.
        valid: (3, 2) first and one-past-last voxel of the crop that lies inside the volume.
        start: (3,) first voxel of the crop in the volume.
        seed: of the masks.

    Returns:
        One view per level, outermost first.
    """
    config, units = PretrainConfig.from_dict(checkpoint["mim_config"]), Units.of(checkpoint["provenance"])
    device = next(model.parameters()).device
    body = (slice(None), *(slice(*bounds) for bounds in valid))
    inside = crop[body]
    windows = np.array([units.window(channel, inside[channel]) for channel in range(config.in_channels)], np.float32)
    fill = torch.from_numpy(windows[:, 0]).to(device)
    flat = FLAT_FRACTION * torch.from_numpy(windows[:, 1] - windows[:, 0]).to(device)
    levels = levels_of(replace(config, n_children=(4, 8)))  # of so many children the most interesting one is shown
    views = nested_views(
        torch.from_numpy(crop)[None].to(device), torch.from_numpy(valid)[None].to(device), fill, levels,
        torch.Generator(device).manual_seed(seed), flat,
    )  # fmt: skip

    (scale, shift), (black, white) = units.scale(), units.grey(inside[0])
    row, pictures = 0, []  # number of the view among those of its level
    for position, view in enumerate(views):
        mask, *filled = (a.cpu().numpy() for a in _fill_in(model, _one_view(view, row)))
        image, made, given, infill = (a * scale + shift for a in (view.images[row, 0].cpu().numpy(), *filled))
        first = tuple(int(v) for v in start + view.offset[row].cpu().numpy())
        box = None
        if position + 1 < len(views):
            n = view.level.n_children
            children = views[position + 1].images[row * n : (row + 1) * n, 0].cpu().numpy() * scale + shift
            chosen = int(np.argmax([interest(np.clip((c - black) / (white - black), 0, 1)) for c in children]))
            region = np.unravel_index(int(view.places[row, chosen]), view.level.n_regions)
            sizes = [v // n for v, n in zip(view.level.view_size, view.level.n_regions, strict=True)]
            box = tuple(slice(int(i) * s, (int(i) + 1) * s) for i, s in zip(region, sizes, strict=True))
            row = row * n + chosen
        level = level_number(position, len(views))
        pictures.append(LevelPicture(level, view.level, image, mask, made, given, infill, first, box))  # type: ignore[arg-type]
    return pictures


def _one_view(views: LevelViews, row: int) -> LevelViews:
    """One of the views of a level (N = 1)."""
    tensors = {name: value[row : row + 1] for name, value in vars(views).items() if torch.is_tensor(value)}
    return LevelViews(level=views.level, **tensors)


def _fill_in(model: PretrainingNetwork, view: LevelViews) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First channel of one view (N = 1) with its masked tokens filled in three ways.

    Returns:
        mask (bool, True = masked); the view with the masked tokens as predicted by the network, as their mean alone,
        and as the nearest visible voxels. Each is given the token's true mean, and but for the second its true standard
        deviation: that is how the loss compares them. All of the view's size.
    """
    truth = view.masked_tokens()  # (1, M, P)
    variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
    std = (variance + VARIANCE_EPS).sqrt()
    predicted = model([view.masked()])[0].prediction.float()
    nearest = normalize_tokens(infill_tokens(view))
    tokens = tokens_from_grid(view.images.permute(0, 2, 3, 4, 1), view.level.token_size)
    masked, grid = view.ids_masked[0], view.level.grid

    def view_with(values: Tensor) -> Tensor:
        filled = tokens.clone()
        filled[:, masked] = values.reshape(1, len(masked), *tokens.shape[2:]).to(tokens.dtype)
        return grid_from_tokens(filled, grid)[0, ..., 0]

    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, masked] = True
    mask = grid_from_tokens(hidden, grid)[0, ..., 0]
    return mask, view_with(predicted * std + mean), view_with(mean.expand_as(truth)), view_with(nearest * std + mean)


def _tissue_centre(volume: np.ndarray, units: Units) -> np.ndarray:
    """Mean position (3,) of what is no air in the first channel (X, Y, Z); the middle where all is air."""
    scale, shift = units.scale()
    black, white = units.grey(volume)
    coarse = volume[::4, ::4, ::4] * scale + shift
    tissue = np.argwhere(coarse > black + 0.1 * (white - black))
    return tissue.mean(axis=0) * 4 + 0.5 if len(tissue) else np.array(volume.shape) / 2


def upright(
    pictures: Sequence[LevelPicture], spacing: Sequence[float], orientation: Orientation
) -> list[ReconstructedView]:
    """Pictures turned for `views_figure`; spacing (mm) and orientation are those of the preprocessed case."""
    views = []
    for picture in pictures:
        size = orientation.triple([f * s for f, s in zip(picture.level.fov, spacing, strict=True)])
        box = picture.child_box
        view = ReconstructedView(
            title=f"level {picture.number}\n{_size_text(size)}",
            input=orientation.array(picture.input),
            mask=orientation.array(picture.mask),
            reconstruction=orientation.array(picture.reconstruction),
            child_box=None if box is None else orientation.box(box, picture.level.view_size),
            spacing=orientation.triple([s * t for s, t in zip(spacing, picture.step, strict=True)]),
            given=orientation.array(picture.given),
            infill=orientation.array(picture.infill),
        )
        views.append(view)
    return views


def _size_text(size: Sequence[float]) -> str:
    """Millimetres of a box (z, y, x): once if all axes are the same, else left–right × front–back × foot–head."""
    numbers = [f"{n:.0f}" for n in reversed(size)]
    return f"{numbers[0]} mm wide" if len(set(numbers)) == 1 else f"{' × '.join(numbers)} mm"
