"""What a run leaves in its folder while it goes on: figures, checkpoints, pictures."""

from __future__ import annotations

import math
import time

from lightning_fabric import Fabric

from nnunet_mim.checkpoint.locate import BEST, LATEST
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures, measurements_of
from nnunet_mim.pretraining.monitoring.metrics_log import MetricsLog, without_nan
from nnunet_mim.pretraining.monitoring.monitor import Monitor
from nnunet_mim.pretraining.monitoring.verdict import verdict_on
from nnunet_mim.pretraining.report.curves import write_progress
from nnunet_mim.pretraining.report.page import write_run_report
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.state import TrainingState


class RunRecord:
    """Measures, and writes what a run leaves. Every rank has one and measures, but only the first rank's writes.

    Args:
        run: what is computed.
        state: of the run.
        monitor: measures.
        fabric: of the run.
    """

    def __init__(self, run: Run, state: TrainingState, monitor: Monitor, fabric: Fabric) -> None:
        self.run, self.state, self.monitor = run, state, monitor
        self.device = fabric.device.type
        self.began = time.perf_counter()
        self.measurements = measurements_of(state.history)
        self.metrics = MetricsLog(run.folder, state.iteration) if fabric.is_global_zero else None

    @property
    def active(self) -> bool:
        """Whether this rank writes."""
        return self.metrics is not None

    @property
    def last(self) -> Measurement[float]:
        """The last measurement on held-out cases."""
        return self.measurements[-1]

    def log(self, iteration: int, figures: TrainingFigures[float] | Measurement[float]) -> None:
        """Add figures to `train.csv` or `val.csv` and to TensorBoard."""
        if self.metrics is not None:
            self.metrics.add(iteration, figures)

    def measure(self, train: TrainingFigures[float]) -> str:
        """Measure on held-out cases, draw `progress.png`, keep the best checkpoint, now and then write the report.

        Args:
            train: mean figures of the last training steps.

        Returns:
            the verdict in one line, where a report was due; else an empty text.
        """
        state, iteration = self.state, self.state.iteration
        val = self.monitor.measure(state.model, iteration)
        lowest = min((earlier.loss for earlier in self.measurements if earlier.loss is not None), default=math.inf)
        state.history.append({"iteration": iteration, **without_nan(train.row()), **val.row()})
        self.measurements.append(val)
        with self.monitor.clock("progress"):
            self.log(iteration, val)
            if self.active:
                write_progress(self.run.folder)
        if iteration == 0:
            return ""
        if val.loss is not None and val.loss < lowest:
            self.save(BEST)
        if not self.monitor.due(iteration) and iteration != self.run.config.iterations:
            return ""
        with self.monitor.clock("report"):
            if self.active:
                write_run_report(self.run.folder, state.checkpoint(self.run), self.run.data, self.device)
        return f"iteration {iteration}: {self.verdict()}"

    @property
    def measuring_share(self) -> float:
        """Share of the time since this process began to train that measurements have taken."""
        measuring = sum(sum(seconds) for seconds in self.monitor.seconds.values())
        return measuring / (time.perf_counter() - self.began)

    def verdict(self) -> str:
        """One sentence: is it working?"""
        return verdict_on(self.measurements, self.run.config).sentence

    def save(self, name: str, resumable: bool = False) -> None:
        """Write a checkpoint; a resumable one can be continued from."""
        if self.active:
            self.state.save(self.run, self.run.folder / name, resumable)

    def close(self) -> None:
        """After the final checkpoint has been written."""
        if self.metrics is not None:
            (self.run.folder / LATEST).unlink(missing_ok=True)
            self.metrics.close()
