"""From a checkpoint of `mim_pretrain` and a case to pictures of what the network sees and makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_mim.config import PretrainConfig, Size3
from nnunet_mim.demo.figures import ReconstructedView
from nnunet_mim.geometry import Level, levels_of
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.networks.token_layout import grid_from_tokens, tokens_from_grid
from nnunet_mim.pretraining.losses import VARIANCE_EPS
from nnunet_mim.pretraining.nested_crops import LevelViews, nested_views
from nnunet_mim.pretraining.objective import level_name

CANDIDATES = (4, 8)  # children to choose from, per edge


def reconstruct_case(
    checkpoint: dict[str, Any], volume: np.ndarray, seed: int = 0, device: str = "cpu"
) -> list[ReconstructedView]:
    """Mask and reconstruct one view per level, each cut from a masked place of the one before.

    Args:
        checkpoint: as `nnunet_mim.pretraining.checkpoint.load_checkpoint` returns it.
        volume: (C, Z, Y, X) preprocessed like the pretraining's cases (same spacing and normalisation).
        seed: of the masks.
        device: to run the network on.

    Returns:
        One view per level, outermost first. The first one lies in the middle of the volume; of a view's children the
        brightest, which has least air, comes next. A reconstruction is the network's prediction with each token's true
        mean and standard deviation put back: it predicts voxels normalised by these, so they are not its work.
    """
    config = PretrainConfig.from_dict(checkpoint["mim_config"])
    levels = levels_of(replace(config, n_children=CANDIDATES))
    model = MaskInMask(config.network, config.in_channels, len(levels) - 1, config.alignment)
    model.load_state_dict(checkpoint["network_weights"])
    model.to(device).eval()

    provenance = checkpoint["provenance"]
    crop, valid = _middle_crop(volume, levels[0].fov)
    fill = torch.tensor([_window_minimum(provenance, c, volume) for c in range(config.in_channels)])
    generator = torch.Generator(device).manual_seed(seed)
    views = nested_views(crop.to(device), valid.to(device), fill.to(device), levels, generator)

    scale, shift = _to_hounsfield(provenance)
    number, shown = 0, []
    for i, view in enumerate(views):
        image, made, mask = _reconstruct(model, view, number)
        box = None
        if i + 1 < len(views):
            brightness = views[i + 1].images.mean(dim=(1, 2, 3, 4)).unflatten(0, (-1, view.level.n_children))[number]
            chosen = int(brightness.argmax())
            box = _place_in_view(view.level, int(view.places[number, chosen]))
            number = number * view.level.n_children + chosen
        title = f"{level_name(i, len(views)).replace('level', 'level ')}\n{_width(view.level.fov, provenance)}"
        shown.append(ReconstructedView(title, image * scale + shift, mask, made * scale + shift, box))
    return shown


@torch.no_grad()
def _reconstruct(model: MaskInMask, view: LevelViews, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First channel of view `number`, the same with masked tokens replaced by the prediction, its mask: (Z, Y, X)."""
    image, keep, masked = (t[number : number + 1] for t in (view.images, view.ids_keep, view.ids_masked))
    tokens = tokens_from_grid(image.permute(0, 2, 3, 4, 1), view.level.token_size)
    truth = tokens[:, masked[0]].flatten(2)
    variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
    predicted = model(image, keep, masked).prediction * (variance + VARIANCE_EPS).sqrt() + mean
    made, mask = tokens.clone(), torch.zeros_like(tokens)
    made[:, masked[0]] = predicted.reshape_as(made[:, masked[0]]).to(made.dtype)
    mask[:, masked[0]] = 1
    grid = view.level.grid
    whole, filled, hidden = (grid_from_tokens(t, grid)[0, ..., 0].cpu().numpy() for t in (tokens, made, mask))
    return whole, filled, hidden > 0


def _middle_crop(volume: np.ndarray, size: Size3) -> tuple[Tensor, Tensor]:
    """The box in the middle: crop (1, C, *size) with 0 outside the volume, and valid (1, 3, 2) as in `nested_views`."""
    shape, box = np.array(volume.shape[1:]), np.array(size)
    start = (shape - box) // 2
    low, high = np.maximum(start, 0), np.minimum(start + box, shape)
    valid = np.stack([low - start, high - start], axis=-1)
    crop = np.zeros((len(volume), *size), np.float32)
    inside = (slice(None), *(slice(*bounds) for bounds in valid))
    taken = (slice(None), *(slice(*bounds) for bounds in zip(low, high, strict=True)))
    crop[inside] = volume[taken]
    return torch.from_numpy(crop)[None], torch.from_numpy(valid.astype(np.int64))[None]


def _place_in_view(level: Level, place: int) -> tuple[slice, slice, slice]:
    """Voxels of the view that a region covers."""
    index = np.unravel_index(place, level.n_regions)
    sizes = [v // n for v, n in zip(level.view_size, level.n_regions, strict=True)]
    return tuple(slice(int(i) * s, (int(i) + 1) * s) for i, s in zip(index, sizes, strict=True))  # type: ignore[return-value]


def _width(fov: Sequence[int], provenance: dict[str, Any]) -> str:
    """Millimetres of the field of view, once if they are the same on all axes."""
    mm = [f"{n * s:.0f}" for n, s in zip(fov, provenance["spacing"], strict=True)]
    return f"{mm[0]} mm wide" if len(set(mm)) == 1 else f"{' × '.join(mm)} mm"


def _to_hounsfield(provenance: dict[str, Any]) -> tuple[float, float]:
    """(std, mean) of the first channel: HU = voxel * std + mean. (1, 0) where it is no CT."""
    if provenance["normalization"][0] != "CTNormalization":
        return 1.0, 0.0
    properties = provenance["intensity_properties"]["0"]
    return properties["std"], properties["mean"]


def _window_minimum(provenance: dict[str, Any], channel: int, volume: np.ndarray) -> float:
    """What padding is filled with: the lowest normalised intensity."""
    if provenance["normalization"][channel] != "CTNormalization":
        return float(volume[channel].min())
    properties = provenance["intensity_properties"][str(channel)]
    return (properties["percentile_00_5"] - properties["mean"]) / properties["std"]
