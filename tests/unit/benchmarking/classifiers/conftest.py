"""An experiment on made-up cases, whose trainings are scores that get better with the labels and the pretraining."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_mim.benchmarking import training as kept_training
from nnunet_mim.benchmarking.classifiers import matrix as matrix_module
from nnunet_mim.benchmarking.classifiers.bench_file import classifier_bench_of
from nnunet_mim.classification import cli as classify_cli
from nnunet_mim.classification.baselines import BASELINES
from nnunet_mim.classification.folds import Folds, grouped_split
from nnunet_mim.classification.job import Job
from nnunet_mim.classification.labels import LabelTable, Target
from nnunet_mim.classification.options import ClassifyConfig, DataOptions
from nnunet_mim.classification.results import WITH_COVARIATES, Predictions, write_fold
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.cli import given_flags

N_CASES = 60
LABELS = np.arange(N_CASES) % 3 == 0
PATIENTS = tuple(f"p{row // 2:02d}" for row in range(N_CASES))
CASES = tuple(f"case_{row:02d}" for row in range(N_CASES))
N_FOLDS = 3
BENCH = {
    "target": "ill", "datasets": [7], "labels": ["50%", "all"], "seeds": 2, "device": "cpu",
    "arms": {
        "probe_mim": {"mode": "probe", "checkpoint": "tiny-ct"},
        "probe_random": {"mode": "probe", "checkpoint": "none"},
    },
}  # fmt: skip


def folds_of():
    splits = grouped_split(LABELS.astype(int), PATIENTS, N_FOLDS, seed=0)
    training, validation = zip(*((tuple(map(int, t)), tuple(map(int, v))) for t, v in splits), strict=True)
    return Folds(training, validation, Path("splits_classification.json"))


class Trainer:
    """Takes the place of the command: parses its command line, and writes predictions that depend on it."""

    def __init__(self):
        self.commands, self.configs, self.seen = [], [], []
        self.exit_codes = {}  # by arm, of trainings that leave nothing

    def __call__(self, command, log, environment, stop):
        self.commands.append(list(map(str, command)))
        options = classify_cli._parser().parse_args(self.commands[-1][5:])  # after python -m child PARENT MODULE
        where = DataOptions(**given_flags(options, DataOptions))
        config = ClassifyConfig(**given_flags(options, ClassifyConfig))
        self.configs.append(config)
        log.write_text("out of memory\n")
        if config.arm in self.exit_codes:
            return self.exit_codes[config.arm]
        run = f"mim_classify__{where.plans}__{where.configuration}"
        folder = Path(environment["nnUNet_results"], where.dataset, run, "+".join(where.target))
        signal = 0.3 * ((1 if config.checkpoint == "none" else 2) + (config.labelled == "all"))
        scores = {config.arm: signal}
        scores |= {config.arm + WITH_COVARIATES: signal + 1} if config.covariate else {}
        scores |= {config.baseline_arm(name): 0.1 for name in self._baselines(config)} if options.baselines else {}
        for number, (name, own) in enumerate(scores.items()):
            self._write(folder / name, where.target, own, 10 * config.seed + number)
        return 0

    @staticmethod
    def _baselines(config):
        return BASELINES if config.covariate else BASELINES[:-1]

    def _write(self, folder, targets, signal, seed):
        noise = np.random.default_rng(seed).normal(0, 1, N_CASES)
        positive = 1 / (1 + np.exp(-noise - signal * (2 * LABELS - 1)))
        for fold, rows in enumerate(folds_of().validation):
            rows = np.array(rows)
            p = np.stack([1 - positive, positive], axis=1)[rows]
            cases, patients = (tuple(names[row] for row in rows) for names in (CASES, PATIENTS))
            parts = [
                Predictions(cases, patients, np.full(len(rows), fold),
                            Target(name, ("no", "yes"), LABELS[rows].astype(int)), p, p)
                for name in targets
            ]  # fmt: skip
            encoder = {"seen_validation_cases": [case for case in cases if case in self.seen]}
            settings = {"config": {}, "targets": {name: ["no", "yes"] for name in targets}, "encoder": encoder}
            write_fold(folder / f"fold_{fold}", parts, settings)


@pytest.fixture
def trainer(monkeypatch):
    made = Trainer()
    monkeypatch.setattr(kept_training, "run_command", made)
    return made


@pytest.fixture
def dataset(tmp_path, monkeypatch, plans):
    """nnU-Net's folders, in which dataset 7 seems to be preprocessed; its encoders are known by the checkpoint."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))

    def set_up(where, config, settings):
        name = f"Dataset{int(where.dataset):03d}_Toy"
        source = Source.__new__(Source)
        values = {"dataset": name, "plans_name": where.plans, "configuration": where.configuration, "plans": plans}
        for key, value in values.items():
            object.__setattr__(source, key, value)
        targets = tuple(Target(target, ("no", "yes"), LABELS.astype(int)) for target in where.target)
        table = LabelTable(CASES, PATIENTS, targets, np.zeros((N_CASES, len(config.covariate))))
        run = f"mim_classify__{where.plans}__{where.configuration}"
        folder = Path(os.environ["nnUNet_results"], name, run, "+".join(where.target))
        return Job(source, config, table, folds_of(), None, folder)

    def encoder(job, fold):
        origin = "random weights" if job.config.from_random else job.config.checkpoint
        provenance = {} if "unknown" in origin else {"cases": [1]}
        return SimpleNamespace(sha256=f"hash of {origin}", architecture={"n": 1}, origin=origin, provenance=provenance)

    monkeypatch.setattr(matrix_module, "set_up", set_up)
    monkeypatch.setattr(Job, "encoder", encoder)
    monkeypatch.setattr(matrix_module, "dataset_name", lambda given: f"Dataset{int(given):03d}_Toy")


@pytest.fixture
def bench_of(tmp_path):
    """bench_of(**changes): the experiment BENCH with other entries."""
    return lambda **changes: classifier_bench_of({**BENCH, **changes}, tmp_path)
