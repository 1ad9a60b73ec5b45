"""train.csv, val.csv and TensorBoard events of a run."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures
from nnunet_mim.system.files import write_atomically


class MetricsLog:
    """Writes rows of figures into the folder of a run that continues from iteration `start`, 0 for a new one."""

    def __init__(self, folder: Path, start: int) -> None:
        self.train = _MetricsFile(folder / "train.csv", start)
        self.val = _MetricsFile(folder / "val.csv", start)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def add(self, iteration: int, figures: TrainingFigures[float] | Measurement[float]) -> None:
        """Add a row to train.csv or val.csv and to TensorBoard; NaN stands for none."""
        row = figures.row()
        (self.val if isinstance(figures, Measurement) else self.train).append(iteration, row)
        for name, value in without_nan(row).items():
            self.board.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        self.board.close()


class _MetricsFile:
    """A CSV file with one row per logged iteration. The first row decides the columns; what a later one lacks, and NaN,
    is left empty.

    A run that continues from iteration `start` drops the rows after it and a last row that was cut short.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if start and path.is_file() else []
        complete = [line for line in lines if line.endswith("\n")]
        kept = complete[:1] + [line for line in complete[1:] if int(line.split(",", 1)[0]) <= start]
        write_atomically(path, "".join(kept).encode())
        self.columns = kept[0].strip().split(",") if kept else []

    def append(self, iteration: int, figures: dict[str, float]) -> None:
        row = {"iteration": str(iteration), **{name: f"{value:.6g}" for name, value in without_nan(figures).items()}}
        new = not self.columns
        self.columns = self.columns or ["iteration", *figures]
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def without_nan(figures: dict[str, float]) -> dict[str, float]:
    """Figures without those that are NaN."""
    return {name: value for name, value in figures.items() if not math.isnan(value)}
