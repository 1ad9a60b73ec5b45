"""The objective of one iteration: every level's reconstruction and its agreement with the level above."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nnunet_mim.config import PretrainConfig
from nnunet_mim.geometry import Level
from nnunet_mim.networks.mask_in_mask import LevelOutput
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks
from nnunet_mim.pretraining.objective.level_tensors import on_device
from nnunet_mim.pretraining.objective.losses import cosine_loss, flat_tokens, infonce_loss, reconstruction_loss
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
) -> Iterator[tuple[Tensor, dict[str, Tensor], LevelOutput]]:
    """Run the levels in turn, outermost first, each in one pass or in several.

    The features of a parent level are detached, and every view's loss is a share of its level's mean. So the losses
    that are yielded sum to the objective, and each can be back-propagated before the next pass runs: memory is that of
    one pass, however many views there are, and the gradients are those of the sum. With several ranks the sum is over
    theirs too, and children are contrasted with the places of all ranks' parents.

    Args:
        model: MaskInMask, or what calls it.
        views: of all levels.
        flat_threshold: (C,) standard deviation below which a token is no target.
        config: weights of the losses.
        views_per_pass: largest number of views in one pass; None: all views of a level.
        recompute: numbers (1 to 3) of the levels that keep no activations inside blocks.
        ranks: the views are this rank's part of a batch, as large on every rank.
        n_computed: how many levels, from the outermost on; None: all. See `levels_that_count`.

    Yields:
        the pass's share of the weighted loss, its share of each figure (detached, by name; to be added up over passes,
        see `add_figures`, and ranks), and the network's output. Figures are scalars, but for `nonfinite`: (B,) views of
        each crop of this rank whose features are not finite.
    """
    parent_features = None
    for number, view in enumerate(views[:n_computed]):
        name, index = level_name(number, len(views)), level_index(number, len(views))
        is_target, shares = target_tokens(view, flat_threshold)
        n_targets = ranks.sum(is_target.sum())
        inside = (~view.outside).to(view.images.dtype)
        n_inside = ranks.sum(inside.sum())
        own_place = place_index(views[number - 1], ranks.rank) if number else None
        features = []
        for part in passes(view.images.shape[0], views_per_pass):
            edge = index - 1 if number else None
            inputs = view.images[part], view.ids_keep[part], view.ids_masked[part]
            output = model(*inputs, edge, parent_features, index + 1 in recompute)
            tokens = view.masked_tokens(part)
            reconstruction = reconstruction_loss(output.prediction, tokens, is_target[part], n_targets)
            loss = config.level_weights[index] * reconstruction
            figures = {f"{name}/reconstruction": reconstruction.detach()}
            for key, value in shares.items():
                figures[f"{name}/{key}"] = value[part].sum() / (1 if key == "targets" else ranks.world)
            if output.child is not None and output.parent is not None and own_place is not None:
                pairs = output.child, output.parent, own_place[part], inside[part]
                if config.alignment == "infonce":
                    alignment, accuracy = infonce_loss(*pairs, config.temperature, n_inside)
                    figures[f"{name}/alignment_top1"] = accuracy.detach()
                else:
                    alignment = cosine_loss(*pairs, n_inside)
                figures[f"{name}/alignment"] = alignment.detach()
                loss = loss + config.alignment_weight * alignment
            figures[f"{name}/loss"] = loss.detach()
            figures["nonfinite"] = nonfinite_views(output.features, view.crop[part], views[0].images.shape[0])
            yield loss, figures, output
            features.append(place_features(output.features.detach(), view.level))
        parent_features = ranks.gather(torch.cat(features))


def levels_that_count(config: PretrainConfig, n_levels: int) -> int:
    """How many levels have to be computed in training: those after the last one with a weight are left out."""
    aligned = config.alignment != "none" and config.alignment_weight > 0
    counts = [config.level_weights[level_index(n, n_levels)] > 0 or (aligned and n > 0) for n in range(n_levels)]
    return max((number + 1 for number, does in enumerate(counts) if does), default=n_levels)


def passes(n_views: int, views_per_pass: int | None) -> Iterator[slice]:
    """Cut `n_views` into slices of at most `views_per_pass`."""
    step = views_per_pass or n_views
    return (slice(first, min(first + step, n_views)) for first in range(0, n_views, step))


def add_figures(total: dict[str, Tensor], figures: dict[str, Tensor]) -> None:
    """Add the figures of one pass to those of the passes before."""
    for name, value in figures.items():
        total[name] = total[name] + value if name in total else value


@torch.no_grad()
def target_tokens(view: LevelViews, flat_threshold: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Which masked tokens count in the loss: those without padding that are not flat (air).

    Returns:
        (N, M) bool, True = counts; and per view the figures `targets` (a count), `padded_share` and `flat_share` (of
        the level's masked tokens), each (N,).
    """
    padded = torch.gather(view.padded, 1, view.ids_masked)
    flat = torch.cat([flat_tokens(view.masked_tokens(part), flat_threshold) for part in passes(padded.shape[0], 4)])
    is_target = ~(padded | flat)
    figures = {
        "targets": is_target.float().sum(dim=1),
        "padded_share": padded.float().sum(dim=1) / padded.numel(),
        "flat_share": (flat & ~padded).float().sum(dim=1) / padded.numel(),
    }
    return is_target, figures


def place_features(features: Tensor, level: Level) -> Tensor:
    """Mean decoder feature of every place of every view: (N, L, D) → (N * n_places, D)."""
    tokens = on_device(level, features.device).tokens_of_region  # (places, tokens)
    return features[:, tokens].mean(dim=2).flatten(0, 1)


@torch.no_grad()
def nonfinite_views(features: Tensor, crop: Tensor, n_crops: int) -> Tensor:
    """(n_crops,) how many views of each crop have features (N, L, D) that are not finite; crop (N,) int64."""
    bad = ~torch.isfinite(features).flatten(1).all(dim=1)
    return torch.zeros(n_crops, device=features.device).index_add_(0, crop, bad.float())


def place_index(parent: LevelViews, rank: int = 0) -> Tensor:
    """(N_child,) int64: the row of `place_features` of all ranks' parents that each child of a rank was cut from."""
    n_parents = parent.places.shape[0]
    number = torch.arange(rank * n_parents, (rank + 1) * n_parents, device=parent.places.device)
    first = number * parent.level.n_places
    return (first[:, None] + parent.places).flatten()


def level_index(number: int, n_levels: int) -> int:
    """Position in the full ladder of three; outer levels are the ones that are skipped."""
    return number + 3 - n_levels


def level_name(number: int, n_levels: int) -> str:
    """`level1` … `level3`."""
    return f"level{level_index(number, n_levels) + 1}"
