"""Is it working? Losses on fixed crops of held-out cases, beside trivial predictors on the same tokens."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_mim.config import PretrainConfig
from nnunet_mim.geometry import Level
from nnunet_mim.pretraining.baselines import trivial_losses
from nnunet_mim.pretraining.nested_crops import LevelViews, nested_views
from nnunet_mim.pretraining.objective import add_figures, level_losses, level_name, target_tokens


class HeldOut:
    """Fixed crops, masks and children of held-out cases, and what trivial predictors reach on them.

    Args:
        crops, valid: as in `nested_views`.
        fill, flat_threshold: (C,) as in training.
        levels: geometry.
        config: of the run; its seed fixes the masks.
        views_per_pass: most views computed at once; None: all views of a level of one crop.
    """

    def __init__(
        self, crops: Tensor, valid: Tensor, fill: Tensor, flat_threshold: Tensor, levels: tuple[Level, ...],
        config: PretrainConfig, views_per_pass: int | None = None,
    ) -> None:  # fmt: skip
        self.views_per_pass = views_per_pass
        self.flat_threshold = flat_threshold
        self.config = config
        place_threshold = flat_threshold if config.body_children else None
        self.batches: list[list[LevelViews]] = []
        for number in range(crops.shape[0]):
            generator = torch.Generator(crops.device).manual_seed(config.seed * 1_000_003 + number)
            one = slice(number, number + 1)
            self.batches.append(nested_views(crops[one], valid[one], fill, levels, generator, place_threshold))
        self.baselines = self._baselines()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures over the held-out crops by name (`val/level1/reconstruction`, …).

        Reconstruction losses are means over all target tokens, other figures means over crops. Leaves the model in
        training mode.
        """
        model.eval()
        mean = WeightedMean()
        for views in self.batches:
            figures: dict[str, Tensor] = {}
            for _, part, _ in level_losses(model, views, self.flat_threshold, self.config, self.views_per_pass):
                add_figures(figures, part)
            for name, value in figures.items():
                level, kind = name.split("/")
                mean.add(f"val/{name}", float(value), targets_of(figures, level) if kind == "reconstruction" else 1.0)
        model.train()
        means = mean.result()
        means["val/loss"] = sum(value for name, value in means.items() if name.endswith("/loss"))
        return means

    def _baselines(self) -> dict[str, float]:
        mean = WeightedMean()
        for views in self.batches:
            for number, view in enumerate(views):
                is_target, _ = target_tokens(view, self.flat_threshold)
                for predictor, value in trivial_losses(view, is_target).items():
                    mean.add(f"baseline/{level_name(number, len(views))}/{predictor}", value, float(is_target.sum()))
        return mean.result()


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


def targets_of(figures: dict[str, Tensor], level: str) -> float:
    """Number of target tokens of a level, from the figures of `level_losses`."""
    return float(figures[f"{level}/targets"])


class MetricsFile:
    """A CSV file with one row per logged iteration, the same columns in every row.

    A resumed run drops the rows after its checkpoint and goes on.

    Args:
        path: of the file.
        start: iteration of the checkpoint that the run continues from, 0 for a new run.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept: list[dict[str, str]] = []
        if start and path.is_file():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["iteration"]) <= start]
        path.unlink(missing_ok=True)
        for row in kept:
            self._write(row)

    def append(self, iteration: int, figures: dict[str, float]) -> None:
        """Add a row."""
        self._write({"iteration": str(iteration), **{name: f"{value:.6g}" for name, value in figures.items()}})

    def _write(self, row: dict[str, str]) -> None:
        new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
