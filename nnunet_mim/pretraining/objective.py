"""The objective of one iteration: every level's reconstruction and its agreement with the level above."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.mask_in_mask import LevelOutput
from nnunet_mim.pretraining.losses import cosine_loss, flat_tokens, infonce_loss, reconstruction_loss
from nnunet_mim.pretraining.nested_crops import LevelViews


def level_losses(
    model: nn.Module, views: list[LevelViews], flat_threshold: Tensor, config: PretrainConfig
) -> Iterator[tuple[Tensor, dict[str, Tensor], LevelOutput]]:
    """Run the levels in turn, outermost first.

    The features of a parent level are detached, so each level's loss can be back-propagated before the next level runs:
    peak memory is one level's, the gradients are those of the sum.

    Args:
        model: MaskInMask, or its Fabric wrapper.
        views: of all levels.
        flat_threshold: (C,) standard deviation below which a token is no target.
        config: weights of the losses.

    Yields:
        weighted loss of the level (its terms sum to the objective), detached figures by name, and the network's output.
    """
    parent_features = None
    for number, view in enumerate(views):
        edge = level_index(number, len(views)) - 1 if number else None
        output = model(view.images, view.ids_keep, view.ids_masked, edge, parent_features)

        tokens = view.masked_tokens()
        padded = torch.gather(view.padded, 1, view.ids_masked)
        flat = flat_tokens(tokens, flat_threshold)
        is_target = ~(padded | flat)
        reconstruction = reconstruction_loss(output.prediction, tokens, is_target)
        name = level_name(number, len(views))
        loss = config.level_weights[level_index(number, len(views))] * reconstruction
        figures = {
            f"{name}/reconstruction": reconstruction.detach(),
            f"{name}/targets": is_target.float().sum(),
            f"{name}/padded_share": padded.float().mean(),
            f"{name}/flat_share": (flat & ~padded).float().mean(),
        }
        if output.child is not None and output.parent is not None:
            parent_view = views[number - 1]
            weight = (~view.outside).to(output.child.dtype)
            target = place_index(parent_view)
            if config.alignment == "infonce":
                alignment, accuracy = infonce_loss(output.child, output.parent, target, weight, config.temperature)
                figures[f"{name}/alignment_top1"] = accuracy.detach()
            else:
                alignment = cosine_loss(output.child, output.parent, target, weight)
            figures[f"{name}/alignment"] = alignment.detach()
            loss = loss + config.alignment_weight * alignment
        figures[f"{name}/loss"] = loss.detach()
        yield loss, figures, output
        parent_features = place_features(output.features.detach(), view)


def place_features(features: Tensor, view: LevelViews) -> Tensor:
    """Mean decoder feature of every place of every view: (N, L, D) → (N * n_places, D)."""
    tokens = torch.as_tensor(view.level.tokens_of_region, device=features.device)  # (places, tokens)
    return features[:, tokens].mean(dim=2).flatten(0, 1)


def place_index(parent: LevelViews) -> Tensor:
    """(N_child,) int64: the row of `place_features(…, parent)` that each child was cut from."""
    first = torch.arange(parent.places.shape[0], device=parent.places.device) * parent.level.n_places
    return (first[:, None] + parent.places).flatten()


def level_index(number: int, n_levels: int) -> int:
    """Position in the full ladder of three; outer levels are the ones that are skipped."""
    return number + 3 - n_levels


def level_name(number: int, n_levels: int) -> str:
    """`level1` … `level3`."""
    return f"level{level_index(number, n_levels) + 1}"
