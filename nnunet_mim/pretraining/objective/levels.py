"""The objective of one iteration: every level's reconstruction, its agreement with the level above, and the U-Net's
reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_mim.config import PretrainConfig
from nnunet_mim.geometry import Level, level_number
from nnunet_mim.networks.mask_in_mask import HasUNet, Reconstruction, Reconstructs
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks
from nnunet_mim.pretraining.monitoring.figures import LevelFigures, mapped
from nnunet_mim.pretraining.objective.losses import cosine_loss, flat_tokens, infonce_loss, reconstruction_loss
from nnunet_mim.pretraining.objective.masks import on_device
from nnunet_mim.pretraining.objective.views import LevelViews


class _Part(NamedTuple):
    """The views of one level in one pass."""

    figures: LevelFigures[Tensor]
    """their share of the level's figures, detached, to be summed by `add_pass` and over ranks"""
    prediction: Tensor
    """(n, M, P) of the network, see Reconstruction"""


def level_losses(
    model: Reconstructs,
    views: list[LevelViews],
    flat_threshold: Tensor,
    config: PretrainConfig,
    views_per_pass: int | None = None,
    recompute: tuple[int, ...] = (),
    ranks: Ranks = ALONE,
    n_computed: int | None = None,
) -> Iterator[tuple[Tensor, list[_Part]]]:
    """Compute the objective in passes, outermost level first: all levels in one pass, or each level in its own.

    Features of a parent level are detached, and every view's loss is a share of its level's mean. So the losses sum to
    the objective, also over ranks, and each can be back-propagated before the next pass runs: memory is that of one
    pass. Children are contrasted with the places of all ranks' parents.

    Args:
        model: network of pretraining, or what calls one.
        flat_threshold: (C,) standard deviation below which a token is no target.
        views_per_pass: largest number of views in one pass, all of one level; None: all of all levels.
        recompute: numbers (1 to 3) of the levels that keep no activations inside blocks; every level has its own pass.
        ranks: the views are this rank's part of a batch, as large on every rank.
        n_computed: number of levels, from the outermost on; None: all. See `PretrainConfig.levels_that_count`.

    Yields:
        the pass's share of the weighted loss, and what it holds of each level.
    """
    levels = (_level(position, views, flat_threshold, ranks) for position in range(len(views))[:n_computed])
    parent_features = None
    features: list[Tensor] = []  # (n * places, D) detached, of the places of the level's views computed so far
    for one_pass in _passes_of_levels(levels, views_per_pass, apart=bool(recompute)):
        groups = [level.views.masked(rows) for level, rows in one_pass]
        outputs = model(groups, any(level.number in recompute for level, _ in one_pass))
        losses, parts = [], []
        for (level, rows), output in zip(one_pass, outputs, strict=True):
            if rows.start == 0 and level.own_place is not None:  # a level begins: its parents are complete
                parent_features = ranks.gather(torch.cat(features))  # (ranks*N*places, D)
                features = []
            loss, figures = _part_of_loss(model, level, rows, output, parent_features, config)
            padded_share, flat_share = (share[rows].sum() / ranks.world for share in (level.padded, level.flat))
            nonfinite = _nonfinite_views(output.features, level.views.crop[rows], n_crops=len(views[0].images))
            figures = replace(figures, padded_share=padded_share, flat_share=flat_share, nonfinite=nonfinite)
            losses.append(loss)
            parts.append(_Part(mapped(torch.detach, figures), output.prediction))
            features.append(_place_features(output.features.detach(), level.views.level))
        yield sum(losses[1:], losses[0]), parts


@dataclass(frozen=True)
class _Level:
    """All views of a level, and what their losses are shares of."""

    views: LevelViews
    number: int
    tokens: Tensor
    """(N, M, P) voxels of the masked tokens"""
    is_target: Tensor
    """(N, M) bool: True = the masked token counts in the loss"""
    padded: Tensor
    """(N,) share of all masked tokens of the level that hold padding"""
    flat: Tensor
    """(N,) share of them that are flat"""
    n_targets: Tensor
    """scalar, of all ranks"""
    inside: Tensor
    """(N,) weights, 0 for a view outside the volume"""
    n_inside: Tensor
    """scalar, their sum over all ranks"""
    own_place: Tensor | None
    """(N,) int64, row of the parents' places that each view was cut from; None for the outermost level"""


