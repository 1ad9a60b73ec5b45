"""An experiment: datasets × folds × numbers of labels × seeds × arms, and the training that each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nnunet_mim.benchmarking.bench_file import Bench
from nnunet_mim.benchmarking.cell import Arm, Cell, control_of, resolve_arm
from nnunet_mim.benchmarking.external import ExternalSet, find_external
from nnunet_mim.benchmarking.splits import labelled_subset
from nnunet_mim.benchmarking.training import Training
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import dataset_name
from nnunet_mim.nnunet.splits import split_of


class Place(NamedTuple):
    """The position of one training in the matrix."""

    dataset: str
    """DatasetXXX_Name"""
    fold: int
    labels: str
    """as the user wrote it: 20, 10%, all"""
    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.dataset} fold {self.fold}, labels {self.labels}, seed {self.seed}, {self.arm}"


Results = dict[Place, dict[str, Any]]


@dataclass(frozen=True)
class Matrix:
    """All trainings of a Bench, checked."""

    bench: Bench
    cells: dict[Place, Cell]
    control: str
    tests: tuple[ExternalSet, ...] = ()

    @property
    def datasets(self) -> list[str]:
        """Names, in the user's order."""
        return list(dict.fromkeys(place.dataset for place in self.cells))

    @property
    def labels(self) -> list[str]:
        """Numbers of labels as the user wrote them, in ascending order."""
        dataset, fold, *_ = next(iter(self.cells))
        return sorted(self.bench.labels, key=lambda labels: self.train_count(dataset, fold, labels))

    @property
    def arms(self) -> list[str]:
        """Names, in the user's order."""
        return [spec.name for spec in self.bench.arms]

    def folds(self, dataset: str) -> list[int]:
        """The folds of a dataset."""
        return list(dict.fromkeys(place.fold for place in self.cells if place.dataset == dataset))

    def train_count(self, dataset: str, fold: int, labels: str) -> int:
        """Number of training cases, which all seeds and arms share."""
        return len(self.cells[Place(dataset, fold, labels, 0, self.arms[0])].train_cases)

    def shown(self, result: Mapping[str, Any]) -> str:
        """The figure of a result that is printed when it is there."""
        return f"mean Dice {mean_dice(result):.3f}"

    def training(self, place: Place, threads: int = 0) -> Training:
        """The training of a cell, in its folder."""
        labels = place.labels.replace("%", "pct")
        folders = place.dataset, f"fold_{place.fold}", f"labels_{labels}", f"seed_{place.seed}", place.arm
        folder = self.bench.output.joinpath("cells", *folders)
        bench = self.bench
        return Training(self.cells[place], folder, bench.device, bench.nsd_tolerance_mm, threads, self.tests)


def build_matrix(bench: Bench) -> Matrix:
    """Find and check everything that can be wrong, before anything is trained. Raises MiMError."""
    if bad := [spec.name for spec in bench.arms if not spec.name.replace("_", "").isalnum()]:
        raise MiMError(f"arm {bad[0]}: a name has letters, digits and _ only")
    if len(set(bench.labels)) < len(bench.labels):
        raise MiMError("labels are there twice: give each number once")
    if not bench.labels:
        raise MiMError("labels: give numbers, percentages or all")
    control = control_of(bench.arms, bench.control)
    cells: dict[Place, Cell] = {}
    for spec in bench.datasets:
        dataset = dataset_name(spec.dataset)
        if any(place.dataset == dataset for place in cells):
            raise MiMError(f"{dataset} is there twice: give it once, with all its folds")
        fold_of: dict[str, int] = {}
        for fold in spec.folds:
            arms = [resolve_arm(arm, dataset, spec.configuration, fold) for arm in bench.arms]
            train, val = _cases(arms, dataset, fold)
            if twice := sorted(set(val) & set(fold_of)):
                folds = f"{fold_of[twice[0]]} and {fold}"
                raise MiMError(f"{dataset}: folds {folds} both validate {twice[0]}: give them in two experiments")
            fold_of |= dict.fromkeys(val, fold)
            cells |= {
                Place(dataset, fold, labels, seed, arm.spec.name): Cell(
                    arm, fold, labelled_subset(train, labels, seed), val, seed, bench.length
                )
                for seed in range(bench.seeds)
                for labels in bench.labels
                for arm in arms
            }
    for cell in cells.values():
        if cell.arm.spec.is_mim:
            cell.recipe()
    ordered = sorted(cells, key=lambda place: place.seed)  # stable: every arm and dataset has a result early
    trained = {place.dataset: cell.dataset_json for place, cell in cells.items()} if bench.test else {}
    tests = tuple(find_external(given, trained) for given in bench.test)
    if len({test.dataset for test in tests}) < len(tests):
        raise MiMError("test: a dataset is there twice: give it once")
    return Matrix(bench, {place: cells[place] for place in ordered}, control, tests)


def _cases(arms: list[Arm], dataset: str, fold: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation cases of a fold, which every arm must have."""
    all_cases = sorted({case for arm in arms for case in arm.source.cases})
    train, val = split_of(replace(arms[0].source, cases=tuple(all_cases)), fold, "the dataset's folds")
    if not val or not train:
        raise MiMError(f"{dataset} has no labels, or fold {fold} of its split has no cases on one side")
    for arm in arms:
        if missing := set(train + val) - set(arm.source.cases):
            raise MiMError(
                f"{min(missing)} is not preprocessed for {arm.source.plans_name}: run "
                f"{arm.source.preprocess_command}"
            )
    return tuple(sorted(train)), val


def mean_dice(result: Mapping[str, Any]) -> float:
    """Mean over the labels of a case, then over cases."""
    return float(np.nanmean([case_value(labels, "dice") for labels in result["cases"].values()]))


def case_value(labels: Mapping[str, Mapping[str, float]], metric: str, label: str | None = None) -> float:
    """A metric of one case: of one label, or the mean over all labels; NaN where there is none.

    As in nnU-Net, a label that neither the reference nor the prediction has is left out, and one that is found where
    the reference has none has a Dice of 0.
    """
    shown = [found for name, found in labels.items() if label in (None, name)]
    values = [found[metric] for found in shown if found["n_ref"] or found["n_pred"]]
    return float(np.mean(values)) if values else float("nan")


def false_alarms(result: Mapping[str, Any]) -> tuple[int, int]:
    """(labels predicted where the reference has none, labels that the reference does not have), counted over cases."""
    absent = [found for labels in result["cases"].values() for found in labels.values() if not found["n_ref"]]
    return sum(bool(found["n_pred"]) for found in absent), len(absent)
