"""The objective of one iteration: every level's reconstruction and its agreement with the level above."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nnunet_mim.config import PretrainConfig
from nnunet_mim.geometry import Level
from nnunet_mim.networks.mask_in_mask import LevelOutput
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks
from nnunet_mim.pretraining.monitoring.figures import LevelFigures, mapped
from nnunet_mim.pretraining.objective.losses import cosine_loss, flat_tokens, infonce_loss, reconstruction_loss
from nnunet_mim.pretraining.objective.masks import on_device
from nnunet_mim.pretraining.objective.views import LevelViews


def level_losses(
    model: Callable[..., LevelOutput],
    views: list[LevelViews],
    flat_threshold: Tensor,
    config: PretrainConfig,
    views_per_pass: int | None = None,
    recompute: tuple[int, ...] = (),
    ranks: Ranks = ALONE,
    n_computed: int | None = None,
) -> Iterator[tuple[Tensor, LevelFigures[Tensor], LevelOutput]]:
    """Run the levels in turn, outermost first, each in one pass or in several.

    Features of a parent level are detached, and every view's loss is a share of its level's mean. So the losses sum to
    the objective, also over ranks, and each can be back-propagated before the next pass runs: memory is that of one
    pass. Children are contrasted with the places of all ranks' parents.

    Args:
        model: MaskInMask, or what calls it.
        flat_threshold: (C,) standard deviation below which a token is no target.
        views_per_pass: largest number of views in one pass; None: all views of a level.
        recompute: numbers (1 to 3) of the levels that keep no activations inside blocks.
        ranks: the views are this rank's part of a batch, as large on every rank.
        n_computed: number of levels, from the outermost on; None: all. See `levels_that_count`.

    Yields:
        the pass's share of the weighted loss; its share of the level's figures, detached, to be summed by `add_pass`
        and over ranks; and the network's output.
    """
    parent_features = None
    for position, view in enumerate(views[:n_computed]):
        number = level_number(position, len(views))
        is_target, padded_share, flat_share = target_tokens(view, flat_threshold)  # (N, M), (N,), (N,)
        n_targets = ranks.sum(is_target.sum())
        inside = (~view.outside).to(view.images.dtype)  # (N,)
        n_inside = ranks.sum(inside.sum())
        own_place = _place_index(views[position - 1], ranks.rank) if position else None  # (N,)
        features = []
        for part in _passes(len(view.images), views_per_pass):  # n of the N views
            inputs = view.images[part], view.ids_keep[part], view.ids_masked[part]  # (n, C, X, Y, Z), (n, K), (n, M)
            output = model(*inputs, number - 2 if position else None, parent_features, number in recompute)
            tokens = view.masked_tokens(part)  # (n, M, P)
            reconstruction = reconstruction_loss(output.prediction, tokens, is_target[part], n_targets)
            loss = config.level_weights[number - 1] * reconstruction
            alignment = top1 = None
            if output.child is not None and own_place is not None:
                alignment, top1 = _alignment_loss(output, own_place[part], inside[part], n_inside, config)
                loss = loss + config.alignment_weight * alignment
            figures = LevelFigures(
                number,
                reconstruction=reconstruction,
                targets=is_target[part].float().sum(),
                padded_share=padded_share[part].sum() / ranks.world,
                flat_share=flat_share[part].sum() / ranks.world,
                alignment_top1=top1,
                alignment=alignment,
                loss=loss,
                nonfinite=_nonfinite_views(output.features, view.crop[part], n_crops=len(views[0].images)),
            )
            yield loss, mapped(torch.detach, figures), output
            features.append(_place_features(output.features.detach(), view.level))  # (n * places, D)
        parent_features = ranks.gather(torch.cat(features))  # (ranks * N * places, D)


def _alignment_loss(
    output: LevelOutput, own_place: Tensor, inside: Tensor, n_inside: Tensor, config: PretrainConfig
) -> tuple[Tensor, Tensor | None]:
    """The loss that `config.alignment` names, of n views with a parent; for `infonce` also the share of views whose own
    place is the most similar one, else None.

    Args:
        output: of the network.
        own_place: (n,) as of `_place_index`.
        inside: (n,) weights, 0 for a view outside the volume.
        n_inside: scalar, sum of the weights of all passes and ranks.
        config: names the loss.
    """
    assert output.child is not None
    assert output.parent is not None
    pairs = output.child, output.parent, own_place, inside
    if config.alignment == "infonce":
        return infonce_loss(*pairs, config.temperature, n_inside)
    return cosine_loss(*pairs, n_inside), None


def levels_that_count(config: PretrainConfig, n_levels: int) -> int:
    """Number of levels that have to be computed in training: those after the last one with a weight are left out."""
    aligned = config.alignment != "none" and config.alignment_weight > 0
    weights = config.level_weights[-n_levels:]
    return max((n + 1 for n in range(n_levels) if weights[n] > 0 or (aligned and n > 0)), default=n_levels)


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
def target_tokens(view: LevelViews, flat_threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which masked tokens count in the loss, (N, M) bool, True = without padding and not flat (air); and of each view
    the padded and the flat tokens as shares of all masked tokens of the level, each (N,).
    """
    padded = torch.gather(view.padded, 1, view.ids_masked)  # (N, M)
    flat = torch.cat([flat_tokens(view.masked_tokens(part), flat_threshold) for part in _passes(padded.shape[0], 4)])
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


def level_number(position: int, n_levels: int) -> int:
    """Number (1 to 3) of the level at a position among n_levels: outer levels are the ones that are skipped."""
    return position + 4 - n_levels
