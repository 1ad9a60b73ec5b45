"""Augmented windows of training cases: a random shift, then nnU-Net's own transforms."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.regions import CaseReader, CaseVoxels, Region, cut, window_starts
from nnunet_mim.config import Size3
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.distributed.ranks import Ranks
from nnunet_mim.system.processes import leave_stopping_to_parent


@dataclass(frozen=True)
class Batch:
    """Windows of some cases."""

    images: Tensor
    """(M, C, X, Y, Z) float32, case by case"""
    places: Tensor
    """(M, 2, X, Y, Z) bool, as `Region.places`"""
    n_windows: list[int]
    """of each case"""
    labels: Tensor
    """(N, targets) int64, -1 where a class is not known"""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        images, places, labels = (x.to(device, non_blocking=True) for x in (self.images, self.places, self.labels))
        return Batch(images, places, self.n_windows, labels)

    def pin_memory(self) -> Batch:
        """The same in memory that is copied to a GPU faster; PyTorch's DataLoader calls it."""
        return Batch(self.images.pin_memory(), self.places.pin_memory(), self.n_windows, self.labels.pin_memory())


def joined(items: Sequence[Batch]) -> Batch:
    """One batch of several."""
    return Batch(
        torch.cat([item.images for item in items]), torch.cat([item.places for item in items]),
        [n for item in items for n in item.n_windows], torch.cat([item.labels for item in items]),
    )  # fmt: skip


class Augmentation:
    """nnU-Net's training transforms for a window, which decides rotations and the size before them.

    Args:
        window: voxels per axis.
        mirror_axes: array axes.
    """

    def __init__(self, window: Size3, mirror_axes: tuple[int, ...]) -> None:
        asked = SimpleNamespace(
            configuration_manager=SimpleNamespace(patch_size=list(window)), print_to_log_file=lambda *_: None
        )
        choices = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(asked)  # type: ignore[arg-type]
        rotation, dummy_2d, size_before, _ = choices
        self.size_before = tuple(max(int(a), b) for a, b in zip(size_before, window, strict=True))
        """voxels per axis that have to be read, so that a rotated window lies in them"""
        self.transforms: Any = nnUNetTrainer.get_training_transforms(window, rotation, None, mirror_axes, dummy_2d)
        for each in self.transforms.transforms:
            if isinstance(blur := getattr(each, "transform", None), GaussianBlurTransform):
                blur.benchmark = False  # it chooses the faster of two ways by timing: a resumed run would differ

    def __call__(self, region: Region) -> Region:
        """A transformed window of a larger one, with NumPy's and PyTorch's global random numbers."""
        places = np.stack([region.counts, region.mask]).astype(np.int16)
        done = self.transforms(image=torch.from_numpy(region.voxels), segmentation=torch.from_numpy(places))
        counts, mask = (done["segmentation"] > 0).numpy()
        counts = counts if counts.any() else np.ones_like(counts)
        return Region(done["image"].numpy(), counts, mask)


class TrainingCrops(Dataset):
    """All samples of a training by number, which depend on the seed and on the number alone.

    A sample is a case: one window where its box fits in, else several at random.

    Args:
        reader: of the cases.
        cases: names.
        labels: (N, targets) int64.
        chances: (N,) of being drawn, in proportion; None: every case once, in an order of its own, then all again.
        config: window, margin, seed, maximum number of windows.
        cell: voxels per axis that the window is a multiple of.
        augmentation: for this window.
    """

    def __init__(
        self, reader: CaseReader, cases: Sequence[str], labels: np.ndarray, chances: np.ndarray | None,
        config: ClassifyConfig, cell: Size3, augmentation: Augmentation,
    ) -> None:  # fmt: skip
        self.reader, self.cases, self.labels = reader, cases, torch.from_numpy(labels)
        self.chances = None if chances is None else chances / chances.sum()
        self.config, self.cell, self.augmentation = config, cell, augmentation

    def __len__(self) -> int:
        return len(self.cases)

    def case_number(self, number: int) -> int:
        """The case of a sample."""
        turn, position = divmod(number, len(self.cases))
        rng = np.random.default_rng([self.config.seed, 1, turn])
        if self.chances is None:
            return int(rng.permutation(len(self.cases))[position])
        return int(rng.choice(len(self.cases), size=len(self.cases), p=self.chances)[position])

    def __getitem__(self, number: int) -> Batch:
        i = self.case_number(number)
        case = self.reader.read(self.cases[i])
        rng = np.random.default_rng([self.config.seed, 2, number])
        with _random_numbers(int(rng.integers(2**32))):
            regions = [self.augmentation(region) for region in self._windows(case, rng)]
        images = np.stack([region.network_input(self.config.mask_channel) for region in regions])
        places = np.stack([region.places for region in regions])
        return Batch(torch.from_numpy(images), torch.from_numpy(places), [len(regions)], self.labels[i : i + 1])

    def _windows(self, case: CaseVoxels, rng: np.random.Generator) -> Iterator[Region]:
        """Windows of the size before augmentation."""
        low, high = case.box(self.config.margin)
        axes = list(zip(low, high, case.shape, self.config.window, self.cell, strict=True))
        n = np.prod([len(window_starts(*axis, one_size=True)[0]) for axis in axes])
        for _ in range(min(int(n), self.config.case_windows)):
            starts = [random_start(rng, *axis) for axis in axes]
            sizes = zip(self.config.window, self.augmentation.size_before, strict=True)
            starts = [start - (before - size) // 2 for start, (size, before) in zip(starts, sizes, strict=True)]
            yield cut(case, starts, self.augmentation.size_before, low, high)


def random_start(rng: np.random.Generator, low: int, high: int, length: int, window: int, cell: int) -> int:
    """First voxel of a random window along one axis.

    One that holds the box (voxels low to high - 1) is shifted by up to half a cell from where prediction puts it, and
    still holds the box; one that is smaller than the box lies anywhere in it.
    """
    if high - low > window:
        return int(rng.integers(low, high - window, endpoint=True))
    (start,), size = window_starts(low, high, length, window, cell, one_size=True)
    lowest, highest = max(start - cell // 2, high - size), min(start + cell // 2, low)
    return int(rng.integers(lowest, highest, endpoint=True))


def training_batches(
    crops: TrainingCrops, start: int, end: int, workers: int, device: torch.device, ranks: Ranks
) -> Generator[Batch, None, None]:
    """This rank's part of the batches of iterations `start` to `end` - 1, on the device.

    Raises MiMError for a case that cannot be read.
    """
    size = crops.config.batch
    n = size // ranks.world
    firsts = (i * size + ranks.rank * n for i in range(start, end))
    loader = DataLoader(
        crops,
        batch_sampler=(list(range(first, first + n)) for first in firsts),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=joined,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_stopping_to_parent,
    )
    try:
        for batch in loader:
            yield batch.to(device)
    except MiMError as error:  # a worker's comes with its traceback before the one line
        raise MiMError(str(error).strip().splitlines()[-1].split("MiMError: ")[-1]) from None


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Global random numbers of NumPy and PyTorch start at a seed, and are as before afterwards."""
    before = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)
