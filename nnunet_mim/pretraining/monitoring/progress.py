"""What a run says and logs about its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nnunet_mim.errors import MiMError, printable_lines
from nnunet_mim.pretraining.data.crops import CropDataset, UnreadCases
from nnunet_mim.pretraining.distributed.ranks import Ranks
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures, averaged, mapped
from nnunet_mim.pretraining.record import RunRecord
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.state import TrainingState
from nnunet_mim.system.progress import ProgressBar


class StepLog:
    """The progress bar, and the rows of train.csv: each holds the steps since the one before. Skipped steps and drawn
    crops are counted in the state of the run.
    """

    def __init__(
        self, run: Run, state: TrainingState, record: RunRecord, dataset: CropDataset, ranks: Ranks,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.run, self.state, self.record, self.dataset, self.ranks = run, state, record, dataset, ranks
        self.device = device
        self.steps: list[TrainingFigures[Tensor]] = []
        """figures of the steps since the last row, still on the device"""
        self.means: TrainingFigures[float] = TrainingFigures()
        """of the last row"""
        self.unread = UnreadCases(run.data.train)
        self.bar = ProgressBar(
            total=run.config.iterations, initial=state.iteration, desc="pretraining", unit="it", smoothing=0.05,
            disable=not record.active,
        )  # fmt: skip
        self.restart_clock()

    def note_unread(self, numbers: Tensor) -> None:
        """Name the cases of a batch that cannot be read any more, (B, TRIES), see CropDataset. Raises MiMError if there
        is one and the run is strict.
        """
        for name in self.unread.add(numbers):
            if self.run.strict:
                raise MiMError(f"{name} has changed or cannot be read any more: restore it and continue with --c")
            self.bar.write(f"{name} has changed or cannot be read any more: other cases take its place")

    def add(self, figures: TrainingFigures[Tensor]) -> None:
        """Keep the figures of one step."""
        self.steps.append(figures)
        self.bar.update(1)

    def write_row(self, rate: float) -> None:
        """Write the mean figures of the steps since the last row and the learning rate of the last step, and name
        those that were skipped. Raises MiMError if they are too many.
        """
        state, batch_size = self.state, self.run.config.batch_size
        done, first = state.iteration, state.iteration - len(self.steps)
        self.means, bad = _mean_figures(self.steps, self.ranks)
        for number in bad:
            names = _culprits(self.dataset, first + number, bad[number], batch_size)
            self.say(state.skipped.add(first + number + 1, names))
        speed = len(self.steps) * batch_size / (time.perf_counter() - self.since)
        state.crops_seen.update(self.dataset.counts(range(first * batch_size, done * batch_size)))
        failed = float(self.ranks.sum(torch.tensor(float(self.unread.failed), device=self.device)))
        counts = {name: float(n) for name, n in state.crops_seen.items()}
        row = replace(self.means, learning_rate=rate, crops_per_s=speed, unread=failed, crops=counts)
        self.record.log(done, row)
        self.bar.set_postfix(_progress_text(self.means, self.record.last, speed), refresh=False)
        self.steps.clear()
        state.skipped.check(done, self.run.folder)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Let the speed be that from now on."""
        self.since = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line above the bar, on the first rank only."""
        if text and self.record.active:  # tqdm's own switch does not silence its `write`
            self.bar.write(printable_lines(text))


def _mean_figures(
    steps: Sequence[TrainingFigures[Tensor]], ranks: Ranks
) -> tuple[TrainingFigures[float], dict[int, list[bool]]]:
    """Means over steps and ranks, read from the device in one go; and by number of each skipped step, whether each crop
    of its batch had features that were not finite.

    Skipped steps count in `skipped` alone, which is their number; where all were skipped, the other means are NaN.
    """
    # levels are shares of a sum over ranks already, all else is the same on every rank
    rows = [mapped(lambda value: value / ranks.world, step).row() for step in steps]
    local = torch.stack([torch.stack([value.float() for value in row.values()]) for row in rows])  # (steps, figures)
    on_host = [TrainingFigures.from_row(dict(zip(rows[0], row, strict=True))) for row in ranks.sum(local).tolist()]
    used = [step for step in on_host if not step.skipped]

    def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
        if not used:
            return math.nan
        weight, numbers = torch.tensor(weights or [1.0] * len(values)), torch.tensor(values)
        weight = weight * ~numbers.isnan()  # NaN: not computed in a step
        if not weight.any():  # no target token in any of these steps
            return math.nan
        return float((numbers.nan_to_num() * weight).sum() / weight.sum().clamp(min=1))

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


def _culprits(dataset: CropDataset, iteration: int, bad: list[bool], batch_size: int) -> list[str]:
    """Names of the cases of a skipped step: those whose features were not finite, or all if none or all were."""
    numbers = range(iteration * batch_size, (iteration + 1) * batch_size)
    chosen = [number for number, is_bad in zip(numbers, bad, strict=True) if is_bad] or numbers
    cases = {number: dataset.case_of(number) for number in chosen}
    return [f"{case.source.dataset} {case.info.case}, crop {number}" for number, case in cases.items()]


def _progress_text(train: TrainingFigures[float], val: Measurement[float], crops_per_s: float) -> dict[str, str]:
    """What the progress bar shows beside speed and time left."""
    losses = {level.number: train.level(level.number).reconstruction for level in val.reconstructed}
    return {
        **{f"L{number}": f"{loss:.3f}" for number, loss in losses.items() if loss is not None and math.isfinite(loss)},
        "val": "/".join(f"{level.reconstruction:.3f}" for level in val.reconstructed),
        "crops/s": f"{crops_per_s:.2f}",
    }
