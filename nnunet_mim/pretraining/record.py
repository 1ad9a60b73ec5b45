"""What a run leaves in its folder while it goes on: figures, checkpoints, pictures."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

from lightning_fabric import Fabric
from torch.utils.tensorboard import SummaryWriter

from nnunet_mim.checkpoint.format import BEST, LATEST
from nnunet_mim.pretraining.monitoring.monitor import Monitor
from nnunet_mim.pretraining.monitoring.verdict import verdict_on
from nnunet_mim.pretraining.report.page import write_run_report
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.state import TrainingState
from nnunet_mim.reporting.curves import write_progress


class RunRecord:
    """What a run leaves in its folder. Every rank has one and measures, but only the first rank's writes.

    Args:
        run: what is computed.
        state: of the run.
        monitor: measures.
        fabric: of the run.
    """

    def __init__(self, run: Run, state: TrainingState, monitor: Monitor, fabric: Fabric) -> None:
        self.run, self.state, self.monitor = run, state, monitor
        self.active = fabric.is_global_zero
        self.device = fabric.device.type
        self.val: dict[str, float] = state.history[-1] if state.history else {}
        """last measurement on held-out cases"""
        if self.active:
            self.files = {part: MetricsFile(run.folder / f"{part}.csv", state.iteration) for part in ("train", "val")}
            self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=state.iteration + 1)

    def log(self, part: str, iteration: int, figures: dict[str, float]) -> None:
        """Add figures to `train.csv` or `val.csv` and to TensorBoard; NaN stands for none."""
        if self.active:
            self.files[part].append(iteration, figures)
            for name, value in known(figures).items():
                self.board.add_scalar(name, value, iteration)

    def measure(self, train: dict[str, float]) -> str:
        """Measure on held-out cases, draw `progress.png`, keep the best checkpoint, now and then write the report.

        Args:
            train: mean figures of the last training steps.

        Returns:
            the verdict in one line, where a report was due; else an empty text.
        """
        state, iteration = self.state, self.state.iteration
        val = self.val = self.monitor.measure(state.model, iteration)
        best = min((row["val/loss"] for row in state.history), default=float("inf"))
        state.history.append({"iteration": iteration, **known(train), **val})
        with self.monitor.clock("progress"):
            self.log("val", iteration, val)
            if self.active:
                write_progress(self.run.folder)
        if iteration == 0:
            return ""
        if val["val/loss"] < best:
            self.save(BEST)
        if not self.monitor.due(iteration) and iteration != self.run.config.iterations:
            return ""
        with self.monitor.clock("report"):
            if self.active:
                write_run_report(self.run.folder, state.checkpoint(self.run), self.run.data, self.device)
        return f"iteration {iteration}: {self.verdict()}"

    def verdict(self) -> str:
        """One sentence: is it working?"""
        return verdict_on(self.state.history, self.run.config).sentence

    def save(self, name: str, resumable: bool = False) -> None:
        """Write a checkpoint; a resumable one can be continued from."""
        if self.active:
            self.state.save(self.run, self.run.folder / name, resumable)

    def close(self) -> None:
        """After the final checkpoint has been written."""
        if self.active:
            (self.run.folder / LATEST).unlink(missing_ok=True)
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
