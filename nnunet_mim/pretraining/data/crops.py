"""Random crops of preprocessed cases, read chunk-wise through nnU-Net's dataset classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import blosc2
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import Tensor
from torch.utils.data import Dataset

from nnunet_mim.checkpoint.fingerprint import to_text
from nnunet_mim.config import Size3
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import GONE, Source
from nnunet_mim.pretraining.data.case_index import CaseIndex, CaseInfo

TRIES = 20
"""cases that are drawn for a crop, one after the other, while they cannot be read"""


@dataclass(frozen=True)
class Case:
    """One case and where it is read from."""

    source: Source
    info: CaseInfo


class Cases(Sequence[Case]):
    """Cases of one or several datasets, in arrays that worker processes share; a Case is made when it is asked for.

    Args:
        sources: datasets.
        indexes: of the sources.
        numbers: (N, 2) source, and row of its index, of each case, in the order of the sources; None: all.
    """

    def __init__(
        self, sources: Sequence[Source], indexes: Sequence[CaseIndex], numbers: np.ndarray | None = None
    ) -> None:
        self.sources = tuple(sources)
        self.indexes = tuple(indexes)
        if numbers is None:
            lengths = [len(index) for index in indexes]
            rows = np.concatenate([np.arange(length) for length in lengths])
            numbers = np.stack([np.repeat(np.arange(len(lengths)), lengths), rows], axis=1)
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> Case: ...
    @overload
    def __getitem__(self, number: slice) -> Cases: ...
    def __getitem__(self, number: int | slice) -> Case | Cases:
        if isinstance(number, slice):
            return self.take(np.arange(len(self))[number])
        source, row = self.numbers[number]
        return Case(self.sources[source], self.indexes[source][int(row)])

    def take(self, numbers: np.ndarray) -> Cases:
        """Some of the cases, in ascending order."""
        return Cases(self.sources, self.indexes, self.numbers[np.sort(numbers)])

    def column(self, name: str) -> np.ndarray:
        """One array of the indexes (`names`, `shapes`, …) for all cases."""
        rows = [self.numbers[self.numbers[:, 0] == source, 1] for source in range(len(self.indexes))]
        return np.concatenate([getattr(index, name)[r] for index, r in zip(self.indexes, rows, strict=True)])

    @property
    def counts(self) -> np.ndarray:
        """(sources,) cases of each dataset."""
        return np.bincount(self.numbers[:, 0], minlength=len(self.sources))

    def of_dataset(self, source: int) -> Cases:
        """Cases of one dataset."""
        return self.take(np.flatnonzero(self.numbers[:, 0] == source))

    def records(self) -> list[dict[str, str]]:
        """Each case as in `provenance["cases"]`, with the hash of its image and its fingerprint where there are any."""
        datasets = [self.sources[number].dataset for number in self.numbers[:, 0]]
        names, fingerprints = self.column("names").tolist(), map(to_text, self.column("fingerprints"))
        return [
            {"dataset": dataset, "case": case, "sha256": row.tobytes().hex()}
            | ({"image_sha256": image.tobytes().hex()} if image.any() else {})
            | ({"fingerprint": text} if text else {})
            for dataset, case, row, image, text in zip(
                datasets, names, self.column("hashes"), self.column("images"), fingerprints, strict=True
            )
        ]


class CropDataset(Dataset):
    """An endless sequence of crops. Crop i depends on (seed, i) alone, so a resumed run, any number of workers and any
    number of devices see the same one.

    Args:
        cases: to draw from.
        crop_size: voxels per axis.
        body_fraction: share of crops centred near a body point; the others lie anywhere.
        mirror_axes: spatial axes (0-2) that are mirrored with probability 1/2.
        seed: of the sequence; `stream` keeps training and validation apart.
        temperature: a dataset of n cases is drawn with probability proportional to n^(1/temperature).
    """

    def __init__(
        self, cases: Cases, crop_size: Size3, body_fraction: float = 0.9, mirror_axes: tuple[int, ...] = (),
        seed: int = 0, stream: int = 0, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        self.cases = cases
        self.crop_size = np.array(crop_size)
        self.body_fraction = body_fraction
        self.mirror_axes = mirror_axes
        self.seed = (seed, stream)
        self.ends = np.cumsum(cases.counts)
        self.shares = dataset_shares(cases.counts, temperature)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Crop number `index`: (C, *crop_size) float32, 0 outside the volume; its valid box (3, 2) int64, the volume's
        first and one-past-last voxel in the crop; and (TRIES,) int64, numbers in `cases` of those that could not be
        read and were replaced by another one, -1 for none. NaN comes through: the step will be skipped and named.

        Raises:
            MiMError: no case of TRIES can be read.
        """
        _, random, crop, valid, missed = self._read(index)
        unread = torch.tensor(missed + [-1] * (TRIES - len(missed)))
        for axis in self.mirror_axes:
            if random.random() < 0.5:
                crop = np.flip(crop, 1 + axis)
                valid[axis] = self.crop_size[axis] - valid[axis, ::-1]
        return torch.from_numpy(np.ascontiguousarray(crop)), torch.from_numpy(valid), unread

    def case_of(self, index: int) -> Case:
        """The case that crop number `index` is cut from; reads it to know."""
        return self._read(index)[0]

    def counts(self, indexes: Iterable[int]) -> dict[str, int]:
        """Number of these crops from each dataset, by its name; nothing is read."""
        drawn = np.searchsorted(self.ends, [self._draw(index)[1] for index in indexes], side="right")
        counts = np.bincount(drawn, minlength=len(self.ends))
        return {source.dataset: int(n) for source, n in zip(self.cases.sources, counts, strict=True)}

    def _read(self, index: int) -> tuple[Case, np.random.Generator, np.ndarray, np.ndarray, list[int]]:
        """Case, its random numbers, crop, valid box, and numbers of the cases before it that could not be read."""
        missed: list[int] = []
        while True:
            random, number = self._draw(index, len(missed))
            case = self.cases[number]
            try:
                return case, random, *read_crop(case, self._start(case.info, random), self.crop_size), missed
            except MiMError as error:
                missed.append(number)
                if len(missed) == TRIES:
                    raise MiMError(f"{TRIES} cases in a row cannot be read; {error}") from error

    def _draw(self, index: int, attempt: int = 0) -> tuple[np.random.Generator, int]:
        random = np.random.default_rng((*self.seed, index, attempt) if attempt else (*self.seed, index))
        source = int(random.choice(len(self.shares), p=self.shares)) if len(self.shares) > 1 else 0
        first = self.ends[source - 1] if source else 0
        return random, int(random.integers(first, self.ends[source]))

    def _start(self, info: CaseInfo, random: np.random.Generator) -> np.ndarray:
        """First voxel of the crop in the volume; negative where the volume is smaller than the crop."""
        room = np.array(info.shape) - self.crop_size
        low, high = np.minimum(room, 0), np.maximum(room, 0)
        if info.body_points and random.random() < self.body_fraction:
            point = info.body_points[random.integers(len(info.body_points))]
            jitter = random.uniform(-0.25, 0.25, size=3) * self.crop_size
            return np.clip(np.rint(point + jitter - self.crop_size / 2).astype(np.int64), low, high)
        return random.integers(low, high + 1)


