"""What a DICOM file of several frames, such as Enhanced CT, says of its frames in nested elements.

SimpleITK passes no nested elements on. They are searched as bytes before the pixels.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.errors import printable
from nnunet_mim.nnunet.dicom_header import INTERCEPT, ORIENTATION, POSITION, SLOPE, SPACING

SAME_PLACE = 1e-3
"""mm"""
PIXELS = b"\xe0\x7f\x10\x00"
BETWEEN_FRAMES = "; "
OF_FRAMES = {
    POSITION: b"\x20\x00\x32\x00", ORIENTATION: b"\x20\x00\x37\x00", SPACING: b"\x28\x00\x30\x00",
    INTERCEPT: b"\x28\x00\x52\x10", SLOPE: b"\x28\x00\x53\x10",
}  # fmt: skip
"""elements of the functional groups of frames, and the bytes that they begin with"""


def tags_of_frames(path: str) -> dict[str, str]:
    """The values of those of OF_FRAMES that are there: the positions of all frames joined by BETWEEN_FRAMES, of the
    others one value that all frames have, or the different ones joined, which is then no number.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        groups = content[: max(content.find(PIXELS), 0)]
    found = {tag: _texts(groups, element) for tag, element in OF_FRAMES.items()}
    joined = {tag: texts if tag == POSITION else dict.fromkeys(texts) for tag, texts in found.items()}
    return {tag: BETWEEN_FRAMES.join(texts) for tag, texts in joined.items() if texts}


def _texts(groups: bytes, element: bytes) -> list[str]:
    """The values of an element wherever it stands, in explicit or implicit value representation."""
    texts = []
    for found in re.finditer(re.escape(element), groups):
        start = found.end()
        length = groups[start + 2 : start + 4] if groups[start : start + 2] == b"DS" else groups[start : start + 4]
        value = groups[start + 4 : start + 4 + int.from_bytes(length, "little")]
        texts.append(printable(value.decode("latin-1").strip(" \0"), None))
    return texts


def frames_problem(places: Sequence[Sequence[float]], n_frames: int, direction: Sequence[float]) -> str:
    """Why the frames of a file make no volume, or nothing.

    Args:
        places: position of every frame in mm, in the order in which they are stored; empty where it is no position.
        n_frames: number of frames that are read.
        direction: cosines of the volume that is read, as in SimpleITK.
    """
    if len(places) != n_frames or not all(places):
        return f"the positions of its {n_frames} frames cannot be read"
    rows = np.reshape(direction, (3, 3))[:, :2].T
    gap = slice_gap(np.array(places), rows, [f"frame {number}" for number in range(1, n_frames + 1)])
    if isinstance(gap, str):
        return gap
    backwards = (np.diff(places, axis=0) @ np.cross(*rows)).min() < 0
    return "its frames are not in the order of their places" if backwards else ""


def place_problem(places: Sequence[Sequence[float]], reader: sitk.ImageFileReader) -> str:
    """Why frames at these places, which `frames_problem` accepts, are read in other places, or nothing."""
    first, last = np.array(places[0]), np.array(places[-1])
    gap = np.linalg.norm(last - first) / (len(places) - 1)
    right = np.allclose(first, reader.GetOrigin(), rtol=0, atol=0.1)
    right &= bool(np.isclose(gap, reader.GetSpacing()[2], rtol=0.01, atol=0))
    return "" if right else "its frames are read in other places than they say"


def slice_gap(positions: np.ndarray, rows: np.ndarray, files: Sequence[str]) -> float | str:
    """Distance between slices in mm, or why they do not make a volume; positions (N, 3), rows (2, 3)."""
    normal, steps = np.cross(*rows), np.diff(positions, axis=0)
    along = np.abs(steps @ normal)
    gap, repeated = float(np.median(along)), int((along < SAME_PLACE).sum())
    if repeated:
        return f"repeated slices ({repeated}, and no acquisition number or time tells them apart)"
    if np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max() > 0.05 * gap:
        return "slices are shifted against each other (gantry tilt)"
    for (before, after), step in zip(pairwise(files), along, strict=True):
        if abs(step - gap) > 0.05 * gap:
            return f"slices are missing: {step:.3g} mm instead of {gap:.3g} between {Path(before).name} and {after}"
    return gap
