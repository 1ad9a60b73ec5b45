"""Random crops of preprocessed cases, read chunk-wise through nnU-Net's dataset classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nnunet_mim.config import Size3
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.case_index import CaseInfo
from nnunet_mim.pretraining.sources import Source


@dataclass(frozen=True)
class Case:
    """One case and where it is read from."""

    source: Source
    info: CaseInfo


class CropDataset(Dataset):
    """Crop number i of an endless, reproducible sequence.

    A crop depends on (seed, i) alone, so a resumed run, any number of workers and any number of devices see the same
    one.

    Args:
        cases: to draw from, each with the same probability.
        crop_size: voxels per axis.
        body_fraction: share of crops centred near a body point; the others lie anywhere.
        mirror_axes: spatial axes (0-2) that are mirrored with probability 1/2.
        seed: of the sequence; `stream` keeps training and validation apart.
    """

    def __init__(
        self, cases: list[Case], crop_size: Size3, body_fraction: float = 0.9, mirror_axes: tuple[int, ...] = (),
        seed: int = 0, stream: int = 0,
    ) -> None:  # fmt: skip
        self.cases = cases
        self.crop_size = np.array(crop_size)
        self.body_fraction = body_fraction
        self.mirror_axes = mirror_axes
        self.seed = (seed, stream)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Crop number `index`.

        Returns:
            crop (C, *crop_size) float32, 0 outside the volume; valid (3, 2) int64, the volume's first and one-past-last
            voxel in the crop; number of the case in `cases`. NaN comes through: the step will be skipped and named.

        Raises:
            MiMError: the case cannot be read.
        """
        random, number = self._draw(index)
        case = self.cases[number]
        start = self._start(case.info, random)
        crop, valid = read_crop(case, start, self.crop_size)
        for axis in self.mirror_axes:
            if random.random() < 0.5:
                crop = np.flip(crop, 1 + axis)
                valid[axis] = self.crop_size[axis] - valid[axis, ::-1]
        return torch.from_numpy(np.ascontiguousarray(crop)), torch.from_numpy(valid), number

    def case_of(self, index: int) -> Case:
        """The case that crop number `index` is cut from, without reading it."""
        return self.cases[self._draw(index)[1]]

    def _draw(self, index: int) -> tuple[np.random.Generator, int]:
        random = np.random.default_rng((*self.seed, index))
        return random, int(random.integers(len(self.cases)))

    def _start(self, info: CaseInfo, random: np.random.Generator) -> np.ndarray:
        """First voxel of the crop in the volume; negative where the volume is smaller than the crop."""
        room = np.array(info.shape) - self.crop_size
        low, high = np.minimum(room, 0), np.maximum(room, 0)
        if info.body_points and random.random() < self.body_fraction:
            point = info.body_points[random.integers(len(info.body_points))]
            jitter = random.uniform(-0.25, 0.25, size=3) * self.crop_size
            return np.clip(np.rint(point + jitter - self.crop_size / 2).astype(np.int64), low, high)
        return random.integers(low, high + 1)


def read_crop(case: Case, start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read one box; only the chunks it touches are decompressed.

    Args:
        case: which.
        start: (3,) first voxel, may be negative.
        size: (3,) voxels.

    Returns:
        (C, *size) float32 with 0 outside the volume, and the valid box (3, 2) int64 as in CropDataset.
    """
    low = np.maximum(start, 0)
    high = np.minimum(start + size, case.info.shape)
    valid = np.stack([low - start, high - start], axis=-1).astype(np.int64)
    inside = (slice(None), *(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))
    path = case.source.case_file(case.info.case)
    try:
        data = case.source.dataset_class(str(case.source.folder), [case.info.case]).load_case(case.info.case)[0]
        voxels = np.asarray(data[inside], dtype=np.float32)
    except Exception as error:
        raise MiMError(f"cannot read {path} ({type(error).__name__}: {error}): preprocess this case again") from error
    crop = np.zeros((voxels.shape[0], *size), dtype=np.float32)
    place = (slice(None), *(slice(int(a), int(b)) for a, b in valid))
    crop[place] = voxels
    return crop, valid
