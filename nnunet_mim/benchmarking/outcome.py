"""What an experiment has found: metrics of its finished trainings, and comparisons with the control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.benchmarking.external import ExternalSet
from nnunet_mim.benchmarking.guard import Seen
from nnunet_mim.benchmarking.matrix import Matrix, Place, Results, case_value
from nnunet_mim.benchmarking.statistics import Comparison, compare
from nnunet_mim.classification.evaluation import holm
from nnunet_mim.nnunet.datasets import raw_images

MARK = " *"
"""stands behind an arm whose pretraining has seen cases that it is evaluated on"""


@dataclass(frozen=True)
class Outcome:
    """What is reported: an experiment, its finished trainings, and what the arms' pretrainings have seen.

    Values are those of the validation cases, or of an external test set, see `on`.
    """

    matrix: Matrix
    results: Results
    seen: Seen
    test: ExternalSet | None = None

    def on(self, test: ExternalSet, seen: Seen) -> Outcome:
        """The same trainings evaluated on a test set; `seen` are the findings for its cases."""
        results = {
            place: {**result, "cases": result["tests"][test.dataset]}
            for place, result in self.results.items()
            if test.dataset in result.get("tests", {})
        }
        return replace(self, results=results, seen=seen, test=test)

    def case_count(self, dataset: str) -> int:
        """Number of cases that a seed is evaluated on."""
        if self.test:
            return len(self.test.references)
        cells = {place.fold: cell for place, cell in self.matrix.cells.items() if place.dataset == dataset}
        return sum(len(cell.val_cases) for cell in cells.values())

    def place(self, dataset: str) -> str:
        """What the cases are of: a dataset, or a test set and the dataset that was trained on."""
        return f"{self.test.dataset}, trained on {dataset}" if self.test else dataset

    def reference(self, place: Place, case: str) -> Path:
        """The label image of a case."""
        return self.test.references[case] if self.test else self.matrix.cells[place].reference(case)

    def images(self, dataset: str) -> dict[str, Path]:
        """First channel of every case by name; empty where the images are not in nnUNet_raw."""
        files: Mapping[str, Sequence[Any]] = self.test.images if self.test else raw_images(dataset)
        return {case: Path(channels[0]) for case, channels in files.items()}

    def seeds(self, dataset: str, labels: str, arm: str) -> list[int]:
        """Seeds of which every fold is finished."""
        folds = self.matrix.folds(dataset)
        return [
            seed
            for seed in range(self.matrix.bench.seeds)
            if all(Place(dataset, fold, labels, seed, arm) in self.results for fold in folds)
        ]

    def rows(self, dataset: str) -> list[tuple[str, str, list[int]]]:
        """(labels, arm, seeds) in the order of the tables; only those with a finished seed."""
        pairs = [(labels, arm) for labels in self.matrix.labels for arm in self.matrix.arms]
        return [(*pair, seeds) for pair in pairs if (seeds := self.seeds(dataset, *pair))]

    def trainings(self, dataset: str, labels: str, arm: str) -> list[Mapping[str, Any]]:
        """Results of the finished seeds, fold by fold."""
        return [
            self.results[Place(dataset, fold, labels, seed, arm)]
            for seed in self.seeds(dataset, labels, arm)
            for fold in self.matrix.folds(dataset)
        ]

    def values(
        self, dataset: str, labels: str, seeds: Sequence[int], arm: str, metric: str, label: str | None = None
    ) -> np.ndarray:
        """(seeds, cases) of a metric, see `case_value`: the cases of all folds one after the other; those of a test set
        once, with the mean over folds.
        """
        rows = []
        for seed in seeds:
            cases = [self.results[Place(dataset, f, labels, seed, arm)]["cases"] for f in self.matrix.folds(dataset)]
            found = [[case_value(fold[case], metric, label) for case in sorted(fold)] for fold in cases]
            rows.append(_mean_over_folds(found) if self.test else [value for fold in found for value in fold])
        return np.array(rows)

    def name(self, dataset: str, arm: str) -> str:
        """An arm's name, marked where its pretraining has seen cases that it is evaluated on."""
        folds = self.matrix.folds(dataset)
        return arm + (MARK if any(self.seen[dataset, fold, arm].seen for fold in folds) else "")

    def label_text(self, dataset: str, labels: str) -> str:
        """Labels as the user wrote them, and the number of cases that they are."""
        counts = sorted({self.matrix.train_count(dataset, fold, labels) for fold in self.matrix.folds(dataset)})
        numbers = "/".join(map(str, counts))
        return labels if labels == numbers else f"{labels} ({numbers})"

    def label_names(self, dataset: str) -> dict[str, str]:
        """Names of the labels by their key in nnU-Net's summary; empty where nothing is finished."""
        first = next((result for place, result in self.results.items() if place.dataset == dataset), None)
        if first is None:
            return {}
        return {key: first["names"].get(key, key) for key in next(iter(first["cases"].values()))}

    @cached_property
    def comparisons(self) -> dict[tuple[str, str, str], tuple[Comparison, list[int]]]:
        """Dice (%) of arms and of the control by (dataset, labels, arm), and the seeds that both have."""
        matrix, compared = self.matrix, {}
        for dataset in matrix.datasets:
            for arm in matrix.arms:
                for labels in matrix.labels:
                    seeds = [set(self.seeds(dataset, labels, name)) for name in (arm, matrix.control)]
                    both = sorted(seeds[0] & seeds[1])
                    if both and arm != matrix.control:
                        ours, theirs = (self.values(dataset, labels, both, a, "dice") for a in (arm, matrix.control))
                        compared[dataset, labels, arm] = compare(ours * 100, theirs * 100), both
        return compared

    def corrected_ps(self) -> dict[tuple[str, str, str], float]:
        """p of every comparison by (dataset, labels, arm), corrected for the number of all of them (Holm)."""
        ps = [comparison.p for comparison, _ in self.comparisons.values()]
        return dict(zip(self.comparisons, holm(ps), strict=True))


def _mean_over_folds(values: Sequence[Sequence[float]]) -> list[float]:
    """(folds, cases) → (cases,); a fold without a value does not count."""
    by_case = zip(*values, strict=True)
    finite = [[value for value in found if np.isfinite(value)] for found in by_case]
    return [float(np.mean(found)) if found else float("nan") for found in finite]