def _level(position: int, views: list[LevelViews], flat_threshold: Tensor, ranks: Ranks) -> _Level:
    """The level at a position, with none of its views computed."""
    view = views[position]
    tokens = view.masked_tokens()
    is_target, padded, flat = target_tokens(view, tokens, flat_threshold)
    inside = (~view.outside).to(view.images.dtype)
    own_place = _place_index(views[position - 1], ranks.rank) if position else None
    n_targets, n_inside = ranks.sum(is_target.sum()), ranks.sum(inside.sum())
    number = level_number(position, len(views))
    return _Level(view, number, tokens, is_target, padded, flat, n_targets, inside, n_inside, own_place)


def _part_of_loss(
    model: Reconstructs, level: _Level, rows: slice, output: Reconstruction, parent_features: Tensor | None,
    config: PretrainConfig,
) -> tuple[Tensor, LevelFigures[Tensor]]:
    """Weighted loss of some views of a level as their share of the level's mean, and its parts."""
    tokens, is_target = level.tokens[rows], level.is_target[rows]  # (n, M, P), (n, M)
    reconstruction = reconstruction_loss(output.prediction, tokens, is_target, level.n_targets)
    loss = config.level_weights[level.number - 1] * reconstruction
    alignment = top1 = None
    edge = level.number - 2 if level.own_place is not None else None
    child, parent = model.align(output.features, edge, parent_features)
    if child is not None and parent is not None and level.own_place is not None:
        pairs = child, parent, level.own_place[rows], level.inside[rows]
        if config.alignment == "infonce":
            alignment, top1 = infonce_loss(*pairs, config.temperature, level.n_inside)
        else:
            alignment = cosine_loss(*pairs, level.n_inside)
        loss = loss + config.alignment_weight * alignment
    return loss, LevelFigures(
        level.number, reconstruction=reconstruction, targets=is_target.float().sum(), alignment_top1=top1,
        alignment=alignment, loss=loss,
    )  # fmt: skip


