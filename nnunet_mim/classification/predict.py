"""Classifies raw images with the trained folds of a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_paths_fn, get_identifiers_from_splitted_dataset_folder
from torch import Tensor

from nnunet_mim.checkpoint.format import check_weights
from nnunet_mim.classification.baselines import is_baseline
from nnunet_mim.classification.case_network import CaseNetwork, new_classifier
from nnunet_mim.classification.documents import read_settings, read_training
from nnunet_mim.classification.encoders import LoadedEncoder, blocks_of, rebuilt_encoder
from nnunet_mim.classification.features import FeatureExtractor
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.probe import Probe, probabilities
from nnunet_mim.classification.regions import CaseVoxels, resampled_mask
from nnunet_mim.classification.results import (
    NETWORK,
    PROBE,
    RETRAIN,
    SETTINGS,
    WITH_COVARIATES,
    load_weights,
    read_weights,
    trained_arms,
)
from nnunet_mim.classification.saliency import write_map
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_dataset_json
from nnunet_mim.nnunet.image_files import READ_SECONDS, damaged, file_problem
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.files import csv_text, write_atomically
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory
from nnunet_mim.system.progress import ProgressBar
from nnunet_mim.system.untrusted import read_json


class SharedFeatures:
    """Features of an encoder that several folds have in common: those of the last case are kept."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self.last: tuple[CaseVoxels, np.ndarray] | None = None

    def of_case(self, case: CaseVoxels) -> np.ndarray:
        """(F,) float32."""
        if self.last is None or self.last[0] is not case:
            self.last = case, self.extractor.of_case(case)
        return self.last[1]


@dataclass(frozen=True)
class ProbeFold:
    """A fold of a probe."""

    fold: int
    features: SharedFeatures
    probes: Mapping[str, Probe]
    """by target"""

    def probabilities(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, (K,) calibrated probabilities."""
        features = self.features.of_case(case)[None]
        return {
            target: probabilities(probe.logits(features), probe.temperature)[0] for target, probe in self.probes.items()
        }


@dataclass(frozen=True)
class NetworkFold:
    """A fold of a trained network."""

    fold: int
    network: CaseNetwork
    temperatures: Mapping[str, float]
    """by target"""

    def probabilities(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, (K,) calibrated probabilities."""
        logits = self.network.logits(case)
        return {
            target: probabilities(value[None].astype(np.float64), self.temperatures[target])[0]
            for target, value in logits.items()
        }


@dataclass(frozen=True)
class TrainedClassifier:
    """All trained folds of a classifier."""

    folds: tuple[ProbeFold | NetworkFold, ...]
    config: ClassifyConfig
    classes: dict[str, list[str]]
    """by target"""

    def of_case(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, (folds, K) calibrated probabilities."""
        parts = [fold.probabilities(case) for fold in self.folds]
        return {target: np.stack([part[target] for part in parts]) for target in self.classes}

    def saliency(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, a map (X, Y, Z) float32 as of `CaseNetwork.saliency`, the mean over folds.

        Raises MiMError for a probe.
        """
        networks = [fold.network for fold in self.folds if isinstance(fold, NetworkFold)]
        if not networks:
            raise MiMError("--saliency is for trained networks: leave it out, a probe has no gradients")
        maps = [network.saliency(case) for network in networks]
        return {target: np.mean([each[target] for each in maps], axis=0) for target in self.classes}


def find_classifier(folder: Path, name: str = "") -> Path:
    """The folder of a classifier in that of its targets.

    Args:
        folder: of the targets.
        name: of the classifier; empty: the only one.

    Raises:
        MiMError: there is no such classifier, several, or it needs more than images.
    """
    found = trained_arms(folder)
    usable = [arm for arm in found if not is_baseline(arm) and not arm.endswith(WITH_COVARIATES)]
    if not usable:
        raise MiMError(f"nothing is trained in {folder}: run mim_classify train with the same -d, -p, -c and --target")
    if name and name not in usable:
        raise MiMError(f"--classifier {name} is not in {folder}: choose one of {', '.join(usable)}")
    if not name and len(usable) > 1:
        raise MiMError(f"{folder} holds several classifiers: choose with --classifier ({', '.join(usable)})")
    return folder / (name or usable[0])


def load_classifier(folder: Path, folds: Sequence[str], device: str) -> TrainedClassifier:
    """Load the trained folds of a classifier.

    Args:
        folder: of the classifier.
        folds: numbers, or `all` for those that are there.
        device: of the encoder.

    Raises:
        MiMError: a fold is missing or damaged.
    """
    if list(folds) == ["all"]:
        folds = sorted(path.name.removeprefix("fold_") for path in folder.glob("fold_*"))
    if not folds:
        raise MiMError(f"{folder} holds no fold of a classifier: give another folder, or {RETRAIN}")
    shared: dict[str, SharedFeatures] = {}
    loaded: list[ProbeFold | NetworkFold] = []
    settings: dict[str, Any] = {}
    for fold in folds:
        path = folder / f"fold_{fold}"
        try:
            settings = read_settings(path)
            config = ClassifyConfig.from_dict(settings["config"])
            if config.mode == "probe":
                loaded.append(_probe_fold(path, settings, config, device, shared))
            else:
                loaded.append(_network_fold(path, settings, config, device))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, MiMError) and str(folder) in str(error):
                raise
            reason = " ".join(str(error).split())[:200]
            others = "predict with others (mim_classify predict with -f)"
            raise MiMError(f"cannot read {path} ({reason}): train this fold again, or {others}") from error
    return TrainedClassifier(tuple(loaded), config, settings["targets"])


def _probe_fold(
    path: Path, settings: Mapping[str, Any], config: ClassifyConfig, device: str, shared: dict[str, SharedFeatures]
) -> ProbeFold:
    stored = read_json(path / PROBE, RETRAIN)
    sha256 = settings["encoder"]["sha256"]
    if sha256 not in shared:
        weights = read_weights(path.parent, sha256)
        encoder = _encoder(path, settings["encoder"], weights)
        encoder.module.load_state_dict(weights)
        shared[sha256] = SharedFeatures(FeatureExtractor(encoder, config, device))
    probes = {target: Probe.from_dict(stored[target]) for target in settings["targets"]}
    n_features = 2 * sum(shared[sha256].extractor.encoder.dims) * (2 if config.roi else 1)
    for target, classes in settings["targets"].items():
        if probes[target].coefficients.shape != (n_features, len(classes)):
            raise ValueError(f"{PROBE} is not of this encoder and the classes of {target}")
    return ProbeFold(_number(path), shared[sha256], probes)


def _network_fold(path: Path, settings: Mapping[str, Any], config: ClassifyConfig, device: str) -> NetworkFold:
    training = read_training(path)
    weights = load_weights(path / NETWORK, training["sha256"])
    encoder = _encoder(path, settings["encoder"], weights, settings["targets"])
    model = new_classifier(encoder, settings["targets"])
    model.load_state_dict(weights)
    network = CaseNetwork(model.to(device).eval(), config, encoder.cell, torch.device(device))
    temperatures = {target: float(training["temperatures"][target]) for target in settings["targets"]}
    return NetworkFold(_number(path), network, temperatures)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("fold_"))


