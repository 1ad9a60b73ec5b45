"""DICOM slices become volumes: what belongs together, in which order, and why some do not make a volume."""

from __future__ import annotations

import filecmp
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.nnunet.dicom_frames import SAME_PLACE, slice_gap
from nnunet_mim.nnunet.dicom_header import (
    ACQUISITION,
    IMAGE_TYPE,
    INSTANCE,
    INTERCEPT,
    MODALITY,
    ORIENTATION,
    PHASE,
    POSITION,
    SERIES,
    SLOPE,
    TIME,
    TRIGGER,
    numbers,
    rescale_problem,
)
from nnunet_mim.nnunet.image_files import FileHeader

TURNED = 0.01
"""difference of direction cosines from which on two slices lie otherwise: half a degree"""
SAME_SPACING = 1e-3
"""relative difference of the pixel spacing of slices that comes from rounding"""
PROJECTIONS = {"MIP", "MINIP", "MAXIP", "VRT", "SSD", "RAYSUM", "PROJECTION"}
"""words in the image type of what is computed along rays through a CT"""


@dataclass(frozen=True)
class Series:
    """Slices of one SeriesInstanceUID that make one volume, or one file of several frames."""

    uid: str
    files: tuple[str, ...]
    """in the order of the slices"""
    header: FileHeader
    """of the volume"""

    @property
    def is_volume(self) -> bool:
        """Whether it has more than one voxel along every axis."""
        return len(self.header.size) == 3 and min(self.header.size) >= 2


@dataclass(frozen=True)
class _Slice:
    file: str
    header: FileHeader
    rows: tuple[float, ...]
    """directions of its rows and columns; empty where the header has none"""
    position: tuple[float, ...]
    """mm; empty where the header has none"""

    @property
    def along(self) -> float:
        """Millimetres along the normal of the slice."""
        return float(np.dot(np.cross(self.rows[:3], self.rows[3:]), self.position))

    def is_like(self, other: _Slice) -> bool:
        """Whether two slices can lie in one volume."""
        one, two = self.header, other.header
        if (one.size, one.components, is_localiser(one)) != (two.size, two.components, is_localiser(two)):
            return False
        if len(self.rows) != len(other.rows) or one.frames or two.frames:
            return False
        if not np.allclose(one.spacing, two.spacing, rtol=SAME_SPACING, atol=0):
            return False
        return bool(np.allclose(self.rows, other.rows, rtol=0, atol=TURNED))


def series_of(headers: Mapping[str, FileHeader]) -> list[list[Series]]:
    """The volumes of some DICOM files (path → header), for each SeriesInstanceUID the largest first.

    A localiser inside a series, slices of another size or direction, and repeated slices that their acquisition number,
    phase or time tells apart are volumes of their own.
    """
    by_uid = defaultdict(list)
    for file, header in sorted(headers.items()):
        by_uid[header.tags.get(SERIES, "")].append(_slice(file, header))
    return [[_as_series(uid, part) for part in _parts(slices)] for uid, slices in sorted(by_uid.items())]


def _kinds(header: FileHeader) -> set[str]:
    """The words of a DICOM header's image type."""
    return set(re.split(r"[^A-Z0-9]+", header.tags.get(IMAGE_TYPE, "").upper()))


def is_localiser(header: FileHeader) -> bool:
    """Whether a DICOM header says so."""
    return "LOCALIZER" in header.tags.get(IMAGE_TYPE, "").upper()


def dicom_problem(header: FileHeader) -> str | None:
    """Why a DICOM header is not that of a CT in Hounsfield units, or None."""
    if (modality := header.tags.get(MODALITY)) != "CT":
        return f"not a CT (modality {modality or 'unknown'})"
    if is_localiser(header):
        return "a localiser"
    if kinds := PROJECTIONS & _kinds(header):
        return f"a projection of a CT ({min(kinds)} in its image type)"
    return rescale_problem(header.tags)


def _origin_doubts(header: FileHeader) -> tuple[str, ...]:
    derived = "DERIVED" in _kinds(header)
    return (f"made of other images ({header.tags[IMAGE_TYPE]} in its DICOM header)",) if derived else ()


def read_series(files: Sequence[str]) -> sitk.Image:
    """The volume of a series, in Hounsfield units; for guarded workers. Raises RuntimeError where SimpleITK cannot."""
    if len(files) == 1:
        return sitk.ReadImage(files[0])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    return reader.Execute()


def _slice(file: str, header: FileHeader) -> _Slice:
    rows, position = (numbers(header.tags.get(tag, ""), n) for tag, n in ((ORIENTATION, 6), (POSITION, 3)))
    return _Slice(file, header, rows if position else (), position if rows else ())


def _parts(slices: Sequence[_Slice]) -> Iterator[list[_Slice]]:
    """Slices that can lie in one volume, in their order; the most first, localisers last."""
    alike: list[list[_Slice]] = []
    for piece in slices:
        group = next((group for group in alike if piece.is_like(group[0])), None)
        if group is None:
            alike.append([piece])
        else:
            group.append(piece)
    for group in sorted(alike, key=lambda group: (is_localiser(group[0].header), -len(group))):
        others = [p for other in alike if other is not group for p in other if not is_localiser(p.header)]
        if others and not group[0].header.frames:
            warning = f"slices of another size or direction are in its series ({len(others)}), taken for other images"
            group[0] = replace(group[0], header=replace(group[0].header, warnings=(warning,)))
        if not group[0].rows:
            yield group
            continue
        for part in _told_apart(group):
            yield sorted(part, key=lambda piece: piece.along)


def _told_apart(group: list[_Slice]) -> list[list[_Slice]]:
    """Repeated slices, apart: copies of a file are dropped, then acquisition, phase or time is looked at."""
    kept: dict[tuple[str, tuple[float, ...]], _Slice] = {}
    copies = []
    for piece in group:
        first = kept.setdefault((piece.header.tags.get(INSTANCE, piece.file), piece.position), piece)
        if first is not piece and filecmp.cmp(first.file, piece.file, shallow=False):
            copies.append(piece)
    if copies:
        warning = f"{len(copies)} slices are there twice (the same file): taken once"
        group = [
            replace(p, header=replace(p.header, warnings=(*p.header.warnings, warning)))
            for p in group
            if p not in copies
        ]
    for tag in (ACQUISITION, PHASE, TRIGGER, TIME) if _repeats(group) else ():
        parts = defaultdict(list)
        for piece in group:
            parts[piece.header.tags.get(tag, "")].append(piece)
        if all(len(part) > 1 and not _repeats(part) for part in parts.values()):
            return [parts[value] for value in sorted(parts)]
    return [group]


def _repeats(group: Sequence[_Slice]) -> int:
    """Number of slices at a place where there is one already."""
    places = np.sort([piece.along for piece in group])
    return int((np.diff(places) < SAME_PLACE).sum())


def _as_series(uid: str, slices: Sequence[_Slice]) -> Series:
    first, files = slices[0].header, tuple(piece.file for piece in slices)
    warnings = tuple(dict.fromkeys(text for p in slices for text in (*p.header.warnings, *_origin_doubts(p.header))))
    if math.prod(first.size[2:]) > 1:
        return Series(uid, files, replace(first, warnings=warnings))
    problem, gap = first.problem or _slices_problem(slices), 1.0
    if not problem and len(slices) > 1:
        found = slice_gap(np.array([p.position for p in slices]), np.reshape(slices[-1].rows, (2, 3)), files)
        problem, gap = (found, 1.0) if isinstance(found, str) else ("", found)
    if len({(p.header.tags.get(SLOPE), p.header.tags.get(INTERCEPT)) for p in slices}) > 1:
        warnings += ("its slices have different rescale slopes or intercepts",)
    size, spacing = (*first.size[:2], len(slices)), (*first.spacing[:2], gap)
    return Series(uid, files, replace(first, size=size, spacing=spacing, problem=problem, warnings=warnings))


def _slices_problem(slices: Sequence[_Slice]) -> str:
    """Why one of some slices belongs to no volume, or nothing; that of the first one is left to `dicom_problem`."""
    if len(slices) > 1 and not slices[0].rows:
        return f"slice {slices[0].file} has no position"
    for piece in slices if dicom_problem(slices[0].header) is None else ():
        if problem := piece.header.problem or dicom_problem(piece.header):
            return f"{problem}: {Path(piece.file).name}"
    return ""
