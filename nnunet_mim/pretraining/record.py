"""What a run leaves in its folder while it goes on: figures, checkpoints, pictures."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from nnunet_mim.checkpoint.format import LATEST, build_checkpoint, run_provenance, save_atomically
from nnunet_mim.config import PretrainConfig
from nnunet_mim.nnunet.source import Source
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.monitoring.verdict import verdict_on
from nnunet_mim.pretraining.report.page import write_run_report
from nnunet_mim.reporting.curves import write_progress


class RunRecord:
    """Figures and checkpoints of one run. Every rank has one, but only the first rank's writes anything.

    Args:
        folder: of the run, exists.
        config: of the run.
        sources: datasets.
        seen: records of the cases that the weights have been trained on.
        fold: left-out fold, or `all`.
        start: iteration that the run continues from; 0 for a new one.
        history: measurements so far, oldest first.
        crops_seen: by dataset, kept up to date by the loop.
        active: whether this rank writes.
    """

    def __init__(
        self, folder: Path, config: PretrainConfig, sources: list[Source], seen: list[dict[str, str]], fold: int | str,
        start: int, history: list[dict[str, float]], crops_seen: Mapping[str, int], active: bool,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.config = config
        self.sources = sources
        self.seen = seen
        self.fold = fold
        self.history = history
        self.crops_seen = crops_seen
        self.active = active
        if active:
            self.files = {part: MetricsFile(folder / f"{part}.csv", start) for part in ("train", "val")}
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def log(self, part: str, iteration: int, figures: dict[str, float]) -> None:
        """Add figures to `train.csv` or `val.csv` and to TensorBoard; NaN stands for none."""
        if self.active:
            self.files[part].append(iteration, figures)
            for name, value in known(figures).items():
                self.board.add_scalar(name, value, iteration)

    def measured(self, iteration: int, val: dict[str, float], train: dict[str, float]) -> bool:
        """Note a measurement on held-out cases and draw `progress.png`. Returns whether it is the best so far."""
        best = min((row["val/loss"] for row in self.history), default=float("inf"))
        self.history.append({"iteration": iteration, **known(train), **val})
        self.log("val", iteration, val)
        if self.active:
            write_progress(self.folder)
        return val["val/loss"] < best

    def verdict(self) -> str:
        """One sentence: is it working?"""
        return verdict_on(self.history, self.config).sentence

    def save(
        self, name: str, iteration: int, weights: dict[str, Tensor], skipped: list[dict[str, Any]],
        resume_state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a checkpoint; with `resume_state` the run can be continued from it."""
        if self.active:
            checkpoint = self._checkpoint(iteration, weights, skipped)
            if resume_state is not None:
                checkpoint["resume_state"] = resume_state
            save_atomically(checkpoint, self.folder / name)

    def report(
        self, iteration: int, weights: dict[str, Tensor], skipped: list[dict[str, Any]], data: RunData, device: str
    ) -> None:
        """Write `report.html`: verdict, curves, and pictures made with the weights."""
        if self.active:
            write_run_report(self.folder, self._checkpoint(iteration, weights, skipped), data, device)

    def _checkpoint(self, iteration: int, weights: dict[str, Tensor], skipped: list[dict[str, Any]]) -> dict[str, Any]:
        provenance = run_provenance(self.sources, self.seen, self.fold, iteration, self.history)
        provenance["skipped_steps"] = skipped
        provenance["crops_seen"] = dict(self.crops_seen)
        return build_checkpoint(weights, self.config, provenance)

    def close(self) -> None:
        """After the final checkpoint has been written."""
        if self.active:
            (self.folder / LATEST).unlink(missing_ok=True)
            self.board.close()


class MetricsFile:
    """A CSV file with one row per logged iteration. The first row decides the columns; what a later one lacks, and NaN,
    is left empty.

    A resumed run drops the rows after its checkpoint, and a last row that was cut short, and goes on.

    Args:
        path: of the file.
        start: iteration of the checkpoint that the run continues from, 0 for a new run.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if start and path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        kept = whole[:1] + [line for line in whole[1:] if int(line.split(",", 1)[0]) <= start]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.columns = kept[0].strip().split(",") if kept else []

    def append(self, iteration: int, figures: dict[str, float]) -> None:
        """Add a row."""
        row = {"iteration": str(iteration), **{name: f"{value:.6g}" for name, value in known(figures).items()}}
        new = not self.columns
        self.columns = self.columns or ["iteration", *figures]
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def known(figures: dict[str, float]) -> dict[str, float]:
    """Figures without those that are NaN."""
    return {name: value for name, value in figures.items() if not math.isnan(value)}