def _encoder(
    path: Path, stored: Mapping[str, Any], weights: Mapping[str, Tensor], targets: Mapping[str, list[str]] | None = None
) -> LoadedEncoder:
    """The encoder that settings.json in the folder of a fold describes, its weights still to be loaded.

    Args:
        path: of the folder.
        stored: `encoder` of the settings.
        weights: of the encoder, or of the whole classifier for these targets: no larger network is made.
        targets: classes by target; None: the weights are those of the encoder alone.
    """
    architecture = stored["architecture"]
    if blocks_of(architecture) > len(weights):
        raise MiMError(f"{path / SETTINGS} asks for more blocks than there are tensors: {RETRAIN}")

    def made() -> LoadedEncoder:
        return LoadedEncoder(rebuilt_encoder(architecture).eval(), str(stored["origin"]), architecture)

    with torch.device("meta"):
        declared = made()
        network = declared.module if targets is None else new_classifier(declared, targets)
    check_weights(path, weights, network.state_dict(), SETTINGS, RETRAIN)
    return made()


def predict_folder(
    classifier: TrainedClassifier, source: Source, images: Path, masks: Path | None, output: Path,
    saliency: Path | None = None,
) -> list[str]:  # fmt: skip
    """Classify all images of a folder and write a table. Returns lines to print.

    The table has the columns case, and per target TARGET (the most probable class), TARGET=CLASS (mean over folds) and
    TARGET=CLASS:fold_X.

    Args:
        classifier: trained folds.
        source: dataset and plans that it was trained with.
        images: folder, files named as in imagesTr.
        masks: folder, a file for each case named as in labelsTr; only for a classifier that looks at a region.
        output: CSV file.
        saliency: folder for CASE_TARGET.nii.gz, maps of what the network rests on in the geometry of the images; None:
            none.

    Raises:
        MiMError: a file is missing or cannot be read; no table is written then.
    """
    if classifier.config.roi and masks is None:
        raise MiMError("this classifier looks at a region: add --roi MASKS, such as predictions of nnUNetv2_predict")
    if masks is not None and not classifier.config.roi:
        raise MiMError("this classifier looks at whole cases: leave out --roi")
    rows, whole = [_heading(classifier)], []
    for case in preprocessed_cases(source, images, masks):
        if masks is not None and case.mask is None:
            whole.append(case.name)
        row: list[Any] = [case.name]
        for target, by_fold in classifier.of_case(case).items():
            mean = by_fold.mean(axis=0)
            row += [classifier.classes[target][int(mean.argmax())], *[f"{p:.9g}" for p in [*mean, *by_fold.T.ravel()]]]
        rows.append(row)
        if saliency is not None:
            for target, values in classifier.saliency(case).items():
                write_map(values, case.properties, source, saliency / f"{case.name}_{target}.nii.gz")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, csv_text(rows).encode())
    notes = [f"note: {len(whole)} masks are empty, {whole[0]} first: the whole case was looked at"] if whole else []
    return [*notes, f"wrote {output}"]


