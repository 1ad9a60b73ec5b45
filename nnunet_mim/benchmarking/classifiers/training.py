"""Running one training of an experiment: `mim_classify train` with results of its own, and what comes out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from nnunet_mim.benchmarking.documents import CLASSIFIER_COST_SCHEMA, CLASSIFIER_RESULT_SCHEMA, read_kept
from nnunet_mim.benchmarking.training import COST, RESULT, KeptTraining
from nnunet_mim.checkpoint.locate import LATEST
from nnunet_mim.classification.baselines import is_baseline
from nnunet_mim.classification.documents import read_settings
from nnunet_mim.classification.evaluation import figures
from nnunet_mim.classification.job import Job
from nnunet_mim.classification.options import DataOptions
from nnunet_mim.classification.results import PREDICTIONS, Predictions, joined, read_predictions
from nnunet_mim.system.cli import flags_of
from nnunet_mim.system.files import write_atomically


@dataclass(frozen=True)
class ClassifierTraining(KeptTraining):
    """A cell with its folder and device."""

    job: Job
    identity: Mapping[str, Any]
    """everything that decides the result"""
    classifiers: tuple[str, ...]
    """names of the results folders that it makes, its own first"""
    folder: Path
    """of this cell only"""
    device: str
    """as for mim_classify"""
    threads: int = 0
    """number of PyTorch's threads; 0: as usual"""

    @property
    def results(self) -> Path:
        """The folder of the targets, in nnUNet_results of this training."""
        inside = self.job.folder.relative_to(os.environ["nnUNet_results"])
        return self.folder / "nnUNet_results" / inside

    def key(self) -> dict[str, Any]:
        """That of the cell."""
        return dict(self.identity)

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished training, or None. Raises MiMError where the folder holds another experiment."""
        if not self.is_this_one() or not all(path.is_file() for path in [self.folder / RESULT, *self._made]):
            return None
        return read_kept(self.folder / RESULT, CLASSIFIER_RESULT_SCHEMA)

    def compute(self, gpu: str | None, stop: Event | None) -> dict[str, Any]:
        """Train all folds, those of a network from where they were interrupted."""
        began, cost = time.monotonic(), self.folder / COST
        before = read_kept(cost, CLASSIFIER_COST_SCHEMA)["seconds"] if cost.is_file() else 0.0
        try:
            self._run(self.command(), self._made, gpu, stop)
        finally:
            seconds = before + time.monotonic() - began
            write_atomically(cost, json.dumps({"seconds": seconds}).encode())
        auroc = {}
        for found in self.predictions(self.classifiers[0]):
            known = found.target.known
            one = figures(found.target.labels[known], found.calibrated[known], np.ones((1, int(known.sum()))))
            auroc[found.target.name] = float(one["auroc"][0])
        return {"key": self.key(), "seconds": seconds, "auroc": auroc, "seen": self._seen_cases()}

    def command(self) -> list[str]:
        """The command that begins or continues the training."""
        job = self.job
        names = tuple(target.name for target in job.table.targets)
        data = DataOptions(job.source.dataset, job.source.plans_name, job.source.configuration, names)
        command = [sys.executable, "-m", "nnunet_mim.system.child", str(os.getpid()), "nnunet_mim.classification.cli"]
        command += ["train", *flags_of(data), *flags_of(job.config), "-device", self.device]
        command += [] if any(map(is_baseline, self.classifiers)) else ["--no-baselines"]
        own = self.results / job.config.arm
        begun = [path for name in (PREDICTIONS, LATEST) for path in own.glob(f"fold_*/{name}")]
        return [*command, "--c"] if begun and job.config.mode != "probe" else command

    def environment(self, gpu: str | None) -> dict[str, str]:
        """The environment of the command: the user's data, results of its own."""
        environment = {**os.environ, "nnUNet_results": str(self.folder / "nnUNet_results")}
        environment |= {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        return environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})

    def predictions(self, classifier: str) -> list[Predictions]:
        """Out-of-fold predictions of all cases, one part per target, by the classifier in a results folder."""
        folds = [read_predictions(self.results / classifier / f"fold_{fold}" / PREDICTIONS) for fold in self._folds]
        return [joined(list(parts)) for parts in zip(*folds, strict=True)]

    @property
    def _made(self) -> list[Path]:
        """The predictions that a finished training has left."""
        return [self.results / name / f"fold_{fold}" / PREDICTIONS for name in self.classifiers for fold in self._folds]

    @property
    def _folds(self) -> range:
        return range(len(self.job.folds))

    def _seen_cases(self) -> list[str]:
        """Cases whose fold's encoder was pretrained on their image."""
        own = self.results / self.classifiers[0]
        encoders = [read_settings(own / f"fold_{fold}")["encoder"] for fold in self._folds]
        return sorted({case for encoder in encoders for case in encoder.get("seen_validation_cases", [])})
