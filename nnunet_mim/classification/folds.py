"""Folds for classification: stratified by class, and no patient in two of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from nnunet_mim.classification.labels import LabelTable
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_splits
from nnunet_mim.system.files import write_atomically

SPLITS_FILE = "splits_classification.json"
NNUNET_SPLITS = "splits_final.json"
SPLIT_SEED = 12345
"""that of nnU-Net's own split"""


@dataclass(frozen=True)
class Folds:
    """Training and validation cases of each fold."""

    training: tuple[tuple[int, ...], ...]
    """rows of the table per fold, ascending"""
    validation: tuple[tuple[int, ...], ...]
    """likewise; every row is in one of them"""
    file: Path
    """where they stand"""

    def __len__(self) -> int:
        return len(self.validation)

    @property
    def is_nnunet(self) -> bool:
        """Whether the folds are those of nnU-Net's trainings, so that a pretraining's fold is the same fold."""
        return self.file.name == NNUNET_SPLITS


def stratified_folds(table: LabelTable, n_folds: int, seed: int = SPLIT_SEED) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, validation) rows of each fold: classes are spread evenly, patients kept together.

    Several targets are stratified by the combination of their classes, missing ones included.

    Args:
        table: cases with patients and labels.
        n_folds: at least 2 and at most the number of patients.
        seed: of the order of patients.
    """
    joint = joint_classes([target.labels for target in table.targets])
    return grouped_split(joint, table.patients, n_folds, seed)


def joint_classes(labels: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) number of the combination of classes of several targets, (N,) each; missing is a class of its own."""
    return np.unique(labels, axis=1, return_inverse=True)[1].reshape(-1)


def grouped_split(
    labels: np.ndarray, patients: Sequence[str], n_folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, validation) positions of each fold, classes (N,) spread evenly and no patient on both sides.

    A class may be smaller than the number of folds: what is combined of several targets often is.
    """
    counts = np.bincount(labels)
    rare = np.isin(labels, np.flatnonzero(counts < n_folds))  # scikit-learn wants n_folds members in each class
    joined = np.where(rare, -1 if rare.sum() >= n_folds else counts.argmax(), labels)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros((len(labels), 1)), joined, groups=np.array(patients)))


def find_folds(folder: Path, table: LabelTable, n_folds: int) -> Folds:
    """The folds of a dataset: first hit of its own file, nnU-Net's where it splits no patient, and new ones.

    New ones are written as `splits_classification.json`, a list of {"train": […], "val": […]} as nnU-Net's. Edit or
    replace the file to have other folds, delete it to have new ones.

    Args:
        folder: of the dataset in nnUNet_preprocessed.
        table: cases to classify.
        n_folds: of new folds.

    Raises:
        MiMError: the file splits a patient, leaves out cases, or is not as nnU-Net writes it.
    """
    own, nnunet = folder / SPLITS_FILE, folder / NNUNET_SPLITS
    if own.exists():
        return _read(own, table)
    if nnunet.exists():
        try:
            return _read(nnunet, table)
        except MiMError as error:
            print(f"note: {error}; new folds are written to {own}")
    splits = stratified_folds(table, n_folds)
    named = [
        {part: [table.cases[row] for row in rows] for part, rows in zip(("train", "val"), split, strict=True)}
        for split in splits
    ]
    write_atomically(own, json.dumps(named, indent=1).encode())
    return _read(own, table)


def _read(path: Path, table: LabelTable) -> Folds:
    """The folds in a file. Raises MiMError where they cannot be used for this table."""
    remedy = f"correct {path.name}, or delete {SPLITS_FILE} to have new folds"
    splits = read_splits(path, remedy)
    if len(splits) < 2:
        raise MiMError(f"{path} holds one fold, and at least two are needed: {remedy}")
    row_of = {case: row for row, case in enumerate(table.cases)}
    training, validation = (
        tuple(tuple(sorted({row_of[case] for case in names if case in row_of})) for names in parts)
        for parts in ([split["train"] for split in splits], [split["val"] for split in splits])
    )
    for fold, (train, val) in enumerate(zip(training, validation, strict=True)):
        patients = {table.patients[row] for row in train}
        if both := [row for row in val if table.patients[row] in patients]:
            row = both[0]
            raise MiMError(
                f"{path} has patient {table.patients[row]} (case {table.cases[row]}) in training and validation of "
                f"fold {fold}: {remedy}"
            )
        for target in table.targets:
            classes = enumerate(target.classes)
            if missing := [name for number, name in classes if not (target.labels[list(train)] == number).any()]:
                raise MiMError(f"{path}: no training case of fold {fold} is '{missing[0]}' ({target.name}): {remedy}")
    times = np.bincount([row for rows in validation for row in rows], minlength=len(table.cases))
    if (times != 1).any():
        row = int(np.flatnonzero(times != 1)[0])
        raise MiMError(f"{path} has {table.cases[row]} in the validation of {times[row]} folds, not one: {remedy}")
    return Folds(training, validation, path)