def _heading(classifier: TrainedClassifier) -> list[str]:
    heading = ["case"]
    for target, classes in classifier.classes.items():
        heading += [target, *[f"{target}={name}" for name in classes]]
        heading += [f"{target}={name}:fold_{fold.fold}" for name in classes for fold in classifier.folds]
    return heading


def preprocessed_cases(source: Source, images: Path, masks: Path | None) -> Iterator[CaseVoxels]:
    """Raw cases of a folder, prepared by nnU-Net's own preprocessing. Raises MiMError for a file that is no good."""
    dataset_json = read_dataset_json(source.folder.parent / "dataset.json")
    ending = dataset_json["file_ending"]
    if not images.is_dir():
        raise MiMError(f"-i {images} is no folder: give a folder of images named as in imagesTr")
    names = get_identifiers_from_splitted_dataset_folder(str(images), ending)
    if not len(names):
        raise MiMError(f"-i {images} holds no image named CASE_0000{ending}: name them as in imagesTr")
    if masks is not None and (missing := [name for name in names if not (masks / f"{name}{ending}").is_file()]):
        raise MiMError(f"{masks} has no mask {missing[0]}{ending}: give one for every image in {images}")
    files = sorted(path.name for path in images.iterdir() if path.name.endswith(ending))
    items = []
    for name in map(str, names):
        paths = create_paths_fn(str(images), files, ending, name)
        if len(paths) != source.in_channels:
            raise MiMError(f"{images}: {name} has {len(paths)} channels, {source.dataset} has {source.in_channels}")
        mask = None if masks is None else masks / f"{name}{ending}"
        items.append((name, paths, mask, source, dataset_json))
    limits = Limits(READ_SECONDS, share_of_memory(physical_memory(), 1))
    with closing(guarded_map(_preprocessed_case, items, 1, limits)) as outcomes:
        for index, outcome in ProgressBar(outcomes, desc="classifying", total=len(items), unit="case"):
            if isinstance(outcome, Failure):
                paths = items[index][1]
                raise MiMError(f"cannot read {paths[0]} ({outcome.reason}): correct the file, or remove it")
            yield outcome


def _preprocessed_case(
    item: tuple[str, Sequence[str], Path | None, Source, dict[str, Any]]
) -> CaseVoxels | Failure:
    """A case, prepared from its files, its mask, the dataset and dataset.json. May crash, hang or need much memory."""
    name, paths, mask_file, source, dataset_json = item
    for file in (*paths, *(() if mask_file is None else (str(mask_file),))):
        if problem := file_problem(file) or damaged(Path(file)):
            return Failure(f"{file}: {problem}")
    plans = PlansManager(source.plans)
    configuration = plans.get_configuration(source.configuration)
    preprocessor = configuration.preprocessor_class(verbose=False)
    voxels, _, properties = preprocessor.run_case(list(paths), None, plans, configuration, dataset_json)
    mask = None
    if mask_file is not None:
        mask = resampled_mask(mask_file, source, voxels.shape[1:], properties)
    return CaseVoxels(name, voxels, mask, source.spacing, properties)