def unet_losses(
    model: HasUNet,
    views: list[LevelViews],
    flat_threshold: Tensor,
    config: PretrainConfig,
    views_per_pass: int | None = None,
    ranks: Ranks = ALONE,
    n_targets: Sequence[Tensor] | None = None,
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Compute the reconstruction loss of the U-Net around the encoder, in passes as `level_losses`.

    Args:
        model, views, flat_threshold, views_per_pass, ranks: as in `level_losses`.
        n_targets: scalar for each level that the U-Net sees: number of target tokens that its loss is the mean over;
            None: those of these views, on all ranks.

    Yields:
        the pass's share of the weighted loss; and, by number of each level in it, its share of the level's loss.
    """
    levels = unet_views(views, config)
    tokens = [view.masked_tokens() for _, view in levels]  # (N, M, P) of each
    is_target = [target_tokens(view, own, flat_threshold)[0] for (_, view), own in zip(levels, tokens, strict=True)]
    n_targets = n_targets or [ranks.sum(targets.sum()) for targets in is_target]
    numbered = list(enumerate(levels))
    passes = [[(at, number, view, slice(None)) for at, (number, view) in numbered]]
    if views_per_pass is not None:
        passes = [
            [(at, number, view, rows)]
            for at, (number, view) in numbered
            for rows in _passes(len(view.images), views_per_pass)
        ]
    for one_pass in passes:
        predictions = model.reconstruct_with_unet([view.masked(rows) for _, _, view, rows in one_pass])
        losses = {
            number: reconstruction_loss(prediction, tokens[at][rows], is_target[at][rows], n_targets[at])
            for prediction, (at, number, _, rows) in zip(predictions, one_pass, strict=True)
        }
        total = sum(losses.values(), torch.zeros((), device=flat_threshold.device))
        yield config.unet_weight * total, {number: loss.detach() for number, loss in losses.items()}


def unet_views(views: list[LevelViews], config: PretrainConfig) -> list[tuple[int, LevelViews]]:
    """The levels that the U-Net sees: number of each, and its first `config.unet_views` views of every crop."""
    chosen, n_crops = [], len(views[0].images)
    for number in config.unet_levels(len(views)):
        view = views[number - level_number(0, len(views))]
        rows = torch.arange(len(view.images), device=view.images.device).view(n_crops, -1)
        chosen.append((number, view.of(rows[:, : config.unet_views[number - 1]].flatten())))
    return chosen


def summed(passes: Iterable[dict[int, Tensor]]) -> dict[int, Tensor]:
    """Shares of the U-Net's loss, by level, summed over passes."""
    total: dict[int, Tensor] = {}
    for shares in passes:
        for number, share in shares.items():
            total[number] = total[number] + share if number in total else share
    return total


def _passes_of_levels(
    levels: Iterable[_Level], views_per_pass: int | None, apart: bool
) -> Iterator[list[tuple[_Level, slice]]]:
    """The levels, each with the rows of its views, in passes; `apart`: no two levels in one. A level is made when its
    first pass is, so that a CPU holds the targets of one level at a time.
    """
    if views_per_pass is None and not apart:
        yield [(level, slice(0, len(level.views.images))) for level in levels]
        return
    for level in levels:
        for rows in _passes(len(level.views.images), views_per_pass):
            yield [(level, rows)]


def _passes(n_views: int, views_per_pass: int | None) -> Iterator[slice]:
    """Cut `n_views` into slices of at most `views_per_pass`."""
    step = views_per_pass or n_views
    return (slice(first, min(first + step, n_views)) for first in range(0, n_views, step))


def add_pass(levels: list[LevelFigures[Tensor]], part: LevelFigures[Tensor]) -> None:
    """Add the figures of one pass to those of its level, the last one of `levels`, or begin a level with them."""
    if levels and levels[-1].number == part.number:
        levels[-1] = mapped(torch.add, levels[-1], part)
    else:
        levels.append(part)


@torch.no_grad()
def target_tokens(view: LevelViews, tokens: Tensor, flat_threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the masked tokens (N, M, P) of views count in the loss, (N, M) bool, True = without padding and not flat
    (air); and of each view the padded and the flat tokens as shares of all masked tokens of the level, each (N,).
    """
    padded = torch.gather(view.padded, 1, view.ids_masked)  # (N, M)
    flat = torch.cat([flat_tokens(tokens[part], flat_threshold) for part in _passes(padded.shape[0], 4)])
    padded_share = padded.float().sum(dim=1) / padded.numel()
    flat_share = (flat & ~padded).float().sum(dim=1) / padded.numel()
    return ~(padded | flat), padded_share, flat_share


def _place_features(features: Tensor, level: Level) -> Tensor:
    """Mean decoder feature of every place of every view: (N, L, D) → (N * n_places, D)."""
    tokens = on_device(level, features.device).tokens_of_region  # (places, tokens)
    return features[:, tokens].mean(dim=2).flatten(0, 1)


@torch.no_grad()
def _nonfinite_views(features: Tensor, crop: Tensor, n_crops: int) -> Tensor:
    """(n_crops,) number of views of each crop whose features (N, L, D) are not finite; crop (N,) int64."""
    bad = ~torch.isfinite(features).flatten(1).all(dim=1)  # (N,)
    return torch.zeros(n_crops, device=features.device).index_add_(0, crop, bad.float())


def _place_index(parent: LevelViews, rank: int = 0) -> Tensor:
    """(N_child,) int64: the row of `_place_features` of all ranks' parents that each child of a rank was cut from."""
    N, _ = parent.places.shape
    row = torch.arange(rank * N, (rank + 1) * N, device=parent.places.device)  # of each parent among those of all ranks
    return (row[:, None] * parent.level.n_places + parent.places).flatten()
