"""Losses on fixed crops of held-out cases, beside trivial predictors on the same tokens, and the spread of features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_mim.config import PretrainConfig
from nnunet_mim.geometry import level_number, levels_of
from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.networks.mask_in_mask import HasUNet, MaskedViews, Reconstruction, Reconstructs
from nnunet_mim.pretraining.monitoring.baselines import trivial_losses
from nnunet_mim.pretraining.monitoring.figures import (
    GuessFigures,
    HeldOutLevel,
    LevelFigures,
    Measurement,
    averaged,
    mapped,
)
from nnunet_mim.pretraining.objective.levels import (
    add_pass,
    level_losses,
    summed,
    target_tokens,
    unet_losses,
    unet_views,
)
from nnunet_mim.pretraining.objective.losses import voxel_error
from nnunet_mim.pretraining.objective.views import LevelViews, nested_views

VIEWS_AT_ONCE = 128
"""maximum number of views of several crops that are computed at once on a GPU, without gradients"""


class _Computed:
    """Outputs of a network in place of the network."""

    def __init__(self, network: Reconstructs, outputs: list[Reconstruction]) -> None:
        self.outputs, self.align = outputs, network.align

    def __call__(self, groups: Sequence[MaskedViews], recompute: bool = False) -> list[Reconstruction]:
        return self.outputs


class HeldOut:
    """Measures a network on held-out crops, with fixed masks and children.

    Args:
        crops, valid, fill: as in `nested_views`.
        datasets: name of each crop's dataset.
        flat_threshold, width: (C,) as in RunData.
        config: of the run; its seed fixes the masks.
        views_per_pass: largest number of views computed at once; None: those of several crops.
    """

    def __init__(
        self,
        crops: Tensor,
        valid: Tensor,
        datasets: Sequence[str],
        fill: Tensor,
        flat_threshold: Tensor,
        width: Tensor,
        config: PretrainConfig,
        views_per_pass: int | None = None,
    ) -> None:
        self.datasets = datasets
        self.views_per_pass = views_per_pass
        self.flat_threshold = flat_threshold
        self.width = width
        self.config = config
        place_threshold = flat_threshold if config.body_children else None
        self.views: list[list[LevelViews]] = []
        """of each crop, by level"""
        for number, (crop, box) in enumerate(zip(crops, valid, strict=True)):
            generator = torch.Generator(crops.device).manual_seed(config.seed * 1_000_003 + number)
            views = nested_views(crop[None], box[None], fill, levels_of(config), generator, place_threshold)
            self.views.append(views)
        self.is_target = [
            [target_tokens(view, view.masked_tokens(), flat_threshold)[0] for view in views] for views in self.views
        ]
        """(N, M) bool for each of the views: True = the masked token counts in the loss"""
        self.n_targets = [[float(crop.sum()) for crop in level] for level in zip(*self.is_target, strict=True)]
        """of each crop, by level"""
        self.unet_targets = self._targets_of_unet()
        """by number of each level that the U-Net around the encoder sees: target tokens of all crops"""
        self.constants = [self._constants(position) for position in range(len(self.n_targets))]

    @property
    def without_targets(self) -> list[int]:
        """Numbers of the levels that no held-out crop has a target token of: all are padding or air."""
        n_levels = len(self.n_targets)
        return [level_number(position, n_levels) for position, n in enumerate(self.n_targets) if not any(n)]

    @torch.no_grad()
    def evaluate(self, model: PretrainingNetwork) -> Measurement[float]:
        """Means over all target tokens, or over crops for what has none, and the spread of the encoder's features."""
        found = [self._evaluate_crop(one, number) for number, one in enumerate(self._networks_of_crops(model))]
        crops = _as_numbers(found)  # one transfer for all crops; spread and U-Net below have one more each
        by_level = zip(*crops, strict=True)
        levels = [self._mean_level(position, *zip(*level, strict=True)) for position, level in enumerate(by_level)]
        if self.unet_targets:
            unet = self._losses_of_unet(model)
            levels = [replace(level, unet=unet.get(level.number)) for level in levels]
        rank, std = _feature_spread(self._visible_features(model))
        measured = any(level.reconstruction is not None for level in levels)
        loss = sum(level.loss or 0.0 for level in levels) if measured else None
        return Measurement(levels=tuple(levels), loss=loss, feature_rank=rank, feature_std=std)

    def _networks_of_crops(self, model: PretrainingNetwork) -> Iterator[Reconstructs]:
        """What computes each crop: the network, or its outputs where it computes several crops at once."""
        n_views = sum(len(view.images) for view in self.views[0])
        n_crops = max(1, VIEWS_AT_ONCE // n_views) if self.views_per_pass is None else 0
        if n_crops < 2:
            yield from [model] * len(self.views)
            return
        for first in range(0, len(self.views), n_crops):
            crops = self.views[first : first + n_crops]
            outputs = iter(model([view.masked() for views in crops for view in views]))
            yield from [_Computed(model, list(islice(outputs, len(views)))) for views in crops]

    def _evaluate_crop(self, model: Reconstructs, number: int) -> list[tuple[LevelFigures[Tensor], Tensor]]:
        """Figures of each level on one crop, and the `voxel_error` of its target tokens."""
        levels: list[LevelFigures[Tensor]] = []
        errors: list[Tensor] = []
        n_done = 0  # views of the level that earlier passes have computed
        views, is_target = self.views[number], self.is_target[number]
        passes = level_losses(model, views, self.flat_threshold, self.config, self.views_per_pass)
        for part in (part for _, parts in passes for part in parts):
            if not levels or levels[-1].number != part.figures.number:
                n_done = 0
            add_pass(levels, part.figures)
            position, rows = len(levels) - 1, slice(n_done, n_done + part.prediction.shape[0])
            tokens = views[position].masked_tokens(rows)
            error = voxel_error(part.prediction, tokens, is_target[position][rows], self.width)
            errors[position:] = [errors[position] + error if n_done else error]
            n_done = rows.stop
        return list(zip(levels, errors, strict=True))

    def _targets_of_unet(self) -> dict[int, Tensor]:
        crops = [unet_views(views, self.config) for views in self.views] if self.config.decoder == "unet" else []
        return summed(
            {n: target_tokens(view, view.masked_tokens(), self.flat_threshold)[0].sum() for n, view in seen}
            for seen in crops
        )

    def _losses_of_unet(self, model: PretrainingNetwork) -> dict[int, float]:
        """Reconstruction loss of the U-Net by level, the mean over all target tokens; none without a target."""
        unet: HasUNet = model  # type: ignore[assignment]
        n_targets = list(self.unet_targets.values())
        of_crops = (
            shares
            for views in self.views
            for _, shares in unet_losses(
                unet, views, self.flat_threshold, self.config, self.views_per_pass, n_targets=n_targets
            )
        )
        return {number: float(loss) for number, loss in summed(of_crops).items() if self.unet_targets[number] > 0}

    def _visible_features(self, model: PretrainingNetwork) -> Tensor:
        """(T, D) features of the visible tokens of the first view of every level of every crop."""
        firsts = [[view.masked(slice(0, 1)) for view in views] for views in self.views]
        if self.views_per_pass is None:  # one call a level
            firsts = [[MaskedViews(*map(torch.cat, zip(*level, strict=True))) for level in zip(*firsts, strict=True)]]
        return torch.cat([model.visible_features(*view).flatten(0, 1).float() for views in firsts for view in views])

    def _mean_level(
        self, position: int, crops: Sequence[LevelFigures[float]], errors: Sequence[float]
    ) -> HeldOutLevel[float]:
        """One level, from figures and `voxel_error` of every crop; without a target there is no loss."""
        targets, names = self.n_targets[position], dict.fromkeys(self.datasets)
        datasets = {}
        for dataset in names if len(names) > 1 else ():
            own = [i for i, n in enumerate(targets) if n and self.datasets[i] == dataset]
            if own:
                losses = [crops[i].reconstruction for i in own]
                datasets[dataset] = _weighted_mean(losses, [targets[i] for i in own])
        level = replace(self.constants[position], **vars(averaged(crops, _mean_if_any)))
        if not any(targets):
            return level
        mean_errors = [error / max(n, 1.0) for error, n in zip(errors, targets, strict=True)]
        return replace(level, psnr=_decibel(_weighted_mean(mean_errors, targets)), datasets=datasets)

    def _constants(self, position: int) -> HeldOutLevel[float]:
        """What does not depend on the network: trivial predictors, and alignment by chance."""
        pairs = zip(self.views, self.is_target, strict=True)
        crops = [trivial_losses(views[position], is_target[position], self.width) for views, is_target in pairs]
        targets, guesses = self.n_targets[position], {}
        for name in crops[0] if any(targets) else ():
            losses, errors = zip(*(crop[name] for crop in crops), strict=True)
            guesses[name] = _weighted_mean(losses, targets)
            guesses[f"{name}_psnr"] = _decibel(_weighted_mean(errors, targets))
        chance = None
        if position and self.config.alignment == "infonce":
            parent = self.views[0][position - 1]
            chance = 1 / (parent.images.shape[0] * parent.level.n_places)
        number = level_number(position, len(self.views[0]))
        return HeldOutLevel(number, alignment_chance=chance, guesses=GuessFigures(**guesses))


def _as_numbers(
    crops: Sequence[Sequence[tuple[LevelFigures[Tensor], Tensor]]],
) -> list[list[tuple[LevelFigures[float], float]]]:
    """Figures and errors of every level of every crop, in one transfer from the device."""
    values: list[Tensor] = []
    for level, error in (pair for crop in crops for pair in crop):
        mapped(lambda figure: values.append(figure.sum()), level)
        values.append(error)
    numbers: Any = iter(torch.stack([value.float() for value in values]).tolist())
    return [[(mapped(lambda _: next(numbers), level), next(numbers)) for level, _ in crop] for crop in crops]  # type: ignore[arg-type]


def _decibel(error: float) -> float:
    """Peak signal-to-noise ratio of a mean squared error in units of the peak."""
    return -10 * math.log10(max(error, 1e-12))


def _feature_spread(features: Tensor) -> tuple[float, float]:
    """How far an encoder's features (T, D) of T tokens are from all being the same.

    Returns:
        Effective rank: exp of the entropy of the singular values of the centred features as shares of their sum
        (RankMe, arXiv 2210.02885; there uncentred), between 1 and min(T, D). And the mean over dimensions of the
        standard deviation of L2-normalised features times sqrt(D): about 1 for features in all directions, 0 where all
        are the same.
    """
    features = features.double()
    values = torch.linalg.svdvals(features - features.mean(dim=0))
    share = values / values.sum().clamp(min=1e-30)
    rank = torch.exp(-(share * share.clamp(min=1e-30).log()).sum())
    std = F.normalize(features, dim=1).std(dim=0).mean() * features.shape[1] ** 0.5
    return float(rank), float(std)


def _mean_if_any(values: Sequence[Any], weights: Sequence[Any] | None = None) -> float | None:
    """`_weighted_mean`, or None where all weights are 0: figures of target tokens where there is no target."""
    return None if weights is not None and not any(weights) else _weighted_mean(values, weights)


def _weighted_mean(values: Sequence[Any], weights: Sequence[Any] | None = None) -> float:
    """Mean of numbers, whose weights are not all 0. None: all weigh the same."""
    total = total_weight = 0.0
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        total += float(value) * float(weight)
        total_weight += float(weight)
    return total / max(total_weight, 1e-12)
