"""Axial slices of cases, upright and in HU, for the report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnunet_mim.classification.regions import CaseReader
from nnunet_mim.nnunet.orientation import direction_of, orientation_of
from nnunet_mim.nnunet.source import Source
from nnunet_mim.reporting.classifiers import CasePicture


def pictures_of(source: Source, roi: str, titles: Mapping[str, str]) -> list[CasePicture]:
    """The axial slice with the largest part of the mask of some cases, or the middle one, by name and title.

    Raises MiMError for a case that cannot be read.
    """
    reader = CaseReader(source, roi)
    reader.check_masks(list(titles))
    std, mean = source.intensities.scale()
    pictures = []
    for case, title in titles.items():
        read = reader.read(case)
        turn = orientation_of(source.plans.get("transpose_forward", [0, 1, 2]), direction_of(read.properties))
        volume = turn.array(np.asarray(read.voxels[:1])[0])
        mask = np.zeros(volume.shape, bool) if read.mask is None else turn.array(read.mask)
        z = int(mask.sum(axis=(1, 2)).argmax()) if mask.any() else len(volume) // 2
        spacing = turn.triple(read.spacing)
        pictures.append(CasePicture(title, volume[z].astype(np.float32) * std + mean, mask[z], spacing))
    return pictures
