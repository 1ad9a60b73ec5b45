"""An experiment of classifiers: datasets × labelled patients × seeds × arms, and the training that each stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from nnunet_mim.benchmarking.classifiers.bench_file import ClassifierArm, ClassifierBench, ClassifierDataset
from nnunet_mim.benchmarking.classifiers.training import ClassifierTraining
from nnunet_mim.classification.baselines import BASELINES
from nnunet_mim.classification.job import Job, set_up
from nnunet_mim.classification.labelled import labelled_folds
from nnunet_mim.classification.options import DataOptions
from nnunet_mim.classification.results import WITH_COVARIATES
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import dataset_name
from nnunet_mim.nnunet.plans import voxels_key


class ClassifierPlace(NamedTuple):
    """The position of one training in the matrix."""

    dataset: str
    """DatasetXXX_Name"""
    labels: str
    """as the user wrote it: 20, 10%, all"""
    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.dataset}, labels {self.labels}, seed {self.seed}, {self.arm}"


ClassifierResults = dict[ClassifierPlace, dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """What an arm starts from on a dataset."""

    identity: dict[str, Any]
    """hash of the pretrained weights, or the architecture of random ones"""
    origin: str
    """in words"""
    has_record: bool
    """whether it is known which cases the weights were pretrained on; random weights: on none"""


@dataclass(frozen=True)
class ClassifierCell:
    """One training of the experiment: all folds of `mim_classify train` with one setting."""

    job: Job
    start: Start
    arm: str
    has_baselines: bool
    """whether the baselines are trained beside it"""

    @cached_property
    def classifiers(self) -> dict[str, str]:
        """Names of the results folders that it leaves, by the name in the report."""
        config = self.job.config
        found = {self.arm: config.arm}
        if config.covariate:
            found[self.arm + WITH_COVARIATES] = config.arm + WITH_COVARIATES
        if self.has_baselines:
            names = BASELINES if config.covariate else BASELINES[:-1]
            found |= {name: config.baseline_arm(name) for name in names}
        return found

    def n_patients(self) -> list[int]:
        """Number of labelled training patients of every fold."""
        return [len({self.job.table.patients[row] for row in rows}) for rows in self.job.folds.training]

    def key(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values; paths do not count but that of a folder of masks."""
        job, settings = self.job, self.job.config.to_dict()
        del settings["labels"]
        table = job.table
        labels = [[*table.cases], [*table.patients], [target.labels.tolist() for target in table.targets]]
        return {
            "dataset": job.source.dataset,
            "plans": job.source.plans_name,
            "configuration": job.source.configuration,
            "targets": {target.name: list(target.classes) for target in table.targets},
            **settings,
            "has_baselines": self.has_baselines,
            "start": self.start.identity,
            "voxels_sha256": _sha256(voxels_key(job.source.plans, job.source.configuration)),
            "table_sha256": _sha256([labels, np.nan_to_num(table.covariates, nan=1e300).tolist()]),
            "folds_sha256": _sha256([job.folds.training, job.folds.validation]),
        }


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ClassifierMatrix:
    """All trainings of a ClassifierBench, checked."""

    bench: ClassifierBench
    cells: dict[ClassifierPlace, ClassifierCell]

    @property
    def control(self) -> str:
        """Name of the arm that the others are compared with."""
        assert self.bench.control is not None
        return self.bench.control

    @property
    def datasets(self) -> list[str]:
        """Names, in the user's order."""
        return list(dict.fromkeys(place.dataset for place in self.cells))

    @property
    def arms(self) -> list[str]:
        """Names, in the user's order."""
        return [arm.name for arm in self.bench.arms]

    def labels(self, dataset: str) -> list[str]:
        """Numbers of labelled patients as the user wrote them, in ascending order."""
        return sorted(self.bench.labels, key=lambda labels: self.n_patients(dataset, labels))

    def n_patients(self, dataset: str, labels: str) -> list[int]:
        """Number of labelled training patients of every fold, which all seeds and arms share."""
        return self.cells[ClassifierPlace(dataset, labels, 0, self.arms[0])].n_patients()

    def shown(self, result: Mapping[str, Any]) -> str:
        """The figure of a result that is printed when it is there."""
        return ", ".join(f"AUROC {value:.3f} ({target})" for target, value in result["auroc"].items())

    def training(self, place: ClassifierPlace, threads: int = 0) -> ClassifierTraining:
        """The training of a cell, in its folder."""
        cell, bench = self.cells[place], self.bench
        labels = place.labels.replace("%", "pct")
        folders = place.dataset, f"labels_{labels}", f"seed_{place.seed}", place.arm
        folder = bench.output.joinpath("cells", *folders)
        names = tuple(cell.classifiers.values())
        return ClassifierTraining(cell.job, cell.key(), names, folder, bench.device, threads)


def build_classifier_matrix(bench: ClassifierBench) -> ClassifierMatrix:
    """Find and check everything that can be wrong, before anything is trained. Raises MiMError.

    Folds of a dataset that has none yet are made, as by `mim_classify train`.
    """
    cells: dict[ClassifierPlace, ClassifierCell] = {}
    for spec in bench.datasets:
        dataset = dataset_name(spec.dataset)
        if any(place.dataset == dataset for place in cells):
            raise MiMError(f"{dataset} is there twice: give it once")
        jobs: dict[str, Job] = {}
        for arm in bench.arms:
            try:
                job, start = _job_of(bench, spec, arm)
                jobs[arm.name] = job
                _check_same_cases(jobs)
                for seed in range(bench.seeds):
                    for labels in bench.labels:
                        folds = labelled_folds(job.folds, job.table, labels, seed)
                        own = replace(job, config=bench.config(arm, labels, seed), folds=folds)
                        place = ClassifierPlace(dataset, labels, seed, arm.name)
                        cells[place] = ClassifierCell(own, start, arm.name, arm.name == bench.control)
            except MiMError as error:
                raise MiMError(f"arm {arm.name}: {error}") from error
    ordered = sorted(cells, key=lambda place: place.seed)  # stable: every arm and dataset has a result early
    return ClassifierMatrix(bench, {place: cells[place] for place in ordered})


def _job_of(bench: ClassifierBench, spec: ClassifierDataset, arm: ClassifierArm) -> tuple[Job, Start]:
    """The checked training of an arm on a dataset with all labels, and what it starts from."""
    where = DataOptions(spec.dataset, bench.plans, spec.configuration, bench.target)
    job = set_up(where, bench.config(arm, "all", 0), ("the entry plans", "the dataset's configuration"))
    encoder = job.encoder(0)
    if job.config.from_random:
        return job, Start({"architecture": encoder.architecture}, encoder.origin, True)
    return job, Start({"sha256": encoder.sha256}, encoder.origin, bool(encoder.provenance.get("cases")))


def _check_same_cases(jobs: Mapping[str, Job]) -> None:
    """MiMError unless the last job has the cases, patients and labels of the first: they are compared case by case."""
    first, *_, last = [*jobs.values(), *jobs.values()]
    same = (first.table.cases, first.table.patients) == (last.table.cases, last.table.patients)
    pairs = zip(first.table.targets, last.table.targets, strict=True)
    if not same or any(a.classes != b.classes or (a.labels != b.labels).any() for a, b in pairs):
        raise MiMError(
            f"its table of labels has other cases than that of {next(iter(jobs))}: give labels in the settings of the "
            "experiment, not of an arm"
        )
