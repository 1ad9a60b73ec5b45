"""Trains a probe and the baselines in every fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from nnunet_mim.classification.baselines import baseline_features
from nnunet_mim.classification.encoders import LoadedEncoder
from nnunet_mim.classification.features import FeatureExtractor
from nnunet_mim.classification.job import Job
from nnunet_mim.classification.labels import Target
from nnunet_mim.classification.probe import FittedProbe, fit_probe, probabilities
from nnunet_mim.classification.results import PROBE, WITH_COVARIATES, Predictions, write_fold, write_json, write_weights


def train_probe(job: Job, folds: Sequence[int], device: str) -> None:
    """Train a probe in these folds, and write it with its predictions. Raises MiMError without a usable encoder."""
    features: dict[str, np.ndarray] = {}
    for fold in folds:
        encoder = job.encoder(fold)
        if encoder.sha256 not in features:
            print("\n".join([f"encoder: {encoder.origin}", *encoder.notes]))
            extractor = FeatureExtractor(encoder, job.config, device)
            features[encoder.sha256] = extractor.of_cases(job.reader, job.table.cases)
            write_weights(job.folder / job.config.arm, encoder.module.state_dict(), encoder.sha256)
        fitted = fit_fold(job, job.config.arm, fold, features[encoder.sha256], encoder)
        if job.config.covariate:
            add_covariates(job, job.config.arm, fold, all_outputs(job, fold, fitted, features[encoder.sha256]))


def train_baselines(job: Job, folds: Sequence[int]) -> None:
    """Train all baselines in these folds, and write them with their predictions."""
    for name, inputs in baseline_features(job).items():
        for fold in folds:
            fit_fold(job, job.config.baseline_arm(name), fold, inputs)


def fit_fold(
    job: Job, arm: str, fold: int, features: np.ndarray, encoder: LoadedEncoder | None = None
) -> dict[str, FittedProbe]:
    """Fit a probe per target on the training cases of a fold, and write it with its predictions.

    Args:
        job: cases and folds.
        arm: name of the results folder.
        fold: its validation cases are predicted.
        features: (N, F) of all cases of the table.
        encoder: where the features come from, if from an encoder.

    Returns:
        The probes by target.
    """
    fitted = {}
    for target in job.table.targets:
        rows = training_rows(job, target, fold)
        patients = [job.table.patients[row] for row in rows]
        fitted[target.name] = fit_probe(
            features[rows], target.labels[rows], patients, len(target.classes), job.config.seed
        )
    val = list(job.folds.validation[fold])
    logits = {name: each.probe.logits(features[val]) for name, each in fitted.items()}
    temperatures = {name: each.probe.temperature for name, each in fitted.items()}
    write_json(job.fold_folder(arm, fold) / PROBE, {name: each.probe.to_dict() for name, each in fitted.items()})
    write_predictions(job, arm, fold, logits, temperatures, encoder)
    return fitted


def add_covariates(job: Job, arm: str, fold: int, outputs: Mapping[str, np.ndarray]) -> None:
    """Add the covariates to what a trained fold says, by a logistic regression on both.

    Args:
        job: with covariates.
        arm: whose fold it is; the result is another arm, with WITH_COVARIATES at the end of its name.
        fold: its validation cases are predicted.
        outputs: by target, logits (N, K) of all cases of the table: of validation cases by the fold's classifier, of
            training cases by classifiers that have not seen them. Training cases with NaN are left out.
    """
    fitted, logits = {}, {}
    val = list(job.folds.validation[fold])
    for target in job.table.targets:
        output = outputs[target.name]
        inputs = np.concatenate([output[:, 1:] - output[:, :1], job.table.covariates], axis=1)
        rows = training_rows(job, target, fold)
        rows = rows[np.isfinite(output[rows]).all(axis=1)]
        patients = [job.table.patients[row] for row in rows]
        fitted[target.name] = fit_probe(
            inputs[rows], target.labels[rows], patients, len(target.classes), job.config.seed
        ).probe
        logits[target.name] = fitted[target.name].logits(inputs[val])
    name = arm + WITH_COVARIATES
    write_json(job.fold_folder(name, fold) / PROBE, {target: probe.to_dict() for target, probe in fitted.items()})
    write_predictions(job, name, fold, logits, {target: probe.temperature for target, probe in fitted.items()})


def write_predictions(
    job: Job, arm: str, fold: int, logits: Mapping[str, np.ndarray], temperatures: Mapping[str, float],
    encoder: LoadedEncoder | None = None,
) -> None:  # fmt: skip
    """Write predictions.csv and settings.json of a fold.

    Args:
        job: cases and folds.
        arm: name of the results folder.
        fold: whose validation cases were predicted.
        logits: by target, (n_val, K).
        temperatures: by target, fitted on training cases.
        encoder: where a network or features came from.
    """
    val = list(job.folds.validation[fold])
    cases, patients = (tuple(names[row] for row in val) for names in (job.table.cases, job.table.patients))
    predictions = [
        Predictions(
            cases, patients, np.full(len(val), fold), replace(target, labels=target.labels[val]),
            probabilities(logits[target.name]), probabilities(logits[target.name], temperatures[target.name]),
        )
        for target in job.table.targets
    ]  # fmt: skip
    write_fold(job.fold_folder(arm, fold), predictions, job.settings(encoder, fold))


def all_outputs(job: Job, fold: int, fitted: Mapping[str, FittedProbe], features: np.ndarray) -> dict[str, np.ndarray]:
    """By target, logits (N, K) of all cases as `add_covariates` wants them."""
    outputs = {}
    for target in job.table.targets:
        each = fitted[target.name]
        outputs[target.name] = each.probe.logits(features)
        outputs[target.name][list(job.folds.training[fold])] = np.nan
        outputs[target.name][training_rows(job, target, fold)] = each.held_out_logits
    return outputs


def training_rows(job: Job, target: Target, fold: int) -> np.ndarray:
    """Training rows of a fold whose class is known, ascending."""
    rows = np.array(job.folds.training[fold], np.int64)
    return rows[target.known[rows]]
