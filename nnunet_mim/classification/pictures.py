"""Axial slices of cases, upright and in HU, for the report, with or without what a network rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnunet_mim.classification.predict import load_classifier
from nnunet_mim.classification.regions import CaseReader, CaseVoxels
from nnunet_mim.nnunet.orientation import direction_of, orientation_of
from nnunet_mim.nnunet.source import Source
from nnunet_mim.reporting.classifiers import CasePicture


def pictures_of(source: Source, roi: str, titles: Mapping[str, str]) -> list[CasePicture]:
    """The axial slice with the largest part of the mask of some cases, or the middle one, by name and title.

    Raises MiMError for a case that cannot be read.
    """
    reader = CaseReader(source, roi)
    reader.check_masks(list(titles))
    return [_picture(reader.read(case), source, title) for case, title in titles.items()]


def saliency_pictures(
    source: Source, arm: Path, target: str, titles: Mapping[str, str], folds: Mapping[str, int], device: str
) -> list[CasePicture]:
    """The same slices with maps of what the network rests on that has not seen the patient.

    Args:
        source: preprocessed dataset.
        arm: results folder of a trained network.
        target: that the maps are about.
        titles: by case.
        folds: whose network is asked, by case.
        device: of the networks.

    Raises:
        MiMError: a case or a network cannot be read.
    """
    networks = {fold: load_classifier(arm, [str(fold)], device) for fold in sorted({folds[case] for case in titles})}
    reader = CaseReader(source, next(iter(networks.values())).config.roi)
    reader.check_masks(list(titles))
    pictures = []
    for case, title in titles.items():
        read = reader.read(case)
        pictures.append(_picture(read, source, title, networks[folds[case]].saliency(read)[target]))
    return pictures


def _picture(case: CaseVoxels, source: Source, title: str, saliency: np.ndarray | None = None) -> CasePicture:
    """A slice of a case, and the same one of a map (X, Y, Z), as a share of the largest value in the case."""
    std, mean = source.intensities.scale()
    turn = orientation_of(source.plans.get("transpose_forward", [0, 1, 2]), direction_of(case.properties))
    volume = turn.array(np.asarray(case.voxels[:1])[0])
    mask = np.zeros(volume.shape, bool) if case.mask is None else turn.array(case.mask)
    z = int(mask.sum(axis=(1, 2)).argmax()) if mask.any() else len(volume) // 2
    image = volume[z].astype(np.float32) * std + mean
    share = None
    if saliency is not None:
        share = turn.array(saliency)[z] / max(float(np.abs(saliency).max()), 1e-12)
    return CasePicture(title, image, mask[z], turn.triple(case.spacing), share)
