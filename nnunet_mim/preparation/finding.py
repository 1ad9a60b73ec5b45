"""Image files and DICOM series in a user's folders, nested at any depth."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import SimpleITK as sitk

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.image_files import ENDINGS, case_name

DICOM_ENDINGS = (".dcm", ".ima", ".dicom")


@dataclass(frozen=True)
class Volume:
    """One image as it lies in the user's folders, not read yet."""

    name: str
    """of the case: letters, digits, - and _"""
    files: tuple[str, ...]
    """absolute; an image file, or the slices of a DICOM series in their order"""
    series: str = ""
    """SeriesInstanceUID; empty for an image file"""

    unreadable: bool = False
    """the files look like DICOM, but cannot be read or hold no image"""


def find_volumes(folders: Sequence[Path], known: dict[str, str] | None = None) -> list[Volume]:
    """All image files and DICOM series in folders.

    Args:
        folders: searched to any depth, links included; hidden files are left out.
        known: names that earlier calls have given, by the first file: they are kept.

    Returns:
        Volumes by name. The name is the path below the folder, made of letters, digits, - and _; where two would have
        the same name the later one gets a number.

    Raises:
        MiMError: a folder is missing, or there is nothing in any of them.
    """
    known = known or {}
    names = dict.fromkeys(known.values(), "")
    volumes = []
    for folder in folders:
        if not folder.is_dir():
            raise MiMError(f"-i {folder} is not a folder: give folders with CT (NIfTI, NRRD, MHA, DICOM)")
        for stem, found in _found(folder.resolve()):
            name = known.get(found.files[0]) or _new_name(stem, names)
            names[name] = ""
            volumes.append(replace(found, name=name))
    if not volumes:
        shown = ", ".join(map(str, folders))
        raise MiMError(f"no image in {shown}: give folders with NIfTI, NRRD or MHA files, or DICOM series")
    unique = {volume.files: volume for volume in reversed(volumes)}  # a folder inside another one of -i
    return sorted(unique.values(), key=lambda volume: volume.name)


def beside(image: str) -> list[str]:
    """Files that hold the voxels of a header file (`.mhd`, `.nhdr`)."""
    path = Path(image)
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    return sorted(str(p) for p in path.parent.glob(f"{glob.escape(path.stem)}.*raw*"))


def _found(root: Path) -> Iterator[tuple[str, Volume]]:
    """(path below the root, volume without a name) of every volume, in the order of the folders' names."""

    def stop(error: OSError) -> None:
        raise MiMError(f"cannot look into {error.filename} ({error.strerror}): make it readable, or move it away")

    visited = set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=stop):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (real := os.path.realpath(folder)) in visited:
            below[:] = []
            continue
        visited.add(real)
        relative = Path(folder).relative_to(root)
        dicom = []
        for file in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, file)
            if file.lower().endswith(ENDINGS):
                yield (relative / case_name(path)).as_posix(), Volume("", (str(path),))
            elif _is_dicom(path):
                dicom.append(str(path))
        if dicom:
            yield from _series(Path(folder), relative.as_posix() if relative.parts else root.name, dicom)


def _is_dicom(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in DICOM_ENDINGS:
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _series(folder: Path, stem: str, dicom: list[str]) -> Iterator[tuple[str, Volume]]:
    """The series in one folder, slices in the order of their positions; and what of its DICOM files is in none."""
    uids = sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
    left = set(dicom)
    for uid in uids:
        files = tuple(map(str, sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)))
        left.difference_update(files)
        if files:
            own = f"{stem}_{hashlib.sha256(uid.encode()).hexdigest()[:8]}" if len(uids) > 1 else stem
            yield own, Volume("", files, uid)
    if left:
        yield f"{stem}_unreadable", Volume("", tuple(sorted(left)), unreadable=True)


def _new_name(stem: str, taken: dict[str, str]) -> str:
    name = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_") or "case"
    if name.endswith("_seg"):  # nnU-Net keeps the segmentation of case X in X_seg
        name += "_image"
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique
