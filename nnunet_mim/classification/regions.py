"""What the network sees of a case: all of it, or a box around a mask, as windows of whole tokens.

A box grows to whole tokens with what lies around it in the case. Beyond the case the outermost voxels are repeated.
The network sees both, but only places in the box count when features are pooled.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.classification.options import LABELS_AS_ROI
from nnunet_mim.config import Size3
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_dataset_json
from nnunet_mim.nnunet.image_files import READ_SECONDS, damaged, file_problem
from nnunet_mim.nnunet.labels import read_label
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory
from nnunet_mim.system.progress import ProgressBar


@dataclass(frozen=True)
class Region:
    """One window, ready for the network; sizes are multiples of the token size."""

    voxels: np.ndarray
    """(C, X, Y, Z) float32, normalised"""
    counts: np.ndarray
    """(X, Y, Z) bool: places of the box, which are pooled"""
    mask: np.ndarray
    """(X, Y, Z) bool: places of the mask; all of the box where there is no mask"""
    start: tuple[int, int, int] = (0, 0, 0)
    """first voxel in the case, maybe negative"""

    @property
    def places(self) -> np.ndarray:
        """(2, X, Y, Z) bool: those of the box, and those of the mask in it."""
        return np.stack([self.counts, self.mask & self.counts])

    def network_input(self, mask_channel: bool) -> np.ndarray:
        """(C, X, Y, Z) float32, with the mask as last channel if wished."""
        return np.concatenate([self.voxels, self.mask[None].astype(np.float32)]) if mask_channel else self.voxels


@dataclass(frozen=True)
class CaseVoxels:
    """A preprocessed case."""

    name: str
    voxels: Any
    """(C, X, Y, Z), an array or a file that is read by slices"""
    mask: np.ndarray | None
    """(X, Y, Z) bool; None, also in place of one that is empty: the whole case is looked at"""
    spacing: tuple[float, ...]
    """mm per voxel"""
    properties: Mapping[str, Any]
    """what nnU-Net's preprocessing has recorded"""

    def __post_init__(self) -> None:
        if self.mask is not None and not self.mask.any():
            object.__setattr__(self, "mask", None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return tuple(int(n) for n in self.voxels.shape[1:])

    def box(self, margin: float) -> tuple[np.ndarray, np.ndarray]:
        """First voxel and one past the last, per axis, of the mask with a margin (mm), or of the case."""
        if self.mask is None:
            return np.zeros(3, int), np.array(self.shape)
        low, high = mask_box(self.mask)
        around = np.ceil(margin / np.array(self.spacing)).astype(int)
        return np.maximum(low - around, 0), np.minimum(high + around, self.shape)


class CaseReader:
    """Reads preprocessed cases of a dataset with their masks.

    Args:
        source: preprocessed dataset.
        roi: empty (whole cases), `labels`, or a folder of masks in the geometry of the raw images.

    Raises:
        MiMError: there is no such folder, or the dataset has no labels.
    """

    def __init__(self, source: Source, roi: str = "") -> None:
        self.source, self.roi = source, roi
        self.cases = source.dataset_class(str(source.folder), list(source.cases))
        if roi and roi != LABELS_AS_ROI:
            if not Path(roi).is_dir():
                raise MiMError(
                    f"--roi {roi} is no folder: give mim_classify train labels or a folder of masks, or bring it back"
                )
            self.ending = read_dataset_json(source.folder.parent / "dataset.json")["file_ending"]
        self._masks: dict[str, _Mask] = {}
        """masks of a folder, which a guarded worker has read, by case"""

    def check_masks(self, cases: Sequence[str]) -> None:
        """Let a guarded worker read the masks of a folder, once. Afterwards no other process opens their files.

        Raises:
            MiMError: a mask is missing or cannot be read, or its case cannot.
        """
        if not self.roi or self.roi == LABELS_AS_ROI:
            return
        todo = [case for case in cases if case not in self._masks]
        paths = [self._mask_file(case) for case in todo]
        limits = Limits(READ_SECONDS, share_of_memory(physical_memory(), 1))
        items = [(path, self.source, case) for path, case in zip(paths, todo, strict=True)]
        with closing(guarded_map(_read_mask, items, 1, limits)) as outcomes:
            bar = ProgressBar(outcomes, desc="masks", total=len(todo), unit="case", disable=len(todo) < 2)
            for index, outcome in bar:
                if not isinstance(outcome, _Mask):
                    reason = outcome.reason if isinstance(outcome, Failure) else outcome
                    raise MiMError(
                        f"cannot read {paths[index]} ({reason}): predict this case again, or remove it from the table"
                    )
                self._masks[todo[index]] = outcome

    def read(self, case: str) -> CaseVoxels:
        """Read a case. Raises MiMError where it or its mask cannot be read."""
        if self.roi and self.roi != LABELS_AS_ROI:
            self.check_masks([case])
        mask = None
        with _case_named(self.source, case):
            voxels, seg, _, properties = self.cases.load_case(case)
            if self.roi == LABELS_AS_ROI:
                mask = np.asarray(seg[0]) > 0
            elif self.roi:
                mask = self._masks[case].array()
        return CaseVoxels(case, voxels, mask, self.source.spacing, properties)

    def stamp_files(self, case: str) -> list[Path]:
        """The files that `read` reads."""
        image = self.source.case_file(case)
        if not self.roi:
            return [image]
        if self.roi == LABELS_AS_ROI:
            return [image, image.with_name(f"{case}_seg{image.suffix}")]
        return [image, self._mask_file(case)]

    def _mask_file(self, case: str) -> Path:
        path = Path(self.roi, case + self.ending)
        if not path.exists():
            raise MiMError(f"{path} is missing: predict this case too, or remove it from the table")
        return path


@dataclass(frozen=True)
class _Mask:
    """A mask in little memory: an organ in a CT of 300³ voxels is some kilobytes."""

    shape: tuple[int, ...]
    bits: bytes
    """compressed"""

    @classmethod
    def of(cls, mask: np.ndarray) -> _Mask:
        return cls(mask.shape, zlib.compress(np.packbits(mask).tobytes(), 1))

    def array(self) -> np.ndarray:
        """(X, Y, Z) bool."""
        bits = np.frombuffer(zlib.decompress(self.bits), np.uint8)
        return np.unpackbits(bits, count=math.prod(self.shape)).reshape(self.shape).astype(bool)


def _read_mask(item: tuple[Path, Source, str]) -> _Mask | str:
    """The mask in a file in the geometry of its preprocessed case, or why it cannot be read.

    May crash, hang or need much memory.
    """
    path, source, case = item
    if problem := file_problem(str(path)) or damaged(path):
        return problem
    with _case_named(source, case):
        voxels, _, _, properties = source.dataset_class(str(source.folder), [case]).load_case(case)
    return _Mask.of(resampled_mask(path, source, voxels.shape[1:], properties))


@contextmanager
def _case_named(source: Source, case: str) -> Iterator[None]:
    """Errors in reading a preprocessed case become a MiMError that names it."""
    try:
        yield
    except MiMError:
        raise
    except Exception as error:  # blosc2 has many
        reason = " ".join(str(error).split())[:200]
        raise MiMError(
            f"cannot read {source.case_file(case)} ({type(error).__name__}: {reason}): preprocess {source.dataset} "
            "again, or remove the case from the table"
        ) from error


def resampled_mask(path: Path, source: Source, shape: Sequence[int], properties: Mapping[str, Any]) -> np.ndarray:
    """A mask in the geometry of the raw image, as nnU-Net would have preprocessed it: (X, Y, Z) bool.

    Args:
        path: image file of whole numbers, any above 0 is inside. Its voxel (i, j, k) is that of the raw image.
        source: dataset whose plans the case was preprocessed with.
        shape: of the preprocessed case.
        properties: of the preprocessed case.

    Raises:
        MiMError: the mask has another size than the image, or holds no whole numbers.
    """
    plans = PlansManager(source.plans)
    configuration = plans.get_configuration(source.configuration)
    axes, before = list(plans.transpose_forward), properties["shape_before_cropping"]
    reader = plans.image_reader_writer_class()
    with TemporaryDirectory() as scratch:
        image = f"{scratch}/image.nii.gz"  # the raw image may be gone; nnU-Net knows its geometry
        reader.write_seg(np.zeros(before, np.uint8).transpose(np.argsort(axes)), image, properties)
        found = read_label(reader, str(path), image, None, f"{scratch}/mask")
    if isinstance(found, str):
        raise MiMError(f"cannot use the mask of a case ({found}): give the mask of this image")
    seg = (found[0] > 0).astype(np.int8).transpose([0, *[axis + 1 for axis in axes]])
    inside = (slice(None), *[slice(*bounds) for bounds in properties["bbox_used_for_cropping"]])
    seg = seg[inside]
    spacing = [properties["spacing"][axis] for axis in axes]
    return configuration.resampling_fn_seg(seg, list(shape), spacing, configuration.spacing)[0] > 0


def mask_box(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and one past the last of a mask with some place in it, per axis."""
    places = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return np.array([p[0] for p in places]), np.array([p[-1] + 1 for p in places])


def cut_regions(
    case: CaseVoxels, margin: float, window: Sequence[int], token_size: Size3, one_size: bool = False
) -> list[Region]:
    """The windows that cover what is looked at of a case.

    Args:
        case: with or without a mask.
        margin: mm around the mask.
        window: maximum number of voxels per axis; rounded down to whole tokens, at least one.
        token_size: voxels of a token per axis.
        one_size: windows are never smaller.
    """
    low, high = case.box(margin)
    axes = zip(low, high, case.shape, window, token_size, strict=True)
    starts, sizes = zip(*(window_starts(*axis, one_size) for axis in axes), strict=True)
    return [cut(case, start, sizes, low, high) for start in product(*starts)]


def whole_tokens(window: Sequence[int], token_size: Size3) -> Size3:
    """A window rounded down to whole tokens, at least one per axis."""
    X, Y, Z = (max(n // token, 1) * token for n, token in zip(window, token_size, strict=True))
    return X, Y, Z


def window_starts(
    low: int, high: int, length: int, window: int, token: int, one_size: bool = False
) -> tuple[list[int], int]:
    """First voxels (maybe negative) and size of the windows along one axis that cover the voxels low to high - 1."""
    largest = max(window // token, 1) * token
    if high - low > largest:
        n = -(-(high - low) // largest)
        return [round(start) for start in np.linspace(low, high - largest, n)], largest
    size = largest if one_size else -(-(high - low) // token) * token
    start = int(low) - (size - int(high - low)) // 2
    if length < size:
        return [-((size - length) // 2)], size
    return [min(max(start, 0), length - size)], size


def cut(
    case: CaseVoxels, start: Sequence[int], sizes: Sequence[int], low: np.ndarray, high: np.ndarray
) -> Region:
    """The window of these sizes at a first voxel (maybe outside the case); places from low to below high count."""
    stops = [s + n for s, n in zip(start, sizes, strict=True)]
    inside = tuple(slice(max(s, 0), min(e, n)) for s, e, n in zip(start, stops, case.shape, strict=True))
    padding = [(i.start - s, e - i.stop) for s, e, i in zip(start, stops, inside, strict=True)]
    all_channels = (slice(None), *inside)
    voxels = np.asarray(case.voxels[all_channels], np.float32)
    axes = [np.arange(s, e) for s, e in zip(start, stops, strict=True)]
    in_box = [(axis >= a) & (axis < b) for axis, a, b in zip(axes, low, high, strict=True)]
    counts = in_box[0][:, None, None] & in_box[1][:, None] & in_box[2]
    mask = counts if case.mask is None else np.pad(case.mask[inside], padding)
    return Region(np.pad(voxels, [(0, 0), *padding], mode="edge"), counts, mask, (start[0], start[1], start[2]))
