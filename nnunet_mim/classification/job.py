"""What every mode of `mim_classify train` works on: cases with labels, folds, regions, a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nnunet_mim
from nnunet_mim.checkpoint.identity import leaked_cases
from nnunet_mim.classification.encoders import LoadedEncoder, load_encoder
from nnunet_mim.classification.folds import Folds, find_folds
from nnunet_mim.classification.labelled import labelled_folds
from nnunet_mim.classification.labels import LabelTable, check_cases, check_classes, labels_file, read_labels
from nnunet_mim.classification.options import ClassifyConfig, DataOptions
from nnunet_mim.classification.regions import CaseReader
from nnunet_mim.classification.results import PREDICTIONS, targets_folder
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import require_environment
from nnunet_mim.nnunet.source import Source, find_source
from nnunet_mim.nnunet.splits import left_out_cases


@dataclass(frozen=True)
class Job:
    """A checked call of `mim_classify train`."""

    source: Source
    config: ClassifyConfig
    table: LabelTable
    folds: Folds
    reader: CaseReader
    folder: Path
    """of the targets, in nnUNet_results"""

    def fold_folder(self, arm: str, fold: int) -> Path:
        """Where a fold of an arm is written."""
        return self.folder / arm / f"fold_{fold}"

    def is_complete(self, arm: str) -> bool:
        """Whether every fold of an arm is trained."""
        return all((self.fold_folder(arm, fold) / PREDICTIONS).is_file() for fold in range(len(self.folds)))

    def pretraining_fold(self, fold: int) -> int | str:
        """The fold of the pretraining that leaves out the validation cases of this fold; `all` where none does."""
        return fold if self.folds.is_nnunet else "all"

    def encoder(self, fold: int) -> LoadedEncoder:
        """The encoder that a fold starts from. Raises MiMError as `load_encoder`."""
        return load_encoder(self.source, self.config, self.pretraining_fold(fold))

    def seen_cases(self, provenance: dict[str, Any], rows: Sequence[int] | np.ndarray) -> list[str]:
        """Those of some cases whose voxels (never labels) the encoder was pretrained on."""
        names = [self.table.cases[row] for row in rows]
        source = self.source
        found = leaked_cases(
            provenance, source.dataset, names, lambda case: self.reader.read(case).voxels[:], source.intensities,
            source.spacing,
        )  # fmt: skip
        return sorted({*found.same, *found.probably_same})

    def settings(self, encoder: LoadedEncoder | None, fold: int) -> dict[str, Any]:
        """What `settings.json` of a fold says about the training."""
        val = self.folds.validation[fold]
        return {
            "mim_version": nnunet_mim.__version__,
            "dataset": self.source.dataset,
            "plans": self.source.plans_name,
            "configuration": self.source.configuration,
            "spacing": list(self.source.spacing),
            "targets": {target.name: list(target.classes) for target in self.table.targets},
            "config": self.config.to_dict(),
            "folds": self.folds.file.name,
            "fold": fold,
            "n_training_cases": len(self.folds.training[fold]),
            "n_validation_cases": len(val),
            "encoder": {} if encoder is None else {
                "origin": encoder.origin,
                "sha256": encoder.sha256,
                "architecture": encoder.architecture,
                "pretrained_on": encoder.provenance.get("datasets", []),
                "seen_validation_cases": self.seen_cases(encoder.provenance, val) if encoder.provenance else [],
            },
        }  # fmt: skip


def set_up(where: DataOptions, config: ClassifyConfig, settings: tuple[str, str] = ("-p", "-c")) -> Job:
    """Check everything that a user has given. Raises MiMError for the first thing that is wrong.

    `settings` are what the user names plans and configuration with, for messages.
    """
    require_environment()
    source = find_source(where.dataset, where.plans, where.configuration, settings)
    path = labels_file(source.dataset, config.labels)
    if twice := [name for name in where.target if where.target.count(name) > 1]:
        raise MiMError(f"--target {twice[0]} is given twice: give it once")
    if both := sorted({*where.target} & {*config.covariate}):
        raise MiMError(f"{both[0]} is both --target and --covariate: leave out one")
    table = read_labels(path, where.target, config.covariate, config.per_patient)
    table = check_cases(table, source.cases, left_out_cases(source), path)
    check_classes(table, config.folds, path)
    reader = CaseReader(source, config.roi)
    reader.check_masks(table.cases)
    folds = find_folds(source.folder.parent, table, config.folds)
    folds = labelled_folds(folds, table, config.labelled, config.seed)
    return Job(source, config, table, folds, reader, targets_folder(source, where.target))


def chosen_folds(given: Sequence[str], n_folds: int) -> list[int]:
    """Fold numbers of `-f`; all of them for `all`. Raises MiMError for another word or number."""
    if list(given) == ["all"]:
        return list(range(n_folds))
    for fold in given:
        if not fold.isdigit() or int(fold) >= n_folds:
            raise MiMError(f"-f takes all, or numbers from 0 to {n_folds - 1}, got '{fold}'")
    return sorted({int(fold) for fold in given})
