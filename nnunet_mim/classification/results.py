"""Where classifiers and their predictions lie, and the table of predictions.

nnUNet_results/DatasetXXX_Name/mim_classify__PLANS__CONFIGURATION/TARGETS/ARM/fold_K/
  predictions.csv   of the fold's validation cases
  settings.json     everything that was used
  probe.json        of a probe
  model.safetensors, training.json (temperatures, history, cases of the inner split) of a network
and beside the folds of a probe encoder_HASH.safetensors, the frozen encoder
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nnunet_mim.checkpoint.torch_file import check_tensors
from nnunet_mim.classification.labels import Target
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import required_folder
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.untrusted import MAX_TABLE, limited, table_rows

PREDICTIONS = "predictions.csv"
SETTINGS = "settings.json"
RETRAIN = "train this fold again"
"""what to do about a file of a fold that cannot be read"""
PROBE = "probe.json"
NETWORK = "model.safetensors"
TRAINING = "training.json"
WITH_COVARIATES = "+covariates"
"""ending of the results folder of a classifier to whose output the covariates are added"""


def targets_folder(source: Source, targets: Sequence[str]) -> Path:
    """The folder of all classifiers of some targets."""
    run = f"mim_classify__{source.plans_name}__{source.configuration}"
    name = re.sub(r"[^\w .+-]", "_", "+".join(targets))
    return Path(required_folder("nnUNet_results"), source.dataset, run, name)


@dataclass(frozen=True)
class Predictions:
    """What a classifier says about some cases, of one target."""

    cases: tuple[str, ...]
    patients: tuple[str, ...]
    folds: np.ndarray
    """(N,) int64: whose classifier it is"""
    target: Target
    """its labels are those of these cases"""
    raw: np.ndarray
    """(N, K) probabilities as the classifier gives them"""
    calibrated: np.ndarray
    """(N, K) probabilities after calibration"""

    @property
    def positive(self) -> np.ndarray:
        """(N,) calibrated probability of the last class."""
        return self.calibrated[:, -1]


def predictions_csv(predictions: Sequence[Predictions]) -> bytes:
    """A table with the columns case, patient, fold, and per target its label, TARGET=CLASS and TARGET=CLASS:raw.

    Args:
        predictions: of several targets for the same cases.
    """
    first, heading = predictions[0], ["case", "patient", "fold"]
    for part in predictions:
        names = [f"{part.target.name}={name}" for name in part.target.classes]
        heading += [part.target.name, *names, *[f"{name}:raw" for name in names]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    for row, (case, patient) in enumerate(zip(first.cases, first.patients, strict=True)):
        cells: list[Any] = [case, patient, int(first.folds[row])]
        for part in predictions:
            label = int(part.target.labels[row])
            values = [*part.calibrated[row], *part.raw[row]]
            cells += [part.target.classes[label] if label >= 0 else "", *[f"{value:.9g}" for value in values]]
        writer.writerow(cells)
    return text.getvalue().encode()


def read_predictions(path: Path) -> list[Predictions]:
    """The inverse of `predictions_csv`, a part per target. Raises MiMError for a file that is not such a table."""
    try:
        heading, *rows = table_rows(limited(path, MAX_TABLE).decode())
        if not rows or any(len(row) != len(heading) for row in rows):
            raise ValueError("it has no rows, or one that is not as long as the heading")
        predictions, start = [], 3
        while start < len(heading):  # TARGET, K times TARGET=CLASS, K times TARGET=CLASS:raw
            n = heading.index(f"{heading[start + 1]}:raw") - start - 1
            predictions.append(_part(heading, rows, start, n))
            start += 1 + 2 * n
    except (OSError, KeyError, OverflowError, ValueError, IndexError) as error:
        raise MiMError(f"cannot read {path} ({error}): {RETRAIN}") from error
    return predictions


def _part(heading: Sequence[str], rows: Sequence[Sequence[str]], start: int, n: int) -> Predictions:
    """The target whose column is number `start`, with n classes."""
    target = heading[start]
    classes = tuple(name.removeprefix(f"{target}=") for name in heading[start + 1 : start + 1 + n])
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    labels = np.array([number[row[start]] for row in rows], np.int64)
    values = np.array([[float(cell) for cell in row[start + 1 : start + 1 + 2 * n]] for row in rows])
    if not np.isfinite(values).all() or (values[:, :n] < 0).any() or (values[:, :n] > 1).any():
        raise ValueError(f"a probability of {target} is not between 0 and 1, or NaN")
    cases, patients, folds = zip(*(row[:3] for row in rows), strict=True)
    return Predictions(
        cases, patients, np.array(folds, np.int64), Target(target, classes, labels), values[:, n:], values[:, :n]
    )


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of one target for all cases of several folds, sorted by case."""
    cases = [case for part in parts for case in part.cases]
    order = sorted(range(len(cases)), key=cases.__getitem__)
    patients = [patient for part in parts for patient in part.patients]
    folds, labels, raw, calibrated = (
        np.concatenate(values)[order]
        for values in zip(*((p.folds, p.target.labels, p.raw, p.calibrated) for p in parts), strict=True)
    )
    target = Target(parts[0].target.name, parts[0].target.classes, labels)
    return Predictions(
        tuple(cases[i] for i in order), tuple(patients[i] for i in order), folds, target, raw, calibrated
    )


def write_fold(folder: Path, predictions: Sequence[Predictions], settings: Mapping[str, Any]) -> None:
    """Write what every mode leaves of a fold: the predictions of its validation cases, and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)
    write_atomically(folder / PREDICTIONS, predictions_csv(predictions))


def write_json(path: Path, content: Any) -> None:
    """Write plain values so that the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode())


def write_weights(folder: Path, weights: Mapping[str, Tensor], sha256: str) -> None:
    """Write the weights of an encoder into the folder of a classifier, once for all folds that start from them."""
    path = _weights_file(folder, sha256)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(path, weights)


def read_weights(folder: Path, sha256: str) -> dict[str, Tensor]:
    """The weights of `write_weights`. Raises OSError, or ValueError for a file that is damaged or another one."""
    return load_weights(_weights_file(folder, sha256), sha256, SETTINGS)


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write weights as safetensors. Returns their hash, see `weights_sha256`."""
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    write_atomically(path, save(whole, metadata={"format": "pt"}))
    return weights_sha256(whole)


def load_weights(path: Path, sha256: str, source: str = TRAINING) -> dict[str, Tensor]:
    """The weights of `save_weights`, whose hash stands in a file named `source`.

    Raises OSError, ValueError for a file that is damaged or another one, MiMError for what cannot be weights.
    """
    try:
        weights = load(limited(path, path.stat().st_size))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    check_tensors(path, weights)
    if weights_sha256(weights) != sha256:
        raise ValueError(f"{path.name} holds other weights than {source} says")
    return weights


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash of the names and values of a state dict, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights_file(folder: Path, sha256: str) -> Path:
    return folder / f"encoder_{sha256[:12]}.safetensors"


def trained_arms(folder: Path) -> dict[str, list[Path]]:
    """Finished folds of every arm in the folder of some targets, by name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*/fold_*/{PREDICTIONS}")):
        found.setdefault(path.parent.parent.name, []).append(path.parent)
    return found
