"""What a run says and logs about its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nnunet_mim.pretraining.data.crops import CropDataset
from nnunet_mim.pretraining.distributed.ranks import Ranks
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures, averaged, mapped


def mean_figures(
    steps: Sequence[TrainingFigures[Tensor]], ranks: Ranks
) -> tuple[TrainingFigures[float], dict[int, list[bool]]]:
    """Mean over steps and ranks, read from the device in one go, and the sum of the levels' losses.

    Skipped steps count in `skipped` alone, which is their number; where all were skipped, the other means are NaN.

    Returns:
        means; and for each skipped step its number in `steps` and whether each crop of its batch had features that were
        not finite.
    """
    # levels are shares of a sum over ranks already, all else is the same on every rank
    rows = [mapped(lambda value: value / ranks.world, step).row() for step in steps]
    local = torch.stack([torch.stack([value.float() for value in row.values()]) for row in rows])  # (steps, figures)
    on_host = [TrainingFigures.from_row(dict(zip(rows[0], row, strict=True))) for row in ranks.sum(local).tolist()]
    used = [step for step in on_host if not step.skipped]

    def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
        if not used:
            return math.nan
        weight = torch.tensor(weights or [1.0] * len(values))
        return float((torch.tensor(values) * weight).sum() / weight.sum().clamp(min=1))

    numbers = [level.number for level in steps[0].levels]
    levels = tuple(averaged([step.level(number) for step in used or on_host], mean) for number in numbers)
    means = replace(
        mapped(lambda *values: mean(values), *(used or on_host)),
        levels=levels,
        skipped=float(len(on_host) - len(used)),
        loss=sum(level.loss or 0.0 for level in levels),
    )
    nonfinite = [[level.nonfinite for level in step.levels if level.nonfinite is not None] for step in steps]
    own = torch.stack([torch.stack(counts).sum(dim=0) for counts in nonfinite])  # (steps, crops of this rank)
    crops = ranks.gather(own.T.contiguous()).T.cpu()  # (steps, batch)
    return means, {i: (crops[i] > 0).tolist() for i, step in enumerate(on_host) if step.skipped}


def culprits(dataset: CropDataset, iteration: int, bad: list[bool], batch_size: int) -> list[str]:
    """Names of the cases of a skipped step: those whose features were not finite, or all if none or all were."""
    numbers = range(iteration * batch_size, (iteration + 1) * batch_size)
    chosen = [number for number, is_bad in zip(numbers, bad, strict=True) if is_bad] or numbers
    cases = [dataset.case_of(number) for number in chosen]
    return [
        f"{case.source.dataset} {case.info.case}, crop {number}" for case, number in zip(cases, chosen, strict=True)
    ]


def progress_text(train: TrainingFigures[float], val: Measurement[float], crops_per_s: float) -> dict[str, str]:
    """What the progress bar shows beside speed and time left."""
    losses = {level.number: train.level(level.number).reconstruction for level in val.reconstructed}
    return {
        **{f"L{number}": f"{loss:.3f}" for number, loss in losses.items() if loss is not None},
        "val": "/".join(f"{level.reconstruction:.3f}" for level in val.reconstructed),
        "crops/s": f"{crops_per_s:.2f}",
    }
