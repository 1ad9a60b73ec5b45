"""What a run leaves in its folder while it goes on: figures, checkpoints, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunet_mim.checkpoint.format import LATEST, build_checkpoint, run_provenance, save_atomically
from nnunet_mim.config import PretrainConfig
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures, measurements_of
from nnunet_mim.pretraining.monitoring.metrics_log import MetricsLog, without_nan
from nnunet_mim.pretraining.monitoring.verdict import verdict_on
from nnunet_mim.pretraining.report.curves import write_progress
from nnunet_mim.pretraining.report.page import write_run_report


class RunRecord:
    """Figures and checkpoints of one run. Every rank has one, but only the first rank's writes anything.

    Args:
        folder: of the run, exists.
        config: of the run.
        data: of the run.
        seen: records of the cases that the weights have been trained on.
        start: iteration that the run continues from; 0 for a new one.
        history: measurements so far, oldest first.
        crops_seen: by dataset, kept up to date by the loop.
        active: whether this rank writes.
    """

    def __init__(
        self, folder: Path, config: PretrainConfig, data: RunData, seen: list[dict[str, str]], start: int,
        history: list[dict[str, float]], crops_seen: Mapping[str, int], active: bool,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.config = config
        self.data = data
        self.seen = seen
        self.history = history
        self.measurements = measurements_of(history)
        self.crops_seen = crops_seen
        self.metrics = MetricsLog(folder, start) if active else None

    def log(self, iteration: int, figures: TrainingFigures[float] | Measurement[float]) -> None:
        """Add figures to `train.csv` or `val.csv` and to TensorBoard."""
        if self.metrics is not None:
            self.metrics.add(iteration, figures)

    def measured(self, iteration: int, val: Measurement[float], train: TrainingFigures[float] | None = None) -> bool:
        """Note a measurement, with the training figures of its time, and draw `progress.png`.

        Returns:
            whether its loss is the lowest so far.
        """
        best = min((earlier.loss for earlier in self.measurements if earlier.loss is not None), default=float("inf"))
        self.history.append({"iteration": iteration, **without_nan((train or TrainingFigures()).row()), **val.row()})
        self.measurements.append(val)
        self.log(iteration, val)
        if self.metrics is not None:
            write_progress(self.folder)
        return val.loss is not None and val.loss < best

    def verdict(self) -> str:
        """One sentence: is it working?"""
        return verdict_on(self.measurements, self.config).sentence

    def save(
        self, name: str, iteration: int, weights: dict[str, Tensor], skipped: list[dict[str, Any]],
        resume_state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a checkpoint; with `resume_state` the run can be continued from it."""
        if self.metrics is not None:
            checkpoint = self._checkpoint(iteration, weights, skipped)
            if resume_state is not None:
                checkpoint["resume_state"] = resume_state
            save_atomically(checkpoint, self.folder / name)

    def report(self, iteration: int, weights: dict[str, Tensor], skipped: list[dict[str, Any]], device: str) -> None:
        """Write `report.html`: verdict, curves, and pictures made with the weights."""
        if self.metrics is not None:
            write_run_report(self.folder, self._checkpoint(iteration, weights, skipped), self.data, device)

    def _checkpoint(self, iteration: int, weights: dict[str, Tensor], skipped: list[dict[str, Any]]) -> dict[str, Any]:
        provenance = run_provenance(self.data.sources, self.seen, self.data.fold, iteration, self.history)
        provenance["skipped_steps"] = skipped
        provenance["crops_seen"] = dict(self.crops_seen)
        return build_checkpoint(weights, self.config, provenance)

    def close(self) -> None:
        """After the final checkpoint has been written."""
        if self.metrics is not None:
            (self.folder / LATEST).unlink(missing_ok=True)
            self.metrics.close()