class UnreadCases:
    """Cases that could not be read during a run, among those that crops are cut from."""

    def __init__(self, cases: Cases) -> None:
        self.cases = cases
        self.names: set[str] = set()
        self.failed = 0
        """attempts to read a crop that failed"""

    def add(self, missed: Tensor) -> list[str]:
        """Note what CropDataset returned for a batch, (B, TRIES). Returns names of cases that were not known before."""
        numbers = missed[missed >= 0].tolist()
        self.failed += len(numbers)
        found = [self.cases[number] for number in dict.fromkeys(numbers)]
        new = [name for case in found if (name := f"{case.source.dataset} {case.info.case}") not in self.names]
        self.names.update(new)
        return new


def dataset_shares(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Probability of each dataset, from its number of cases."""
    weights = counts.astype(np.float64) ** (1 / temperature) * (counts > 0)
    return weights / weights.sum()


def read_crop(case: Case, start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the box of `size` (3,) voxels from `start` (3,) on, which may be negative; only the chunks it touches are
    decompressed.

    Returns:
        (C, *size) float32 with 0 outside the volume, and the valid box (3, 2) int64 as in CropDataset.

    Raises:
        MiMError: the case cannot be read, or is not the one any more that was described.
    """
    low = np.maximum(start, 0)
    high = np.minimum(start + size, case.info.shape)
    valid = np.stack([low - start, high - start], axis=-1).astype(np.int64)
    inside = (slice(None), *(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))
    path = case.source.case_file(case.info.case)
    if case.info.stamp not in (GONE, case.source.file_stamp(case.info.case)):
        raise MiMError(
            f"cannot read {path} as it was when the run began: bring the former file back, or "
            "begin anew, without --trust_index"
        )
    try:
        voxels = np.asarray(_open_voxels(case)[inside], dtype=np.float32)
        if voxels.shape[1:] != tuple(high - low):
            raise ValueError(f"it has become smaller than {case.info.shape} voxels (the plans' order of axes)")
    except Exception as error:
        raise MiMError(f"cannot read {path} ({type(error).__name__}: {error}): preprocess this case again") from error
    margins = np.stack([valid[:, 0], size - valid[:, 1]], axis=-1)
    return np.pad(voxels, [(0, 0), *margins.tolist()]), valid


def _open_voxels(case: Case) -> Any:
    """The voxels of a case, not read yet, as nnU-Net's dataset class opens them; but not its segmentation and
    properties, which take longer than reading a small crop.
    """
    name, folder = case.info.case, str(case.source.folder)
    dataset = case.source.dataset_class(folder, [name])
    if isinstance(dataset, nnUNetDatasetBlosc2):
        return blosc2.open(f"{folder}/{name}.b2nd", mode="r", dparams={"nthreads": 1}, **dataset.mmap_kwargs)
    return dataset.load_case(name)[0]
