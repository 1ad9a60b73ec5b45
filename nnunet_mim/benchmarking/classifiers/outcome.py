"""What an experiment of classifiers has found: figures of its finished trainings, and paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nnunet_mim.benchmarking.classifiers.matrix import ClassifierMatrix, ClassifierPlace, ClassifierResults
from nnunet_mim.classification.baselines import SIZE, is_baseline
from nnunet_mim.classification.comparison import kept_cases
from nnunet_mim.classification.evaluation import N_DRAWS, Difference, differences, figures, holm, patient_draws
from nnunet_mim.classification.labels import cases_where, labels_file
from nnunet_mim.classification.results import Predictions
from nnunet_mim.errors import MiMError

BOOTSTRAP_SEED = 0


class Scored(NamedTuple):
    """A classifier of one training on one target."""

    dataset: str
    target: str
    labels: str
    classifier: str
    """an arm, an arm with covariates, or a baseline"""
    seed: int


@dataclass(frozen=True)
class Score:
    """How good a classifier is on the cases that count, each predicted by the fold that has not seen its patient."""

    figures: dict[str, float]
    auroc_draws: np.ndarray
    """(B,) AUROC in bootstrap draws of patients, which all classifiers of a dataset and target share"""


@dataclass(frozen=True)
class ClassifierOutcome:
    """What is reported: an experiment and its finished trainings."""

    matrix: ClassifierMatrix
    results: ClassifierResults

    def check_where(self) -> None:
        """MiMError where `where` leaves no case of a class in a dataset, or names no column of numbers."""
        for dataset, kept in self._kept.items():
            table = next(cell for place, cell in self.matrix.cells.items() if place.dataset == dataset).job.table
            for target in table.targets:
                left = {int(k) for case, k in zip(table.cases, target.labels, strict=True) if case in kept}
                if gone := [name for number, name in enumerate(target.classes) if number not in left]:
                    column, low, high = self.matrix.bench.where
                    which = f"with {column} from {low} to below {high}"
                    raise MiMError(f"where: no case of {dataset} {which} has '{target.name}' '{gone[0]}': widen it")

    @cached_property
    def scores(self) -> dict[Scored, Score]:
        """Of every classifier that is finished."""
        return {key: score for place in self.results for key, score in self._scores_of(place).items()}

    @cached_property
    def cases(self) -> dict[tuple[str, str], Predictions]:
        """The cases that count by (dataset, target), as the first finished training has predicted them."""
        found: dict[tuple[str, str], Predictions] = {}
        for place in self.results:
            if not any(dataset == place.dataset for dataset, _ in found):
                first = next(iter(self.matrix.cells[place].classifiers.values()))
                found |= {(place.dataset, part.target.name): part for part in self._predictions(place, first)}
        return found

    @cached_property
    def draws(self) -> dict[tuple[str, str], np.ndarray]:
        """(B, N) how often each case counts, by (dataset, target)."""
        return {key: patient_draws(part.patients, N_DRAWS, BOOTSTRAP_SEED) for key, part in self.cases.items()}

    def classifiers(self, dataset: str, target: str, labels: str) -> list[str]:
        """Names of those that are finished: the arms in the user's order, then the baselines."""
        found = list(dict.fromkeys(key.classifier for key in self.scores if key[:3] == (dataset, target, labels)))
        arms = {arm: number for number, arm in enumerate(self.matrix.arms)}
        return sorted(found, key=lambda name: arms.get(name.partition("+")[0], len(arms)))

    def seeds(self, dataset: str, target: str, labels: str, classifier: str) -> list[int]:
        """Seeds of which a classifier is finished."""
        return sorted(key.seed for key in self.scores if key[:4] == (dataset, target, labels, classifier))

    def values(self, dataset: str, target: str, labels: str, classifier: str, figure: str) -> np.ndarray:
        """(seeds,) values of a figure."""
        seeds = self.seeds(dataset, target, labels, classifier)
        return np.array([self.scores[Scored(dataset, target, labels, classifier, s)].figures[figure] for s in seeds])

    @cached_property
    def comparisons(self) -> list[tuple[Scored, Difference, int]]:
        """AUROC of arms against the control and the size alone, and the number of seeds that both have.

        Values and draws are means over these seeds: the interval is for other patients and these trainings. p is
        corrected for the number of all of them (Holm). `seed` of the key is the first one.
        """
        found = []
        for dataset, target in self.cases:
            for labels in self.matrix.labels(dataset):
                names = self.classifiers(dataset, target, labels)
                networks = [name for name in names if not is_baseline(name)]
                control = self.matrix.control
                pairs = [(name, control) for name in networks if name != control and control in names]
                pairs += [(name, SIZE) for name in networks if SIZE in names]
                for name, other in pairs:
                    seeds = [set(self.seeds(dataset, target, labels, one)) for one in (name, other)]
                    if both := sorted(seeds[0] & seeds[1]):
                        gap = self._difference(dataset, target, labels, (name, other), both)
                        found.append((Scored(dataset, target, labels, name, both[0]), gap, len(both)))
        corrected = holm([gap.p for _, gap, _ in found])
        return [(key, replace(gap, corrected_p=p), n) for (key, gap, n), p in zip(found, corrected, strict=True)]

    def seen_cases(self, dataset: str, arm: str) -> list[str]:
        """Cases whose images the pretraining of an arm has seen."""
        places = [place for place in self.results if (place.dataset, place.arm) == (dataset, arm)]
        return sorted({case for place in places for case in self.results[place]["seen"]})

    def has_record(self, dataset: str, arm: str) -> bool:
        """Whether it is known which cases an arm was pretrained on."""
        cells = (cell for place, cell in self.matrix.cells.items() if (place.dataset, place.arm) == (dataset, arm))
        return next(cells).start.has_record

    def _difference(
        self, dataset: str, target: str, labels: str, pair: tuple[str, str], seeds: Sequence[int]
    ) -> Difference:
        values: dict[str, float] = {}
        drawn: dict[str, np.ndarray] = {}
        for name in pair:
            scores = [self.scores[Scored(dataset, target, labels, name, seed)] for seed in seeds]
            values[name] = float(np.mean([score.figures["auroc"] for score in scores]))
            drawn[name] = np.mean([score.auroc_draws for score in scores], axis=0)
        return differences(values, drawn, [pair])[0]

    def _scores_of(self, place: ClassifierPlace) -> Mapping[Scored, Score]:
        found = {}
        for name, folder in self.matrix.cells[place].classifiers.items():
            for part in self._predictions(place, folder):
                where = place.dataset, part.target.name
                if part.cases != self.cases[where].cases:
                    raise MiMError(
                        f"{place}: {name} has predicted other cases than the first training: delete "
                        f"{self.matrix.training(place).folder}, and repeat the command"
                    )
                labels = part.target.labels
                one = figures(labels, part.calibrated, np.ones((1, len(labels))))
                drawn = figures(labels, part.calibrated, self.draws[where])["auroc"]
                key = Scored(*where, place.labels, name, place.seed)
                found[key] = Score({figure: float(value[0]) for figure, value in one.items()}, drawn)
        return found

    def _predictions(self, place: ClassifierPlace, folder: str) -> list[Predictions]:
        """Those of the cases that count, one part per target."""
        kept = self._kept.get(place.dataset)
        return [kept_cases(part, kept) for part in self.matrix.training(place).predictions(folder)]

    @cached_property
    def _kept(self) -> dict[str, set[str]]:
        """The cases that `where` leaves, by dataset; empty without it."""
        bench = self.matrix.bench
        if not bench.where:
            return {}
        column, low, high = bench.where
        given = str(bench.settings.get("labels", ""))
        return {name: cases_where(labels_file(name, given), column, low, high) for name in self.matrix.datasets}
