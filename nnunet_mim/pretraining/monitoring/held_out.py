"""Losses on fixed crops of held-out cases, beside trivial predictors on the same tokens, and the spread of features."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_mim.config import PretrainConfig
from nnunet_mim.geometry import Level
from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.pretraining.monitoring.baselines import trivial_losses
from nnunet_mim.pretraining.objective.levels import add_figures, level_losses, level_name, target_tokens
from nnunet_mim.pretraining.objective.losses import voxel_error
from nnunet_mim.pretraining.objective.views import LevelViews, nested_views


class HeldOut:
    """Fixed crops, masks and children of held-out cases, and what trivial predictors reach on them.

    Args:
        crops, valid: as in `nested_views`.
        fill, flat_threshold: (C,) as in training.
        width: (C,) of the intensity window.
        levels: geometry.
        config: of the run; its seed fixes the masks.
        views_per_pass: most views computed at once; None: all views of a level of one crop.
        datasets: of each crop, for losses by dataset; None: one dataset.
    """

    def __init__(
        self, crops: Tensor, valid: Tensor, fill: Tensor, flat_threshold: Tensor, width: Tensor,
        levels: tuple[Level, ...], config: PretrainConfig, views_per_pass: int | None = None,
        datasets: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.datasets = datasets if datasets and len(set(datasets)) > 1 else None
        self.views_per_pass = views_per_pass
        self.flat_threshold = flat_threshold
        self.width = width
        self.config = config
        place_threshold = flat_threshold if config.body_children else None
        self.batches: list[list[LevelViews]] = []
        for number in range(crops.shape[0]):
            generator = torch.Generator(crops.device).manual_seed(config.seed * 1_000_003 + number)
            one = slice(number, number + 1)
            self.batches.append(nested_views(crops[one], valid[one], fill, levels, generator, place_threshold))
        self.constants = self._constants()
        """figures that do not depend on the network: trivial predictors, and chance"""

    @torch.no_grad()
    def evaluate(self, model: PretrainingNetwork) -> dict[str, float]:
        """Figures over the held-out crops by name.

        Returns:
            `val/level1/reconstruction` (mean over all target tokens), `val/level1/psnr` (dB, of voxels with each
            token's true mean and standard deviation put back), `val/level2/alignment_top1` (mean over crops) and the
            like, `val/loss`, and of the encoder `val/features/rank` and `val/features/std`, see `feature_spread`. With
            several datasets also the reconstruction on each, `val/Dataset501_Name/level1`, ….
        """
        mean, features = WeightedMean(), []
        for crop, views in enumerate(self.batches):
            figures: dict[str, Tensor] = {}
            targets = [target_tokens(view, self.flat_threshold)[0] for view in views]
            level, done = "", 0
            for _, part, output in level_losses(model, views, self.flat_threshold, self.config, self.views_per_pass):
                add_figures(figures, part)
                now = next(name for name in part if name.endswith("/reconstruction")).split("/")[0]
                level, done = (now, done) if now == level else (now, 0)
                number = len(views) - 4 + int(level[-1])
                rows = slice(done, done := done + output.prediction.shape[0])
                tokens = views[number].masked_tokens(rows)
                error = voxel_error(output.prediction, tokens, targets[number][rows], self.width)
                add_figures(figures, {f"{level}/error": error})
            features += [encoder_tokens(model, view) for view in views]
            for name, value in figures.items():
                level, _, kind = name.partition("/")
                weight = float(figures[f"{level}/targets"]) if kind in ("reconstruction", "error") else 1.0
                if kind == "reconstruction" and self.datasets and weight:
                    mean.add(f"val/{self.datasets[crop]}/{level}", float(value), weight)
                if kind == "error":
                    mean.add(f"val/{level}/psnr", float(value) / max(weight, 1.0), weight)
                elif kind:
                    mean.add(f"val/{name}", float(value), weight)
        means = {name: decibel(value) if name.endswith("/psnr") else value for name, value in mean.result().items()}
        means["val/loss"] = sum(value for name, value in means.items() if name.endswith("/loss"))
        rank, std = feature_spread(torch.cat(features))
        return {**means, "val/features/rank": rank, "val/features/std": std}

    def _constants(self) -> dict[str, float]:
        mean, chance = WeightedMean(), {}
        for views in self.batches:
            for number, view in enumerate(views):
                level = level_name(number, len(views))
                is_target, _ = target_tokens(view, self.flat_threshold)
                for predictor, (loss, error) in trivial_losses(view, is_target, self.width).items():
                    mean.add(f"baseline/{level}/{predictor}", loss, float(is_target.sum()))
                    mean.add(f"baseline/{level}/{predictor}_psnr", error, float(is_target.sum()))
                if number and self.config.alignment == "infonce":
                    parent = views[number - 1]
                    chance[f"val/{level}/alignment_chance"] = 1 / (parent.images.shape[0] * parent.level.n_places)
        means = mean.result()
        return {**{name: decibel(v) if name.endswith("_psnr") else v for name, v in means.items()}, **chance}


def decibel(error: float) -> float:
    """Peak signal-to-noise ratio of a mean squared error in units of the peak."""
    return -10 * math.log10(max(error, 1e-12))


def encoder_tokens(model: PretrainingNetwork, view: LevelViews) -> Tensor:
    """(T, D) float32: what the encoder says about the visible tokens of the first view of a level."""
    return model.visible_features(view.images[:1], view.ids_keep[:1], view.ids_masked[:1]).flatten(0, 1).float()


def feature_spread(features: Tensor) -> tuple[float, float]:
    """How far an encoder's features are from all being the same.

    Args:
        features: (T, D), T tokens.

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


class WeightedMean:
    """Weighted means by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.weights: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: float, weight: float) -> None:
        """Add one value; a weight of 0 adds nothing."""
        self.sums[name] += value * weight
        self.weights[name] += weight

    def result(self) -> dict[str, float]:
        """Means; 0 where all weights were 0."""
        return {name: total / max(self.weights[name], 1e-12) for name, total in self.sums.items()}
